"""The commands of eval.py: metrics and curves of a model, comparing, regrading."""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from textwrap import shorten

import numpy as np

from engine.distributed import Processes
from engine.files import write_atomically
from engine.fingerprint import data_identity, function_identity, other_parts, require_same
from engine.grader import Grader, check_grader
from engine.run_folder import new_folder
from eval import Diversity, Response, distinct_share, find_zones, interval, match_diversity, measure_temperature
from lab import eval_page
from lab.benchmarks import BENCHMARKS, file_name, find_data, published_table, text_table
from lab.command import load_worker, run_command
from lab.compare_page import PAIRED, PAIRED_NOTE, paired_row
from lab.data_files import DataError
from lab.eval_page import percent
from lab.metrics import read_metrics
from lab.page import write_page
from lab.problems import Columns, Problem, read_problems, write_problems
from lab.responses import Recorder, read_groups, read_settings, response_file, write_responses
from lab.scores import Evaluation, compare, moved_problems, print_evaluation, summarise
from reward import last_boxed
from rollout import Sampling
from yarn import Yarn

DECODING = ("top_k", "top_p", "max_tokens", "yarn", "instruction")
LENGTH_BUDGETS = 16  # points of the curve of accuracy against length
CURVE_MARGIN, MATCH_MARGIN = 0.03, 0.01  # default half widths of the 95% intervals of a curve, a search
MOST_TEXT = 100  # characters of a problem in the table of those that moved
MOVED_NOTE = "Problems that moved beyond noise, surest first (Fisher's exact test, 5% false discoveries)"


@dataclass
class Session:
    """A running evaluation: a loaded model and the data sets to sample."""

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
    """Read the data and load the model; raise every foreseeable error before sampling."""
    on_bad_row = "skip" if arguments.skip_bad_rows else "keep"
    sets = {}
    for name, place in find_data(arguments.data, arguments.folder).items():
        is_known = name in BENCHMARKS and name in arguments.data  # not a file that has a benchmark's name
        columns = Columns() if is_known else arguments.columns
        sets[name] = read_problems(place, on_bad_row, bool(arguments.reward), columns)[: arguments.limit]
    worker, sampling, identity = load_worker(arguments, sets, "the finished responses are kept", yarn=arguments.yarn)
    scaling = worker.model.config.rope.scaling
    original = scaling.original_max_position_embeddings if isinstance(scaling, Yarn) else None
    trained = arguments.trained_length or original or arguments.max_tokens
    # everything that decides the responses and their metrics; a folder holds one such evaluation
    settings = {
        **{name: getattr(arguments, name) for name in ("model", "temperature", "seed", *DECODING)},
        "thinking": worker.chat.thinking,
        "trained_length": trained,
        "data": list(sets),
        "curve": arguments.curve,
        "match": arguments.match,
        "n": arguments.n,
        "reward": arguments.reward,
        "identity": identity | {"problems": data_identity(chain(*sets.values()))},
    }
    targets = {name: target_diversity(arguments.match, name, settings) for name in sets} if arguments.match else {}
    opened = open_folder(arguments.out, settings, sets) if worker.processes.is_main else None
    arguments.out = worker.processes.broadcast(opened)
    return Session(arguments, Recorder(worker, arguments.out), sampling, sets, trained, targets)


