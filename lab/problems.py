"""Problems: read them from rows as the common data sets have them, write them, and find copies of the same one."""

import ast
import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path

from engine.errors import first_names
from engine.files import write_atomically
from lab.answers import text_verdict
from lab.data_files import PROBLEM_COLUMNS, DataError, find_files, rows_of
from reward import BOX, last_boxed

INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
WHOLE_ROW = "whole_row"  # the key under which write_problems keeps Problem.row
MAX_SHOWN = 300  # characters of a file's content in an error


@dataclass(frozen=True)
class Problem:
    """One problem: its text, the accepted answers, and what the data says about it."""

    id: str  # "source/name"; survives shuffling, filtering and resuming
    text: str  # the user's message in the data, without the instruction that prompt_text adds
    answers: tuple[str, ...]  # any of them is right
    type: str = ""  # the kind of problem, as the data names it
    difficulty: float | None = None  # on the data's own scale
    solution: str = ""  # worked solution, for sft stages
    row: dict = field(default_factory=dict, hash=False)  # the data's whole row, where a reward function reads it


@dataclass(frozen=True)
class Columns:
    """The names of a file's columns, a dot before a field within one ("extra_info.answer"); empty: a known name."""

    problem: str = ""
    answer: str = ""
    solution: str = ""
    id: str = ""
    type: str = ""
    difficulty: str = ""


KNOWN_COLUMNS = {  # in any case; the first one present counts
    "problem": PROBLEM_COLUMNS,
    "answer": ("answers", "reward_model", "ground_truth", "final_answer", "expected_answer", "answer",
               "solution", "solutions"),
    "solution": ("solution", "generated_solution"),
    "id": ("id", "unique_id", "uuid", "index", "extra_info.index", "extra_info.id"),
    "type": ("type", "subject", "problem_type"),
    "difficulty": ("difficulty", "level"),
}  # fmt: skip
WORKED = ("solution", "solutions")  # end with the answer, or are the answer
NOT_SHOWN = ("choices", "options", "context", "passage", "body", "input")  # may hold a part of the problem
LONGEST_ANSWER = 15  # words of a solution that is an answer alone
NOT_ANSWERS = ("proof", "notfound")  # what NuminaMath-1.5 has in place of an answer
THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", re.ASCII)
OTHER_FORMS = re.compile(r"Answer:|####|<answer>")  # where the answers of DAPO, GSM8K and R1-Zero stand
LOOKED_AT = 1000  # rows that decide how a file's answers are written


# ---- reading and writing -------------------------------------------------------------------------


def read_problems(
    source: str | Path,
    on_bad_row: str = "stop",
    rewarded: bool = False,
    columns: Columns = Columns(),
    solved: bool = False,
) -> list[Problem]:
    """Read a local file or folder, or a Hugging Face dataset; ":split" may follow a folder and "owner/name".

    on_bad_row: "stop" raises for unusable rows; "skip" leaves them out and prints how many; "keep" keeps problems
    without an answer (an evaluation may have to count them), prints how many, and stops at other faults. Of rows with
    the same id and text only the first is kept, and the count is printed; problems with one text and different answers
    count as without an answer. Ids begin with the file's stem (the folder's, the dataset's name), so that sources can
    be mixed. `rewarded` is for a reward function: rows are kept whole, and need no answer. `columns` names columns that
    KNOWN_COLUMNS lacks. `solved` is for fine-tuning: rows need a worked solution, but no answer, and several solutions
    of one problem are all kept. Raises DataError.
    """
    if on_bad_row not in ("stop", "skip", "keep"):
        raise DataError(f'on_bad_row is {on_bad_row!r}; it must be "stop", "skip" or "keep".')
    stem, files = find_files(source)
    rows = chain.from_iterable(read_file(file, stem, on_bad_row, rewarded, columns, solved) for file in files)
    problems, repeated, disputed = settle(rows, stem, on_bad_row == "keep", rewarded, solved)
    if repeated:
        print(f"{source}: left out {len(repeated)} duplicate rows (first: {repeated[0]})", file=sys.stderr)
    if disputed:
        done = "kept, as problems that nothing can solve," if on_bad_row == "keep" else "left out"
        examples = first_names([" and ".join(f"{p.id} has {p.answers[0]}" for p in same) for same in disputed], 3)
        print(f"{source}: {done} {len(disputed)} problems with different answers ({examples})", file=sys.stderr)
    if not problems:
        raise DataError(f"{source} holds no usable row: all its problems have different answers; fix the file.")
    return problems


