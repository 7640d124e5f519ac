"""What token mixers send between the ranks of a sequence, counted without torch: for choosing a method and for prediction.

The same figures as `lsys.parallel.attention.cost` and `lsys.parallel.linear.cost`, which go by the schedules that run;
these go by formulas over a placement of few documents, in plain Python. Tests hold them together.
"""

from lsys.parallel.messages.placement import Part, Phase, Phases, Placement

__all__ = ["Part", "Phase", "Phases", "Placement"]
