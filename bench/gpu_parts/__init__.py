"""The pieces of `bench/gpu.py`."""
