"""Chunks of the delta rule."""

from lsys.kernels.linear_attention.reference import ReferenceSegments


class DeltaSegments(ReferenceSegments):
    pass
