"""Does the full recipe win where its premise holds? The J shape on and off, against GRPO and one plain stage.

    python bench/interaction.py              # about 100 short runs, a night on two cores; resume with the same command
    python bench/interaction.py --tables     # only the tables of the finished runs

The rules, written before the first run, are in bench/RESULTS.md ("The interaction"). Premise on is the laptop world as
it is; off is a teacher who is as careless with short sums, and as many problems of each length. Every seed has its own
world and one fine-tuned model for all arms. First each arm chooses its learning rate on seeds of its own, then the
arms run on the others, then their last models are evaluated at their own training temperature and greedily.

OUT gets PREMISE/seed-S/ARM-RATE (runs of train.py), interaction.md and interaction.json.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ablation import MOST_STEPS, SETTINGS, TINY, Job, is_finished, run_jobs  # noqa: E402
from extrapolation import markdown, with_interval  # noqa: E402

from engine.files import write_atomically  # noqa: E402
from lab.metrics import read_metrics  # noqa: E402
from lab.recipe import Recipe, RecipeError, load_recipe  # noqa: E402

PREMISES = {"on": [], "off": ["world.sft_noise=[0.15]", "world.train_terms=[3, 4, 5, 6, 7]"]}
ARMS = {"full": SETTINGS["full"], "vanilla": SETTINGS["vanilla"], "justrl": SETTINGS["vanilla"]}  # justrl: one stage
RATES, TUNING_SEEDS, SEEDS = (5e-5, 1e-4, 2e-4), (100, 101), range(8)
# small batches, and many visits of few problems; searches on few of them
BATCH, GROUP, PROBLEMS, VISITS, RESPONSE_TOKENS = 8, 8, 160, 12, 25
SIZES = [f"world.train_problems={PROBLEMS}", "world.held_out_problems=120", "search.problems=16", "final.data="]
STEPS = PROBLEMS * VISITS // BATCH
BUDGET = STEPS * BATCH * GROUP * RESPONSE_TOKENS  # training tokens of each arm; curves are compared up to here
BAND, EASY = ("5 terms", "6 terms"), ("3 terms", "4 terms")  # to be learned; must not be forgotten
EVERY_STEPS, GRID, SHARE = 30, 400, 0.8
LEAST_ALWAYS, MOST_ALWAYS, LEAST_SILENT = 0.25, 0.1, 0.1  # the premise check


def recipe_of(premise: str, arm: str, rate: float, seed: int, folder: Path) -> Recipe:
    """Return the recipe of one run; "sft" is the fine-tuning shared by a seed's arms."""
    base = load_recipe(TINY, [f"seed={seed}", f"world.seed={seed}", *SIZES, *PREMISES[premise]])
    if arm == "sft":
        return replace(base, name="sft", stage=base.stage[:1])
    shared = folder.resolve() / "sft"
    first, *_, last = stages = base.stage[1:]
    stages = [replace(last, warmup_steps=first.warmup_steps)] if arm == "justrl" else stages
    common = {"batch_problems": BATCH, "group_size": GROUP, "learning_rate": rate, **ARMS[arm]}
    common |= {"steps": MOST_STEPS * STEPS // len(stages), "generated_tokens": BUDGET // len(stages)}
    problems = [str(shared / first.data), "", ""]
    stages = [replace(stage, **common, data=data) for stage, data in zip(stages, problems, strict=False)]
    held_out = replace(base.eval, data=str(shared / base.eval.data), every_steps=EVERY_STEPS, problems_within_stage=0)
    name = f"{arm}-{rate:g}"
    return replace(base, name=name, model=str(shared / "stage-0"), world=None, stage=tuple(stages), eval=held_out)


@dataclass(eq=False)
class Evaluation(Job):
    """The last model of a finished run, at its own training temperature or greedily."""

    greedy: bool = False

    @property
    def out(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}-{'greedy' if self.greedy else 'own'}")

    @property
    def log(self) -> Path:
        return self.out.with_name(f"{self.out.name}.log")

    def finished(self) -> bool:
        return (self.out / "results.json").exists()

    def start(self, threads: int) -> None:
        """Start or resume eval.py."""
        recipe, rows = load_recipe(self.folder / "recipe.toml"), read_metrics(self.folder)
        own = [row["temperature"] for row in rows if row["kind"] == "rl"][-1]
        words = ["-n", "1", "--temperature", "0"] if self.greedy else ["-n", "8", "--temperature", f"{own}"]
        command = [sys.executable, str(ROOT / "eval.py"), str(self.folder / f"stage-{len(recipe.stage) - 1}"), "--data",
                   recipe.eval.data, *words, "--top-k", "0", "--max-tokens", str(recipe.eval.max_response_tokens),
                   "--instruction", "", "--out", str(self.out)]  # fmt: skip
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )  # fmt: skip


