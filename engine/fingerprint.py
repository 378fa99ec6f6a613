"""What a run depends on beside its checkpoint: the identity of model, data, code and recipe."""

import hashlib
import json
import subprocess
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from lab.problems import DataError, Problem

IDENTITY_BYTES = 2**20  # of a weights file's beginning (its header, and the first tensors) and end, to know it by


def data_identity(rows: Iterable[Problem | list[dict]]) -> str:
    """A hash of problems (ids, texts, answers, solutions) or chats, in their order."""
    found = hashlib.blake2b(digest_size=8)
    for row in rows:
        found.update(json.dumps(vars(row) if isinstance(row, Problem) else row).encode())
    return found.hexdigest()


def model_identity(folder: Path) -> str:
    """A hash of a model folder: names and sizes, small files whole, of larger ones the first and the last MiB.

    Enough to tell models and their fine-tunes apart within a second; a change in the middle of a file is missed.
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
    """A hash of the program's files (a commit says nothing of what was edited since), with the commit for people."""
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(path for pattern in ("*.py", "engine/*.py", "lab/*.py") for path in folder.glob(pattern)):
        found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return f"{found.hexdigest()}, torch {torch.__version__}, commit {git_commit(folder)[:8]}"


def git_commit(folder: Path) -> str:
    """The commit that a folder is at; "unknown" without git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def differences(then: dict[str, str], now: dict[str, str], chosen: Sequence[str] = ()) -> list[str]:
    """What differs between two fingerprints, a few words each; `chosen` are recipe keys that were changed on purpose.

    A fingerprint holds "recipe" (TOML), "model", "code" and a "data SOURCE" for each. Commits are not compared.
    """
    found = []
    values = [dict(_flat(tomllib.loads(fingerprint.get("recipe", "")))) for fingerprint in (then, now)]
    for key in sorted(values[0].keys() | values[1].keys()):
        old, new = (of.get(key) for of in values)
        if old != new and not any(f"{key}.".startswith(f"{name}.") for name in chosen):
            found.append(f"recipe: {key} was {old!r}, is {new!r}")
    for name in sorted((then.keys() & now.keys()) - {"recipe"}):
        if then[name].partition(", commit")[0] != now[name].partition(", commit")[0]:
            found.append(f"{name} was {then[name]}, is {now[name]}")
    return found


def _flat(table: dict | list, where: str = "") -> Iterable[tuple[str, object]]:
    """Dotted names and values, as --set names them."""
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
                f"{path} was made with {name} = {held.get(name)}, not {value}: use the settings that it was made with, "
                f"or give another name"
            )
