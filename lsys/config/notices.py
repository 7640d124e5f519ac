"""What a configuration says without effect, or at a price."""

from lsys.config.schema import STATE_MIXERS, Config, Model, Section


def notices(config: Config, world_size: int | None = None) -> list[str]:
    """Sentences about settings that change nothing and, where the number of ranks is known, about idle stages."""
    return [*_parallel(config, world_size), *_model(config), *_run(config)]


def _changed(section: Section, key: str) -> bool:
    """Whether a key differs from its default."""
    return getattr(section, key) != type(section).model_fields[key].default


def _parallel(config: Config, world_size: int | None) -> list[str]:
    parallel, found = config.parallel, []
    if parallel.context == 1 and _changed(parallel, "layout"):
        found.append(
            f"parallel.layout {parallel.layout} has no effect: context is 1, one rank holds all tokens of a micro-batch"
        )
    if _changed(parallel, "attention") and (parallel.context == 1 or not {*"SW"} & {*config.model.kinds}):
        why = "context is 1" if parallel.context == 1 else f"no layer of pattern {config.model.pattern!r} is S or W"
        found.append(f"parallel.attention {parallel.attention} has no effect: {why}")
    if _changed(parallel, "linear") and (parallel.context == 1 or not {*STATE_MIXERS} & {*config.model.kinds}):
        why = "context is 1" if parallel.context == 1 else f"no layer of pattern {config.model.pattern!r} has a state"
        found.append(f"parallel.linear {parallel.linear} has no effect: {why}")
    product = parallel.tensor * parallel.context * parallel.pipeline
    if world_size and world_size % product == 0:
        each = config.micro_batches // (world_size // product)
        if each < parallel.pipeline:
            found.append(
                f"{each} micro-batches per replica leave some of {parallel.pipeline} pipeline stages idle at any time"
            )
        if config.optimizer.distributed and world_size // parallel.tensor // parallel.pipeline == 1:
            found.append(
                "optimizer.distributed has no effect: there is one data x context rank to hold the optimizer states"
            )
    return found


# Letters of the layers that a key of model.linear is for, if not all with a state.
_USERS = {"decay": "L", "lrpe": "L", "norm": "L", "gate_rank": "G", "conv_width": "MD", "negative_eigenvalues": "D"}


def _without_layers(model: Model, users: dict[str, str]) -> list[str]:
    """Sentences about those keys whose layers, given by their letters, the model lacks."""
    listed = {key: " or ".join(", ".join(letters).rsplit(", ", 1)) for key, letters in users.items()}
    return [
        f"model.{key} has no effect: no layer of pattern {model.pattern!r} is {listed[key]}"
        for key, letters in users.items()
        if not {*letters} & {*model.kinds}
    ]


def _model(config: Config) -> list[str]:
    model, found = config.model, []
    changed = [key for key in type(model.linear).model_fields if _changed(model.linear, key)]
    found += _without_layers(model, {f"linear.{key}": _USERS.get(key, STATE_MIXERS) for key in changed})
    changed = [key for key in ("groups", "qk_norm", "rope_base") if _changed(model, key)]
    found += _without_layers(model, {key: "SWR" if key == "rope_base" else "SW" for key in changed})
    if "W" not in model.kinds and model.window:
        found.append(f"model.window has no effect: no layer of pattern {model.pattern!r} is W")
    unused = [letter for letter in dict.fromkeys(model.pattern) if letter not in model.kinds]
    found += [
        f"{letter} in model.pattern {model.pattern!r} has no effect: there are only {model.layers} layers"
        for letter in unused
    ]
    return found


def _run(config: Config) -> list[str]:
    train, optimizer, checkpoint, found = config.train, config.optimizer, config.checkpoint, []
    if optimizer.decay_steps is not None and optimizer.schedule != "wsd":
        found.append(f"optimizer.decay_steps has no effect: schedule is {optimizer.schedule}, not wsd")
    if optimizer.min_lr and optimizer.schedule == "constant":
        found.append("optimizer.min_lr has no effect: schedule is constant")
    if train.validate_every and not train.validate_tokens:
        found.append("train.validate_every has no effect: validate_tokens is 0")
    if train.validate_tokens and not config.data.validation_fraction:
        found.append("train.validate_tokens has no effect: data.validation_fraction is 0, nothing is held out")
    if checkpoint.every and not checkpoint.save:
        found.append("checkpoint.every has no effect: save is false")
    if len(config.data.corpora) == 1 and _changed(config.data.corpora[0], "weight"):
        found.append("data.corpora.0.weight has no effect: there is one corpus")
    return found
