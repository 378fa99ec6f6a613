"""reward.py: the last box, the rewards of format and steps, and hostile text."""

import time

import pytest

from engine.grader import Grader
from lab.answers import number
from reward import format_reward, last_boxed, step_reward


def test_last_box():
    assert last_boxed(r"</think> \boxed{1} and \boxed{\frac{1}{2}}", True) == r"\frac{1}{2}"
    assert last_boxed(r"</think> \fbox{3}", True) == "3"
    assert last_boxed(r"</think> \boxed{\boxed{4}}", True) == "4"
    assert last_boxed(r"</think> \boxed{\{1,2\}}", True) == r"\{1,2\}"
    assert last_boxed(r"</think> \boxed{5} then \boxed{6", True) == "5"
    assert last_boxed(r"</think> \boxed 7", True) is None


def test_answer_counts_only_after_the_thinking_block():
    assert last_boxed(r"<think> \boxed{1}", True) is None
    assert last_boxed(r"\boxed{1} </think> none", True) is None
    assert last_boxed(r"\boxed{1} </think> \boxed{2}", True) == "2"
    assert last_boxed(r"<think> \boxed{1}", False) == "1"
    with Grader(thinking=True) as closed, Grader(thinking=False) as free:
        assert closed.grade([(r"\boxed{1}", ["1"])])[0].verdict == "no answer"
        assert free.grade([(r"\boxed{1}", ["1"])])[0].verdict == "right"


@pytest.mark.parametrize(
    "text, thinking, earned",
    [
        (r"<think>x</think> It is \boxed{5}", True, 1.0),
        (r"</think> It is **$\boxed{\frac{1}{2}}$.**", True, 1.0),
        (r"<think>\boxed{3}</think> \[\boxed{5}\]", True, 1.0),
        (r"<think>x It is \boxed{5}", True, 0.0),
        (r"It is \boxed{5}", False, 1.0),
        (r"</think> \boxed{5} or \boxed{6}", True, 0.0),
        (r"</think> \boxed{5} I hope", True, 0.0),
        (r"</think> \boxed{5", True, 0.0),
        ("</think> 5", True, 0.0),
    ],
)
def test_format(text, thinking, earned):
    assert format_reward(text, thinking) == earned


@pytest.mark.parametrize(
    "text, earned",
    [
        ("3+5=8", 1.0),
        ("3 + 5 = 9", 0.0),
        ("3 + 5 - 2 = 8 - 2 = 6", 1.0),
        ("3 + 5 - 2 = 7 - 2 = 6", 0.0),
        ("1 + 1 = 2. Then 2 + 2 = 5.", 0.5),
        ("2 + 3 * 4 = 14", 1.0),
        ("8 - 3 - 2 = 3", 1.0),
        ("10 / 4 = 2.5 and 0.1 + 0.2 = 0.3", 1.0),
        ("1 / 0 = 3", 0.0),
        ("-3 + 5 = 2, 5 - -3 = 8, 7 − 9 = −2", 1.0),
        (r"3 x 5 = 15, 3x5=15, 3×5=15, 3 \times 5 = 15, \(3 \cdot 5 = 15\), 6 ÷ 2 = 3", 1.0),
        ("$3 + $5 = $8 and 1,000 + 1 = 1,001", 1.0),
        ("48/2 = <<48/2=24>>24", 1.0),
        ("- 3 + 5 = 8\n1) 2 + 2 = 4\n**1 + 1 = 2**", 1.0),
        ("x + 3 + 5 = 8 + 2 = 10", 1.0),
        ("3 + 5 = 8 = 2x", 1.0),
        ("no steps, x = 3, 3 = 3", 0.0),
    ],
)
def test_steps(text, earned):
    assert step_reward(text) == earned


@pytest.mark.parametrize(
    "equation",
    ["2x + 3 = 7", "x - 3 + 5 = 8", "2^3 + 5 = 14", "(3+5)*2 - 6 = 11", "3 + 5 = 9x", "2**3 = 9", "2 x -3 = 7"],
)
def test_an_equation_is_not_a_step(equation):
    """Part of the equation would be a false step and lower the share of the true one."""
    assert step_reward(f"{equation}\n1 + 1 = 2") == 1.0


def test_hostile_text_is_read_in_linear_time():
    started = time.monotonic()
    for text in ("9" * 1_000_000, "1e999999999", r"10^{999999999}", "9" * 300 + "e399999"):
        assert number(text) is None
    for text in (r"\boxed{" * 100_000, r"\boxed{" * 100_000 + "}" * 100_000, "{" * 100_000, "}" * 100_000):
        last_boxed(text, False), format_reward(text, False)
    for text in ("1+" * 300_000, "1=" * 300_000, "9" * 1_000_000, "1 " * 300_000, "1+1=2 " * 5_000, "*" * 300_000):
        step_reward(text)
    assert time.monotonic() - started < 5
