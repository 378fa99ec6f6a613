"""Does the recipe win where its premise holds? One premise, on and off, with and without what it is for.

    python bench/interaction.py              # about 100 short runs, 4 hours of one core; resume with the same command
    python bench/interaction.py batch        # another premise: 84 runs
    python bench/interaction.py --tables     # only the tables of the finished runs

Premise "j": the full recipe against GRPO and one plain stage, in the laptop world as it is, and in one whose teacher
is as careless with short sums, and which has as many problems of each length. Premise "batch": rescue and substitution
in one plain stage, at 6 and at 32 problems a batch. The rules, written before the first run of each, are in
bench/RESULTS.md ("The interaction"). Every seed has its own world and one fine-tuned model for all arms. First each
arm chooses its learning rate on seeds of its own, then the arms run on the others, then their last models are
evaluated at their own training temperature and greedily.

OUT gets WORLD/seed-S/ARM-RATE (runs of train.py; ARM-SETTING-RATE of another premise), PREMISE.md and PREMISE.json.
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

WORLDS = {"on": [], "off": ["world.sft_noise=[0.15]", "world.train_terms=[3, 4, 5, 6, 7]"]}  # with the J, and without
ARMS = {
    "full": SETTINGS["full"],
    "vanilla": SETTINGS["vanilla"],
    "justrl": SETTINGS["vanilla"],
    "substitute": SETTINGS["vanilla"] | {"rescue": True, "substitute": True},
    "no-third": SETTINGS["vanilla"] | {"rescue": True, "substitute": True, "informative_share": 0.0},
}
STAGED = ("full", "vanilla")  # the other arms have one stage, with the last one's limit
TUNING_SEEDS, SEEDS = (100, 101), range(8)
# small batches, and many visits of few problems; searches on few of them
BATCH, GROUP, PROBLEMS, VISITS, RESPONSE_TOKENS = 8, 8, 160, 12, 25
SIZES = [f"world.train_problems={PROBLEMS}", "world.held_out_problems=120", "search.problems=16", "final.data="]
BUDGET = PROBLEMS * VISITS * GROUP * RESPONSE_TOKENS  # training tokens of each arm; curves are compared up to here
BAND, EASY = ("5 terms", "6 terms"), ("3 terms", "4 terms")  # to be learned; must not be forgotten
EVERY_PROBLEMS, GRID, SHARE = 240, 400, 0.8
# the premise checks
LEAST_ALWAYS, MOST_ALWAYS, LEAST_SILENT = 0.25, 0.1, 0.1
MOST_SMALL, LEAST_LARGE, LEAST_GIVEN = 3.0, 8.0, 0.1


@dataclass(frozen=True)
class Setting:
    """A world, a batch in it, and the learning rates of which each arm chooses one."""

    world: str
    batch_problems: int = BATCH
    rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4)

    def name(self, arm: str, rate: float) -> str:
        """Return the name of a run."""
        return f"{arm}-{rate:g}" if self.batch_problems == BATCH else f"{arm}-batch-{self.batch_problems}-{rate:g}"


@dataclass(frozen=True)
class Premise:
    """What is switched, and the differences between arms that it should change."""

    on: Setting
    off: Setting
    pairs: tuple[tuple[str, str], ...]

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(arm for pair in self.pairs for arm in pair))

    @property
    def settings(self) -> dict[str, Setting]:
        return {"on": self.on, "off": self.off}


PREMISES = {
    "j": Premise(Setting("on"), Setting("off"), (("full", "vanilla"), ("full", "justrl"))),
    "batch": Premise(
        Setting("on", 6), Setting("on", 32, (1e-4, 2e-4, 4e-4)), (("substitute", "justrl"), ("no-third", "justrl"))
    ),
}


def fine_tuning(world: str, seed: int) -> Recipe:
    """Return the recipe of the world and the model that a seed's arms share."""
    base = load_recipe(TINY, [f"seed={seed}", f"world.seed={seed}", *SIZES, *WORLDS[world]])
    return replace(base, name="sft", stage=base.stage[:1])


