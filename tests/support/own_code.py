"""Code of a user's own: the example's mixer, and the text of a module with a card."""

FEATURE = "my_parts.cards:FeatureAttention"  # in examples/

CARD_TEXT = """
from lsys.mixers.card import Kept, Weight
from lsys.mixers.state import StateCard, StateOptions

class Base(StateCard):
    name, title, module = "brought", "brought", "nowhere:Nothing"
    decay = "none"

    def parts(self):
        return {"qkv": 2 * self.key_width + self.served}

    def kept(self, place):
        return Kept(0.0, 0.0, "kernel")
"""
