"""The command line of data_filter.py: estimate, filter, drop."""

import argparse
import math
from pathlib import Path

from data_filter import (
    ESTIMATE_DRAW,
    GROUP_SIZE,
    Filtered,
    History,
    draw_histogram,
    drop_easy,
    estimate,
    filter_mirrored_j,
    histogram,
    problems_fingerprint,
    require_batch,
    require_settings,
    verdict,
    zero_variance_share,
)
from engine import device as devices
from engine.attempts import GraderError, Respondent
from engine.device import Interrupted, StopRequest
from engine.files import write_atomically
from engine.grader import Grader
from engine.tokenizer import load_tokenizer, stop_tokens
from lab import charts
from lab.benchmarks import text_table
from lab.problems import INSTRUCTION, DataError, Problem, read_problems, write_problems
from model import ModelError, load, resolve_folder, tokenizer_folder
from rollout import RolloutError, Sampling, check_requests

ADVICE = {
    "J": "at least half are solved more often than not: drop the always solved (data_filter.py filter)",
    "mirrored J": "at least half are hard, and few are always solved: what training wants",
    "too hard": "more than half are never solved: add easier ones, or cap their share (filter --max-unsolved-share)",
    "U": "two thirds are solved always or never: few teach anything",
    "level": "neither end outweighs the other",
}


