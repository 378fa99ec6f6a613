"""Problems: read them from the common formats, write them, and find copies of the same one."""

import codecs
import difflib
import hashlib
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError
from engine.files import write_atomically

INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
DATA_FILES = (".parquet", ".jsonl", ".json")
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


# ---- reading and writing -------------------------------------------------------------------------


def read_problems(source: str | Path, on_bad_row: str = "stop", rewarded: bool = False) -> list[Problem]:
    """Read a local .parquet, .json or .jsonl file, or a Hugging Face dataset "owner/name[:split]".

    on_bad_row: "stop" raises at the first unusable row; "skip" leaves such rows out and prints how many; "keep" keeps
    problems without an answer (an evaluation may have to count them), prints how many, and stops at other faults. Of
    rows with the same id and text only the first is kept, and the count is printed. Ids begin with the file's stem (the
    dataset's name), so that sources can be mixed. `rewarded` is for a reward function: rows are kept whole, and need no
    answer. Raises DataError.
    """
    if on_bad_row not in ("stop", "skip", "keep"):
        raise DataError(f'on_bad_row is {on_bad_row!r}; it must be "stop", "skip" or "keep".')
    path, hub_id = Path(source), HUB_ID.fullmatch(str(source))
    if hub_id and path.suffix not in DATA_FILES and not path.parent.is_dir():
        stem, files = hub_id["name"], download(f"{hub_id['owner']}/{hub_id['name']}", hub_id["split"])
    else:
        stem, files = path.stem, [existing_file(path)]
    problems, repeated = settle_ids([p for file in files for p in read_file(file, stem, on_bad_row, rewarded)], stem)
    if repeated:
        print(f"{source}: left out {len(repeated)} duplicate rows (first: {repeated[0]})", file=sys.stderr)
    return problems


def read_chats(source: str | Path) -> list[list[dict]]:
    """Read fine-tuning chats: rows whose `messages` have a role and a content, and end with the assistant's.

    Raises DataError with the row's number. `has_chats` says whether a file holds chats.
    """
    path, chats = existing_file(Path(source)), []
    for number, row in rows_of(path):
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
    """Return whether a local file's first row has `messages`."""
    path = Path(source)
    _, row = next(iter(rows_of(path)), (0, {})) if path.is_file() else (0, {})
    return isinstance(row, dict) and "messages" in row


def first_names(names: Sequence[str], most: int = 20) -> str:
    """Return names for a sentence, the first ones of many."""
    return ", ".join(names[:most]) + f" and {len(names) - most:,} more" * (len(names) > most)


def existing_file(path: Path) -> Path:
    """Return the path, or raise DataError with the nearest name in its folder if there is no such data file."""
    if path.is_file() and path.suffix in DATA_FILES:
        return path
    kinds = ", ".join(DATA_FILES)
    if path.is_file():
        raise DataError(f"{path} is not one of {kinds}; convert it to one of these.")
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise DataError(f"{path} cannot be read: the folder {folder} does not exist; check the path.")
    names = sorted(p.name for p in folder.iterdir() if p.suffix in DATA_FILES)
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.0)
    hint = f"did you mean {folder / near[0]}?" if near else f"{folder} holds no {kinds} file."
    raise DataError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; {hint}")