def recipe_of(setting: Setting, arm: str, rate: float, seed: int, shared: Path) -> Recipe:
    """Return the recipe of one run, which begins with the fine-tuned model in `shared`."""
    base = load_recipe(TINY, [f"seed={seed}", f"world.seed={seed}", *SIZES, *WORLDS[setting.world]])
    first, *_, last = stages = base.stage[1:]
    stages = stages if arm in STAGED else [replace(last, warmup_steps=first.warmup_steps)]
    batch = setting.batch_problems
    common = {"batch_problems": batch, "group_size": GROUP, "learning_rate": rate, **ARMS[arm]}
    common |= {"steps": MOST_STEPS * PROBLEMS * VISITS // batch // len(stages)}
    common |= {"generated_tokens": BUDGET // len(stages)}
    problems = [str(shared / first.data), "", ""]
    stages = [replace(stage, **common, data=data) for stage, data in zip(stages, problems, strict=False)]
    held_out = replace(base.eval, data=str(shared / base.eval.data), every_steps=EVERY_PROBLEMS // batch,
                       problems_within_stage=0)  # fmt: skip
    name = setting.name(arm, rate)
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
    heard: float  # groups with different rewards, a step
    given: float  # share of groups that were rescued or substituted
    skipped: float  # share of steps without an update
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
        (silent := sum(row["zero_variance"] for row in rl)) / (groups := sum(row["groups"] for row in rl)),
        (groups - silent) / len(rl),
        sum(row["rescued"] + row["substituted"] for row in rl) / groups,
        float(np.mean([row["skipped"] for row in rl])),
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


def folder_of(out: Path, setting: Setting, seed: int, arm: str, rate: float) -> Path:
    """Return the folder of a run."""
    return out / setting.world / f"seed-{seed}" / setting.name(arm, rate)


def chosen_rate(out: Path, setting: Setting, arm: str) -> float | None:
    """Return the rate with the largest mean area on the tuning seeds, or None before all of them are finished."""
    means = tuning_areas(out, setting, arm)
    return max(means, key=means.get) if means else None


def tuning_areas(out: Path, setting: Setting, arm: str) -> dict[float, float]:
    """Return the mean area on the tuning seeds by rate; nothing before all of them are finished."""
    means = {}
    for rate in setting.rates:
        folders = [folder_of(out, setting, seed, arm, rate) for seed in TUNING_SEEDS]
        if not all(map(is_finished, folders)):
            return {}
        means[rate] = float(np.mean([area(curve.tokens, curve.band) for curve in map(read_curve, folders)]))
    return means


def make_jobs(
    out: Path, seeds: Sequence[int], rates: dict[tuple[Setting, str], Sequence[float]], judge: bool
) -> list[Job]:
    """Return the runs of these seeds, seed by seed, with the evaluations of their last models when they are judged."""
    jobs: list[Job] = []
    for seed in seeds:
        tuned: dict[str, Job] = {}
        for (setting, arm), values in rates.items():
            shared = out / setting.world / f"seed-{seed}" / "sft"
            if setting.world not in tuned:
                tuned[setting.world] = Job(shared, fine_tuning(setting.world, seed))
                jobs.append(tuned[setting.world])
            for rate in values:
                recipe = recipe_of(setting, arm, rate, seed, shared.resolve())
                run = Job(folder_of(out, setting, seed, arm, rate), recipe, tuned[setting.world])
                jobs += [run, *(Evaluation(run.folder, None, run, greedy=greedy) for greedy in (False, True) if judge)]
    return jobs


def check_j(curves: dict[tuple[str, str], list[Curve]]) -> tuple[bool, str]:
    """Return whether the premise "j" holds, and the figures."""
    always = {when: np.mean([curve.always for curve in curves[when, "full"]]) for when in ("on", "off")}
    silent = {when: np.mean([curve.silent for curve in curves[when, "vanilla"]]) for when in ("on", "off")}
    holds = always["on"] >= LEAST_ALWAYS and always["off"] <= MOST_ALWAYS
    return holds and silent["on"] - silent["off"] >= LEAST_SILENT, (
        f"always solved {always['on']:.0%} on, {always['off']:.0%} off; vanilla's groups without a signal "
        f"{silent['on']:.0%} on, {silent['off']:.0%} off"
    )


def check_batch(curves: dict[tuple[str, str], list[Curve]]) -> tuple[bool, str]:
    """Return whether the premise "batch" holds, and the figures."""
    heard = {when: np.mean([curve.heard for curve in curves[when, "justrl"]]) for when in ("on", "off")}
    given = {when: np.mean([curve.given for curve in curves[when, "no-third"]]) for when in ("on", "off")}
    holds = heard["on"] <= MOST_SMALL and heard["off"] >= LEAST_LARGE
    return holds and min(given.values()) >= LEAST_GIVEN, (
        f"justrl's groups with a signal a step {heard['on']:.1f} on, {heard['off']:.1f} off; no-third's groups rescued "
        f"or substituted {given['on']:.0%} on, {given['off']:.0%} off"
    )


CHECKS = {"j": check_j, "batch": check_batch}


def holm(tests: dict[tuple[str, str], list[float]]) -> dict[tuple[str, str], float]:
    """Return Holm's adjusted p of the means of paired differences."""
    adjusted, largest = {}, 0.0
    for rank, (pair, p) in enumerate(sorted(((x, sign_flip_p(tests[x])) for x in tests), key=lambda found: found[1])):
        largest = max(largest, min(1.0, (len(tests) - rank) * p))
        adjusted[pair] = largest
    return adjusted


def tables(out: Path, name: str, seeds: Sequence[int]) -> tuple[str, dict]:
    """Return the tables of the seeds whose runs are all finished, and the figures behind them."""
    premise = PREMISES[name]
    tuning = {(when, arm): tuning_areas(out, setting, arm) for when, setting in premise.settings.items()
              for arm in premise.arms}  # fmt: skip
    if not all(tuning.values()):
        return "the learning rates are not chosen yet", {}
    rates = {key: max(means, key=means.get) for key, means in tuning.items()}
    chosen = {(premise.settings[when], arm): [rate] for (when, arm), rate in rates.items()}
    seeds = [seed for seed in seeds if all(job.finished() for job in make_jobs(out, [seed], chosen, True))]
    if not seeds:
        return "no seed is finished yet", {}
    runs = [["premise, arm", "learning rate", "area, 5 and 6 terms", "the same against training tokens",
             "area, all lengths", "tokens to 80%", "all tokens", "end, own T", "end, T = 1", "end, greedy",
             "3 and 4 terms, end minus start", "without a signal", "rescued or substituted", "skipped updates",
             "always solved"]]  # fmt: skip
    paired = [["difference", "area, 5 and 6 terms", "the same against training tokens", "end, T = 1",
               "3 and 4 terms, end minus start", "tokens not for training"]]  # fmt: skip
    tuned = [["premise, arm", "smallest", "middle", "largest"]]
    curves: dict[tuple[str, str], list[Curve]] = {}
    areas: dict[tuple[str, str], list[float]] = {}
    record: dict = {"seeds": list(seeds), "rates": {" ".join(key): rate for key, rate in rates.items()}, "runs": {}}
    for when, setting in premise.settings.items():
        folders = {arm: [folder_of(out, setting, s, arm, rates[when, arm]) for s in seeds] for arm in premise.arms}
        curves |= {(when, arm): [read_curve(folder) for folder in folders[arm]] for arm in premise.arms}
        start = np.mean([curve.band[0] for arm in premise.arms for curve in curves[when, arm]])
        best = max(np.mean([curve.band[-1] for curve in curves[when, arm]]) for arm in premise.arms)
        target = start + SHARE * (best - start)
        for arm in premise.arms:
            found = curves[when, arm]
            areas[when, arm] = [area(curve.tokens, curve.band) for curve in found]
            ends = {kind: [read_end(folder, kind) for folder in folders[arm]] for kind in ("own", "greedy")}
            always = [curve.always for curve in found if curve.always is not None]
            tuned.append([f"{when}, {arm}", *(f"{rate:g}: {100 * x:.1f}" for rate, x in tuning[when, arm].items())])
            runs.append([
                f"{when}, {arm}", f"{rates[when, arm]:g}", with_interval(areas[when, arm]),
                with_interval([area(curve.trained, curve.band) for curve in found]),
                with_interval([area(curve.tokens, curve.every) for curve in found]),
                f"{np.mean([tokens_to(curve, target) for curve in found]):,.0f}",
                f"{np.mean([curve.tokens[-1] for curve in found]):,.0f}", with_interval(ends["own"]),
                with_interval([curve.every[-1] for curve in found]), with_interval(ends["greedy"]),
                with_interval([curve.easy[-1] - curve.easy[0] for curve in found], signed=True),
                f"{np.mean([curve.silent for curve in found]):.0%}", f"{np.mean([curve.given for curve in found]):.0%}",
                f"{np.mean([curve.skipped for curve in found]):.0%}", f"{np.mean(always):.0%}" if always else "",
            ])  # fmt: skip
            record["runs"][f"{when} {arm}"] = {
                "area": areas[when, arm], "silent": [c.silent for c in found], "always": always, **ends
            }  # fmt: skip
        for first, second in premise.pairs:
            pairs = list(zip(curves[when, first], curves[when, second], strict=True))
            differences = [
                [area(x.tokens, x.band) - area(y.tokens, y.band) for x, y in pairs],
                [area(x.trained, x.band) - area(y.trained, y.band) for x, y in pairs],
                [x.every[-1] - y.every[-1] for x, y in pairs],
                [(x.easy[-1] - x.easy[0]) - (y.easy[-1] - y.easy[0]) for x, y in pairs],
            ]
            more = np.mean([(x.tokens[-1] - x.trained[-1]) - (y.tokens[-1] - y.trained[-1]) for x, y in pairs])
            cells = [with_interval(values, signed=True) for values in differences]
            paired.append([f"{first} minus {second}, {when}", *cells, f"{more:+,.0f}"])
    tests = {(x, y): [(areas["on", x][i] - areas["on", y][i]) - (areas["off", x][i] - areas["off", y][i])
                      for i in range(len(seeds))] for x, y in premise.pairs}  # fmt: skip
    adjusted = holm(tests)
    claim = [["interaction: the difference on, minus off", "area, 5 and 6 terms", "p, Holm"]]
    claim += [[f"{x} minus {y}", with_interval(values, signed=True), f"{adjusted[x, y]:.3f}"]
              for (x, y), values in tests.items()]  # fmt: skip
    holds, figures = CHECKS[name](curves)
    check = f"premise check {'holds' if holds else 'FAILS: void'}: {figures}"
    record |= {"interaction": {f"{x} minus {y}": values for (x, y), values in tests.items()}, "holds": bool(holds)}
    record |= {"p": {f"{x} minus {y}": p for (x, y), p in adjusted.items()}}
    blocks = [f"{len(seeds)} seeds; {check}", *map(markdown, (claim, paired, runs))]
    return "\n\n".join([*blocks, "Learning rate: area on the tuning seeds", markdown(tuned)]), record


def main() -> None:
    """Choose the learning rates, run the arms, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("premise", nargs="?", choices=PREMISES, default="j")
    parser.add_argument("--out", type=Path, default=Path("runs/interaction"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs")
    parser.add_argument("--tables", action="store_true", help="only print the tables of finished runs")
    arguments = parser.parse_args()
    premise = PREMISES[arguments.premise]
    if not arguments.tables:
        every = {(setting, arm): setting.rates for setting in premise.settings.values() for arm in premise.arms}
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
    text, record = tables(arguments.out, arguments.premise, arguments.seeds)
    print(text)
    if record:
        write_atomically(arguments.out / f"{arguments.premise}.md", [text.encode(), b"\n"])
        write_atomically(arguments.out / f"{arguments.premise}.json", [json.dumps(record).encode()])


if __name__ == "__main__":
    main()
