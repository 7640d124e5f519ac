"""The configuration of a run: schema, loading, rules, messages."""

from lsys.config.schema import Config

__all__ = ["Config"]
