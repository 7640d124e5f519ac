"""What token mixers send between the ranks of a sequence, counted without torch: for choosing a method and for prediction.

By formulas over a placement of few documents, in plain Python; a file for each method (`lsys.parallel.methods` has them by
name). Tests hold them together with the schedules that run and with what the ledger counts.
"""

from lsys.parallel.messages.placement import Part, Phase, Phases, Placement

__all__ = ["Part", "Phase", "Phases", "Placement"]
