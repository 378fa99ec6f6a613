"""How hard problems are for the model in hand, and which of them to train on.

    python data_filter.py estimate MODEL DATA -n 8 --out pass-rates.jsonl    # under torchrun on many processes
    python data_filter.py filter pass-rates.jsonl DATA train.jsonl           # before training: drop the always solved
    python data_filter.py drop RUN DATA next.jsonl                           # after a stage: drop what RUN has learnt

Difficulty is relative: the pass rate of the model about to be trained, over a group of rollouts (RECIPE section 1).
Before training, the problems that it always solves are dropped (the J shape becomes its mirror image); at the end of
each stage, those that it has meanwhile learnt. train.py calls the same functions between its stages.

Each command writes a table (.txt) and a picture (.png) beside its output. An estimate that was interrupted goes on with
the same command; its file says in its first line which model, problems and sampling it is of, and takes no others.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np

import charts
import device as devices
from attempts import AttemptStats, GraderError, Respondent, check_grader, load_tokenizer, stop_tokens
from benchmarks import text_table
from device import Interrupted, StopRequest
from model import ModelError, load, resolve_folder, tokenizer_folder
from problems import INSTRUCTION, DataError, Problem, read_problems, write_problems
from report import format_eta, write_atomically
from reward import Grader
from rollout import RolloutError, Sampling, check_requests

GROUP_SIZE = 8  # the recipe's rollouts of a problem
ESTIMATE_DRAW = -2  # the place that estimates sample from, which is no training step's
ESTIMATE_SLICE = 512  # problems whose pass rates are estimated, and saved, at a time
BEFORE_STAGE = -0.5  # an estimate before stage k is filed between the visits of stages k - 1 and k

# ---- the history of pass rates -------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """One group of rollouts of one problem, as it was graded."""

    problem_id: str
    stage: float  # k - 0.5: the estimate before stage k
    step: int
    rewards: tuple[float, ...]  # the originals, before rescue and substitution (RECIPE section 1)
    tokens: int = 0  # generated, by all rollouts together


class History:
    """Every visit to every problem. A visit of the same problem, stage and step replaces the earlier
    one, so that steps replayed after a resume are not counted twice."""

    def __init__(self):
        self.by_problem: dict[str, dict[tuple[int, int], Visit]] = {}
        self.log: list[Visit] = []
        self.written: dict[Path, int] = {}  # how much of the log each file holds
        self.lines_dropped = 0
        self.settings: dict | None = None  # the first line of its file: which model, problems and sampling it is of

    def append(self, visit: Visit) -> None:
        if not visit.rewards:
            raise DataError(f"the visit to {visit.problem_id} at step {visit.step} has no rewards; grade it first.")
        self.by_problem.setdefault(visit.problem_id, {})[visit.stage, visit.step] = visit
        self.log.append(visit)

    def visits(self, problem_id: str) -> list[Visit]:
        return [visit for _, visit in sorted(self.by_problem.get(problem_id, {}).items())]

    def pass_rate(self, problem_id: str, since_stage: int | None = None) -> float | None:
        """Mean reward over all rollouts since the stage (default: ever), or None if it was not visited."""
        return mean_reward(v for v in self.visits(problem_id) if since_stage is None or v.stage >= since_stage)

    def estimate(self, problem_id: str, stage: int | None = None) -> float | None:
        """Mean reward within the last stage, up to the given one, that visited the problem, or None."""
        visits = [v for v in self.visits(problem_id) if stage is None or v.stage <= stage]
        return mean_reward(v for v in visits if v.stage == visits[-1].stage)

    def response_tokens(self, problem_id: str) -> float | None:
        """The mean length of its newest responses, or None if it was never visited."""
        visits = self.visits(problem_id)
        return visits[-1].tokens / len(visits[-1].rewards) if visits else None

    def state_dict(self) -> dict:
        """JSON-able, for checkpoints."""
        rows = [v for visits in self.by_problem.values() for v in visits.values()]
        return {"visits": [[v.problem_id, v.stage, v.step, list(v.rewards), v.tokens] for v in rows]}

    def load_state_dict(self, state: dict) -> None:
        self.by_problem, self.log, self.written = {}, [], {}
        for problem_id, stage, step, rewards, tokens in state["visits"]:
            self.append(Visit(problem_id, stage, step, tuple(rewards), tokens))

    def save(self, path: str | Path) -> None:
        """Appends to a JSONL file the visits that it does not hold yet, one per line below the settings, if any."""
        path = Path(path).resolve()
        new = self.log[self.written.get(path, 0) :]
        if path not in self.written and path.exists():
            held = set(History.load(path).log)
            new = [visit for visit in new if visit not in held]
            with open(path, "rb+") as file:  # what was cut off must not run into what follows
                file.truncate(file.read().rfind(b"\n") + 1)
        with open(path, "a", encoding="utf-8") as file:
            if self.settings is not None and file.tell() == 0:
                file.write(json.dumps({"settings": self.settings}) + "\n")
            file.writelines(json.dumps(asdict(visit)) + "\n" for visit in new)
        self.written[path] = len(self.log)

    @classmethod
    def load(cls, path: str | Path) -> "History":
        """What save wrote. A last line that was cut off is left out and counted in lines_dropped. Raises DataError."""
        history = cls()
        if not Path(path).is_file():
            raise DataError(f"{path} does not exist, so there are no pass rates to read; estimate them first.")
        *lines, rest = Path(path).read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if number == 1 and isinstance(row, dict) and "settings" in row:
                    history.settings = dict(row["settings"])
                    continue
                history.append(visit_of(row))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                reason = f"{type(error).__name__}: {str(error)[:200]}"
                raise DataError(f"{path}, row {number} is no visit ({reason}); mend or remove that line.") from error
        if rest:
            history.lines_dropped = 1
            print(f"{path}: left out a half-written last line (row {len(lines) + 1})", file=sys.stderr)
        return history


def visit_of(row: dict) -> Visit:
    """A line of a history's file as a Visit; ValueError, KeyError or TypeError where it is none."""
    problem_id, stage, step, rewards, tokens = (row[f.name] for f in fields(Visit))
    numbers = [stage, step, tokens, *rewards]
    if not isinstance(problem_id, str) or isinstance(rewards, str) or {*map(type, numbers)} - {int, float}:
        raise TypeError("a value of the wrong type")
    problem_id.encode()  # half of a surrogate pair is a ValueError
    if (
        not rewards
        or type(step) is not int
        or type(tokens) is not int
        or tokens < 0
        or not abs(stage) < math.inf
        or not all(0 <= reward <= 1 for reward in rewards)
    ):
        raise ValueError("no rewards, or a number out of range")
    return Visit(problem_id, stage, step, tuple(rewards), tokens)


