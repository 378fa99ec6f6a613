"""The commands of data_filter.py: estimate, filter, drop."""

import argparse
from pathlib import Path

from data_filter import (
    ESTIMATE_DRAW,
    Filtered,
    History,
    draw_histogram,
    drop_easy,
    estimate,
    filter_mirrored_j,
    histogram,
    problems_fingerprint,
    require_batch,
    verdict,
)
from engine import distributed
from engine.checkpoint import read_state
from engine.files import write_atomically
from engine.fingerprint import require_same
from lab import charts, premises
from lab.benchmarks import text_table
from lab.command import load_worker, run_command
from lab.data_files import DataError
from lab.problems import Problem, read_problems, write_problems
from lab.recipe import Recipe, RecipeError, RlStage, load_recipe
from lab.variants import own_function


def read_data(arguments: argparse.Namespace, rewarded: bool) -> list[Problem]:
    """Read the problems of a command, of which a reward function may need the whole rows."""
    on_bad_row = "skip" if arguments.skip_bad_rows else "stop"
    return read_problems(arguments.data, on_bad_row, rewarded, arguments.columns)[: arguments.limit]


def estimate_command(arguments: argparse.Namespace) -> None:
    """Estimate pass rates on all processes, and print their histogram and what they mean for a recipe."""
    recipe = load_recipe(arguments.recipe) if arguments.recipe else None
    if recipe and not any(isinstance(stage, RlStage) for stage in recipe.stage):
        raise RecipeError(f"{arguments.recipe} has no rl stage, so pass rates mean nothing for it; give another")
    sets = {arguments.data: read_data(arguments, bool(arguments.reward))}
    stopping = "saving the finished problems"
    worker, sampling, identity = load_worker(arguments, sets, stopping, "training", ESTIMATE_DRAW)
    problems = sets[arguments.data]
    is_main = worker.processes.is_main
    if is_main:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with worker.grader:
        history = estimate(worker, problems, arguments.n, sampling, arguments.out, identity)
    if is_main:
        rates = [history.estimate(problem.id) for problem in problems]
        show(arguments.out, f"Pass rates of {arguments.model}", {"problems": rates}, arguments.n)
        recipe, rope = recipe or as_published(arguments, len(problems)), worker.model.config.rope
        print(f"premises of {premises.expect(recipe, None, history, [problem.id for problem in problems], rope)}")


def as_published(arguments: argparse.Namespace, problems: int) -> Recipe:
    """Return three stages of one epoch each, with the settings of POLARIS and the estimate's sampling."""
    batch = min(RlStage.batch_problems, problems)
    stage = RlStage(
        steps=problems // batch, batch_problems=batch, temperature=arguments.temperature,
        max_response_tokens=arguments.max_tokens,
    )  # fmt: skip
    return Recipe(name="as published", model=arguments.model, stage=(stage,) * 3)


def filter_command(arguments: argparse.Namespace) -> None:
    """Drop the problems that are always solved, by the pass rates of a file."""
    history = History.load(arguments.pass_rates)
    identity = (history.settings or {}).get("identity")
    problems = read_data(arguments, isinstance(identity, dict) and bool(identity.get("reward function")))
    if arguments.skip_bad_rows:  # as the estimate did with prompts that were too long
        known = [problem for problem in problems if history.visits(problem.id)]
        print(f"left out {len(problems) - len(known):,} problems without a pass rate")
        problems = known
    require_same(arguments.pass_rates, history.settings, {"identity": {"problems": problems_fingerprint(problems)}})
    n = history.settings["n"]
    bounds = arguments.drop_at, arguments.keep_above, arguments.max_unsolved_share
    write_filtered(arguments, filter_mirrored_j(problems, history, *bounds, arguments.seed, n), n)


