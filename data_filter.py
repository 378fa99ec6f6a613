"""Estimate how hard problems are for the current model, and choose which of them to train on.

    python data_filter.py estimate MODEL DATA -n 8 --out pass-rates.jsonl    # under torchrun for several processes
    python data_filter.py filter pass-rates.jsonl DATA train.jsonl           # before training: drop the always solved
    python data_filter.py drop RUN DATA next.jsonl                           # after a stage: drop what RUN has learned

Difficulty is relative: the pass rate of the model about to be trained, over a group of rollouts (RECIPE section 1).
Before training, problems that it always solves are dropped (the J shape becomes its mirror image); after each stage,
those that it has learned. train.py calls the same functions between its stages.

Each command also writes a table (.txt) and a chart (.png) next to its output. The same command resumes an interrupted
estimate; the first line of its file records the model, problems and sampling settings, and no others are accepted.
"""

if __name__ == "__main__":  # answer --help and usage errors before importing torch
    from engine.terminal import prepare_terminal

    prepare_terminal()
    from lab.options import difficulty_arguments

    ARGUMENTS = difficulty_arguments(__doc__)

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np

from engine.distributed import Interrupted
from engine.files import read_jsonl, write_atomically
from engine.fingerprint import data_identity, require_same
from engine.rollout_worker import Attempt, RolloutWorker
from lab.data_files import DataError
from lab.problems import Problem
from rollout import Sampling

GROUP_SIZE = 8  # the recipe's rollouts per problem
ESTIMATE_DRAW = -2  # the draw number of estimates; training steps count from 0
ESTIMATE_SLICE = 512  # problems sampled between two saves
Rule = Callable[[np.ndarray], np.ndarray]  # pass rates (P,) -> whether each problem is kept, bool (P,)
BEFORE_STAGE = -0.5  # relative to stage k: an estimate sorts between the visits of stages k - 1 and k

# ---- the history of pass rates -------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """One graded group of rollouts of one problem."""

    problem_id: str
    stage: float  # k - 0.5: the estimate before stage k
    step: int
    rewards: tuple[float, ...]  # before rescue and substitution (RECIPE section 1)
    tokens: int = 0  # generated, over all rollouts
    lengths: tuple[int, ...] = ()  # of each rollout; empty if unknown


class History:
    """All visits. A visit replaces an earlier one of the same problem, stage and step, so that steps replayed after a
    resume are not counted twice."""

    def __init__(self):
        self.by_problem: dict[str, dict[tuple[float, int], Visit]] = {}
        self.settings: dict | None = None  # first line of an estimate's file: its model, problems and sampling

    @property
    def log(self) -> list[Visit]:
        """All visits, problem by problem."""
        return [visit for visits in self.by_problem.values() for visit in visits.values()]

    def append(self, visit: Visit) -> None:
        if not visit.rewards:
            raise DataError(f"the visit to {visit.problem_id} at step {visit.step} has no rewards; grade it first.")
        self.by_problem.setdefault(visit.problem_id, {})[visit.stage, visit.step] = visit

    def visits(self, problem_id: str) -> list[Visit]:
        return [visit for _, visit in sorted(self.by_problem.get(problem_id, {}).items())]

    def pass_rate(self, problem_id: str) -> float | None:
        """Return the mean reward over all rollouts, or None without a visit."""
        return mean_reward(self.visits(problem_id))

    def estimate(self, problem_id: str, stage: int | None = None) -> float | None:
        """Return the mean reward within the last stage (up to the given one) that visited the problem, or None."""
        visits = [v for v in self.visits(problem_id) if stage is None or v.stage <= stage]
        return mean_reward(v for v in visits if v.stage == visits[-1].stage)

    def response_tokens(self, problem_id: str, stage: int, step: int) -> float | None:
        """Return the mean response length of the latest visit before a step, which may be repeated; None without."""
        visits = [visit for visit in self.visits(problem_id) if (visit.stage, visit.step) < (stage, step)]
        return visits[-1].tokens / len(visits[-1].rewards) if visits else None

    def state_dict(self) -> dict:
        """Return the visits as JSON values, for checkpoints."""
        rows = [[v.problem_id, v.stage, v.step, list(v.rewards), v.tokens, list(v.lengths)] for v in self.log]
        return {"visits": rows}

    def load_state_dict(self, state: dict) -> None:
        self.by_problem = {}
        for problem_id, stage, step, rewards, tokens, lengths in state["visits"]:
            self.append(Visit(problem_id, stage, step, tuple(rewards), tokens, tuple(lengths)))

    def save(self, path: str | Path) -> None:
        """Write JSON lines atomically: the settings, if any, then one visit per line."""
        rows = [{"settings": self.settings}] if self.settings is not None else []
        rows += [asdict(visit) for visit in self.log]
        write_atomically(Path(path), (f"{json.dumps(row)}\n".encode() for row in rows))

    @classmethod
    def load(cls, path: str | Path) -> "History":
        """Read what `save` wrote. Raises DataError for a missing file or a line that is not a visit."""
        path, history = Path(path), cls()
        if not path.is_file():
            raise DataError(f"{path} does not exist, so there are no pass rates to read; estimate them first.")
        try:
            for number, _, row in read_jsonl(path):
                if number == 1 and isinstance(row, dict) and isinstance(row.get("settings"), dict):
                    history.settings = row["settings"]
                elif (visit := visit_of(row)) is None:
                    raise ValueError(f"{path}, row {number} is not a visit: problem_id, stage, step, rewards, tokens")
                else:
                    history.append(visit)
        except ValueError as error:
            raise DataError(f"{error}; fix or remove that line") from None
        return history


