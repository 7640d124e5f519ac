"""The reference of all keys, generated from the schema: `python -m lsys.config.reference docs/configuration.md`."""

import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lsys.config.schema import Config
from lsys.section import held_section

HEAD = """# Configuration

Generated from `lsys/config/schema.py` by `python -m lsys.config.reference docs/configuration.md`; do not edit.

A run is one YAML file. Unknown keys, keys given twice and values out of range are refused, all at once. Every
key is also an option of `lsys train`, `lsys check` and `lsys topology`: `--parallel.tensor 2`,
`--data.corpora.0.path data/mine`; the value is YAML. Sizes are in tokens unless said otherwise. "Empty" is
YAML's `null`, or the key left out. Rules that tie keys to each other and to the number of ranks are checked by
`lsys check CONFIG --world-size N`.
"""


def reference() -> str:
    """The whole reference as Markdown."""
    return HEAD + "".join(_section(name, Config.model_fields[name].annotation) for name in Config.model_fields)


def _section(name: str, section: Any) -> str:
    schema = section.model_json_schema()
    inner: list[str] = []
    lines = [f"\n## `{name}`\n", f"{_first_line(section)}\n", "| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        held = held_section(field.annotation)
        if held is not None:
            is_list = held is not field.annotation
            inner.append(_section(f"{name}.{key}" + (".N" if is_list else ""), held))
            kind, default = (
                "list of sections" if is_list else "section",
                "required" if field.is_required() else "see below",
            )
        else:
            kind = kind_in_words(schema["properties"][key], schema)
            default = "required" if field.is_required() else default_in_words(field.default)
        lines.append(f"| `{key}` | {kind} | {default} | {field.description} |")
    return "\n".join(lines) + "\n" + "".join(inner)


def _first_line(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().split("\n")[0]


def default_in_words(value: Any) -> str:
    """A default as Markdown."""
    if value is None:
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def kind_in_words(field: dict, schema: dict) -> str:
    """A JSON schema's type as Markdown."""
    if "anyOf" in field:
        return " or ".join(kind_in_words(each, schema) for each in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("format") in ("path", "python-path"):
        return {"path": "path", "python-path": "Python path"}[field["format"]]
    if field.get("type") == "array":
        return f"list of {kind_in_words(field['items'], schema)}"
    kind = {"integer": "integer", "number": "number", "boolean": "`true`, `false`", "string": "text", "null": "empty"}[
        field["type"]
    ]
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {field[bound]:g}" for bound, sign in bounds.items() if bound in field]
    return " ".join([kind, ", ".join(limits)]).strip()


def main(arguments: list[str]) -> None:
    text = reference()
    if arguments:
        Path(arguments[0]).write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
