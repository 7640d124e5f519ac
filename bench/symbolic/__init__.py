"""A training step for CUDA on a machine without one: tensors of CUDA without numbers, process groups of any size without peers, streams
whose order is recorded. Planning, autograd, Megatron and lsys run as they are; what would have been launched, copied and waited for is told
to watchers.
"""
