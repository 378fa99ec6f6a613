"""The commands of eval.py: figures and curves of a model, comparing, regrading."""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np

from engine.distributed import Processes
from engine.files import write_atomically
from engine.fingerprint import data_identity, model_identity
from engine.grader import Grader, check_grader
from engine.rollout_worker import SamplingStats
from eval import Diversity, Response, distinct_share, find_zones, interval, match_diversity, measure_temperature
from lab.benchmarks import file_name, find_data, published_table, text_table
from lab.command import load_worker, run_command
from lab.eval_page import budget_table, describe_zones, k_table, length_table, temperature_table, write_evaluation_page
from lab.metrics import read_metrics
from lab.problems import DataError, Problem, read_problems, write_problems
from lab.responses import Recorder, read_groups, read_settings, response_file, write_responses, write_settings
from lab.scores import Evaluation, compare, print_evaluation, summarise
from reward import last_boxed
from rollout import Sampling

DECODING = ("top_k", "top_p", "max_tokens", "yarn", "original_window", "instruction")  # settings of all responses
LENGTH_BUDGETS = 16  # points of the curve of accuracy against length
CURVE_MARGIN, MATCH_MARGIN = 0.03, 0.01  # half widths of the intervals that a curve, a search samples for


# ------------------------------------------------------------------------------------------ accuracy against length


@dataclass(frozen=True)
class LengthPoint:
    """Accuracy when every response is cut at so many tokens."""

    budget: int
    accuracy: float
    low: float
    high: float


def length_curve(
    problems: Sequence[Problem], groups: Sequence[Sequence[Response]], budgets: Sequence[int], grader: Grader
) -> list[LengthPoint]:
    """Accuracy against the token budget, from one sampling: responses are cut, not sampled again."""
    curve = []
    for budget in budgets:
        means = []
        for problem, group in zip(problems, groups, strict=True):
            heads = [None if r.tokens <= budget else r.text[: r.cuts[str(budget)]] for r in group]
            # what holds no answer needs no grading
            tickets = [
                grader.submit(head, problem.answers) if head and last_boxed(head, grader.thinking) is not None else None
                for head in heads
            ]
            right = [
                grader.collect([ticket])[0].correct if ticket is not None else float(head is None and r.correct)
                for r, head, ticket in zip(group, heads, tickets, strict=True)
            ]
            means.append(float(np.mean(right)))
        curve.append(LengthPoint(budget, float(np.mean(means)), *interval(means)))
    return curve


# ------------------------------------------------------------------------------------------------------ a session


@dataclass
class Session:
    """One evaluation under way: a loaded model, the sets to ask it, and where everything goes."""

    arguments: argparse.Namespace
    recorder: Recorder
    sampling: Sampling
    sets: dict[str, list[Problem]]
    trained_length: int
    targets: dict[str, Diversity]  # by set, for --match

    @property
    def processes(self) -> Processes:
        return self.recorder.worker.processes


def start_session(arguments: argparse.Namespace) -> Session:
    """Read the data, load the model, and find before anything is sampled what would go wrong."""
    out = arguments.out
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is no folder; give another --out")
    on_bad_row = "skip" if arguments.skip_bad_rows else "keep"
    sets = {
        name: read_problems(place, on_bad_row)[: arguments.limit]
        for name, place in find_data(arguments.data, arguments.folder).items()
    }
    problems = list(chain(*sets.values()))
    worker, sampling, folder = load_worker(
        arguments, problems, "the responses that are finished are kept",
        yarn=arguments.yarn, original_window=arguments.original_window,
    )  # fmt: skip
    original = getattr(worker.model.config.rope.scaling, "original_max_position_embeddings", None)
    trained = arguments.trained_length or original or arguments.max_tokens
    # what decides the responses and their figures; a folder holds those of one such set alone
    settings = {
        **{name: getattr(arguments, name) for name in ("model", "temperature", "seed", *DECODING)},
        "weights": model_identity(folder),
        "problems": data_identity(problems),
        "thinking": not arguments.no_thinking,
        "trained_length": trained,
        "data": list(sets),
        "curve": arguments.curve,
        "match": arguments.match,
        "n": arguments.n,
    }
    targets = {name: target_diversity(arguments.match, name, settings) for name in sets} if arguments.match else {}
    if worker.processes.is_main:
        open_folder(out, settings, sets)
    worker.processes.broadcast(None)
    return Session(arguments, Recorder(worker, out, SamplingStats()), sampling, sets, trained, targets)