def drop_command(arguments: argparse.Namespace) -> None:
    """Drop problems by a run's history, as the run does at the end of a stage."""
    run = arguments.run
    if not (run / "recipe.toml").exists():
        raise DataError(f"{run} is not a run: it has no recipe.toml; give a folder of train.py.")
    recipe = load_recipe(run / "recipe.toml")
    problems = read_data(arguments, bool(recipe.reward.function))
    stages = {k: s for k, s in enumerate(recipe.stage) if isinstance(s, RlStage)}
    found = read_state(run)
    if found is None:
        raise DataError(f"{run} has no checkpoint yet, so it has no history; resume it first.")
    state = found[1]
    ended = [k for k, s in stages.items() if k < state.stage or (k == state.stage and not state.steps_left(s))]
    if arguments.stage is None and not ended:
        raise DataError(f"{run} has not ended an rl stage yet; resume it first, or name a begun one with --stage.")
    index = max(ended) if arguments.stage is None else arguments.stage
    if index not in stages or all(visit.stage != index for visit in state.history.log):
        raise DataError(f"{run} has not trained in stage {index}; its rl stages are {', '.join(map(str, stages))}.")
    if not any(state.history.visits(problem.id) for problem in problems):
        raise DataError(f"{run} has not visited any problem of {arguments.data}; give the data that it was trained on.")
    stage = stages[index]
    own = own_function("filter", stage.variant.filter) if arguments.above is None else None
    above = stage.drop_above if arguments.above is None else arguments.above
    window = arguments.window or stage.drop_window
    visits = "that stage" if window == "stage" else "all stages"
    rule = stage.variant.filter if own else f"dropping accuracy above {above:g}"
    print(f"{run}, after stage {index}: {rule} in the visits of {visits}")
    filtered = drop_easy(problems, state.history, index, own or above, window, stage.group_size)
    write_filtered(arguments, filtered, stage.group_size)


def write_filtered(arguments: argparse.Namespace, filtered: Filtered, n: int) -> None:
    """Write the problems that a filter kept, for train.py, with a table and a picture."""
    require_batch(filtered, arguments.batch)
    write_problems(filtered.kept, arguments.out)
    everything = filtered.kept + filtered.dropped
    unknown = sum(filtered.rates[problem.id] is None for problem in everything)
    unseen = f" ({unknown:,} of the kept ones were never visited)" * bool(unknown)
    print(f"kept {len(filtered.kept):,}, dropped {len(filtered.dropped):,} of {len(everything):,} problems{unseen}")
    rates = {"before": filtered.known_rates(everything), "after": filtered.known_rates(filtered.kept)}
    show(arguments.out, f"Difficulty of {arguments.out.stem}", rates, n)


def show(out: Path, title: str, rates: dict[str, list[float]], n: int) -> None:
    """Print the histograms of pass rates over n rollouts; write a table and a picture of them next to `out`."""
    counts = {label: histogram(own, n) for label, own in rates.items()}
    table = [["solved", *counts]]
    table += [[f"{k} of {n}", *(f"{own[k]:,}" for own in counts.values())] for k in range(n + 1)]
    table += [["all", *(f"{len(own):,}" for own in rates.values())], ["shape", *map(verdict, counts.values())]]
    write_atomically(out.with_suffix(".txt"), [f"{title}\n{text_table(table)}\n".encode()])
    charts.png(charts.bar_chart(title, counts, f"rollouts right of {n}"), out.with_suffix(".png"))
    print(draw_histogram(*counts.values()))
    print(f"results in {out}, table in {out.with_suffix('.txt')}, picture in {out.with_suffix('.png')}")


def command(arguments: argparse.Namespace) -> None:
    """Run the command that the arguments select; under torchrun only one process filters or drops."""
    if arguments.command == "estimate":
        estimate_command(arguments)
    elif distributed.is_main_process():
        run = filter_command if arguments.command == "filter" else drop_command
        run(arguments)


def main(arguments: argparse.Namespace) -> None:
    """Run data_filter.py with the arguments of lab.options.difficulty_arguments."""
    run_command("data_filter.py", command, arguments)
