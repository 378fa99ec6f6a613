"""How hard problems are for the model in hand, and which of them to train on.

Difficulty is relative: the pass rate of the model about to be trained, over a group of rollouts
(RECIPE section 1). Before training, the problems that it always solves are dropped (the J shape
becomes its mirror image); at the end of each stage, those that it has meanwhile learnt. All of it
is pure functions of problems and their history, but for the file that the history is kept in.
"""

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from problems import DataError, Problem

# ---- the history of pass rates -------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """One group of rollouts of one problem, as it was graded."""

    problem_id: str
    stage: float  # k - 0.5: the estimate before stage k
    step: int
    rewards: tuple[float, ...]  # the originals, before rescue and substitution (RECIPE section 1)


class History:
    """Every visit to every problem. A visit of the same problem, stage and step replaces the earlier
    one, so that steps replayed after a resume are not counted twice."""

    def __init__(self):
        self.by_problem: dict[str, dict[tuple[int, int], Visit]] = {}
        self.log: list[Visit] = []
        self.written: dict[Path, int] = {}  # how much of the log each file holds
        self.lines_dropped = 0

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

    def state_dict(self) -> dict:
        """JSON-able, for checkpoints."""
        rows = [v for visits in self.by_problem.values() for v in visits.values()]
        return {"visits": [[v.problem_id, v.stage, v.step, list(v.rewards)] for v in rows]}

    def load_state_dict(self, state: dict) -> None:
        self.by_problem, self.log, self.written = {}, [], {}
        for problem_id, stage, step, rewards in state["visits"]:
            self.append(Visit(problem_id, stage, step, tuple(rewards)))

    def save(self, path: str | Path) -> None:
        """Appends to a JSONL file the visits that it does not hold yet, one per line."""
        path = Path(path).resolve()
        new = self.log[self.written.get(path, 0) :]
        if path not in self.written and path.exists():
            held = set(History.load(path).log)
            new = [visit for visit in new if visit not in held]
            with open(path, "rb+") as file:  # what was cut off must not run into what follows
                file.truncate(file.read().rfind(b"\n") + 1)
        with open(path, "a", encoding="utf-8") as file:
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
                history.append(visit_of(json.loads(line)))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                reason = f"{type(error).__name__}: {str(error)[:200]}"
                raise DataError(f"{path}, row {number} is no visit ({reason}); mend or remove that line.") from error
        if rest:
            history.lines_dropped = 1
            print(f"{path}: left out a half-written last line (row {len(lines) + 1})", file=sys.stderr)
        return history


def visit_of(row: dict) -> Visit:
    """A line of a history's file as a Visit; ValueError, KeyError or TypeError where it is none."""
    problem_id, stage, step, rewards = (row[key] for key in ("problem_id", "stage", "step", "rewards"))
    numbers = [stage, step, *rewards]
    if not isinstance(problem_id, str) or isinstance(rewards, str) or {*map(type, numbers)} - {int, float}:
        raise TypeError("a value of the wrong type")
    problem_id.encode()  # half of a surrogate pair is a ValueError
    if (
        not rewards
        or type(step) is not int
        or not abs(stage) < math.inf
        or not all(0 <= reward <= 1 for reward in rewards)
    ):
        raise ValueError("no rewards, or a stage, a step or a reward out of range")
    return Visit(problem_id, stage, step, tuple(rewards))


def mean_reward(visits: Iterable[Visit]) -> float | None:
    """Mean over all rollouts of these visits, or None without any."""
    rewards = [reward for visit in visits for reward in visit.rewards]
    return sum(rewards) / len(rewards) if rewards else None


# ---- the shape of the data -----------------------------------------------------------------------


def histogram(rates: Iterable[float], group_size: int = 8) -> list[int]:
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


def zero_variance_share(rates: Iterable[float], group_size: int = 8) -> float:
    """Expected share of groups whose rewards are all equal and teach nothing: the mean of p^G + (1 - p)^G."""
    p = np.asarray(list(rates), dtype=float)
    return float(np.mean(p**group_size + (1 - p) ** group_size)) if p.size else 0.0


def draw_histogram(before: list[int], after: list[int], width: int = 28) -> str:
    """Both histograms side by side, as text for the console."""
    group_size, most = len(before) - 1, max(*before, *after, 1)
    lines = [f"solved  {f'before ({verdict(before)})':<{width + 9}}after ({verdict(after)})"]
    for solved, counts in enumerate(zip(before, after, strict=True)):
        bars = [f"{count:>7} {'#' * math.ceil(count * width / most)}" for count in counts]
        lines.append(f"{f'{solved}/{group_size}':>6} {bars[0]:<{width + 9}}{bars[1]}".rstrip())
    return "\n".join(lines + [f"{'all':>6} {sum(before):>7} {'':<{width + 1}}{sum(after):>7}"])


# ---- the filter before training, and the drop after each stage -----------------------------------


@dataclass(frozen=True)
class Filtered:
    """What a filter kept and dropped, with the histograms before and after."""

    kept: list[Problem]
    dropped: list[Problem]
    before: list[int]  # histograms of pass rates; problems without any estimate are in neither
    after: list[int]


def filter_mirrored_j(
    problems: list[Problem],
    history: History,
    drop_at: float = 1.0,
    keep_above: float = 0.0,
    max_unsolved_share: float | None = None,
    seed: int = 0,
    group_size: int = 8,
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
    group_size: int = 8,
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
    return Filtered(kept, dropped, histogram(before, group_size), histogram(after, group_size))


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
