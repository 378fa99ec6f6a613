"""A run's folder, new or found again: held by one process, resumed where it stopped, refused when something differs."""

import argparse
import fcntl
import glob
import json
import os
import platform
import re
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
import transformers

from engine.checkpoint import CheckpointError, RunState, read_state, together
from engine.distributed import Processes
from engine.files import write_atomically
from engine.fingerprint import code_version, data_identity, differences, git_commit, model_identity
from lab.arithmetic import write_world
from lab.metrics import whole_lines
from lab.problems import has_chats, read_chats
from lab.recipe import Recipe, RecipeError, load_recipe, to_toml
from lab.run_data import RunData
from model import resolve_folder

ROOT = Path(__file__).resolve().parent.parent  # of the program
FINISHED = "finished"  # a file in a run's folder: the run came to its end
WANTS_RESUMING = "resume-me"  # and: it was asked to stop and wants to go on
LAUNCHES = "fingerprints.json"  # and: what every launch that changed something was made with


@dataclass(frozen=True)
class OpenedRun:
    """A run's folder and the place where the run goes on."""

    folder: Path
    lock: int | None  # the folder, held as long as this process lives; None in all processes but the main one
    checkpoint: Path | None  # to go on from
    state: RunState


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe of a new run, or of the run that --resume names."""
    if not isinstance(arguments.resume, Path):
        return load_recipe(arguments.recipe, arguments.set)
    path = arguments.resume / "recipe.toml"
    if not path.is_file():
        raise RecipeError(f"{arguments.resume} is no run: it has no recipe.toml; give a folder that train.py has made")
    return load_recipe(path, arguments.set)


def open_run(arguments: argparse.Namespace, recipe: Recipe, processes: Processes) -> OpenedRun:
    """A new run's folder, or an old one with the place where it stopped; held by the main process.

    Raises CheckpointError when another process writes the folder, when no checkpoint can be used, or when recipe, data,
    model or code are not those of the run so far.
    """
    folder = arguments.resume if isinstance(arguments.resume, Path) else None
    # torchrun --max-restarts starts the same command again: it goes on
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if folder is None and (arguments.resume or restarted):
        folder = on_main(processes, lambda: find_unfinished(arguments.out, recipe, arguments.resume_anyway))
        if folder is None:
            processes.say(f"no unfinished run of {recipe.name} in {arguments.out}: beginning")
    resumed, found = folder is not None, None
    if not resumed:
        folder = on_main(processes, lambda: new_folder(arguments.out, recipe.name))
    lock = on_main(processes, lambda: hold(folder))
    lock = lock if processes.is_main else None  # a number that means nothing elsewhere
    if not resumed and processes.is_main and recipe.world:
        write_world(recipe.world, folder / "world")
    processes.broadcast(None)  # nobody reads the world before it is written
    now = run_fingerprint(recipe, folder)
    if resumed:
        found = read_state(folder, processes, processes.broadcast(whole_lines(folder) if processes.is_main else None))
        processes.say(
            f"resuming {folder} after step {found[1].step}" if found else f"{folder} has no checkpoint: beginning again"
        )
    checkpoint, state = found or (None, RunState())
    launches = json.loads((folder / LAUNCHES).read_text()) if (folder / LAUNCHES).exists() else []
    if found and launches:
        # a value set beside the name of a run is changed on purpose; in "the same command" nothing is
        chosen = [value.partition("=")[0] for value in arguments.set] if isinstance(arguments.resume, Path) else []
        differing = differences(launches[-1], now, chosen)
        for difference in differing:
            processes.say(f"differs from the run so far: {difference}")
        if differing and not arguments.resume_anyway:
            if lock is not None:
                os.close(lock)
            raise CheckpointError(
                f"{folder} was made otherwise: {'; '.join(differing)}: put it back as it was, or go on all the same "
                "with --resume-anyway"
            )
    processes.broadcast(None)  # everybody has read what the run was made with
    if processes.is_main and (not launches or launches[-1] | now != launches[-1]):
        write_atomically(folder / "recipe.toml", [(versions() + now["recipe"]).encode()])
        launches.append({"after_step": state.step} | now)
        write_atomically(folder / LAUNCHES, [json.dumps(launches, indent=1).encode()])
    return OpenedRun(folder, lock, checkpoint, state)


def on_main(processes: Processes, work):
    """What the main process's `work` returned; when it fails, it fails on every process, and none is left waiting."""
    return together(processes, lambda: work() if processes.is_main else None)[0]


def new_folder(parent: Path, name: str) -> Path:
    """A new folder runs/NAME, or runs/NAME-2 and so on when that is taken: nothing is ever overwritten."""
    for number in count(1):
        folder = parent / (f"{name}-{number}" if number > 1 else name)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise RecipeError(f"{folder} cannot be made ({error.strerror}); give another --out") from None


def find_unfinished(out: Path, recipe: Recipe, anyway: bool) -> Path | None:
    """The newest unfinished run of this very recipe in `out`; None where none has its name.

    Raises CheckpointError when those of its name differ, unless that is allowed: none is passed over in silence.
    """
    found, told = [], []
    for path in out.glob(f"{glob.escape(recipe.name)}*/recipe.toml"):
        own = re.fullmatch(rf"{re.escape(recipe.name)}(-\d+)?", path.parent.name)
        if own and not (path.parent / FINISHED).exists():
            found.append(path)
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        differing = differences({"recipe": path.read_text(encoding="utf-8")}, {"recipe": to_toml(recipe)})
        if anyway or not differing:
            return path.parent
        told.append(f"{path.parent} ({differing[0]}{f' and {len(differing) - 1} more' * (len(differing) > 1)})")
    if told:
        raise CheckpointError(
            f"no unfinished run in {out} has this recipe: {'; '.join(told)}: name one with --resume RUN, leave "
            "--resume out to begin another, or take the newest as it is with --resume-anyway"
        )
    return None


def hold(folder: Path) -> int:
    """Lock a run's folder until this process ends, however it ends; CheckpointError when another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(f"{folder} is being written by another process: wait for its end, or stop it") from None
    except OSError:  # a file system without locks
        pass
    return descriptor


def run_fingerprint(recipe: Recipe, folder: Path) -> dict[str, str]:
    """What a run depends on beside its checkpoint: see `fingerprint.differences`."""
    found = {"recipe": to_toml(recipe), "code": code_version(ROOT)}
    found["model"] = model_identity(model_source(recipe, folder))
    data = RunData(recipe, folder)
    for source in {stage.data for stage in recipe.stage} | {recipe.eval.data, recipe.final.data}:
        if source:
            path = data.path(source)
            found[f"data {source}"] = data_identity(read_chats(path) if has_chats(path) else data.problems(source))
    return found


def model_source(recipe: Recipe, folder: Path) -> Path:
    """The folder of the model that the run begins with."""
    return folder / recipe.model if recipe.model.startswith("world/") else resolve_folder(recipe.model)


def versions() -> str:
    """What the run is made with, as a comment in TOML."""
    libraries = (
        f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    return f"# {libraries}, commit {git_commit(ROOT)}\n"