def changed_settings(then: dict, now: dict, names: Iterable[str]) -> list[tuple[str, object, object]]:
    """(name, then, now) of those of these settings that two evaluations do not share."""
    return [(name, then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)]


def open_folder(out: Path, settings: dict, sets: dict[str, list[Problem]]) -> None:
    """A new folder, or one to go on in: then it must be of the same evaluation. Only -n may change."""
    if (out / "settings.json").exists():
        fixed = [name for name in settings if name != "n"]
        for name, then, now in changed_settings(read_settings(out), settings, fixed):
            raise DataError(f"{out} holds an evaluation with {name} = {then}, not {now}; give another --out")
        print(f"going on in {out}")
    elif out.exists() and any(out.iterdir()):
        raise DataError(f"{out} exists already and holds no evaluation; give another --out")
    write_settings(out, settings)
    for name, problems in sets.items():
        path = out / "problems" / f"{file_name(name)}.jsonl"
        if not path.exists():
            write_problems(problems, path)


def target_diversity(given: str, name: str, settings: dict) -> Diversity:
    """The score to match: a number, that of a training run, or of each problem in an earlier evaluation."""
    try:
        score = float(given)
    except ValueError:
        pass
    else:
        if not 0 < score <= 1:
            raise DataError(f"--match {given}: a distinct-4 lies above 0 and at most at 1")
        return score
    run = Path(given)
    if (run / "settings.json").exists():
        before = read_settings(run)
        for setting, then, now in changed_settings(before, settings, ("n", "problems", *DECODING)):
            raise DataError(
                f"{run} measured its diversity with another {setting} ({then}, not {now}); measure both alike"
            )
        groups = read_groups(run, name, before["n"])[1]
        shares = {group[0].problem_id: distinct_share([response.text for response in group]) for group in groups}
        known = {problem_id: share for problem_id, share in shares.items() if share is not None}
        if not known:
            raise DataError(f"{run} has no response to {name} with a 4-gram; give a score")
        return known
    if (run / "metrics.jsonl").exists():
        for row in read_metrics(run):
            if row["kind"] == "temperature" and row["curve"]:
                first = row["curve"][0]["distinct4"] if row["target_distinct4"] is None else row["target_distinct4"]
                if first is not None:
                    return first
        raise DataError(f"{run} has measured no diversity yet; give a score")
    raise DataError(f"--match {given} is neither a number nor a folder with settings.json or metrics.jsonl")


# -------------------------------------------------------------------------------------------------- what is written


@dataclass
class Results:
    """What one command has found. A setting is "" where there is one alone."""

    figures: dict[str, list[Evaluation]] = field(default_factory=lambda: defaultdict(list))  # by setting
    groups: dict[str, dict[str, list[list[Response]]]] = field(default_factory=lambda: defaultdict(dict))  # and by set
    curves: dict[str, dict] = field(default_factory=lambda: defaultdict(dict))  # by kind, then by set


def finish(out: Path, model: str, sets: dict[str, list[Problem]], results: Results) -> None:
    """Write results.json and report.html; print the figures, and at last the table of RECIPE section 6."""
    figures, curves = results.figures, results.curves
    rows = [asdict(found) | {"setting": setting} for setting, own in figures.items() for found in own]
    text = json.dumps({"model": model, "evaluations": rows, **curves}, indent=2, allow_nan=False)
    write_atomically(out / "results.json", [f"{text}\n".encode()])
    table = published_table({", ".join(filter(None, (model, setting))): own for setting, own in figures.items()})
    page = write_evaluation_page(out, model, figures, sets, results.groups, table, curves)
    for setting, own in figures.items():
        for found in own:
            print(f"{setting}: " * bool(setting), end="")
            print_evaluation(found)
            print_details(found)
    for kind, by_set in curves.items():
        for name, curve in by_set.items():
            if kind == "length":
                print(f"{name}: accuracy when responses are cut at so many tokens\n{text_table(budget_table(curve))}\n")
                continue
            said = f"chosen: temperature {curve['chosen']:g}" if kind == "match" else describe_zones(curve["zones"])
            print(f"{name}\n{text_table(temperature_table(curve))}\n{said}\n")
    print(f"results in {out}, report in {page}")
    if figures:
        print(text_table(table))


