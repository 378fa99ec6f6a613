r"""What a response earns: is its answer right, is it well formed, and do its written steps hold?

The answer is the content of the last complete \boxed{...} (or \fbox{...}) after `</think>`; no closing tag, no answer.
Of several accepted answers any may match. Whether two answers match is the business of answers.py, whose first lines
state the policy: most are settled by their text, in the calling process; the rest goes to a worker process that lives
under a memory limit, and is killed and replaced when it is late. A hard answer costs its own verdict, never the run;
no answer is ever evaluated as code. A failure of the grader is a verdict of its own, so that it can be counted, not a
silent "wrong".

    with Grader(workers=2) as grader:
        grader.grade([(r"<think>...</think> \boxed{\frac{1}{2}}", ["0.5"])])
"""

import atexit
import itertools
import json
import os
import queue
import re
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import answers as answer_matching
from answers import OPERAND, SIDE, evaluate, text_verdict, tidy

VERDICTS = ("right", "wrong", "no answer", "timed out", "grader failed")  # timed out: of its time or its memory

MAX_SIDE_LENGTH = 200  # characters of one side of a written step
CACHED_VERDICTS = 20_000  # of pairs of golds and answer
START_LIMIT_S = 60.0  # for a worker to import math-verify


@dataclass(frozen=True)
class Grade:
    """What one response earned. A reward is a choice among (or a mixture of) its three numbers."""

    verdict: str  # one of VERDICTS
    correct: float  # 1.0 if the verdict is "right", else 0.0
    format: float  # see format_reward
    steps: float  # see step_reward
    answer: str | None  # content of the last box, None when there is none


# ---------------------------------------------------------------------------------------------
# The box

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# `\\` is a line break unless it is a doubly escaped \boxed; `\{` and `\}` are printed braces.
BRACES = re.compile(rf"(?P<box>{BOX.pattern})|\\\\(?!boxed|fbox)|\\[{{}}]|(?P<brace>[{{}}])")
# A box often sits in math or bold delimiters and ends a sentence.
AFTER_BOX = re.compile(r"(?:[\s$.*]|\\[\])])*")


def _response_body(text: str, thinking: bool) -> str | None:
    """What follows the thinking block (only its closing tag is required); None while it is open."""
    if not thinking:
        return text
    _, tag, body = text.rpartition("</think>")
    return body if tag else None


def _last_box(text: str) -> tuple[int, int] | None:
    """Where the content of the last complete box starts and ends; in a nest, the innermost counts."""
    last, open_braces = None, []
    for token in BRACES.finditer(text):
        if token["box"]:
            open_braces.append(token.end())
        elif token["brace"] == "{":
            open_braces.append(-1)
        elif token["brace"] == "}" and open_braces:
            start = open_braces.pop()
            if start >= 0 and (last is None or start > last[0]):
                last = (start, token.start())
    return last


def last_boxed(text: str, thinking: bool) -> str | None:
    r"""Content of the last complete \boxed{...} or \fbox{...}, braces balanced, in linear time.

    With `thinking`, only what follows the last `</think>` counts: no closing tag, no answer.
    """
    body = _response_body(text, thinking)
    box = _last_box(body) if body is not None else None
    return body[slice(*box)] if box else None


def format_reward(text: str, thinking: bool) -> float:
    """1.0 if the thinking block is closed (when thinking) and the response ends in its only box.

    Whitespace, closing math delimiters, asterisks and a full stop may follow the box.
    """
    body = _response_body(text, thinking)
    box = _last_box(body) if body is not None else None
    if box is None or len(BOX.findall(body)) != 1:
        return 0.0
    return 1.0 if AFTER_BOX.fullmatch(body, box[1] + 1) else 0.0


# ---------------------------------------------------------------------------------------------
# The steps

# Possessive, as its parts are: each character is read once, whatever a model writes.
CHAIN = re.compile(rf"{SIDE.pattern}(?:[ \t]*+&?+=[ \t]*+{SIDE.pattern})*+")
# What makes a side part of something larger, `2x + 3 = 7` or `3 = 7y`.
ADJACENT_BEFORE = re.compile(r"[\w.)}\]^\\]$")
SIGN_BEFORE = ("-", "−", "+", "*", "/", "×", "÷", "·", "^", r"\times", r"\cdot", r"\div")
MINUS_BEFORE = re.compile(r"(?:\b[A-Za-z]|[0-9][A-Za-z]|[)}\]])[ \t]*$")  # x -3 is a difference
CUT_AFTER = re.compile(
    r"[\w(^{!]|\\?%|[.,][0-9]|[ \t]*(?:[-−+/×÷·^]|\*(?!\*))[ \t]*(?:[A-Za-z](?![A-Za-z])|[0-9(\\{])"
    r"|[ \t]*\\(?!text|mathrm|q?quad)[A-Za-z]"
)


def _is_cut_before(line: str, chain: str) -> bool:
    """Whether `chain` goes on an expression that began in `line`, the text before it."""
    head = line.rstrip(" \t")
    if head.endswith("**"):  # a power after a number or a name, else bold type
        return head[-3:-2].isalnum() or head[-3:-2] in (")", "}")
    if chain[0] in "-−" and MINUS_BEFORE.search(line):
        return True
    # A sign that opens a line is a bullet.
    return ADJACENT_BEFORE.search(line) is not None or (head.endswith(SIGN_BEFORE) and len(head.strip()) > 1)


