"""A run's folder, new or resumed: locked by one process, and refused when something differs from the run so far."""

import argparse
import fcntl
import json
import os
import platform
import re
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import torch
import transformers

from engine.checkpoint import CheckpointError, RunState, read_state
from engine.distributed import Processes
from engine.errors import first_names
from engine.files import write_atomically
from engine.fingerprint import (
    code_version,
    data_identity,
    differences,
    git_commit,
    model_identity,
    own_functions,
    prompts_identity,
)
from engine.rollout_worker import RolloutWorker
from engine.terminal import keep_log, note
from lab.arithmetic import write_world
from lab.metrics import whole_lines
from lab.model_card import remembered
from lab.problems import Problem, has_chats, read_chats
from lab.recipe import Recipe, RecipeError, load_recipe, named_keys, to_toml
from lab.run_data import RunData
from model import resolve_folder

ROOT = Path(__file__).resolve().parent.parent  # of the code
FINISHED = "finished"  # a file in a run's folder: the run has ended
WANTS_RESUMING = "resume-me"  # the run was asked to stop and can be resumed
LAUNCHES = "fingerprints.json"  # the fingerprint of every launch that changed something
LOG = "log.txt"  # what the run prints
PROMPTS_COMPARED = 64  # of each source


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    """Read the recipe of a new run, or of the run that --resume names.

    Instruction and thinking, where it leaves them out, are those that its model was trained with.
    """
    if not isinstance(arguments.resume, Path):
        taken = with_remembered(arguments.recipe, arguments.set)
        if taken != load_recipe(arguments.recipe, arguments.set):
            settings = f"instruction = {taken.instruction!r}, thinking = {taken.thinking!r}"
            note(f"{taken.model} was trained with {settings}: taken, unless the recipe has its own")
        return taken
    path = arguments.resume / "recipe.toml"
    if not path.is_file():
        raise RecipeError(f"{arguments.resume} is not a run: it has no recipe.toml; give a folder made by train.py")
    return load_recipe(path, arguments.set)


def with_remembered(path: Path, overrides: Sequence[str]) -> Recipe:
    """Read a recipe file; instruction and thinking that it leaves out are those that its model was trained with."""
    model = load_recipe(path, overrides).model
    held = {} if model.startswith("world/") else remembered(resolve_folder(model))
    return load_recipe(path, overrides, held)


@contextmanager
def run_folder(arguments: argparse.Namespace, recipe: Recipe, processes: Processes) -> Iterator[tuple[Path, bool]]:
    """Yield a new run's folder, or an old one and True. A new one disappears if the block fails: nothing has begun."""
    folder = arguments.resume if isinstance(arguments.resume, Path) else None
    # torchrun --max-restarts starts the same command again, which then resumes
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if folder is None and (arguments.resume or restarted):
        anyway = arguments.resume_anyway
        folder = processes.broadcast(find_unfinished(arguments.out, recipe, anyway) if processes.is_main else None)
        if folder is None:
            processes.say(f"no unfinished run of {recipe.name} in {arguments.out}: starting a new one")
    if folder is not None:
        yield folder, True
        return
    missing = [path for path in (arguments.out, *arguments.out.parents) if not os.path.lexists(path)]
    try:
        folder = processes.broadcast(new_folder(arguments.out, recipe.name) if processes.is_main else None)
        yield folder, False
    except BaseException:
        if processes.is_main:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # another run may have begun there
                for path in missing:
                    path.rmdir()
        raise


def open_run(
    arguments: argparse.Namespace, recipe: Recipe, folder: Path, resumed: bool, processes: Processes
) -> tuple[int | None, Path | None, RunState]:
    """Lock and fill a new run's folder, or find where an old run stopped. Every process calls it.

    Returns the lock (None except on the main process), the checkpoint to continue from (None for a new start) and the
    state. Raises CheckpointError when another process uses the folder, when no checkpoint can be used, or when recipe,
    data, model or code differ from those of the run so far.
    """
    lock, found = None, None
    if processes.is_main:
        lock = hold(folder)
        keep_log(folder / LOG)
        if not resumed and recipe.world:
            write_world(recipe.world, folder / "world")
        found = run_fingerprint(recipe, folder), read_launches(folder / LAUNCHES)
    now, launches = processes.broadcast(found)  # no process reads the world before it is written
    checkpoint, state = None, RunState()
    if resumed:
        lines = processes.broadcast(whole_lines(folder) if processes.is_main else None)
        if found := read_state(folder, processes, lines):
            checkpoint, state = found
            processes.say(f"resuming {folder} after step {state.step}")
        else:
            processes.say(f"{folder} has no checkpoint: starting over")
    if checkpoint:
        missing = [f"{LAUNCHES} is missing"]  # nobody knows what the run was made with
        differing = differences(launches[-1], now, chosen_keys(arguments, recipe)) if launches else missing
        if differing and not arguments.resume_anyway:
            if lock is not None:
                os.close(lock)
            raise CheckpointError(
                f"{folder} differs from the run so far: {'; '.join(differing)}: undo the change, or resume with it by "
                "--resume-anyway"
            )
        for difference in differing:
            processes.say(f"differs from the run so far: {difference}")
    if processes.is_main and (not launches or launches[-1] | now != launches[-1]):
        versions = (
            f"# python {platform.python_version()}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}, commit {git_commit(ROOT)}\n"
        )
        write_atomically(folder / "recipe.toml", [(versions + now["recipe"]).encode()])
        launches.append({"after_step": state.step} | now)
        write_atomically(folder / LAUNCHES, [json.dumps(launches, indent=1).encode()])
    return lock, checkpoint, state