def open_folder(out: Path | None, settings: dict, sets: dict[str, list[Problem]]) -> Path:
    """Create a folder, or reopen one of the same evaluation; only -n and the places of model and reward may differ.

    Without `out` it is the one of runs/eval, runs/eval-2, ... with the same evaluation and no larger n, else a new one.
    """
    wanted = {name: value for name, value in settings.items() if name not in ("n", "model", "reward")}
    for earlier in () if out else (Path("runs/eval"), *Path("runs").glob("eval-[0-9]*")):
        with suppress(DataError):
            require_same(earlier, held := read_settings(earlier), wanted)
            if held["n"] <= settings["n"]:  # else its results would be replaced by those of fewer responses
                out = out or earlier
    out = out or new_folder(Path("runs"), "eval")
    if (out / "settings.json").exists():
        require_same(out, read_settings(out), wanted)
        print(f"resuming in {out}")
    elif out.exists() and any(out.iterdir()):
        raise DataError(f"{out} already exists and is not an evaluation; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "settings.json", [json.dumps(settings, indent=2).encode()])
    for name, problems in sets.items():
        path = out / "problems" / f"{file_name(name)}.jsonl"
        if not path.exists():
            write_problems(problems, path)
    return out


def target_diversity(given: str, name: str, settings: dict) -> Diversity:
    """Return the diversity to match: a number, a training run's, or an earlier evaluation's, per problem."""
    with suppress(ValueError):
        score = float(given)
        if not 0 < score <= 1:
            raise DataError(f"--match {given}: distinct-4 is above 0 and at most 1")
        return score
    run = Path(given)
    if (run / "settings.json").exists():
        before = read_settings(run)
        problems = {"identity": {"problems": settings["identity"]["problems"]}}
        require_same(run, before, {setting: settings[setting] for setting in ("n", *DECODING)} | problems)
        groups = read_groups(run, name, before["n"], bool(before.get("reward")))[1]
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
        raise DataError(f"{run} has not measured a diversity yet; give a score")
    raise DataError(f"--match {given} is neither a number nor a folder with settings.json or metrics.jsonl")


# ------------------------------------------------------------------------------------------------------ the output


@dataclass
class Results:
    """The results of one command. A setting is "" if there is only one."""

    figures: dict[str, list[Evaluation]] = field(default_factory=lambda: defaultdict(list))  # by setting
    groups: dict[str, dict[str, list[list[Response]]]] = field(default_factory=lambda: defaultdict(dict))  # and by set
    curves: dict[str, dict] = field(default_factory=lambda: defaultdict(dict))  # by kind, then by set


def write_results(out: Path, model: str, sets: dict[str, list[Problem]], results: Results) -> None:
    """Write results.json and report.html; print the metrics, and last the table of RECIPE section 6."""
    figures, curves = results.figures, results.curves
    rows = [asdict(found) | {"setting": setting} for setting, own in figures.items() for found in own]
    text = json.dumps({"model": model, "evaluations": rows, **curves}, indent=2, allow_nan=False)
    write_atomically(out / "results.json", [f"{text}\n".encode()])
    table = published_table({", ".join(filter(None, (model, setting))): own for setting, own in figures.items()})
    page = eval_page.write_evaluation_page(out, read_settings(out), figures, sets, results.groups, table, curves)
    for setting, own in figures.items():
        for found in own:
            print(f"{setting}: " * bool(setting), end="")
            print_evaluation(found)
            print_details(found)
    for kind, by_set in curves.items():
        for name, curve in by_set.items():
            if kind == "length":
                budgets = text_table(eval_page.budget_table(curve))
                print(f"{name}: accuracy when responses are cut at a token budget\n{budgets}\n")
                continue
            match = kind == "match"
            found = f"chosen: temperature {curve['chosen']:g}" if match else eval_page.describe_zones(curve["zones"])
            print(f"{name}\n{text_table(eval_page.temperature_table(curve))}\n{found}\n")
    print(f"results in {out}, report in {page}")
    if figures:
        print(text_table(table))


def print_details(found: Evaluation) -> None:
    """Print pass@k and maj@k with both intervals, accuracy by length, diversity and speed."""
    print(text_table(eval_page.k_table(found)))
    print(text_table(eval_page.length_table(found)))
    diversity = "-" if found.distinct4 is None else f"{found.distinct4:.3f}"
    speed = "" if found.tokens_per_s is None else f", {found.tokens_per_s:,.0f} tokens/s"
    memory = "" if found.peak_memory_gib is None else f", peak memory {found.peak_memory_gib:.2f} GiB"
    unanswerable = f", {found.unanswerable} problems have no answer and count as wrong" * bool(found.unanswerable)
    print(f"distinct-4 {diversity}, {found.tokens:,} tokens{speed}{memory}{unanswerable}\n")


# ---------------------------------------------------------------------------------------------- sampling the model


def evaluate_sets(session: Session) -> Results:
    """Sample n responses to each problem of each set and compute their metrics.

    With --curve length also accuracy against the token budget, without and with YaRN, from one sampling each.
    """
    arguments, recorder, results = session.arguments, session.recorder, Results()
    model, budgets = recorder.worker.model, []
    settings = {"": model.config}
    if arguments.curve:
        points = range(1, LENGTH_BUDGETS + 1)
        budgets = sorted({max(1, round(arguments.max_tokens * i / LENGTH_BUDGETS)) for i in points})
        settings = {"no YaRN": model.config}
        if isinstance(model.config.rope.scaling, Yarn):  # by --yarn, or the model's own
            # same positions without scaling: rotary angles have no limit, only positions that were never trained
            settings = {"no YaRN": replace(model.config, rope=replace(model.config.rope, scaling=None))}
            settings["YaRN"] = model.config
    for setting, config in settings.items():
        model.config = config
        model.set_rope(config.rope)
        for name, problems in session.sets.items():
            key = f"{name}-{setting}" if setting else name
            groups = recorder.respond(name, problems, arguments.n, session.sampling, budgets, key=key)
            found = summarise(name, problems, groups, session.sampling.temperature, session.trained_length)
            speed = recorder.work.tokens / recorder.work.sample_seconds if recorder.work.tokens else None
            memory = max(session.processes.all_gather(session.processes.peak_memory_gib()))
            results.figures[setting].append(replace(found, tokens_per_s=speed, peak_memory_gib=memory))
            results.groups[setting][name] = groups
            if budgets:
                curve = length_curve(problems, groups, budgets, recorder.worker.grader)
                results.curves["length"].setdefault(name, {})[setting] = curve
    return results


def length_curve(
    problems: Sequence[Problem], groups: Sequence[Sequence[Response]], budgets: Sequence[int], grader: Grader
) -> list[dict]:
    """Compute accuracy against the token budget from one sampling, by cutting the responses and grading them again."""
    curve = []
    for budget in budgets:
        right = np.array([[r.tokens <= budget and r.correct for r in group] for group in groups], dtype=float)  # (P, n)
        boxed = [
            (i, j, head)
            for i, group in enumerate(groups)
            for j, r in enumerate(group)
            if r.tokens > budget
            and (
                (head := r.text[: r.cuts[str(budget)]])
                and grader.reward
                or last_boxed(head, grader.thinking) is not None
            )
        ]
        grades = grader.grade([(head, problems[i].answers, problems[i].row) for i, _, head in boxed])
        for (i, j, _), grade in zip(boxed, grades, strict=True):
            right[i, j] = grade.right
        means = right.mean(1)
        low, high = interval(means)
        curve.append(dict(budget=budget, accuracy=float(np.mean(means)), low=low, high=high))
    return curve


def temperature_curves(session: Session) -> Results:
    """Measure accuracy and distinct-4 against temperature, for the three zones or for --match.

    The problems are shuffled by the seed, so that the first ones, which a margin may stop at, represent all.
    """
    arguments, results = session.arguments, Results()
    kind, margin = ("match", MATCH_MARGIN) if arguments.match else ("temperature", CURVE_MARGIN)
    margin = margin if arguments.margin is None else arguments.margin
    for name, problems in session.sets.items():
        order = np.random.default_rng(arguments.seed).permutation(len(problems))
        problems = [problems[i] for i in order]

        def respond(some: Sequence[Problem], temperature: float, name: str = name) -> list[list[Response]]:
            sampling, key = replace(session.sampling, temperature=temperature), f"{name}-temperature-{temperature:g}"
            return session.recorder.respond(name, some, arguments.n, sampling, key=key)

        if arguments.match:
            chosen, curve = match_diversity(
                respond, problems, session.targets[name], session.sampling.temperature,
                margin=margin, say=session.processes.say,
            )  # fmt: skip
            found = {"chosen": chosen}
        else:
            curve = []
            for temperature in arguments.temperatures:
                point = measure_temperature(respond, problems, temperature, margin)
                curve.append(point)
                diversity = "-" if point.distinct4 is None else f"{point.distinct4:.3f} +-{point.distinct4_half:.3f}"
                session.processes.say(
                    f"{name}: temperature {temperature:g}: accuracy {percent(point.accuracy)} "
                    f"+-{percent(point.accuracy_half)}, distinct-4 {diversity}, "
                    f"from {point.problems} of {len(problems)} problems"
                )
            try:
                found = {"zones": asdict(find_zones(curve))}
            except ValueError as error:
                found = {"zones": {"none": str(error)}}
        results.curves[kind][name] = {"points": [point.row() for point in curve], **found}
    return results


# ---------------------------------------------------------------------------------------- finished evaluations


def regrade(arguments: argparse.Namespace) -> None:
    """Grade the stored responses of an evaluation again and write a new evaluation."""
    run, out = arguments.regrade, arguments.out
    settings = read_settings(run)
    if out and out.exists():
        raise DataError(f"{out} already exists; give another --out")
    sets, results = {}, Results()
    reward = (settings.get("reward") or "") if arguments.reward is None else arguments.reward
    thinking = settings["thinking"] if arguments.thinking is None else arguments.thinking == "true"
    with Grader(arguments.workers, thinking=thinking, reward=reward) as grader:
        for name in settings["data"]:
            problems, stored = read_groups(run, name, settings["n"], bool(reward))
            pairs = zip(problems, stored, strict=True)
            grades = iter(grader.grade([(r.text, p.answers, p.row) for p, group in pairs for r in group]))
            regraded = ([(r, next(grades)) for r in group] for group in stored)
            groups = [[replace(r, verdict=g.verdict, answer=g.answer) for r, g in group] for group in regraded]
            before, after = ([r.verdict for r in chain(*some)] for some in (stored, groups))
            moves = Counter((old, new) for old, new in zip(before, after, strict=True) if old != new)
            changed = ", ".join(f"{count} {old} -> {new}" for (old, new), count in sorted(moves.items()))
            print(f"{name}: {len(after):,} responses regraded; {changed or 'no verdict changed'}")
            check_grader(Counter(after), arguments.most_failed_share, grader.failures)
            sets[name], results.groups[""][name] = problems, groups
            found = summarise(name, problems, groups, settings["temperature"], settings["trained_length"])
            results.figures[""].append(found)
    identity = settings["identity"] | {"reward function": function_identity(reward)}
    out = out or new_folder(Path("runs"), "eval")
    open_folder(out, settings | {"thinking": thinking, "reward": reward, "identity": identity}, sets)
    for name, groups in results.groups[""].items():
        write_responses(response_file(out, name), chain(*groups))
    write_results(out, settings["model"], sets, results)


def compare_runs(folders: Sequence[Path], out: Path | None) -> None:
    """Compare evaluations with the first, paired by problem, for each set in both; print it and write compare.html.

    The page is in the folder `out`, or else beside the first evaluation.
    """
    a, *others = folders
    then, rows, moved = read_settings(a), [["set", *PAIRED]], [["problem", "set", "A", "B", "text"]]
    notes = [f"A is {a}, B is {' or '.join(map(str, others))}; {PAIRED_NOTE}"]
    for b in others:
        now = read_settings(b)
        for name in ("n", "temperature", *DECODING, "thinking"):
            if then.get(name) != now.get(name):
                notes.append(f"note: {name} is {then.get(name)} in {a} and {now.get(name)} in {b}")
        for part in other_parts(then.get("identity"), now.get("identity", {})):
            if part in ("prompts", "problems", "reward function"):
                notes.append(f"note: the {part} of {a} and {b} differ")
        shared = [name for name in then["data"] if name in now["data"]]
        if not shared:
            raise DataError(f"{a} has {', '.join(then['data'])}, {b} {', '.join(now['data'])}: no set is in both")
        for name in shared:
            read = [read_groups(run, name, own["n"], bool(own.get("reward"))) for run, own in ((a, then), (b, now))]
            right = [{group[0].problem_id: [r.correct for r in group] for group in groups} for _, groups in read]
            found = compare(name, *({key: float(np.mean(own)) for key, own in of.items()} for of in right))
            label, texts = f"{name}, {b}" if len(others) > 1 else name, {p.id: p.text for p in read[0][0]}
            rows.append([label, *paired_row(found)])
            for key in moved_problems(*right):
                counts = (f"{sum(of[key])} of {len(of[key])}" for of in right)
                moved.append([key, label, *counts, shorten(texts[key], MOST_TEXT, placeholder=" …")])
    path = (out or a.resolve().parent) / "compare.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = MOVED_NOTE if moved[1:] else "No problem moved beyond noise"
    parts = [("Paired by problem", notes, rows, []), ("Problems that moved", [noise], moved, [])]
    print(*notes, sep="\n")
    print(f"{noise}\n{text_table([row[:-1] for row in moved])}\n" if moved[1:] else f"{noise}\n")
    print(f"page in {write_page(path, 'compare.html', title=' · '.join(map(str, folders)), parts=parts)}")
    print(text_table(rows))


def command(arguments: argparse.Namespace) -> None:
    """Run the command that the arguments select."""
    if arguments.out and arguments.out.exists() and not arguments.out.is_dir():
        raise DataError(f"{arguments.out} is not a folder; give another --out")
    if arguments.compare:
        compare_runs(arguments.compare, arguments.out)
    elif arguments.regrade:
        regrade(arguments)
    else:
        session = start_session(arguments)
        with session.recorder.worker.grader:
            by_temperature = arguments.match or arguments.temperatures
            results = temperature_curves(session) if by_temperature else evaluate_sets(session)
        if session.processes.is_main:
            write_results(arguments.out, arguments.model, session.sets, results)


def main(arguments: argparse.Namespace) -> None:
    """Run eval.py with the arguments of lab.options.evaluation_arguments."""
    run_command("eval.py", command, arguments)
