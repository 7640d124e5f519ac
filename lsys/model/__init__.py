"""The hybrid model: a layer pattern becomes Megatron ModuleSpecs; mixers: one module a card.

Its modules import megatron.core, which must find the CPU's stand-ins in place on a machine without CUDA.
"""

from lsys.runtime import install_megatron

install_megatron()
