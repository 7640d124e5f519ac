"""From a YAML file and command-line overrides to a `Config`, with every mistake reported at once; and back to text."""

import contextlib
import copy
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lsys.config.messages import ConfigError, Mistake, from_validation, meant, refusal
from lsys.config.model import Model
from lsys.config.overrides import Override
from lsys.config.schema import Config
from lsys.config.user_code import UserCode
from lsys.section import Section


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 3e-4 as the number it is in YAML 1.2 (a string in 1.1)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


Rules = Callable[[Config], list[Mistake]]


def load(path: str | Path, overrides: Iterable[Override] = (), rules: Rules | None = None) -> Config:
    """Read a configuration of the user's own: what code it names by a path is imported (`lsys.config.user_code`).

    Args:
        path: the YAML file.
        overrides: values that take the place of the file's, see `lsys.config.overrides`; lists by index.
        rules: what else a configuration must satisfy; asked even if unknown keys are refused, so that all is said at once.

    Raises:
        ConfigError: the file cannot be read, or its keys and values are refused; it names all of them. A FilesError where code of the
            user's own is among it, which another node may have.
    """
    tree = _read(Path(path))
    mistakes = override(tree, overrides)
    config, code = None, UserCode(None)
    try:
        config = Config.model_validate(tree, context=code)
    except ValidationError as error:
        mistakes += from_validation(error, Config)
        with contextlib.suppress(ValidationError):
            config = Config.model_validate(_without_unknown_keys(tree, error), context=code)
    if config is not None and rules is not None:
        mistakes += rules(config)
    if mistakes or config is None:
        raise refusal(mistakes)
    return config


def _without_unknown_keys(tree: dict, error: ValidationError) -> dict:
    known = copy.deepcopy(tree)
    for found in error.errors(include_url=False):
        if found["type"] == "extra_forbidden":
            *above, name = found["loc"]
            section: Any = known
            for part in above:
                section = section[part]
            del section[name]
    return known


def _read(path: Path) -> dict:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            [Mistake("", f"{path} cannot be read: {reason}", "name a YAML file, such as configs/quickstart.yaml")]
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError([Mistake("", _yaml_problem(str(path), error), _yaml_remedy(error))]) from None
    if not isinstance(tree, dict):
        raise ConfigError([Mistake("", f"{path} is not a mapping of sections", "begin with model:, data: and train:")])
    return {name: {} if section is None else section for name, section in tree.items()}  # all keys commented out