def step_reward(text: str) -> float:
    """Share of the written steps `a op b = c` that hold exactly; 0.0 when none is written.

    Every `=` between two expressions of plain numbers, at least one with an operator, is a step, so
    that `3 + 5 - 2 = 8 - 2 = 6` has two. A side that is cut off (by a variable, a parenthesis, a
    power) is left out, as is one longer than MAX_SIDE_LENGTH.
    """
    steps = held = 0
    for chain in CHAIN.finditer(text):
        if "=" not in chain[0]:
            continue
        sides = [side.strip(" \t&") for side in chain[0].split("=")]
        line_before = text[max(0, chain.start() - 40) : chain.start()].rpartition("\n")[2]
        if _is_cut_before(line_before, chain[0]):
            sides = sides[1:]
        if CUT_AFTER.match(text, chain.end()):
            sides = sides[:-1]
        for left, right in itertools.pairwise(sides):
            if max(len(left), len(right)) > MAX_SIDE_LENGTH:
                continue
            if not OPERAND.fullmatch(left) or not OPERAND.fullmatch(right):
                steps += 1
                left_value = evaluate(left)
                held += left_value is not None and left_value == evaluate(right)
    return held / steps if steps else 0.0


# ---------------------------------------------------------------------------------------------
# The parent's side


class _Worker:
    """One worker process and the pipe to it."""

    def __init__(self, memory_limit_bytes: int, time_limit_s: float):
        # -P: the names of this directory's files must not shadow what math-verify imports.
        command = [sys.executable, "-P", os.path.abspath(answer_matching.__file__)]
        command += [str(memory_limit_bytes), str(time_limit_s)]
        # a session of its own: a signal to the whole run must not turn answers in flight into grader failures
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self.process = subprocess.Popen(command, start_new_session=True, **pipes)
        self.ready = False

    def read(self, limit_s: float) -> dict:
        """The next reply. Raises TimeoutError when it is late, ValueError when it is none."""
        deadline, line = time.monotonic() + limit_s, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                chunk = self.process.stdout.read(4096)
                if not chunk:
                    raise ValueError("the worker ended")
                line += chunk
        reply = json.loads(line)
        if not isinstance(reply, dict):
            raise ValueError(f"the worker said {reply!r}")
        return reply

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Grader:
    """Grades responses in the background: submit while sampling goes on, collect when it is done.

    workers: processes for what the exact path cannot decide; each starts with the first such answer.
    time_limit_s: for one answer in a worker, all accepted answers together, start-up not included.
    memory_limit_bytes: address space of one worker.
    thinking: whether responses must close a thinking block before they answer.
    """

    def __init__(
        self, workers: int = 1, time_limit_s: float = 5.0, memory_limit_bytes: int = 2 << 30, thinking: bool = True
    ):
        if workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}")
        self.time_limit_s, self.memory_limit_bytes, self.thinking = time_limit_s, memory_limit_bytes, thinking
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._tickets, self._results = itertools.count(), {}
        self._verdicts: dict[tuple, str] = {}  # of (*golds, answer), oldest first
        self._slots: list[_Worker | None] = [None] * workers
        self._threads: list[threading.Thread] = []
        self._lock, self._closed = threading.Lock(), False
        atexit.register(self.close)

    def submit(self, response: str, answers: Sequence[str]) -> int:
        """Start grading `response` against its accepted answers; returns a ticket for `collect`."""
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
        """Whether collect would return this ticket's grade at once. KeyError once it is collected."""
        return self._results[ticket][0].done()

    def collect(self, tickets: Sequence[int]) -> list[Grade]:
        """Wait for these tickets, in their order. A ticket is collected once; KeyError after that."""
        grades = []
        for ticket in tickets:
            result, (form, steps), answer = self._results.pop(ticket)
            verdict = result.result()
            grades.append(Grade(verdict, 1.0 if verdict == "right" else 0.0, form, steps, answer))
        return grades

    def grade(self, items: Sequence[tuple[str, Sequence[str]]]) -> list[Grade]:
        """Grade (response, accepted answers) pairs, in their order."""
        return self.collect([self.submit(response, answers) for response, answers in items])

    def close(self) -> None:
        """End the workers. What was not graded yet becomes "grader failed". May be called twice."""
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
        """A thread's life: hand jobs to the worker in `slot`, replacing the worker when it fails."""
        while (job := self._jobs.get()) is not None:
            ticket, golds, answer, result = job
            key = (*golds, answer)
            verdict = self._verdicts.get(key) or self._ask(slot, ticket, golds, answer)
            if verdict in ("right", "wrong"):  # what failed or was late may not be so again
                with self._lock:
                    self._verdicts[key] = verdict
                    if len(self._verdicts) > CACHED_VERDICTS:
                        del self._verdicts[next(iter(self._verdicts))]
            result.set_result(verdict)
        self._drop(slot)

    def _ask(self, slot: int, ticket: int, golds: list[str], answer: str) -> str:
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
        except (OSError, ValueError):  # it cannot start, it died, or what it said is no reply
            pass
        self._drop(slot)
        return verdict

    def _drop(self, slot: int) -> None:
        with self._lock:
            worker, self._slots[slot] = self._slots[slot], None
        if worker is not None:
            worker.kill()
