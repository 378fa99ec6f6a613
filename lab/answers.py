r"""Decide whether two written answers match: by their text where possible, else by math-verify in a worker process.

The policy:
  1. Plain numbers are compared exactly, as fractions: 142.0 is 142, 0.333 is not 1/3. A percentage
     matches both of its readings: 50% is 0.5 and is 50. Text that is the same once tidied is right.
  2. Where the gold is a plain number (or such an entry of a list, tuple, interval or matrix), a sum,
     difference or product of rational values, anywhere in the answer, leaves the work to the grader and
     is wrong; an unreduced fraction, a power, root, factorial or binomial may match. Against a closed form
     a decimal needs its first six figures.
  3. A list, a set, `or`, `and`, `;`, \pm never earn a single value. A list matches in any order, each entry
     as often as in the gold; a set without repetition; tuples, intervals, matrices entry by entry. A bare
     list may stand for a tuple. `100,200` is one number, `100, 200` is two.
  4. `x = 3` is 3, so is `3 = x`; `2x = 6` is not. Sides that are numbers must be equal: `2+3=5` is 5, `4=5`
     nothing; `1/3 \approx 0.33` is 1/3, `5 \approx 6` nothing. One equation is another if it is a multiple of
     it, or gives its value under another name.
  5. `x<3` is `(-\infty,3)`, whatever the variable; an inequality earns no number.
  6. A unit, a degree sign, a base (`52_8`) may be left out on either side; two that differ are wrong, and
     none is converted. A bare letter in the gold (`2t`) is a variable.
  7. Words (of two letters or more) match as text, in any case. A choice (`A`) may stand in parentheses and
     be followed by its text. What has a colon (05:00, 1:2) matches part by part.
  8. math-verify (0.9, gold first) decides everything else, in a worker process that runs under a memory
     limit, and is killed and replaced when it is late: a hard answer costs its own verdict, never the run.
     No answer is evaluated as code. Guards prevent what it would do: fold upper case, take small numbers for 0,
     2(3) and 5 6 for mixed numbers, y' for y, gamma for a function, the letters of a word for factors.

A worker runs this file as a program, `python -P lab/answers.py BYTES SECONDS`: a JSON line in, a JSON line out.
engine/grader.py owns the workers.
"""

import cmath
import gc
import itertools
import json
import logging
import os
import re
import signal
import sys
import zlib
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache

MAX_NUMBER_LENGTH = 400  # characters of a plain number; also bounds its power of ten
MAX_ANSWER_LENGTH = 2000  # characters of an answer that is looked at
MAX_DEPTH = 50  # of its brackets
MAX_COMPARISONS = 2000  # of entries outside a worker, which no clock limits


# ---------------------------------------------------------------------------------------------
# Written arithmetic of plain numbers

# All quantifiers are possessive: each character is read once, whatever a model writes.
OPERAND = r"[-−]?+\\?+\$?+(?:[0-9]++(?:,[0-9]{3}(?![0-9]))*+(?:\.[0-9]++)?+|\.[0-9]++)"
OPERATOR = r"(?:[-−+*/×÷·]|\\times|\\cdot|\\div|x(?=[ \t]*+[$0-9]))"
SIDE = re.compile(rf"{OPERAND}(?:[ \t]*+{OPERATOR}[ \t]*+{OPERAND})*+")
OPERAND, OPERATOR, SPACES = re.compile(OPERAND), re.compile(OPERATOR), re.compile(r"[ \t]*+")
PLAIN_OPERATOR = {"−": "-", "×": "*", "x": "*", "·": "*", r"\times": "*", r"\cdot": "*", "÷": "/", r"\div": "/"}


def evaluate(side: str) -> Fraction | None:
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


# ---------------------------------------------------------------------------------------------
# Tidying, and plain numbers

