r"""Decide whether two written answers match: by their text where possible, else by math-verify.

The policy:
  1. Plain numbers are compared exactly, as fractions: 142.0 is 142, 0.333 is not 1/3. A percentage
     matches both of its readings: 50% is 0.5 and is 50. Text that is the same once tidied is right.
  2. Where the gold is a plain number (or such an entry of a list, tuple, interval or matrix), a sum,
     difference or product of rational values, anywhere in the answer, leaves the work to the grader and
     is wrong; an unreduced fraction, a power, root, factorial or binomial may match. Against a closed form
     a decimal needs its first six figures, against a fraction that no decimal equals its first twelve.
  3. A list, a set, `or`, `and`, `;`, \pm never earn a single value. A list or set matches in any order, each
     entry as often as in the gold; tuples, intervals, matrices, and what has a colon (05:00, 1:2), entry by
     entry. A bare list may stand for a tuple. `100,200` is one number, `100, 200` is two.
  4. `x = 3` is 3, so is `3 = x`; `2x = 6` is not. Sides that are numbers must be equal: `2+3=5` is 5, `4=5`
     nothing; `1/3 \approx 0.33` is 1/3, `5 \approx 6` nothing. One equation is another if it is a multiple of
     it, or gives its value under another name.
  5. `x<3` is `(-\infty,3)` and `\{x \mid x<3\}`, whatever the variable; an inequality earns no number.
  6. A unit, a currency or degree sign, a base (`52_8`) may be left out on either side. Where both state one it
     must be the same word, in any case and number; none is converted (cm is not centimeters). A bare letter is a
     variable.
  7. Words (of two letters or more) match as text, in any case. A choice (`A`) may be followed by its text.
  8. What is typed counts as what it stands for: `pi/2`, `sqrt(2)`, `2^10`, `exp(1)`, `x²`, `√2`. But a box has
     braces: `\boxed 5` holds no answer, because TeX would box one digit of `\boxed 55`.
  9. What is left, math-verify (0.9) reads; expressions are equal if they are at eight random points, to twenty
     figures, and rational numbers exactly. Guards prevent what its parser would do: fold upper case, add 5 6, take
     2(3) for a mixed number, y' for y, gamma for a function. It runs in workers under limits of time and memory
     (engine/grader.py): a hard answer costs its own verdict, never the run. No answer is evaluated as code.
"""

import itertools
import re
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache

MAX_NUMBER_LENGTH = 400  # characters of a plain number; also bounds its power of ten
MAX_ANSWER_LENGTH = 2000  # characters of an answer that is looked at
MAX_DEPTH = 50  # of its brackets
MAX_PAIRS, MAX_SETS = 40_000, 5  # of characters of gold and answer, and sets in sets, outside a worker


# ---------------------------------------------------------------------------------------------
# Tidying, and plain numbers

DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
PLAIN_FRACTION = re.compile(rf"\\frac\{{(-?{DECIMAL})\}}\{{(-?{DECIMAL})\}}", re.ASCII)
NUMBER = re.compile(
    rf"(?P<sign>[-+]?) ?(?:(?P<whole>\d+) (?=\d+/))?(?P<a>{DECIMAL})"
    rf"(?:/(?P<b>-?{DECIMAL})| ?\\(?:times|cdot) ?10\^(?P<power>\d|\{{[-+]?\d+\}}))? ?(?P<percent>\\?%)?",
    re.ASCII,
)
TEXT = re.compile(r"\\text\{([^{}]*)\}")
SYNONYMS = r"""- −, \times ×, \cdot ·, \div ÷, \sqrt √, \pi π, \infty ∞, \cup ∪, \approx ≈, \pm ±,
\le ≤ <= \leq \leqslant, \ge ≥ >= \geq \geqslant, \ne ≠ != \neq \not=, < \lt, > \gt, | \vert \lvert \rvert,
( \langle, ) \rangle, \frac \dfrac \tfrac \cfrac, \binom \dbinom \tbinom, \emptyset \varnothing \{\} ∅,
° ^{\circ} ^\circ \degree, \triangle △, \angle ∠, \% percent \text{percent}, pm p.m., am a.m."""
SYNONYMS = [(other, name) for name, *others in map(str.split, SYNONYMS.split(",")) for other in others]
SYNONYMS = {other: name + " " * (name[-1].isalpha() > other[-1].isalpha()) for other, name in SYNONYMS}
SYNONYM = "|".join(re.escape(other) + "(?![A-Za-z])" * other[-1].isalpha() for other in SYNONYMS)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
# full-width forms (but digits, which are no number here, and ～, a range, where ~ would be a space), fractions of one
# character, other spaces and punctuation
TYPED = {code: chr(code - 0xFEE0) for code in range(ord("！"), ord("～")) if not chr(code).isdigit()}
for character in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒":
    above, below = unicodedata.normalize("NFKC", character).split("⁄")
    TYPED[ord(character)] = rf"\frac{{{above}}}{{{below}}}"
