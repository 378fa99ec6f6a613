"""Problems: read them from the common formats, write them, and find copies of the same one."""

import ast
import codecs
import csv
import difflib
import gzip
import hashlib
import json
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from itertools import chain, islice
from pathlib import Path

from engine.errors import UserError
from engine.files import write_atomically
from lab.answers import text_verdict
from reward import BOX, last_boxed

INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
DATA_FILES = (".parquet", ".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
NOT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")  # beside data
MOST_ROWS = 10_000_000  # of a file, and entries of its lists
MOST_BYTES = 4 << 30  # of a file, and of its texts once unpacked
BLANK = codecs.BOM_UTF8 + b" \t\r\n\f\v"
WHOLE_ROW = "whole_row"  # the key under which write_problems keeps Problem.row
MAX_SHOWN = 300  # characters of a file's content in an error
TOO_LARGE = "holds a number of too many digits, or too deep a nesting"
HUB_ID = re.compile(r"(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)(:(?P<split>[\w./-]+))?")


class DataError(UserError):
    """A fault in the data; the message says what, where and how to fix it."""


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
    "problem": ("problem", "question", "prompt", "messages"),
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
OTHER_FORMS = re.compile(r"Answer:|####|<answer>")  # where the answers of DAPO, GSM8K and R1-Zero stand
LOOKED_AT = 1000  # rows that decide how a file's answers are written


# ---- reading and writing -------------------------------------------------------------------------


def read_problems(
    source: str | Path, on_bad_row: str = "stop", rewarded: bool = False, columns: Columns = Columns()
) -> list[Problem]:
    """Read a local file or folder, or a Hugging Face dataset; ":split" may follow a folder and "owner/name".

    on_bad_row: "stop" raises for unusable rows; "skip" leaves them out and prints how many; "keep" keeps problems
    without an answer (an evaluation may have to count them), prints how many, and stops at other faults. Of rows with
    the same id and text only the first is kept, and the count is printed; problems with one text and different answers
    count as without an answer. Ids begin with the file's stem (the folder's, the dataset's name), so that sources can
    be mixed. `rewarded` is for a reward function: rows are kept whole, and need no answer. `columns` names columns that
    KNOWN_COLUMNS lacks. Raises DataError.
    """
    if on_bad_row not in ("stop", "skip", "keep"):
        raise DataError(f'on_bad_row is {on_bad_row!r}; it must be "stop", "skip" or "keep".')
    stem, files = find_files(source)
    rows = chain.from_iterable(read_file(file, stem, on_bad_row, rewarded, columns) for file in files)
    problems, repeated, disputed = settle(rows, stem, on_bad_row == "keep", rewarded)
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

    Raises DataError with the row's number. `has_chats` says whether a file holds chats.
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
    """Return whether the first row of a local file or folder has `messages`."""
    path = Path(str(source).partition(":")[0])
    _, row = next(rows_of(find_files(source)[1][0]), (0, {})) if path.exists() else (0, {})
    return isinstance(row, dict) and "messages" in row


def first_names(names: Sequence[str], most: int = 20) -> str:
    """Return names for a sentence, the first ones of many."""
    return ", ".join(names[:most]) + f" and {len(names) - most:,} more" * (len(names) > most)


def find_files(source: str | Path) -> tuple[str, list[Path]]:
    """Return the name of a source, and its files: one file, those of a folder, or those of a hub dataset."""
    path, hub_id = Path(source), HUB_ID.fullmatch(str(source))
    place, _, split = str(source).partition(":")
    folder = path if path.is_dir() else Path(place)
    if folder.is_dir():
        inside = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
        names = [str(name) for name in inside if not any(part.startswith(".") for part in name.parts)]
        if any(name.endswith(DATA_FILES) for name in names):
            return folder.resolve().name, [folder / name for name in split_files(names, place, split)]
    if hub_id and not path.name.endswith(DATA_FILES) and not path.parent.is_dir():
        return hub_id["name"], download(f"{hub_id['owner']}/{hub_id['name']}", hub_id["split"] or "")
    return data_name(path), [existing_file(path)]


def data_name(source: str | Path) -> str:
    """Return the name of a file, a folder or a hub id without folders, split and ending."""
    return Path(str(source).partition(":")[0].removesuffix(".gz")).stem


def split_files(names: Iterable[str], source: str, split: str) -> list[str]:
    """Return the data files of a split (default: train if it exists, else all), of the names in a folder or on the hub.

    Prints what it leaves out by default.
    """
    data = sorted(n for n in names if n.endswith(DATA_FILES) and not n.endswith(NOT_DATA))
    of_split = [n for n in data if re.search(rf"(^|[/_-]){re.escape(split or 'train')}([-_./]|$)", n)]
    chosen = of_split or ([] if split else data)
    if not chosen:
        found = first_names(data) or "none"
        raise DataError(f"the dataset {source} has no data file for {split or 'any split'}; it has: {found}.")
    if not split and (others := [name for name in data if name not in chosen]):
        what = f"reads its split train; {source}:SPLIT reads another, of {first_names(others, 5)}"
        print(f"{source}: {what}", file=sys.stderr)
    return chosen


def existing_file(path: Path) -> Path:
    """Return the path, or raise DataError with the nearest name in its folder if there is no such data file."""
    if path.is_file() and path.name.endswith(DATA_FILES):
        return path
    kinds = ", ".join(DATA_FILES)
    if path.is_file():
        raise DataError(f"{path} is not one of {kinds}; convert it to one of these.")
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise DataError(f"{path} cannot be read: the folder {folder} does not exist; check the path.")
    names = sorted(p.name for p in folder.iterdir() if p.name.endswith(DATA_FILES))
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.0)
    hint = f"did you mean {folder / near[0]}?" if near else f"{folder} holds no {kinds} file."
    raise DataError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; {hint}")