def mean_reward(visits: Iterable[Visit]) -> float | None:
    """Mean over all rollouts of these visits, or None without any."""
    rewards = [reward for visit in visits for reward in visit.rewards]
    return sum(rewards) / len(rewards) if rewards else None


# ---- estimating them -----------------------------------------------------------------------------


def estimate(
    respondent: Respondent,
    problems: Sequence[Problem],
    n: int,
    sampling: Sampling,
    path: Path,
    weights: str,
    stage: float = BEFORE_STAGE,
    step: int = 0,
) -> History:
    """The pass rate over n rollouts of every problem, one line of `path` each; what is there is not sampled again.

    `weights` is the model's fingerprint; stage and step are those under which the visits are filed. Every process calls
    it and gets the same. Raises Interrupted when asked to stop, with every problem that was finished saved; DataError
    for a file of another model, other problems or other sampling; GraderError when the grader fails often.
    """
    device = respondent.device
    settings = {
        "weights": weights,
        "problems": problems_fingerprint(problems),
        "n": n,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "instruction": respondent.instruction,
        "thinking": respondent.grader.thinking,
        "seed": sampling.seed,
    }
    known = History.load(path) if path.exists() else History()
    if known.settings is None and not known.log:
        known.settings = settings
    require_settings(known, path, settings)
    left, begun = [problem for problem in problems if not known.visits(problem.id)], time.perf_counter()
    device.share(None)  # everybody has read
    if device.is_main and left:
        known.save(path)  # a file that cannot be written is no surprise for later
    if left and len(left) < len(problems):
        device.say(f"pass rates: {len(problems) - len(left):,} problems are in {path} already")
    for start in range(0, len(left), ESTIMATE_SLICE):
        part = left[start : start + ESTIMATE_SLICE]
        share = part[device.rank :: device.ranks]
        prompts = [respondent.prompt(problem, n) for problem in share]
        label = f"pass rates, slice {start // ESTIMATE_SLICE + 1} of {math.ceil(len(left) / ESTIMATE_SLICE)}"
        mine: dict[str, dict[int, tuple[float, int]]] = defaultdict(dict)  # reward and tokens of each rollout
        verdicts = Counter()
        for attempt in respondent.stream(share, prompts, sampling, AttemptStats(), label):
            mine[attempt.rollout.problem_id][attempt.rollout.index] = attempt.grade.correct, len(attempt.rollout.tokens)
            verdicts[attempt.grade.verdict] += 1
        everyone = device.gather((mine, verdicts, respondent.asked_to_stop()))
        check_grader(sum((own for _, own, _ in everyone), Counter()), respondent.most_failed_share)
        groups = {problem_id: group for own, _, _ in everyone for problem_id, group in own.items()}
        for problem in part:
            group = groups.get(problem.id, {})
            if len(group) == n:  # an interruption leaves some unfinished
                rewards, tokens = zip(*(group[i] for i in range(n)), strict=True)
                known.append(Visit(problem.id, stage, step, rewards, sum(tokens)))
        if device.is_main:
            known.save(path)
        if any(stopped for _, _, stopped in everyone):
            raise Interrupted
        done = start + len(part)
        speed = done / (time.perf_counter() - begun)
        device.say(
            f"pass rates: {len(problems) - len(left) + done:,}/{len(problems):,} problems  "
            f"{charts.format_number(60 * speed)} a minute  ETA {format_eta((len(left) - done) / speed)}"
        )
    if device.is_main and [visit.problem_id for visit in known.log] != [problem.id for problem in problems]:
        whole, temporary = History(), path.with_name(f".{path.name}.{os.getpid()}")  # as if nothing had interrupted it
        whole.settings = settings
        for problem in problems:
            for visit in known.visits(problem.id):
                whole.append(visit)
        whole.save(temporary)
        temporary.replace(path)
    return known


