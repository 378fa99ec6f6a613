r"""Countdown: make a target of given numbers with + - * and /. The reward of countdown-24gb.toml, and its data.

    python recipes/countdown.py OUT.jsonl --problems 20000 --seed 0

A row has the problem's text, the numbers and the target. As in TinyZero, a well-formed expression that misses the target
earns a tenth. Here it has to use every number once.
"""

import argparse
import ast
import json
import operator
import random
import re
from fractions import Fraction
from pathlib import Path

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
SIGNS = {r"\times": "*", r"\cdot": "*", r"\div": "/", "×": "*", "÷": "/", "−": "-", r"\left": "", r"\right": ""}
EXPRESSION = re.compile(r"[0-9+*/() -]{1,200}")
TEXT = (
    "Using the numbers {numbers}, create an expression that equals {target}. You can use basic arithmetic operations "
    "(+, -, *, /) and parentheses, and each number must be used exactly once. The final answer is the expression alone."
)


def score(text: str, row: dict) -> float:
    """Return 1.0 if the last box holds an expression of the row's numbers that makes its target; 0.1 if it misses."""
    boxes = re.findall(r"\\boxed\s*\{([^{}]*)\}", text)
    expression = boxes[-1].partition("=")[0].strip() if boxes else ""
    for written, sign in SIGNS.items():
        expression = expression.replace(written, sign)
    if not EXPRESSION.fullmatch(expression):
        return 0.0
    try:
        tree = ast.parse(expression, mode="eval").body
        result = value(tree)
    except (SyntaxError, TypeError, ZeroDivisionError):
        return 0.0
    used = sorted(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return 0.0 if used != sorted(row["numbers"]) else 1.0 if result == row["target"] else 0.1


def value(node: ast.AST) -> Fraction:
    """Return the exact value of a tree of whole numbers, four operators and a minus sign; TypeError for all else."""
    match node:
        case ast.Constant(value=int(number)):
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -value(inner)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](value(left), value(right))
    raise TypeError(f"{type(node).__name__} is not arithmetic")


def problems(count: int, seed: int) -> list[dict]:
    """Draw distinct problems of 3 or 4 numbers below 100, each solvable, with a target from 10 to 100."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        numbers = [draw.randint(1, 99) for _ in range(draw.choice((3, 4)))]
        left = list(map(Fraction, numbers))
        while len(left) > 1:  # combine two at random until one value is left
            a, b = (left.pop(draw.randrange(len(left))) for _ in range(2))
            sign = draw.choice([sign for kind, sign in OPERATORS.items() if b or kind is not ast.Div])
            left.append(sign(a, b))
        target = left[0]
        if target.denominator == 1 and 10 <= target <= 100:
            text = TEXT.format(numbers=numbers, target=target)
            row = {"id": len(found), "problem": text, "numbers": numbers, "target": int(target)}
            found.setdefault((*sorted(numbers), int(target)), row)
    return list(found.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--problems", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with arguments.out.open("x", encoding="utf-8") as file:  # overwrites nothing
        file.writelines(f"{json.dumps(row)}\n" for row in problems(arguments.problems, arguments.seed))
