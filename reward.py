r"""What a response earns: is its answer right, is it well formed, and do its written steps hold?

The answer is the content of the last complete \boxed{...} (or \fbox{...}) after `</think>`; no closing tag, no answer.
Of several accepted answers any may match. Whether two answers match is decided in lab/answers.py, whose first lines
state the policy: most are settled by their text, in the calling process; the rest goes to a worker process that lives
under a memory limit, and is killed and replaced when it is late. A hard answer costs its own verdict, never the run;
no answer is ever evaluated as code. A failure of the grader is a verdict of its own, so that it can be counted, not a
silent "wrong".

    with Grader(workers=2) as grader:
        grader.grade([(r"<think>...</think> \boxed{\frac{1}{2}}", ["0.5"])])
"""

import itertools
import re
from dataclasses import dataclass

from lab.answers import OPERAND, SIDE, evaluate

VERDICTS = ("right", "wrong", "no answer", "timed out", "grader failed")  # timed out: of its time or its memory

MAX_SIDE_LENGTH = 200  # characters of one side of a written step


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