TYPED |= str.maketrans("\u00a0\u2009\u202f\u3000。￡￥", "    .£¥")
TYPED |= str.maketrans({"，": ", ", "、": ", ", "℃": "°C", "℉": "°F"})
CIRCLED, CURRENCY = "[①-⑳]", "[¢-¥₠-⃀]"
NOT_ASCII = {
    rf"(?<={CIRCLED}) ?(?={CIRCLED})": ",",  # R ①③
    CIRCLED: lambda circled: unicodedata.normalize("NFKC", circled[0]),
    "[₀-₉]+": lambda lowered: f"_{{{lowered[0].translate(SUBSCRIPTS)}}}",  # R a₁
    rf"(?<!\d)(?<!\d )({CURRENCY}) ?(\d(?:[\d., ]*\d)?)": r"\2\1",  # R £5
    r"(?<=[A-Za-z\d})]) ?度": "°",  # R 90度
}
NOT_ASCII = [(re.compile(pattern, re.ASCII), replacement) for pattern, replacement in NOT_ASCII.items()]
FUNCTION = "(?:arc)?(?:sin|cos|tan|cot|sec|csc)|ln|log|exp|sqrt|pi|infty"  # that are typed as words
UPRIGHT = r"(?:text|math)(?:rm|bf|it|sf|tt|normal)?|mbox|boldsymbol|bm|bold|underline"
TOKEN = r"\d|[A-Za-z]|\\(?!sqrt)[A-Za-z]+"
MATRIX = r"\{(?:[pb]?(?:small)?matrix|array)\}"


def _joined(digits: re.Match) -> str:
    """A number without its thousands separators; in brackets a comma separates entries."""
    return digits[0] if re.search(r"[(\[]|\\\{", digits.string) else re.sub(r"\D", "", digits[0])