def visit_of(row: object) -> Visit | None:
    """Return the Visit in one line of a history file, or None if it is not one."""
    match row:
        case {"problem_id": str(), "stage": stage, "step": int(), "rewards": [_, *_] as rewards, "tokens": int(tokens)}:
            numbers = {*map(type, [stage, row["step"], tokens, *rewards])} <= {int, float}  # bool is an int to `match`
            whole = isinstance(lengths := row.get("lengths", []), list) and {*map(type, lengths)} <= {int}
            numbers = numbers and whole and min(lengths, default=0) >= 0
            if numbers and abs(stage) < math.inf and tokens >= 0 and all(0 <= reward <= 1 for reward in rewards):
                return Visit(row["problem_id"], stage, row["step"], tuple(rewards), tokens, tuple(lengths))
    return None


def mean_reward(visits: Iterable[Visit]) -> float | None:
    """Return the mean over all rollouts of these visits, or None without any."""
    rewards = [reward for visit in visits for reward in visit.rewards]
    return sum(rewards) / len(rewards) if rewards else None


# ---- estimating pass rates -----------------------------------------------------------------------


def estimate(
    worker: RolloutWorker,
    problems: Sequence[Problem],
    n: int,
    sampling: Sampling,
    path: Path,
    identity: dict[str, str],
    stage: float = BEFORE_STAGE,
    step: int = 0,
    restart: bool = False,
) -> History:
    """Estimate every problem's pass rate over n rollouts; problems that `path` holds already are not sampled again.

    `identity` is of the model and its prompts; visits are recorded under `stage` and `step`. Every process calls this
    and gets the same history. `restart` replaces a file of other settings, which is a DataError otherwise. Raises
    Interrupted on a stop request, after saving the finished problems; GraderError when grading often fails.
    """
    processes = worker.processes
    settings = {
        "n": n,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "instruction": worker.instruction,
        "thinking": worker.grader.thinking,
        "seed": sampling.seed,
        "identity": identity | {"problems": problems_fingerprint(problems)},
    }
    known = History.load(path) if path.exists() else History()
    if restart and known.settings not in (None, settings):
        known = History()
    if known.settings is None and not known.by_problem:
        known.settings = settings
    require_same(path, known.settings, settings)
    left, begun = [problem for problem in problems if problem.id not in known.by_problem], time.perf_counter()
    processes.all_gather(None)  # every process has read the file before the main process replaces it
    if processes.is_main and left:
        known.save(path)  # fail before sampling if the file cannot be written
    if left and len(left) < len(problems):
        processes.say(f"pass rates: {len(problems) - len(left):,} problems are in {path} already")

    def keep(attempt: Attempt) -> tuple[str, int, float, int]:
        rollout = attempt.rollout
        return rollout.problem_id, rollout.index, float(attempt.grade.right), len(rollout.tokens)

    for start in range(0, len(left), ESTIMATE_SLICE):
        part = left[start : start + ESTIMATE_SLICE]
        prompts = [worker.prompt(problem, n) for problem in part]
        label = f"pass rates, slice {start // ESTIMATE_SLICE + 1} of {math.ceil(len(left) / ESTIMATE_SLICE)}"
        mine, _, stopped = worker.sample(part, prompts, sampling, keep, label)
        groups = defaultdict(list)  # problem id -> [reward, tokens] of each rollout, in order
        for problem_id, _, *rollout in sorted(kept for own in processes.all_gather(mine) for kept in own):
            groups[problem_id].append(rollout)
        for problem in part:
            if len(groups[problem.id]) == n:  # a stop request leaves some incomplete
                rewards, tokens = zip(*groups[problem.id], strict=True)
                known.append(Visit(problem.id, stage, step, rewards, sum(tokens), tokens))
        if processes.is_main:
            known.save(path)
        if stopped:
            raise Interrupted
        done, seconds = start + len(part), time.perf_counter() - begun
        eta = timedelta(seconds=round(seconds * (len(left) - done) / done))
        processes.say(f"pass rates: {len(problems) - len(left) + done:,}/{len(problems):,} problems  ETA {eta}")
    in_order = {problem.id: known.by_problem[problem.id] for problem in problems}
    if list(known.by_problem) != list(in_order):  # an interrupted estimate ends with the same file as any other
        known.by_problem = in_order
        if processes.is_main:
            known.save(path)
    return known


