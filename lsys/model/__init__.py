"""The hybrid model: a layer pattern becomes Megatron ModuleSpecs; one file per mixer.

`lsys.runtime.install_megatron()` must have run before this package is imported: it imports megatron.core.
"""