def parse_arguments() -> argparse.Namespace:
    """The command line. What makes no sense is an error before anything is loaded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    reading = argparse.ArgumentParser(add_help=False)
    reading.add_argument("--skip-bad-rows", action="store_true", help="leave problems without an answer out")
    reading.add_argument("--limit", type=int, help="only the first so many problems")
    batch = argparse.ArgumentParser(add_help=False)
    batch.add_argument("--batch", type=int, default=1, help="problems of a training step: fewer left are an error")

    ask = commands.add_parser("estimate", parents=[reading], help="pass rates of a model", allow_abbrev=False)
    ask.add_argument("model", help="a model folder or hub id")
    ask.add_argument("data", help="a file of problems or a hub data set")
    ask.add_argument("-n", type=int, default=GROUP_SIZE, help="responses per problem")
    ask.add_argument("--temperature", type=float, default=1.4, help="at which training will begin")
    ask.add_argument("--top-k", type=int, default=0, help="0 is off, as training samples")
    ask.add_argument("--top-p", type=float, default=1.0)
    ask.add_argument("--max-tokens", type=int, default=8192, help="of a response")
    ask.add_argument("--no-thinking", action="store_true", help="the model does not think: the box alone counts")
    ask.add_argument("--instruction", default=INSTRUCTION, help="appended to problems that do not carry it")
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--rows", type=int, default=64, help="sequences decoded at once")
    ask.add_argument("--cache-tokens", type=int, help="of all sequences together (default: every row full)")
    ask.add_argument("--workers", type=int, default=2, help="processes that grade symbolic answers")
    ask.add_argument("--most-failed-share", type=float, default=0.02, help="failures of the grader that stop")
    ask.add_argument("--out", type=Path, default=Path("pass-rates.jsonl"), help="a new file, or one to go on with")

    sift = commands.add_parser("filter", parents=[reading, batch], help="drop the always solved", allow_abbrev=False)
    sift.add_argument("pass_rates", type=Path, help="what estimate wrote")
    sift.add_argument("data", help="the problems that were estimated")
    sift.add_argument("out", type=Path, help="a new .jsonl file")
    sift.add_argument("--drop-at", type=float, default=1.0, help="drop what is solved this often or more often")
    sift.add_argument("--keep-above", type=float, default=0.0, help="drop what is solved less often than this")
    sift.add_argument("--max-unsolved-share", type=float, help="of what is kept: drop others of them at random")
    sift.add_argument("--seed", type=int, default=0, help="of that draw")

    drop = commands.add_parser("drop", parents=[reading, batch], help="drop what a run has learnt", allow_abbrev=False)
    drop.add_argument("run", type=Path, help="the folder of a run of train.py")
    drop.add_argument("data", help="the problems that it was trained on")
    drop.add_argument("out", type=Path, help="a new .jsonl file")
    drop.add_argument("--stage", type=int, help="the stage just ended (default: the last that ended)")
    drop.add_argument("--above", type=float, help="drop what is solved more often (default: the run's, 0.9)")
    drop.add_argument("--window", choices=("stage", "all"), help="by which visits (default: the run's, stage)")

    arguments = parser.parse_args()
    given = vars(arguments)
    for name in ("n", "max_tokens", "rows", "cache_tokens", "workers", "limit", "batch"):
        if given.get(name) is not None and given[name] < 1:
            parser.error(f"{'-n' if name == 'n' else '--' + name.replace('_', '-')} must be at least 1")
    for name in ("drop_at", "keep_above", "max_unsolved_share", "above"):
        if given.get(name) is not None and not 0 <= given[name] <= 1:
            parser.error(f"--{name.replace('_', '-')} is a share, such as 0.9")
    if arguments.command == "estimate" and not 0 < arguments.temperature < math.inf:
        parser.error(f"--temperature {arguments.temperature} cannot be trained at: take one above 0")
    if arguments.command == "estimate" and (arguments.top_k < 0 or not 0 < arguments.top_p <= 1):
        parser.error("--top-k must not be negative, and --top-p lies above 0 and at most at 1")
    if arguments.out.suffix != ".jsonl":
        parser.error(f"{arguments.out} must end in .jsonl")
    return arguments


def read_data(arguments: argparse.Namespace) -> list[Problem]:
    """The problems that a command is about."""
    return read_problems(arguments.data, "skip" if arguments.skip_bad_rows else "stop")[: arguments.limit]


def estimate_command(arguments: argparse.Namespace) -> None:
    """Ask the model, on all processes, and say what shape its pass rates have."""
    from engine.fingerprint import model_identity
    from lab.evaluation import cache_limits

    problems, here = read_data(arguments), devices.start()
    folder = resolve_folder(arguments.model)
    model, tokens_from = load(folder, here.device, here.compute_dtype), tokenizer_folder(folder)
    tokenizer = load_tokenizer(tokens_from, model)
    sampling = Sampling(
        arguments.temperature, arguments.max_tokens, stop_tokens(tokenizer, model, tokens_from), arguments.seed,
        ESTIMATE_DRAW, arguments.top_k, arguments.top_p,
    )  # fmt: skip
    with Grader(arguments.workers, thinking=not arguments.no_thinking) as grader:
        respondent = Respondent(
            model, tokenizer, sampling.stop_tokens, None, grader, here, arguments.instruction,
            StopRequest("the problems that are finished are being saved"), arguments.most_failed_share,
        )  # fmt: skip
        prompts = [respondent.prompt(problem, 1) for problem in problems]
        longest = max((len(prompt.tokens) for prompt in prompts), default=0)
        respondent.limits = cache_limits(arguments, model.config, here, longest)
        check_requests(model, prompts, sampling, respondent.limits)
        if here.is_main:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
        history = estimate(respondent, problems, arguments.n, sampling, arguments.out, model_identity(folder))
    if here.is_main:
        rates = [history.estimate(problem.id) for problem in problems]
        shape = verdict(histogram(rates, arguments.n))
        print(f"verdict: {shape}: {ADVICE[shape]}")
        show(arguments.out, f"Pass rates of {arguments.model}", {"problems": rates}, arguments.n)


def filter_command(arguments: argparse.Namespace) -> None:
    """Drop the perfect, by the pass rates of a file."""
    problems, history = read_data(arguments), History.load(arguments.pass_rates)
    require_settings(history, arguments.pass_rates, {"problems": problems_fingerprint(problems)})
    n = history.settings["n"]
    bounds = arguments.drop_at, arguments.keep_above, arguments.max_unsolved_share
    write_filtered(arguments, filter_mirrored_j(problems, history, *bounds, arguments.seed, n), n)


def drop_command(arguments: argparse.Namespace) -> None:
    """The drop at the end of a stage, as the run itself does it."""
    from engine.checkpoint import CheckpointError, read_state
    from lab.recipe import RecipeError, RlStage, load_recipe

    problems, run = read_data(arguments), arguments.run
    if not (run / "recipe.toml").exists():
        raise DataError(f"{run} is no run: it has no recipe.toml; give a folder of train.py.")
    try:
        stages, found = load_recipe(run / "recipe.toml").stage, read_state(run)
    except (CheckpointError, RecipeError) as error:
        raise DataError(str(error)) from None
    if found is None:
        raise DataError(f"{run} has no checkpoint yet, so there is no history to drop by; let it run on.")
    state = found[1]
    stages = {k: stage for k, stage in enumerate(stages) if isinstance(stage, RlStage)}
    ended = [k for k, stage in stages.items() if (state.stage, state.stage_step) >= (k, stage.steps)]
    if arguments.stage is None and not ended:
        raise DataError(f"{run} has ended no rl stage yet; let it run on, or name one that has begun with --stage.")
    index = max(ended) if arguments.stage is None else arguments.stage
    if index not in stages or all(visit.stage != index for visit in state.history.log):
        raise DataError(f"{run} has not trained in stage {index}; its rl stages are {', '.join(map(str, stages))}.")
    if not any(state.history.visits(problem.id) for problem in problems):
        raise DataError(f"{run} has seen no problem of {arguments.data}; give the data that it was trained on.")
    stage = stages[index]
    above = stage.drop_above if arguments.above is None else arguments.above
    window = arguments.window or stage.drop_window
    visits = "that stage" if window == "stage" else "all stages"
    print(f"{run}, after stage {index}: dropping accuracy above {above:g} by the visits of {visits}")
    filtered = drop_easy(problems, state.history, index, above, window, stage.group_size)
    write_filtered(arguments, filtered, stage.group_size)


def write_filtered(arguments: argparse.Namespace, filtered: Filtered, n: int) -> None:
    """The problems that a filter has kept, as train.py reads them, with their table and picture."""
    require_batch(filtered, arguments.batch)
    write_problems(filtered.kept, arguments.out)
    everything = filtered.kept + filtered.dropped
    unknown = sum(filtered.rates[problem.id] is None for problem in everything)
    unseen = f" ({unknown:,} of the kept were never visited)" * bool(unknown)
    print(f"kept {len(filtered.kept):,}, dropped {len(filtered.dropped):,} of {len(everything):,} problems{unseen}")
    rates = {"before": filtered.known_rates(everything), "after": filtered.known_rates(filtered.kept)}
    show(arguments.out, f"Difficulty of {arguments.out.stem}", rates, n)


def show(out: Path, title: str, rates: dict[str, list[float]], n: int) -> None:
    """Say what shape pass rates over n rollouts have, or had and have; a table and a picture of it beside `out`."""
    counts = {label: histogram(own, n) for label, own in rates.items()}
    silent = [f"{zero_variance_share(own):.1%}" for own in rates.values()]
    table = [["solved", *counts]]
    table += [[f"{k} of {n}", *(f"{own[k]:,}" for own in counts.values())] for k in range(n + 1)]
    table += [["all", *(f"{len(own):,}" for own in rates.values())], ["shape", *map(verdict, counts.values())]]
    table.append([f"expected groups of {GROUP_SIZE} without a signal", *silent])
    write_atomically(out.with_suffix(".txt"), [f"{title}\n{text_table(table)}\n".encode()])
    charts.png(charts.bar_chart(title, counts, f"rollouts right of {n}"), out.with_suffix(".png"))
    print(draw_histogram(*counts.values()))
    print(f"expected share of groups of {GROUP_SIZE} without a signal: {' -> '.join(silent)}")
    print(f"results in {out}, table in {out.with_suffix('.txt')}, picture in {out.with_suffix('.png')}")


def main() -> None:
    """Estimate, filter or drop. Under torchrun all processes estimate; one filters."""
    arguments = parse_arguments()
    status: int | str = 0
    try:
        if arguments.command == "estimate":
            estimate_command(arguments)
        elif devices.speaks():
            filter_command(arguments) if arguments.command == "filter" else drop_command(arguments)
    except (Interrupted, KeyboardInterrupt):
        status = 130
        if devices.speaks():
            print(f"stopped; the same command goes on, with what is in {arguments.out}")
    except Exception as error:
        status = devices.last_words(
            error, "data_filter.py", (ModelError, DataError, RolloutError, GraderError, OSError)
        )
    finally:
        devices.stop()
    devices.leave(status)
