r"""How good is a model? avg@k, pass@k and maj@k with 95% intervals; curves against temperature and length.

    python eval.py MODEL --data aime24 --data aime25 -n 32 --temperature 1.4 --top-k 20 --max-tokens 90000 \
        --yarn 1.5 --original-window 65536                          # several sets at once; by name, file or folder
    torchrun --nproc-per-node 8 eval.py MODEL --data ...            # the same on eight GPUs
    python eval.py MODEL --data amc23 --curve temperature 0.6:1.7:0.1   # the three zones, and where to start training
    python eval.py LATER --data amc23 --match runs/eval             # restores the diversity of an evaluation on amc23
    python eval.py MODEL --data aime24 --curve length --yarn 1.5    # accuracy against budget, with and without YaRN
    python eval.py --compare OUT OTHER                              # paired by problem, on a page; takes several
    python eval.py --regrade runs/eval                              # stored responses, graded again without a model

What the command line leaves out is as the model's run evaluated it; OUT is runs/eval, runs/eval-2, ... unless --out
names it. Each response is written with its verdict to OUT/responses/NAME.jsonl as it finishes; after an interruption
the same command resumes and ends with the same results. OUT also gets results.json and report.html.
"""

if __name__ == "__main__":  # --help and argument errors need no torch
    from engine.terminal import prepare_terminal

    prepare_terminal()
    from lab.options import evaluation_arguments

    ARGUMENTS = evaluation_arguments(__doc__)

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from lab.problems import Problem

if TYPE_CHECKING:  # metrics need no torch
    from engine.rollout_worker import Attempt, RolloutWorker
    from rollout import Sampling

NORMAL_95 = 1.959964  # half width of a 95% interval in standard errors


# --------------------------------------------------------------------------------------------------- responses


@dataclass(frozen=True)
class Response:
    """One graded response, as stored on disk."""

    data: str  # name of the data set
    problem_id: str
    sample: int  # index among the problem's n
    tokens: int  # including the end-of-sequence token
    finish_reason: str  # "stop" or "length"
    verdict: str  # one of reward.VERDICTS
    answer: str | None  # content of the last \boxed{}
    text: str
    cuts: dict[str, int] | None = None  # token budget -> characters of text within it; for --curve length

    @property
    def correct(self) -> bool:
        """Return whether the verdict is "right"."""
        return self.verdict == "right"


def response_of(name: str, attempt: "Attempt", cuts: dict[str, int] | None = None) -> Response:
    """Convert an attempt into a Response, dropping its tokens and log-probs."""
    rollout, grade = attempt.rollout, attempt.grade
    return Response(
        name, rollout.problem_id, rollout.index, len(rollout.tokens), rollout.finish_reason,
        grade.verdict, grade.answer, attempt.text, cuts,
    )  # fmt: skip


def evaluate(
    worker: "RolloutWorker", name: str, problems: Sequence[Problem], n: int, sampling: "Sampling", label: str = ""
) -> list[list[Response]]:
    """Return n graded responses to each problem, in order. Collective: every process gets all of them.

    A non-empty label shows progress. lab.scores.summarise computes the metrics.
    """
    attempts, _ = worker.attempt(problems, n, sampling, label)
    return [[response_of(name, attempt) for attempt in group] for group in attempts]


# ------------------------------------------------------------------------------------------- accuracy: avg@k, pass@k


