"""What does each mechanism of the recipe add? Runs in the laptop world without one mechanism each, on several seeds.

    python bench/ablation.py                                # 5 seeds, 9 settings; resume with the same command
    python bench/ablation.py --seeds 0 1 --settings full vanilla --steps 10 --out runs/short
    python bench/ablation.py --tables                       # only tables and figure of the finished runs

recipes/tiny.toml is fine-tuned once per seed (each seed has its own world); every setting continues from it with
its RL stages. Any recipe that begins with an sft stage works. All stages of all settings end after the same number of
tokens generated for training; a separate column shows the tokens that the filter and the temperature search add.
--jobs runs go in parallel and share the cores. Ctrl-C stops them cleanly, and the same command resumes them. For every
finished full run of the laptop world, bench/extrapolation.py measures lengths beyond training.

OUT gets seed-S/SETTING (runs of train.py, next to their recipes and logs), ablation.md, ablation.json and
ablation.svg. Differences to the full recipe are paired by seed, with Student's 95% intervals over seeds.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from extrapolation import SETTINGS as SCALINGS  # noqa: E402
from extrapolation import WINDOW, markdown, means, t_interval, with_interval  # noqa: E402

from engine.files import write_atomically  # noqa: E402
from lab import charts  # noqa: E402
from lab.console import format_eta  # noqa: E402
from lab.metrics import read_metrics  # noqa: E402
from lab.recipe import Recipe, RecipeError, RlStage, load_recipe, to_toml  # noqa: E402

TINY = ROOT / "recipes" / "tiny.toml"
MOST_STEPS = 2  # times --steps: reached only if responses are shorter than expected
# half the world and two thirds of a batch: a run takes two minutes on one core, with as many visits per problem
SHRUNK = ["world.train_problems=320", "search.problems=32", *(f"stage.{i}.batch_problems=32" for i in (1, 2, 3))]
STATIC = {"filter_before": False, "drop_above": 1.0}
SETTINGS: dict[str, dict] = {  # differences from the full recipe, in every rl stage
    "full": {},
    "no-filter": {"filter_before": False},
    "no-refresh": {"drop_above": 1.0},
    "constant-temperature": {"temperature": 1.0},
    "one-length": {},  # the last stage's length in all: see `recipe_of`
    "no-rescue": {"rescue": False},
    "no-substitution": {"substitute": False},
    "no-clip-higher": {"clip_high": 0.2},
    "vanilla": STATIC | {"temperature": 1.0, "rescue": False, "substitute": False},
}
SECONDS_BETWEEN_LINES = 60.0
GRID = 25  # points of the drawn curves


# ------------------------------------------------------------------------------------------------------ the runs


@dataclass(frozen=True)
class Plan:
    """The settings shared by all runs."""

    recipe: Path
    steps: int  # of an rl stage
    response_tokens: int  # expected mean; times the steps, a stage's budget of generated tokens


def recipe_of(plan: Plan, setting: str, seed: int, seed_folder: Path) -> Recipe:
    """Return the recipe of one run; "sft" is the fine-tuning shared by a seed's settings."""
    own = [f"seed={seed}", f"name={setting}", "final.data="]
    base = load_recipe(plan.recipe, [*own, f"world.seed={seed}", *SHRUNK] if plan.recipe == TINY else own)
    if setting == "sft":
        return replace(base, stage=base.stage[:1])
    shared, last, steps = seed_folder.resolve() / "sft", base.stage[-1], plan.steps

    def path(data: str) -> str:
        return str(shared / data) if data.startswith("world/") else data

    stages = []
    for stage in (stage for stage in base.stage if isinstance(stage, RlStage)):
        budget = steps * stage.batch_problems * stage.group_size * plan.response_tokens
        stage = replace(stage, steps=MOST_STEPS * steps, generated_tokens=budget, **SETTINGS[setting])
        if setting == "one-length":
            stage = replace(stage, max_response_tokens=last.max_response_tokens)
        stages.append(replace(stage, data=path(stage.data)))
    # all held-out problems every time, so that the points of a curve differ only by the model
    held_out = replace(base.eval, data=path(base.eval.data), every_steps=max(1, steps // 2), problems_within_stage=0)
    return replace(base, model=str(shared / "stage-0"), world=None, stage=tuple(stages), eval=held_out)


@dataclass(eq=False)
class Job:
    """A process to run to its end, with its own folder."""

    folder: Path
    recipe: Recipe | None  # None: measure the run in `folder` at other lengths
    needs: "Job | None" = None
    process: subprocess.Popen | None = None
    failed: bool = False

    def __str__(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}" + (" measured" if self.recipe is None else "")

    @property
    def log(self) -> Path:
        name = self.folder.name if self.recipe else f"{self.folder.name}-extrapolation"
        return self.folder.with_name(f"{name}.log")

    def finished(self) -> bool:
        """Whether its last result exists."""
        return is_finished(self.folder) if self.recipe else (self.folder / "extrapolation.json").exists()

    def steps_done(self) -> int:
        """Training steps so far."""
        path = self.folder / "metrics.jsonl"
        return sum('"kind": "rl"' in x or '"kind": "sft"' in x for x in path.open()) if path.exists() else 0

    def start(self, threads: int) -> None:
        """Start or resume, in a new session: Ctrl-C reaches only this script, which forwards it once."""
        if self.recipe is None:
            command = ["bench/extrapolation.py", str(self.folder)]
        elif (self.folder / "recipe.toml").exists():
            command = ["train.py", "--resume", str(self.folder)]
        else:
            shutil.rmtree(self.folder, ignore_errors=True)  # stopped before its recipe was written
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            path = self.folder.with_name(f"{self.folder.name}.toml")
            path.write_text(to_toml(self.recipe))
            command = ["train.py", str(path), "--out", str(self.folder.parent)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        script, *words = command
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(ROOT / script), *words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip


def is_finished(folder: Path) -> bool:
    """Whether a run has evaluated its last model."""
    return (folder / "metrics.jsonl").exists() and any(row.get("final") for row in read_metrics(folder))


def make_jobs(out: Path, seeds: Sequence[int], settings: Sequence[str], plan: Plan) -> list[Job]:
    """Return all jobs, seed by seed."""
    jobs = []
    for seed in seeds:
        folder = out / f"seed-{seed}"
        sft = Job(folder / "sft", recipe_of(plan, "sft", seed, folder))
        runs = [Job(folder / setting, recipe_of(plan, setting, seed, folder), sft) for setting in settings]
        measured = [
            job for job in runs if job.folder.name == "full" and plan.recipe == TINY
        ]  # the lengths are those of the laptop world
        jobs += [sft, *runs, *(Job(job.folder, None, job) for job in measured)]
    return jobs


def run_jobs(jobs: list[Job], side_by_side: int) -> None:
    """Run the unfinished jobs, `side_by_side` at a time, and print progress; refuse a folder of another recipe."""
    for job in jobs:
        begun = job.folder / "recipe.toml"
        if job.recipe and begun.exists() and load_recipe(begun) != job.recipe:
            raise RecipeError(f"{job.folder} was begun with another recipe: give another --out, or the same settings")
    done = [job for job in jobs if job.finished()]
    waiting, running, failed = [job for job in jobs if job not in done], [], []
    threads = max(1, len(os.sched_getaffinity(0)) // side_by_side)
    begun, last_line, before = time.perf_counter(), 0.0, len(done)
    print(f"{len(done)} of {len(jobs)} runs are done; {side_by_side} at a time, {threads} threads each", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGTERM stops like Ctrl-C, which a shell's "&" ignores
        signal.signal(number, signal.default_int_handler)
    try:
        while waiting or running:
            ready = [job for job in waiting if job.needs is None or job.needs in done]
            for job in ready[: side_by_side - len(running)]:
                waiting.remove(job)
                running.append(job)
                job.start(threads)
            if not running:
                break  # the remaining jobs need a run that failed
            time.sleep(1.0)
            ended = [job for job in running if job.process.poll() is not None]
            for job in ended:
                running.remove(job)
                if job.finished():
                    done.append(job)
                    if job.recipe:
                        shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
                else:
                    failed.append(job)
                    last = job.log.read_text(errors="replace").strip().splitlines()[-1:]
                    print(f"{job} ended with status {job.process.returncode} ({job.log}): {''.join(last)}", flush=True)
            if ended or time.perf_counter() - last_line > SECONDS_BETWEEN_LINES:
                last_line, elapsed = time.perf_counter(), time.perf_counter() - begun
                made = len(done) - before
                left = elapsed / made * (len(jobs) - len(done)) if made else math.inf
                at = ", ".join(f"{job} step {job.steps_done()}" if job.recipe else str(job) for job in running)
                rate = 3600 * made / elapsed
                print(
                    f"{len(done)}/{len(jobs)} runs  {rate:.1f} runs/h  ETA {format_eta(left)}  running: {at or '-'}",
                    flush=True,
                )
    except KeyboardInterrupt:
        print(f"stopping {len(running)} runs; the same command resumes them", flush=True)
        stop(running)
        raise
    if failed:
        print(f"{len(failed)} runs failed, and {len(waiting)} that need them were not started", flush=True)


def stop(running: list[Job]) -> None:
    """Ask every run to save and stop, and wait for it; a second Ctrl-C kills them."""
    for job in running:
        job.process.terminate()
    try:
        for job in running:
            job.process.wait()
    except KeyboardInterrupt:
        for job in running:
            job.process.kill()


# --------------------------------------------------------------------------------------------------- outcomes


@dataclass
class Outcome:
    """The figures of one finished run; counts are over the run, tokens are generated tokens."""

    scores: list[tuple[int, int, float]]  # step, training tokens until then, held-out avg@8
    filtered: int  # problems
    dropped: int  # between stages
    temperatures: list[float]  # by stage
    steps: int
    groups: int
    rescued: int
    substituted: int
    skipped: int  # updates
    signal_before: float  # share of rollouts whose group had a signal as sampled
    signal_after: float  # and in the update
    distinct4: float  # mean of the last stage's steps
    truncated: float  # share of rollouts, mean over steps
    tokens: int
    overhead_tokens: int | None  # of pass rates and temperature search; None if a resumed run lost the count
    seconds: float = 0.0  # in steps

    @property
    def final(self) -> float:
        return self.scores[-1][2]


def read_outcome(folder: Path) -> Outcome:
    """Return the outcome of a finished run."""
    rows = read_metrics(folder)
    rl = [row for row in rows if row["kind"] == "rl"]
    filters, searches = ([row for row in rows if row["kind"] == kind] for kind in ("filter", "temperature"))
    last = max(row["stage"] for row in rl)
    scores = []
    for row in rows:
        if row["kind"] == "eval" and row["name"] == "held-out":
            scores.append((row["step"], sum(r["tokens"] for r in rl if r["step"] <= row["step"]), row["avg"]))
    groups, silent = sum(row["groups"] for row in rl), sum(row["zero_variance"] for row in rl)
    # a skipped update has no signal; a rescued or substituted group had none before
    heard = sum(
        row["groups"] - row["zero_variance"] + row["rescued"] + row["substituted"] for row in rl if not row["skipped"]
    )
    before = [row for row in filters if row["label"].startswith("before")]
    after = [row for row in filters if row["label"].startswith("after") and row["stage"] < last]
    extra = [row["tokens"] for row in filters + searches]
    return Outcome(
        scores=scores,
        filtered=sum(row["dropped"] for row in before),
        dropped=sum(row["dropped"] for row in after),
        temperatures=[row["chosen"] for row in searches],
        steps=len(rl),
        groups=groups,
        rescued=sum(row["rescued"] for row in rl),
        substituted=sum(row["substituted"] for row in rl),
        skipped=sum(row["skipped"] for row in rl),
        signal_before=1 - silent / groups,
        signal_after=heard / groups,
        distinct4=float(np.mean([row["distinct4"] for row in rl if row["stage"] == last and row["distinct4"]])),
        truncated=float(np.mean([row["truncated_share"] for row in rl])),
        tokens=sum(row["tokens"] for row in rl),
        overhead_tokens=None if None in extra else sum(extra),
        seconds=sum(row["seconds"] for row in rl),
    )


def steps_to(scores: Sequence[tuple[int, int, float]], target: float) -> float:
    """Return the step at which the linearly interpolated evaluations first reach a score, or infinity."""
    for (step, _, score), (next_step, _, next_score) in zip(scores, scores[1:], strict=False):
        if score >= target:
            return float(step)
        if next_score >= target:
            return step + (target - score) / (next_score - score) * (next_step - step)
    return float(scores[0][0]) if scores[0][2] >= target else math.inf


@dataclass
class Results:
    """The outcomes of all finished runs."""

    outcomes: dict[str, dict[int, Outcome]]  # by setting and seed
    lengths: dict[int, dict[tuple[str, float], float]]  # avg@8 by seed, then scaling and ratio
    target: float | None = None  # score of the steps-to column: half way from fine-tuning to full
    differences: dict[str, list[float]] = field(default_factory=dict)  # to full, by setting, one per seed


def read_results(out: Path, seeds: Sequence[int], settings: Sequence[str]) -> Results:
    """Read the finished runs in OUT."""
    outcomes: dict[str, dict[int, Outcome]] = {}
    lengths = {}
    for setting in settings:
        folders = {seed: out / f"seed-{seed}" / setting for seed in seeds}
        outcomes[setting] = {seed: read_outcome(folder) for seed, folder in folders.items() if is_finished(folder)}
    for seed in seeds:
        path = out / f"seed-{seed}" / "full" / "extrapolation.json"
        if path.exists():
            lengths[seed] = {(r["setting"], r["ratio"]): r["avg"] for r in json.loads(path.read_text())["rows"]}
    results = Results({setting: found for setting, found in outcomes.items() if found}, lengths)
    full = results.outcomes.get("full", {})
    if full:
        results.target = float(np.mean([(o.scores[0][2] + o.final) / 2 for o in full.values()]))
    for setting, found in results.outcomes.items():
        if setting != "full" and full.keys() & found.keys():
            results.differences[setting] = [found[s].final - full[s].final for s in sorted(full.keys() & found.keys())]
    return results


# ------------------------------------------------------------------------------------------------ tables and figure


def points(value: float) -> str:
    """Format a share in percent."""
    return f"{100 * value:.1f}"


def mean_of(found: dict[int, Outcome], value: Callable[[Outcome], float | None], form: str = ",.0f") -> str:
    """Return the mean over the seeds in which the value is known."""
    known = [value(outcome) for outcome in found.values() if value(outcome) is not None]
    return format(float(np.mean(known)), form) if known else "?"


def tables(results: Results) -> str:
    """Return three Markdown tables: the scores, the effects of the mechanisms, and the lengths."""
    target = results.target
    scores = [["setting", "seeds", "held-out avg@k", "difference to full", f"steps to {points(target or 0)}", "steps",
               "training tokens", "further tokens"]]  # fmt: skip
    did = [["setting", "filtered + dropped", "temperatures", "rescued", "substituted", "of groups", "skipped updates",
            "rollouts with a signal, sampled -> learned from", "distinct-4, last stage", "truncated"]]  # fmt: skip
    for setting, found in results.outcomes.items():
        reached = [steps_to(o.scores, target) if target else math.inf for o in found.values()]
        middle, longest = float(np.median(reached)), max(o.scores[-1][0] for o in found.values())
        difference = results.differences.get(setting)
        scores.append([
            setting, str(len(found)), with_interval([o.final for o in found.values()]),
            with_interval(difference, signed=True) if difference else "",
            f"{middle:.0f}" if middle < math.inf else f"> {longest}",
            mean_of(found, lambda o: o.steps), mean_of(found, lambda o: o.tokens),
            mean_of(found, lambda o: o.overhead_tokens),
        ])  # fmt: skip
        stages = range(min(len(o.temperatures) for o in found.values()))
        did.append([
            setting, f"{mean_of(found, lambda o: o.filtered)} + {mean_of(found, lambda o: o.dropped)}",
            " -> ".join(mean_of(found, lambda o, i=i: o.temperatures[i], ".2f") for i in stages),
            mean_of(found, lambda o: o.rescued), mean_of(found, lambda o: o.substituted),
            mean_of(found, lambda o: o.groups), mean_of(found, lambda o: o.skipped, ".1f"),
            f"{mean_of(found, lambda o: o.signal_before, '.0%')} -> {mean_of(found, lambda o: o.signal_after, '.0%')}",
            mean_of(found, lambda o: o.distinct4, ".3f"), mean_of(found, lambda o: o.truncated, ".1%"),
        ])  # fmt: skip
    parts = [markdown(scores), markdown(did)]
    if results.lengths:
        parts.append(means(list(results.lengths.values()), WINDOW))
    return "\n\n".join(parts)


def curve(found: dict[int, Outcome]) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """Return the mean score over seeds, with its interval, by thousands of training tokens (interpolated)."""
    ends = min(outcome.scores[-1][1] for outcome in found.values())
    grid = np.linspace(0, ends, GRID)
    heights = [np.interp(grid, *zip(*((tokens, s) for _, tokens, s in o.scores), strict=True)) for o in found.values()]
    line, band = [], []
    for tokens, column in zip(grid / 1e3, zip(*heights, strict=True), strict=True):
        mean, half = t_interval(column)
        line.append((float(tokens), mean))
        band.append((float(tokens), mean - half, mean + half))
    return line, band


def draw(results: Results, path: Path) -> None:
    """Draw paired differences with intervals, the curves of full and vanilla, and accuracy by length."""
    panels = []
    boxes, spans = {}, {}
    for place, (setting, values) in enumerate(results.differences.items(), 1):
        mean, half = t_interval(values)
        ends = (place - 0.35, place + 0.35)
        boxes[f"{place} {setting}"] = [(x, mean) for x in ends]
        spans[f"{place} {setting}"] = [(x, mean - half, mean + half) for x in ends]
    if boxes:
        panels.append({"title": "Held-out avg@8 minus the full recipe's", "series": boxes, "band": spans,
                       "kind": "share", "x_label": "setting", "smooth": False})  # fmt: skip
    drawn = {name: curve(results.outcomes[name]) for name in ("full", "vanilla") if name in results.outcomes}
    if drawn:
        panels.append({"title": "Held-out avg@8", "series": {name: line for name, (line, _) in drawn.items()},
                       "band": {name: band for name, (_, band) in drawn.items()}, "kind": "share",
                       "x_label": "thousand training tokens", "smooth": False})  # fmt: skip
    if results.lengths:
        lines, bands = {}, {}
        for name in SCALINGS:
            ratios = sorted({ratio for row in results.lengths.values() for _, ratio in row})
            found = [(r, *t_interval([row[name, r] for row in results.lengths.values()])) for r in ratios]
            lines[name] = [(r * WINDOW, mean) for r, mean, _ in found]
            bands[name] = [(r * WINDOW, mean - half, mean + half) for r, mean, half in found]
        panels.append({"title": "avg@8 of the same sums, later in a text", "series": lines, "band": bands,
                       "kind": "share", "x_label": "tokens until the end of the answer", "smooth": False})  # fmt: skip
    if panels:
        figure = charts.panels("Ablation: means and 95% intervals over seeds", panels, len(panels))
        text = charts.svg(figure).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
        write_atomically(path, [text.encode()])


def main() -> None:
    """Run the missing jobs, then print the tables and one line of JSON, and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--recipe", type=Path, default=TINY, help="an sft stage, then rl stages")
    parser.add_argument("--response-tokens", type=int, default=27, help="expected mean, for a stage's token budget")
    parser.add_argument("--steps", type=int, default=15, help="of each rl stage, for its token budget")
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs")
    parser.add_argument("--tables", action="store_true", help="only print the tables of finished runs")
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.jobs, arguments.response_tokens) < 1:
        parser.error("--steps, --jobs and --response-tokens must be at least 1")
    settings = [name for name in SETTINGS if name in arguments.settings]
    complete = True
    if not arguments.tables:
        try:
            plan = Plan(arguments.recipe.resolve(), arguments.steps, arguments.response_tokens)
            jobs = make_jobs(arguments.out, arguments.seeds, settings, plan)
            run_jobs(jobs, arguments.jobs)
        except RecipeError as error:
            sys.exit(f"ablation.py: {error}")
        except KeyboardInterrupt:
            sys.exit("stopped")
        complete = all(job.finished() for job in jobs)
    results = read_results(arguments.out, arguments.seeds, settings)
    if not results.outcomes:
        sys.exit(f"ablation.py: no run in {arguments.out} is finished")
    text = tables(results)
    record = {
        "target": results.target,
        "differences": results.differences,
        "runs": {name: {seed: asdict(o) for seed, o in found.items()} for name, found in results.outcomes.items()},
        "lengths": {
            seed: [{"setting": name, "ratio": ratio, "avg": avg} for (name, ratio), avg in row.items()]
            for seed, row in results.lengths.items()
        },
    }
    write_atomically(arguments.out / "ablation.md", [text.encode(), b"\n"])
    write_atomically(arguments.out / "ablation.json", [json.dumps(record).encode()])
    draw(results, arguments.out / "ablation.svg")
    print(text)
    print(json.dumps({"target": results.target, "differences": results.differences}))
    sys.exit(not complete)


if __name__ == "__main__":
    main()
