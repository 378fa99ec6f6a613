"""Grade responses in the background: most answers are settled by their text, in the calling process; worker processes
under limits of time and memory decide the rest. A late worker is killed and replaced, and costs only that verdict."""

import atexit
import itertools
import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress

from engine.errors import UserError
from lab import answers as answer_matching
from lab.answers import text_verdict, tidy
from reward import Grade, format_reward, last_boxed, step_reward

CACHED_VERDICTS = 20_000  # one per pair of golds and answer
ATTEMPTS = 3  # at an answer whose workers are killed: by the system for its memory, or by the answer
START_LIMIT_S = 60.0  # for a worker to import math-verify
LEAST_FAILURES = 5  # fewer grader failures than this never stop a run


class _Worker:
    """One worker process and the pipe to it."""

    def __init__(self, memory_limit_bytes: int, time_limit_s: float):
        # -P: files in lab/ must not shadow the modules that math-verify imports
        command = [sys.executable, "-P", os.path.abspath(answer_matching.__file__)]
        command += [str(memory_limit_bytes), str(time_limit_s)]
        # a new session: a signal to the run's process group must not turn pending answers into grader failures
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self.process = subprocess.Popen(command, start_new_session=True, **pipes)
        self.ready = False

    def read(self, limit_s: float) -> dict:
        """Return the next reply. TimeoutError: it is late; ValueError: it is none; BrokenPipeError: it cannot come."""
        deadline, line = time.monotonic() + limit_s, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                chunk = self.process.stdout.read(4096)
                if not chunk:
                    raise BrokenPipeError("the worker ended")
                line += chunk
        reply = json.loads(line)
        if not isinstance(reply, dict):
            raise ValueError(f"the worker replied {reply!r}")
        return reply

    def ended_by_signal(self) -> bool:
        """Whether a signal ends the process, such as that of a system without memory."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(1.0) < 0
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Grader:
    """Grades responses in the background: `submit` during sampling, `collect` afterwards.

    workers: processes for answers that the text does not settle; they start with the first such answer.
    time_limit_s: per answer in a worker, for all its accepted answers together, without start-up.
    memory_limit_bytes: address space of one worker.
    thinking: whether responses must close a thinking block before the answer.
    """

    def __init__(
        self, workers: int = 1, time_limit_s: float = 5.0, memory_limit_bytes: int = 2 << 30, thinking: bool = True
    ):
        if workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}")
        self.time_limit_s, self.memory_limit_bytes, self.thinking = time_limit_s, memory_limit_bytes, thinking
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._tickets, self._results = itertools.count(), {}
        self._verdicts: dict[tuple, str] = {}  # by (*golds, answer), oldest first
        self._slots: list[_Worker | None] = [None] * workers
        self._threads: list[threading.Thread] = []
        self._lock, self._closed = threading.Lock(), False
        atexit.register(self.close)

    def submit(self, response: str, answers: Sequence[str]) -> int:
        """Start grading `response` against its accepted answers; return a ticket for `collect`."""
        if isinstance(answers, str):
            raise TypeError("answers is a sequence of accepted answers, not one string")
        if self._closed:
            raise RuntimeError("the grader is closed")
        answer = last_boxed(response, self.thinking)
        rewards = format_reward(response, self.thinking), step_reward(response)
        verdict, golds = ("no answer", []) if answer is None else text_verdict(answer, answers)
        result, ticket = Future(), next(self._tickets)
        if verdict is None:
            self._jobs.put((ticket, golds, tidy(answer), result))
            if not self._threads:
                slots = range(len(self._slots))
                self._threads = [threading.Thread(target=self._serve, args=(slot,), daemon=True) for slot in slots]
                for thread in self._threads:
                    thread.start()
        else:
            result.set_result(verdict)
        self._results[ticket] = (result, rewards, answer)
        return ticket

    def ready(self, ticket: int) -> bool:
        """Return whether `collect` would return this ticket's grade at once. KeyError once it is collected."""
        return self._results[ticket][0].done()

    def collect(self, tickets: Sequence[int]) -> list[Grade]:
        """Wait for these tickets' grades and return them in order. KeyError for a ticket collected before."""
        grades = []
        for ticket in tickets:
            result, (form, steps), answer = self._results.pop(ticket)
            verdict = result.result()
            grades.append(Grade(verdict, 1.0 if verdict == "right" else 0.0, form, steps, answer))
        return grades

    def grade(self, items: Sequence[tuple[str, Sequence[str]]]) -> list[Grade]:
        """Grade (response, accepted answers) pairs, in order."""
        return self.collect([self.submit(response, answers) for response, answers in items])

    def close(self) -> None:
        """Stop the workers; pending answers become "grader failed". May be called twice."""
        atexit.unregister(self.close)
        with self._lock:
            self._closed = True
            for worker in self._slots:
                if worker is not None:
                    worker.process.kill()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _serve(self, slot: int) -> None:
        """Run in a thread: pass jobs to the worker in `slot`, replacing the worker when it fails."""
        while (job := self._jobs.get()) is not None:
            ticket, golds, answer, result = job
            key = (*golds, answer)
            verdict = self._verdicts.get(key)
            for _ in range(ATTEMPTS if verdict is None else 0):
                if (verdict := self._ask(slot, ticket, golds, answer)) != "killed":
                    break
            verdict = "grader failed" if verdict == "killed" else verdict
            if verdict in ("right", "wrong"):  # a failure or a time-out may not repeat
                with self._lock:
                    self._verdicts[key] = verdict
                    if len(self._verdicts) > CACHED_VERDICTS:
                        del self._verdicts[next(iter(self._verdicts))]
            result.set_result(verdict)
        self._drop(slot)

    def _ask(self, slot: int, ticket: int, golds: list[str], answer: str) -> str:
        """Return a worker's verdict, or "killed" if a signal ended the worker."""
        verdict, worker = "grader failed", None
        try:
            with self._lock:
                if self._closed:
                    return verdict
                if self._slots[slot] is None:
                    self._slots[slot] = _Worker(self.memory_limit_bytes, self.time_limit_s)
                worker = self._slots[slot]
            if not worker.ready:
                worker.ready = worker.read(START_LIMIT_S).get("ready", False)
            worker.process.stdin.write(json.dumps({"id": ticket, "golds": golds, "answer": answer}).encode() + b"\n")
            reply = worker.read(self.time_limit_s)
            if reply.get("exceeded"):
                raise TimeoutError
            if reply.get("id") == ticket and reply.get("right") in (True, False, None):
                return {True: "right", False: "wrong", None: "grader failed"}[reply["right"]]
        except TimeoutError:
            verdict = "timed out" if worker.ready else "grader failed"
        except BrokenPipeError:
            verdict = "killed" if worker.ended_by_signal() else verdict
        except (OSError, ValueError):  # the worker cannot start, or sent nonsense
            pass
        self._drop(slot)
        return verdict

    def _drop(self, slot: int) -> None:
        with self._lock:
            worker, self._slots[slot] = self._slots[slot], None
        if worker is not None:
            worker.kill()


class GraderError(UserError):
    """The grader fails too often for its verdicts to be trusted."""


def check_grader(verdicts: Mapping[str, int], most_failed_share: float) -> None:
    """Raise GraderError when more than this share of the verdicts are failures of the grader itself."""
    failed, graded = verdicts.get("grader failed", 0), sum(verdicts.values())
    if failed >= LEAST_FAILURES and failed > most_failed_share * graded:
        raise GraderError(
            f"the grader failed on {failed} of {graded} answers ({failed / graded:.1%}, more than the "
            f"{most_failed_share:.1%} allowed): check that math-verify imports and that its workers have enough "
            f"memory, or allow a larger share (reward.most_failed_share in a recipe, --most-failed-share of eval.py)"
        )