# Beside each, what needs it apart from its own tests: a real gold (G), a natural way to write one (W), a report (R).
TIDY = {
    r"^\s*\\[(\[]|\\[)\]]\s*$|\\\\\s*$|\\?\$|\\(?:left|right|[bB]ig|displaystyle)(?![A-Za-z])": "",  # W \(5\)
    r"\{([,:])\}|(,)\s*\\!\s*|\\!": r"\1\2",  # G \$306,\!956.63, 8\!:\!34
    r"(?<![\d.,_^])[1-9]\d{0,2}(?:(?:,| |\\,)\d{3})+(?![\d,])": _joined,  # W 14,400
    r"\\(?:mathbf|mathit|boldsymbol|bm|bold) ?\{ ?([A-Za-z]) ?\}": r" \1",  # W 3\mathbf{i}: a vector, no unit
    r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s)+": " ",  # W 1.5\ \text{m}
    r"(?<![\w}]) | (?![\w\\])": "",  # G 2 x^{2} + 1
    rf"\\(?:{UPRIGHT}) ?\{{ ?([^{{}}]*?) ?\}}": r"\\text{\1}",  # G \mbox{ inches}
    r"\\text\{([eid]|[^A-Za-z{}][^{}]*)\}": r"\1",  # R \frac{1}{\mathrm{e}}
    SYNONYM: lambda found: SYNONYMS[found[0]],  # W \dfrac, 18°; R 2π
    "[⁰¹²³⁴-⁹⁻]+": lambda raised: f"^{{{raised[0].translate(SUPERSCRIPTS)}}}",  # R x²
    rf"\\(?:text|operatorname)\{{({FUNCTION})\}}|(?<![A-Za-z\\])({FUNCTION})(?![A-Za-z])": r"\\\1\2 ",  # R -2*pi
    r"\\sqrt ?(?:\(([^()]*)\)|(\d(?=\d)\d+))": r"\\sqrt{\1\2}",  # W √19
    rf"\\(frac|binom) ?({TOKEN})": r"\\\1{\2}",  # R \frac2\pi
    rf"(\\(?:frac|binom)\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}) ?({TOKEN})": r"\1{\2}",  # R \frac{1}\pi
    r"\^\{?((?:\\prime ?)+)\}?": lambda primes: "'" * primes[1].count("p"),  # G 0.003^{\prime \prime}
    r"(?<=\d) ?\^\{?(?:\\text\{)?(?:st|nd|rd|th)(?![A-Za-z])\}*": "",  # R 12^{\text{th}}
    rf"[(\[]?\\(begin){MATRIX}(?:\{{[lcr| ]*\}})?|\\(end){MATRIX}[)\]]?": r"\\\1\2{pmatrix}",  # R {c c}
    r"\\\\ ?\[\d+(?:pt|mm|em|ex)\]": r"\\\\",  # W \\[4pt]
    r"^\\\{(\w) ?(?:\\in ?\\mathbb\{?R\}?)? ?(?:\\mid|[|:])(?=.*(?:<|>|\\[lgn]e)) ?(.*)\\\}$": r"\2",  # R {x | x>2}
    r"(?<=[\w})\]%°'])\.$": "",  # W 5.
    r"(\\\{|[,;=]|^)([^,;=()\[\]]*)\\pm ?([^,;()\[\]]*?)(?=\\\}|[,;]|$)": r"\1\2+\3, \2-\3",  # G 1 \pm \sqrt{19}
    r"(^|[(\[{,=])([-+]?[0-9.]+)[eE]([-+]?[0-9]{1,3})(?=$|[)\]},])": r"\1\2\\times 10^{\3}",  # G 4.5e33
}
TIDY = [(re.compile(pattern, re.ASCII), replacement) for pattern, replacement in TIDY.items()]


def tidy(text: str) -> str:
    """The same answer with its typesetting removed: math delimiters, spacing, sized brackets, synonyms."""
    text = text.translate(TYPED)
    for pattern, replacement in TIDY if text.isascii() else NOT_ASCII + TIDY:
        text = pattern.sub(replacement, text).strip()
    return text


def _figure(text: str) -> tuple[Fraction, bool] | None:
    """The figure of a tidy plain number as written, and whether a percent sign follows it."""
    match = NUMBER.fullmatch(PLAIN_FRACTION.sub(r" \1/\2", text[: MAX_NUMBER_LENGTH + 1]).strip())
    if match is None or len(text) > MAX_NUMBER_LENGTH:
        return None
    power, below = int((match["power"] or "0").strip("{}")), Fraction(match["b"] or 1)
    if abs(power) > MAX_NUMBER_LENGTH or below == 0:
        return None
    value = int(match["whole"] or 0) + Fraction(match["a"].rstrip(".")) / below * Fraction(10) ** power
    return (-value if match["sign"] == "-" else value), match["percent"] is not None


def number(text: str) -> Fraction | None:
    r"""Exact value of a plain number: 1,234, .5, 1.5e3, a/b, \frac{a}{b}, 3\frac{1}{2}, 50% (1/2); else None."""
    figure = _figure(tidy(text)) if len(text) <= MAX_NUMBER_LENGTH else None
    return figure and (figure[0] / 100 if figure[1] else figure[0])


def normal_form(answer: str) -> str:
    """The form on which a majority vote counts answers: a plain number's exact fraction, or else the tidied text."""
    if (value := number(answer)) is not None:
        return str(value)
    text = TEXT.sub(r"\1", tidy(answer[:MAX_ANSWER_LENGTH])[:MAX_ANSWER_LENGTH]).strip()
    return re.sub(r"(?<![A-Za-z\\])[A-Za-z]{2,}", lambda word: word[0].casefold(), text)


def _depths(text: str) -> list[int]:
    """How many brackets are open after each character."""
    return list(itertools.accumulate((c in "{[(") - (c in "}])") for c in text))


# ---------------------------------------------------------------------------------------------
# The structure of a tidy answer, read from its text: lists, equations, units, words

