"""The card of softmax attention in a sliding window."""

from collections.abc import Iterator

from pydantic import Field, PositiveInt

from lsys.kernels.mask import Mask
from lsys.mixers.attention import AttentionCard
from lsys.mixers.card import Refusal
from lsys.section import Section


class WindowOptions(Section):
    """Own keys of window attention."""

    window: PositiveInt | None = Field(
        None, description="Tokens that a query sees, itself included; `model.window` if empty."
    )


class Window(AttentionCard):
    name, letter, title = "window", "W", "windowed softmax attention"
    Options = WindowOptions
    model_keys = (*AttentionCard.model_keys, "window")
    module = "lsys.model.mixers.window:WindowMixer"
    own: WindowOptions

    @property
    def window(self) -> int | None:
        """Tokens that a query sees, itself included; None if the configuration lacks it."""
        return self.own.window or self.model.window

    @property
    def mask(self) -> Mask:
        return Mask(window=self.window)

    def refusals(self) -> Iterator[Refusal]:
        yield from super().refusals()
        if self.window is None:
            key = "window" if self.key == self.name else self.option("window")
            layers = f"has {self.symbol} layers" if self.key == self.name else f"has {self.key} layers"
            yield Refusal(
                key, f"it is empty, and pattern {self.model.pattern_text!r} {layers}", "give the tokens of the window"
            )