DECIMAL = r"(?:(?:[1-9]\d{0,2}(?:[, ]\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<decimal>{DECIMAL})(?:\s*(?:\\times|\\cdot|×)\s*10\^(?P<power>\d|\{{[-+]?\d+\}}))?"
    rf"|(?:(?P<whole>\d+)\s*)?\\frac\s*(?:\{{(?P<a>-?{DECIMAL})\}}|(?P<a1>\d))\s*(?:\{{(?P<b>-?{DECIMAL})\}}|(?P<b1>\d))"
    rf"|(?:(?P<whole2>\d+)\s+)?(?P<a2>{DECIMAL})\s*/\s*(?P<b2>{DECIMAL}))\s*(?P<percent>\\?%)?",
    re.ASCII,
)
TEXT = re.compile(
    r"\\(?:(?:text|math)(?:rm|bf|it|sf|tt|normal)?|operatorname|mbox|boldsymbol|bm|bold|underline)\s*\{\s*([^{}]*?)\s*\}"
)
SIGNS = {"lt": "<", "gt": ">", "vert": "|", "lvert": "|", "rvert": "|", "langle": "(", "rangle": ")", "colon": ":"}
TIDY = [
    (re.compile(pattern, re.ASCII), replacement)
    for pattern, replacement in (
        (r",\s*\\!\s*(?=\d)", ","),  # `11,\! 111`
        (r"\\(?:[lL]arge|LARGE|huge|small)(?![A-Za-z])|[€£]|\\\\\s*$", ""),
        (r"\\textnormal(?![A-Za-z])", r"\\text"),
        (r"\\\\\s*\[\d+(?:pt|mm|em|ex)\]", r"\\\\"),
        (r"\b([aApP])\. ?[mM]\.", r"\1m"),
        (r"\\?\$|(?<!\\)\\!|\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])", ""),
        (r"\{,\}", ","),
        (r"(?<=\d),(?:\s|\\[,;: ])+(?=\d)", ";"),  # `100, 200` is a list, `100,200` a number
        (r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s)+", " "),
        (r"\\[dtc](frac|binom)", r"\\\1"),
        (r"−", "-"),
        (r"^\s*\\[(\[]|\\[)\]]\s*$|^\s*\\(?:approx|simeq)(?![A-Za-z])", ""),
        (r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])", "°"),
        (r"\^ ?(?:\\prime(?![A-Za-z])|\{ ?\\prime ?\})", "'"),
        (r"\^ ?\{ ?\\prime ?\\prime ?\}", "''"),
        (r"(?:\\(?:leqslant|leq|le)(?![A-Za-z])|<=|≤) ?", r"\\le "),
        (r"(?:\\(?:geqslant|geq|ge)(?![A-Za-z])|>=|≥) ?", r"\\ge "),
        (r"(?:\\(?:neq|ne|not ?=)(?![A-Za-z])|!=|≠) ?", r"\\ne "),
        (r"\\(lt|gt|vert|lvert|rvert|langle|rangle|colon)(?![A-Za-z])", lambda name: SIGNS[name[1]]),
        (r"\\varnothing(?![A-Za-z])|\\\{ ?\\\}", r"\\emptyset"),
        (r" ?(?:\\text ?\{ ?percent ?\}|\bpercent\b)", r"\\%"),
        (r"(?<![\w}]) | (?![\w\\])|(?<=[\w})\]%°])\.\s*$", ""),
        (r"^([-+]?[0-9.]+)[eE]([-+]?[0-9]{1,3})$", r"\1 \\times 10^{\2}"),
    )
]


def tidy(text: str) -> str:
    """The same answer with its typesetting removed: math delimiters, spacing, sized brackets, synonyms."""
    for pattern, replacement in TIDY:
        text = pattern.sub(replacement, text)
    return text.strip()


def _figure(text: str) -> tuple[Fraction, bool] | None:
    """The figure of a plain number as written, and whether a percent sign follows it."""
    text = tidy(text) if len(text) <= MAX_NUMBER_LENGTH else ""
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


def normal_form(answer: str) -> str:
    r"""The form on which a majority vote counts answers; two that differ may still be equal.

    Of a plain number its exact fraction (`0.5`, `\frac12` and `50\%` are `1/2`); of anything else the tidied
    text, out of \text{}, words in lower case, cut at MAX_ANSWER_LENGTH. Linear time, no worker.
    """
    text = tidy(answer[:MAX_ANSWER_LENGTH])
    value = number(text)
    if value is not None:
        return str(value)
    return re.sub(r"(?<![A-Za-z\\])[A-Za-z]{2,}", lambda word: word[0].casefold(), TEXT.sub(r"\1", text)).strip()


def _too_complex(answer: str) -> bool:
    if len(answer) > MAX_ANSWER_LENGTH:
        return True
    depth = itertools.accumulate((c in "{[(") - (c in "}])") for c in answer)
    return max(depth, default=0) > MAX_DEPTH


# ---------------------------------------------------------------------------------------------
# The structure of a tidy answer, read from its text: lists, equations, units, words

