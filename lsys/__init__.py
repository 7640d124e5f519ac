"""lsys pretrains language models on very long, very uneven sequences. It is layered over Megatron-core and owns the sequence axis."""

__version__ = "0.1.0"
