"""Data files as they are: JSON, JSON lines, CSV and parquet, packed or not; one, a folder of them, or of the hub.

Rows are streamed; a file is refused where it is malformed, or where it unpacks to more than memory holds.
"""

import codecs
import csv
import difflib
import gzip
import json
import pickle
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from engine.errors import UserError, first_names

DATA_FILES = (".parquet", ".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
NOT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")  # beside data
MOST_ROWS = 10_000_000  # of a file, and entries of its lists
MOST_BYTES = 4 << 30  # of a file, and of its texts once unpacked
BLANK = codecs.BOM_UTF8 + b" \t\r\n\f\v"
TOO_LARGE = "holds a number of too many digits, or too deep a nesting"
PROBLEM_COLUMNS = ("problem", "question", "prompt", "messages")  # in any case
HUB_ID = re.compile(r"(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)(:(?P<split>[\w./-]+))?")


class DataError(UserError):
    """A fault in the data; the message says what, where and how to fix it."""


# ---- where: a file, a folder or the hub ------------------------------------------------------------


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


# ---- what: the rows of one file --------------------------------------------------------------------


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
    """Yield the numbered rows of a parquet file, until they unpack to more than MOST_BYTES."""
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
            # a text that many rows share is stored once: each row of a batch may be as long as all that is stored
            size, number, left = MOST_BYTES // max([1, *sizes]), 0, MOST_BYTES
            for batch in file.iter_batches(max(1, min(size, 1024)), columns=names):
                rows = batch.to_pylist()
                left -= len(pickle.dumps(rows))  # each text as often as it occurs
                if left < 0:
                    raise too_large(path)
                yield from enumerate(rows, start=number + 1)
                number += len(rows)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{path} is not a readable parquet file ({reason}); download it again (git lfs pull in a cloned one)."
        ) from error


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


def decoded_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file of UTF-8 text."""
    start = 0
    for line in lines_of(path):
        yield decoded(path, line, start)
        start += len(line)


def csv_rows(path: Path) -> Iterator[tuple[int, dict | str]]:
    """Yield the rows of a table with commas, whose first line names the columns."""
    csv.field_size_limit(MOST_BYTES)
    reader = csv.DictReader(decoded_lines(path), strict=True)
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
        if inner and len([*islice((other for other in lines_of(path) if other.strip(BLANK)), 2)]) > 1:
            inner = None  # the first of several rows
        yield from enumerate((checked_row(row, "\\u" in text) for row in inner), 1) if inner else [(number, row)]
        begun = True


def wrapped_rows(found: object) -> list | None:
    """Return the rows of {"data": [...]}: the only list of objects in an object that is itself no problem or chat."""
    values = found.values() if isinstance(found, dict) and not has_problem(found) else ()
    lists = [value for value in values if isinstance(value, list) and value and isinstance(value[0], dict)]
    is_chat = len(lists) == 1 and {"role", "from", "type"} & lists[0][0].keys() and not has_problem(lists[0][0])
    return lists[0] if len(lists) == 1 and not is_chat else None


def has_problem(row: dict) -> bool:
    """Return whether a row has a column that is known to hold a problem."""
    return any(name.strip().casefold() in PROBLEM_COLUMNS for name in row)


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
