"""A reward of one's own: a function of a Python file, called in the worker processes that engine/grader.py owns.

With `reward.function = "mine.py:score"` in a recipe, or --reward mine.py:score, score(text, row) grades each response:

    text    the response; where the model thinks, what follows </think> (without it the response earns 0, uncalled)
    row     the problem's whole row of the data
    return  a number from 0 to 1, or a bool; 1 is "right" for pass rates, filter, drop and rescue, less is learned from

What the function prints is discarded. The file is read once: editing it does not change a run under way.
"""

import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError

ROUNDING = 1e-6  # a sum of weights may miss 0 or 1 by this
MAX_SHOWN = 300  # characters of an exception


class RewardError(UserError):
    """A reward function that cannot be used."""


@dataclass(frozen=True)
class RewardFunction:
    """A function and its file, as it was when the program started."""

    path: str
    name: str
    source: str


def read_reward(given: str) -> RewardFunction | None:
    """Read the file of "FILE.py:FUNCTION"; None for "". The path is relative to the current directory."""
    if not given:
        return None
    file, _, name = given.rpartition(":")
    path = Path(file).expanduser()
    if not file or not name.isidentifier():
        raise RewardError(f"the reward function {given!r} must be FILE.py:FUNCTION, such as mine.py:score")
    try:
        return RewardFunction(str(path), name, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RewardError(f"the reward function {given}: {path.absolute()} cannot be read ({why}); fix it") from None


# ------------------------------------------------------------------------------------------------- in the worker


def load(function: RewardFunction) -> Callable[[str, dict], object]:
    """Run the file as a module and return its function; its own folder is searched first for what it imports."""
    module = types.ModuleType("reward_function")
    module.__file__ = function.path
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    sys.path.insert(0, str(Path(function.path).resolve().parent))
    exec(compile(function.source, function.path, "exec"), vars(module))
    if not callable(score := getattr(module, function.name, None)):
        kind = "no" if score is None else "no callable"
        raise AttributeError(f"it has {kind} {function.name}")
    return score


def checked(score: object) -> float:
    """Return what a reward function returned as a number from 0 to 1. Raises TypeError or ValueError."""
    if not hasattr(score, "__float__"):
        raise TypeError(f"it returned {score!r:.60}, not a number or a bool")
    value = float(score)
    if not -ROUNDING <= value <= 1 + ROUNDING:  # nan is not either
        raise ValueError(f"it returned {value}, not a number from 0 to 1")
    return 0.0 if value < ROUNDING else 1.0 if value > 1 - ROUNDING else value


def describe(error: BaseException, function: RewardFunction, first_line: int = 0) -> str:
    """Return an exception as a clause with the last line of the function's file that it passed through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == function.path]
    lines += [error.lineno] if isinstance(error, SyntaxError) and error.filename == function.path else []
    line = lines[-1] if lines else first_line
    place = f"{function.path}, line {line}" if line else function.path
    text = " ".join(f"{type(error).__name__}: {getattr(error, 'msg', error)}".split())
    return f"{text[:MAX_SHOWN]} ({place})"
