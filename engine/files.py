"""Files that are whole or not there, and JSON lines whose last one may have been cut off."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write under another name, renamed when it is on disk: the path holds the old bytes or all new ones."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a whole file, or none."""
    with atomic_file(path) as file:
        file.writelines(chunks)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk: a rename that the machine's end must not undo."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems cannot do it for folders, and need not
        pass
    finally:
        os.close(descriptor)


def read_jsonl(path: Path) -> Iterator[tuple[int, bytes, object]]:
    """(line number from 1, line, its value) of each line; a last line without its line end is dropped, on stderr.

    Raises ValueError "PATH, line N: REASON" where a whole line is not JSON.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                print(f"{path}: dropped 1 half-written last line (line {number})", file=sys.stderr)
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {str(error)[:200]}") from None
            yield number, line, row
