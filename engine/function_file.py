"""A function of one's own, FILE.py:FUNCTION: a reward (engine/reward_function.py), an advantage, a loss or a filter.

The file is read once, so that editing it does not change a run under way; its hash belongs to what a run was made with.
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
class FunctionFile:
    """A function and its file, as it was when the program started."""

    path: str
    name: str
    source: str


def read_function(given: str, what: str) -> FunctionFile | None:
    """Read the file of "FILE.py:FUNCTION"; None for "". The path is relative to the current directory."""
    if not given:
        return None
    file, _, name = given.rpartition(":")
    path = Path(file).expanduser()
    if not file or not name.isidentifier():
        raise FunctionError(f"the {what} {given!r} must be FILE.py:FUNCTION, such as mine.py:score")
    try:
        return FunctionFile(str(path), name, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise FunctionError(f"the {what} {given}: {path.absolute()} cannot be read ({why}); fix it") from None


def load(function: FunctionFile) -> Callable[..., Any]:
    """Run the file as a module and return its function."""
    if not callable(found := getattr(run_file(function.path, function.source), function.name, None)):
        kind = "no" if found is None else "no callable"
        raise AttributeError(f"it has {kind} {function.name}")
    return found


@cache
def run_file(path: str, source: str) -> types.ModuleType:
    """Run a file as a module, once; its own folder is searched first for what it imports."""
    module = types.ModuleType(f"own_{Path(path).stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    sys.path.insert(0, str(Path(path).resolve().parent))
    exec(compile(source, path, "exec"), vars(module))
    return module


def describe(error: BaseException, function: FunctionFile, first_line: int = 0) -> str:
    """Return an exception as a clause with the last line of the function's file that it passed through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == function.path]
    lines += [error.lineno] if isinstance(error, SyntaxError) and error.filename == function.path else []
    line = lines[-1] if lines else first_line
    place = f"{function.path}, line {line}" if line else function.path
    text = " ".join(f"{type(error).__name__}: {getattr(error, 'msg', error)}".split())
    return f"{text[:MAX_SHOWN]} ({place})"