AND_OR = r"(?:\\text\{[ ,]*(?:and|or)[ ,]*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))"
LIST = re.compile(rf"(?<![,; ])[,; ]*+{AND_OR}[,; ]*+|[,;]")
EQUALS = re.compile(r"(?<![<>!])=|\\in(?![A-Za-z])")
RELATION = re.compile(r"<|>|\\(?:le|ge|ne)(?![A-Za-z])")
COLON, APPROXIMATES = re.compile(":"), re.compile(r"\\approx(?![A-Za-z])")
SET_LIKE = re.compile(RELATION.pattern + r"|\\(?:infty|cup|cap|mathbb|emptyset|setminus)(?![A-Za-z])|^[(\[].*,.*[)\]]$")
INDEX = r"_(?:\w|\{[^{}]*\})"
# what a name may hold besides letters; the symbols of an expression, each with its index
DECORATION = re.compile(rf"'|{INDEX}|\^\{{-1\}}|\([^()=]*\)|{TEXT.pattern}|\\frac(?:\{{d[^{{}}]*\}}){{2}}")
OPERATION = rf"\\(?:{FUNCTION}|frac|binom|cdot|times|div|sum|prod|int|lim|max|min|gcd|l?floor|l?ceil)(?![A-Za-z])"
SYMBOL = re.compile(rf"{OPERATION}|(\\?[A-Za-z]+(?:{INDEX})?)")
CHOICE = re.compile(r"\(?([A-J])(?:\)|\.|:|$)[).:]* *(.*)", re.DOTALL)
OTHER_CHOICE = re.compile(r"(?<![A-Za-z\\])[A-H](?![A-Za-z]| [a-z])")  # "(B) A circle" begins with the article

UPRIGHT_UNIT = r"\\text\{[^{}]*\}(?:\^\{?-?\d\}?)?"
COMMON_UNIT = r"(?:st|nd|rd|th|(?i:[ap]m)|[ckm]m|[km]g|ft|in|hrs?|min|sec|mph)"  # may follow a number without a space
UNIT = re.compile(
    rf"(?<![°'])(?: ?{UPRIGHT_UNIT}(?: ?(?:/|\\cdot)? ?{UPRIGHT_UNIT})*+| ?°(?: ?[CF]| ?\\text\{{[CF]\}})?|''?)$"
    rf"|(?<=[A-Za-z\d}})]) ?(?:{CURRENCY}|元)$|(?<=\d)_(?:\d|\{{\d\d?\}})$|(?<!%)\\?%$"
    rf"|(?<=[\d}}])(?P<word>(?: [A-Za-z]{{3,}}| ?{COMMON_UNIT})(?:[ /][A-Za-z]+)*+(?:\^\{{?\d\}}?)?)$"
)
NO_UNIT = frozenset(
    "hundred thousand million billion trillion dozen half halve third quarter tenth hundredth one two three four five "
    "six seven eight nine ten zero plus minus times over squared cubed more less or and not no if k x y z n".split()
)
MOST_ROUNDING = Fraction(1, 10)  # relative, of `a \\approx b`
EXACT_DECIMAL = Fraction(1, 10**12)  # relative error of a decimal that stands for a fraction that no decimal equals


def _split(text: str, cuts: re.Pattern) -> list[str]:
    """The parts between the separators that stand in no bracket."""
    places = [cut.span() for cut in cuts.finditer(text)]
    depths = _depths(text) if places else []
    ends = [0, *(place for span in places if depths[span[0]] == 0 for place in span), len(text)]
    return [text[start:end].strip() for start, end in zip(ends[::2], ends[1::2], strict=True)]


def _inside(text: str) -> tuple[str, str]:
    r"""The brackets around the whole text ("()", "[)", "\{\}") and what they enclose; ("", text) if there are none."""
    enclosed = re.fullmatch(r"(\\?[({\[])(.*?)(\\?[)}\]])", text, re.DOTALL)
    if enclosed is None or min(_depths(enclosed[2]), default=0) < 0:
        return "", text
    return enclosed[1] + enclosed[3], enclosed[2].strip()


def _entries(text: str) -> tuple[str, list[str]]:
    r"""The kind of a collection ("list", "\{\}", "[)", ":") and its entries; ("", [text]) of one value."""
    parts = _split(text, LIST)
    pair, content = _inside(_split(text, EQUALS)[-1])
    entries = _split(content, LIST)
    if len(parts) > 1:
        return "list", parts
    if pair in (r"\{\}", "[]", "(]", "[)") or (pair == "()" and len(entries) > 1):
        return pair, entries
    parts = _split(text, COLON)
    return ":" * (len(parts) > 1), parts


