"""The command line of eval.py: sessions, curves, comparing, regrading."""

import argparse
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from engine import device as devices
from engine.attempts import AttemptStats, GraderError, Respondent, check_grader, whole_work
from engine.device import Interrupted, StopRequest
from engine.files import write_atomically
from engine.fingerprint import model_identity
from engine.grader import Grader
from engine.tokenizer import load_tokenizer, stop_tokens
from eval import Answer, Diversity, TemperaturePoint, find_zones, match_diversity, measure_temperature
from lab.benchmarks import file_name, find_data, published_table, text_table
from lab.eval_page import budget_table, describe_zones, k_table, length_table, temperature_table, write_evaluation_page
from lab.metrics import MetricsError, read_metrics
from lab.problems import INSTRUCTION, DataError, Problem, read_problems, write_problems
from lab.responses import Recorder, read_groups, read_settings, response_file, write_responses, write_settings
from lab.scores import Evaluation, Response, compare, interval, summarise
from model import ModelConfig, ModelError, extend_window, load, resolve_folder, tokenizer_folder
from reward import last_boxed
from rollout import (
    KERNEL_PAGE_TOKENS,
    CacheLimits,
    RolloutError,
    Sampling,
    cache_bytes_per_token,
    check_requests,
    distinct_share,
)

SAMPLING_SETTINGS = (
    "model", "temperature", "top_k", "top_p", "max_tokens", "yarn", "original_window", "instruction", "seed",
)  # fmt: skip
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


# ----------------------------------------------------------------------------------------------- the command line


