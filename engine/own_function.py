"""A function of one's own file, FILE.py:NAME: a reward here; lab/variants.py has advantages, losses and filters.

With `reward.function = "mine.py:score"` in a recipe, or --reward mine.py:score, score(text, row) grades each response:

    text    the response; where the model thinks, what follows </think> (without it the response earns 0, uncalled)
    row     the problem's whole row of the data
    return  a number from 0 to 1, or a bool; 1 is "right" for pass rates, filter, drop and rescue, less is learned from

A worker of engine/grader.py runs `python -P -m engine.own_function BYTES SECONDS`: a JSON line in, a JSON line out.
What the function prints is discarded. The file is read once: editing it does not change a run under way.
"""

import json
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from engine.errors import UserError

ROUNDING = 1e-6  # a sum of weights may miss 0 or 1 by this
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


# ----------------------------------------------------------------------------------------------------- the worker


def checked(score: object) -> float:
    """Return what a reward function returned as a number from 0 to 1. Raises TypeError or ValueError."""
    if not hasattr(score, "__float__"):
        raise TypeError(f"it returned {score!r:.60}, not a number or a bool")
    value = float(score)
    if not -ROUNDING <= value <= 1 + ROUNDING:  # nan is not either
        raise ValueError(f"it returned {value}, not a number from 0 to 1")
    return 0.0 if value < ROUNDING else 1.0 if value > 1 - ROUNDING else value


def work(memory_limit_bytes: int, time_limit_s: float) -> None:
    """The worker's life: read the function, then {"id", "text", "row"}, write {"id", "score"}, until the pipe ends."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    with suppress(ValueError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    jobs, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # whatever the function, or a process that it starts, reads and prints
        os.dup2(nothing, stream)

    function = OwnFunction(**json.loads(jobs.readline()))
    try:
        score = load(function)
    except BaseException as error:
        print(json.dumps({"error": describe(error, function)}), file=replies)
        return
    print(json.dumps({"ready": True}), file=replies)
    for line in jobs:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, time_limit_s + 1)  # ends this process should the parent be gone
        reply, last = {"id": job["id"]}, False
        try:
            reply["score"] = checked(score(job["text"], job["row"]))
        except MemoryError:  # what is left of this process is not to be used
            reply["exceeded"] = last = True
        except BaseException as error:
            reply["error"] = describe(error, function, getattr(getattr(score, "__code__", None), "co_firstlineno", 0))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies)
        if last:
            return


if __name__ == "__main__":
    work(int(sys.argv[1]), float(sys.argv[2]))
