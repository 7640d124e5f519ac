"""Users' own code: what the configuration names by a Python path, `package.module:name`, instead of by a name of ours.

Importing a module runs it. So a path is imported only where the user's own YAML or command line names it: `lsys.config.load.load` validates
with a `UserCode` that may import all it finds. Whatever else validates a configuration, such as a checkpoint's, hands in none, or one that
may import what the user has repeated; any other path is refused by its name, and nothing of it runs. A `Config` that holds a path has
passed here, so `imported` may be asked for what its paths name.

Modules are found as Python finds them, among installed packages and in the folders of PYTHONPATH, which launchers hand to all ranks; what
lies beside the YAML or in the working directory is no module by that (launchers set PYTHONSAFEPATH), and is alike on no two nodes by itself.

A key that takes a path is annotated `Annotated[str, Named(ROLE, "name of ours", ...)]`; a role says what the object has to be.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from pydantic import GetCoreSchemaHandler, ValidationInfo
from pydantic_core import PydanticCustomError, core_schema

PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

OWN = "your own YAML or command line does not name"  # code that nothing allows


class Role(NamedTuple):
    """What an object from a path is for.

    Attributes:
        what: "an observer", in sentences.
        wrong: what is wrong with an object, and what it has to be; "" where it is one.
        is_torch_free: whether its module must not import torch: commands that answer at once read it.
    """

    what: str
    wrong: Callable[[Any], str]
    is_torch_free: bool = False


def is_path(value: str) -> bool:
    """Whether a value is meant as a path, not as a name of ours."""
    return ":" in value


def _is_subclass(base: str) -> Callable[[Any], str]:
    """What a role asks of an object: what is wrong with it, "" if it is a subclass of `base`; by that name, since its module may need torch."""

    def wrong(found: Any) -> str:
        names = [f"{each.__module__}.{each.__qualname__}" for each in getattr(found, "__mro__", ())]
        return "" if base in names else f"it is {_kind(found)}, and has to be a subclass of {base}"

    return wrong


def _is_called(signature: str) -> Callable[[Any], str]:
    return lambda found: "" if callable(found) else f"it is {_kind(found)}, which cannot be called as {signature}"


def _kind(found: Any) -> str:
    kinds = {type: "a class", type(sys): "a module"}
    return kinds.get(type(found), f"of the type {type(found).__name__}")


def _is_optimizer(found: Any) -> str:
    states = getattr(found, "states", 0)
    if isinstance(states, Real) and float(states).is_integer() and float(states) >= 0:
        return _is_called("make(groups, options)")(found)
    return f"its `states` is {states!r}, and has to be how many numbers it keeps for each of a parameter: 0 or more, such as 2"


OBSERVER = Role("an observer", _is_subclass("lsys.train.observers.StepObserver"))
SCHEDULE = Role("a schedule", _is_called("factor(step)"))
FINAL_LOSS = Role("a loss", _is_called("make(settings)"))
OPTIMIZER = Role("an optimizer", _is_optimizer)


class UserCode:
    """Which paths may be imported while a configuration is validated, as its context.

    Args:
        allowed: the paths that the user has named; None: all, since the text that is validated is the user's own.
        needed: the roles whose objects will be used; those of others are not even imported where they are allowed. None: all.

    Attributes:
        refused: the paths that were found and are not allowed.
    """

    def __init__(self, allowed: Container[str] | None, needed: Container[Role] | None = None) -> None:
        self.allowed, self.needed, self.refused = allowed, needed, dict[str, None]()

    def find(self, path: str, role: Role) -> Any:
        """The object of a path; None where the role is not needed.

        Raises:
            PydanticCustomError: it is not allowed, cannot be imported, or is none of this role.
        """
        if not PATH.fullmatch(path):
            raise _refusal(f"{role.what} of your own is named package.module:name", MISNAMED)
        if self.allowed is not None and path not in self.allowed:
            self.refused[path] = None
            raise _refusal(f"{path} would run code that {OWN}")
        if self.needed is not None and role not in self.needed:
            return None
        before = {*sys.modules} & HEAVY
        found = imported(path)
        if problem := role.wrong(found):
            raise _refusal(f"{path} is not {role.what}: {problem}")
        _require_light(path, role, {*sys.modules} & HEAVY - before)
        return found


# pydantic's names of these mistakes: of code, which another node may have otherwise, and of what is no path, on any node.
REFUSED: Final = "user_code"
MISNAMED: Final = "user_code_name"
HEAVY = frozenset({"torch", "megatron.core"})


def of(info: ValidationInfo) -> UserCode:
    """What may be imported in this validation: nothing, if its caller does not say."""
    return info.context if isinstance(info.context, UserCode) else UserCode(())


def imported(path: str) -> Any:
    """The object of a path that has been allowed.

    Raises:
        PydanticCustomError: there is no such module or name, or the module cannot be imported.
    """
    module, _, name = path.partition(":")
    try:
        found = import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise _refusal(not_found(module)) from error
        where = _line(error)
        raise _refusal(f"importing {module} failed{where}: {type(error).__name__}: {error}") from error
    if not hasattr(found, name):
        raise _refusal(lacks(module, name, vars(found)))
    return getattr(found, name)


def lacks(module: str, name: str, names: Iterable[str]) -> str:
    """That a module which has `names` has not this one, in words."""
    similar = difflib.get_close_matches(name, [each for each in names if not each.startswith("_")], n=1)
    return f"module {module} has no {name}" + (f"; did you mean {similar[0]}?" if similar else "")


def not_found(module: str) -> str:
    """That there is no such module, in words, and where it is looked for."""
    folders = os.environ.get("PYTHONPATH", "")
    top = module.partition(".")[0]
    text = f"there is no module {module} among installed packages and in PYTHONPATH ({folders or 'empty'})"
    here = Path.cwd()
    is_here = (here / f"{top}.py").is_file() or (here / top).is_dir()
    place = str(here) if is_here else "FOLDER"
    return f"{text}; install its package, or set PYTHONPATH={place} on every node, the folder that has {top} in it"


def _line(error: BaseException) -> str:
    """Where in the user's file an import failed."""
    if isinstance(error, SyntaxError):
        return f" at {error.filename}, line {error.lineno}"
    trace, found = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith("<frozen") and code.co_filename != __file__:
            found = f" at {code.co_filename}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _require_light(path: str, role: Role, new: set[str]) -> None:
    """Refuse a module that imports what it must not, or what it must not import first."""
    if role.is_torch_free and new:
        heavy = ", ".join(sorted(new))
        raise _refusal(
            f"importing {path.partition(':')[0]} imports {heavy}; {role.what} is read by commands that answer at once, so put what needs "
            "it into another module"
        )
    if "megatron.core" in new and not _is_prepared():
        raise _refusal(
            f"importing {path.partition(':')[0]} imports megatron.core, which lsys prepares first; begin that module with: "
            "from lsys.runtime import install_megatron; install_megatron()"
        )


def _is_prepared() -> bool:
    """Whether megatron.core may be imported: there is a GPU, or `lsys.runtime.install_megatron` has put its finder in place."""
    finders = [type(finder).__module__ for finder in sys.meta_path]
    return "lsys.runtime.megatron" in finders or bool(sys.modules["torch"].cuda.is_available())


def _refusal(text: str, kind: Literal["user_code", "user_code_name"] = REFUSED) -> PydanticCustomError:
    return PydanticCustomError(kind, "{said}", {"said": text})


@dataclass(frozen=True)
class Named:
    """Annotation of a text that is one of our names or the path of an object of the user's own."""

    role: Role
    names: tuple[str, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.with_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        path = {"type": "string", "format": "python-path"}
        return {"anyOf": [{"enum": list(self.names), "type": "string"}, path]} if self.names else path

    def _checked(self, value: str, info: ValidationInfo) -> str:
        if value in self.names:
            return value
        if not is_path(value):
            ours = f"it should be {', '.join(map(repr, self.names))} or " if self.names else ""
            raise _refusal(f"{ours}{self.role.what} of your own is named package.module:name", MISNAMED)
        of(info).find(value, self.role)
        return value