def parse_arguments() -> argparse.Namespace:
    """The command line. What makes no sense is an error before anything is loaded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", nargs="?", help="a model folder or hub id")
    parser.add_argument(
        "--data", action="append", help="a known benchmark, a file, a folder of files or a hub data set"
    )
    parser.add_argument("--folder", type=Path, help="where the files of known benchmarks are, before the hub is asked")
    parser.add_argument("-n", type=int, default=8, help="responses per problem")
    parser.add_argument("--temperature", type=float, help="default: 1.4; 0 is greedy")
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
    parser.add_argument("--most-failed-share", type=float, default=0.02, help="failures of the grader that stop")
    parser.add_argument("--out", type=Path, default=Path("runs/eval"), help="a new folder, or one to go on in")
    parser.add_argument(
        "--curve", nargs="+", metavar=("KIND", "FROM:TO:STEP"), help='"temperature 0.6:1.7:0.1", or "length"'
    )
    parser.add_argument("--match", metavar="RUN|SCORE", help="search upward for the temperature of this distinct-4")
    parser.add_argument("--margin", type=float, help="half width of a 95%% interval that is enough (0: all problems)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two folders of results, B minus A")
    parser.add_argument("--regrade", type=Path, metavar="RUN", help="grade the responses of a folder again")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error("--workers must be at least 1")
    if arguments.compare or arguments.regrade:
        if arguments.model or arguments.data:
            parser.error("--compare and --regrade read folders of results: give no model and no --data")
        return arguments
    if not arguments.model or not arguments.data:
        parser.error("a model and at least one --data are needed")
    for name in ("n", "max_tokens", "rows", "limit", "trained_length", "original_window", "cache_tokens"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"{'-n' if name == 'n' else '--' + name.replace('_', '-')} must be at least 1")
    if arguments.top_k < 0 or not 0 < arguments.top_p <= 1:
        parser.error("--top-k must not be negative, and --top-p lies above 0 and at most at 1")
    if arguments.margin is not None and not 0 <= arguments.margin < 1:
        parser.error("--margin is a share, such as 0.03")
    if arguments.original_window and arguments.yarn is None:
        parser.error("--original-window belongs to --yarn")
    kind = arguments.curve[0] if arguments.curve else ""
    if arguments.curve and arguments.match:
        parser.error("--curve and --match are two things to do: give one of them")
    if arguments.curve and [kind, len(arguments.curve)] not in (["temperature", 2], ["length", 1]):
        parser.error('--curve is "temperature FROM:TO:STEP" or "length"')
    arguments.temperatures = []
    if kind == "temperature":
        if arguments.temperature is not None:
            parser.error("--curve temperature has its own temperatures: give no --temperature")
        arguments.temperatures = temperatures_of(arguments.curve[1])
        if not arguments.temperatures:
            parser.error(f"--curve temperature needs FROM:TO:STEP, such as 0.6:1.7:0.1, not {arguments.curve[1]}")
    arguments.temperature = 1.4 if arguments.temperature is None else arguments.temperature
    if not 0 <= arguments.temperature < math.inf:
        parser.error(f"--temperature {arguments.temperature} is no temperature: take 0 or more")
    if arguments.temperature == 0 and arguments.n > 1:
        parser.error("at temperature 0 all responses to a problem are the same: take -n 1")
    return arguments


def temperatures_of(text: str) -> list[float]:
    """FROM:TO:STEP as at least two and at most 100 temperatures above 0; [] where it is not that."""
    try:
        first, last, step = map(float, text.split(":"))
        count = int((last - first) / step + 1e-9) + 1
    except (ValueError, ZeroDivisionError, OverflowError):
        return []
    return [round(first + i * step, 6) for i in range(count)] if 2 <= count <= 100 and first > 0 < step else []


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
    targets: dict[str, Diversity]  # by set, for --match

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
    if arguments.out.exists() and not arguments.out.is_dir():
        raise DataError(f"{arguments.out} is no folder; give another --out")
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
    tokens_from = tokenizer_folder(folder)
    tokenizer = load_tokenizer(tokens_from, model)
    sampling = Sampling(
        arguments.temperature, arguments.max_tokens, stop_tokens(tokenizer, model, tokens_from), arguments.seed,
        top_k=arguments.top_k, top_p=arguments.top_p,
    )  # fmt: skip
    stop = StopRequest("the responses that are finished are kept")
    respondent = Respondent(
        model, tokenizer, sampling.stop_tokens, None, grader, here, arguments.instruction, stop,
        arguments.most_failed_share,
    )  # fmt: skip
    prompts = [respondent.prompt(problem, 1) for problems in sets.values() for problem in problems]
    respondent.limits = cache_limits(arguments, config, here, max(len(prompt.tokens) for prompt in prompts))
    scaling = config.rope.scaling
    trained = (
        arguments.trained_length or getattr(scaling, "original_max_position_embeddings", None) or arguments.max_tokens
    )
    recorder = Recorder(respondent, arguments.out, AttemptStats())
    settings = settings_of(arguments, sets, folder, trained)
    targets = {name: target_diversity(arguments.match, name, settings) for name in sets} if arguments.match else {}
    session = Session(arguments, recorder, sampling, sets, plain, config, trained, targets)
    session.use(config)
    check_requests(model, prompts, sampling, respondent.limits)
    if here.is_main:
        open_folder(arguments.out, settings, sets)
    here.share(None)
    return session


def cache_limits(
    arguments: argparse.Namespace, config: ModelConfig, here: devices.Device, longest_prompt: int
) -> CacheLimits:
    """A cache in which every row can be full, or what two thirds of the free memory hold: then rows wait."""
    window = longest_prompt + arguments.max_tokens
    page = KERNEL_PAGE_TOKENS if here.device.type == "cuda" else window
    fits = here.free_memory_bytes() * 2 // 3 // cache_bytes_per_token(config, here.compute_dtype)
    return CacheLimits(arguments.cache_tokens or min((arguments.rows + 2) * window + page, fits), page, arguments.rows)


def settings_of(
    arguments: argparse.Namespace, sets: dict[str, list[Problem]], model_folder: Path, trained_length: int
) -> dict:
    """What decides the responses of an evaluation and their figures; a folder holds those of one such set alone."""
    text = json.dumps([asdict(problem) for problems in sets.values() for problem in problems])
    return {
        **{name: getattr(arguments, name) for name in SAMPLING_SETTINGS},
        "weights": model_identity(model_folder),
        "problems": hashlib.sha256(text.encode()).hexdigest()[:16],
        "thinking": not arguments.no_thinking,
        "trained_length": trained_length,
        "data": list(sets),
        "curve": arguments.curve,
        "match": arguments.match,
        "n": arguments.n,
    }


def open_folder(out: Path, settings: dict, sets: dict[str, list[Problem]]) -> None:
    """A new folder, or one to go on in: then it must be of the same evaluation. Only -n may change."""
    if (out / "settings.json").exists():
        before = read_settings(out)
        for name, value in settings.items():
            if name != "n" and before.get(name) != value:
                raise DataError(
                    f"{out} holds an evaluation with {name} = {before.get(name)}, not {value}; give another --out"
                )
        print(f"going on in {out}")
    elif out.exists() and any(out.iterdir()):
        raise DataError(f"{out} exists already and holds no evaluation; give another --out")
    write_settings(out, settings)
    for name, problems in sets.items():
        path = out / "problems" / f"{file_name(name)}.jsonl"
        if not path.exists():
            write_problems(problems, path)


def print_evaluation(found: Evaluation) -> None:
    """One line, and one for each grouping that the data has."""
    print(
        f"{found.name}: avg@{found.n} {100 * found.avg:.1f} (95% {100 * found.low:.1f} to {100 * found.high:.1f}) over "
        f"{found.problems} problems, mean length {found.length_mean:,.0f}, truncated {found.truncated_share:.1%}, "
        f"no box {found.no_box_share:.1%}, {found.verdicts}"
    )
    for groups in (found.by_type, found.by_difficulty):
        if len(groups) > 1:
            print(
                "  " + ", ".join(f"{label} {100 * group.avg:.1f} ({group.problems})" for label, group in groups.items())
            )


def print_details(found: Evaluation) -> None:
    """pass@k and maj@k with both intervals, accuracy by length, diversity and speed."""
    print(text_table(k_table(found)))
    print(text_table(length_table(found)))
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
        finish(session.arguments.out, session.arguments.model, {"": found}, session.sets, {"": groups})


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
    found: dict[str, list[Evaluation]],
    sets: dict[str, list[Problem]],
    groups: dict[str, dict[str, list[list[Response]]]],
    curves: dict | None = None,
) -> None:
    """Write results.json and report.html; print the figures, and at last the table of RECIPE.md section 6.

    `found` and `groups` are by setting ("" where there is one alone); `groups` is by set below that.
    """
    evaluations = [asdict(evaluation) | {"setting": setting} for setting, own in found.items() for evaluation in own]
    results = {"model": model, "evaluations": evaluations, **(curves or {})}
    write_atomically(out / "results.json", [(json.dumps(results, indent=2, allow_nan=False) + "\n").encode()])
    table = published_table({", ".join(filter(None, (model, setting))): own for setting, own in found.items()})
    page = write_evaluation_page(out, model, found, sets, groups, table, curves or {})
    for setting, own in found.items():
        for evaluation in own:
            print(f"{setting}: " * bool(setting), end="")
            print_evaluation(evaluation)
            print_details(evaluation)
    for name, curve in (curves or {}).get("temperature", {}).items():
        print(f"{name}\n{text_table(temperature_table(curve))}\n{describe_zones(curve['zones'])}\n")
    for name, curve in (curves or {}).get("match", {}).items():
        print(f"{name}\n{text_table(temperature_table(curve))}\nchosen: temperature {curve['chosen']:g}\n")
    for name, curve in (curves or {}).get("length", {}).items():
        print(f"{name}: accuracy when responses are cut at so many tokens\n{text_table(budget_table(curve))}\n")
    print(f"results in {out}, report in {page}")
    if found:
        print(text_table(table))


def answer_with(session: Session, name: str) -> Answer:
    """Responses of the model at any temperature, kept on disk under the set's name and the temperature."""

    def answer(problems: Sequence[Problem], temperature: float) -> list[list[Response]]:
        sampling, key = replace(session.sampling, temperature=temperature), f"{name}-temperature-{temperature:g}"
        return session.recorder.respond(name, problems, session.arguments.n, sampling, key=key)

    return answer


