"""The worker process of engine/grader.py: compares answers with math-verify, or calls a reward function.

`python -P -m engine.grader_worker BYTES SECONDS` reads JSON lines: first the reward function, {} to compare answers;
then {"id", "text", "row"}, an answer and its golds where answers are compared. It replies {"id", "score"}, or has
"error" or "exceeded" in place of the score.
"""

import gc
import json
import logging
import os
import signal
import sys
from contextlib import suppress

from engine.own_function import OwnFunction, describe, load

ROUNDING = 1e-6  # a sum of weights may miss 0 or 1 by this


def load_comparison():
    """Return the comparison of answers, once math-verify is imported and its grammar compiled."""
    from lab.answers import ask_math_verify, is_right

    logging.disable()
    ask_math_verify("x", "y")
    gc.freeze()  # sympy's objects are many and stay
    gc.set_threshold(100_000, 50, 50)
    return is_right


def checked(score: object) -> float:
    """Return what a reward function returned as a number from 0 to 1. Raises TypeError or ValueError."""
    if not hasattr(score, "__float__"):
        raise TypeError(f"it returned {score!r:.60}, not a number or a bool")
    value = float(score)
    if not -ROUNDING <= value <= 1 + ROUNDING:  # nan is not either
        raise ValueError(f"it returned {value}, not a number from 0 to 1")
    return 0.0 if value < ROUNDING else 1.0 if value > 1 - ROUNDING else value


def work(memory_limit_bytes: int, time_limit_s: float) -> None:
    """Answer until the pipe ends."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    with suppress(ValueError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    jobs, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    given, nothing = json.loads(jobs.readline()), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # whatever the function, or a process that it starts, reads and prints
        os.dup2(nothing, stream)

    # what the text of an answer exceeds is its own doing, as being late is; a function's errors are its own
    exceeded = MemoryError if given else (MemoryError, OverflowError, RecursionError)
    function = OwnFunction(**given) if given else OwnFunction("lab/answers.py", "is_right", "")
    try:
        score = load(function) if given else load_comparison()
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
        except exceeded:  # what is left of this process is not to be used
            reply["exceeded"] = last = True
        except BaseException as error:
            reply["error"] = describe(error, function, getattr(getattr(score, "__code__", None), "co_firstlineno", 0))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies)
        if last:
            return


if __name__ == "__main__":
    work(int(sys.argv[1]), float(sys.argv[2]))
