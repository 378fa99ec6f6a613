"""Fingerprints of what a run depends on in addition to its checkpoint: model, data, code and recipe."""

import hashlib
import json
import subprocess
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from lab.problems import DataError, Problem

IDENTITY_BYTES = 2**20  # hashed at each end of a file: the start of a weights file holds its header


def data_identity(rows: Iterable[Problem | list[dict]]) -> str:
    """Hash problems (ids, texts, answers, solutions) or chats, in their order."""
    found = hashlib.blake2b(digest_size=8)
    for row in rows:
        found.update(json.dumps(vars(row) if isinstance(row, Problem) else row).encode())
    return found.hexdigest()


def model_identity(folder: Path) -> str:
    """Hash the files of a model folder: name, size, and the first and last MiB.

    Tells models and their fine-tunes apart within a second, but misses a change in the middle of a large file.
    """
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        found.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            found.update(file.read(IDENTITY_BYTES))
            file.seek(max(0, size - IDENTITY_BYTES))
            found.update(file.read())
    return found.hexdigest()


def code_version(folder: Path) -> str:
    """Hash the code's files, which may differ from the commit; the commit is appended for people to read."""
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(path for pattern in ("*.py", "engine/*.py", "lab/*.py") for path in folder.glob(pattern)):
        found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return f"{found.hexdigest()}, torch {torch.__version__}, commit {git_commit(folder)[:8]}"


def git_commit(folder: Path) -> str:
    """Return the git commit of a folder, "unknown" without git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def differences(then: dict[str, str], now: dict[str, str], chosen: Sequence[str] = ()) -> list[str]:
    """Describe the differences between two fingerprints; `chosen` are recipe keys that were changed on purpose.

    A fingerprint has "recipe" (TOML), "model", "code" and "data SOURCE" for each source. Commits are not compared.
    """
    found = []
    values = [dict(_flat(tomllib.loads(fingerprint.get("recipe", "")))) for fingerprint in (then, now)]
    for key in sorted(values[0].keys() | values[1].keys()):
        old, new = (table.get(key) for table in values)
        if old != new and not any(f"{key}.".startswith(f"{name}.") for name in chosen):
            found.append(f"recipe: {key} was {old!r}, is {new!r}")
    for name in sorted((then.keys() & now.keys()) - {"recipe"}):
        if then[name].partition(", commit")[0] != now[name].partition(", commit")[0]:
            found.append(f"{name} was {then[name]}, is {now[name]}")
    return found


def _flat(table: dict | list, where: str = "") -> Iterable[tuple[str, object]]:
    """Yield the dotted names, as --set has them, and the values."""
    for key, value in table.items() if isinstance(table, dict) else enumerate(table):
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def require_same(path: Path, held: dict | None, wanted: dict) -> None:
    """Raise DataError unless a file or folder that was made with the settings `held` has all that are wanted."""
    if held is None:
        raise DataError(
            f"{path} does not say in its first line which model and problems it was made with; move it away and "
            f"estimate again"
        )
    for name, value in wanted.items():
        if held.get(name) != value:
            raise DataError(
                f"{path} was made with {name} = {held.get(name)}, not {value}: use the same setting, or give "
                f"another name"
            )
