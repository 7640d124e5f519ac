"""What a run will need and take, before it starts: memory, bytes on the links, seconds. Nothing here imports torch.

deployment    who holds which layers and how many tokens
weights       parameters, gradients, optimizer states: exact
traffic       all bytes of a step by axis and link class: exact (collectives: the ledger's formulas)
activations   live tensors of a step (kernel_memory: those of kernels; schedule: micro-batches under way); what mixers keep is on their cards
work          what a rank has to do; hardware: how fast that goes, by data sheets or a calibration
seconds       a step's time and its waterfall
plan          all of these for a configuration; search: other degrees; report: what `lsys check` prints
"""