def chosen_keys(arguments: argparse.Namespace, recipe: Recipe) -> set[str]:
    """Return the keys that --set changes on purpose: next to the name of a run, not in a repeated command."""
    given = arguments.set if isinstance(arguments.resume, Path) else []
    kinds = [stage.kind for stage in recipe.stage]
    return {key for override in given for key in named_keys(override.partition("=")[0], kinds)}


def read_launches(path: Path) -> list[dict[str, str]]:
    """Return the fingerprints of a run's launches, [] without the file. Raises CheckpointError if it is another's."""
    try:
        launches = json.loads(path.read_bytes())
        for launch in launches:
            tomllib.loads(launch["recipe"])
            if not all(isinstance(value, str) for name, value in launch.items() if name != "after_step"):
                raise ValueError("not all values are texts")
        return launches
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): restore it, or remove it and resume with --resume-anyway"
        ) from None


def require_same_prompts(
    arguments: argparse.Namespace, folder: Path, data: RunData, worker: RolloutWorker, resumed: bool
) -> None:
    """Refuse to resume a run with other prompts than so far, and record them: they are known once a tokenizer is.

    The first problems of each source stand for all; a chat's first message for its prompts.
    """
    is_main, now = worker.processes.is_main, {}
    launches = worker.processes.broadcast(json.loads((folder / LAUNCHES).read_bytes()) if is_main else None)
    for source in sources(data.recipe):
        if has_chats(path := data.path(source)):
            problems = [Problem("chat", chat[0]["content"], ()) for chat in read_chats(path)[:PROMPTS_COMPARED]]
        else:
            problems = data.problems(source)[:PROMPTS_COMPARED]
        now[f"prompts {source}"] = prompts_identity(worker.prompt(problem, 1) for problem in problems)
    then = {name: value for launch in launches for name, value in launch.items() if name in now}
    on_purpose = arguments.resume_anyway or {"instruction", "thinking"} & chosen_keys(arguments, data.recipe)
    differing = differences(then, now)
    if resumed and differing and not on_purpose:
        raise CheckpointError(
            f"{folder} differs from the run so far: {'; '.join(differing)}, though the model's files did not (its "
            "template writes a date, or transformers is another version): resume with it by --resume-anyway"
        )
    if is_main and then != now:
        launches[-1] |= now
        write_atomically(folder / LAUNCHES, [json.dumps(launches, indent=1).encode()])


def new_folder(parent: Path, name: str) -> Path:
    """Make the folder NAME, or NAME-2 and so on where that exists: nothing is ever overwritten."""
    for number in count(1):
        folder = parent / (f"{name}-{number}" if number > 1 else name)
        try:
            folder.mkdir(parents=True)
            return folder
        except OSError as error:
            if isinstance(error, FileExistsError) and folder.exists():
                continue
            link = next(
                (path for path in (folder, *folder.parents) if os.path.islink(path) and not os.path.exists(path)), None
            )
            reason = f"{link} links to {os.readlink(link)}: is its disk mounted?" if link else error.strerror
            raise RecipeError(f"{folder} cannot be made ({reason}); give another --out or name") from None


def find_unfinished(out: Path, recipe: Recipe, anyway: bool) -> Path | None:
    """Return the newest unfinished run of exactly this recipe in `out`; None where no unfinished run has its name.

    Raises CheckpointError when the recipes of all runs of that name differ, unless `anyway` takes the newest; also when
    the name is all that another run's recipe differs in: it may be mistyped.
    """
    refused = []
    found = [path for path in out.glob("*/recipe.toml") if not (path.parent / FINISHED).exists()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        differing = differences({"recipe": path.read_text(encoding="utf-8")}, {"recipe": to_toml(recipe)})
        same_name = re.fullmatch(rf"{re.escape(recipe.name)}(-\d+)?", path.parent.name)
        if same_name and (anyway or not differing):
            return path.parent
        if same_name or [text.startswith("recipe: name was ") for text in differing] == [True]:
            refused.append(f"{path.parent} ({first_names(differing, 8)})")
    if refused:
        raise CheckpointError(
            f"no unfinished run in {out} has this recipe: {'; '.join(refused)}: name one with --resume RUN, leave out "
            "--resume to start another, or resume the newest with --resume-anyway"
        )
    return None


def hold(folder: Path) -> int:
    """Lock a run's folder until this process ends; raise CheckpointError when another process has locked it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(f"{folder} is in use by another process: wait until it ends, or stop it") from None
    except OSError:  # a file system without locks
        pass
    return descriptor


def run_fingerprint(recipe: Recipe, folder: Path) -> dict[str, str]:
    """Return what a run depends on in addition to its checkpoint: see `fingerprint.differences`."""
    found = {"recipe": to_toml(recipe), "code": code_version(ROOT)}
    found |= {f"model {part}": value for part, value in model_identity(model_source(recipe, folder)).items()}
    found |= own_functions(recipe)
    data = RunData(recipe, folder)
    for source in sources(recipe):
        path = data.path(source)
        found[f"data {source}"] = data_identity(read_chats(path) if has_chats(path) else data.problems(source))
    return found


def sources(recipe: Recipe) -> set[str]:
    """Return the names of all data of a recipe."""
    return {*(stage.data for stage in recipe.stage), recipe.eval.data, recipe.final.data} - {""}


def model_source(recipe: Recipe, folder: Path) -> Path:
    """Return the folder of the model that the run starts from."""
    return folder / recipe.model if recipe.model.startswith("world/") else resolve_folder(recipe.model)