def problems_fingerprint(problems: Iterable[Problem]) -> str:
    """A hash of what decides the pass rates of problems, whatever their order: ids, texts and answers."""
    rows = sorted((problem.id, problem.text, *problem.answers) for problem in problems)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def require_settings(history: History, path: Path, wanted: dict) -> None:
    """Raises DataError unless the file that a history comes from was made with these settings."""
    if history.settings is None:
        raise DataError(
            f"{path} does not say in its first line which model and problems its pass rates are of; move it away and "
            f"estimate them again."
        )
    for name, value in wanted.items():
        held = history.settings.get(name)
        if held != value:
            what = {"weights": "of another model", "problems": "of other problems"}.get(name)
            raise DataError(
                f"{path} holds pass rates {what or f'with {name} = {held}, not {value}'}; give the file that belongs "
                f"to them, or a new name to estimate again."
            )


# ---- the shape of the data -----------------------------------------------------------------------


def histogram(rates: Iterable[float], group_size: int = GROUP_SIZE) -> list[int]:
    """How many problems are solved 0, 1, ... group_size times in group_size (to the nearest)."""
    counts = [0] * (group_size + 1)
    for rate in rates:
        counts[math.floor(rate * group_size + 0.5)] += 1
    return counts


def verdict(counts: list[int]) -> str:
    """The histogram's shape in a word: training wants "mirrored J" (RECIPE section 1).

    "too hard": more than half of the problems are never solved; "J" / "mirrored J": at least half lie
    on the easy / hard side of the middle; "U": two thirds lie at the two ends; else "level".
    """
    total, half = sum(counts), len(counts) // 2
    if total == 0:
        return "empty"
    if counts[0] > total / 2:
        return "too hard"
    if sum(counts[-half:]) >= total / 2:
        return "J"
    if counts[0] + counts[-1] >= total * 2 / 3:
        return "U"
    return "mirrored J" if sum(counts[:half]) >= total / 2 else "level"