def in_random_order(session: Session, problems: Sequence[Problem]) -> list[Problem]:
    """The problems shuffled, always alike: a margin needs the first ones to stand for all."""
    order = np.random.default_rng(session.arguments.seed).permutation(len(problems))
    return [problems[i] for i in order]


def temperature_curve(session: Session) -> None:
    """Accuracy and distinct-4 against temperature, the three zones, and where to start training."""
    margin = CURVE_MARGIN if session.arguments.margin is None else session.arguments.margin
    curves = {}
    for name, problems in session.sets.items():
        problems, curve = in_random_order(session, problems), []
        for temperature in session.arguments.temperatures:
            curve.append(measure_temperature(answer_with(session, name), problems, temperature, margin))
            session.device.say(f"{name}: {describe_point(curve[-1])} of {len(problems)} problems")
        try:
            zones = asdict(find_zones(curve))
        except ValueError as error:
            zones = {"none": str(error)}
        curves[name] = {"points": [point.row() for point in curve], "zones": zones}
    if session.device.is_main:
        finish(session.arguments.out, session.arguments.model, {}, session.sets, {}, {"temperature": curves})


def describe_point(point: TemperaturePoint) -> str:
    """One temperature in a line."""
    diversity = "-" if point.distinct4 is None else f"{point.distinct4:.3f} +-{point.distinct4_half:.3f}"
    return (
        f"temperature {point.temperature:g}: accuracy {100 * point.accuracy:.1f} +-{100 * point.accuracy_half:.1f}, "
        f"distinct-4 {diversity}, from {point.problems}"
    )


