r"""lab/answers.py case by case: each line is a gold (or several), an answer, whether it is right, and why."""

import json
import random
import re
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import grader as bench  # noqa: E402

from engine.grader import Grader  # noqa: E402
from lab import answers  # noqa: E402
from lab.answers import normal_form, number  # noqa: E402

R, W = True, False

GOLDEN = {
    "numbers": [
        ("142.0", "142", R, "a trailing .0 is nothing (the AMC23 golds are floats)"),
        ("142.0", "143", W, "another number"),
        ("1234", "1,234", R, "thousands separator"),
        ("1234567", "1,234,567", R, "two thousands separators"),
        ("1234", "1 234", R, "a space as thousands separator"),
        ("1234", r"1{,}234", R, "LaTeX's way to write a comma without a space"),
        ("1234", "12,34", W, "no thousands separator there"),
        (r"\$32,\!348", "32348", R, "dollar sign and negative thin space"),
        ("9.6\n", " 9.60 ", R, "Minerva golds end in newlines"),
        (r"$\frac{25}{2}$", "12.5", R, "Olympiad golds carry dollar delimiters"),
        ("0.5", ".5", R, "no digit before the point"),
        ("007", "7", R, "AIME golds have leading zeros"),
        ("5", "+5", R, "a plus sign"),
        ("5", "-5", W, "the other sign"),
        ("-5", "−5", R, "a typographic minus"),
        ("5", "5.", R, "a full stop"),
        ("5", "**5**", W, "bold markers inside the box are no number"),
        ("5", r"\(5\)", R, "inline math delimiters in the box"),
        ("5", "(5)", R, "in parentheses"),
        ("5", "{5}", R, "in braces"),
        ("0", "-0", R, "minus nothing"),
        ("3.14159", r"\pi", R, "a decimal gold, the closed form to six figures"),
        ("3.14", r"\pi", W, "three figures are another number"),
        ("0.333", "1/3", W, "two plain numbers are compared exactly"),
        ("1/3", "0.333333", W, "whichever of the two is the gold"),
        ("1/12", "0.083333333333333", R, "but twelve figures of a fraction without a finite decimal are enough"),
        ("1000000007", "1000000007.0000000001", W, "not where both are finite"),
        ("7", "7''''''", W, "marks piled up are no unit"),
        (r"\frac{1}{3}", r"0.\overline{3}", R, "a repeating decimal is exact"),
        ("0.0000001", "0.0000002", W, "math-verify rounds to six decimals"),
        (r"0.0000001 \text{ m}", r"0.0000002 \text{ m}", W, "with a unit too"),
        ("10000000000000000000001", "10000000000000000000002", W, "beyond the precision of a float"),
        ("12345678901234567890", "12345678901234567890.0", R, "a long integer as a decimal"),
        ("5", r"\approx 5", R, "the approximation sign before the number"),
        ("5", "", W, "an empty box"),
        ("5", "?", W, "no mathematics at all"),
        ("5", "6", W, "one digit off"),
        ("55", "5", W, "a digit missing"),
        ("56", "5 6", W, "a space inside is no digit group"),
        ("11", "5 6", W, "math-verify adds two numbers side by side"),
    ],
    "fractions and mixed numbers": [
        ("7/2", r"3\frac{1}{2}", R, "mixed number"),
        ("7/2", "3 1/2", R, "mixed number in plain text"),
        ("-7/2", r"-3\frac{1}{2}", R, "the sign of a mixed number covers its fraction"),
        ("-5/2", r"-3\frac{1}{2}", W, "it is not -3 + 1/2"),
        (r"\frac43", r"\dfrac{4}{3}", R, "bare digits after \\frac"),
        (r"\frac43", r"\tfrac43", R, "the small fraction"),
        (r"\frac{14}{3}", r"\frac{28}{6}", R, "a fraction may be unreduced"),
        (r"\frac{14}{3}", "14/3", R, "a slash for the bar"),
        (r"\frac{14}{3}", r"\frac{3}{14}", W, "upside down"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}", R, "the sign above the bar"),
        (r"-\frac{1}{2}", r"\frac{1}{-2}", R, "the sign below the bar"),
        (r"\frac{1}{2}", r"\frac{\frac{1}{2}}{1}", R, "a fraction of fractions"),
        (r"\frac{1}{2}", r"rubbish ### \frac{1}{2}", W, "no picking of a number out of rubbish"),
        ("2", r"\frac{10}{5}", R, "a fraction that is whole"),
        ("2", r"10 \div 5", R, "so may a quotient"),
        (r"\frac{3}{4}", r"\frac{3}{4}\pi", W, "a factor more"),
    ],
    "percentages": [
        ("0.5", r"50\%", R, "a percentage is its value"),
        ("50", r"50\%", R, "or its figure"),
        (r"50\%", "50", R, "the sign may be left out"),
        (r"50\%", "0.5", R, "or worked out"),
        (r"50\%", "5000", W, "but no other reading"),
        (r"50\%", "50 percent", R, "in words"),
        (r"50\%", r"50\text{ percent}", R, "in words in \\text"),
        (r"50\%", r"51\%", W, "another percentage"),
        ("12.5", r"12.5 \%", R, "a space before the sign"),
        (r"\sqrt{2500}", r"50\%", R, "the figure of a root"),
        (r"\sqrt{2500}", r"5\%", W, "but of no other"),
        (r"33\frac{1}{3}\%", r"\frac{1}{3}", R, "a mixed percentage"),
    ],
    "scientific notation": [
        ("1e-5", "0.00001", R, "scientific notation with e"),
        ("1e-5", "10^{-5}", R, "math-verify reads e as Euler's number"),
        ("7 \\times 10^{37}\n", "7e37", R, "scientific notation in LaTeX"),
        (r"2.26 \times 10^{-10}", r"3.5 \times 10^{-10}", W, "small numbers are not all 0"),
        (r"2.26 \times 10^{-10}", r"2.26 \times 10^{-11}", W, "another power of ten"),
        (r"2.26 \times 10^{-10}", r"0.226 \cdot 10^{-9}", R, "another mantissa for the same number"),
        ("2000", r"2\times 10^3", R, "a number, not a product left open"),
        ("2000", "2e3", R, "the same with e"),
        ("1000", "10^3", R, "a bare power of ten"),
        (r"1 \times 10^{-3}", "0.001", R, "written out"),
        ("10^{100}", "1" + "0" * 100, R, "a googol written out"),
        ("10^{100}", "1" + "0" * 99, W, "a zero short"),
        ("3e8", r"3\times 10^9", W, "an order of magnitude more"),
    ],
    "nothing left to work out": [
        ("5", "2+3", W, "an unevaluated sum leaves the work to the grader"),
        ("5", "10-5", W, "so does a difference"),
        ("6", r"2 \times 3", W, "and a product"),
        ("6", "2*3", W, "with an asterisk"),
        ("6", r"2\cdot 3", W, "with a dot"),
        ("6", "2(3)", W, "written by juxtaposition"),
        ("5", "2(3)", W, "which math-verify takes for a mixed number"),
        ("6", "(2)(3)", W, "with two parentheses"),
        ("5", "(2)(3)", W, "which it adds too"),
        ("5", r"2+3 \text{ cm}", W, "a sum with a unit"),
        ("5", "x = 2+3", W, "a sum behind an equals sign"),
        ("5", r"\frac{2+3}{1}", W, "a sum above a bar"),
        ("1", r"\frac{5}{2+3}", W, "a sum below it"),
        ("5", r"2+\sqrt{9}", W, "a sum with a root"),
        ("24", r"2^3\cdot 3", W, "a product with a power"),
        ("5", r"\sum_{i=1}^{5}1", W, "a sum sign"),
        ("5", r"\int_0^5 1\,dx", W, "an integral"),
        ("5", r"\lim_{x\to 5} x", W, "a limit"),
        ("5", r"\sqrt{9+16}", W, "a sum below a root"),
        ("16", "2^{3+1}", W, "a sum in an exponent"),
        ("6", "(1+2)!", W, "a sum in a factorial"),
        ("4", r"\sqrt{2}\cdot\sqrt{8}", W, "a product of roots that is rational"),
        ("5", "5+0", W, "even of nothing"),
        ("5", r"5\cdot 1", W, "or times one"),
        ("6", r"2\sqrt{9}", W, "a number times a root that is whole"),
        ("(5,6)", "(2+3,6)", W, "in an entry of a tuple"),
        (r"\{5,6\}", r"\{2+3,6\}", W, "in an entry of a set"),
        ("5,6", "2+3,6", W, "in an entry of a list"),
        ("[0,5]", "[0,2+3]", W, "at the end of an interval"),
        (r"\begin{pmatrix}5\\6\end{pmatrix}", r"\begin{pmatrix}2+3\\6\end{pmatrix}", W, "in an entry of a matrix"),
        ("20", r"\frac{2\times 10^3}{100}", R, "scientific notation above a bar is a number"),
        ("1024", "2^{10}", R, "a power is an answer"),
        ("1024", "2^{11}", W, "another power"),
        ("1024", "2^10", R, "an exponent without braces"),
        ("1024", "2**10", R, "an exponent as in code"),
        ("720", "3!!", W, "a double factorial is no factorial of a factorial"),
        ("1", r"\frac{x}{x}", W, "a variable that would cancel"),
        ("10", r"\binom{5}{2}", R, "a binomial is an answer"),
        ("10", r"\binom52", R, "its bare digits"),
        ("120", "5!", R, "a factorial is an answer"),
        ("2", r"\sqrt{4}", R, "a root is an answer"),
        ("2", r"\sqrt[3]{8}", R, "a higher root too"),
        ("-2", r"-\sqrt{4}", R, "with a sign"),
        ("5", "-(-5)", R, "a sign is no difference"),
        (r"2+\sqrt{3}", r"\sqrt{3}+2", R, "where the gold is a sum the answer may be one"),
        (r"2\sqrt{3}", r"\sqrt{12}", R, "equal radicals"),
        (r"2021 \cdot 505 \cdot 337", "343943885", R, "a product in the gold may be worked out"),
        (r"\frac{100!}{2^{50}}", r"\frac{100!}{4^{25}}", R, "a closed form that nobody writes out"),
        ("2^{1009}", "2^{1009}+1", W, "equal in the first three hundred digits"),
        ("1414.214", r"1000\sqrt{2}", R, "a product that is irrational has no plainer form"),
        ("6", "7-1", W, "a difference with one"),
        ("1023", "2^{10}-1", W, "a power less one"),
        ("-5", r"-1\cdot 5", W, "a product with minus one"),
        ("5", "2.0+3", W, "a decimal hides no sum"),
        ("5", r"\sqrt{9.0}+2", W, "nor below a root"),
        (r"8.7 \times 10^{8}", r"8.7 \times 10^{8}+1", W, "nor does a tolerance: both are exact"),
        ("7", r"17 \bmod 10", W, "a remainder to take"),
        ("7", r"\max(7,3)", W, "a choice to make"),
        ("37", r"37+\pi-\pi", W, "irrational terms that cancel"),
        (r"\frac{5}{6}", r"\frac12+\frac13", W, "the gold a fraction"),
    ],
    "lists, sets and hedges": [
        ("1,2,3", "1,2,3", R, "a bare list"),
        ("1,2,3", "3, 2, 1", R, "in any order"),
        ("1,2,3", r"\{3,2,1\}", R, "as a set"),
        ("1,2,3", "1;2;3", R, "with semicolons"),
        ("1,2,3", r"1, 2 \text{ and } 3", R, "with a word before the last"),
        ("1,2,3", "n=1,2,3", R, "a named list"),
        ("1,2,3", "n=2,3,4", W, "a named list of other numbers"),
        ("1,2,3", "1,2", W, "one missing"),
        ("1,2,3", "1,2,3,4", W, "one too many"),
        ("1,2,3", "1,2,3,3", W, "one twice"),
        ("1,2,2", "1,1,2", W, "another one of them twice"),
        ("5,5", "5", W, "a list is not its only number"),
        ("5,5", "5,5", R, "a list with a repetition"),
        ("5", "5,5", W, "nor the other way round"),
        ("-2,-2", r"\{-2\}", W, "a repetition counts in a list"),
        (r"\{1,2\}", "2,1", R, "the braces may be left out"),
        (r"\{1,2\}", r"\{1,3\}", W, "another set"),
        (r"\{1,2\}", r"x\in\{1,2\}", R, "a named set"),
        ("3", "1,2,3", W, "a list earns no single number"),
        ("5", r"\{5\}", W, "nor does a set of one"),
        ("5", "[5]", W, "nor a list of one"),
        (r"\{1,2\}", "(1,2)", W, "a point is no set"),
        ("5", r"5\approx 6, 6", W, "nor an approximation with a second value"),
        ("5", r"5 \text{ or } 6", W, "a hedge"),
        ("5", "5 or 6", W, "a hedge in plain text"),
        ("6", "5 or 6", W, "whichever comes last"),
        ("5", "5 and 6", W, "and"),
        ("5", "5;6", W, "a semicolon"),
        ("5", r"5 \lor 6", W, "the sign for or"),
        ("5", r"\pm 5", W, "two values for one"),
        ("2021", r"\pm 2021", W, "the same, reported of math-verify"),
        ("5,-5", r"\pm 5", R, "but it is the list of both"),
        (r"\pm 5", "-5, 5", R, "either way"),
        (r"\pm 5", "5", W, "one of two"),
        (r"1\pm\sqrt{2}", r"1+\sqrt{2}, 1-\sqrt{2}", R, "after a term"),
        ("5", ",".join(map(str, range(100))), W, "a boxed list of every number earns nothing"),
        ("1,2", ",".join(map(str, range(100))), W, "nor in place of a list"),
        ("100, 200", "200, 100", R, "with a space after the comma it is a list"),
        ("100200", "100,200", R, "without one it is one number"),
        ("100200", "100, 200", W, "a list is no number"),
        (r"$69$,$84$", "69, 84", R, "an Olympiad list, dollars and all"),
        (r"$\frac{1}{3},1,\frac{1}{9}$", r"1, \frac13, \frac19", R, "fractions in a list"),
        (r"$90^{\circ}$,$60^{\circ}$", "60, 90", R, "degrees left out in a list"),
        (r"$\sqrt{2}-1$,$\frac{3-\sqrt{2}}{7}$", r"\frac{3-\sqrt2}{7}, -1+\sqrt{2}", R, "radicals in a list"),
        (r"$\sqrt{2}-1$,$\frac{3-\sqrt{2}}{7}$", r"\frac{3-\sqrt2}{7}, 1+\sqrt{2}", W, "one of them off"),
        ("x=1,y=2", "x=2,y=1", W, "named values are not exchanged"),
        ("x=1,y=2", "y=2, x=1", R, "but may come in another order"),
        ("x=1,y=2", "2,1", W, "without names they come in the gold's order"),
        ("x=1,y=2", "(1,2)", R, "which a pair has"),
        (r"f(x)=x,f(x)=2-x", r"f(x)=2-x, f(x)=x", R, "two functions in any order"),
        (r"\emptyset", r"\varnothing", R, "two signs for the empty set"),
        (r"\emptyset", r"\{\}", R, "and its braces"),
        (r"\emptyset", "0", W, "nothing is not zero"),
    ],
    "tuples, intervals and matrices": [
        ("(3,2)", "(3, 2)", R, "a space in a point"),
        ("(3,2)", "(2,3)", W, "a point is ordered"),
        ("(3,2)", "3,2", R, "the parentheses may be left out"),
        ("(3,2)", "2,3", W, "but not the order"),
        ("(3,2)", "(x,y)=(3,2)", R, "a named point"),
        ("(3,2)", "x=3, y=2", R, "its coordinates by name"),
        ("(3,2)", r"\{3,2\}", W, "a set has no order"),
        ("(3,2)", r"\left(3,\,2\right)", R, "sized parentheses"),
        ("(3,2)", "(3,2,1)", W, "a dimension more"),
        ("(1000,2000)", "(1,000)", W, "no thousands separator inside parentheses"),
        ("(0.5,2)", r"(\frac12, 2)", R, "a fraction in a point"),
        ("(1,2),(3,4)", "(3,4),(1,2)", R, "a list of points in any order"),
        ("(1,2),(3,4)", "(3,4),(2,1)", W, "each of them ordered"),
        (r"$(22+8 \sqrt{6}, 22-8 \sqrt{6})$", r"(22+8\sqrt6,22-8\sqrt6)", R, "radicals in a point"),
        (r"$(4, \log _{10} 2)$", r"(4,\log_{10}2)", R, "a logarithm in a point"),
        ("(1,2)", "[1,2]", W, "open is not closed"),
        ("[1,2]", "[1,2]", R, "a closed interval"),
        ("[1,2]", "1,2", W, "its ends are no interval"),
        ("[1,2]", "[1,2)", W, "half open is not closed"),
        ("[1,2)", r"x\in[1,2)", R, "a named interval"),
        (r"$[\frac{1}{2}, 8]$", "[0.5, 8]", R, "a decimal at an end"),
        (r"(-\infty,-5)", r"(-\infty, -5)", R, "an infinite interval"),
        (r"[2,\infty)", r"[2,+\infty)", R, "a sign before infinity"),
        (r"(-\infty,-5)", r"(-\infty, -5]", W, "with its end"),
        (r"(-\infty,-5)", r"(-\infty, 5)", W, "with another end"),
        ("15000", r"15,000 \text{ dollars}", True, "a thousands separator before a unit"),
        ("15000", r"\text{Area} = 15,000", True, "a thousands separator behind a name"),
        (r"25000000\pi", r"25,000,000\pi", True, "thousands separators before a symbol"),
        (r"25,000 \text{ m}", "25000", True, "a thousands separator in the gold, with a unit"),
        ("6764, 10945", r"6,764 \text{ and } 10,945", True, "a list of numbers with separators"),
        ("938", "938_979979", False, "an index is no base"),
    ("15000", r"15,001 \text{ dollars}", False, "the last digit after a separator"),
            ("90", r"{90^\circ}", True, "a degree sign at the end of a group"),
        (r"\frac{180^\circ}{7}", r"\frac{180^\circ}{8}", False, "another fraction of a straight angle"),
        (r"\sin 70^\circ", r"\cos 20^\circ", True, "the degrees of a sine are no unit"),
        (r"\frac{\sqrt{3}}{2}", r"\sin 60^\circ", True, "the value of a sine of degrees"),
        (r"\frac{1}{2}", r"\sin 60^\circ", False, "another value"),
        (r"\frac{\ln 3}{\ln 2}", r"\log_2 3", True, "the base of a logarithm is not the first of two numbers"),
        (r"\log_2 3", r"\log_2 5", False, "another logarithm, and a gold that can be read"),
        (r"11,\! 111,\! 111,\! 100", "11111111100", True, "a space after a negative space is no list (MATH-500)"),
        (r"125\textnormal{ miles}", "125", True, "another command for text"),
        ("18", r"\boldsymbol{18}", True, "bold"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\mathbf{v} = \begin{pmatrix}1\\2\end{pmatrix}", True, "a named vector"),
        (
            r"\begin{pmatrix}1\\2\end{pmatrix}",
            r"\mathbf{v} = \begin{pmatrix}1\\3\end{pmatrix}",
            False,
            "another vector",
        ),
        (r"0.56 = 56\%", "0.56", True, "a gold that says the same number twice"),
        (r"0.56 = 56\%", "0.57", False, "another number"),
        ("5", r"5 \text{ tenths}", False, "a number word is no unit"),
        ("5", r"5 \text{ minus one}", False, "an operation in words is no unit"),
        ("5", r"5 \mathrm{i}", False, "the imaginary unit is no unit of measure"),
        ("5", r"5 \approx 6", False, "a hedge behind an approximation"),
        (r"\frac{1}{3}", r"\frac{1}{3} \approx 0.33", True, "a rounding beside the exact answer"),
        (r"6:00 \text{ p.m.}", r"6:00 \text{ a.m.}", False, "morning is not evening, with dots too"),
        (r"(-7, -4] \cup (-1, 2]", r"(-7,-4]\cup(-1,2]", True, "the space after the comma of an interval in a union"),
        (r"(-7, -4] \cup (-1, 2]", r"(-7,-4]\cup(-1,3]", False, "another end of an interval in a union"),
        (
            r"[3, 4) \cup \left(4, \frac{64}{11}\right]",
            "[3,4) \\cup (4, 64/11]",
            True,
            "a union with a fraction, spaced otherwise",
        ),
        (r"30^\circ.", "30", True, "a full stop after the degree sign"),
        (r"2007 + \frac\pi 2", r"2007+\frac{\pi}{2}", True, "a fraction whose braces were left out"),
        (r"2007 + \frac\pi 2", r"2008+\frac{\pi}{2}", False, "the same with another number"),
        (r"$(-\infty, 0) \cup\{1\}$.", r"\{1\}\cup(-\infty,0)", R, "a union in another order"),
        (r"(0,1)\cup(2,3)", r"(0,1)\cup(2,4)", W, "another union"),
        (r"(-\infty,\infty)", r"\mathbb{R}", R, "all real numbers"),
        (
            r"\begin{pmatrix}1\\2\end{pmatrix}",
            r"\begin{pmatrix} \frac{2}{2} \\ 2 \end{pmatrix}",
            R,
            "a row break before a space",
        ),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", R, "other brackets"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", W, "transposed"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2&3&4\end{pmatrix}", W, "another shape"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\[4pt]2\end{pmatrix}", True, "row spacing"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "1,2", W, "a list is no column"),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\left(\begin{array}{c c}1&2\end{array}\right)", R, "spaced"),
        (r"\{1\pm\sqrt{5},-2\}", r"-2, 1+\sqrt5, 1-\sqrt5", R, "two entries by one sign"),
        (r"\begin{pmatrix}x&1\\0&y\end{pmatrix}", r"\begin{pmatrix}x&1\\0&y+0\end{pmatrix}", R, "symbols in a matrix"),
    ],
    "equations": [
        ("3", "x = 3", R, "a named value"),
        ("3", "3 = x", R, "the name last"),
        ("x=3", "3", R, "the name in the gold"),
        ("x=3", "y=3", R, "another name"),
        ("x=3", "x=4", W, "another value"),
        ("5", "4=5", W, "a false equation"),
        ("5", "2+3=5", R, "a true one states its result"),
        ("5", "2+3=4+1", W, "unless that is open still"),
        ("5", "x=2+3=5", R, "a chain"),
        ("5", "x=2+4=5", W, "a chain with a false link"),
        ("5", r"\sqrt{25}=5", R, "a root worked out"),
        ("5", r"\sqrt{16}=5", W, "wrongly"),
        ("0.5", r"x=\frac{1}{2}=0.5", R, "a fraction worked out"),
        ("6", "2x=6", W, "it is three"),
        ("3", "2x=6", W, "and the work is left"),
        ("5", "|x|=5", W, "two values"),
        ("5", "x^2=5", W, "the square is five"),
        ("5", "a+b=5", R, "the sum that was asked for"),
        ("5", "f(2)=5", R, "the value of a function"),
        ("5", r"\text{Area}=5", R, "a word for a name"),
        ("90", r"\angle ABC = 90^\circ", R, "an angle"),
        ("1/3", r"x=\frac{1}{3}\approx 0.333", R, "an approximation after the value"),
        (r"$f(x)=2 x$", "2x", R, "a function by its value"),
        (r"$f(x)=2 x$", "f(x)=x+x", R, "the same function"),
        (r"$f(x)=2 x$", "f(x)=3x", W, "another one"),
        (r"$m_{\max }=n^{2}-n-1$", "n^2-n-1", R, "a name with an index"),
        (r"$M=2^{N-2}+1$", "2^{N-2}+1", R, "the right side alone"),
        (r"y^{\prime}+ry-rx(t)=0", "0", W, "where the left side is no name"),
        ("y=2x+1", "y=2x+2", W, "another line"),
        ("y=2x+1", "2x-y+1=0", R, "the same line rearranged"),
        ("y=2x+1", "2y=4x+2", R, "the same line twice as large"),
        ("2x+3y=6", "2x+3y=7", W, "parallel lines"),
        ("x^2+y^2=1", "x^2+y^2-1=0", R, "the same circle"),
        ("x^2+y^2=1", "1", W, "a circle is not its radius"),
        ("MR=SRMC", "SRMC=MR", R, "two words"),
        ("SRAC=LRAC", "SRAC=SRMC", W, "another word"),
        (r"\int_0^1 f(x)dx=1", r"\int_0^1 f(x)dx=2", W, "where no sample can be taken"),
        (r"\frac{dx}{dt} = kx - a", r"\frac{dx}{dt}+a=kx", R, "a differential equation rearranged"),
        (r"\frac{dx}{dt} = kx - a", r"\frac{dx}{dt} = kx + a", W, "with another sign"),
        ("y''+y=0", "y'+y=0", W, "math-verify drops the primes"),
    ],
    "inequalities": [
        ("x<3", r"(-\infty,3)", R, "gold first: the other way round math-verify fails"),
        (r"(-\infty,3)", "x<3", R, "the other way round"),
        (r"(-\infty,3)", "y<3", R, "whatever the variable"),
        (r"(-\infty,3)", r"x\le 3", W, "with its end"),
        (r"(-\infty,3)", "x>3", W, "the other side"),
        (r"(-\infty,3)", "x<4", W, "another end"),
        (r"$k \geqslant 2$", r"k\ge 2", R, "two signs for one relation"),
        (r"$k \geqslant 2$", "k>=2", R, "typed"),
        (r"$k \geqslant 2$", r"n\ge 2", R, "another variable"),
        (r"$k \geqslant 2$", r"2\le k", R, "turned round"),
        (r"$k \geqslant 2$", r"[2,\infty)", R, "as an interval"),
        (r"$k \geqslant 2$", "k>2", W, "without its end"),
        (r"$k \geqslant 2$", "2", W, "an end is no range"),
        ("[1,2)", r"1\le x<2", R, "between two ends"),
        ("[1,2)", "1<x<2", W, "an end less"),
        (r"(-\infty,1)\cup(2,\infty)", r"x<1 \text{ or } x>2", R, "two ranges"),
        (r"(-\infty,1)\cup(2,\infty)", r"x<1 \text{ or } x>3", W, "two others"),
        ("5", ">5", W, "more than five"),
        ("5", "x>5", W, "with a variable"),
        ("0 < x < 5", "(0, 5)", R, "an interval with a space"),
        (r"(2,\infty)", r"\{x \mid x>2\}", R, "a set-builder"),
        (r"(0,5)", r"\{x \in \mathbb{R} : 0<x<5\}", R, "a set-builder with its domain"),
        (r"-80\leq g(x)\leq 82", "[-80,82]", R, "the range of a function"),
        ("5", r"\neq 5", W, "anything but five"),
        ("5", r"\le 5", W, "at most five"),
        ("5", r"x\ge 5", W, "at least five"),
        (r"x\neq 5", r"x\ne 5", R, "two names of a sign"),
        (r"x\neq 5", "x=5", W, "the opposite"),
    ],
    "units, degrees and bases": [
        ("90", r"90^\circ", R, "the degree sign may be there"),
        (r"336^\circ", "336", R, "or be missing (AIME25)"),
        (r"336^\circ", r"336^{\circ}", R, "or be in braces"),
        (r"336^\circ", r"336 \text{ degrees}", R, "or be a word"),
        (r"336^\circ", r"335^\circ", W, "another angle"),
        (r"90^\circ", r"90 \text{ rad}", W, "radians are no degrees"),
        ("12", r"12 \text{ cm}", R, "a unit may be there"),
        (r"12 \text{ cm}", "12", R, "or be missing"),
        (r"12 \text{ cm}", "12 cm", R, "in plain text"),
        (r"12 \text{ cm}", r"12\,\text{cm}", R, "after a thin space"),
        (r"12 \text{ cm}", r"12 \mathrm{cm}", R, "in upright type"),
        (r"12 \text{ cm}", r"12\ \mathrm{~cm}", R, "with a tie"),
        (r"12 \text{ cm}", "12 m", W, "another unit"),
        (r"12 \text{ cm}", r"12 \text{ m}", W, "another unit in \\text"),
        (r"12 \text{ cm}", r"0.12 \text{ m}", W, "none is converted"),
        (r"12 \text{ cm}", r"13 \text{ cm}", W, "another figure"),
        (r"12 \text{ cm}^2", r"12 \text{ cm}^3", W, "an area is no volume"),
        (r"5 \text{ m/s}", r"5 \text{ km/s}", W, "a faster one"),
        (r"5\sqrt{3} \text{ cm}", r"5\sqrt{3}", R, "a unit after a radical"),
        (r"5\sqrt{3} \text{ cm}", r"5\sqrt{3}\text{ m}", W, "another one there"),
        ("5", r"5 \text{ apples}", R, "a thing counted"),
        ("12", r"12^{\text{th}}", R, "a raised ordinal"),
        (r"8\!:\!34 \text{ p.m.}", "8:34 PM", R, "an hour with its half of the day"),
        ("5", r"\text{5 apples}", R, "all of it in \\text"),
        ("7.0", r"\mathbf{7}", R, "a number in bold"),
        ("5", "5 apples", R, "the thing in plain text"),
        (r"5\text{ apples}", r"5 \text{ pears}", W, "another thing counted"),
        ("5", r"5 \text{ million}", W, "a multiplier is no unit"),
        ("5", "5 million", W, "in plain text neither"),
        ("5", r"5 \text{ or more}", W, "nor is a range"),
        ("12", "x12", W, "a letter before is no unit"),
        ("2t", "2", W, "t is a variable here, not a tonne"),
        ("2", "2t", W, "and here"),
        ("2", "2x", W, "nor is x"),
        ("3 m", "3", W, "not even if it could be a unit"),
        ("$2 n$", "2n", R, "a variable after a space"),
        ("7.6Z", "7.6z", W, "math-verify folds upper case"),
        (r"\frac{r}{R}", "1", W, "and would cancel these"),
        (r"1950^\circ C", "1950", R, "degrees Celsius left out"),
        (r"1950^\circ C", r"1950 ^{\circ}\text{C}", R, "the C in \\text"),
        (r"1950^\circ C", r"1950^\circ F", W, "Fahrenheit"),
        (r"0.003^{\prime \prime}", "0.003", R, "seconds of arc left out"),
        (r"4.4677 \times 10^{14} Hz", r"4.4677 \times 10^{14} \text{ Hz}", R, "a bare unit in the gold"),
        (r"2\mathbf{v}", "2", W, "a bold letter is a vector, no unit"),
        (r"3\mathbf{i}+2\mathbf{j}", r"3\mathbf{i}+2", W, "nor at the end of a sum"),
        (r"3\mathbf{i}+2\mathbf{j}", r"2\mathbf{j}+3\mathbf{i}", R, "vectors in another order"),
        (r"3\mathbf{i}+2\mathbf{j}", "3i+2j", R, "vectors that are not bold"),
        (r"3\mathbf{i}+2\mathbf{j}", r"3\mathbf{i}-2\mathbf{j}", W, "another vector"),
        (r"2\pi\mathbf{i}", r"2\pi i", R, "a bold letter after a command"),
        ("5 €", "5", R, "a currency sign left out"),
        ("5 €", r"5\text{ €}", R, "in \\text"),
        ("£1,250.5", "1250.5", R, "a currency sign before the number"),
        ("£5, £6", "5, 6", R, "before each of two"),
        ("£5", "5 £", R, "and behind it"),
        ("£5", "5 €", W, "another currency"),
        ("£5", "6", W, "another amount"),
        ("5元", "5", R, "yuan left out"),
        ("90度", r"90^\circ", R, "degrees in Chinese"),
        ("5℃", r"5^\circ C", R, "degrees Celsius in one character"),
        ("5℃", "5", R, "left out"),
        ("52_8", "52", R, "the base left out"),
        ("52_8", "52_{8}", R, "the base in braces"),
        ("52_8", "52_7", W, "another base"),
        ("52", "52_8", R, "the base left out in the gold"),
        ("52_8", "42", W, "no base is converted"),
        ("52_8", "53_8", W, "another figure in the same base"),
    ],
    "words and choices": [
        (r"\text{even}", "even", R, "a word in \\text"),
        (r"\text{even}", "Even", R, "a capital"),
        (r"\text{even}", r"\textbf{even}", R, "bold"),
        (r"\text{even}", "odd", W, "another word"),
        (r"\text{no}", "on", W, "letters are no factors"),
        (r"\text{no}", r"o\cdot n", W, "not even when multiplied"),
        (r"\text{no}", r"n\cdot o", W, "nor in their order"),
        ("Yes", r"\text{Yes}.", R, "a full stop"),
        ("Yes", "No", W, "the opposite"),
        (r"\text{no solution}", "No solution", R, "two words"),
        (r"\text{no solution}", r"\text{one solution}", W, "another of them"),
        (r"\text{Monday}", "Monday", R, "a day"),
        (r"\text{June 20}", r"\text{June 21}", W, "a date by a day"),
        ("5", r"\text{five}", W, "no number in words"),
        (r"\text{Jane}", r"\text{Jean}", W, "an anagram"),
        ("A", "A", R, "a choice"),
        ("A", r"\text{(A)}", R, "in parentheses"),
        ("A", r"\textbf{(A)}", R, "in bold"),
        ("A", r"\mathbf{A}", R, "in bold mathematics"),
        ("A", "(A)", R, "in plain parentheses"),
        ("A", "A.", R, "with a full stop"),
        ("A", "A)", R, "with half a parenthesis"),
        ("A", r"\text{(A) } 12", R, "with its text"),
        ("A", "A: 12", R, "after a colon"),
        ("A", r"\textbf{(A)}\ \frac{1}{2}", R, "with a fraction"),
        ("A", "B", W, "another choice"),
        ("B", "A", W, "the other way round"),
        ("A", "A: B", W, "a choice with another for its text"),
        ("C", "(C) A triangle", R, "a text that begins with the article"),
        ("A", "(A) (B)", W, "two choices, the right one first"),
        ("B", "A and B", W, "two choices"),
        ("B", "B or C", W, "two others"),
        ("B", "(A)(B)", W, "side by side"),
        ("B", "A, B, C, D", W, "all of them"),
        ("B", r"\text{(A) B}", W, "one behind the other"),
        ("B", "Bob", W, "a word that begins with it"),
        (r"\text{(C)}", "C", R, "the gold in parentheses"),
        ("05:00", "5:00", R, "a time"),
        ("05:00", r"05\!:\!00", R, "with spacing"),
        (r"05\!:\!00", "06:00", W, "another time"),
        (r"05\!:\!00", "5", W, "an hour is no time"),
        (r"5:00 \text{ PM}", r"5:00 \text{ AM}", W, "half a day off"),
        ("1:2", "2:1", W, "a ratio turned round"),
        ("1:2", "1:2", R, "a ratio"),
    ],
    "expressions": [
        ("p - q", "q - p", W, "opposite sign"),
        (r"1 - \frac{1}{\mathrm{e}}", r"1-\frac1e", R, "an upright e"),
        (r"\frac{2}{\pi}", r"\frac2\pi", R, "a command for a denominator"),
        ("x^2+1", "x²+1", R, "a raised character"),
        (r"2\sqrt{3}", "2√3", R, "a typed root sign"),
        (r"\frac{\pi}{2}", "pi/2", R, "a typed pi"),
        (r"\frac{1+\sqrt{5}}{2}", "(1+sqrt(5))/2", R, "a typed root"),
        ("e^{16} - 1", "-1 + exp(16)", R, "a typed function"),
        ("x", "|x|", W, "equal where x is positive"),
        ("p - q", "-q+p", R, "in another order"),
        ("6 - 5i", "-5i + 6", R, "complex number"),
        ("6 - 5i", "6+5i", W, "its conjugate"),
        (r"\frac{1}{1+i}", r"\frac{1-i}{2}", R, "i squared is -1"),
        (r"1 + i\sqrt{3}", r"1+\sqrt{3}i", R, "i before or after a root"),
        (r"\sqrt{2}", "1.414214", R, "six figures of a closed form are enough"),
        (r"\sqrt{2}", "1.414", W, "four are not"),
        (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}", R, "expanded"),
        (r"\frac{n(n+1)}{2}", r"\frac{n(n-1)}{2}", W, "one sign off"),
        ("x^{2}+1", "x^2+1", R, "braces around an exponent"),
        ("x^{2}+1", "x^{2}+2", W, "another constant"),
        (r"\binom{2n}{n}", r"\frac{(2n)!}{(n!)^2}", R, "a binomial in factorials"),
        (r"$2^{k-n}$", r"\frac{2^k}{2^n}", R, "a quotient of powers"),
        (r"\frac{e^{at}-e^{-at}}{2a}", r"\frac{1}{2a}(e^{at}-e^{-at})", R, "a factor pulled out"),
        (r"\frac{e^{at}-e^{-at}}{2a}", r"\frac{e^{at}+e^{-at}}{2a}", W, "another sign"),
        (r"\lfloor\sqrt{n-1}\rfloor", r"\lfloor \sqrt{-1+n} \rfloor", R, "inside a floor"),
        (r"\lfloor\sqrt{n-1}\rfloor", r"\lfloor \sqrt{n} \rfloor", W, "another floor"),
        (r"I(0)e^{-\frac{t}{RC}}", r"I(0) e^{-t/(RC)}", R, "a function applied"),
        (r"\cos(2t)", r"\cos 2t", R, "parentheses of a function left out"),
        (r"\frac{3 \pi}{4}", r"0.75\pi", R, "a decimal factor"),
        (r"\frac{3 \pi}{4}", r"\frac{4\pi}{3}", W, "upside down"),
        (r"2 \cos (\pi t+\pi / 3)", r"2\cos\left(\pi t + \frac{\pi}{3}\right)", R, "a phase"),
        (r"X_{d}=125-1.25 P", r"125-\frac{5}{4}P", R, "a decimal coefficient as a fraction"),
        (r"m_{p} c^{2}(\gamma^{2}-1) \sin ^{2} \theta", r"(\gamma^2-1)m_p c^2\sin^2\theta", R, "gamma is a variable"),
        (r"\alpha", r"\beta", W, "another Greek letter"),
        ("x", "y", W, "another variable"),
        ("x", r"\frac{1}{0}", W, "a division by zero is no value"),
        ("-t^2-t-3", "-(t^2+t+3)", R, "a sign pulled out"),
        (r"\sin^2\theta", r"1-\cos^2\theta", R, "an identity"),
        (r"\ln 2 + i\frac{\pi}{3}", r"\ln(2)+\frac{i\pi}{3}", R, "a complex logarithm"),
    ],
    "characters of other keyboards": [
        ("½", "0.5", R, "a fraction of one character"),
        ("3½", "7/2", R, "in a mixed number"),
        ("½", "2", W, "another number"),
        ("12，15", "15, 12", R, "a full-width comma separates a list"),
        ("12，15", "1215", W, "and is no thousands separator"),
        ("100，200", "100200", W, "not even before three digits"),
        ("12、15", "12,15", R, "a Chinese comma"),
        ("（1，2）", "(1,2)", R, "full-width parentheses"),
        ("（1，2）", "(2,1)", W, "in another order"),
        ("x＝5", "5", R, "a full-width equals sign"),
        ("5％", "0.05", R, "a full-width percent sign"),
        ("7", "７", W, "a full-width digit is another script's"),
        ("①③", "①、③", R, "statements by their numbers"),
        ("①③", "1, 3", R, "typed as numbers"),
        ("①③", "13", W, "which are no digits"),
        ("①③", "①", W, "one of the two"),
        ("△ABC", r"\triangle ABC", R, "a triangle"),
        ("△ABC", "△ABD", W, "another triangle"),
        ("a₁", "a_1", R, "a lowered character"),
        ("a₁", "a_2", W, "another index"),
    ],
    "several golds": [
        (["6630.65\n", "6630\n"], "6630", R, "the second of two"),
        (["6630.65\n", "6630\n"], "6630.65", R, "the first of two"),
        (["6630.65\n", "6630\n"], "6631", W, "neither"),
        (["3", "1+x"], "x+1", R, "a symbolic one after a plain one"),
        (
            ["6.43 \\times 10^{16}", r"6.43 \times 10^{16} \text{ cm}^{-3}"],
            r"6.43\times10^{16}",
            R,
            "with and without unit",
        ),
        ([], "5", W, "no gold, no match"),
    ],
}
CASES = [(kind, *case) for kind, cases in GOLDEN.items() for case in cases]


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1) as grader:
        yield grader


