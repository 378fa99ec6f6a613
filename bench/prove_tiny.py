"""Does the laptop world prove what it should? Several seeds of the default run, and 100 more steps of fine-tuning.

    python bench/prove_tiny.py runs/proof-0 runs/proof-1 runs/proof-2      # tables from finished runs
    python bench/prove_tiny.py --make runs/proof --seeds 0 1 2             # make the runs first, one after the other
    python bench/prove_tiny.py runs/tiny --readme                          # put table and curves into the README

For every run: held-out avg@8 of the fine-tuned model and of the trained one with their 95% intervals, how often each
mechanism fired, and what the problems were like: of the never / always solved ones before RL, shares of all; of the
groups, the share with equal rewards. A temperature with a star did not restore the diversity. With --make, fine-tuning
is also continued for 100 steps in a run of its own, to show what it would have gained instead.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.files import write_atomically  # noqa: E402
from lab.metrics import read_metrics  # noqa: E402
from lab.story import change  # noqa: E402


def held_out(rows: list[dict]) -> list[dict]:
    """The evaluations of the whole held-out set, in order."""
    found = [row for row in rows if row["kind"] == "eval" and row["name"] == "held-out"]
    return [row for row in found if row["problems"] == max(row["problems"] for row in found)]


def interval(row: dict) -> str:
    """Accuracy in percent with its interval."""
    return f"{100 * row['avg']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def temperatures(rows: list[dict]) -> str:
    """The temperature of each stage, with a star where the search found none that restores the diversity."""
    found = []
    for row in (row for row in rows if row["kind"] == "temperature"):
        last = row["curve"][-1]
        restored = row["chosen"] == last["temperature"] and last["distinct4"] >= (last["target"] or 0)
        found.append(f"{row['chosen']:g}{'' if restored else '*'}")
    return " -> ".join(found)


def premises(rows: list[dict]) -> list[str]:
    """Problems never / always solved before RL, problems dropped, and groups of equal rewards in each stage."""
    filters = [row for row in rows if row["kind"] == "filter"]
    before, stages = filters[0]["before"], {}
    for row in (row for row in rows if row["kind"] == "rl"):
        silent, groups = stages.get(row["stage"], (0, 0))
        stages[row["stage"]] = silent + row["zero_variance"], groups + row["groups"]
    return [
        f"{before[0] / sum(before):.0%} / {before[8] / sum(before):.0%}",
        " + ".join(str(row["dropped"]) for row in filters),
        ", ".join(f"{silent / groups:.0%}" for silent, groups in stages.values()),
    ]


def describe(folder: Path) -> str:
    """One row of the table."""
    rows = read_metrics(folder)
    first, last = held_out(rows)[0], held_out(rows)[-1]
    rl = [row for row in rows if row["kind"] == "rl"]
    groups = sum(row["groups"] for row in rl)
    return " | ".join(
        [
            f"| {folder.name}",
            interval(first),
            interval(last),
            f"**{100 * (last['avg'] - first['avg']):+.1f}**",
            temperatures(rows),
            *premises(rows),
            f"{sum(row['rescued'] for row in rl)}, {sum(row['substituted'] for row in rl)} of {groups}",
            f"{sum(row['skipped'] for row in rl)}",
            f"{max(row['logprob_diff_max'] for row in rl if not row['skipped']):.0e} |",
        ]
    )


BEGIN, END = "<!-- default run: written by python bench/prove_tiny.py RUN ... --readme -->", "<!-- end -->"


def update_readme(folders: list[Path]) -> None:
    """Rewrite the README's block on the default run, and its picture, from these runs."""
    lines = ["| run | after fine-tuning, avg@8 | after RL, avg@8 | gain, paired by problem | never / always solved "
             "before RL | dropped | temperatures | groups without a signal | rescued "
             "| overwritten groups |"]  # fmt: skip
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for folder in folders:
        rows = read_metrics(folder)
        (first, *_, last), rl = held_out(rows), [row for row in rows if row["kind"] == "rl"]
        (solved, dropped, silent), chosen = premises(rows), temperatures(rows)
        rescued, overwritten = (sum(row[key] for row in rl) for key in ("rescued", "substituted"))
        gain = change(first, last).replace(" points (95% ", " (").replace(", paired by problem", "")
        groups = sum(row["groups"] for row in rl)
        cells = [folder.name, interval(first), interval(last), gain, solved, dropped, chosen, silent, rescued,
                 f"{overwritten} of {groups}"]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    rows = read_metrics(folders[0])
    first, *_, last = held_out(rows)
    beyond = [row for row in rows if row["kind"] == "eval" and row["name"].startswith("beyond")]
    solved = [" to ".join(f"{100 * row['pass_at']['8']['value']:.1f}" for row in (first, last))]
    solved.append(" to ".join(f"{100 * row['by_type']['7 terms']:.1f}" for row in (first, last)))
    lines += [
        "",
        f"Of {folders[0].name}: pass@8 goes from {solved[0]}. Problems of 7 terms, longer than",
        f"fine-tuning saw, go from {solved[1]}. Behind filler, beyond the trained window, avg@8 is",
        f"{interval(beyond[0])} without scaling and {interval(beyond[1])} with YaRN.",
    ]
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    write_atomically(readme, ["\n".join([before + BEGIN, "", *lines, "", END + after]).encode()])
    shutil.copy(folders[0] / "curves.svg", ROOT / "bench" / "tiny-curves.svg")


def make(folder: Path, *overrides: str) -> None:
    """One run of train.py with overrides, into a folder of its own."""
    words = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(folder.parent), "--set", f"name={folder.name}"]
    subprocess.run([*command, *words], check=True)


def main() -> None:
    """Make the runs when asked, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="finished runs of recipes/tiny.toml")
    parser.add_argument("--make", type=Path, metavar="PREFIX", help="make PREFIX-SEED and PREFIX-SEED-longer-sft")
    parser.add_argument("--readme", action="store_true", help="rewrite the README's table and picture from these runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    runs = list(arguments.runs)
    for seed in arguments.seeds if arguments.make else ():
        folder = arguments.make.with_name(f"{arguments.make.name}-{seed}")
        seeds = [f"seed={seed}", f"world.seed={seed}"]
        make(folder, *seeds)
        steps = max(row["step"] for row in read_metrics(folder) if row["kind"] == "sft")
        longer = folder.with_name(f"{folder.name}-longer-sft")
        short_rl = [f"stage.{i}.steps=1" for i in (1, 2, 3)]
        make(longer, *seeds, f"stage.0.steps={steps + 100}", "final.data=", *short_rl)
        runs.append(folder)
    if arguments.readme:
        update_readme(runs)
        return
    print("| run | after SFT, avg@8 | after RL, avg@8 | gain | temperatures | never / always | dropped "
          "| groups without a signal | rescued, substituted | skipped | largest log-prob mismatch |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for folder in runs:
        print(describe(folder))
    for folder in runs:
        longer = folder.with_name(f"{folder.name}-longer-sft")
        if longer.exists():
            first, more = held_out(read_metrics(folder))[0], held_out(read_metrics(longer))[0]
            print(f"{folder.name}: SFT {interval(first)}, with 100 more steps {interval(more)}")


if __name__ == "__main__":
    main()