@dataclass
class Curve:
    """The held-out evaluations of a run against all tokens generated until then."""

    tokens: np.ndarray
    trained: np.ndarray  # tokens generated for training alone
    band: np.ndarray  # accuracy on BAND
    easy: np.ndarray
    every: np.ndarray
    silent: float  # share of groups with equal rewards
    always: float | None  # share of problems always solved before RL; None without a filter


@cache
def read_curve(folder: Path) -> Curve:
    """Read a finished run."""
    total, trained, points, rows = 0, 0, [], read_metrics(folder)
    for row in rows:
        if row["kind"] in ("rl", "filter", "temperature"):
            if row["tokens"] is None:  # stopped while sampling for a filter or a search
                sys.exit(f"interaction.py: {folder} lost count of its tokens: remove the folder to repeat the run")
            total += row["tokens"]
            trained += row["tokens"] * (row["kind"] == "rl")
        elif row["kind"] == "eval":
            means = [np.mean([row["by_type"][terms] for terms in part]) for part in (BAND, EASY)]
            points.append((total, trained, *means, row["avg"]))
    rl = [row for row in rows if row["kind"] == "rl"]
    before = next((row["before"] for row in rows if row["kind"] == "filter" and row["tokens"]), None)
    return Curve(
        *np.array(points).T,
        sum(row["zero_variance"] for row in rl) / sum(row["groups"] for row in rl),
        before[-1] / sum(before) if before else None,
    )


def read_end(folder: Path, kind: str) -> float:
    """Return the accuracy of a run's last model, "own" or "greedy"."""
    found = json.loads((folder.with_name(f"{folder.name}-{kind}") / "results.json").read_text())
    return found["evaluations"][0]["avg"]


def area(tokens: np.ndarray, heights: np.ndarray) -> float:
    """Return the mean height over tokens up to BUDGET; until the first evaluation it is the fine-tuned model's."""
    return float(np.interp(np.linspace(0, BUDGET, GRID), tokens, heights).mean())


def tokens_to(curve: Curve, target: float) -> float:
    """Return the tokens at which the band's curve first reaches a height, or BUDGET."""
    grid = np.linspace(0, BUDGET, GRID)
    reached = np.interp(grid, curve.tokens, curve.band) >= target
    return float(grid[reached.argmax()]) if reached.any() else float(BUDGET)


def sign_flip_p(values: Sequence[float]) -> float:
    """Return the exact two-sided p of a mean of 0 under all flips of signs."""
    flips = np.array(list(itertools.product((1, -1), repeat=len(values)))) @ np.array(values)
    return float((np.abs(flips) >= abs(sum(values)) - 1e-12).mean())


def folder_of(out: Path, premise: str, seed: int, arm: str, rate: float) -> Path:
    """Return the folder of a run."""
    return out / premise / f"seed-{seed}" / f"{arm}-{rate:g}"