def boxed(answer: str) -> str:
    return rf"<think>hm</think> So \boxed{{{answer}}}"


@pytest.mark.parametrize("kind, gold, answer, right, why", CASES, ids=[f"{case[0]}: {case[4]}" for case in CASES])
def test_golden(grader, kind, gold, answer, right, why):
    (grade,) = grader.grade([(boxed(answer), [gold] if isinstance(gold, str) else gold)])
    assert grade.verdict == ("right" if right else "wrong")
    assert grade.correct == float(right) and grade.answer == answer


def test_there_are_enough_cases_and_each_has_a_reason():
    assert len(CASES) >= 250 and len({(case[0], case[4]) for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    "answers, form",
    [
        (["0.5", r"\frac12", r"50\%", r"\dfrac{1}{2}", "1/2", "$0.50$", "5e-1"], "1/2"),
        (["1,234", "1234", "1234.0"], "1234"),
        ([r"\text{Even}", "even", "EVEN "], "even"),
        (["x^2 + 1", "x^2+1"], "x^2+1"),
        (["A", r"\text{A}"], "A"),
        (["X"], "X"),
        ([r"\Delta x"], r"\Delta x"),
        ([""], ""),
    ],
)
def test_normal_form(answers, form):
    assert {normal_form(answer) for answer in answers} == {form}


# ---- properties: seeded, and without the shortcut for identical text ---------------------------------

DATA = ROOT.parent / "shared" / "data"
BENCHMARKS, MATH = DATA / "benchmarks", DATA / "math"


def _random_numbers(count: int) -> list[Fraction]:
    rng = random.Random(0)
    return [
        rng.choice((1, -1))
        * Fraction(rng.randrange(1, 10 ** rng.randrange(1, 9)), rng.choice((1, 1, 2, 3, 7, 8, 40, 1000)))
        for _ in range(count)
    ]


def test_an_answer_matches_itself():
    written = {gold for _, golds, *_ in CASES for gold in ([golds] if isinstance(golds, str) else golds)}
    assert len(written) > 150
    assert [a for a in written if answers.text_verdict(a, [a])[0] != "right"] == []


def test_a_reformatted_number_matches_and_a_changed_digit_does_not():
    rng, texts = random.Random(1), 0
    for value in _random_numbers(400):
        for gold in (str(value), bench.reformatted_number(value, rng).removesuffix(".")):
            answer = bench.reformatted_number(value, rng)
            assert bench.by_engine(gold, answer), (gold, answer)
            figure = re.split(r"\\times|(?<=\d)e-", answer)[0]  # another power of ten is no changed digit
            places = [place for place, character in enumerate(figure) if character.isdigit()]
            place = rng.choice(places)
            digit = rng.choice([d for d in "123456789" if d != answer[place]])
            changed = answer[:place] + digit + answer[place + 1 :]
            # 0.500 is 0.5 with any number of zeros, but not with another digit
            assert not bench.by_engine(gold, changed), (gold, changed)
            texts += answer != gold
    assert texts > 700


def test_a_sum_left_open_earns_nothing_and_its_value_does():
    """Terms of both kinds: integers, and -1, decimals, powers, roots; their values by Fraction."""
    cases = list(bench.open_sums(80, 3))
    assert [case for case in cases if bench.by_engine(*case)] == []
    for gold, answer in cases[::10]:
        assert bench.by_engine(gold, bench.reformatted_number(Fraction(gold), random.Random(answer)).rstrip("."))


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not here")
def test_every_gold_of_the_benchmarks_is_right(grader):
    golds = [(boxed(gold), answers) for _, answers in bench.golds_of(BENCHMARKS) for gold in answers]
    assert len(golds) > 1000
    assert [item for item, grade in zip(golds, grader.grade(golds), strict=True) if grade.verdict != "right"] == []


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not here")
def test_reformatted_golds_are_right_and_perturbed_ones_wrong_without_string_equality():
    """Every third gold; bench/grader.py takes them all. `t(0,4]` is no mathematics, and only right as text."""
    golds = [gold for _, answers in bench.golds_of(BENCHMARKS) for gold in answers if gold != "$t(0,4]$"]
    counts, exceptions = bench.reformatted_and_perturbed(golds[::3])
    assert exceptions == []
    assert counts["reformatted right"] >= 300 and counts["perturbed wrong"] >= 300


# ---- answers that are built to be wrong ------------------------------------------------------------


def test_answers_built_to_be_wrong_are_wrong(tmp_path, monkeypatch):
    """1,500 generated answers and every hostile one, in an empty directory; bench/grader.py --fuzz takes 20,000."""
    monkeypatch.chdir(tmp_path)
    golds = [gold for _, gold, *_ in CASES if isinstance(gold, str)]
    cases = list(bench.hostile_and_wrong(golds, 1500, 11, kinds={**bench.KINDS, "hostile": 0}))
    cases += [("hostile", "5", answer) for answer in bench.HOSTILE]
    with Grader(workers=2, time_limit_s=1.0, thinking=False) as grader:
        grades = grader.grade([(rf"\boxed{{{answer}}}", [gold]) for _, gold, answer in cases])
        assert grader.grade([(r"\boxed{1+x}", ["x+1"])])[0].verdict == "right"
    assert bench.false_rights(cases, grades) == []
    failed = [case for case, grade in zip(cases, grades, strict=True) if grade.verdict == "grader failed"]
    assert {case[0] for case in failed} <= {"hostile"}  # what needs more memory than a worker may have
    assert list(tmp_path.iterdir()) == []


def test_hostile_text_does_not_delay_the_caller():
    """What runs outside the workers: linear in the text, whatever it is."""
    started = time.monotonic()
    for answer in bench.HOSTILE:
        normal_form(answer)
        for gold in (
            "5",
            r"12 \text{ cm}",
            "1,2",
            "(1,2)",
            "x<3",
            r"\text{no}",
            "A",
            "y=2x+1",
            r"\begin{pmatrix}1\\2\end{pmatrix}",
        ):
            answers.text_verdict(answer, [gold])
    assert time.monotonic() - started < 10
    assert all(len(normal_form(answer)) <= 2 * answers.MAX_ANSWER_LENGTH for answer in bench.HOSTILE)


def test_answers_settled_by_text_need_no_worker():
    settled = [("5", "x>5"), ("5", "1,2"), (r"2 \text{ cm}", "2 mm"), ("(1,2)", "(1,3)"), ("A", "B"), ("5:00", "6:00")]
    settled += [("5", r"\text{five}"), ("5", r"\{5\}")]
    assert [answers.text_verdict(answer, [gold]) for gold, answer in settled] == [("wrong", [])] * len(settled)
    assert answers.text_verdict("x+1", ["1+x", "5 + x"]) == (None, ["1+x", "5+x"])


def test_number():
    assert number(r"\frac{-1}{2}") == Fraction(-1, 2) and number("+.5") == Fraction(1, 2)
    assert number("50%") == Fraction(1, 2) and number("1,234.50") == Fraction(2469, 2)
    assert number("0." + "0" * 60 + "1") == Fraction(1, 10**61)
    for text in ("", "x", "1/0", "1,23", "2+3", "1_000", "٣", "0x10", "nan", "inf", "1 1"):
        assert number(text) is None


@pytest.mark.skipif(not MATH.is_dir(), reason="the real problems are not here")
def test_real_golds_match_themselves(grader, monkeypatch):
    """All of them as text; one in a hundred of the symbolic ones with that shortcut switched off."""
    golds = [str(row["answer"]) for file in sorted(MATH.glob("*.json")) for row in json.loads(file.read_text())]
    golds = [gold for gold in golds if gold]  # two of them are empty
    assert len(golds) > 8000
    assert all(grade.verdict == "right" for grade in grader.grade([(boxed(gold), [gold]) for gold in golds]))
    monkeypatch.setattr(answers, "same_text", lambda gold, answer: False)
    symbolic = [answers.tidy(gold) for gold in sorted(set(golds)) if number(gold) is None][::100]
    assert [gold for gold in symbolic if not answers.compare(gold, gold, answers.ask_math_verify)] == []
