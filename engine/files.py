"""Write files atomically; sum them; read JSON lines whose last line may be cut off."""

import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

CHECKSUM_BLOCK = 2**26  # bytes that one thread reads, in chunks
CHUNK = 2**20


@contextmanager
def writing(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Name the path in an OSError of writing it, and remove what was written so far: it may fill the disk.

    What safetensors and tokenizers raise for an error of the system becomes an OSError as well.
    """
    try:
        yield
    except Exception as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        theirs = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else theirs and int(theirs[1])
        if not number or getattr(error, "filename", None):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write under another name, renamed when it is on disk: the path holds the old bytes or all new ones."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path, temporary):
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
    """Flush a folder's entries to disk, so that a rename survives a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some file systems cannot sync folders, and need not
        os.fsync(descriptor)
    os.close(descriptor)


def checksum(path: Path) -> int:
    """Return the CRC-32 of the CRC-32s of a file's blocks."""

    def block_crc(start: int) -> bytes:
        crc = 0
        with path.open("rb") as file:
            file.seek(start)
            for _ in range(CHECKSUM_BLOCK // CHUNK):
                crc = zlib.crc32(file.read(CHUNK), crc)
        return crc.to_bytes(4, "little")

    with ThreadPoolExecutor(8) as threads:
        return zlib.crc32(b"".join(threads.map(block_crc, range(0, path.stat().st_size, CHECKSUM_BLOCK))))


def file_checksums(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Return each file's size in bytes and checksum, by name."""
    return {path.name: [path.stat().st_size, checksum(path)] for path in paths}


def read_jsonl(path: Path) -> Iterator[tuple[int, bytes, object]]:
    """Yield (line number from 1, line, value). A last line without a newline is dropped, with a note on stderr.

    Raises ValueError "PATH, line N: REASON" for a complete line that is not JSON.
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
