r"""Reward a response: find its answer, check its format, and check its written steps.

The answer is the content of the last complete \boxed{...} (or \fbox{...}) after `</think>`; no closing tag, no answer.
It may match any of the accepted answers. lab/answers.py states and decides which answers match; engine/grader.py grades
in the background, under limits of time and memory:

    with Grader(workers=2) as grader:
        grader.grade([(r"<think>...</think> \boxed{\frac{1}{2}}", ["0.5"])])

A recipe's reward.function takes the place of this comparison: engine/own_function.py.
"""

import itertools
import re
from dataclasses import dataclass
from fractions import Fraction

# timed out: the answer exceeded the time or memory limit; failed: counted apart, never a silent "wrong"
VERDICTS = ("right", "wrong", "no answer", "timed out", "grader failed", "reward failed")
MAX_SIDE_LENGTH = 200  # characters of one side of a written step


@dataclass(frozen=True)
class Grade:
    """The grade of one response. The reward is a weighted sum of its three numbers."""

    verdict: str  # one of VERDICTS
    correct: float  # 1.0 if the verdict is "right", else 0.0, or the partial credit of a reward function
    format: float  # see format_reward
    steps: float  # see step_reward
    answer: str | None  # content of the last box, None without one

    @property
    def right(self) -> bool:
        """Whether it counts as solved: in pass rates, filter, drop and rescue."""
        return self.verdict == "right"


# ---------------------------------------------------------------------------------------------
# The box

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# `\\` is a line break unless it is a doubly escaped \boxed; `\{` and `\}` are printed braces.
BRACES = re.compile(rf"(?P<box>{BOX.pattern})|\\\\(?!boxed|fbox)|\\[{{}}]|(?P<brace>[{{}}])")
# A box often sits in math or bold delimiters and ends a sentence.
AFTER_BOX = re.compile(r"(?:[\s$.*]|\\[\])])*")


def response_body(text: str, thinking: bool) -> str | None:
    """Return what follows the thinking block's closing tag; None if the tag is missing."""
    if not thinking:
        return text
    _, tag, body = text.rpartition("</think>")
    return body if tag else None


def _last_box(text: str) -> tuple[int, int] | None:
    """Return the start and end of the last complete box's content; of nested boxes, the innermost."""
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
    r"""Return the content of the last complete \boxed{...} or \fbox{...}, braces balanced, in linear time.

    With `thinking`, only the text after the last `</think>` counts: no closing tag, no answer.
    """
    body = response_body(text, thinking)
    box = _last_box(body) if body is not None else None
    return body[slice(*box)] if box else None


def format_reward(text: str, thinking: bool) -> float:
    """Return 1.0 if the thinking block is closed (when thinking) and the response ends in its only box, else 0.0.

    Whitespace, closing math delimiters, asterisks and a full stop may follow the box.
    """
    body = response_body(text, thinking)
    box = _last_box(body) if body is not None else None
    if box is None or len(BOX.findall(body)) != 1:
        return 0.0
    return 1.0 if AFTER_BOX.fullmatch(body, box[1] + 1) else 0.0


# ---------------------------------------------------------------------------------------------
# The steps

# All quantifiers are possessive: each character is read once, whatever a model writes.
OPERAND = r"[-−]?+\\?+\$?+(?:[0-9]++(?:,[0-9]{3}(?![0-9]))*+(?:\.[0-9]++)?+|\.[0-9]++)"
OPERATOR = r"(?:[-−+*/×÷·]|\\times|\\cdot|\\div|x(?=[ \t]*+[$0-9]))"
SIDE = re.compile(rf"{OPERAND}(?:[ \t]*+{OPERATOR}[ \t]*+{OPERAND})*+")
STEP, OPERAND = re.compile(rf"[ \t]*+({OPERATOR})?[ \t]*+({OPERAND})"), re.compile(OPERAND)
PLAIN_OPERAND = str.maketrans("−", "-", "$,\\")
CHAIN = re.compile(rf"{SIDE.pattern}(?:[ \t]*+&?+=[ \t]*+{SIDE.pattern})*+")
# Text next to a side that makes it part of a longer expression: `2x + 3 = 7`, `3 = 7y`.
ADJACENT_BEFORE = re.compile(r"[\w.)}\]^\\]$")
SIGN_BEFORE = ("-", "−", "+", "*", "/", "×", "÷", "·", "^", r"\times", r"\cdot", r"\div")
MINUS_BEFORE = re.compile(r"(?:\b[A-Za-z]|[0-9][A-Za-z]|[)}\]])[ \t]*$")  # x -3 is a difference
CUT_AFTER = re.compile(
    r"[\w(^{!]|\\?%|[.,][0-9]|[ \t]*(?:[-−+/×÷·^]|\*(?!\*))[ \t]*(?:[A-Za-z](?![A-Za-z])|[0-9(\\{])"
    r"|[ \t]*\\(?!text|mathrm|q?quad)[A-Za-z]"
)


def evaluate(side: str) -> Fraction | None:
    """Return the value of `a op b op c ...`, products first; None when it divides by zero."""
    total = product = Fraction(0)
    for operator, operand in STEP.findall(side):
        value = Fraction(operand.translate(PLAIN_OPERAND))
        if operator in ("/", "÷", r"\div"):
            if value == 0:
                return None
            product /= value
        elif operator in ("", "+", "-", "−"):
            total, product = total + product, -value if operator in ("-", "−") else value
        else:
            product *= value
    return total + product


def _is_cut_before(line: str, chain: str) -> bool:
    """Return whether `chain` continues an expression that began in `line`, the text before it."""
    head = line.rstrip(" \t")
    if head.endswith("**"):  # a power after a number or a name, else bold type
        return head[-3:-2].isalnum() or head[-3:-2] in (")", "}")
    if chain[0] in "-−" and MINUS_BEFORE.search(line):
        return True
    # A sign at the start of a line is a bullet.
    return ADJACENT_BEFORE.search(line) is not None or (head.endswith(SIGN_BEFORE) and len(head.strip()) > 1)


def step_reward(text: str) -> float:
    """Return the share of the written steps `a op b = c` that hold exactly; 0.0 without any step.

    Every `=` between two expressions of plain numbers, at least one with an operator, is a step, so
    `3 + 5 - 2 = 8 - 2 = 6` has two. A side that is part of a longer expression (a variable, a parenthesis,
    a power) is left out, as is one longer than MAX_SIDE_LENGTH.
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
