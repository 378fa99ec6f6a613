"""A run's folder, new or found again: held by one process, resumed where it stopped."""

import argparse
import fcntl
import glob
import json
import math
import os
import platform
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.checkpoint import CheckpointError, RunState, read_state, together
from engine.device import Device
from engine.files import write_atomically
from engine.fingerprint import code_version, data_identity, differences, git_commit, model_identity
from lab.arithmetic import write_world
from lab.benchmarks import find_data
from lab.metrics import whole_lines
from lab.problems import DATA_FILES, Problem, existing_file, has_chats, read_chats, read_problems
from lab.recipe import Recipe, RecipeError, RlStage, SftStage, load_recipe, to_toml
from model import ModelConfig, extend_window, read_config, resolve_folder

ROOT = Path(__file__).resolve().parent.parent  # of the program
WANTS_RESUMING = "resume-me"  # in a run's folder: it was asked to stop, and wants to go on
FINISHED = "finished"  # and: it came to its end
AGREED = "agreed.json"  # and: what changed on purpose since its newest checkpoint, so that it is asked once


def new_name(parent: Path, name: str, ending: str = "") -> Path:
    """NAME, or NAME-2 and so on when that is taken: nothing is ever overwritten."""
    numbered = (parent / f"{name}{f'-{number}' if number > 1 else ''}{ending}" for number in count(1))
    return next(path for path in numbered if not path.exists())


def new_folder(parent: Path, name: str) -> Path:
    """A new folder runs/NAME, or runs/NAME-2 and so on."""
    while True:
        try:
            folder = new_name(parent, name)
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run took the name in the meantime
            continue
        except OSError as error:
            raise RecipeError(f"{folder} cannot be made ({error.strerror}); give another --out") from None


def versions() -> str:
    """What the run was made with, as TOML comments."""
    parts = [
        f"python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
    ]
    return f"# {', '.join(parts)}, commit {git_commit(ROOT)}\n"


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
    """Take a run's folder for this process, until it ends however it ends; CheckpointError when another has it."""
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
    """What a run depends on beside its checkpoint: see `differences`."""
    found = {"recipe": to_toml(recipe), "code": code_version(ROOT)}
    found["model"] = model_identity(model_source(recipe, folder))
    for source in {stage.data for stage in recipe.stage} | {recipe.eval.data, recipe.final.data}:
        if source:
            path = str(folder / source) if source.startswith("world/") else source
            found[f"data {source}"] = data_identity(read_chats(path) if has_chats(path) else problems_of(path))
    return found


def model_source(recipe: Recipe, folder: Path) -> Path:
    """The folder of the model that the run begins with."""
    return folder / recipe.model if recipe.model.startswith("world/") else resolve_folder(recipe.model)


def by_main(device: Device, work: Callable[[], Any]) -> Any:
    """What the main process's `work` returned; when it fails, it fails on every process, and none is left waiting."""
    return together(device, lambda: work() if device.is_main else None)[0]


def open_run(arguments: argparse.Namespace, device: Device) -> tuple[Recipe, Path, int | None, Path | None, RunState]:
    """A new run's folder, or an old one with the place where it stopped; held by the main process."""
    folder = arguments.resume if isinstance(arguments.resume, Path) else None
    if folder and not (folder / "recipe.toml").is_file():
        raise RecipeError(f"{folder} is no run: it has no recipe.toml; give a folder that train.py has made")
    recipe = load_recipe(folder / "recipe.toml" if folder else arguments.recipe, arguments.set)
    check_recipe(recipe)
    # torchrun --max-restarts starts the same command again: it goes on
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if folder is None and (arguments.resume or restarted):
        anyway = arguments.resume_anyway
        folder = by_main(device, lambda: find_unfinished(arguments.out, recipe, anyway))
        if folder is None:
            device.say(f"no unfinished run of {recipe.name} in {arguments.out}: beginning")
    resumed, found = folder is not None, None
    if not resumed:
        folder = by_main(device, lambda: new_folder(arguments.out, recipe.name))
    lock = by_main(device, lambda: hold(folder))
    lock = lock if device.is_main else None  # a number that means nothing elsewhere
    if not resumed and device.is_main and recipe.world:
        write_world(recipe.world, folder / "world")
    device.share(None)  # nobody reads the world before it is written
    now = run_fingerprint(recipe, folder)
    if resumed:
        found = read_state(folder, device, device.share(whole_lines(folder) if device.is_main else None))
        device.say(
            f"resuming {folder} after step {found[1].step}" if found else f"{folder} has no checkpoint: beginning again"
        )
    state = found[1] if found else RunState()
    if found:
        # a value set beside the name of a run is changed on purpose; in "the same command" nothing is
        chosen = [value.partition("=")[0] for value in arguments.set] if isinstance(arguments.resume, Path) else []
        agreed = json.loads((folder / AGREED).read_text()) if (folder / AGREED).exists() else {}
        differing = differences(agreed.get(found[0].name, state.fingerprint), now, chosen)
        for difference in differing:
            device.say(f"differs from the run so far: {difference}")
        if differing and not arguments.resume_anyway:
            if lock is not None:
                os.close(lock)
            raise CheckpointError(
                f"{folder} was made otherwise: {'; '.join(differing)}: put it back as it was, or go on all the same "
                "with --resume-anyway"
            )
    if device.is_main:
        path = folder / "recipe.toml"
        changed = path.exists() and differences({"recipe": path.read_text(encoding="utf-8")}, now) != []
        if resumed:
            forget_what_follows(folder, recipe, state, changed)
        if changed:  # what the earlier part of the run was made with stays on record
            new_name(folder, "recipe-before", ".toml").write_bytes(path.read_bytes())
        if changed or not path.exists():
            write_atomically(path, [(versions() + to_toml(recipe)).encode()])
        if found and now != state.fingerprint:
            write_atomically(folder / AGREED, [json.dumps({found[0].name: now}).encode()])
    state.fingerprint = now
    return recipe, folder, lock, *(found or (None, state))