def chosen_rate(out: Path, premise: str, arm: str) -> float | None:
    """Return the rate with the largest mean area on the tuning seeds, or None before all of them are finished."""
    means = {}
    for rate in RATES:
        folders = [folder_of(out, premise, seed, arm, rate) for seed in TUNING_SEEDS]
        if not all(map(is_finished, folders)):
            return None
        means[rate] = np.mean([area(curve.tokens, curve.band) for curve in map(read_curve, folders)])
    return max(means, key=means.get)


def make_jobs(out: Path, seeds: Sequence[int], rates: dict[tuple[str, str], Sequence[float]], judge: bool) -> list[Job]:
    """Return the runs of these seeds, seed by seed, with the evaluations of their last models when they are judged."""
    jobs: list[Job] = []
    for seed, premise in itertools.product(seeds, PREMISES):
        folder = out / premise / f"seed-{seed}"
        sft = Job(folder / "sft", recipe_of(premise, "sft", 0, seed, folder))
        jobs.append(sft)
        for arm, rate in [(name, rate) for name in ARMS for rate in rates[premise, name]]:
            run = Job(folder_of(out, premise, seed, arm, rate), recipe_of(premise, arm, rate, seed, folder), sft)
            jobs += [run, *(Evaluation(run.folder, None, run, greedy=greedy) for greedy in (False, True) if judge)]
    return jobs


