"""The card of softmax attention."""

from lsys.mixers.attention import AttentionCard


class Softmax(AttentionCard):
    name, letter, title = "softmax", "S", "softmax attention"
    module = "lsys.model.mixers.softmax:SoftmaxMixer"
