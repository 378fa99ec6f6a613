r"""Is this answer right, is it well formed, and do its written steps hold?

Policy, in the order in which an answer meets it:
  1. The answer is the content of the last complete \boxed{...} (or \fbox{...}) after `</think>`.
  2. Plain numbers are compared exactly, as fractions, in the calling process: 142.0 is 142, 0.333 is
     not 1/3. A percentage matches both of its readings: 50% is 0.5 and is 50. Strings that are the
     same once tidied are right. Most answers end here: no parser, no sympy, linear time.
  3. Everything else goes to a worker process that asks math-verify (0.9), gold first. The worker lives
     under a memory limit, and is killed and replaced when it is late: a hard answer costs its own
     verdict, never the run. No answer is ever evaluated as code.
  4. With several accepted answers any match counts.
A failure of the grader is a verdict of its own, so that it can be counted, not a silent "wrong".
Lenient, as math-verify is: a unit or a degree sign may be left out, `x = 3` is 3, `52` is `52_8`.

    with Grader(workers=2) as grader:
        grader.grade([(r"<think>...</think> \boxed{\frac{1}{2}}", ["0.5"])])

The worker is this file: `python reward.py --worker BYTES SECONDS`, a JSON line in, a JSON line out.
"""

import atexit
import itertools
import json
import logging
import os
import queue
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

VERDICTS = ("right", "wrong", "no answer", "timed out", "grader failed")

MAX_NUMBER_LENGTH = 400  # characters of a plain number; also bounds its power of ten
MAX_SIDE_LENGTH = 200  # characters of one side of a written step
MAX_ANSWER_LENGTH = 2000  # characters of an answer that a worker may see
MAX_BRACE_DEPTH = 50  # of an answer that a worker may see
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

# All quantifiers are possessive: each character is read once, whatever a model writes.
OPERAND = r"[-−]?+\\?+\$?+(?:[0-9]++(?:,[0-9]{3}(?![0-9]))*+(?:\.[0-9]++)?+|\.[0-9]++)"
OPERATOR = r"(?:[-−+*/×÷·]|\\times|\\cdot|\\div|x(?=[ \t]*+[$0-9]))"
SIDE = rf"{OPERAND}(?:[ \t]*+{OPERATOR}[ \t]*+{OPERAND})*+"
CHAIN = re.compile(rf"{SIDE}(?:[ \t]*+&?+=[ \t]*+{SIDE})*+")
OPERAND, OPERATOR, SPACES = re.compile(OPERAND), re.compile(OPERATOR), re.compile(r"[ \t]*+")
PLAIN_OPERATOR = {"−": "-", "×": "*", "x": "*", "·": "*", r"\times": "*", r"\cdot": "*", "÷": "/", r"\div": "/"}

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


def _evaluate(side: str) -> Fraction | None:
    """Value of `a op b op c ...`, products first; None when it divides by zero."""
    match = OPERAND.match(side)
    total, product = 0, _exact(match[0])
    while match.end() < len(side):
        operator = OPERATOR.match(side, SPACES.match(side, match.end()).end())
        match = OPERAND.match(side, SPACES.match(side, operator.end()).end())
        sign, value = PLAIN_OPERATOR.get(operator[0], operator[0]), _exact(match[0])
        if sign == "*":
            product *= value
        elif sign == "/":
            if value == 0:
                return None
            product = Fraction(product) / value
        else:
            total, product = total + product, value if sign == "+" else -value
    return total + product


def _exact(operand: str) -> Fraction | int:
    plain = operand.translate({ord("−"): "-", ord("$"): None, ord(","): None, ord("\\"): None, ord(" "): None})
    return Fraction(plain) if "." in plain else int(plain)


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
                left_value = _evaluate(left)
                held += left_value is not None and left_value == _evaluate(right)
    return held / steps if steps else 0.0


# ---------------------------------------------------------------------------------------------
# The exact path: plain numbers and identical strings