def read_chats(source: str | Path) -> list[list[dict]]:
    """Read fine-tuning chats: rows whose `messages` have a role and a content, and end with the assistant's.

    Raises DataError with the row's number. `has_chats` says whether a source holds chats.
    """
    chats = []
    for path, number, row in ((file, *row) for file in find_files(source)[1] for row in rows_of(file)):
        messages = row.get("messages") if isinstance(row, dict) else None
        turns = [m if isinstance(m, dict) else {} for m in messages] if isinstance(messages, list) else []
        turns = [m | {"content": message_text(m.get("content"))} for m in turns]
        complete = all(isinstance(m.get(key), str) for m in turns for key in ("role", "content"))
        if not turns or not complete or turns[-1]["role"] != "assistant":
            raise DataError(f"{path}, row {number} is not a chat that ends with the assistant's message; fix the row.")
        chats.append(turns)
    return chats


def message_text(content: object) -> str | None:
    """Return a message's content as text, the parts of one in parts on lines of their own; None if any is no text."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    return "\n".join(texts) if texts and all(isinstance(text, str) for text in texts) else None


def has_chats(source: str | Path) -> bool:
    """Return whether the first row of a file, folder or hub dataset has `messages` that are no prompt of an answer."""

    def needed(names: Iterable[str]) -> dict[str, list[str]]:
        return {"chat": [name for name in names if name == "messages" or name.casefold() in KNOWN_COLUMNS["answer"]]}

    _, row = next(rows_of(find_files(source)[1][0], needed), (0, {}))
    if not isinstance(row, dict) or "messages" not in row:
        return False
    last = row["messages"][-1] if isinstance(row["messages"], list) and row["messages"] else None
    is_prompt = isinstance(last, dict) and last.get("role") == "user"
    return not (is_prompt and value_in(row, set(needed(row)["chat"]) - {"messages"}) is not None)


def read_file(
    path: Path, stem: str, on_bad_row: str, rewarded: bool, columns: Columns, solved: bool
) -> Iterator[Problem]:
    """Yield the usable rows of one file; the id is "stem/own id", or "" in a row without one."""
    rows = rows_of(path, None if rewarded else lambda names: find_columns(names, columns, path, solved))
    head = list(islice(rows, LOOKED_AT))
    if not head:
        raise DataError(f"{path} holds no rows; add at least one problem.")
    names = dict.fromkeys(name for _, row in head if isinstance(row, dict) for name in row)
    found = find_columns(list(names), columns, path, rewarded or solved) if names else dict.fromkeys(KNOWN_COLUMNS, ())
    worked = is_worked(found["answer"], [row for _, row in head if isinstance(row, dict)])
    worked |= solved and found["answer"][:1] == found["solution"][:1]  # even a short solution is no answer
    own = found["problem"][:1] == ("problem",) and found["answer"][:1] == ("answers",)
    usable, bad, examples = 0, Counter(), []
    for number, row in chain(head, rows):
        problem, reason = problem_of(row, found, worked) if isinstance(row, dict) else (None, row)
        if problem and solved and problem.text.strip():
            reason = "" if problem.solution else "has no worked solution"
        if problem and rewarded:
            problem, reason = replace(problem, row=row.get(WHOLE_ROW, row)), reason * (not problem.text.strip())
        kept = not reason or (on_bad_row == "keep" and problem is not None and problem.text.strip())
        if reason:
            bad[reason, bool(kept)] += 1
            examples += [f"row {number} {reason}"] * (len(examples) < 5)
        if kept:
            usable += 1
            # write_problems wrote an id that already names its source: keep it
            settled = not problem.id or (own and "/" in problem.id)
            yield problem if settled else replace(problem, id=f"{stem}/{problem.id}")
    if not bad:
        return
    total, kinds = bad.total(), Counter(reason for reason, _ in bad)
    shown = ", ".join(examples) + ", ..." * (total > len(examples))
    if total > len(examples):
        kinds = bad.most_common(5)
        shown += "; " + ", ".join(f"{count:,} {reason}" for (reason, _), count in kinds)
    if on_bad_row != "skip" and not all(kept for _, kept in bad):
        many = f" ({total:,} rows in all)" * (total > 1)
        raise DataError(
            f'{path}, {shown}{many}; fix the file, or leave such rows out with on_bad_row = "skip" in the recipe '
            "(--skip-bad-rows)."
        )
    if not usable:
        raise DataError(f"{path} holds no usable row: {shown}, {total:,} bad rows in all; fix the file.")
    what = "kept, as problems that nothing can solve," if on_bad_row == "keep" else "left out"
    print(f"{path}: {what} {total} unusable rows ({shown})", file=sys.stderr)


# ---- columns: row -> Problem with the row's own id, or "" ----------------------------------------


def find_columns(
    names: Sequence[str], columns: Columns, path: Path, unanswered: bool = False
) -> dict[str, tuple[str, ...]]:
    """Return which of a file's columns hold each field of Columns, best first.

    Raises DataError with the file's columns if none holds the problem or, unless `unanswered`, the answer.
    """
    held = {re.sub(r"[\W_]+", "_", name.strip().casefold()): name for name in reversed(names)}
    found = {}
    for name, known in KNOWN_COLUMNS.items():
        given, paths = getattr(columns, name), [column.partition(".") for column in known]
        found[name] = (given,) if given else tuple(held[a] + dot + b for a, dot, b in paths if a in held)
    missing = [name for name in ("problem", "answer")[: 2 - unanswered] if not found[name]]
    missing += [name for name in filter(None, vars(columns).values()) if not {name, name.partition(".")[0]} & {*names}]
    if missing:
        shown = ", ".join(name if name.isprintable() else repr(name) for name in names)[:MAX_SHOWN] or "none"
        raise DataError(
            f"{path} has the columns {shown}, which is no known schema (no {' and no '.join(missing)}): name its "
            'columns with columns = { problem = "...", answer = "..." } beside data in the recipe, or '
            "--columns problem=...,answer=..."
        )
    if rest := [name for name in names if name.casefold() in NOT_SHOWN and name not in found["problem"]]:
        what = f"the model is not shown {' and '.join(rest)}; where a problem needs it, add it to the text"
        print(f"{path}: {what} in {found['problem'][0]}", file=sys.stderr)
    return found


def value_in(row: dict, names: Iterable[str]) -> object:
    """Return the first value that a row has under these names, a dot before a field within a column; or None."""
    for name in names:
        value = row
        for part in [name] if name in row else name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def is_worked(names: Sequence[str], rows: Sequence[dict]) -> bool:
    """Return whether a file's answers are at the end of texts, so that a row without a mark or a box has none."""
    name = names[0].casefold() if names else ""
    texts = [text for row in rows for text in text_answers(value_in(row, names[:1]))]
    if any("####" in text for text in texts):
        return True
    if name in KNOWN_COLUMNS["answer"] and name not in WORKED:
        return False
    long = any(len(text.split()) > LONGEST_ANSWER or "\n" in text.strip() for text in texts)
    return any(BOX.search(text) for text in texts) or (long and name in WORKED)


