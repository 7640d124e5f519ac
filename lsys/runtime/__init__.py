"""Devices, process groups, Megatron on CPU. The only place that reads the environment."""

from lsys.runtime.megatron import install_megatron

__all__ = ["install_megatron"]