BRACKETS = r"(?P<open>\\\{|[({\[]|\\begin(?=\{))|(?P<close>\\\}|[)}\]]|\\end(?=\{))|\\[A-Za-z]+|\\."
AND_OR = (
    r"(?:\\(?:text|mathrm)\{[ ,]*(?:and|or)[ ,]*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\(?:lor|land|vee|wedge)\b)"
)
LIST, EQUALS, APPROXIMATES, RELATION, COLON, PLUS_MINUS, CELL, NOTHING = (
    re.compile(rf"(?P<cut>{cut})|{BRACKETS}", re.DOTALL)
    for cut in (
        rf"[,; ]*{AND_OR}[,; ]*|[,;]|\\text\{{[,;]\}}",
        r"(?<![<>!:])[:&]?=|\\in(?![A-Za-z])",
        r"\\(?:approx|simeq)(?![A-Za-z])|≈",
        r"<|>|\\(?:le|ge|ne|notin)(?![A-Za-z])",
        ":",
        r"\\(?:pm|mp)(?![A-Za-z])|±",
        r"&|\\\\",
        r"(?!)",
    )
)
THOUSANDS = re.compile(r"(?<![\d.,_^])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])", re.ASCII)
MATRIX = re.compile(r"[(\[]?\\begin\{([pb]?(?:small)?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}[)\]]?", re.DOTALL)
SET_LIKE = re.compile(r"\\(?:infty|cup|cap|mathbb|emptyset|setminus)(?![A-Za-z])|^[(\[].*,.*[)\]]$")

FUNCTION = (
    r"(?:sqrt|frac|binom|sin|cos|tan|cot|sec|csc|arc\w+|log|ln|lg|exp|sum|prod|int|lim|max|min|gcd|pi|lfloor|lceil)"
)
NAME = re.compile(
    r"(?:\\(?:text|mathrm|operatorname|bar|vec|hat|overline|dot|ddot|mathbf|angle|triangle) ?(?:\{[^{}]*\}|[A-Z ]+)"
    rf"|\\(?!{FUNCTION}\b)[A-Za-z]+|[A-Za-z]+|\\frac\{{d[^{{}}]*\}}\{{d[^{{}}]*\}})'*(?:_(?:\w|\{{[^{{}}]*\}}))?'*"
    r"(?:\^\{-1\})? ?(?:\([^()=]*\))?"
)
SYMBOL = re.compile(
    rf"\\(?:{FUNCTION}|cdot|times|div|infty|circ)(?![A-Za-z])|(\\[A-Za-z]+|[A-Za-z](?:_\w|_\{{[^{{}}]*\}})?)"
)
CHOICE = re.compile(r"(?:(?i:option|choice|answer):? ?)?\(?([A-J])(?:\)|\.|:|$)[).:]* *(.*)", re.DOTALL)
OTHER_CHOICE = re.compile(r"(?<![A-Za-z\\])[A-H](?![A-Za-z])")

# Different names of a unit, not different units.
UNITS = """m meter metre|cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre|in inch inche|
ft foot feet|yd yard|mi mile|g gram|mg|kg kilogram|lb pound|oz ounce|s sec second|min minute|h hr hour|day|week|month|
yr year|L l liter litre|mL ml|Hz hertz|kHz|MHz|J joule|kJ|cal|kcal|eV|keV|MeV|GeV|N newton|Pa pascal|kPa|atm|W watt|
kW|V volt|A amp|K kelvin|mol mole|rad radian|° deg degree|'' arcsec arcsecond|' arcmin|mph|th st nd rd|sq square|
cu cubic|erg|pc|nm|C|F|per"""
UNITS = {name: unit.split()[0] for unit in UNITS.replace("\n", " ").split("|") for name in unit.split()}
NO_UNIT = frozenset(
    """hundred thousand million billion trillion quadrillion quintillion dozen half halve third quarter tenth hundredth
    thousandth one two three four five six seven eight nine ten zero plus minus times over log ln factorial infinity
    pi sqrt squared cubed more less or and not no k i e x y z n""".split()
)
UNIT_ATOM = (
    r"(?:\\(?:text|mathrm|mathit|textbf|textit|mbox)\{[^{}]*\}|°|''?|[A-Za-zµΩÅ]++)(?:\^(?:\{-?\d\}|-?\d)|[²³])?"
)
UNIT = re.compile(rf" ?(?:{UNIT_ATOM}(?: ?/ ?| ?\\cdot ?| )?)*+(?<=.)")
BASE = re.compile(r"(-?[0-9A-F.]+)(?:_(\d)|_\{(\d+)\}| ?\\text\{\(?base ?(\d+)\)?\})")
MAX_UNIT_LENGTH = 100
MOST_ROUNDING = Fraction(1, 10)  # relative, of `a \\approx b`


def _split(text: str, cuts: re.Pattern) -> list[str]:
    """The parts between the separators that stand in no bracket."""
    parts, start, depth = [], 0, 0
    for token in cuts.finditer(text):
        if token["open"]:
            depth += 1
        elif token["close"]:
            depth -= 1
        elif token["cut"] and depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]


def _inside(text: str) -> tuple[str, str]:
    r"""The brackets around the whole text ("()", "[)", "\{\}") and what they enclose; ("", text) if there are none."""
    depth, first = 0, None
    for token in NOTHING.finditer(text):
        first = first or token
        depth += bool(token["open"]) - bool(token["close"])
        if depth <= 0:
            if first.start() == 0 and first["open"] and token.end() == len(text) and token["close"] != r"\end":
                return first[0] + token[0], text[first.end() : token.start()].strip()
            break
    return "", text