def tables(out: Path, seeds: Sequence[int]) -> tuple[str, dict]:
    """Return the tables of the seeds whose runs are all finished, and the figures behind them."""
    rates = {(premise, arm): chosen_rate(out, premise, arm) for premise in PREMISES for arm in ARMS}
    if None in rates.values():
        return "the learning rates are not chosen yet", {}
    jobs = {seed: make_jobs(out, [seed], {key: [rate] for key, rate in rates.items()}, True) for seed in seeds}
    seeds = [seed for seed in seeds if all(job.finished() for job in jobs[seed])]
    if not seeds:
        return "no seed is finished yet", {}
    lines = [["premise, arm", "learning rate", "area, 5 and 6 terms", "the same against training tokens",
              "area, all lengths", "tokens to 80%", "all tokens", "end, own T", "end, T = 1", "end, greedy",
              "3 and 4 terms, end minus start", "without a signal", "always solved"]]  # fmt: skip
    paired = [["full minus", "area, 5 and 6 terms", "the same against training tokens", "end, T = 1",
               "3 and 4 terms, end minus start", "tokens not for training"]]  # fmt: skip
    areas: dict[tuple[str, str], list[float]] = {}
    record: dict = {"seeds": list(seeds), "rates": {" ".join(key): rate for key, rate in rates.items()}, "runs": {}}
    for premise in PREMISES:
        folders = {arm: [folder_of(out, premise, s, arm, rates[premise, arm]) for s in seeds] for arm in ARMS}
        curves = {arm: [read_curve(folder) for folder in folders[arm]] for arm in ARMS}
        start = np.mean([curve.band[0] for found in curves.values() for curve in found])
        best = max(np.mean([curve.band[-1] for curve in found]) for found in curves.values())
        target = start + SHARE * (best - start)
        for arm, found in curves.items():
            areas[premise, arm] = [area(curve.tokens, curve.band) for curve in found]
            ends = {kind: [read_end(folder, kind) for folder in folders[arm]] for kind in ("own", "greedy")}
            always = [curve.always for curve in found if curve.always is not None]
            lines.append([
                f"{premise}, {arm}", f"{rates[premise, arm]:g}", with_interval(areas[premise, arm]),
                with_interval([area(curve.trained, curve.band) for curve in found]),
                with_interval([area(curve.tokens, curve.every) for curve in found]),
                f"{np.mean([tokens_to(curve, target) for curve in found]):,.0f}",
                f"{np.mean([curve.tokens[-1] for curve in found]):,.0f}", with_interval(ends["own"]),
                with_interval([curve.every[-1] for curve in found]), with_interval(ends["greedy"]),
                with_interval([curve.easy[-1] - curve.easy[0] for curve in found], signed=True),
                f"{np.mean([curve.silent for curve in found]):.0%}", f"{np.mean(always):.0%}" if always else "",
            ])  # fmt: skip
            if arm != "full":
                pairs = list(zip(curves["full"], found, strict=True))
                differences = [
                    [area(x.tokens, x.band) - area(y.tokens, y.band) for x, y in pairs],
                    [area(x.trained, x.band) - area(y.trained, y.band) for x, y in pairs],
                    [x.every[-1] - y.every[-1] for x, y in pairs],
                    [(x.easy[-1] - x.easy[0]) - (y.easy[-1] - y.easy[0]) for x, y in pairs],
                ]
                more = np.mean([(x.tokens[-1] - x.trained[-1]) - (y.tokens[-1] - y.trained[-1]) for x, y in pairs])
                cells = [with_interval(values, signed=True) for values in differences]
                paired.append([f"{arm}, {premise}", *cells, f"{more:+,.0f}"])
            record["runs"][f"{premise} {arm}"] = {
                "area": areas[premise, arm], "silent": [c.silent for c in found], "always": always, **ends
            }  # fmt: skip
    tests = {arm: [(areas["on", "full"][i] - areas["on", arm][i]) - (areas["off", "full"][i] - areas["off", arm][i])
                   for i in range(len(seeds))] for arm in ARMS if arm != "full"}  # fmt: skip
    by_p = sorted(tests, key=lambda arm: sign_flip_p(tests[arm]))
    adjusted, largest = {}, 0.0
    for rank, arm in enumerate(by_p):  # Holm
        largest = max(largest, min(1.0, (len(by_p) - rank) * sign_flip_p(tests[arm])))
        adjusted[arm] = largest
    claim = [["interaction: (full minus arm, on) minus (full minus arm, off)", "area, 5 and 6 terms", "p, Holm"]]
    claim += [[arm, with_interval(values, signed=True), f"{adjusted[arm]:.3f}"] for arm, values in tests.items()]
    always = {premise: np.mean(record["runs"][f"{premise} full"]["always"]) for premise in PREMISES}
    silent = {premise: np.mean(record["runs"][f"{premise} vanilla"]["silent"]) for premise in PREMISES}
    holds = always["on"] >= LEAST_ALWAYS and always["off"] <= MOST_ALWAYS
    holds &= silent["on"] - silent["off"] >= LEAST_SILENT
    check = (
        f"premise check {'holds' if holds else 'FAILS: the cell is void'}: always solved {always['on']:.0%} on, "
        f"{always['off']:.0%} off; vanilla's groups without a signal {silent['on']:.0%} on, {silent['off']:.0%} off"
    )
    record |= {"interaction": tests, "p": adjusted, "holds": bool(holds)}
    return "\n\n".join([f"{len(seeds)} seeds; {check}", markdown(claim), markdown(paired), markdown(lines)]), record


def main() -> None:
    """Choose the learning rates, run the arms, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/interaction"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs")
    parser.add_argument("--tables", action="store_true", help="only print the tables of finished runs")
    arguments = parser.parse_args()
    if not arguments.tables:
        every = {(premise, arm): RATES for premise in PREMISES for arm in ARMS}
        try:
            run_jobs(make_jobs(arguments.out, TUNING_SEEDS, every, False), arguments.jobs)
            best = {key: chosen_rate(arguments.out, *key) for key in every}
            if None in best.values():
                sys.exit("interaction.py: a run that chooses a learning rate failed; the same command tries again")
            rates = {key: [rate] for key, rate in best.items()}
            run_jobs(make_jobs(arguments.out, arguments.seeds, rates, True), arguments.jobs)
        except RecipeError as error:
            sys.exit(f"interaction.py: {error}")
        except KeyboardInterrupt:
            sys.exit("stopped")
    text, record = tables(arguments.out, arguments.seeds)
    print(text)
    if record:
        write_atomically(arguments.out / "interaction.md", [text.encode(), b"\n"])
        write_atomically(arguments.out / "interaction.json", [json.dumps(record).encode()])


if __name__ == "__main__":
    main()
