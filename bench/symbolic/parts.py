"""Which part of a model is at work, forward and backward: hooks on its layers that tell the watch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bench.symbolic.watch import Watch

PARTS = {
    "self_attention": "mixer",
    "mlp": "channel mixer",
}  # of a layer, by Megatron's names; all else of it is its rest


def follow(chunk: Any, watch: Watch) -> None:
    """From now on passes through the chunk are counted by layer, such as "forward layer 3 mixer"; layers are numbered from 1."""
    for place, layer in enumerate(chunk.decoder.layers):
        name = f"layer {layer.layer_number}"
        # What goes into a layer is what the one before gave, whose backward begins there.
        _mark(layer, f"{name} rest", "" if place else "passes", watch)
        for attribute, part in PARTS.items():
            _mark(getattr(layer, attribute), f"{name} {part}", f"backward {name} rest", watch)


def _mark(module: nn.Module, name: str, after: str, watch: Watch) -> None:
    """Count what the module does as `name`, and in backward, once it is through with it, what comes as `after`."""
    stack: list[Any] = []

    def before(unused: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack.append(watch.part(f"forward {name}"))
        stack[-1].__enter__()
        _at(args[0] if args else kwargs["hidden_states"], after, watch)

    def behind(unused: nn.Module, args: Any, out: Any) -> None:
        stack.pop().__exit__(None, None, None)
        _at(out[0] if isinstance(out, tuple) else out, f"backward {name}", watch)

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(behind)


def _at(x: Tensor, name: str, watch: Watch) -> None:
    """Tell the watch when the backward pass comes to where this was made."""
    if name and x.requires_grad:
        x.register_hook(lambda gradient: watch.enter(name))