def _phrase(text: str) -> str | None:
    r"""The casefolded words of an answer; None if it is no word of two letters."""
    bare = TEXT.sub(r"\1", text).strip()
    is_phrase = TEXT.fullmatch(text) or re.fullmatch(r"[A-Za-z]++(?: [A-Za-z]++)*+", bare)
    is_phrase = is_phrase and bare[:1].isalpha() and re.search(r"[A-Za-z]{2}", bare)
    return " ".join(re.findall(r"\w+", bare.casefold())) if is_phrase else None


def _choice(text: str) -> str | None:
    """The letter of a multiple-choice answer, alone or before its text."""
    match = CHOICE.fullmatch(TEXT.sub(r"\1", text).strip("{} "))
    return match[1] if match and not OTHER_CHOICE.search(match[2]) else None


def _is_name(side: str) -> bool:
    r"""Whether a side of an equation is what it names: `x`, `f(2)`, `\angle ABC`, `\text{Area}`, `\frac{dy}{dx}`."""
    is_operation = re.search(rf"[-+*/^|!.,<>\d\[]|\\\{{|{OPERATION}", DECORATION.sub("", side))
    return re.search("[A-Za-z]", side) is not None and is_operation is None


def _symbols(side: str) -> set[str]:
    return set(SYMBOL.findall(TEXT.sub(" ab ", side))) - {""}


def _before_approximation(text: str) -> str:
    r"""What is said to be near something: 1/3 of `1/3 \approx 0.33`, 5 of `x \approx 5`; nothing of `5 \approx 6`."""
    first, last = (_split(text, APPROXIMATES)[end] for end in (0, -1))
    if not first or _is_name(first):
        return last
    a, b = _figure(first), _figure(last)
    return "" if a and b and abs(a[0] - b[0]) > MOST_ROUNDING * abs(a[0]) else first


def _unit(text: str) -> tuple[str, str | None]:
    r"""A value out of parentheses, and its unit or base: in \text{}, or a word after a plain number; else None."""
    unit, value, name = UNIT.search(text), text, None
    if unit and (before := text[: unit.start()].rstrip()) and (not unit["word"] or _figure(before)):
        words = re.findall(r"[a-z]+", TEXT.sub(r" \1 ", unit[0]).casefold())
        is_argument = "°" in unit[0] and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", before)
        if not is_argument and not NO_UNIT.intersection(word.removesuffix("s") for word in words):
            name = TEXT.sub(r" \1", unit[0]).replace("°", "degree").casefold()
            value, name = before, re.sub(r"[\s{}]|s(?![a-z])", "", name)
    pair, content = _inside(value)
    return content if pair in ("()", "{}") else value, name


# ---------------------------------------------------------------------------------------------
# The comparison. Text settles what it can; what is left raises _Undecided, or goes to math-verify in a worker.

# the kinds of collection that may match each kind of gold
MATCHING = {"list": ("list", r"\{\}", "()", "[]"), r"\{\}": (r"\{\}", "list"), "()": ("()", "list")}
Engine = Callable[[str, str], bool]  # decides on two texts what the text leaves open


class _Undecided(Exception):
    """The texts alone do not tell."""


def _undecided(gold: str, answer: str) -> bool:
    raise _Undecided


def same_text(gold: str, answer: str) -> bool:
    """Whether two tidy answers are the same text."""
    gold, answer = (re.sub(r"\s+(\^)?", r" \1", TEXT.sub(r" \1 ", text)).strip() for text in (gold, answer))
    return bool(answer) and gold == answer


def _is_figure(gold: tuple[Fraction, bool], answer: tuple[Fraction, bool]) -> bool:
    """Whether two plain numbers are equal: 50% is 50 and 0.5; a fraction may be a decimal of twelve figures."""
    a, b = (figure / 100 if percent else figure for figure, percent in (gold, answer))
    is_rounded = (10**MAX_NUMBER_LENGTH % a.denominator == 0) != (10**MAX_NUMBER_LENGTH % b.denominator == 0)
    return gold[0] == answer[0] or abs(a - b) <= is_rounded * EXACT_DECIMAL * abs(a)


