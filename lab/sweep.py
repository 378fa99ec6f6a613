"""A sweep of train.py: a recipe with several values or seeds, each run a process of its own, one after another.

    python train.py recipes/tiny.toml --set stage.rl.learning_rate=1e-4,3e-4 --seeds 0 1 2
    python train.py recipes/polaris-4b.toml --seeds 0 1 --nproc-per-node 8      # each run by torchrun, on 8 GPUs

Runs are in OUT/NAME-sweep/VALUES. The same command again skips those that have finished and resumes the others.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from engine.fingerprint import differences
from lab.benchmarks import text_table
from lab.compare_page import write_comparison
from lab.recipe import RecipeError, literal, load_recipe, override_values, to_toml

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


class Member(NamedTuple):
    """A run of a sweep; those of one setting differ in their seed."""

    name: str  # of its folder
    setting: str
    overrides: list[str]


def members(name: str, overrides: Sequence[str], seeds: Sequence[int]) -> list[Member]:
    """Return the runs of a sweep of the recipe NAME, in order: every combination of the values that --set gives."""
    choices = []
    for key, _, text in (override.partition("=") for override in overrides):
        choices.append([(key, value) for value in override_values(text)])
    swept = [key for (key, _), *others in choices if others]
    short = [key.rpartition(".")[2] for key in swept]
    names = dict(zip(swept, swept if len(set(short)) < len(short) else short, strict=True))
    found = []
    for pairs in product(*choices):
        words = [f"{names[k]}={v if isinstance(v, str) else literal(v)}" for k, v in pairs if k in names]
        setting = re.sub(r"[^\w.,=+-]+", "_", ",".join(words))
        given = [f"{key}={literal(value)}" for key, value in pairs]
        for seed in seeds or [None]:
            own = ",".join(filter(None, [setting, f"seed={seed}" * (seed is not None)]))
            seeded = [f"seed={seed}"] * (seed is not None)
            found.append(Member(own, setting or name, [*given, *seeded, f"name={literal(own)}"]))
    if len({member.name for member in found}) < len(found):
        raise RecipeError(f"two runs of the sweep would have one name: {', '.join(member.name for member in found)}")
    return found


def finished_run(folder: Path, name: str) -> Path | None:
    """Return the folder of the run NAME, or NAME-2 and so on, if it has finished."""
    paths = [path.parent for path in folder.glob("*/finished")]
    return next((path for path in paths if re.fullmatch(rf"{re.escape(name)}(-\d+)?", path.name)), None)


def run_sweep(arguments: argparse.Namespace) -> str | int:
    """Run what has not finished, then print a table and write compare.html; return the exit status, or a sentence."""
    if "RANK" in os.environ:
        raise RecipeError("a sweep starts its runs itself: python train.py ... --nproc-per-node N, without torchrun")
    name = load_recipe(arguments.recipe).name
    sweep, folder = members(name, arguments.set, arguments.seeds), arguments.out / f"{name}-sweep"
    for member in sweep:  # mistakes in any of them before the first one runs
        recipe, done = load_recipe(arguments.recipe, member.overrides), finished_run(folder, member.name)
        then = {"recipe": (done / "recipe.toml").read_text(encoding="utf-8")} if done else {}
        if done and (changed := differences(then, {"recipe": to_toml(recipe)})) and not arguments.resume_anyway:
            raise RecipeError(f"{done} differs from this sweep: {'; '.join(changed)}: give another --out")
    start = [sys.executable]
    if arguments.nproc_per_node:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", arguments.nproc_per_node]
    groups, failed = defaultdict(list), []
    for i, member in enumerate(sweep, 1):
        done = finished_run(folder, member.name)
        print(f"run {i} of {len(sweep)}, {member.name}{': has finished' * bool(done)}", flush=True)
        if not done:
            command = [*start, str(TRAIN), str(arguments.recipe), "--out", str(folder)]
            command += ["--resume-anyway" if arguments.resume_anyway else "--resume"]
            run_child([*command, *(word for override in member.overrides for word in ("--set", override))])
            done = finished_run(folder, member.name)
        groups[member.setting].append(done) if done else failed.append(member.name)
    if groups:
        path, table = write_comparison(groups)
        print(f"{text_table(table)}\ncomparison in {path}")
    if failed:
        return f"train.py: {len(failed)} of {len(sweep)} runs failed, the same command tries again: {', '.join(failed)}"
    return 0


def run_child(command: Sequence[str]) -> None:
    """Run a command to its end. A signal is passed on once, the child saves its work, and the signal ends the sweep."""
    child, asked = None, []

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        if child is not None:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    child = subprocess.Popen(command, start_new_session=True)  # else a terminal would send it Ctrl-C as well: twice
    child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if asked:
        print("the sweep has stopped; the same command goes on with it", flush=True)
        signal.signal(asked[0], signal.SIG_DFL)
        signal.raise_signal(asked[0])