def zero_variance_share(rates: Iterable[float], group_size: int = GROUP_SIZE) -> float:
    """Expected share of groups whose rewards are all equal and teach nothing: the mean of p^G + (1 - p)^G."""
    p = np.asarray(list(rates), dtype=float)
    return float(np.mean(p**group_size + (1 - p) ** group_size)) if p.size else 0.0


def draw_histogram(before: list[int], after: list[int] | None = None, width: int = 28) -> str:
    """One histogram, or two side by side, as text for the console."""
    shapes = {"problems": before} if after is None else {"before": before, "after": after}
    most = max(1, *(max(counts) for counts in shapes.values()))
    rows = [("solved", [f" {name} ({verdict(counts)})" for name, counts in shapes.items()])]
    for solved, columns in enumerate(zip(*shapes.values(), strict=True)):
        bars = [f"{count:>7} {'#' * math.ceil(count * width / most)}" for count in columns]
        rows.append((f"{solved}/{len(before) - 1}", bars))
    rows.append(("all", [f"{sum(counts):>7}" for counts in shapes.values()]))
    return "\n".join(f"{head:>6} {''.join(f'{cell:<{width + 9}}' for cell in cells)}".rstrip() for head, cells in rows)


# ---- the filter before training, and the drop after each stage -----------------------------------


@dataclass(frozen=True)
class Filtered:
    """What a filter kept and dropped, with the histograms before and after."""

    kept: list[Problem]
    dropped: list[Problem]
    before: list[int]  # histograms of pass rates; problems without any estimate are in neither
    after: list[int]
    rates: dict[str, float | None]  # by problem id; None is a problem without any estimate

    def known_rates(self, problems: Sequence[Problem]) -> list[float]:
        """The pass rates of some of its problems, those without any estimate left out."""
        return [rate for problem in problems if (rate := self.rates[problem.id]) is not None]


def filter_mirrored_j(
    problems: list[Problem],
    history: History,
    drop_at: float = 1.0,
    keep_above: float = 0.0,
    max_unsolved_share: float | None = None,
    seed: int = 0,
    group_size: int = GROUP_SIZE,
) -> Filtered:
    """Drops the problems that the model always solves and keeps the rest, 0/8 too (RECIPE section 1).

    Kept: keep_above <= pass rate < drop_at, by the latest estimate. max_unsolved_share: at most this
    share of what is kept may be unsolved; a random part, set by the seed, of the unsolved is kept.
    Raises DataError if a problem has no estimate.
    """
    rates = {p.id: history.estimate(p.id) for p in problems}
    missing = [problem_id for problem_id, rate in rates.items() if rate is None]
    if missing:
        raise DataError(
            f"{len(missing)} problems have no pass rate (first: {missing[0]}); estimate them before filtering."
        )
    keep = {problem_id for problem_id, rate in rates.items() if keep_above <= rate < drop_at}
    if max_unsolved_share is not None and max_unsolved_share < 1:
        unsolved = sorted(problem_id for problem_id in keep if rates[problem_id] == 0)
        solved = len(keep) - len(unsolved)
        room = math.floor(solved * max_unsolved_share / (1 - max_unsolved_share) + 1e-9)
        keep -= {unsolved[i] for i in np.random.default_rng(seed).permutation(len(unsolved))[room:]}
    return split_by(problems, keep, rates, group_size)


