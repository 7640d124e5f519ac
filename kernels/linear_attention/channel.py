"""Chunks with a decay for each token and key channel (GLA)."""

from lsys.kernels.linear_attention.reference import ReferenceSegments


class ChannelSegments(ReferenceSegments):
    pass