def problems_fingerprint(problems: Iterable[Problem]) -> str:
    """Hash what decides the pass rates of problems, in any order: ids, texts, answers, and rows where they are kept."""
    bare = [replace(problem, type="", difficulty=None, solution="") for problem in problems]
    return data_identity(sorted(bare, key=lambda problem: problem.id))


# ---- the shape of the data -----------------------------------------------------------------------


def histogram(rates: Iterable[float], group_size: int = GROUP_SIZE) -> list[int]:
    """Count the problems solved 0, 1, ... group_size times in group_size (rounded to the nearest)."""
    counts = [0] * (group_size + 1)
    for rate in rates:
        counts[math.floor(rate * group_size + 0.5)] += 1
    return counts


def verdict(counts: list[int]) -> str:
    """Name the histogram's shape; training wants "mirrored J" (RECIPE section 1).

    "too hard": more than half of the problems are never solved; "J" / "mirrored J": at least half are
    on the easy / hard side of the middle; "U": two thirds are at the two ends; else "level".
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


def draw_histogram(before: list[int], after: list[int] | None = None, width: int = 28) -> str:
    """Draw one histogram, or two side by side, as text."""
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
    """The problems that a filter kept and dropped, with the histograms before and after."""

    kept: list[Problem]
    dropped: list[Problem]
    before: list[int]  # histograms of the known pass rates
    after: list[int]
    rates: dict[str, float | None]  # by problem id; None: no estimate

    def known_rates(self, problems: Sequence[Problem]) -> list[float]:
        """Return the pass rates of some of its problems, without those that have no estimate."""
        return [rate for problem in problems if (rate := self.rates[problem.id]) is not None]


def filter_mirrored_j(
    problems: list[Problem],
    history: History,
    drop_at: float | Rule = 1.0,
    keep_above: float = 0.0,
    max_unsolved_share: float | None = None,
    seed: int = 0,
    group_size: int = GROUP_SIZE,
) -> Filtered:
    """Drop the problems that the model always solves and keep the rest, 0/8 too (RECIPE section 1).

    Kept: keep_above <= pass rate < drop_at, by the latest estimate. max_unsolved_share: the largest share of the kept
    problems that may be unsolved; the seed selects which stay. A rule as drop_at replaces both bounds.
    Raises DataError if a problem has no estimate.
    """
    rates = {p.id: history.estimate(p.id) for p in problems}
    if missing := [problem_id for problem_id, rate in rates.items() if rate is None]:
        raise DataError(f"{len(missing)} problems have no pass rate (first: {missing[0]}); estimate them first.")
    keep = kept_by(drop_at if callable(drop_at) else lambda rates: (keep_above <= rates) & (rates < drop_at), rates)
    if max_unsolved_share is not None and max_unsolved_share < 1:
        unsolved = sorted(problem_id for problem_id in keep if rates[problem_id] == 0)
        solved = len(keep) - len(unsolved)
        allowed = math.floor(solved * max_unsolved_share / (1 - max_unsolved_share) + 1e-9)
        keep -= {unsolved[i] for i in np.random.default_rng(seed).permutation(len(unsolved))[allowed:]}
    return split_by(problems, keep, rates, group_size)


def drop_easy(
    problems: list[Problem],
    history: History,
    stage: int,
    threshold: float | Rule = 0.9,
    window: str = "stage",
    group_size: int = GROUP_SIZE,
) -> Filtered:
    """Drop the problems whose accuracy is above the threshold, at the end of a stage (RECIPE section 1), or by a rule.

    window: "stage" counts the visits of the stage just ended (a problem not visited in it keeps its earlier estimate),
    "all" counts all visits. A problem never visited is kept.
    """
    if window not in ("stage", "all"):
        raise DataError(f'the window of the drop is {window!r}; it must be "stage" or "all".')
    rates = {p.id: history.estimate(p.id, stage) if window == "stage" else history.pass_rate(p.id) for p in problems}
    keep = kept_by(threshold if callable(threshold) else lambda rates: rates <= threshold, rates)
    return split_by(problems, keep, rates, group_size)


def kept_by(rule: Rule, rates: dict[str, float | None]) -> set[str]:
    """Return the ids of the problems that a rule keeps; those without a pass rate stay."""
    known = {problem_id: rate for problem_id, rate in rates.items() if rate is not None}
    kept = rule(np.array(list(known.values()), dtype=float))
    return rates.keys() - {problem_id for problem_id, stays in zip(known, kept, strict=True) if not stays}


def split_by(problems: list[Problem], keep: set[str], rates: dict[str, float | None], group_size: int) -> Filtered:
    """Split problems into the ids to keep and the others, with both histograms of their pass rates."""
    kept, dropped = [p for p in problems if p.id in keep], [p for p in problems if p.id not in keep]
    before, after = ([rates[p.id] for p in some if rates[p.id] is not None] for some in (problems, kept))
    return Filtered(kept, dropped, histogram(before, group_size), histogram(after, group_size), rates)


def require_batch(filtered: Filtered, batch_size: int) -> None:
    """Raise DataError, with the histograms, if the kept problems cannot fill a batch."""
    if len(filtered.kept) < batch_size:
        left = f"{len(filtered.kept)} of {len(filtered.rates)} problems are left"
        raise DataError(
            f"{left}, fewer than a batch of {batch_size}; lower the batch size, drop fewer or add harder problems.\n"
            f"{draw_histogram(filtered.before, filtered.after)}"
        )


# ---- the order of training -----------------------------------------------------------------------


class DataOrder:
    """Endless epochs over the problems, each a permutation drawn from (seed, stage, epoch).

    The position (number of problems used so far) is the only state. Any batch_size consecutive problems are distinct,
    across epochs too, so the start of an epoch depends on the batch size.
    """

    def __init__(self, problems: list[Problem], batch_size: int, seed: int, stage: int):
        self.problems = sorted(problems, key=lambda p: p.id)
        self.batch_size, self.seed, self.stage = batch_size, seed, stage
        self.epochs: list[list[int]] = []
        if repeated := [a.id for a, b in pairwise(self.problems) if a.id == b.id]:
            raise DataError(f"several problems have the id {repeated[0]}; make the ids unique.")
        if len(problems) < batch_size:
            raise DataError(
                f"{len(problems)} problems cannot fill a batch of {batch_size}; lower the batch size or add problems."
            )

    def batch(self, position: int) -> list[Problem]:
        places = range(position, position + self.batch_size)
        size = len(self.problems)
        return [self.problems[self.order(place // size)[place % size]] for place in places]

    def order(self, epoch: int) -> list[int]:
        while len(self.epochs) <= epoch:
            key = [self.seed, self.stage, len(self.epochs)]
            drawn = np.random.Generator(np.random.PCG64(key)).permutation(len(self.problems)).tolist()
            last = self.epochs[-1][1 - self.batch_size :] if self.epochs and self.batch_size > 1 else []
            # a problem from the end of the last epoch is used again only a full batch later
            for slot in range(len(last)):
                recent = set(last[slot:])
                pick = next(i for i in range(slot, len(drawn)) if drawn[i] not in recent)
                drawn.insert(slot, drawn.pop(pick))
            self.epochs.append(drawn)
        return self.epochs[epoch]


if __name__ == "__main__":
    from lab.difficulty import main

    main(ARGUMENTS)
