"""Fingerprints of what a run depends on in addition to its checkpoint: model, data, code and recipe."""

import hashlib
import json
import subprocess
import tomllib
from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from engine import adapter
from engine.errors import first_names
from engine.files import file_checksums
from engine.huggingface import ADAPTER_CONFIG, TOKENIZER_FILES, read_optional_json, resolve_folder, weight_files
from engine.own_function import read_function
from lab.data_files import DataError
from lab.problems import Problem
from lab.recipe import Recipe, to_toml
from rollout import Prompt

CHAT_TEMPLATE = "chat_template.jinja"
OTHER_PARTS = ("tokenizer_config.json", "generation_config.json", CHAT_TEMPLATE)  # of TOKENIZER_FILES


def data_identity(rows: Iterable[Problem | list[dict]]) -> str:
    """Hash problems (ids, texts, answers, solutions, rows where they are kept) or chats, in their order."""
    problems = (
        {k: v for k, v in vars(row).items() if k != "row" or v} if isinstance(row, Problem) else row for row in rows
    )
    return _hash(problems)


def function_identity(given: str) -> str | None:
    """Hash the file and name of FILE.py:NAME; None for "". What the file imports does not count."""
    function = read_function(given)
    return function and _hash([function.name, function.source])


def own_functions(recipe: Recipe) -> dict[str, str]:
    """Hash the file of every key of a recipe that is FILE.py:NAME."""
    kinds = (".function", ".advantage", ".loss", ".filter")
    own = [(key, given) for key, given in flat_keys(to_toml(recipe)).items() if key.endswith(kinds) and ":" in given]
    return {f"file of {key}": function_identity(given) for key, given in own}


def model_identity(folder: Path) -> dict[str, str]:
    """Hash what decides a model's responses, by part; where the folder lies, and what else is in it, does not count.

    Every byte of the weights counts: loading reads them too, and CRC-32 keeps up with a disk.
    """
    lora, words = adapter.read_config(folder), adapter.tokenizer_folder(folder)
    weights = [folder / adapter.ADAPTER_WEIGHTS] if lora else weight_files(folder)
    configs = [folder / (adapter.TRAINED_CONFIG if lora else "config.json"), words / "generation_config.json"]
    settings = read_optional_json(folder / ADAPTER_CONFIG)
    tokenizer = read_optional_json(words / "tokenizer_config.json")
    settings.pop("base_model_name_or_path", None)  # what the base is counts, not where
    found = {
        "weights": sorted(_checksums(weights).values()),  # the files' names do not count
        "config": (settings, _checksums(configs)),
        "chat template": (tokenizer.pop("chat_template", None), _checksums([words / CHAT_TEMPLATE])),
        "tokenizer": (tokenizer, _checksums(words / name for name in TOKENIZER_FILES if name not in OTHER_PARTS)),
    }
    if lora:
        base = model_identity(resolve_folder(lora.base))
        found["adapter's base"] = base["weights"], base["config"]
    return {part: _hash([value]) for part, value in found.items()}


def prompts_identity(prompts: Iterable[Prompt]) -> str:
    """Hash rendered prompts, in any order: a model's files alone do not decide them, templates may write the date."""
    return _hash(sorted(_hash([prompt.problem_id, *prompt.tokens]) for prompt in prompts))


def _hash(values: Iterable[object]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for value in values:
        found.update(json.dumps(value, sort_keys=True, default=str).encode())
    return found.hexdigest()


def _checksums(paths: Iterable[Path]) -> dict[str, list[int]]:
    return file_checksums(path for path in paths if path.is_file())


def code_version(folder: Path) -> str:
    """Return the hash of each of the code's files, which may differ from the commit's, and the versions."""
    paths = sorted(path for pattern in ("*.py", "engine/*.py", "lab/*.py") for path in folder.glob(pattern))
    files = (f"{p.relative_to(folder)} {hashlib.blake2b(p.read_bytes(), digest_size=4).hexdigest()}" for p in paths)
    return f"{', '.join(files)}, torch {torch.__version__}, commit {git_commit(folder)[:8]}"


def git_commit(folder: Path) -> str:
    """Return the git commit of a folder, "unknown" without git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def differences(then: dict[str, str], now: dict[str, str], chosen: Collection[str] = ()) -> list[str]:
    """Describe the differences between two fingerprints; `chosen` are recipe keys that were changed on purpose.

    A fingerprint has "recipe" (TOML), "code", "model PART" (see `model_identity`), "file of KEY" (see `own_functions`)
    and, for each source, "data SOURCE" and "prompts SOURCE". Commits are not compared. Hashes tell a person nothing:
    only the names of what changed are given.
    """
    found = []
    values = [flat_keys(fingerprint.get("recipe", "")) for fingerprint in (then, now)]
    for key in sorted(values[0].keys() | values[1].keys()):
        old, new = (table.get(key) for table in values)
        if old != new and not any(f"{key}.".startswith(f"{name}.") for name in chosen):
            found.append(f"recipe: {key} was {old!r}, is {new!r}")
    for name in sorted((then.keys() & now.keys()) - {"recipe"}):
        (old, _, commit), (new, _, _) = (fingerprint[name].partition(", commit ") for fingerprint in (then, now))
        if old != new and name == "code":
            parts = {part.rpartition(" ")[0] or "all" for part in {*old.split(", ")} ^ {*new.split(", ")}}
            found.append(f"code changed since commit {commit}: {first_names(sorted(parts), 8)}")
        elif old != new:
            found.append(f"{name} changed")
    return found


def other_parts(then: object, now: dict[str, str]) -> list[str]:
    """Name the parts of an identity that are not as they were; all of them where an older version recorded others."""
    then = then if isinstance(then, dict) else {}
    return [part for part, value in now.items() if then.get(part) != value]


def flat_keys(toml: str) -> dict[str, object]:
    """Return the values of a recipe's text by their dotted names, as --set has them."""

    def walk(table: dict | list, where: str) -> Iterable[tuple[str, object]]:
        for key, value in table.items() if isinstance(table, dict) else enumerate(table):
            if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
                yield from walk(value, f"{where}{key}.")
            else:
                yield f"{where}{key}", value

    return dict(walk(tomllib.loads(toml), ""))


def require_same(path: Path, held: dict | None, wanted: dict) -> None:
    """Raise DataError unless a file or folder that was made with the settings `held` has all that are wanted.

    "identity" holds hashes by what they are of: `model_identity`'s, "prompts", "problems", "reward function".
    """
    if not isinstance((held or {}).get("identity"), dict):
        raise DataError(
            f"{path} does not say which model, prompts and problems it was made with (an older version wrote less); "
            f"move it away and begin again"
        )
    for name, value in wanted.items():
        if name == "identity":
            parts = other_parts(held[name], value)
            hint = ", as the template writes a date or transformers is another version" * (parts == ["prompts"])
            if parts:
                what = f"other inputs (different: {' and '.join(', '.join(parts).rsplit(', ', 1))}{hint})"
                raise DataError(f"{path} was made with {what}: use the same, or give another name")
        elif held.get(name) != value:
            raise DataError(
                f"{path} was made with {name} = {held.get(name)}, not {value}: use the same setting, or give "
                f"another name"
            )