def print_details(found: Evaluation) -> None:
    """pass@k and maj@k with both intervals, accuracy by length, diversity and speed."""
    print(text_table(k_table(found)))
    print(text_table(length_table(found)))
    diversity = "-" if found.distinct4 is None else f"{found.distinct4:.3f}"
    speed = "" if found.tokens_per_s is None else f", {found.tokens_per_s:,.0f} tokens/s"
    memory = "" if found.peak_memory_gib is None else f", peak memory {found.peak_memory_gib:.2f} GiB"
    unanswerable = f", {found.unanswerable} problems have no answer and count as wrong" * bool(found.unanswerable)
    print(f"distinct-4 {diversity}, {found.tokens:,} tokens{speed}{memory}{unanswerable}\n")


# ---------------------------------------------------------------------------------------------- asking the model


def evaluate_sets(session: Session) -> Results:
    """n responses to every problem of every set, and their figures.

    With --curve length also accuracy against the token budget, without and with YaRN, from one sampling each.
    """
    arguments, recorder, processes, results = session.arguments, session.recorder, session.processes, Results()
    model = recorder.worker.model
    settings, budgets = {"": model.config}, []
    if arguments.curve:
        most = arguments.max_tokens
        budgets = sorted({max(1, round(most * i / LENGTH_BUDGETS)) for i in range(1, LENGTH_BUDGETS + 1)})
        settings = {"no YaRN": model.config}
        if arguments.yarn is not None:
            # without scaling, the same positions: rotary angles have no end, only an untrained part
            settings = {"no YaRN": replace(model.config, rope=replace(model.config.rope, scaling=None))}
            settings["YaRN"] = model.config
    for setting, config in settings.items():
        model.config = config
        model.set_rope(config.rope)
        for name, problems in session.sets.items():
            recorder.work, key = SamplingStats(), f"{name}-{setting}" if setting else name
            groups = recorder.respond(name, problems, arguments.n, session.sampling, budgets, key=key)
            work = recorder.work
            found = summarise(
                name, problems, groups, session.sampling.temperature, session.trained_length,
                tokens_per_s=work.tokens / work.sample_seconds if work.tokens else None,
                peak_memory_gib=max(processes.all_gather(processes.peak_memory_gib())),
            )  # fmt: skip
            results.figures[setting].append(found)
            results.groups[setting][name] = groups
            if budgets:
                points = length_curve(problems, groups, budgets, recorder.worker.grader)
                results.curves["length"].setdefault(name, {})[setting] = [asdict(point) for point in points]
    return results


def temperature_curves(session: Session) -> Results:
    """Accuracy and distinct-4 against temperature: the three zones, or with --match the temperature that restores one.

    A margin needs the first problems to stand for all: they are shuffled, always alike.
    """
    arguments, results = session.arguments, Results()
    for name, problems in session.sets.items():
        order = np.random.default_rng(arguments.seed).permutation(len(problems))
        problems = [problems[i] for i in order]

        def answer(some: Sequence[Problem], temperature: float, name: str = name) -> list[list[Response]]:
            sampling, key = replace(session.sampling, temperature=temperature), f"{name}-temperature-{temperature:g}"
            return session.recorder.respond(name, some, arguments.n, sampling, key=key)

        if arguments.match:
            margin = MATCH_MARGIN if arguments.margin is None else arguments.margin
            chosen, curve = match_diversity(
                answer, problems, session.targets[name], session.sampling.temperature,
                margin=margin, say=session.processes.say,
            )  # fmt: skip
            found = {"chosen": chosen}
        else:
            margin, curve = CURVE_MARGIN if arguments.margin is None else arguments.margin, []
            for temperature in arguments.temperatures:
                point = measure_temperature(answer, problems, temperature, margin)
                curve.append(point)
                diversity = "-" if point.distinct4 is None else f"{point.distinct4:.3f} +-{point.distinct4_half:.3f}"
                session.processes.say(
                    f"{name}: temperature {temperature:g}: accuracy {100 * point.accuracy:.1f} "
                    f"+-{100 * point.accuracy_half:.1f}, distinct-4 {diversity}, "
                    f"from {point.problems} of {len(problems)} problems"
                )
            try:
                found = {"zones": asdict(find_zones(curve))}
            except ValueError as error:
                found = {"zones": {"none": str(error)}}
        kind = "match" if arguments.match else "temperature"
        results.curves[kind][name] = {"points": [point.row() for point in curve], **found}
    return results


