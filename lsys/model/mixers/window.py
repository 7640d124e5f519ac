"""Softmax attention in a sliding window."""

from lsys.model.mixers.softmax import SoftmaxMixer


class WindowMixer(SoftmaxMixer):
    """Softmax attention to the last tokens of the document (Beltagy et al., Longformer, 2020; Jiang et al., Mistral 7B, 2023).

    The window is the card's.
    """