def compare(gold: str, answer: str, engine: Engine) -> bool:
    """Whether the tidy `answer` is the tidy `gold`."""
    if same_text(gold, answer):
        return True
    if letter := _choice(gold):
        return _choice(answer) == letter
    figures, phrases = [[read(text) for text in (gold, answer)] for read in (_figure, _phrase)]
    if None not in figures:
        return _is_figure(*figures)
    if None not in phrases or any(p and TEXT.fullmatch(t) for p, t in zip(phrases, (gold, answer), strict=True)):
        return phrases[0] == phrases[1]
    if any(len(_split(text, RELATION)) > 1 for text in (gold, answer)):
        gold, answer = (_split(text, EQUALS)[-1] for text in (gold, answer))
        return all(map(SET_LIKE.search, (gold, answer))) and engine(gold, answer)
    (gold_kind, golds), (kind, answers) = _entries(gold), _entries(answer)
    if gold_kind or kind:
        if gold_kind != kind and all(map(SET_LIKE.search, (gold, answer))) and "\\" in gold + answer:
            return engine(gold, answer)  # unions, \mathbb{R}
        return bool(gold_kind and kind) and _match_entries(gold_kind, golds, kind, answers, engine)
    gold_sides, sides = (_split(_before_approximation(text), EQUALS) for text in (gold, answer))
    if len(gold_sides) > 1 or len(sides) > 1:
        return _match_sides(gold_sides, sides, engine)
    (gold_value, gold_unit), (value, unit) = _unit(gold_sides[0]), _unit(sides[0])
    if not value or (gold_unit and unit and gold_unit != unit):
        return False
    if (gold_value, value) == (gold, answer):
        return engine(gold, answer)
    return compare(gold_value, value, engine)