def match_temperature(session: Session) -> None:
    """The first temperature, upward, that restores a diversity score."""
    margin = MATCH_MARGIN if session.arguments.margin is None else session.arguments.margin
    curves = {}
    for name, problems in session.sets.items():
        chosen, curve = match_diversity(
            answer_with(session, name), in_random_order(session, problems), session.targets[name],
            session.sampling.temperature, margin=margin, say=session.device.say,
        )  # fmt: skip
        curves[name] = {"chosen": chosen, "points": [point.row() for point in curve]}
    if session.device.is_main:
        finish(session.arguments.out, session.arguments.model, {}, session.sets, {}, {"match": curves})


def target_diversity(given: str, name: str, settings: dict) -> Diversity:
    """The score to match: a number, that of a training run, or of each problem in an earlier evaluation."""
    try:
        score = float(given)
    except ValueError:
        score = None
    if score is not None:
        if not 0 < score <= 1:
            raise DataError(f"--match {given}: a distinct-4 lies above 0 and at most at 1")
        return score
    run = Path(given)
    if (run / "settings.json").exists():
        before = read_settings(run)
        for setting in ("n", "problems", *(s for s in SAMPLING_SETTINGS if s not in ("model", "temperature", "seed"))):
            if before.get(setting) != settings[setting]:
                raise DataError(
                    f"{run} measured its diversity with another {setting} ({before.get(setting)}, not "
                    f"{settings[setting]}); measure both alike"
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


def length_curves(session: Session) -> None:
    """Accuracy against the token budget, with and without YaRN, from one sampling each."""
    most, n = session.arguments.max_tokens, session.arguments.n
    budgets = sorted({max(1, round(most * i / LENGTH_BUDGETS)) for i in range(1, LENGTH_BUDGETS + 1)})
    settings = {"no YaRN": session.plain}
    if session.arguments.yarn is not None:
        settings["YaRN"] = session.config
    curves, found, kept = defaultdict(dict), defaultdict(list), defaultdict(dict)
    for setting, config in settings.items():
        session.use(config)
        for name, problems in session.sets.items():
            before = replace(session.recorder.work)
            groups = session.recorder.respond(name, problems, n, session.sampling, budgets, key=f"{name}-{setting}")
            curve = length_curve(problems, groups, budgets, session.recorder.respondent.grader)
            curves[name][setting] = [asdict(point) for point in curve]
            kept[setting][name] = groups
            found[setting].append(summarise_session(session, name, problems, groups, before))
    if session.device.is_main:
        finish(
            session.arguments.out, session.arguments.model, dict(found), session.sets, dict(kept),
            {"length": dict(curves)},
        )  # fmt: skip


def regrade(run: Path, out: Path, workers: int, most_failed_share: float) -> None:
    """Grade the responses of an evaluation again, against the answers that it kept, and write a new evaluation."""
    settings = read_settings(run)
    if settings["curve"] or settings["match"]:
        raise DataError(f"{run} holds a curve, not an evaluation; --regrade takes a folder without --curve and --match")
    if out.exists():
        raise DataError(f"{out} exists already; give another --out")
    found, sets, regraded = [], {}, {}
    with Grader(workers, thinking=settings["thinking"]) as grader:
        for name in settings["data"]:
            problems, stored = read_groups(run, name, settings["n"])
            pairs = [(problem, response) for problem, group in zip(problems, stored, strict=True) for response in group]
            grades = iter(grader.grade([(response.text, problem.answers) for problem, response in pairs]))
            groups = [
                [replace(response, verdict=(grade := next(grades)).verdict, answer=grade.answer) for response in group]
                for group in stored
            ]
            moves = Counter(
                (old.verdict, new.verdict)
                for before, after in zip(stored, groups, strict=True)
                for old, new in zip(before, after, strict=True)
            )
            changed = ", ".join(f"{count} {a} -> {b}" for (a, b), count in sorted(moves.items()) if a != b)
            print(f"{name}: {len(pairs):,} responses graded again; {changed or 'no verdict changed'}")
            check_grader(Counter(response.verdict for group in groups for response in group), most_failed_share)
            sets[name], regraded[name] = problems, groups
            found.append(summarise(name, problems, groups, settings["temperature"], settings["trained_length"]))
    open_folder(out, settings, sets)
    for name, groups in regraded.items():
        write_responses(response_file(out, name), (response for group in groups for response in group))
    finish(out, settings["model"], {"": found}, sets, {"": regraded})


def compare_runs(a: Path, b: Path) -> None:
    """The paired difference of two evaluations, B minus A, for every set that both have."""
    settings = [read_settings(run) for run in (a, b)]
    for name in ("n", *SAMPLING_SETTINGS, "thinking", "problems"):
        if name not in ("model", "seed") and settings[0].get(name) != settings[1].get(name):
            print(f"note: {name} is {settings[0].get(name)} in {a} and {settings[1].get(name)} in {b}")
    shared = [name for name in settings[0]["data"] if name in settings[1]["data"]]
    if not shared:
        raise DataError(
            f"{a} has {', '.join(settings[0]['data'])}, {b} {', '.join(settings[1]['data'])}: none is in both"
        )
    rows = [["set", "A", "B", "B - A", "95%, paired", "up", "down", "same", "left out"]]
    for name in shared:
        means = [
            {group[0].problem_id: float(np.mean([response.correct for response in group])) for group in groups}
            for groups in (read_groups(run, name, own["n"])[1] for run, own in zip((a, b), settings, strict=True))
        ]
        if not set(means[0]) & set(means[1]):
            raise DataError(f"{name}: {a} and {b} have no problem in common")
        found = compare(name, *means)
        rows.append([
            name, f"{100 * found.avg_a:.1f}", f"{100 * found.avg_b:.1f}", f"{100 * found.difference:+.1f}",
            f"{100 * found.low:+.1f} to {100 * found.high:+.1f}", str(found.up), str(found.down), str(found.same),
            str(found.only_a + found.only_b),
        ])  # fmt: skip
    print(f"A is {a}, B is {b}; up and down count the problems that B solves more and less often than A")
    print(text_table(rows))


def main() -> None:
    """Evaluate a model, or read what evaluations have left."""
    arguments = parse_arguments()
    status: int | str = 0
    try:
        if arguments.compare:
            compare_runs(*arguments.compare)
        elif arguments.regrade:
            regrade(arguments.regrade, arguments.out, arguments.workers, arguments.most_failed_share)
        else:
            with Grader(arguments.workers, thinking=not arguments.no_thinking) as grader:
                session = start_session(arguments, grader)
                kind = arguments.curve[0] if arguments.curve else "match" if arguments.match else "plain"
                ask = {"temperature": temperature_curve, "length": length_curves, "match": match_temperature}
                ask.get(kind, plain_evaluation)(session)
    except (Interrupted, KeyboardInterrupt):
        status = 130
        if devices.speaks():
            print(f"stopped; the same command goes on, with what is in {arguments.out}")
    except Exception as error:
        expected = (ModelError, DataError, RolloutError, GraderError, MetricsError, OSError)
        status = devices.last_words(error, "eval.py", expected)
    finally:
        devices.stop()
    devices.leave(status)
