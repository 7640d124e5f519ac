"""What one operation of a process group moves: the ledger's own formulas, without its hooks, which need torch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import lsys.parallel

if TYPE_CHECKING:
    from lsys.parallel.ledger.traffic import Operation, Traffic, traffic
else:
    # The file itself imports nothing but the standard library; its package imports the hooks.
    _path = Path(lsys.parallel.__path__[0]) / "ledger" / "traffic.py"
    _spec = importlib.util.spec_from_file_location("lsys.predict._ledger_traffic", _path)
    _module = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    Operation, Traffic, traffic = _module.Operation, _module.Traffic, _module.traffic

__all__ = ["Operation", "Traffic", "traffic"]