def _unwrapped(text: str) -> str:
    r"""A value out of its parentheses or braces, a number out of \text{}."""
    pair, content = _inside(text)
    boxed = TEXT.fullmatch(text)
    return content if pair in ("()", "{}") else boxed[1] if boxed and not boxed[1][:1].isalpha() else text


def _entries(text: str) -> tuple[str, list[str]]:
    r"""The kind of a collection ("list", "set", "[)", "matrix 2x2") and its entries; ("", [text]) of one value."""
    matrix = MATRIX.fullmatch(_split(text, EQUALS)[-1])
    if matrix:
        rows = [_split(row, CELL) for row in re.split(r"\\\\", matrix[2].strip().removesuffix(r"\\"))]
        return "matrix " + "x".join(str(len(row)) for row in rows), [cell for row in rows for cell in row]
    pair, content = _inside(_split(text, EQUALS)[-1])
    kind, parts = "list", _split(text, LIST)
    if len(parts) == 1:
        entries = _split(content, LIST)
        if pair == r"\{\}" and not re.search(r"[:|]|\\mid", content):
            kind, parts = "set", entries
        elif pair == "[]" or (pair in ("()", "(]", "[)") and len(entries) > 1):
            return pair, entries
    for place, terms in reversed([(i, _split(part, PLUS_MINUS)) for i, part in enumerate(parts)]):
        if len(terms) == 2:
            parts[place : place + 1] = [(terms[0] + "+" + terms[1]).removeprefix("+"), terms[0] + "-" + terms[1]]
    return (kind, parts) if kind == "set" or len(parts) > 1 else ("", [text])


def _without_separators(text: str) -> str:
    """Thousands without commas, but not in brackets, where a comma separates."""
    return text if re.search(r"[(\[]|\\\{", text) else THOUSANDS.sub(lambda n: n[0].replace(",", ""), text)


def _before_approximation(text: str) -> str:
    r"""What is said to be near something: 1/3 of `1/3 \approx 0.33`, 5 of `x \approx 5`; nothing of `5 \approx 6`."""
    parts = _split(text, APPROXIMATES)
    first, last = parts[0], parts[-1]
    figures = _figure(first), _figure(last)
    if None not in figures and abs(figures[0][0] - figures[1][0]) > MOST_ROUNDING * abs(figures[0][0]):
        return ""
    return last if NAME.fullmatch(first) else first


def _phrase(text: str) -> tuple[str, bool] | None:
    r"""The casefolded words of an answer, and whether they are in \text{}; None if it is no word of two letters."""
    bare, in_text = TEXT.sub(r"\1", text).strip(), TEXT.fullmatch(text) is not None
    if not (re.fullmatch(r"[A-Za-z]++(?:[ ']+[A-Za-z]++|-[A-Za-z]{3,}+)*+", bare) or (in_text and bare[:1].isalpha())):
        return None
    has_word = re.search(r"[A-Za-z]{2}", re.sub(AND_OR, "", bare))
    return (" ".join(re.findall(r"\w+", bare.casefold())), in_text) if has_word else None


def _choice(text: str) -> str | None:
    """The letter of a multiple-choice answer, alone or before its text."""
    match = CHOICE.fullmatch(TEXT.sub(r"\1", text).replace("{", "").replace("}", "").strip())
    return match[1] if match and not OTHER_CHOICE.search(match[2]) else None


def _unit_name(text: str) -> str | None:
    """One spelling for a unit, `m s^-1` for `meters/second`; None if the words are none."""
    text = re.sub(r"[{}()]", "", TEXT.sub(r" \1 ", text).replace(r"\cdot", " ")).replace("²", "^2").replace("³", "^3")
    words = [
        UNITS.get(word) or UNITS.get(word.casefold().removesuffix("s")) or word.casefold().removesuffix("s")
        for word in re.findall(r"[A-Za-zµΩÅ]+|''?|°|\^ ?-? ?\d+|/|[^\s]", text)
    ]
    if not words or NO_UNIT.intersection(words) or not all(re.fullmatch(r"[\wµΩÅ°'/]+|\^.*", word) for word in words):
        return None
    name = re.sub(r" (?=\^)|° (?=[CF]\b)", "", " ".join(words))
    name = re.sub(r"\b(sq|cu) (\w+)", lambda m: f"{m[2]}^{2 if m[1] == 'sq' else 3}", name)
    return re.sub(r"(?:/|\bper\b) (\w+)(?:\^(\d))?", lambda m: f"{m[1]}^-{m[2] or 1}", name)