def download(repo: str, split: str | None) -> list[Path]:
    """Download the data files of a hub dataset: those of the split (default: train if it exists, else all)."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        names = HfApi().list_repo_files(repo, repo_type="dataset")
        data = sorted(n for n in names if n.endswith(DATA_FILES) and not n.endswith("dataset_infos.json"))
        of_split = [n for n in data if re.search(rf"(^|[/_-]){re.escape(split or 'train')}([-_./]|$)", n)]
        chosen = of_split or ([] if split else data)
        if not chosen:
            found = ", ".join(data) or "none"
            raise DataError(f"the dataset {repo} has no data file for {split or 'any split'}; it has: {found}.")
        return [Path(hf_hub_download(repo, name, repo_type="dataset")) for name in chosen]
    except (HTTPError, OSError, ValueError) as error:
        why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise DataError(
            f"{repo} is not a local file and not available from the hub ({why}); check name and network."
        ) from error


def read_file(path: Path, stem: str, on_bad_row: str, rewarded: bool = False) -> list[Problem]:
    """Read the usable rows of one file; the id is "stem/own id", or "" in a row without one."""
    rows = list(rows_of(path))
    if not rows:
        raise DataError(f"{path} holds no rows; add at least one problem.")
    schema = schema_of([row for _, row in rows if isinstance(row, dict)], path, rewarded)
    problems, bad = [], []
    for number, row in rows:
        problem = problem_of(row, schema) if isinstance(row, dict) else None
        if problem and rewarded:
            problem = replace(problem, row=row.get(WHOLE_ROW, row))
        reason = fault(problem, rewarded) if problem else row
        kept = on_bad_row == "keep" and problem is not None and problem.text.strip()
        if reason and not kept and on_bad_row != "skip":
            raise DataError(f'{path}, row {number} {reason}; fix the row, or read with on_bad_row="skip".')
        if reason:
            bad.append(f"row {number} {reason}")
        if reason and not kept:
            continue
        # write_problems wrote an id that already names its source: keep it
        settled = not problem.id or (schema.name == "own" and "/" in problem.id)
        problems.append(problem if settled else replace(problem, id=f"{stem}/{problem.id}"))
    if not problems:
        raise DataError(f"{path} holds no usable row: {bad[0]}, and {len(bad)} bad rows in all; fix the file.")
    if bad:
        what = "kept, as problems that nothing can solve," if on_bad_row == "keep" else "left out"
        examples = ", ".join(bad[:5]) + ", ..." * (len(bad) > 5)
        print(f"{path}: {what} {len(bad)} unusable rows ({examples})", file=sys.stderr)
    return problems


def rows_of(path: Path) -> Iterator[tuple[int, dict | str]]:
    """Yield (row number from 1, row) of a file; an unusable row is a string that says what is wrong with it."""
    if path.stat().st_size > MOST_BYTES:
        raise too_large(path)
    for number, row in parquet_rows(path) if path.suffix == ".parquet" else json_rows(path):
        if number > MOST_ROWS:
            raise too_large(path)
        yield number, row


def too_large(path: Path) -> DataError:
    """Return the error of a file whose rows do not belong into memory all at once, whatever its size on disk."""
    return DataError(
        f"{path} holds more than {MOST_ROWS:,} rows or entries of lists, or {MOST_BYTES >> 30} GiB once unpacked; keep "
        "the rows and columns that a run needs, or split it into several files."
    )


def parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield the numbered rows of a parquet file, after a look at what they unpack to."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
            columns = range(file.metadata.num_columns)
            values = [sum(group.column(c).num_values for group in groups) for c in columns]
            if (
                max([file.metadata.num_rows, *values]) > MOST_ROWS
                or sum(g.total_byte_size for g in groups) > MOST_BYTES
            ):
                raise too_large(path)
            # a text that many rows share is stored, and counted so far, once
            texts = [leaf.path for leaf in map(file.schema.column, columns) if leaf.physical_type == "BYTE_ARRAY"]
            with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as shared:
                try:
                    require_bounded(path, shared.iter_batches())
                except pyarrow.ArrowNotImplementedError:  # nested texts with a dictionary in each of many row groups
                    largest = max(group.total_byte_size for group in groups)  # that one row may hold again and again
                    require_bounded(path, file.iter_batches(max(1, min(1024, MOST_BYTES // max(1, largest)))))
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} is not a readable parquet file ({reason}); download it again.") from error


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


def json_rows(path: Path) -> Iterator[tuple[int, dict | str]]:
    """Yield the rows of a JSON array or of JSON lines."""
    try:
        with path.open("rb") as file:
            if next(filter(None, (line.strip(BLANK) for line in file)), b"").startswith(b"["):
                text = path.read_text(encoding="utf-8-sig")
                yield from enumerate((checked_row(row, "\\u" in text) for row in json.loads(text)), start=1)
                return
            file.seek(0)
            # a file's lines, not splitlines(): a JSON string may contain U+2028
            for number, line in enumerate(file, start=1):
                if not line.strip(BLANK):
                    continue
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    yield number, checked_row(json.loads(text), "\\u" in text)
                except json.JSONDecodeError as error:
                    yield number, f"is malformed JSON ({error.msg}, column {error.colno})"
                except UnicodeDecodeError as error:
                    error.start += file.tell() - len(line)
                    raise
                except (ValueError, RecursionError):
                    yield number, TOO_LARGE
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno} is malformed JSON ({error.msg}); fix that line.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (at byte {error.start}); convert it to UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from error
    except (ValueError, RecursionError):  # a number or a nesting that Python refuses
        raise DataError(f"{path} {TOO_LARGE}; fix the file.") from None


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


# ---- schemas: row -> Problem with the row's own id, or "" ----------------------------------------


class Schema(NamedTuple):
    """The columns that hold a Problem; the text and answers columns identify the schema."""

    name: str
    text: str
    answers: str
    ids: tuple[str, ...]  # the first one present counts


SCHEMAS = (
    Schema("own", "problem", "answers", ("id",)),  # written by write_problems
    Schema("verl", "prompt", "reward_model", ("index", "id")),  # also POLARIS: messages; ids are in extra_info
    Schema("math", "problem", "answer", ("id", "unique_id")),  # also DeepScaleR
    Schema("olympiad", "question", "final_answer", ("id",)),  # a list of accepted answers
    Schema("minerva", "question", "answer", ("id",)),  # or "gsm8k": steps with marks (<<48/2=24>>), then "#### 1,080"
)


def schema_of(rows: Sequence[dict], path: Path, rewarded: bool = False) -> Schema:
    """Return the schema of these rows, or raise DataError with their columns."""
    first = rows[0] if rows else {}
    for schema in SCHEMAS:
        if first.keys() >= {schema.text, schema.answers} or not first:
            # one "####" makes it a GSM8K file, in which a row without the mark has no answer
            marked = schema.name == "minerva" and any("####" in as_text(row.get("answer")) for row in rows)
            return schema._replace(name="gsm8k") if marked else schema
    for schema in SCHEMAS if rewarded else ():
        if schema.text in first:
            return schema
    known = ", or ".join(f"{schema.text} + {schema.answers}" for schema in SCHEMAS)
    columns = ", ".join(name if name.isprintable() else repr(name) for name in first)[:MAX_SHOWN] or "none"
    raise DataError(f"{path} has the columns {columns}, which is no known schema; rename them to {known}.")


def problem_of(row: dict, schema: Schema) -> Problem:
    """Make a Problem from a row; missing fields stay empty."""
    text, answers, solution, ids = row.get(schema.text), row.get(schema.answers), row.get("solution"), row
    if schema.name == "verl":
        # the chat template writes its own system message; a problem with earlier turns is unusable
        messages = [m for m in text if isinstance(m, dict)] if isinstance(text, list) else []
        turns = [message_text(m.get("content")) for m in messages if m.get("role") != "system"]
        text = turns[0] if len(turns) == 1 else None
        answers = answers.get("ground_truth") if isinstance(answers, dict) else None
        ids = row["extra_info"] if isinstance(row.get("extra_info"), dict) else {}
    elif schema.name == "gsm8k":
        steps, _, answers = as_text(answers).partition("####")
        answers = answers.strip().replace(",", "")
        solution = re.sub(r"<<[^<>]*>>", "", steps).strip() + f"\nThe final answer is \\boxed{{{answers}}}."
    return Problem(
        id=as_text(next((ids[column] for column in schema.ids if ids.get(column) is not None), None)),
        text=text if isinstance(text, str) else "",
        answers=accepted_answers(answers),
        type=as_text(row.get("type")) or as_text(row.get("subject")),
        difficulty=as_number(row["difficulty"] if row.get("difficulty") is not None else row.get("level")),
        solution=solution.strip() if isinstance(solution, str) else "",
    )


def as_text(value) -> str:
    """Return a string or a number as text; anything else, and nan (a missing value of a table), is ""."""
    return str(value) if isinstance(value, str | int | float | Decimal) and value == value else ""


def accepted_answers(value) -> tuple[str, ...]:
    """Return the distinct answers that a ground truth accepts; () if it has none."""
    if isinstance(value, str) and value.startswith('["'):  # only strings: "[-9, 9]" is a closed interval
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass  # an answer that happens to begin like a list
    values = value if isinstance(value, list) else [value]
    # nan, infinity, lists and mappings are not answers
    values = [v for v in values if isinstance(v, str | int | Decimal) or (isinstance(v, float) and math.isfinite(v))]
    return tuple(dict.fromkeys(filter(None, (str(v).strip() for v in values))))


def as_number(value) -> float | None:
    """Return a difficulty as a number ("3/8" in POLARIS is 0.375, "Level 5" in MATH is 5), or None."""
    if type(value) in (int, float):
        return float(value) if abs(value) < 1e300 else None  # neither nan nor infinite
    match = re.fullmatch(r"(?:Level )?(-?\d+(?:\.\d+)?)(?:/([1-9]\d*))?", as_text(value))
    number = float(match[1]) / float(match[2] or 1) if match else math.inf
    return number if math.isfinite(number) else None


def fault(problem: Problem, rewarded: bool = False) -> str:
    """Say what makes a problem unusable; "" if nothing does."""
    if not problem.text.strip():
        return "has no problem text"
    return "" if problem.answers or rewarded else "has no answer"


def settle_ids(problems: list[Problem], stem: str) -> tuple[list[Problem], list[str]]:
    """Return problems with unique ids, and the ids of the duplicates left out.

    A hash of the text replaces an id that is missing or that several texts share.
    """
    keys = [normalised(p.text) for p in problems]
    texts = defaultdict(set)
    for problem, key in zip(problems, keys, strict=True):
        texts[problem.id].add(key)
    unique, repeated = {}, []
    for problem, key in zip(problems, keys, strict=True):
        if not problem.id or len(texts[problem.id]) > 1:
            problem = replace(problem, id=f"{stem}/{hashlib.sha256(key.encode()).hexdigest()[:16]}")
        if problem.id in unique:
            repeated.append(problem.id)
        else:
            unique[problem.id] = problem
    return list(unique.values()), repeated


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