def _match_entries(gold_kind: str, golds: list[str], kind: str, answers: list[str], engine: Engine) -> bool:
    """Whether the entries of two collections match, in order unless the gold is a list or a set."""
    if kind not in MATCHING.get(gold_kind, (gold_kind,)) or len(golds) != len(answers):
        return False
    if len({entry.partition("=")[0] for entry in golds if "=" in entry}) == len(golds):
        gold_kind = "()"  # x=1, y=2 is y=2, x=1, but not 2, 1
        if all("=" in entry for entry in answers):
            golds, answers = sorted(golds), sorted(answers)
    if gold_kind not in ("list", r"\{\}"):
        return all(compare(g, a, engine) for g, a in zip(golds, answers, strict=True))
    left = list(answers)
    for gold in golds:
        found = next((answer for answer in left if compare(gold, answer, engine)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _match_sides(gold_sides: list[str], sides: list[str], engine: Engine) -> bool:
    """Whether equations match, or an equation and a value."""
    if not _symbols(sides[0]) and _is_name(sides[-1]):
        sides = [sides[-1], *sides[:-1]]  # 5 = x
    *others, value = [_unit(side)[0] for side in sides]
    if not all(_symbols(side) or _is_true(side, value, engine) for side in others):
        return False
    gold_named = len(gold_sides) == 1 or _is_name(gold_sides[0]) or _figure(gold_sides[0])  # 0.56 = 56%
    named = len(sides) == 1 or _is_name(sides[0]) or (len(gold_sides) == 1 and len(_symbols(sides[0])) != 1)
    if gold_named and named and compare(gold_sides[-1], sides[-1], engine):  # but 2x = 6 is no 6
        return True
    equations = ("=".join(equation[:: len(equation) - 1]) for equation in (gold_sides, sides) if len(equation) > 1)
    return len(gold_sides) > 1 < len(sides) and engine(*equations)


def _is_true(side: str, value: str, engine: Engine) -> bool:
    with suppress(ValueError):  # a side that cannot be read is no unreadable gold
        return compare(side, value, engine)
    return False


def text_verdict(answer: str, golds: Sequence[str]) -> tuple[str | None, list[str]]:
    """The verdict if it needs no worker, else None with the golds that are left to compare."""
    if len(answer) > MAX_ANSWER_LENGTH or max(_depths(answer), default=0) > MAX_DEPTH:
        return "wrong", []
    answer, left = tidy(answer), []
    for gold in map(tidy, golds):
        try:
            sets, depth = min(gold.count(r"\{"), answer.count(r"\{")), max(_depths(gold), default=0)
            if len(gold) * len(answer) > MAX_PAIRS or sets > MAX_SETS or depth > MAX_DEPTH:
                raise _Undecided  # a worker has a clock
            if answer and compare(gold, answer, _undecided):
                return "right", []
        except (_Undecided, RecursionError):
            left.append(gold)
    return (None, left) if left else ("wrong", [])


# ---------------------------------------------------------------------------------------------
# Values, in a worker: math-verify, with a guard around each of its known faults

SIX_FIGURES = 2e-6  # relative, of a decimal against a closed form
PRODUCT = re.compile(r"(?:\\times|\\cdot|(?<!\*)\*(?!\*))(?! ?10(?:\^|\*\*))|\\begin|\)\(|(?<![_^\d])\d+\(")


def _fraction(decimal: re.Match) -> str:
    """A decimal, repeating or not, as a fraction: as a float it would hide sums."""
    whole, start, cycle = decimal.groups(default="")
    above = int(whole + start + cycle) - (int(whole + start or 0) if cycle else 0)
    return rf"\frac{{{above}}}{{{'9' * len(cycle) or 1}{'0' * len(start)}}}"


MISREAD = re.compile(r"(?<![_^\d])\d+\s+\d|!!|\d_|[\d°]'")  # 1 2 would be added, 3!! (3!)!; the others dropped
# What its grammar misreads or does not know, in words that it does.
READABLE = {
    r"(\d*)\.(?=\d|\\overline)(\d*)(?:\\overline\{(\d+)\})?": _fraction,
    r"°": r"^\\circ ",
    r"\*\*": "^",
    r"(?<=[A-Za-z])'+": lambda primes: "_{" + "p" * len(primes[0]) + "}",
    r"\\gamma(?![A-Za-z])": r"\\mho ",
    r"(?<![A-Za-z\\])[eE](?=_)": lambda e: r"\eth" if e[0] == "e" else r"\Finv",
    r"_(?:\\([A-Za-z]+)|\{ ?\\([A-Za-z]+) ?\})": r"_{\1\2}",
}


def _parse(text: str):
    """The unevaluated sympy object that math-verify's parser makes of LaTeX; None if it cannot."""
    import sympy
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    if MISREAD.search(text):
        return None
    for pattern, replacement in READABLE.items():
        text = re.sub(pattern, replacement, text, flags=re.ASCII)
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    case = ConversionConfig(lowercase_symbols=False)
    try:
        text = normalize_latex(text, rules)
        value = latex2sympy(text, is_real=True, convert_degrees=True, normalization_config=None, conversion_config=case)
    except Exception as error:  # the parser raises that very class
        if isinstance(error, MemoryError):
            raise
        return None
    return value if isinstance(value, sympy.Basic | sympy.MatrixBase) and not value.has(sympy.zoo, sympy.nan) else None


OPEN = ("Sum", "Product", "Integral", "Limit", "Derivative", "Mod", "Max", "Min", "UnevaluatedExpr")  # gcd is the last


def _is_open(value) -> bool:
    """Whether a sum, difference or product of rational values is anywhere left to be worked out."""
    if value.is_Add or value.is_Mul:
        has_sign = value.is_Mul and not all(arg.is_Number for arg in value.args)
        below = [arg for arg in value.args if value.is_Mul and arg.is_Pow and arg.exp == -1]
        terms = [arg for arg in value.args if arg not in below and not (has_sign and arg == -1)]
        is_rational = sum(bool(term.doit().is_rational) for term in terms) > 1 or value.doit().is_rational
        kinds = sorted("number" if t.is_Rational else str(t.as_base_exp()[0]) for t in terms)
        if len(terms) > 1 and is_rational and not (value.is_Mul and kinds == ["10", "number"]):
            return True
    return type(value).__name__ in OPEN or any(_is_open(arg) for arg in value.args)


def _sample(value, seed: int):
    """The value to 40 digits where every variable, function and derivative is some number; None if that is none."""
    import sympy

    unknowns = value.atoms(sympy.core.function.AppliedUndef, sympy.Derivative) | value.free_symbols
    point = {u: sympy.Rational(zlib.crc32(f"{seed} {u}".encode()) % 99991 - 40000, 7919) for u in unknowns}
    with suppress(ArithmeticError, TypeError, ValueError):
        sampled = value.xreplace(point).evalf(40)
        return sampled if sampled.is_number and sampled.is_finite else None


def _is_value(gold, value, is_plain: bool, has_decimal: bool) -> bool:
    """Whether one expression is the other. Not symmetric: the gold decides the form."""
    import sympy

    if (is_plain or gold.is_Rational) and (value.free_symbols or _is_open(value)):
        return False
    i = sympy.Symbol("i", real=True)  # the imaginary unit, unless it counts the terms of a sum
    gold, value = (side.xreplace({i: sympy.I} if i in side.free_symbols else {}).doit() for side in (gold, value))
    if gold.is_Rational and value.is_Rational:
        return gold == value
    unknowns, is_sampled = gold.free_symbols | value.free_symbols, False
    tolerance = SIX_FIGURES if has_decimal and not unknowns else 1e-20
    for seed in range(8 if unknowns else 1):
        a, b = _sample(gold, seed), _sample(value, seed)
        if a is not None and (b is None or abs(a - b) > tolerance * max(abs(a), abs(b))):
            return False
        is_sampled |= a is not None
    return is_sampled or gold == value


def _is_equation(gold, answer) -> bool:
    """Whether the difference of the sides of one equation is a constant times that of the other."""
    gold, answer = gold.lhs - gold.rhs, answer.lhs - answer.rhs
    scales = _sample(gold, 99), _sample(answer, 99)  # at another point than those of _is_value
    return None not in scales and 0 not in scales and _is_value(gold * scales[1], answer * scales[0], False, False)


@lru_cache(maxsize=4096)  # the rollouts of a group share their gold, and many an answer
def _read(text: str):
    """What `_parse` makes of a text; of inequalities in one variable, with `and` or `or`, the set where they hold."""
    import sympy
    from math_verify.grader import unwrap_fcs

    if not RELATION.search(text):
        value = _parse(text)
        return value.doit() if isinstance(value, sympy.MatrixExpr) else value
    if len(parts := _split(text, LIST)) > 1:
        sets = [_read(part) for part in parts]
        combine = sympy.Intersection if re.search(r"and\b", text) else sympy.Union
        return combine(*sets) if all(isinstance(s, sympy.Set) for s in sets) else None
    value = unwrap_fcs(_parse(text))
    if isinstance(value, sympy.logic.boolalg.Boolean) and len(value.free_symbols) == 1:
        parts = value._unsorted_args if isinstance(value, sympy.And) else [value]
        return sympy.Intersection(*(part.as_set() for part in parts))
    return value


def ask_math_verify(gold: str, answer: str) -> bool:
    """An engine for `compare`: what the texts leave open, decided by math-verify in this process."""
    import sympy
    from math_verify import verify

    gold_value, value = _read(gold), _read(answer)
    if gold_value is None:
        raise ValueError(f"the gold {gold} cannot be read")  # no answer's fault
    is_plain, has_decimal = _figure(gold) is not None, "." in gold + answer
    if value is None or (is_plain and PRODUCT.search(answer)):
        return False
    if all(isinstance(v, sympy.MatrixBase) for v in (gold_value, value)) and gold_value.shape == value.shape:
        return all(_is_value(g, a, False, has_decimal) for g, a in zip(gold_value, value, strict=True))
    if isinstance(gold_value, sympy.Eq) and isinstance(value, sympy.Eq):
        return _is_equation(gold_value, value)
    if isinstance(gold_value, sympy.Expr) and isinstance(value, sympy.Expr):
        return _is_value(gold_value, value, is_plain, has_decimal)
    return not is_plain and verify(gold_value, value, timeout_seconds=None, raise_on_error=True)


def is_right(answer: str, golds: Sequence[str]) -> bool:
    """Whether a tidy answer matches any of the tidy golds. Raises what one of them raised if it matches none."""
    failures = []
    for gold in golds:
        try:
            if compare(gold, answer, ask_math_verify):
                return True
        except Exception as error:  # whatever sympy raises on odd LaTeX
            failures.append(error)
            if isinstance(error, MemoryError | OverflowError | RecursionError):
                break
    if failures:
        raise failures[-1]
    return False