def download(repo: str, split: str) -> list[Path]:
    """Download the data files of a hub dataset that `split_files` selects."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        names = split_files(HfApi().list_repo_files(repo, repo_type="dataset"), repo, split)
        return [Path(hf_hub_download(repo, name, repo_type="dataset")) for name in names]
    except (HTTPError, OSError, ValueError) as error:
        why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise DataError(
            f"{repo} is not a local file and not available from the hub ({why}); check name and network."
        ) from error


def read_file(path: Path, stem: str, on_bad_row: str, rewarded: bool, columns: Columns) -> Iterator[Problem]:
    """Yield the usable rows of one file; the id is "stem/own id", or "" in a row without one."""
    rows = rows_of(path, None if rewarded else lambda names: find_columns(names, columns, path))
    head = list(islice(rows, LOOKED_AT))
    if not head:
        raise DataError(f"{path} holds no rows; add at least one problem.")
    names = dict.fromkeys(name for _, row in head if isinstance(row, dict) for name in row)
    found = find_columns(list(names), columns, path, rewarded) if names else dict.fromkeys(KNOWN_COLUMNS, ())
    worked = is_worked(found["answer"], [row for _, row in head if isinstance(row, dict)])
    own = found["problem"][:1] == ("problem",) and found["answer"][:1] == ("answers",)
    usable, bad, examples = 0, Counter(), []
    for number, row in chain(head, rows):
        problem, reason = problem_of(row, found, worked) if isinstance(row, dict) else (None, row)
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


def rows_of(path: Path, choose: Callable[[list[str]], dict] | None = None) -> Iterator[tuple[int, dict | str]]:
    """Yield (row number from 1, row) of a file; an unusable row is a string that says what is wrong with it.

    `choose` returns which of a parquet file's columns are needed, as `find_columns` does; default: all.
    """
    if path.stat().st_size > MOST_BYTES:
        raise too_large(path)
    kind = Path(path.name.removesuffix(".gz")).suffix
    rows = parquet_rows(path, choose) if kind == ".parquet" else csv_rows(path) if kind == ".csv" else json_rows(path)
    for number, row in rows:
        if number > MOST_ROWS:
            raise too_large(path)
        yield number, row


def too_large(path: Path) -> DataError:
    """Return the error of a file whose rows do not belong into memory all at once, whatever its size on disk."""
    return DataError(
        f"{path} holds more than {MOST_ROWS:,} rows or entries of lists, or {MOST_BYTES >> 30} GiB once unpacked; keep "
        "the rows and columns that a run needs, or split it into several files."
    )


def parquet_rows(path: Path, choose: Callable[[list[str]], dict] | None) -> Iterator[tuple[int, dict]]:
    """Yield the numbered rows of a parquet file, after a look at what they unpack to."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
            names = file.schema_arrow.names
            if choose is not None:
                found = {name for names in choose(names).values() for name in names}
                names = [name for name in names if any(f"{other}.".startswith(f"{name}.") for other in found)]
            columns = [c for c in range(file.metadata.num_columns)
                       if any(f"{file.schema.column(c).path}.".startswith(f"{name}.") for name in names)]  # fmt: skip
            values = [sum(group.column(c).num_values for group in groups) for c in columns]
            sizes = [group.column(c).total_uncompressed_size for group in groups for c in columns]
            if max([file.metadata.num_rows, *values]) > MOST_ROWS or sum(sizes) > MOST_BYTES:
                raise too_large(path)
            # a text that many rows share is stored, and counted so far, once
            texts = [leaf.path for leaf in map(file.schema.column, columns) if leaf.physical_type == "BYTE_ARRAY"]
            with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as shared:
                try:
                    require_bounded(path, shared.iter_batches(columns=names))
                except pyarrow.ArrowNotImplementedError:  # a nested text with a dictionary in each row group
                    size = MOST_BYTES // max(1, *sizes)  # rows of which each may be as long as all that is stored
                    require_bounded(path, file.iter_batches(max(1, min(size, 1024)), columns=names))
            rows = (row for batch in file.iter_batches(batch_size=1024, columns=names) for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{path} is not a readable parquet file ({reason}); download it again (git lfs pull in a cloned one)."
        ) from error