def _yaml_problem(where: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{where}{place} is not YAML: {getattr(error, 'problem', None) or error}"


def _yaml_remedy(error: yaml.YAMLError) -> str:
    problem = str(getattr(error, "problem", None) or "")
    if "'\\t'" in problem:
        return "indent with spaces, not with tabs"
    return (
        "leave one of the two out" if problem.endswith("is given twice") else "a line is KEY: VALUE, lists are [a, b]"
    )


def override(tree: dict, overrides: Iterable[Override]) -> list[Mistake]:
    """Put the values into the tree; what cannot be put there is returned."""
    mistakes = []
    for names, text in overrides:
        key = ".".join(names)
        if len(names) < 2:
            mistakes.append(Mistake("", f"{key!r} is no option", _option(key, text)))
            continue
        if text is None:
            mistakes.append(Mistake(key, "no value was given", f"write --{key} VALUE"))
            continue
        try:
            _put(tree, names, yaml.load(text, _Loader))  # noqa: S506 (a SafeLoader)
        except yaml.YAMLError as error:
            mistakes.append(Mistake(key, _yaml_problem(repr(text), error)))
        except LookupError as error:
            mistakes.append(Mistake(key, str(error.args[0])))
    return mistakes


def _option(word: str, value: str | None) -> str:
    """What to write instead of a word that is no option."""
    section, _, key = word.lstrip("-").partition(".")
    path = ""
    if key and section in Config.model_fields:  # of Hydra, parallel.tensor=2
        path = f"{section}.{key}"
    elif word.startswith("-") and not key:
        path = meant(section, Config)
    if not path:
        return "write --section.key value, such as --parallel.tensor 2"
    return f"did you mean --{path}{'' if value is None else f' {value}'}?"


def _put(tree: dict, names: Sequence[str], value: Any) -> None:
    node: Any = tree
    for depth, name in enumerate(names):
        last = depth == len(names) - 1
        here = ".".join(names[:depth])
        if isinstance(node, list):
            if not name.isdigit() or int(name) > len(node):
                raise LookupError(
                    f"{here} is a list of {len(node)}, which has no {name!r}; take an index from 0 to {len(node)}"
                )
            index: Any = int(name)
            if index == len(node):
                node.append({})
        elif isinstance(node, dict):
            index = name
        else:
            raise LookupError(f"{here} is {node!r}, which has no keys; override {here} itself")
        if last:
            node[index] = value
        elif isinstance(node, dict) and node.get(index) is None:
            node[index] = [] if names[depth + 1].isdigit() else {}
        if not last:
            node = node[index]


def resolved(config: Config) -> dict[str, Any]:
    """All keys with plain values; those that follow from others are filled in. Of mixers, those that the model has."""
    tree = config.model_dump(mode="json") | {"model": _resolved_model(config.model)}
    if config.optimizer.schedule == "wsd":
        tree["optimizer"]["decay_steps"] = config.optimizer.decay_steps or max(1, config.train.steps // 5)
    return tree


def model_keys(model: Model | dict[str, Any], code: UserCode | None = None) -> dict[str, Any]:
    """What a model is, by dotted keys, whatever version wrote it and in whatever form: with the values that follow from others.

    Of mixers, those that it has; the patterns are the kinds of its layers.

    Args:
        code: what it may import; nothing, if None.

    Raises:
        ValidationError: it is no model that this version knows, or names code that must not be imported.
    """
    model = model if isinstance(model, Model) else Model.model_validate(model, context=code)
    tree = _resolved_model(model) | {
        "pattern": model.shortened(model.kinds),
        "channels": model.shortened_channels(model.channel_kinds),
    }

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        pairs = ((f"{prefix}{name}", value) for name, value in tree.items())
        return {
            k: v
            for key, value in pairs
            for k, v in (flat(value, f"{key}.") if isinstance(value, dict) else {key: value}).items()
        }

    return flat(tree)


def _resolved_model(model: Model) -> dict[str, Any]:
    tree = model.model_dump(mode="json")
    tree |= dict(groups=model.kv_heads, head_dim=model.head_width, ffn=model.ffn_width)
    tree["linear"] |= dict(
        heads=model.linear_heads,
        head_dim=model.linear_head_width,
        key_heads=model.linear_key_heads,
        key_dim=model.linear_key_width,
    )
    kinds = {*model.kinds, *model.channel_kinds}
    sections = {key: model.mixers.section(key) for key in model.mixers.keys if key in kinds}
    dumped = {key: _dumped(section) for key, section in sections.items() if section}
    tree["mixers"] = {key: section for key, section in dumped.items() if section}
    return tree


def _dumped(section: Section) -> dict[str, Any]:
    """A section with plain values, without what is empty by default."""
    empty = {key for key, field in type(section).model_fields.items() if field.default is None}
    dumped = section.model_dump(mode="json")
    return {key: value for key, value in dumped.items() if not (value is None and key in empty)}


def dump(config: Config) -> str:
    """The whole configuration as YAML that `load` reads; values that follow from others are filled in."""
    return yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True, width=120)


def loads(text: str, code: UserCode | None = None) -> Config:
    """The configuration of which `dump` made the text, such as a checkpoint's.

    Args:
        code: what it may import, such as what the user has repeated; nothing, if None.

    Raises:
        ConfigError: it has keys or values that this version does not know, or names code that must not be imported; it names all of them.
    """
    try:
        return Config.model_validate(yaml.load(text, _Loader), context=code)  # noqa: S506 (a SafeLoader)
    except ValidationError as error:
        raise ConfigError(from_validation(error, Config)) from None


def config_hash(config: Config) -> str:
    """SHA-256 of `dump`, 64 hex digits: the same for two files that mean the same run."""
    return hashlib.sha256(dump(config).encode()).hexdigest()
