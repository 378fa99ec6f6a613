"""How good is a model? avg@k, pass@k and maj@k with honest intervals; curves against temperature and length.

    python eval.py MODEL --data aime24 --data aime25 -n 32 --temperature 1.4 --top-k 20 --max-tokens 90000 \\
        --yarn 1.5 --original-window 65536                          # several sets at once; by name, file or folder
    torchrun --nproc-per-node 8 eval.py MODEL --data ...            # the same on eight GPUs
    python eval.py MODEL --data amc23 --curve temperature 0.6:1.7:0.1   # the three zones, and where to start training
    python eval.py MODEL --data amc23 --match runs/eval             # the temperature that restores its diversity
    python eval.py MODEL --data aime24 --curve length --yarn 1.5    # accuracy against budget, with and without YaRN
    python eval.py --compare runs/eval-a runs/eval-b                # paired by problem
    python eval.py --regrade runs/eval --out runs/regraded          # stored responses, graded again without a model

Every response is written with its verdict as it finishes, to OUT/responses/NAME.jsonl. Interrupted, the same command
goes on where it stopped, with the result that it would have had. OUT also gets results.json and report.html.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import device as devices
from attempts import AttemptStats, GraderError, Respondent, check_grader, load_tokenizer, stop_tokens, whole_work
from benchmarks import find_data, published_table, text_table
from data_filter import INSTRUCTION, DataError, Problem, read_problems, write_problems
from device import Interrupted, StopRequest
from eval_page import write_evaluation_page
from model import ModelConfig, ModelError, extend_window, load, resolve_folder
from report import write_atomically
from responses import Recorder, file_name, read_responses, respond, write_responses
from reward import Grader, last_boxed
from rollout import KERNEL_PAGE_TOKENS, CacheLimits, RolloutError, Sampling, cache_bytes_per_token, check_requests
from scores import Evaluation, Response, compare, interval, summarise
from temperature import TemperaturePoint, Zones, find_zones, match_diversity, measure_temperature

LENGTH_BUDGETS = 16  # points of the curve of accuracy against length
CURVE_MARGIN, MATCH_MARGIN = 0.03, 0.01  # half widths of the intervals that a curve, a search samples for


def evaluate(
    respondent: Respondent, name: str, problems: Sequence[Problem], n: int, sampling: Sampling, label: str | None = None
) -> tuple[Evaluation, list[list[Response]]]:
    """n responses to every problem, and their figures, nothing written. Every process calls it and gets the same."""
    groups = respond(respondent, name, problems, n, sampling, label)
    return summarise(name, problems, groups, sampling.temperature, sampling.max_new_tokens), groups


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


# ----------------------------------------------------------------------------------------------- the command line


def parse_arguments() -> argparse.Namespace:
    """The command line; combinations that make no sense are errors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", nargs="?", help="a model folder or hub id")
    parser.add_argument(
        "--data", action="append", default=[], help="a known benchmark, a file, a folder of files or a hub data set"
    )
    parser.add_argument("--folder", type=Path, help="where the files of known benchmarks are, before the hub is asked")
    parser.add_argument("-n", type=int, default=8, help="responses per problem")
    parser.add_argument("--temperature", type=float, default=1.4)
    parser.add_argument("--top-k", type=int, default=20, help="0 is off")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=8192, help="of a response")
    parser.add_argument("--yarn", type=float, metavar="FACTOR", help="lengthen the model's window by this factor")
    parser.add_argument("--original-window", type=int, help="the window that YaRN lengthens (default: the config's)")
    parser.add_argument(
        "--trained-length",
        type=int,
        help="tokens of which the length bands are fractions (default: YaRN's original window, else --max-tokens)",
    )
    parser.add_argument("--no-thinking", action="store_true", help="the model does not think: the box alone counts")
    parser.add_argument("--instruction", default=INSTRUCTION, help="appended to problems that do not carry it")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave problems without an answer out")
    parser.add_argument("--limit", type=int, help="only the first so many problems of each set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=64, help="sequences decoded at once")
    parser.add_argument("--cache-tokens", type=int, help="of all sequences together (default: every row full)")
    parser.add_argument("--workers", type=int, default=2, help="processes that grade symbolic answers")
    parser.add_argument("--out", type=Path, default=Path("runs/eval"), help="a new folder, or one to go on in")
    parser.add_argument(
        "--curve", nargs="+", metavar=("KIND", "FROM:TO:STEP"), help='"temperature 0.6:1.7:0.1", or "length"'
    )
    parser.add_argument("--match", metavar="RUN|SCORE", help="search upward for the temperature of this distinct-4")
    parser.add_argument("--margin", type=float, help="half width of a 95%% interval that is enough")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two folders of results, B minus A")
    parser.add_argument("--regrade", type=Path, metavar="RUN", help="grade the responses of a folder again")
    arguments = parser.parse_args()
    if arguments.compare or arguments.regrade:
        return arguments
    if not arguments.model or not arguments.data:
        parser.error("a model and at least one --data are needed")
    if min(arguments.n, 1 if arguments.limit is None else arguments.limit) < 1:
        parser.error("-n and --limit must be at least 1")
    if arguments.curve and arguments.match:
        parser.error("--curve and --match are two things to do: give one of them")
    kind = arguments.curve[0] if arguments.curve else ""
    if arguments.curve and [kind, len(arguments.curve)] not in (["temperature", 2], ["length", 1]):
        parser.error('--curve is "temperature FROM:TO:STEP" or "length"')
    arguments.temperatures = []
    if kind == "temperature":
        try:
            first, last, step = map(float, arguments.curve[1].split(":"))
            count = int((last - first) / step + 1e-9) + 1
            arguments.temperatures = [round(first + i * step, 6) for i in range(count)]
        except (ValueError, ZeroDivisionError):
            count = 0
        if count < 2 or first < 0:
            parser.error(f"--curve temperature needs FROM:TO:STEP, such as 0.6:1.7:0.1, not {arguments.curve[1]}")
    return arguments


@dataclass
class Session:
    """One evaluation under way: a loaded model, the sets to ask it, and where everything goes."""

    arguments: argparse.Namespace
    recorder: Recorder
    sampling: Sampling
    sets: dict[str, list[Problem]]
    plain: ModelConfig  # without YaRN, its window as long as with it
    config: ModelConfig
    trained_length: int

    @property
    def device(self) -> devices.Device:
        return self.recorder.respondent.device

    def use(self, config: ModelConfig) -> None:
        """Let the model compute with another window and rotary scaling."""
        model = self.recorder.respondent.model
        model.config = config
        model.set_rope(config.rope)


def start_session(arguments: argparse.Namespace, grader: Grader) -> Session:
    """Read the data, load the model, and find before anything is sampled what would go wrong."""
    places = find_data(arguments.data, arguments.folder)
    sets = {
        name: read_problems(place, "skip" if arguments.skip_bad_rows else "keep")[: arguments.limit]
        for name, place in places.items()
    }
    here = devices.start()
    folder = resolve_folder(arguments.model)
    model = load(folder, here.device, here.compute_dtype)
    config = model.config
    if arguments.yarn is not None:
        config = extend_window(config, arguments.yarn, arguments.original_window)
    # without scaling, the same positions: rotary angles have no end, only an untrained part
    plain = replace(model.config, max_position_embeddings=config.max_position_embeddings)
    tokenizer = load_tokenizer(folder, model)
    sampling = Sampling(
        arguments.temperature, arguments.max_tokens, stop_tokens(tokenizer, model, folder), arguments.seed,
        top_k=arguments.top_k, top_p=arguments.top_p,
    )  # fmt: skip
    stop = StopRequest("the responses that are finished are kept")
    respondent = Respondent(model, tokenizer, sampling.stop_tokens, None, grader, here, arguments.instruction, stop)
    prompts = [respondent.prompt(problem, 1) for problems in sets.values() for problem in problems]
    respondent.limits = cache_limits(arguments, config, here, max(len(prompt.tokens) for prompt in prompts))
    scaling = config.rope.scaling
    trained = (
        arguments.trained_length or getattr(scaling, "original_max_position_embeddings", None) or arguments.max_tokens
    )
    recorder = Recorder(respondent, arguments.out, AttemptStats())
    session = Session(arguments, recorder, sampling, sets, plain, config, trained)
    session.use(config)
    check_requests(model, prompts, sampling, respondent.limits)
    if here.is_main:
        open_folder(session)
    here.share(None)
    return session


def cache_limits(
    arguments: argparse.Namespace, config: ModelConfig, here: devices.Device, longest_prompt: int
) -> CacheLimits:
    """A cache in which every row can be full; on a GPU no more than two thirds of the free memory hold: rows wait."""
    window = longest_prompt + arguments.max_tokens
    page, fits = window, (arguments.rows + 2) * window
    if here.device.type == "cuda":
        page, (free, _) = KERNEL_PAGE_TOKENS, torch.cuda.mem_get_info()
        fits = min(fits + page, int(free * 2 / 3) // cache_bytes_per_token(config, here.compute_dtype))
    return CacheLimits(arguments.cache_tokens or fits, page, arguments.rows)


def open_folder(session: Session) -> None:
    """A new folder, or one to go on in: then it must be of the same evaluation. -n may grow."""
    arguments, out = session.arguments, session.arguments.out
    ids = "\n".join(problem.id for problems in session.sets.values() for problem in problems)
    settings = {
        name: getattr(arguments, name)
        for name in ("model", "temperature", "top_k", "top_p", "max_tokens", "yarn", "original_window", "instruction")
    }
    settings |= {"thinking": not arguments.no_thinking, "seed": arguments.seed, "data": list(session.sets)}
    settings |= {"curve": arguments.curve, "match": arguments.match}
    settings |= {"problems": hashlib.sha256(ids.encode()).hexdigest()[:16]}
    path = out / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        for name, value in settings.items():
            if before.get(name) != value:
                raise DataError(
                    f"{out} holds an evaluation with {name} = {before.get(name)}, not {value}; give another --out"
                )
        print(f"going on in {out}")
    elif out.exists() and any(out.iterdir()):
        raise DataError(f"{out} exists already and holds no evaluation; give another --out")
    else:
        (out / "problems").mkdir(parents=True)
        for name, problems in session.sets.items():
            write_problems(problems, out / "problems" / f"{file_name(name)}.jsonl")
    write_atomically(path, [json.dumps(settings | {"n": arguments.n}, indent=2).encode()])


def print_evaluation(found: Evaluation) -> None:
    """One line, and one for each grouping that the data has."""
    print(
        f"{found.name}: avg@{found.n} {100 * found.avg:.1f} (95% {100 * found.low:.1f} to {100 * found.high:.1f}) over "
        f"{found.problems} problems, mean length {found.length_mean:,.0f}, truncated {found.truncated_share:.1%}, "
        f"no box {found.no_box_share:.1%}, {found.verdicts}"
    )
    for groups in (found.by_type, found.by_difficulty):
        if len(groups) > 1:
            print("  " + ", ".join(f"{label} {100 * accuracy:.1f}" for label, accuracy in groups.items()))


def print_details(found: Evaluation) -> None:
    """pass@k and maj@k with both intervals, accuracy by length, diversity and speed."""

    def spread(low: float | None, high: float | None) -> str:
        return "-" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"

    rows = [["", "value", "95%, other problems", "95%, these problems again"]]
    for title, figures in (("pass", found.pass_at), ("maj", found.maj_at)):
        rows += [
            [f"{title}@{k}", f"{100 * e.value:.1f}", spread(e.low, e.high), spread(e.resampled_low, e.resampled_high)]
            for k, e in figures.items()
        ]
    print(text_table(rows))
    rows = [["length in tokens", "responses", "accuracy", "95%"]]
    for band in found.by_length:
        name = f"{band.above:,.0f} to {band.up_to:,.0f}" if band.up_to else f"above {band.above:,.0f}"
        accuracy = "-" if band.accuracy is None else f"{100 * band.accuracy:.1f}"
        rows.append([name, f"{band.responses:,}", accuracy, spread(band.low, band.high)])
    print(text_table(rows))
    diversity = "-" if found.distinct4 is None else f"{found.distinct4:.3f}"
    speed = "" if found.tokens_per_s is None else f", {found.tokens_per_s:,.0f} tokens/s"
    memory = "" if found.peak_memory_gib is None else f", peak memory {found.peak_memory_gib:.2f} GiB"
    unanswerable = f", {found.unanswerable} problems have no answer and count as wrong" * bool(found.unanswerable)
    print(f"distinct-4 {diversity}, {found.tokens:,} tokens{speed}{memory}{unanswerable}\n")


# ---------------------------------------------------------------------------------------------- what can be asked


def plain_evaluation(session: Session) -> None:
    """n responses to every problem of every set, and the table."""
    found, groups = [], {}
    for name, problems in session.sets.items():
        before = replace(session.recorder.work)
        groups[name] = session.recorder.respond(name, problems, session.arguments.n, session.sampling)
        found.append(summarise_session(session, name, problems, groups[name], before))
    if session.device.is_main:
        finish(session.arguments.out, session.arguments.model, found, session.sets, groups)


def summarise_session(
    session: Session, name: str, problems: Sequence[Problem], groups: list[list[Response]], before: AttemptStats
) -> Evaluation:
    """The figures of a set, with the speed at which this session sampled it."""
    now, device = session.recorder.work, session.device
    mine = AttemptStats(now.tokens - before.tokens, now.sample_seconds - before.sample_seconds)
    work = whole_work(device.gather(mine))
    return summarise(
        name,
        problems,
        groups,
        session.sampling.temperature,
        session.trained_length,
        tokens_per_s=work.tokens / work.sample_seconds if work.tokens else None,
        peak_memory_gib=max(device.gather(device.peak_memory_gib())),
    )


def finish(
    out: Path,
    model: str,
    found: list[Evaluation],
    sets: dict[str, list[Problem]],
    groups: dict[str, list[list[Response]]],
    curves: dict | None = None,
) -> None:
    """Write results.json and report.html; print the figures, and at last the table of RECIPE.md section 6."""
    results = {"model": model, "evaluations": [asdict(evaluation) for evaluation in found], **(curves or {})}
    write_atomically(out / "results.json", [(json.dumps(results, indent=2) + "\n").encode()])
    table = published_table(model, found)
    page = write_evaluation_page(out, model, found, sets, groups, table, curves or {})
    for evaluation in found:
        print_evaluation(evaluation)
        print_details(evaluation)
    print(f"results in {out}, report in {page}")
    if found:
        print(text_table(table))


def answer_with(session: Session, name: str) -> Callable[[Sequence[Problem], float], list[list[Response]]]:
    """Responses of the model at any temperature, kept on disk under the set's name and the temperature."""

    def answer(problems: Sequence[Problem], temperature: float) -> list[list[Response]]:
        sampling, key = replace(session.sampling, temperature=temperature), f"{name}-temperature-{temperature:g}"
        return session.recorder.respond(name, problems, session.arguments.n, sampling, key=key)

    return answer


def temperature_curve(session: Session) -> None:
    """Accuracy and distinct-4 against temperature, the three zones, and where to start training."""
    margin = CURVE_MARGIN if session.arguments.margin is None else session.arguments.margin
    curves = {}
    for name, problems in session.sets.items():
        curve = []
        for temperature in session.arguments.temperatures:
            point = measure_temperature(answer_with(session, name), problems, temperature, margin)
            session.device.say(describe_point(name, point, len(problems)))
            curve.append(point)
        try:
            zones = find_zones(curve)
            session.device.say(f"{name}: {describe_zones(zones)}")
        except ValueError as error:
            zones = None
            session.device.say(f"{name}: {error}")
        curves[name] = {"points": [asdict(point) for point in curve], "zones": zones and asdict(zones)}
    if session.device.is_main:
        finish(session.arguments.out, session.arguments.model, [], session.sets, {}, {"temperature": curves})


def describe_point(name: str, point: TemperaturePoint, problems: int) -> str:
    """One temperature in a line."""
    diversity = "-" if point.distinct4 is None else f"{point.distinct4:.3f} +-{point.distinct4_half:.3f}"
    return (
        f"{name}: temperature {point.temperature:g}: accuracy {100 * point.accuracy:.1f} "
        f"+-{100 * point.accuracy_half:.1f}, distinct-4 {diversity}, from {point.problems} of {problems} problems"
    )


def describe_zones(zones: Zones) -> str:
    """The zones in words."""
    if zones.robust_end is None:
        return f"accuracy does not fall up to temperature {zones.start:g}: measure higher ones; start there or above"
    end = "beyond what was measured" if zones.exploration_end is None else f"at {zones.exploration_end:.2f}"
    return (
        f"robust generation up to {zones.robust_end:.2f}, controlled exploration from there, "
        f"performance collapse {end}; start training at {zones.start:g}"
    )


def match_temperature(session: Session) -> None:
    """The first temperature, upward, that restores a diversity score."""
    margin = MATCH_MARGIN if session.arguments.margin is None else session.arguments.margin
    curves = {}
    for name, problems in session.sets.items():
        target = target_diversity(session, name)
        chosen, curve = match_diversity(
            answer_with(session, name), problems, target, session.sampling.temperature,
            margin=margin, say=session.device.say,
        )  # fmt: skip
        for point in curve:
            session.device.say(describe_point(name, point, len(problems)))
        session.device.say(f"{name}: temperature {chosen:g} for distinct-4 = {target:.3f}")
        curves[name] = {"target": target, "chosen": chosen, "points": [asdict(point) for point in curve]}
    if session.device.is_main:
        finish(session.arguments.out, session.arguments.model, [], session.sets, {}, {"match": curves})


def target_diversity(session: Session, name: str) -> float:
    """The score to match: given as a number, or that of an earlier evaluation of the same set, or of a run."""
    given, arguments = session.arguments.match, session.arguments
    try:
        return float(given)
    except ValueError:
        pass
    run = Path(given)
    if (run / "results.json").exists():
        before = json.loads((run / "settings.json").read_text())
        for setting in ("n", "max_tokens", "problems"):
            now = json.loads((arguments.out / "settings.json").read_text())[setting]
            if before[setting] != now:
                raise DataError(f"{run} measured its diversity with another {setting} ({before[setting]}, not {now})")
        for found in json.loads((run / "results.json").read_text())["evaluations"]:
            if found["name"] == name and found["distinct4"] is not None:
                return found["distinct4"]
        raise DataError(f"{run} has no distinct-4 of {name}; evaluate it there first")
    if (run / "metrics.jsonl").exists():
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        for row in rows:
            if row["kind"] == "temperature" and row["curve"]:
                first = row["curve"][0]["distinct4"] if row["target_distinct4"] is None else row["target_distinct4"]
                if first is not None:
                    return first
        raise DataError(f"{run} has measured no diversity yet; give a score")
    raise DataError(f"--match {given}: neither a number nor a folder with results.json or metrics.jsonl")


def length_curves(session: Session) -> None:
    """Accuracy against the token budget, with and without YaRN, from one sampling each."""
    most, n = session.arguments.max_tokens, session.arguments.n
    budgets = sorted({max(1, round(most * i / LENGTH_BUDGETS)) for i in range(1, LENGTH_BUDGETS + 1)})
    settings = {"no YaRN": session.plain}
    if session.arguments.yarn is not None:
        settings["YaRN"] = session.config
    curves, found, kept = defaultdict(dict), [], {}
    for setting, config in settings.items():
        session.use(config)
        for name, problems in session.sets.items():
            label, before = f"{name}, {setting}", replace(session.recorder.work)
            groups = session.recorder.respond(name, problems, n, session.sampling, budgets, key=label)
            curve = length_curve(problems, groups, budgets, session.recorder.respondent.grader)
            curves[name][setting] = [asdict(point) for point in curve]
            kept[label] = groups
            found.append(summarise_session(session, label, problems, groups, before))
    if session.device.is_main:
        for name, by_setting in curves.items():
            rows = [["tokens", *by_setting]]
            for i, budget in enumerate(budgets):
                cells = [points[i] for points in by_setting.values()]
                rows.append(
                    [f"{budget:,}"]
                    + [f"{100 * p['accuracy']:.1f} [{100 * p['low']:.1f}, {100 * p['high']:.1f}]" for p in cells]
                )
            print(f"{name}: accuracy when responses are cut at so many tokens\n{text_table(rows)}")
        sets = {label: session.sets[label.rpartition(", ")[0]] for label in kept}
        finish(session.arguments.out, session.arguments.model, found, sets, kept, {"length": dict(curves)})


def regrade(run: Path, out: Path, grader_of: Callable[[bool], Grader]) -> None:
    """Grade the responses of an evaluation again, against the answers that it kept, and write a new evaluation."""
    settings_path = run / "settings.json"
    if not settings_path.exists():
        raise DataError(f"{run} is no evaluation: it has no settings.json; give the folder that eval.py wrote")
    if out.exists():
        raise DataError(f"{out} exists already; give another --out")
    settings = json.loads(settings_path.read_text())
    found, sets, regraded = [], {}, {}
    with grader_of(settings["thinking"]) as grader:
        for name in settings["data"]:
            path = run / "responses" / f"{file_name(name)}.jsonl"
            if not path.exists():
                raise DataError(f"{run} has no responses to {name}: let the evaluation end first")
            problems = read_problems(run / "problems" / f"{file_name(name)}.jsonl", "keep")
            place = {problem.id: i for i, problem in enumerate(problems)}
            responses = read_responses(path)
            answers = [problems[place[response.problem_id]].answers for response in responses]
            grades = grader.grade([(r.text, golds) for r, golds in zip(responses, answers, strict=True)])
            groups, changed = [[] for _ in problems], Counter()
            for response, grade in zip(responses, grades, strict=True):
                new = replace(response, verdict=grade.verdict, answer=grade.answer)
                changed[(response.verdict, grade.verdict)] += 1
                groups[place[response.problem_id]].append(new)
            moves = [f"{count} {a} -> {b}" for (a, b), count in sorted(changed.items()) if a != b]
            print(f"{name}: {len(responses):,} responses graded again; {', '.join(moves) or 'no verdict changed'}")
            check_grader(Counter(grade.verdict for grade in grades), Respondent.most_failed_share)
            sets[name], regraded[name] = problems, groups
            found.append(summarise(name, problems, groups, settings["temperature"], settings["max_tokens"]))
    (out / "problems").mkdir(parents=True)
    for name, problems in sets.items():
        write_problems(problems, out / "problems" / f"{file_name(name)}.jsonl")
        write_responses(out / "responses" / f"{file_name(name)}.jsonl", (r for g in regraded[name] for r in g))
    write_atomically(out / "settings.json", [json.dumps(settings, indent=2).encode()])
    finish(out, settings["model"], found, sets, regraded)


def compare_runs(a: Path, b: Path) -> None:
    """The paired difference of two evaluations, B minus A, for every set that both have."""
    settings = []
    for run in (a, b):
        if not (run / "settings.json").exists():
            raise DataError(f"{run} is no evaluation: it has no settings.json; give the folder that eval.py wrote")
        settings.append(json.loads((run / "settings.json").read_text()))
    for name in ("n", "temperature", "top_k", "top_p", "max_tokens", "yarn", "thinking"):
        if settings[0].get(name) != settings[1].get(name):
            print(f"note: {name} is {settings[0].get(name)} in {a} and {settings[1].get(name)} in {b}")
    files = [{path.stem: path for path in sorted((run / "responses").glob("*.jsonl"))} for run in (a, b)]
    shared = [name for name in files[0] if name in files[1]]
    if not shared:
        has = [", ".join(run_files) or "no responses" for run_files in files]
        raise DataError(f"{a} has {has[0]}, {b} has {has[1]}: no set is in both")
    rows = [["set", "A", "B", "B - A", "95%, paired", "up", "down", "same", "left out"]]
    for name in shared:
        means = []
        for run_files in files:
            correct = defaultdict(list)
            for response in read_responses(run_files[name]):
                correct[response.problem_id].append(response.correct)
            means.append({problem_id: float(np.mean(values)) for problem_id, values in correct.items()})
        if not set(means[0]) & set(means[1]):
            raise DataError(f"{name}: {a} and {b} have no problem in common")
        found = compare(name, *means)
        rows.append([
            name, f"{100 * found.avg_a:.1f}", f"{100 * found.avg_b:.1f}", f"{100 * found.difference:+.1f}",
            f"{100 * found.low:+.1f} to {100 * found.high:+.1f}", str(found.up), str(found.down), str(found.same),
            str(found.only_a + found.only_b),
        ])  # fmt: skip
    print(f"A is {a}, B is {b}; up and down count problems that B solves more and less often than A")
    print(text_table(rows))


def main() -> None:
    """Evaluate a model, or read what evaluations have left."""
    arguments = parse_arguments()
    grader_of = partial(Grader, arguments.workers)
    session = None
    try:
        if arguments.compare:
            compare_runs(*arguments.compare)
            return
        if arguments.regrade:
            regrade(arguments.regrade, arguments.out, lambda thinking: grader_of(thinking=thinking))
            return
        with grader_of(thinking=not arguments.no_thinking) as grader:
            session = start_session(arguments, grader)
            kind = arguments.curve[0] if arguments.curve else "match" if arguments.match else "plain"
            ask = {"temperature": temperature_curve, "length": length_curves, "match": match_temperature}
            ask.get(kind, plain_evaluation)(session)
    except Interrupted:
        session.device.say(f"stopped; the same command goes on, with what is in {arguments.out}")
        sys.exit(130)
    except (ModelError, DataError, RolloutError, GraderError, OSError) as error:
        sys.exit(f"eval.py: {error}")
    finally:
        devices.stop()


if __name__ == "__main__":
    main()