def forget_what_follows(folder: Path, recipe: Recipe, state: RunState, changed: bool) -> None:
    """Remove the pass rates of weights that this run will not have: after an older checkpoint, or another recipe.

    Those that the checkpoint's own weights have stay: the next stage's, when the checkpoint is at its stage's end.
    """
    at_end = state.stage < len(recipe.stage) and not steps_left(recipe.stage[state.stage], state)
    first = state.stage + (0 if changed and not state.prepared else 1 if changed or not at_end else 2)
    for index in range(first, len(recipe.stage)):
        (folder / f"pass-rates-{index}.jsonl").unlink(missing_ok=True)


def steps_left(stage: SftStage | RlStage, state: RunState) -> int:
    """Steps until the stage ends, by number or, at the length of its rollouts so far, by their tokens; 0 at its end."""
    left = stage.steps - state.stage_step
    if isinstance(stage, RlStage) and stage.generated_tokens and state.stage_tokens:
        tokens_left = max(0, stage.generated_tokens - state.stage_tokens)
        left = min(left, math.ceil(tokens_left * state.stage_step / state.stage_tokens))
    return max(0, left)


# -------------------------------------------------------------------------------------------------- the recipe's inputs


def check_recipe(recipe: Recipe) -> None:
    """What can be found wrong before anything is written or loaded."""
    for source in [stage.data for stage in recipe.stage] + [recipe.eval.data, recipe.final.data]:
        if source.startswith("world/") and not recipe.world:
            raise RecipeError(f"{source}: the recipe has no [world] that would write it; write ./{source} for a file")
        if source.endswith(DATA_FILES) and not source.startswith("world/"):
            existing_file(Path(source))
    for source in find_data(recipe.guard.benchmarks).values():
        if source.endswith(DATA_FILES):
            existing_file(Path(source))
    if not recipe.model.startswith("world/"):
        config = model_config(resolve_folder(recipe.model), recipe)
        if recipe.final.data:
            final_config(config, recipe)


# ------------------------------------------------------------------------------------------------------------ the model


def model_config(folder: Path, recipe: Recipe) -> ModelConfig:
    """The model's config with the recipe's window, in which every stage must fit."""
    config = read_config(folder)
    if recipe.max_position_embeddings:
        config = replace(config, max_position_embeddings=recipe.max_position_embeddings)
    for index, stage in enumerate(recipe.stage):
        if isinstance(stage, SftStage):
            continue
        if stage.max_prompt_tokens + stage.max_response_tokens > config.max_position_embeddings:
            raise RecipeError(
                f"stage.{index}: {stage.max_prompt_tokens} + {stage.max_response_tokens} tokens exceed the model's "
                f"window of {config.max_position_embeddings}: set max_position_embeddings in the recipe"
            )
    return config


def final_config(config: ModelConfig, recipe: Recipe) -> ModelConfig:
    """The config of the last evaluation: YaRN, and a window as long as it makes it."""
    final = recipe.final
    return extend_window(config, final.yarn_factor, final.yarn_original_window, final.yarn_attention_factor)


@cache
def problems_of(path: str) -> list[Problem]:
    """The problems of a file or hub data set, read once per run."""
    return read_problems(path)