def _unit(text: str, one_letter: bool) -> tuple[str, str | None]:
    r"""A value and its unit or base, None if none is stated.

    Outside \text{} a unit is only read after a plain number, and a single letter only where `one_letter` allows it.
    """
    if base := BASE.fullmatch(text):
        return base[1], "base " + (base[2] or base[3] or base[4])
    for start in range(max(1, len(text) - MAX_UNIT_LENGTH), len(text)):
        before = text[start - 1]
        if before in " \\" or (before.isalpha() and text[start].isalpha()) or not UNIT.fullmatch(text, start):
            continue
        value, tail = text[:start], text[start:]
        if "°" in tail and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", value):
            return text, None  # the function's argument, not its unit
        words = re.findall(r"[A-Za-zµΩÅ]+", TEXT.sub("", tail))
        is_unit = _figure(value) is not None and all(
            (len(w) > 1 or one_letter) if w in UNITS else (len(w) > 2 and tail[0] == " ") for w in words
        )
        if not words or is_unit or (len(words) == 1 and words[0] in "CF" and "°" in tail):
            name = _unit_name(tail)
            return (value, name) if name else (text, None)
    return text, None


# ---------------------------------------------------------------------------------------------
# The comparison. Text settles what it can; what is left raises _Undecided, or goes to math-verify in a worker.


class _Undecided(Exception):
    """The texts alone do not tell."""


def same_text(gold: str, answer: str) -> bool:
    """Whether two tidy answers are the same text."""
    return bool(answer) and TEXT.sub(r"\1", gold) == TEXT.sub(r"\1", answer)


def compare(gold: str, answer: str, engine) -> bool:
    """Whether the tidy `answer` is the tidy `gold`. `engine`: ask_math_verify or _undecided."""
    if same_text(gold, answer):
        return True
    if letter := _choice(gold):
        return _choice(answer) == letter
    figures = _figure(gold), _figure(answer)
    if None not in figures:  # 50% is 50 and 0.5
        return figures[0][0] == figures[1][0] or number(gold) == number(answer)
    phrases = _phrase(gold), _phrase(answer)
    if None not in phrases:
        return phrases[0][0] == phrases[1][0]
    if any(phrase and phrase[1] for phrase in phrases):
        return False
    related = [len(_split(text, RELATION)) > 1 for text in (gold, answer)]
    if any(related):
        is_set = [r or bool(SET_LIKE.search(text)) for r, text in zip(related, (gold, answer), strict=True)]
        return all(is_set) and engine("relation", gold, answer)
    gold, answer = _without_separators(gold), _without_separators(answer)
    (gold_kind, golds), (kind, answers) = _entries(gold), _entries(answer)
    if gold_kind or kind:
        if gold_kind != kind and SET_LIKE.search(gold) and SET_LIKE.search(answer) and "\\" in gold + answer:
            return engine("value", gold, answer)  # unions, \mathbb{R}
        return bool(gold_kind and kind) and _match_entries(gold_kind, golds, kind, answers, engine)
    gold, answer = _before_approximation(gold), _before_approximation(answer)
    gold_sides, sides = _split(gold, EQUALS), _split(answer, EQUALS)
    if len(gold_sides) > 1 or len(sides) > 1:
        return _match_sides(gold_sides, sides, engine)
    if len(_split(gold, COLON)) > 1 or len(_split(answer, COLON)) > 1:
        golds, answers = _split(gold, COLON), _split(answer, COLON)
        return len(golds) == len(answers) and all(compare(g, a, engine) for g, a in zip(golds, answers, strict=True))
    gold_value, gold_unit = _unit(gold, one_letter=False)
    value, unit = _unit(answer, one_letter=_figure(gold_value) is not None)
    if gold_unit and unit and gold_unit != unit:
        return False
    gold_value, value = _unwrapped(gold_value), _unwrapped(value)
    if (gold_value, value) != (gold, answer):
        return compare(gold_value, value, engine)
    return bool(value) and engine("value", gold, answer)