def require_bounded(path: Path, batches: Iterable) -> None:
    """Raise DataError if the texts of Arrow batches, unpacked, exceed MOST_BYTES."""
    unpacked = 0
    for batch in batches:
        unpacked += sum(map(unpacked_bytes, batch.columns))
        if unpacked > MOST_BYTES:
            raise too_large(path)


def unpacked_bytes(column) -> int:
    """Return the bytes of an Arrow array's values, each counted as often as it occurs."""
    import pyarrow
    import pyarrow.compute

    if pyarrow.types.is_dictionary(column.type):
        lengths = pyarrow.compute.binary_length(column.dictionary)
        return pyarrow.compute.sum(lengths.take(column.indices).cast("int64")).as_py() or 0
    if pyarrow.types.is_nested(column.type):
        inner = column.flatten()  # a struct's fields, or a list's entries
        return sum(map(unpacked_bytes, inner if isinstance(inner, list) else [inner]))
    return column.nbytes


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, unpacked if its name ends in .gz."""
    left = MOST_BYTES
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(left + 1):
                left -= len(line)
                if left < 0:
                    raise too_large(path)
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a complete gzip file ({str(error).rstrip('.')}); download it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from error


def decoded(path: Path, data: bytes, start: int = 0) -> str:
    """Decode UTF-8 that begins at byte `start` of a file, with or without a byte order mark."""
    try:
        return data.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        where = start + error.start
        raise DataError(f"{path} is not UTF-8 text (at byte {where}); convert it to UTF-8.") from error


def csv_rows(path: Path) -> Iterator[tuple[int, dict | str]]:
    """Yield the rows of a table with commas, whose first line names the columns."""
    csv.field_size_limit(MOST_BYTES)
    reader = csv.DictReader(map(partial(decoded, path), lines_of(path)), strict=True)
    try:
        for number, row in enumerate(reader, start=1):
            yield number, "has more fields than the first line has" if None in row else row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is malformed CSV ({error}); fix that line.") from error


def json_rows(path: Path) -> Iterator[tuple[int, dict | str]]:
    """Yield the rows of JSON lines, of a JSON array, or of the only array in a JSON object."""
    start, begun = 0, False
    # a file's lines, not splitlines(): a JSON string may contain U+2028
    for number, line in enumerate(lines_of(path), start=1):
        start, stripped = start + len(line), line.strip(BLANK)
        if not stripped:
            continue
        if not begun and (stripped.startswith(b"[") or not stripped.endswith(b"}")):
            text = decoded(path, b"".join(lines_of(path)))
            try:
                rows = json.loads(text)
                rows = rows if isinstance(rows, list) else wrapped_rows(rows) or [rows]
                yield from enumerate((checked_row(row, "\\u" in text) for row in rows), start=1)
                return
            except json.JSONDecodeError as error:
                if stripped.startswith(b"["):
                    what = f"line {error.lineno} is malformed JSON ({error.msg})"
                    raise DataError(f"{path}, {what}; fix that line.") from error
            except (ValueError, RecursionError):  # a number or a nesting that Python refuses
                raise DataError(f"{path} {TOO_LARGE}; fix the file.") from None
        text = decoded(path, line, start - len(line))
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            row = f"is malformed JSON ({error.msg}, column {error.colno})"
        except (ValueError, RecursionError):
            row = TOO_LARGE
        else:
            row = checked_row(row, "\\u" in text)
        inner = None if begun else wrapped_rows(row)
        yield from enumerate((checked_row(row, "\\u" in text) for row in inner), 1) if inner else [(number, row)]
        begun = True


def wrapped_rows(found: object) -> list | None:
    """Return the rows of {"data": [...]}: of an object's only list of objects that are not a chat's messages."""
    values = found.values() if isinstance(found, dict) else ()
    lists = [value for value in values if isinstance(value, list) and value and isinstance(value[0], dict)]
    return lists[0] if len(lists) == 1 and not {"role", "from", "type"} & lists[0][0].keys() else None


def checked_row(row: object, escaped: bool) -> dict | str:
    """Return the row, or what is wrong with it. Only text with \\u escapes can hold half of a surrogate pair."""
    if not isinstance(row, dict):
        return "is not a JSON object"
    try:
        if escaped:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a pair can be neither written nor tokenized
        return "holds half of a surrogate pair"
    return row


# ---- columns: row -> Problem with the row's own id, or "" ----------------------------------------


def find_columns(
    names: Sequence[str], columns: Columns, path: Path, rewarded: bool = False
) -> dict[str, tuple[str, ...]]:
    """Return which of a file's columns hold each field of Columns, best first.

    Raises DataError with the file's columns if none holds the problem or, unless `rewarded`, the answer.
    """
    held = {re.sub(r"[\W_]+", "_", name.strip().casefold()): name for name in reversed(names)}
    found = {}
    for name, known in KNOWN_COLUMNS.items():
        given, paths = getattr(columns, name), [column.partition(".") for column in known]
        found[name] = (given,) if given else tuple(held[a] + dot + b for a, dot, b in paths if a in held)
    missing = [name for name in ("problem", "answer")[: 2 - rewarded] if not found[name]]
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
    return end.replace(",", "") if mark else "" if worked else text


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
    problems: Iterable[Problem], stem: str, keep: bool, rewarded: bool
) -> tuple[list[Problem], list[str], list[tuple[Problem, Problem]]]:
    """Return problems with unique ids, the ids of duplicates left out, and pairs of one text with different answers.

    A hash of the text replaces an id that is missing or that several texts share. A disputed text is left out, or one
    of it is kept without an answer; a reward function needs none, so that it disputes nothing.
    """
    of_text: dict[int, list[Problem]] = {}  # with distinct ids
    order, copies, disputed = [], [], {}
    for problem in problems:
        same = of_text.setdefault(key := text_key(problem.text), [])
        if (
            not rewarded
            and same
            and problem.answers
            and same[0].answers
            and not agree(same[0].answers, problem.answers)
        ):
            disputed.setdefault(key, (same[0], problem))
        elif any(other.id == problem.id for other in same):
            copies.append(problem)
        else:
            same.append(problem)
            order.append(problem)
    count, settled = Counter(problem.id for problem in order), {}

    def with_id(problem: Problem) -> Problem:
        shared = not problem.id or count[problem.id] > 1
        return replace(problem, id=f"{stem}/{text_key(problem.text):016x}") if shared else problem

    for problem in order:
        dispute = disputed and disputed.get(text_key(problem.text))
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
    """Return 64 bits that copies of a text share."""
    return int.from_bytes(hashlib.sha256(normalised(text).encode()).digest()[:8])


def agree(answers: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether two ground truths share an answer, as texts or as numbers."""
    return any(text_verdict(answer, others)[0] == "right" for answer in answers)


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
    held_out: dict[str, Problem] = {}
    for problem in benchmark:
        held_out.setdefault(normalised(problem.text), problem)
    pairs = [(problem, held_out.get(normalised(problem.text))) for problem in train]
    return [(problem, copy) for problem, copy in pairs if copy is not None]