def problem_of(row: dict, columns: dict[str, tuple[str, ...]], worked: bool) -> tuple[Problem, str]:
    """Make a Problem from a row, and say what makes it unusable, or ""; missing fields stay empty."""
    given, solution = value_in(row, columns["answer"][:1]), value_in(row, columns["solution"])
    texts = text_answers(given)
    answers = tuple(dict.fromkeys(filter(None, (final_answer(text, worked).strip() for text in texts))))
    answers = tuple(answer for answer in answers if answer.lower() not in NOT_ANSWERS)
    if columns["solution"] == columns["answer"][:1] and not worked:
        solution = None  # it is the answer alone
    if isinstance(given, str) and answers and "####" in given and solution in (None, given):
        steps = re.sub(r"<<[^<>]*>>", "", given.rpartition("####")[0]).strip()
        solution = f"{steps}\nThe final answer is \\boxed{{{answers[0]}}}."
    problem = Problem(
        id=as_text(value_in(row, columns["id"])),
        text=message_of(value_in(row, columns["problem"][:1])),
        answers=answers,
        type=as_text(value_in(row, columns["type"])),
        difficulty=as_number(value_in(row, columns["difficulty"])),
        solution=solution.strip() if isinstance(solution, str) else "",
    )
    if not problem.text.strip():
        return problem, "has no problem text"
    named = " ".join(text for text in texts if text.strip().lower() in NOT_ANSWERS)
    return problem, "" if answers else f"has no answer{f' ({named})' * bool(named)}"


