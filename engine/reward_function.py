"""A reward of one's own: a function of a Python file, called in the worker processes that engine/grader.py owns.

With `reward.function = "mine.py:score"` in a recipe, or --reward mine.py:score, score(text, row) grades each response:

    text    the response; where the model thinks, what follows </think> (without it the response earns 0, uncalled)
    row     the problem's whole row of the data
    return  a number from 0 to 1, or a bool; 1 is "right" for pass rates, filter, drop and rescue, less is learned from

A worker runs `python -P -m engine.reward_function BYTES SECONDS`: a JSON line in, a JSON line out. What the function
prints is discarded. The file is read once: editing it does not change a run under way.
"""

import json
import os
import signal
import sys
from contextlib import suppress

from engine.function_file import FunctionFile, describe, load

ROUNDING = 1e-6  # a sum of weights may miss 0 or 1 by this


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

    function = FunctionFile(**json.loads(jobs.readline()))
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
