"""A function of one's own file, FILE.py:NAME: a reward here; lab/variants.py has advantages, losses and filters.

With `reward.function = "mine.py:score"` in a recipe, or --reward mine.py:score, score(text, row) grades each response:

    text    the response; where the model thinks, what follows </think> (without it the response earns 0, uncalled)
    row     the problem's whole row of the data
    return  a number from 0 to 1, or a bool; 1 is "right" for pass rates, filter, drop and rescue, less is learned from

engine/grader_worker.py calls it, and discards what it prints. The file is read once: editing it does not change a run
under way.
"""

import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from engine.errors import UserError

MAX_SHOWN = 300  # characters of an exception


class FunctionError(UserError):
    """A function of one's own that cannot be used."""


@dataclass(frozen=True)
class OwnFunction:
    """A function and its file, as it was when the program started."""

    path: str
    name: str
    source: str


def read_function(given: str) -> OwnFunction | None:
    """Read the file of "FILE.py:FUNCTION"; None for "". The path is relative to the current directory."""
    if not given:
        return None
    file, _, name = given.rpartition(":")
    path = Path(file).expanduser()
    if not file or not name.isidentifier():
        raise FunctionError(f"the function {given!r} must be FILE.py:FUNCTION, such as mine.py:score")
    try:
        return OwnFunction(str(path), name, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise FunctionError(f"the function {given}: {path.absolute()} cannot be read ({why}); fix it") from None


@cache
def load(function: OwnFunction) -> Callable[..., Any]:
    """Run the file as a module and return its function; its own folder is searched first for what it imports."""
    module = types.ModuleType(f"own_{function.name}")
    module.__file__ = function.path
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    sys.path.insert(0, str(Path(function.path).resolve().parent))
    exec(compile(function.source, function.path, "exec"), vars(module))
    if not callable(found := getattr(module, function.name, None)):
        kind = "no" if found is None else "no callable"
        raise AttributeError(f"it has {kind} {function.name}")
    return found


def describe(error: BaseException, function: OwnFunction, first_line: int = 0) -> str:
    """Return an exception as a clause with the last line of the function's file that it passed through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == function.path]
    lines += [error.lineno] if isinstance(error, SyntaxError) and error.filename == function.path else []
    line = lines[-1] if lines else first_line
    place = f"{function.path}, line {line}" if line else function.path
    text = " ".join(f"{type(error).__name__}: {getattr(error, 'msg', error)}".split())
    return f"{text[:MAX_SHOWN]} ({place})"