def drop_easy(
    problems: list[Problem],
    history: History,
    stage: int,
    threshold: float = 0.9,
    window: str = "stage",
    group_size: int = GROUP_SIZE,
) -> Filtered:
    """Drops the problems whose accuracy is above the threshold, at the end of a stage (RECIPE section 1).

    window: "stage" looks at the visits within the stage just ended (a problem not visited in it keeps
    its earlier estimate), "all" at every visit ever. A problem never visited is kept.
    """
    if window not in ("stage", "all"):
        raise DataError(f'the window of the drop is {window!r}; it must be "stage" or "all".')
    rates = {p.id: history.estimate(p.id, stage) if window == "stage" else history.pass_rate(p.id) for p in problems}
    keep = {problem_id for problem_id, rate in rates.items() if rate is None or rate <= threshold}
    return split_by(problems, keep, rates, group_size)


def split_by(problems: list[Problem], keep: set[str], rates: dict[str, float | None], group_size: int) -> Filtered:
    """Divide problems by id, with both histograms of their pass rates."""
    kept, dropped = [p for p in problems if p.id in keep], [p for p in problems if p.id not in keep]
    before, after = ([rates[p.id] for p in some if rates[p.id] is not None] for some in (problems, kept))
    return Filtered(kept, dropped, histogram(before, group_size), histogram(after, group_size), rates)


def require_batch(filtered: Filtered, batch_size: int) -> None:
    """Raises DataError, with the histograms, if what is left cannot fill a batch."""
    if len(filtered.kept) < batch_size:
        total = len(filtered.kept) + len(filtered.dropped)
        raise DataError(
            f"{len(filtered.kept)} of {total} problems are left, fewer than a batch of {batch_size}; lower the "
            f"batch size, drop fewer or add harder problems.\n{draw_histogram(filtered.before, filtered.after)}"
        )


# ---- the order of training -----------------------------------------------------------------------


class DataOrder:
    """Endless epochs over the problems, each a permutation drawn from (seed, stage, epoch).

    The position (problems handed out so far) is the only state. Any batch_size problems in a row are all
    different, across epochs too; so the seams between epochs depend on the batch size.
    """

    def __init__(self, problems: list[Problem], batch_size: int, seed: int, stage: int):
        self.problems = sorted(problems, key=lambda p: p.id)
        self.batch_size, self.seed, self.stage = batch_size, seed, stage
        self.epochs: list[list[int]] = []
        twins = [a.id for a, b in pairwise(self.problems) if a.id == b.id]
        if twins:
            raise DataError(f"several problems have the id {twins[0]}; give each problem its own.")
        if len(problems) < batch_size:
            short = f"{len(problems)} problems cannot fill a batch of {batch_size}"
            raise DataError(f"{short}; lower the batch size or add problems.")

    def batch(self, position: int) -> list[Problem]:
        places = range(position, position + self.batch_size)
        size = len(self.problems)
        return [self.problems[self.order(place // size)[place % size]] for place in places]

    def order(self, epoch: int) -> list[int]:
        while len(self.epochs) <= epoch:
            key = [self.seed, self.stage, len(self.epochs)]
            drawn = np.random.Generator(np.random.PCG64(key)).permutation(len(self.problems)).tolist()
            last = self.epochs[-1][1 - self.batch_size :] if self.epochs and self.batch_size > 1 else []
            # what ended the last epoch waits until it is a batch ago
            for slot in range(len(last)):
                barred = set(last[slot:])
                pick = next(i for i in range(slot, len(drawn)) if drawn[i] not in barred)
                drawn.insert(slot, drawn.pop(pick))
            self.epochs.append(drawn)
        return self.epochs[epoch]


# ---- the command line ----------------------------------------------------------------------------

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
    from eval import cache_limits, fingerprint  # a room above this one

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
        history = estimate(respondent, problems, arguments.n, sampling, arguments.out, fingerprint(folder))
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
    from checkpoint import CheckpointError, read_state  # rooms above this one
    from recipe import RecipeError, RlStage, load_recipe

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


if __name__ == "__main__":
    main()