DECIMAL = r"(?:(?:[1-9]\d{0,2}(?:[, ]\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<decimal>{DECIMAL})(?:\s*(?:\\times|\\cdot|×)\s*10\^(?P<power>\d|\{{[-+]?\d+\}}))?"
    rf"|(?:(?P<whole>\d+)\s*)?\\frac\s*(?:\{{(?P<a>-?{DECIMAL})\}}|(?P<a1>\d))\s*(?:\{{(?P<b>-?{DECIMAL})\}}|(?P<b1>\d))"
    rf"|(?:(?P<whole2>\d+)\s+)?(?P<a2>{DECIMAL})\s*/\s*(?P<b2>{DECIMAL}))\s*(?P<percent>\\?%)?",
    re.ASCII,
)
TIDY = [
    (re.compile(r"\\?\$|(?<!\\)\\!|\\(?:left|right)(?![A-Za-z])|\\displaystyle"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|~|\s+"), " "),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"−"), "-"),
    (re.compile(r"^\s*\\[(\[]|\\[)\]]\s*$|^\s*\\(?:approx|simeq)(?![A-Za-z])"), ""),
    (re.compile(r"(?<![\w}]) | (?![\w\\])|(?<=\w)\.\s*$", re.ASCII), ""),
    (re.compile(r"^([-+]?[0-9.]+)[eE]([-+]?[0-9]{1,3})$"), r"\1 \\times 10^{\2}"),
]
TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{\s*([^{}]*?)\s*\}")


def _tidy(text: str) -> str:
    """The same answer with its typesetting removed: math delimiters, spacing, sized brackets."""
    for pattern, replacement in TIDY:
        text = pattern.sub(replacement, text)
    return text.strip()


def _figure(text: str) -> tuple[Fraction, bool] | None:
    """The figure of a plain number as written, and whether a percent sign follows it."""
    text = _tidy(text) if len(text) <= MAX_NUMBER_LENGTH else ""
    match = NUMBER.fullmatch(text)
    if match is None:
        return None
    power = int((match["power"] or "0").strip("{}"))
    if abs(power) > MAX_NUMBER_LENGTH:
        return None
    if match["decimal"]:
        value = _exact(match["decimal"]) * Fraction(10) ** power
    else:
        above, below = (_exact(match[k] or match[k + "1"] or match[k + "2"]) for k in "ab")
        if below == 0:
            return None
        value = int(match["whole"] or match["whole2"] or "0") + Fraction(above, below)
    return (-value if match["sign"] == "-" else value), match["percent"] is not None


def number(text: str) -> Fraction | None:
    r"""Exact value of a plain number, None for anything else (or longer than MAX_NUMBER_LENGTH).

    Plain: integers and decimals, thousands separators, 1.5e3, 1.5 \times 10^{3}, a/b, \frac{a}{b},
    3\frac{1}{2}, with a sign, $ or % if need be (50% is 1/2).
    """
    figure = _figure(text)
    return None if figure is None else figure[0] / 100 if figure[1] else figure[0]


def _too_complex(answer: str) -> bool:
    if len(answer) > MAX_ANSWER_LENGTH:
        return True
    depth = itertools.accumulate((c == "{") - (c == "}") for c in answer)
    return max(depth, default=0) > MAX_BRACE_DEPTH


def _exact_verdict(answer: str, golds: Sequence[str]) -> tuple[str | None, list[str]]:
    """The verdict if it needs no worker, else None with the golds that are left to compare."""
    if _too_complex(answer):
        return "wrong", []
    tidy_answer, figure, left = _tidy(answer), _figure(answer), []
    bare_answer = TEXT.sub(r"\1", tidy_answer)
    for gold in golds:
        tidy_gold = _tidy(gold)
        if bare_answer and bare_answer == TEXT.sub(r"\1", tidy_gold):
            return "right", []
        gold_figure = _figure(gold) if figure is not None else None
        if gold_figure is None:
            left.append(tidy_gold)
        elif gold_figure[0] == figure[0] or number(gold) == number(answer):  # 50% is 50 and 0.5
            return "right", []
    return (None, left) if left and tidy_answer else ("wrong", [])


# ---------------------------------------------------------------------------------------------
# The worker: math-verify, with a guard around each of its known faults

BARE_LETTER = re.compile(r"\\[A-Za-z]+\s*|[A-Za-z]")
JUXTAPOSED = re.compile(r"[-+]?\d[\d.,]*+(?:\s*\(|(?:\s|\\q?quad)\s*\d)", re.ASCII)
RELATIVE_TOLERANCE = 2e-6  # of decimals against closed forms: 0.333333 is 1/3 to six figures


def _is_arithmetic(expression) -> bool:
    """A sum, difference or product of plain numbers that was left for the grader to work out."""
    import sympy

    if not isinstance(expression, (sympy.Add, sympy.Mul)) or expression.has(sympy.UnevaluatedExpr):
        return False  # sympy.UnevaluatedExpr is math-verify's percent sign
    return all(isinstance(arg, sympy.Number) or _is_arithmetic(arg) for arg in expression.args)


def _matches(gold: str, answer: str) -> bool:
    """Whether math-verify takes `answer` for `gold` (both tidied). Not symmetric: gold decides the form."""
    import sympy
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.grader import is_equation, take_last_relation

    # In an expression a letter is a variable: as a unit, the t of 2t would be dropped and 2 be right.
    drop_units = all(token.startswith("\\") for token in BARE_LETTER.findall(TEXT.sub("", gold)))
    config = LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=drop_units, malformed_operators=True, nits=True, boxed="all"
        ),
    )

    def read(text):
        # Boxed on both sides: a bare `1,2,3` would lose two of its numbers. First match: the whole box or
        # nothing, else a fraction is picked out of any rubbish around it. No alarm: the parent keeps time.
        return parse(rf"\boxed{{{text}}}", [config], extraction_mode="first_match", parsing_timeout=None)

    def value(parsed):
        return take_last_relation(parsed[0]).rhs if is_equation(parsed[0]) else parsed[0]

    parsed_gold, parsed_answer = read(gold), read(answer)
    if not parsed_gold or not parsed_answer:
        return False
    gold_value, answer_value = value(parsed_gold), value(parsed_answer)
    if isinstance(gold_value, sympy.Number):
        # `5 6` and `2(3)` would be read as mixed numbers, 11 and 5.
        if _is_arithmetic(answer_value) or JUXTAPOSED.match(answer.rpartition("=")[2].strip()):
            return False
    if not verify(parsed_gold, parsed_answer, timeout_seconds=None, raise_on_error=True):
        return False
    numbers = [v for v in (gold_value, answer_value) if isinstance(v, sympy.Expr) and v.is_number]
    if len(numbers) == 2 and any(n.has(sympy.Float) for n in numbers):
        # It rounds to six decimals, where all small numbers are 0. A percent sign has two readings.
        a, b = (complex(n.doit()) for n in numbers)
        return any(abs(a - b * s) <= RELATIVE_TOLERANCE * max(abs(a), abs(b * s)) for s in (1, 100, 0.01))
    return True