@cache
def student_95(freedom: int) -> float:
    """Return half a 95% interval in standard errors for these degrees of freedom: the 97.5% quantile of Student's t.

    Of t = sqrt(freedom) tan(angle), the angle has the density cos(angle) ** (freedom - 1): summed here, to 6 digits.
    """
    angles = np.linspace(0, math.pi / 2, 100_001)
    share = np.cumsum(np.cos((angles[1:] + angles[:-1]) / 2) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(np.interp(0.95 * share[-1], share, angles[1:]))


def interval(problem_means: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of avg@k, the mean over problems, clustered by problem; all of [0, 1] for one problem."""
    means = np.asarray(problem_means, dtype=float)
    spread = means.var(ddof=1) if len(means) > 1 else 0.0
    return share_interval(float(means.mean()), float(spread) / len(means), len(means))


def share_interval(share: float, variance: float, problems: int) -> tuple[float, float]:
    """Return Wilson's 95% interval, with Student's t, of a share that was estimated over problems with this variance.

    The share counts as one of as many independent trials as give the variance, with that of one more problem, solved or
    not, since few problems understate it. Without spread there is none to measure: one trial per problem, normal.
    """
    if problems < 2:
        return 0.0, 1.0  # one problem says nothing about others
    t, trials, single = NORMAL_95, problems, share * (1 - share)
    if variance > 1e-18:
        t, trials = student_95(problems - 1), single / (variance * (problems - 1) / problems + single / problems**2)
    centre = (share + t**2 / (2 * trials)) / (1 + t**2 / trials)
    half = t / (1 + t**2 / trials) * math.sqrt(single / trials + t**2 / (4 * trials**2))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def half_width(values: Sequence[float]) -> float:
    """Return the half width of the 95% interval of a mean over problems, at most 1; 1 for fewer than two values.

    Without any spread it is 3 / problems (rule of three: the largest share of other values that could go unseen).
    """
    if len(values) < 2:
        return 1.0
    spread, t = float(np.std(values, ddof=1)), student_95(len(values) - 1)
    return min(1.0, t * spread / math.sqrt(len(values)) if spread > 1e-9 else 3 / len(values))


def pass_at(right: np.ndarray, n: int, k: int) -> np.ndarray:
    """Return the unbiased pass@k of each problem from its number of right responses of n: (P,) -> (P,).

    1 - C(n - right, k) / C(n, k): equation 1 of arXiv 2107.03374.
    """
    table = np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return table[right]


# ------------------------------------------------------------------------------------------- diversity: distinct-4


def distinct_share(texts: Sequence[str], n: int = 4) -> float | None:
    """Return distinct n-grams / all n-grams over one problem's responses; None if no response has n words."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def distinct_ngrams(texts_by_problem: Sequence[Sequence[str]], n: int = 4) -> tuple[float | None, int]:
    """Return the recipe's diversity (RECIPE section 2) and how many problems it leaves out.

    The score is `distinct_share` averaged over the problems that have an n-gram; None if none has.
    """
    shares = [share for texts in texts_by_problem if (share := distinct_share(texts, n)) is not None]
    return (sum(shares) / len(shares) if shares else None), len(texts_by_problem) - len(shares)


# ------------------------------------------------------------------------------- the temperature to train at

FIRST_PROBLEMS = 32  # sampled first; then twice as many, until the margin is met
SAG, COLLAPSE = 0.05, 0.25  # relative losses of accuracy that end the robust and the exploration zone
ROUND_TO = 0.05  # of a recommended temperature
RESAMPLES = 1000  # bootstrap draws of the problems, for the interval of the recommendation

Respond = Callable[[Sequence[Problem], float], list[list[Response]]]  # responses to problems at a temperature
Diversity = float | Mapping[str, float]  # one distinct-4, or one per problem id


@dataclass(frozen=True)
class TemperaturePoint:
    """Accuracy and distinct-4 at one temperature, with half widths of their 95% intervals over problems."""

    temperature: float
    accuracy: float
    distinct4: float | None  # None if no response has a 4-gram
    problems: int = 0
    accuracy_half: float = 1.0
    distinct4_half: float = 1.0
    target: float | None = None  # the distinct-4 to restore, on the problems measured
    accuracies: tuple[float, ...] = ()  # per problem, in order

    def row(self) -> dict:
        """Return the fields to store: all but the accuracies of single problems."""
        return {name: value for name, value in vars(self).items() if name != "accuracies"}


@dataclass(frozen=True)
class Zones:
    """The zones of a temperature curve; an end is None if the curve does not reach it."""

    plateau: float  # the accuracy that the zones are relative to
    robust_end: float | None
    exploration_end: float | None
    start: float  # the temperature to start training at
    start_low: float | None = None  # its 95% interval; None without accuracies of single problems
    start_high: float | None = None


def measure_temperature(
    respond: Respond,
    problems: Sequence[Problem],
    temperature: float,
    margin: float = 0.0,
    target: Diversity | None = None,
) -> TemperaturePoint:
    """Measure accuracy and distinct-4 at one temperature, on only as many problems as the margin requires.

    Sampling stops when the half widths of both 95% intervals are within the margin (0: all problems). With a target
    only distinct-4 counts, and being clearly above or below the target is enough. A target per problem makes the
    comparison paired, which takes fewer problems.
    """
    groups: list[list[Response]] = []
    while True:
        end = min(len(problems), max(FIRST_PROBLEMS, 2 * len(groups))) if margin else len(problems)
        groups += respond(problems[len(groups) : end], temperature)
        accuracies = [float(np.mean([response.correct for response in group])) for group in groups]
        shares = {
            problem.id: share
            for problem, group in zip(problems, groups, strict=False)
            if (share := distinct_share([response.text for response in group])) is not None
        }
        if isinstance(target, Mapping):
            shares = {name: share for name, share in shares.items() if name in target}
            wanted = float(np.mean([target[name] for name in shares])) if shares else None
            half = half_width([share - target[name] for name, share in shares.items()])
        else:
            wanted, half = target, half_width(list(shares.values()))
        point = TemperaturePoint(
            temperature=temperature,
            accuracy=float(np.mean(accuracies)),
            distinct4=float(np.mean(list(shares.values()))) if shares else None,
            problems=len(groups),
            accuracy_half=half_width(accuracies),
            distinct4_half=half,
            target=wanted,
            accuracies=tuple(accuracies),
        )
        if target is None:
            enough = max(point.accuracy_half, half) <= margin
        else:
            enough = bool(shares) and half <= max(margin, abs(point.distinct4 - wanted))
        if len(groups) == len(problems) or (margin and enough):
            return point


def match_diversity(
    respond: Respond,
    problems: Sequence[Problem],
    target: Diversity,
    start: float,
    step: float = 0.05,
    most: float = 2.0,
    margin: float = 0.0,
    say: Callable[[str], None] = print,
) -> tuple[float, list[TemperaturePoint]]:
    """Search upward from `start` for the first temperature that restores a diversity; return it and all points.

    If none up to `most` does, or accuracy collapses first, take the most diverse one before that and warn. Measure the
    target on the same problems, with the same number of responses and length limit; per problem, it is paired.
    """
    curve: list[TemperaturePoint] = []
    above = int(math.floor((most - start) / step + 1e-9))
    for i in range(max(0, above) + 1):  # `start` is measured even beyond `most`
        temperature = round(start + i * step, 6)
        point = measure_temperature(respond, problems, temperature, margin, target)
        curve.append(point)
        if has_collapsed(point, curve[0]):
            where = f"temperature below {temperature}, where accuracy has collapsed ({point.accuracy:.3f}),"
            candidates = curve[:-1]
            break
        if point.distinct4 is not None and point.distinct4 >= point.target:
            return temperature, curve
    else:
        where, candidates = f"temperature up to {most}", curve
    best = max(candidates, key=lambda point: point.distinct4 or 0.0)
    say(
        f"warning: no {where} restores distinct-4 = {best.target or 0:.3f}; "
        f"continuing with {best.temperature} ({best.distinct4 or 0:.3f})"
    )
    return best.temperature, curve


def has_collapsed(point: TemperaturePoint, first: TemperaturePoint) -> bool:
    """Return whether accuracy has lost more than COLLAPSE of its value at the first point, beyond the noise.

    Paired by problem; the whole 95% interval must be below the border, so that a few unlucky rollouts of hard problems
    do not end a search.
    """
    pairs = zip(point.accuracies, first.accuracies, strict=False)
    above = [now - (1 - COLLAPSE) * before for now, before in pairs]
    return bool(above) and float(np.mean(above)) + half_width(above) < 0


def find_zones(curve: Sequence[TemperaturePoint]) -> Zones:
    """Find the three zones of accuracy against temperature (RECIPE section 2), and where to start training.

    The plateau is the height of the smoothed, non-increasing curve at the lowest temperature. The robust zone ends
    where the curve has lost SAG of it, the exploration zone where it has lost COLLAPSE, both interpolated. Training
    starts at the end of the robust zone, or at the highest temperature measured if accuracy never sags; its interval
    is a bootstrap over problems, with the same draw at all temperatures. Raises ValueError if accuracy is 0 everywhere.
    """
    points = sorted(curve, key=lambda point: point.temperature)
    temperatures = [point.temperature for point in points]
    zones = _zones(temperatures, [point.accuracy for point in points])
    known = min(len(point.accuracies) for point in points)  # problems measured at every temperature
    if known < 2:
        return zones
    table = np.array([point.accuracies[:known] for point in points])  # (temperatures, problems)
    random, starts = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        means = table[:, random.integers(0, known, known)].mean(1)
        with suppress(ValueError):  # none of the problems drawn is ever solved
            starts.append(_zones(temperatures, means.tolist()).start)
    if not starts:  # what was measured at every temperature is never solved
        return zones
    low, high = np.quantile(starts, [0.025, 0.975], method="nearest")
    return replace(zones, start_low=float(low), start_high=float(high))


def _zones(temperatures: list[float], accuracies: list[float]) -> Zones:
    smooth = pool_adjacent_violators(accuracies)
    plateau = smooth[0]
    if plateau <= 0:
        raise ValueError("accuracy is 0 at every temperature, so there are no zones; use easier problems")

    def crossing(level: float) -> float | None:
        for i, height in enumerate(smooth):
            if height < level:  # never at i = 0: the plateau is above every level
                share = (smooth[i - 1] - level) / (smooth[i - 1] - height)
                return temperatures[i - 1] + share * (temperatures[i] - temperatures[i - 1])
        return None

    robust_end, exploration_end = crossing((1 - SAG) * plateau), crossing((1 - COLLAPSE) * plateau)
    start = temperatures[-1] if robust_end is None else round(round(robust_end / ROUND_TO) * ROUND_TO, 6)
    return Zones(plateau, robust_end, exploration_end, start)


def pool_adjacent_violators(values: Sequence[float]) -> list[float]:
    """Return the non-increasing sequence nearest to `values` in least squares, by pooling rises into their mean."""
    pools: list[tuple[float, int]] = []  # (mean, size)
    for value in values:
        mean, size = float(value), 1
        while pools and pools[-1][0] < mean:
            above, count = pools.pop()
            mean, size = (above * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    return [mean for mean, size in pools for _ in range(size)]


if __name__ == "__main__":
    from lab.evaluation import main

    main(ARGUMENTS)