# ------------------------------------------------------------------------------- evaluations that are there already


def regrade(arguments: argparse.Namespace) -> None:
    """Grade the responses of an evaluation again, against the answers that it kept, and write a new evaluation."""
    run, out = arguments.regrade, arguments.out
    settings = read_settings(run)
    if settings["curve"] or settings["match"]:
        raise DataError(f"{run} holds a curve, not an evaluation; --regrade takes a folder without --curve and --match")
    if out.exists():
        raise DataError(f"{out} exists already; give another --out")
    sets, results = {}, Results()
    with Grader(arguments.workers, thinking=settings["thinking"]) as grader:
        for name in settings["data"]:
            problems, stored = read_groups(run, name, settings["n"])
            items = [(r.text, problem.answers) for problem, group in zip(problems, stored, strict=True) for r in group]
            grades = iter(grader.grade(items))
            groups = [
                [replace(response, verdict=(grade := next(grades)).verdict, answer=grade.answer) for response in group]
                for group in stored
            ]
            before, after = ([response.verdict for response in chain(*some)] for some in (stored, groups))
            moves = Counter((old, new) for old, new in zip(before, after, strict=True) if old != new)
            changed = ", ".join(f"{count} {old} -> {new}" for (old, new), count in sorted(moves.items()))
            print(f"{name}: {len(items):,} responses graded again; {changed or 'no verdict changed'}")
            check_grader(Counter(after), arguments.most_failed_share)
            sets[name], results.groups[""][name] = problems, groups
            found = summarise(name, problems, groups, settings["temperature"], settings["trained_length"])
            results.figures[""].append(found)
    open_folder(out, settings, sets)
    for name, groups in results.groups[""].items():
        write_responses(response_file(out, name), chain(*groups))
    finish(out, settings["model"], sets, results)


def compare_runs(a: Path, b: Path) -> None:
    """The paired difference of two evaluations, B minus A, for every set that both have."""
    then, now = read_settings(a), read_settings(b)
    for name, was, is_now in changed_settings(then, now, ("n", "temperature", *DECODING, "thinking", "problems")):
        print(f"note: {name} is {was} in {a} and {is_now} in {b}")
    shared = [name for name in then["data"] if name in now["data"]]
    if not shared:
        raise DataError(f"{a} has {', '.join(then['data'])}, {b} {', '.join(now['data'])}: none is in both")
    rows = [["set", "A", "B", "B - A", "95%, paired", "up", "down", "same", "left out"]]
    for name in shared:
        means = [
            {group[0].problem_id: float(np.mean([response.correct for response in group])) for group in groups}
            for groups in (read_groups(run, name, own["n"])[1] for run, own in ((a, then), (b, now)))
        ]
        found = compare(name, *means)
        rows.append([
            name, f"{100 * found.avg_a:.1f}", f"{100 * found.avg_b:.1f}", f"{100 * found.difference:+.1f}",
            f"{100 * found.low:+.1f} to {100 * found.high:+.1f}", str(found.up), str(found.down), str(found.same),
            str(found.only_a + found.only_b),
        ])  # fmt: skip
    print(f"A is {a}, B is {b}; up and down count the problems that B solves more and less often than A")
    print(text_table(rows))


def command(arguments: argparse.Namespace) -> None:
    """Evaluate a model, or read what evaluations have left."""
    if arguments.compare:
        compare_runs(*arguments.compare)
    elif arguments.regrade:
        regrade(arguments)
    else:
        session = start_session(arguments)
        with session.recorder.worker.grader:
            by_temperature = arguments.match or arguments.temperatures
            results = temperature_curves(session) if by_temperature else evaluate_sets(session)
        if session.processes.is_main:
            finish(arguments.out, arguments.model, session.sets, results)


def main(arguments: argparse.Namespace) -> None:
    """Evaluate, compare or regrade, as lab.options.evaluation_arguments has read the command line."""
    run_command("eval.py", command, arguments)