def _match_entries(gold_kind: str, golds: list[str], kind: str, answers: list[str], engine) -> bool:
    """Whether the entries of two collections match, in order unless the gold is a list or a set."""

    def is_among(text, others):
        return any(compare(text, other, engine) for other in others)

    if gold_kind == kind == "set":
        return all(is_among(g, answers) for g in golds) and all(is_among(a, golds) for a in answers)
    if len(golds) != len(answers):
        return False
    names = [
        [sides[0] if len(sides) == 2 else "" for sides in (_split(e, EQUALS) for e in es)] for es in (golds, answers)
    ]
    by_name = all(names[0]) and len({*names[0]}) == len(golds)  # x=1, y=2 is not 2, 1
    if gold_kind not in ("list", "set") or (by_name and not any(names[1])):
        kinds = {"()": ("()", "list"), "list": ("list", "()")}.get(gold_kind, (gold_kind,))
        return kind in kinds and all(compare(g, a, engine) for g, a in zip(golds, answers, strict=True))
    if kind not in ("list", "set") + (("()", "[]") if gold_kind == "list" else ()):
        return False
    left = list(zip(answers, names[1], strict=True))
    for gold, gold_name in zip(golds, names[0], strict=True):
        same = [(a, n) for a, n in left if not (by_name and n and n != gold_name)]
        found = next((pair for pair in same if compare(gold, pair[0], engine)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _match_sides(gold_sides: list[str], sides: list[str], engine) -> bool:
    """Whether equations match, or an equation and a value."""

    def symbols(side):
        return set(SYMBOL.findall(TEXT.sub(" ab ", side))) - {""}

    if len(sides) > 1:
        if not symbols(sides[0]) and NAME.fullmatch(sides[-1]):
            sides = [sides[-1], *sides[:-1]]  # 5 = x
        *others, value = [_unit(side, one_letter=True)[0] for side in sides]
        if any(not symbols(side) and not _is_true(side, value, engine) for side in others):
            return False
        if len(gold_sides) == 1:
            named = NAME.fullmatch(sides[0]) or len(symbols(sides[0])) != 1  # 2x = 6 is no 6
            return bool(named) and compare(gold_sides[0], sides[-1], engine)
    gold_named = NAME.fullmatch(gold_sides[0]) is not None
    if len(sides) == 1 and all(_figure(side) for side in gold_sides):  # 0.56 = 56%
        return any(compare(side, sides[0], engine) for side in gold_sides)
    if len(sides) == 1:
        return gold_named and compare(gold_sides[-1], sides[0], engine)
    if _phrase(gold_sides[-1]) and _phrase(sides[-1]):  # MR = SRMC, where no letter is a factor
        phrases = [[_phrase(side) or ("", False) for side in equation] for equation in (gold_sides, sides)]
        return sorted(phrases[0]) == sorted(phrases[1])
    if gold_named and NAME.fullmatch(sides[0]) and compare(gold_sides[-1], sides[-1], engine):
        return True
    return engine("equation", "=".join(gold_sides[:: len(gold_sides) - 1]), "=".join(sides[:: len(sides) - 1]))


def _is_true(side: str, value: str, engine) -> bool:
    """Whether two sides without a variable are equal: `2+3` and 5 are."""
    if side == value:
        return True
    if SIDE.fullmatch(side) and SIDE.fullmatch(value):
        left = evaluate(side)
        return left is not None and left == evaluate(value)
    # the plain one second: against a plain gold a sum earns nothing
    return engine("sides", *sorted((side, value), key=lambda text: _figure(text) is not None))


def _undecided(question: str, gold: str, answer: str) -> bool:
    raise _Undecided


def _comparisons(gold: str, answer: str) -> int:
    """A bound on the comparisons of entries: every entry with every other, doubled by every set around them."""
    if len(gold) > MAX_ANSWER_LENGTH or len(re.findall(r"[({\[]", gold)) > 4 * MAX_DEPTH:
        return MAX_COMPARISONS + 1
    entries = [1 + len(re.findall(r"[,;&]|\\\\|and|or|\\\{", text)) for text in (gold, answer)]
    return entries[0] * entries[1] << min(30, gold.count(r"\{"), answer.count(r"\{"))


def text_verdict(answer: str, golds: Sequence[str]) -> tuple[str | None, list[str]]:
    """The verdict if it needs no worker, else None with the golds that are left to compare."""
    if _too_complex(answer):
        return "wrong", []
    answer, left = tidy(answer), []
    for gold in map(tidy, golds):
        if _comparisons(gold, answer) > MAX_COMPARISONS:
            left.append(gold)
            continue
        try:
            if answer and compare(gold, answer, _undecided):
                return "right", []
        except (_Undecided, RecursionError):
            left.append(gold)
    return (None, left) if left else ("wrong", [])


# ---------------------------------------------------------------------------------------------
# The worker: math-verify, with a guard around each of its known faults

RELATIVE_TOLERANCE = 2e-6  # of decimals against closed forms: 0.333333 is 1/3 to six figures


def _repeating(match: re.Match) -> str:
    whole, start, cycle = match.groups()
    above = int(whole + start + cycle) - int(whole + start or "0")
    return rf"\frac{{{above}}}{{{'9' * len(cycle)}{'0' * len(start)}}}"


# What its grammar misreads or does not know, in words that it does.
READABLE = [
    (re.compile(pattern, re.ASCII), replacement)
    for pattern, replacement in (
        (r";", ","),  # tidied apart from a thousands separator; here it separates the ends of an interval
        (r"°", r"^\\circ "),
        (r"\\frac ?(\\[A-Za-z]+) ?(\d)", r"\\frac{\1}{\2}"),
        (r"(?:\*\*|\^) ?(-?(?:\d+|[A-Za-z]))", r"^{\1}"),  # 2^10 and 2**10 are typed for 2^{10}
        (r"\\binom ?(\d) ?(\d)", r"\\binom{\1}{\2}"),
        (r"(?<=[A-Za-z])'+", lambda primes: "_{" + "p" * len(primes[0]) + "}"),
        (r"\\gamma(?![A-Za-z])", r"\\mho "),
        (r"(?<![A-Za-z\\])[eE](?=_)", lambda e: r"\eth" if e[0] == "e" else r"\Finv"),
        (r"_(?:\\([A-Za-z]+)|\{ ?\\([A-Za-z]+) ?\})", lambda name: "_{" + (name[1] or name[2]) + "}"),
        (
            r"(\\(?:alpha|beta|delta|epsilon|eta|theta|lambda|mho|mu|rho|sigma|tau|phi|omega)) ?\((?=[^()]*[-+])",
            r"\1\\cdot (",
        ),
        (r"\)\(|(?<![_^\d])(\d+)\(", lambda found: (found[1] or ")") + r"\cdot ("),
        (r"(\d*)\.(\d*)\\overline\{(\d+)\}", _repeating),
    )
]


@lru_cache(maxsize=4096)  # the rollouts of a group share their gold, and many an answer
def _read(text: str):
    """The sympy object that math-verify's parser makes of LaTeX, decimals as fractions; None if it cannot."""
    import sympy
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    if re.search(r"(?<![_^\d])\d+\s+\d|!!|\d_", text):  # it would add the numbers, take 3!! for (3!)!, drop the index
        return None
    for pattern, replacement in READABLE:
        text = pattern.sub(replacement, text)
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    case_matters = ConversionConfig(lowercase_symbols=False)
    try:
        text = normalize_latex(text, rules)
        value = latex2sympy(
            text, is_real=True, convert_degrees=True, normalization_config=None, conversion_config=case_matters
        )
    except MemoryError:
        raise
    except Exception:  # the parser raises that very class
        return None
    if not isinstance(value, sympy.Basic | sympy.MatrixBase):
        return None
    exact = {f: sympy.Rational(str(f)) for f in value.atoms(sympy.Float) if f.is_finite}
    value = value.xreplace(exact)
    i = sympy.Symbol("i", real=True)  # the imaginary unit, unless it counts the terms of a sum
    return value.xreplace({i: sympy.I}) if i in value.free_symbols else value


def _is_arithmetic(value) -> bool:
    """Whether a sum, difference or product of rational values is anywhere left to be worked out."""
    import sympy

    if isinstance(value, sympy.Sum | sympy.Product | sympy.Integral | sympy.Limit | sympy.Derivative):
        return True
    if isinstance(value, sympy.Add | sympy.Mul) and not value.has(sympy.UnevaluatedExpr):  # that is a percent sign
        terms = [arg for arg in value.args if arg != -1 and not (value.is_Mul and arg.is_Pow and arg.exp == -1)]
        rational = [term for term in terms if term.doit().is_rational]
        power_of_ten = len(terms) == 2 and value.is_Mul and any(t.is_Pow and t.base == 10 for t in terms)
        if len(rational) > 1 and not (power_of_ten and any(t.is_Rational for t in terms)):
            return True
        if len(terms) > 1 and not rational and value.doit().is_rational:
            return True
    return any(_is_arithmetic(arg) for arg in value.args)


def _sample(value, seed: int) -> complex | None:
    """The value where every variable, function and derivative is some number; None if that is none."""
    import sympy
    from sympy.core.function import AppliedUndef

    if value.has(sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit):
        return None
    unknowns = value.atoms(AppliedUndef, sympy.Derivative) | value.free_symbols
    point = {u: sympy.Rational(zlib.crc32(f"{seed} {u}".encode()) % 9973 + 5000, 7919) for u in unknowns}
    try:
        sampled = complex(value.replace(sympy.UnevaluatedExpr, lambda inner: inner).xreplace(point).evalf(25))
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        return None
    return sampled if cmath.isfinite(sampled) else None


def _is_value(gold: str, answer: str) -> bool:
    """Whether one value is the other. Not symmetric: the gold decides the form."""
    import sympy
    from math_verify import verify

    gold_value, value = _read(gold), _read(answer)
    if not _is_readable(gold):
        raise ValueError(f"the gold {gold} cannot be read")  # no answer's fault
    if value is None:
        return False
    if _figure(gold) is not None and (not isinstance(value, sympy.Expr) or value.free_symbols or _is_arithmetic(value)):
        return False
    if isinstance(gold_value, sympy.Expr) and isinstance(value, sympy.Expr):
        # math-verify rounds to six decimals, where all small numbers are 0. A percent sign has two readings.
        decimal = bool(re.search(r"\.\d|%", gold + answer)) and not gold_value.free_symbols | value.free_symbols
        scales = (1, 100, 0.01) if "%" in gold + answer else (1,)
        a, b = _sample(gold_value, 0), _sample(value, 0)
        if a is not None and b is not None:
            tolerance = RELATIVE_TOLERANCE if decimal else 1e-9
            close = any(abs(a - b * s) <= tolerance * max(abs(a), abs(b * s)) for s in scales)
            if decimal or not close:
                return close
        gold_value, value = gold_value.doit(), value.doit()  # large integers are compared exactly then
    return verify(gold_value, value, timeout_seconds=None, raise_on_error=True)


def _is_readable(text: str) -> bool:
    """Whether a value can be read, and is one."""
    import sympy

    value = _read(text)
    return value is not None and not value.has(sympy.zoo, sympy.nan)


def _are_equal(side: str, value: str) -> bool:
    """Whether two sides of an answer are one value; neither is a gold."""
    return _is_readable(side) and _is_readable(value) and _is_value(side, value)


def _is_equation(gold: str, answer: str) -> bool:
    """Whether the difference of the sides of one equation is a constant times that of the other."""
    import sympy

    sides = [_read(side) for text in (gold, answer) for side in _split(text, EQUALS)]
    if None in sides[:2]:
        raise ValueError(f"the gold {gold} cannot be read")
    if len(sides) != 4 or not all(isinstance(side, sympy.Expr) for side in sides):
        return False
    differences = sides[0] - sides[1], sides[2] - sides[3]
    a, b, c, d = (_sample(value, seed) for seed in (0, 1) for value in differences)
    if None not in (a, b, c, d) and abs(a * d - b * c) > 1e-9 * abs(a * d):
        return False
    ratio = sympy.simplify(differences[0] / differences[1])
    return bool(ratio.is_number and ratio.is_finite and ratio.is_zero is False)


def _is_relation(gold: str, answer: str) -> bool:
    """Whether two inequalities, or an inequality and a set, hold for the same; a single variable may have any name."""
    import sympy
    from math_verify import verify

    def as_set(text):
        parts = _split(text, LIST)
        if len(parts) > 1:
            sets = [as_set(part) for part in parts]
            combine = sympy.Intersection if re.search(r"and\b|\\land|\\wedge", text) else sympy.Union
            return combine(*sets) if all(isinstance(s, sympy.Set) for s in sets) else None
        value = _read(_split(text, EQUALS)[-1])
        names = () if value is None else value.free_symbols
        if isinstance(value, sympy.logic.boolalg.Boolean) and len(names) == 1:
            parts = value._unsorted_args if isinstance(value, sympy.And) else [value]
            return sympy.Intersection(*(part.as_set() for part in parts))
        return value

    sets = as_set(gold), as_set(answer)
    if sets[0] is None:
        raise ValueError(f"the gold {gold} cannot be read")
    return sets[1] is not None and verify(*sets, timeout_seconds=None, raise_on_error=True)


def ask_math_verify(question: str, gold: str, answer: str) -> bool:
    """An engine for `compare`: what the texts leave open, decided by math-verify in this process."""
    return {"value": _is_value, "sides": _are_equal, "equation": _is_equation, "relation": _is_relation}[question](
        gold, answer
    )


def work(memory_limit_bytes: int, time_limit_s: float) -> None:
    """The worker's life: read {"id", "golds", "answer"}, write {"id", "right"}, until stdin ends."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    with suppress(ValueError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    replies = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # the parser prints its complaints on stdout
    logging.disable()
    _read(r"\frac{1}{2}x")  # compiles the grammar, so that the first answer does not pay for it
    gc.freeze()  # sympy's objects are many and stay
    gc.set_threshold(100_000, 50, 50)
    print(json.dumps({"ready": True}), file=replies)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # from here on an error is a verdict

    for line in sys.stdin:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, time_limit_s + 1)  # ends this process should the parent be gone
        right, errors = False, 0
        for gold in job["golds"]:
            try:
                right = right or compare(gold, job["answer"], ask_math_verify)
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
            except (
                MemoryError
            ):  # the answer's own doing, as being late is; what is left of this process is not to be used
                print(json.dumps({"id": job["id"], "exceeded": True}), file=replies)
                return
        signal.setitimer(signal.ITIMER_REAL, 0)
        failed = errors and not right
        print(json.dumps({"id": job["id"], "right": None if failed else right}), file=replies)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    work(int(sys.argv[1]), float(sys.argv[2]))