def _work(memory_limit_bytes: int, time_limit_s: float) -> None:
    """The worker's life: read {"id", "golds", "answer"}, write {"id", "right"}, until stdin ends."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    with suppress(ValueError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the parser prints its complaints on stdout
    logging.disable()
    _matches("x", r"\frac{1}{2}x")  # compiles the grammar, so that the first answer does not pay for it
    print(json.dumps({"ready": True}), file=replies)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # from here on an error is a verdict

    for line in sys.stdin:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, time_limit_s + 1)  # ends this process should the parent be gone
        right, errors = False, 0
        for gold in job["golds"]:
            try:
                right = right or _matches(gold, job["answer"])
            # What sympy and ANTLR are seen to raise on odd LaTeX. Anything else ends this worker, which the
            # parent reports just the same, only more slowly.
            except (
                ArithmeticError,
                AttributeError,
                LookupError,
                NotImplementedError,
                RecursionError,
                TypeError,
                ValueError,
            ):
                errors += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        failed = errors and not right
        print(json.dumps({"id": job["id"], "right": None if failed else right}), file=replies)


# ---------------------------------------------------------------------------------------------
# The parent's side


class _Worker:
    """One worker process and the pipe to it."""

    def __init__(self, memory_limit_bytes: int, time_limit_s: float):
        # -P: the names of this directory's files must not shadow what math-verify imports.
        command = [sys.executable, "-P", os.path.abspath(__file__), "--worker"]
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
        verdict, golds = ("no answer", []) if answer is None else _exact_verdict(answer, answers)
        result, ticket = Future(), next(self._tickets)
        if verdict is None:
            self._jobs.put((ticket, golds, _tidy(answer), result))
            if not self._threads:
                slots = range(len(self._slots))
                self._threads = [threading.Thread(target=self._serve, args=(slot,), daemon=True) for slot in slots]
                for thread in self._threads:
                    thread.start()
        else:
            result.set_result(verdict)
        self._results[ticket] = (result, rewards, answer)
        return ticket

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
            result.set_result(self._ask(slot, ticket, golds, answer))
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


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "--worker":
        sys.exit(__doc__)
    _work(int(sys.argv[2]), float(sys.argv[3]))
