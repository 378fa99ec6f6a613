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
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from engine.fingerprint import differences, flat_keys
from engine.run_folder import with_remembered
from lab.benchmarks import text_table
from lab.compare_page import write_comparison
from lab.recipe import RecipeError, literal, load_recipe, override_values, to_toml

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def combinations(overrides: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Yield each run of a sweep: its folder's name, the same without the seed, and its overrides."""
    last = reversed(dict.fromkeys(reversed(overrides)))  # of equal ones the last counts
    values = {override: override_values(override.partition("=")[2]) for override in last}
    keys = {override: override.partition("=")[0] for override, own in values.items() if len(own) > 1}
    short = {override: key.rpartition(".")[2] for override, key in keys.items()}
    names = short if len({*short.values()}) == len(short) else keys
    for chosen in product(*values.values()):
        given, words = [], []
        for override, value in zip(values, chosen, strict=True):
            given.append(f"{keys[override]}={literal(value)}" if override in keys else override)
            if override in keys:
                words.append(f"{names[override]}={value if isinstance(value, str) else literal(value)}")
        name = re.sub(r"[^\w.,=+-]+", "_", ",".join(words))
        setting = ",".join(part for part in name.split(",") if not re.fullmatch(r"seed=\d+", part))
        yield name, setting, [*given, f"name={literal(name)}"]


def finished_run(folder: Path, name: str) -> Path | None:
    """Return the folder of the run NAME, perhaps NAME-2 and so on, if it has finished."""
    paths = [path.parent for path in sorted(folder.glob("*/finished"))]
    return next((p for p in paths if flat_keys((p / "recipe.toml").read_text(encoding="utf-8"))["name"] == name), None)


def run_sweep(arguments: argparse.Namespace) -> str | int:
    """Run what has not finished, print a table and write compare.html; return the exit status, or a sentence."""
    if "RANK" in os.environ:
        raise RecipeError("a sweep starts its runs itself: python train.py ... --nproc-per-node N, without torchrun")
    sweep = list(combinations(arguments.set))
    if len({name for name, _, _ in sweep}) < len(sweep):
        raise RecipeError(f"two runs of the sweep have one name: {', '.join(name for name, _, _ in sweep)}")
    for _, _, own in sweep:  # all mistakes before the first run
        load_recipe(arguments.recipe, own)
    title = load_recipe(arguments.recipe).name
    folder = arguments.out / f"{title}-sweep"
    for name, _, own in sweep:
        if done := finished_run(folder, name):
            then = (done / "recipe.toml").read_text(encoding="utf-8")
            now = to_toml(with_remembered(arguments.recipe, own))  # as the run reads it
            changed = differences({"recipe": then}, {"recipe": now})
            if changed and not arguments.resume_anyway:
                raise RecipeError(f"{done} differs from this sweep: {'; '.join(changed)}: give another --out")
    command = [sys.executable]
    if arguments.nproc_per_node:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", arguments.nproc_per_node]
    resume = "--resume-anyway" if arguments.resume_anyway else "--resume"
    command += [str(TRAIN), str(arguments.recipe), "--out", str(folder), resume]
    groups, failed = defaultdict(list), []
    for i, (name, setting, overrides) in enumerate(sweep, 1):
        done = finished_run(folder, name)
        print(f"run {i} of {len(sweep)}, {name}{': has finished' * bool(done)}", flush=True)
        if not done:
            run_child([*command, *(word for override in overrides for word in ("--set", override))])
            done = finished_run(folder, name)
        groups[setting or title].append(done) if done else failed.append(name)
    if groups:
        path, table = write_comparison(groups)
        print(f"{text_table(table)}\ncomparison in {path}")
    if failed:
        return f"train.py: {len(failed)} of {len(sweep)} runs failed, the same command tries again: {', '.join(failed)}"
    return 0


def run_child(command: Sequence[str]) -> None:
    """Run a command to its end. A signal is passed on to it, which saves its work, and then ends the sweep."""
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
