"""Grade responses in the background: most answers are settled by their text, in the calling process; worker processes
under limits of time and memory decide the rest, or call a reward function (engine/own_function.py). A late worker is
killed and replaced, and costs only that verdict."""

import atexit
import itertools
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from engine.errors import UserError
from engine.own_function import FunctionError, OwnFunction, read_function
from lab.answers import text_verdict, tidy
from reward import Grade, format_reward, last_boxed, response_body, step_reward

ROOT = Path(__file__).resolve().parent.parent  # of the code
CACHED_VERDICTS = 20_000  # one per pair of golds and answer
ATTEMPTS = 3  # at an answer whose workers are killed: by the system for its memory, or by the answer
START_LIMIT_S = 60.0  # for a worker to import math-verify, or a reward function's file
MAX_SHOWN = 200  # characters of golds in an error
LEAST_FAILURES = 5  # fewer grader failures than this never stop a run


class _Worker:
    """One worker process and the pipe to it."""

    def __init__(self, memory_limit_bytes: int, time_limit_s: float, reward: OwnFunction | None):
        limits = str(memory_limit_bytes), str(time_limit_s)
        command = [sys.executable, "-P", "-m", "engine.grader_worker", *limits]  # -P: not the current folder's modules
        # a new session: a signal to the run's process group must not turn pending answers into grader failures
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # a thread per core would take more address space than a worker has
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, start_new_session=True, env=environment, **pipes)
        os.set_blocking(self.process.stdin.fileno(), False)
        self.ready = False
        self.send(asdict(reward) if reward else {}, START_LIMIT_S)

    def send(self, message: dict, limit_s: float) -> None:
        """Send a message of any length. TimeoutError: the worker does not read it."""
        data, deadline = memoryview(json.dumps(message, default=str).encode() + b"\n"), time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdin, selectors.EVENT_WRITE)
            while data:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                data = data[self.process.stdin.write(data) or 0 :]

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

    def end(self) -> None:
        """Kill the process and those that it has started."""
        with suppress(ProcessLookupError, PermissionError):  # macOS forbids it for a group of zombies
            os.killpg(self.process.pid, signal.SIGKILL)

    def kill(self) -> None:
        self.end()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Grader:
    """Grades responses in the background: `submit` during sampling, `collect` afterwards.

    workers: processes for answers that the text does not settle; they start with the first such answer.
    time_limit_s: per answer in a worker, for all its accepted answers together, without start-up.
    memory_limit_bytes: address space of one worker.
    thinking: whether responses must close a thinking block before the answer.
    reward: "FILE.py:FUNCTION", called in a worker on every response instead of comparing answers. Raises FunctionError.
    """

    def __init__(
        self,
        workers: int = 1,
        time_limit_s: float = 5.0,
        memory_limit_bytes: int = 2 << 30,
        thinking: bool = True,
        reward: str = "",
    ):
        if workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}")
        self.reward, self.given = read_function(reward), reward
        self.failures: dict[str, str] = {}  # of the reward function, or at a gold: the first of each verdict
        self.time_limit_s, self.memory_limit_bytes, self.thinking = time_limit_s, memory_limit_bytes, thinking
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._tickets, self._results = itertools.count(), {}
        self._verdicts: dict[tuple, str] = {}  # by (*golds, answer), oldest first
        self._slots: list[_Worker | None] = [None] * workers
        self._threads: list[threading.Thread] = []
        self._lock, self._closed = threading.Lock(), False
        atexit.register(self.close)
        if self.reward:  # a mistake in its file is told before anything is sampled
            self._slots[0] = self._start()

    def _start(self) -> _Worker:
        """Start the first worker of a reward function. Raises FunctionError."""
        worker, why = _Worker(self.memory_limit_bytes, self.time_limit_s, self.reward), ""
        try:
            reply = worker.read(START_LIMIT_S)
            worker.ready, why = reply.get("ready", False), reply.get("error", "")
        except TimeoutError:
            why = f"its import takes more than {START_LIMIT_S:g} seconds"
        except (OSError, ValueError):
            why = "its import ends the process"
        if not worker.ready:
            worker.kill()
            self.close()
            raise FunctionError(f"the reward function {self.given} cannot be used: {why}; fix its file or its name")
        return worker

    def submit(self, response: str, answers: Sequence[str], row: dict | None = None) -> int:
        """Start grading `response` against its accepted answers, or with its problem's row; return a ticket."""
        if isinstance(answers, str):
            raise TypeError("answers is a sequence of accepted answers, not one string")
        if self._closed:
            raise RuntimeError("the grader is closed")
        answer = last_boxed(response, self.thinking)
        rewards = format_reward(response, self.thinking), step_reward(response)
        if self.reward:
            job = {"text": response_body(response, self.thinking), "row": row or {}}
            verdict = "no answer" if job["text"] is None else None
        else:
            verdict, golds = ("no answer", []) if answer is None else text_verdict(answer, answers)
            job = {"text": tidy(answer), "row": golds, "golds": list(answers)} if verdict is None else {}
        result, ticket = Future(), next(self._tickets)
        if verdict is None:
            self._jobs.put((ticket, job, result))
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
            score = verdict if isinstance(verdict, float) else float(verdict == "right")
            if isinstance(verdict, float):
                verdict = "right" if score == 1 else "wrong"
            grades.append(Grade(verdict, score, form, steps, answer))
        return grades

    def grade(self, items: Sequence[tuple]) -> list[Grade]:
        """Grade (response, accepted answers) or (response, accepted answers, row), in order."""
        return self.collect([self.submit(*item) for item in items])

    def close(self) -> None:
        """Stop the workers; pending answers become "grader failed". May be called twice."""
        atexit.unregister(self.close)
        with self._lock:
            self._closed = True
            for worker in self._slots:
                if worker is not None:
                    worker.end()
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
            ticket, question, result = job
            key = () if self.reward else (*question["row"], question["text"])
            verdict = self._verdicts.get(key)
            for _ in range(ATTEMPTS if verdict is None else 0):
                if (verdict := self._ask(slot, ticket, question)) != "killed":
                    break
            verdict = self._failure("its process was killed") if verdict == "killed" else verdict
            if verdict in ("right", "wrong"):  # a failure or a time-out may not repeat
                with self._lock:
                    self._verdicts[key] = verdict
                    if len(self._verdicts) > CACHED_VERDICTS:
                        del self._verdicts[next(iter(self._verdicts))]
            result.set_result(verdict)
        self._drop(slot)

    def _failure(self, why: str, verdict: str = "") -> str:
        """Return the verdict of a failure, by default the grader's own; a reward function's first is remembered."""
        verdict = verdict or ("reward failed" if self.reward else "grader failed")
        if self.reward and not self._closed:
            self.failures.setdefault(verdict, f"{self.given}: {why}")
        return verdict

    def _ask(self, slot: int, ticket: int, question: dict) -> str | float:
        """Return a worker's verdict or a reward function's score, or "killed" if a signal ended the worker."""
        worker, why, verdict = None, "", ""
        try:
            with self._lock:
                if self._closed:
                    return self._failure("closed")
                if self._slots[slot] is None:
                    self._slots[slot] = _Worker(self.memory_limit_bytes, self.time_limit_s, self.reward)
                worker = self._slots[slot]
            if not worker.ready:
                worker.ready = worker.read(START_LIMIT_S).get("ready", False)
            worker.send({"id": ticket, **question}, self.time_limit_s)
            reply = worker.read(self.time_limit_s)
            if reply.get("exceeded"):
                raise TimeoutError
            if reply.get("id") == ticket and "error" in reply:
                if not self.reward:  # no answer's fault
                    golds = " or ".join(question["golds"])[:MAX_SHOWN]
                    self.failures.setdefault("grader failed", f"the gold {golds}: {reply['error']}")
                return self._failure(reply["error"])
            if reply.get("id") == ticket and "score" in reply:
                score = float(reply["score"])
                return score if self.reward else "right" if score else "wrong"
        except TimeoutError:
            limits = f"{self.time_limit_s:g} seconds or {self.memory_limit_bytes / 2**30:g} GiB"
            why, verdict = f"a call took more than {limits}", "timed out" if worker and worker.ready else ""
        except BrokenPipeError:
            why, verdict = "a call ended its process", "killed" if worker and worker.ended_by_signal() else ""
        except (OSError, ValueError):  # the worker cannot start, or sent nonsense
            why = "its worker did not start, or sent nonsense"
        self._drop(slot)
        return verdict if verdict == "killed" else self._failure(why, verdict)

    def _drop(self, slot: int) -> None:
        with self._lock:
            worker, self._slots[slot] = self._slots[slot], None
        if worker is not None:
            worker.kill()


class GraderError(UserError):
    """The grader fails too often for its verdicts to be trusted."""


def check_grader(
    verdicts: Mapping[str, int], most_failed_share: float, failures: Mapping[str, str] | None = None
) -> None:
    """Raise GraderError when more than this share of the verdicts are failures of the grader or reward function."""
    own = verdicts.get("reward failed", 0)
    failed, graded = own + verdicts.get("grader failed", 0), sum(verdicts.values())
    if failed >= LEAST_FAILURES and failed > most_failed_share * graded:
        why = (failures or {}).get("reward failed" if own else "grader failed", "")
        advice = "check that math-verify imports and that its workers have enough memory"
        if own:
            advice = "let the function return 0.0 where a response is at fault"
        elif why:
            advice = "fix the rows whose gold cannot be read, or leave them out of the data"
        advice += f" (first: {why})" * bool(why)
        raise GraderError(
            f"the {'reward function' if own else 'grader'} failed on {failed} of {graded} answers "
            f"({failed / graded:.1%}, more than the {most_failed_share:.1%} allowed): {advice}, or allow a larger "
            "share (reward.most_failed_share in a recipe, --most-failed-share of eval.py)"
        )