def message_of(value: object) -> str:
    """Return a problem's text, or that of a chat with only one message beside the system's, as a list or as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = parsed(value) or value
    if isinstance(value, list):
        # the chat template writes its own system message; a problem with earlier turns is unusable
        turns = [message_text(m.get("content")) for m in value if isinstance(m, dict) and m.get("role") != "system"]
        value = turns[0] if len(turns) == 1 else None
    return value if isinstance(value, str) else ""


def parsed(text: str) -> list | None:
    """Return the list that a text writes as JSON or as Python does, or None."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return value if isinstance(value, list) else None
    return None


def final_answer(text: str, worked: bool) -> str:
    r"""Return the answer in a text: its last \boxed{}, what follows "####", or else all of it unless it is `worked`."""
    if (box := last_boxed(text, thinking=False)) is not None:
        return box
    _, mark, end = text.rpartition("####")
    if not mark:
        return "" if worked else text
    return end.replace(",", "") if THOUSANDS.fullmatch(end.strip()) else end  # another comma separates answers


def as_text(value) -> str:
    """Return a string or a number as text; anything else, and nan (a missing value of a table), is ""."""
    return str(value) if isinstance(value, str | int | float | Decimal) and value == value else ""


def text_answers(value: object) -> list[str]:
    """Return the answers that a ground truth accepts, as texts; [] if it has none."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with suppress(ValueError, RecursionError):
            value = loaded if isinstance(loaded := json.loads(value), dict) else value
    if isinstance(value, dict):  # verl's reward_model
        value = value.get("ground_truth")
    if isinstance(value, str) and value.lstrip().startswith("["):
        # a lone backslash is LaTeX's, not one of an escape
        text = value if "\\\\" in value else re.sub(r"""\\(?!["']|n["']|u[0-9a-fA-F]{4})""", r"\\\\", value)
        found = parsed(text) or []
        strings = all(isinstance(x, str) for x in found)
        single = len(found) == 1 and not isinstance(found[0], list)
        # "[-9, 9]" is a closed interval, and ['7' '8'] one string in Python
        if found and (strings or single) and not re.search(r"""['"]\s+['"]""", text):
            value = found
    values = value if isinstance(value, list) else [value]
    # nan, infinity, lists and mappings are not answers
    values = [v for v in values if isinstance(v, str | int | Decimal) or (isinstance(v, float) and math.isfinite(v))]
    return [str(v) for v in values]


def as_number(value) -> float | None:
    """Return a difficulty as a number ("3/8" in POLARIS is 0.375, "Level 5" in MATH is 5), or None."""
    if type(value) in (int, float):
        return float(value) if abs(value) < 1e300 else None  # neither nan nor infinite
    match = re.fullmatch(r"(?:Level )?(-?\d+(?:\.\d+)?)(?:/([1-9]\d*))?", as_text(value))
    number = float(match[1]) / float(match[2] or 1) if match else math.inf
    return number if math.isfinite(number) else None


def settle(
    problems: Iterable[Problem], stem: str, keep: bool, rewarded: bool, solved: bool = False
) -> tuple[list[Problem], list[str], list[tuple[Problem, Problem]]]:
    """Return problems with unique ids, the ids of duplicates left out, and pairs of one text with different answers.

    A hash of the text replaces an id that is missing or that several texts share. A disputed text is left out, or one
    of it is kept without an answer; a reward function and fine-tuning need none, so that they dispute nothing. For
    fine-tuning (`solved`) rows are duplicates only with the same solution.
    """

    def key_of(problem: Problem) -> int:
        return text_key(f"{problem.text}\n{problem.solution}" if solved else problem.text)

    def is_copy(problem: Problem, other: Problem) -> bool:
        return other.id == problem.id and verdict_of(other.answers, problem.answers) == "right"

    of_text: dict[int, list[Problem]] = {}  # with distinct ids
    alike: dict[int, list[Problem]] = {}  # the first of each text, by the hash of the normalised text
    order, copies, disputed, judged = [], [], {}, not (rewarded or solved)
    for problem in problems:
        same = of_text.setdefault(key := key_of(problem), [])
        others = alike.setdefault(hash(normalised(problem.text)), []) if judged and not same else []
        if (
            judged
            and same
            and problem.answers
            and same[0].answers
            and verdict_of(same[0].answers, problem.answers) == "wrong"
        ):
            disputed.setdefault(key, (same[0], problem))
            continue
        if any(other.id == problem.id for other in same):
            copies.append(problem)
            continue
        if any(is_copy(problem, other) for other in others):  # in other lines or letter case, with the same answer
            copies.append(problem)
        else:
            order.append(problem)
        same.append(problem)
        others.append(problem)
    count, settled = Counter(problem.id for problem in order), {}

    def with_id(problem: Problem) -> Problem:
        shared = not problem.id or count[problem.id] > 1
        return replace(problem, id=f"{stem}/{key_of(problem):016x}") if shared else problem

    for problem in order:
        dispute = disputed and disputed.get(key_of(problem))
        if dispute and not (keep and dispute[0] is problem):
            continue
        problem = with_id(replace(problem, answers=()) if dispute else problem)
        if problem.id in settled:
            copies.append(problem)
        settled.setdefault(problem.id, problem)
    return (
        list(settled.values()),
        [with_id(problem).id for problem in copies],
        [(with_id(first), with_id(other)) for first, other in disputed.values()],
    )


def text_key(text: str) -> int:
    """Return 64 bits that copies of a text share, whatever their spaces; other lines or letter case: another text."""
    text = text.replace(INSTRUCTION, "").replace("$", "").strip()
    text = "\n".join(" ".join(line.split()) for line in text.split("\n"))
    text = re.sub(r" (?:(?!\w)|(?<!\w ))", "", text)  # x + 1 is x+1, but 1 2 is not 12
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def verdict_of(answers: Sequence[str], others: Sequence[str]) -> str | None:
    """Return "right" if two ground truths share an answer, "wrong" if not, None if their texts alone do not tell."""
    verdicts = {text_verdict(answer, others)[0] for answer in answers}
    return "right" if "right" in verdicts else None if None in verdicts else "wrong"


def write_problems(problems: Iterable[Problem], path: str | Path) -> None:
    """Write a JSON lines file for read_problems, atomically. Raises DataError if the file exists."""
    path = Path(path)
    if path.exists():
        raise DataError(f"{path} exists already; choose another name, or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        {"id": p.id, "problem": p.text, "answers": p.answers, "type": p.type,
         "difficulty": p.difficulty, "solution": p.solution} | ({WHOLE_ROW: p.row} if p.row else {}) for p in problems
    )  # fmt: skip
    write_atomically(path, (f"{json.dumps(row, ensure_ascii=False, default=str)}\n".encode() for row in rows))


def prompt_text(problem: Problem, instruction: str = INSTRUCTION) -> str:
    """Return the user's message with the instruction, which benchmark files already carry (RECIPE section 1)."""
    if not instruction or instruction in problem.text or INSTRUCTION in problem.text:
        return problem.text
    return f"{problem.text.rstrip()} {instruction}"


def asks_otherwise(problem: Problem, instruction: str = INSTRUCTION) -> bool:
    """Return whether a problem asks for its answer in a form other than the box of the instruction that is added."""
    return prompt_text(problem, instruction) != problem.text and bool(OTHER_FORMS.search(problem.text))


def normalised(text: str) -> str:
    """Return the text without the instruction, letter case, white space and dollar signs: copies share it."""
    return "".join(text.replace(INSTRUCTION, "").replace("$", "").lower().split())


def duplicated(problems: Iterable[Problem], seen: dict[str, Problem] | None = None) -> list[tuple[Problem, Problem]]:
    """Return (problem, earlier problem) for each problem whose normalised text an earlier one with another id has.

    `seen` collects the first problem of each text: pass it again with the next file to find copies across files.
    """
    seen = {} if seen is None else seen
    pairs = [(problem, seen.setdefault(normalised(problem.text), problem)) for problem in problems]
    return [(problem, first) for problem, first in pairs if first.id != problem.id]


def benchmark_copies(train: Iterable[Problem], benchmark: Iterable[Problem]) -> list[tuple[Problem, Problem]]:
    """Return (training problem, first benchmark problem) for each pair with the same normalised text."""
    held_out = {normalised(problem.text): problem for problem in reversed([*benchmark])}  # the first of each text
    return [(problem, held_out[text]) for problem in train if (text := normalised(problem.text)) in held_out]
