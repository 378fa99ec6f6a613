r"""Accuracy and speed of the grader, on the gold answers of the benchmarks and on generated hostile answers.

    python bench/grader.py DATA              # DATA: a folder with the five benchmark files (aime24.parquet, ...)
    python bench/grader.py DATA --fuzz 20000 # also grade this many wrong answers
    python bench/grader.py DATA --cases FILE # also judge cases of your own, a JSON object a line

Needs two cores and no GPU; minutes without --fuzz. Everything random is seeded. tests/test_answers.py uses the
generators and reformattings of this file too.
"""

import argparse
import json
import logging
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import reward  # noqa: E402
from engine import grader as graders  # noqa: E402
from lab import answers  # noqa: E402
from lab.problems import read_problems  # noqa: E402

FILES = ("aime24", "aime25", "amc23", "minerva", "olympiad")


def boxed(answer: str) -> str:
    """Return a response that contains only its answer."""
    return rf"\boxed{{{answer}}}"


def golds_of(folder: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Return (file, accepted answers) of every problem in the five benchmark files."""
    return [(name, p.answers) for name in FILES for p in read_problems(folder / f"{name}.parquet", "skip")]


# ---- the same answer in another form, and a wrong answer that looks similar ----------------------


def reformatted_number(value: Fraction, rng: random.Random) -> str:
    """Return a plain number in another form."""
    sign, size = ("-" if value < 0 else ""), abs(value)
    digits = 0
    while (size * 10**digits).denominator != 1 and digits < 40:
        digits += 1
    forms = [
        rf"{sign}\frac{{{size.numerator}}}{{{size.denominator}}}",
        rf"{sign}\dfrac{{{size.numerator}}}{{{size.denominator}}}",
    ]
    forms.append(f"{sign}{size.numerator}/{size.denominator}")
    forms.append(rf"\frac{{{sign}{3 * size.numerator}}}{{{3 * size.denominator}}}")
    if size.denominator != 1 and size > 1:
        forms.append(rf"{sign}{int(size)}\frac{{{size.numerator % size.denominator}}}{{{size.denominator}}}")
    if (size * 10**digits).denominator == 1:
        whole = str(int(size * 10**digits)).zfill(digits + 1)
        head, tail = (whole[:-digits], whole[-digits:]) if digits else (whole, "")
        forms += [f"{sign}{head}.{tail}0", f"{sign}{head}.{tail}00"]
        forms.append(f"{sign}{int(head):,}" + (f".{tail}" if tail else ""))
        forms.append(f"{sign}{int(head):,}".replace(",", "{,}") + (f".{tail}" if tail else ""))
        forms.append(rf"{sign}{whole}\times 10^{{{-digits}}}")
        forms.append(rf"{sign}{whole}000e-{digits + 3}")
        forms.append(rf"{sign}{int(size * 100)}\%" if digits <= 2 else f"{sign}{head}.{tail}")
    text = rng.choice(forms)
    return rng.choice(
        [f"${text}$", rf"\({text}\)", f" {text} ", f"x={text}", f"x = {text}", rf"\displaystyle {text}", text + "."]
    )


def reformatted(gold: str, rng: random.Random) -> str | None:
    """Return the gold in another correct form, or None if there is none."""
    value = answers.number(gold)
    if value is not None:
        return reformatted_number(value, rng)
    if "where" in gold or gold.count("$") % 2:
        return None
    text = gold.strip().strip("$").rstrip(".")
    ways = [
        text.replace(" ", "") if "\\" not in text and not re.search(r"\d, \d", text) else text.replace(" ", r"\,"),
        text.replace(r"\frac", r"\dfrac"),
        text.replace("(", r"\left(").replace(")", r"\right)") if text.count("(") == text.count(")") else text,
        rf"\displaystyle {text}",
        rf"\[ {text} \]",
        re.sub(r"\^([0-9a-z])", r"^{\1}", text),
    ]
    if not re.search(r"[=,<>]|\\(?:ge|le|cup|text|circ)|[A-Za-z]{2}=", text) and "," not in text:
        ways.append(f"y = {text}")
    if text.count(",") and not re.search(r"[()\[\]{}=]", text):
        parts = [part.strip() for part in text.replace("$", "").split(",")]
        ways += [", ".join(parts[::-1]), r"\{" + ", ".join(parts) + r"\}"]
    return rng.choice([way for way in ways if way != gold] or [text])


def perturbed(gold: str, rng: random.Random) -> str | None:
    """Return a wrong answer similar to the gold: with another digit, sign, term or entry."""
    text = gold.strip().strip("$").rstrip(".")
    if "where" in gold or gold.count("$") % 2:
        return None
    ways = []
    digits = [m for m in re.finditer(r"(?<![\d.])[1-9]\d*", text)]
    if digits:
        digit = rng.choice(digits)
        place = rng.randrange(digit.start(), digit.end())
        other = rng.choice([d for d in "123456789" if d != text[place]])
        ways += [text[:place] + other + text[place + 1 :]] * 3
    value = answers.number(gold)
    if value is not None:
        ways += [str(value + 1), str(10 * value + 1), f"{text},{text}", rf"{text} \text{{ or }} {value + 1}"]
        ways += [f"-{text}"] if value > 0 else []
    elif "," not in text and "=" not in text and not re.search(r"\\(?:cup|ge|circ|text)", text):
        ways += [f"{text}+1", f"2({text})", f"-({text})" if text != "0" else "1", f"{text}, 0"]
    elif "," in text:
        ways += [f"{text}, 977"] if not text.endswith((")", "]")) else [f"{text}, (977, 1)"]
    return rng.choice(ways) if ways else None


def open_sums(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield `count` pairs (gold, a sum, difference or product with its value that is not worked out)."""
    rng = random.Random(seed)
    for _ in range(count):
        whole = rng.randrange(2, 50)
        terms = [("1", 1), ("-1", -1), (str(whole), whole), (f"-{whole}", -whole), (f"{whole}.0", whole), ("0.5", 0.5)]
        terms += [(f"2^{{{whole % 9}}}", 2 ** (whole % 9)), (rf"\sqrt{{{whole**2}}}", whole), ("3!", 6)]
        terms += [(r"\frac12", 0.5), (rf"\sqrt{{{whole**2}.0}}", whole), (rf"{whole} \times 10^{{3}}", 1000 * whole)]
        (first, value), *others = rng.choices(terms, k=rng.randrange(2, 4))
        text, value, sign = first, Fraction(value), rng.choice((r"\cdot", r"\times", "*", "+", "-", "+", "-"))
        for term, other in others:
            text += sign + (f"({term})" if term[0] == "-" else term)
            value = value + other if sign == "+" else value - other if sign == "-" else value * Fraction(other)
        form = rng.choice(("{}", "({})", "x={}", r"{}\text{{ cm}}", r"\frac{{{}}}{{1}}", "{}.", "${}$"))
        yield str(value), form.format(text)


# ---- answers built to be wrong -------------------------------------------------------------

HOSTILE = [
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    "(((9!)!)!)!",
    "{" * 100_000 + "5" + "}" * 100_000,
    r"\frac{" * 300 + "1" + "}{2}" * 300,
    "(" * 900 + "5" + ")" * 900,
    "7" * 1_000_000,
    "__import__('os').system('touch x')",
    r"\text{__import__('os').system('touch x')}",
    "eval(open('/etc/passwd').read())",
    "5\0",
    "\0" * 1000,
    "\\" * 501,
    "1,".join("2" * 900),
    "x" * 1900,
    "a" * 1000 + "!" * 900,
    " " * 1900 + "x",
    r"\text{" * 40 + "5" + "}" * 40 + " cm",
    r"\text{a}" * 280,
    "cm " * 600,
    "5" + " cm/" * 480,
    "=" * 1900,
    "1=" * 900 + "2",
    "x=" * 900 + "4",
    r"\pm " * 480 + "5",
    "," * 1900,
    "'" * 1900,
    r"\sum_{i=1}^{10^{10}} i",
    r"\int_0^1 " * 30 + "x" + "dx" * 30,
    r"\prod_{n=1}^{999999} n",
    r"\sqrt[999999999]{7}",
    r"10^{10^{10}}!",
    r"\binom{10^9}{5\cdot10^8}",
    r"\begin{pmatrix}" + "1&" * 500 + r"1\end{pmatrix}",
    r"\begin{pmatrix}" * 20,
    r"0.\overline{" + "3" * 1900 + "}",
    "1e999999999",
    "\ud800",
    "٣",
    "∞" * 1000,
]
PIECES = (
    r"0 1 2 7 12 3.5 x y n R \pi e i + - \cdot \times / ^ _ { } ( ) [ ] , ; = < \le \frac{ \sqrt{ \text{ } ! % \% ° ' "
    r"cm \text{cm} \pm or \infty \cup | & \\ \binom \sum \sin \begin{pmatrix} \end{pmatrix} \{ \} : . \boxed{ $"
).split()
KINDS = {"perturbed": 30, "arithmetic": 15, "hedge": 15, "garbage": 20, "truncated": 10, "shuffled": 8, "hostile": 2}
# In both, N is the gold; A and B are numbers with A + B = N, C is another number.
ARITHMETIC = r"""
A+B|N+A-A|\frac{A+B}{1}|\frac{N}{0+1}|A+\sqrt{B^2}|N\cdot 1|N+0|1(N)|(1)(N)|\sum_{i=1}^{N}1|\sum_{i=1}^{1}N|A=N|C=N
N\cdot\frac{2}{2}|N=C|2\times N|x=A+B|A B|\lim_{x\to N}x|\int_0^{N}1\,dx|A+B\text{ cm}|N\div 1+0|1^{2}\cdot N|N*1|A-(-B)
\left(A+B\right)|-(-N+0)|\frac{N\cdot 2}{2}|\sqrt{N\cdot N}|(A+B)^1|\frac{N}{1}\cdot 1|\sqrt{N}\sqrt{N}|\frac{A}{1}+B
\sqrt{N}\cdot\sqrt{N}|\text{A+B}|A+B=C|\mathrm{A}+\mathrm{B}|{A}+{B}|A + B.|$A+B$|\boxed{A+B}|\frac{N^2}{N\cdot 1}
"""
HEDGES = r"""
N,C|N, N|N,N|N \text{ or } C|N or C|C or N|\pm N|\{N,C\}|(N;C)|N;C|C and N|\{N\}|\le N|>N|x>N|\neq N|x\ne N|[N,N]
N\cup C|N, C, N|N \text{ million}|Nx|Ny+C|N\text{ or more}|2x=N|x^2=N|\lvert x\rvert=N|-x=N|N:C|N!C|(N,C)|(C,N)|[N,C)
N \text{ and } C|C, N|x=N, y=C|x=C \text{ or } x=N|\text{N or C}|\text{either } N \text{ or } C|x<N|N<x|N\le x\le N+1
N\lor C|N\pm C|N^{C}|N/C/N|N^\circ, C^\circ|N\%C|C=x=N=C|N\neq C|\text{not }N|-N|N\text{ dozen}|N\text{ no}
\begin{pmatrix}N&C\end{pmatrix}|\begin{pmatrix}N\\C\end{pmatrix}|{N,C}|(N,C,N)|N\&C|N\sim C|N\approx C, C|N_C,C
"""
ARITHMETIC, HEDGES = (
    [form for line in forms.split("\n") for form in line.split("|") if form] for forms in (ARITHMETIC, HEDGES)
)


def hostile_and_wrong(golds: list[str], count: int, seed: int, kinds: dict = KINDS) -> Iterator[tuple[str, str, str]]:
    """Yield `count` triples (kind, gold, answer), each answer built to be wrong for its gold."""
    rng = random.Random(seed)
    while count > 0:
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        gold = rng.choice(golds)
        whole = rng.randrange(3, 10 ** rng.randrange(1, 7) + 3)
        if kind == "perturbed":
            answer = perturbed(gold, rng)
        elif kind in ("arithmetic", "hedge"):
            less = rng.randrange(1, whole)
            values = {"N": whole, "A": less, "B": whole - less, "C": whole + rng.randrange(2, 100)}
            form = rng.choice(ARITHMETIC if kind == "arithmetic" else HEDGES)
            answer = "".join(
                str(values.get(part, part)) for part in re.split(r"(?<![A-Za-z\\])([NABC])(?![A-Z])", form)
            )
            gold = str(whole)
            if rng.random() < 0.3:  # as one entry among others
                gold, answer = (f"({text},{less})" for text in (gold, answer))
        elif kind == "garbage":
            gold = str(whole * 1_000_003 + 17)  # larger than any combination of the pieces
            answer = " ".join(rng.choices(PIECES, k=rng.randrange(1, 25)))
        elif kind == "truncated":
            text = gold.strip().strip("$")
            answer = "" if rng.random() < 0.1 else text[: rng.randrange(len(text))] + "@" + rng.choice(PIECES)
        elif kind == "shuffled":
            text = list(gold.strip().strip("$"))
            rng.shuffle(text)
            answer, gold = "".join(text), str(whole * 1_000_003 + 17)
        else:
            answer, gold = rng.choice(HOSTILE), rng.choice([gold, str(whole * 1_000_003 + 17)])
        if answer is not None:
            count -= 1
            yield kind, gold, answer


# ---- measuring ----------------------------------------------------------------------------------------


def by_engine(gold: str, answer: str) -> bool:
    """Compare without string equality, in this process; only for golds and answers made from them."""
    real, answers.same_text = answers.same_text, lambda gold, answer: False
    try:
        return answers.compare(answers.tidy(gold), answers.tidy(answer), answers.ask_math_verify)
    except ValueError:  # an unreadable gold; the grader counts it as a failure
        return False
    finally:
        answers.same_text = real


def reformatted_and_perturbed(golds: list[str], seed: int = 0) -> tuple[Counter, list[tuple]]:
    """Return how many reformatted golds are right and perturbed ones wrong without string equality, and the rest."""
    rng, counts, exceptions = random.Random(seed), Counter(), []
    for gold in golds:
        for kind, change in (("reformatted right", reformatted), ("perturbed wrong", perturbed)):
            answer = change(gold, rng)
            if answer is None:
                continue
            expected = kind == "reformatted right"
            counts[kind if by_engine(gold, answer) == expected else f"not {kind}"] += 1
            if by_engine(gold, answer) != expected:
                exceptions.append((kind, gold, answer))
    return counts, exceptions


def wrong_answers(golds: list[tuple[str, ...]], count: int, rng: random.Random) -> list[tuple[str, tuple[str, ...]]]:
    """Return (answer, accepted answers) for up to `count` distinct wrong answers to each problem, in order."""
    pairs = [(perturbed(accepted[0], rng), accepted) for accepted in golds for _ in range(count)]
    return [pair for pair in dict.fromkeys(pairs) if pair[0]]


def seconds_for(grader: graders.Grader, pairs: list[tuple[str, tuple[str, ...]]]) -> float:
    """Return the seconds to grade (answer, golds) pairs."""
    started = time.perf_counter()
    grader.grade([(boxed(answer), golds) for answer, golds in pairs])
    return time.perf_counter() - started


def show(table: list[tuple[str, object]]) -> None:
    """Print the rows as two columns."""
    for name, value in table:
        print(f"{name:62s} {value}")


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description="Measure the grader on the benchmarks' gold answers.")
    parser.add_argument("data", type=Path, help="folder with the five benchmark files")
    parser.add_argument("--fuzz", type=int, default=0, help="number of wrong answers to grade at the end")
    parser.add_argument(
        "--cases", type=Path, help="JSON lines of response, gold (a list) and expect (1 right, 0 wrong)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    arguments = parser.parse_args()
    logging.disable()  # math-verify warns that it has no timeout in this process
    problems = golds_of(arguments.data)
    rng, table = random.Random(arguments.seed), []

    with graders.Grader(workers=2, thinking=False) as grader:
        asked = [(name, gold, golds) for name, golds in problems for gold in golds]
        grades = grader.grade([(boxed(gold), golds) for _, gold, golds in asked])
        wrong = [case for case, grade in zip(asked, grades, strict=True) if grade.verdict != "right"]
        table.append(("golds of the five files, boxed, judged right", f"{len(asked) - len(wrong)} of {len(asked)}"))
        for name, gold, _ in wrong:
            print(f"not right: {name}: {gold!r}")

        numbers = [(str(i), (str(i + i % 2),)) for i in range(20_000)]
        table.append(("plain numeric answers a second", round(len(numbers) / seconds_for(grader, numbers))))

        symbolic = [
            g for name, g in problems if name in ("minerva", "olympiad") and all(answers.number(a) is None for a in g)
        ]
        rng.shuffle(symbolic)
        half = len(symbolic) // 2
        seconds_for(grader, wrong_answers(symbolic[:half], 1, rng))  # warms the workers, with other golds
        for name, pairs in (
            ("every gold and answer new", wrong_answers(symbolic[half:], 1, rng)),
            ("distinct answers, golds seen before", wrong_answers(symbolic[half:], 4, rng)),
            ("groups of 8 rollouts with 4 distinct answers", 2 * wrong_answers(symbolic, 4, rng)),
        ):
            speed = len(pairs) / seconds_for(grader, pairs)
            table.append((f"symbolic answers a second, {name} ({len(pairs)})", round(speed, 1)))

    golds = [gold for _, answers in problems for gold in answers]
    counts, exceptions = reformatted_and_perturbed(golds, arguments.seed)
    for kind, gold, answer in exceptions:
        print(f"not {kind}: gold {gold!r}, answer {answer!r}")
    table += [(f"without string equality: {kind}", count) for kind, count in sorted(counts.items())]

    sums = list(open_sums(500, arguments.seed))
    table.append((f"sums left to work out, judged right ({len(sums)})", sum(by_engine(*case) for case in sums)))

    if arguments.cases:
        cases = [json.loads(line) for line in arguments.cases.read_text().splitlines()]
        with graders.Grader(workers=2) as grader:
            grades = grader.grade([(case["response"], case["gold"]) for case in cases])
        wrong = [c for c, g in zip(cases, grades, strict=True) if (g.verdict == "right") != bool(c["expect"])]
        table.append(
            (f"cases of {arguments.cases.name} judged as expected", f"{len(cases) - len(wrong)} of {len(cases)}")
        )
        for case in wrong:
            print(f"not as expected: {case}")

    if arguments.fuzz:
        verdicts, false_right = fuzz(golds, arguments.fuzz, arguments.seed)
        table += [(f"fuzz: {kind}", count) for kind, count in sorted(verdicts.items())]
        table.append(("fuzz: judged right among those built to be wrong", len(false_right)))
        for case in false_right:
            print("false right:", *map(repr, case))
    show(table)


def false_rights(cases: list[tuple[str, str, str]], grades: list[reward.Grade]) -> list[tuple[str, str, str]]:
    """Return those judged right, except answers with a brace that ends the box early, which may be anything."""
    pairs = zip(cases, grades, strict=True)
    return [case for case, grade in pairs if grade.verdict == "right" and grade.answer == case[2]]


def fuzz(golds: list[str], count: int, seed: int) -> tuple[Counter, list[tuple[str, str, str]]]:
    """Return the verdicts on generated answers and those judged right; print progress to stderr."""
    verdicts, false_right, started, done = Counter(), [], time.monotonic(), 0
    cases = list(hostile_and_wrong(golds, count, seed))
    with graders.Grader(workers=2, time_limit_s=2.0, thinking=False) as grader:
        for first in range(0, count, 200):
            batch = cases[first : first + 200]
            grades = grader.grade([(boxed(answer), [gold]) for _, gold, answer in batch])
            false_right += false_rights(batch, grades)
            verdicts.update(grade.verdict for grade in grades)
            for case, grade in zip(batch, grades, strict=True):
                if grade.verdict == "grader failed":
                    print("\ngrader failed:", *(repr(text[:200]) for text in case), file=sys.stderr)
            done += len(batch)
            rate = done / (time.monotonic() - started)
            print(
                f"\r{done}/{count} {rate:.0f}/s, {(count - done) / rate:.0f} s left ",
                end="",
                file=sys.stderr,
                flush=True,
            )
    print(file=sys.stderr)
    return verdicts, false_right


if __name__ == "__main__":
    main()
