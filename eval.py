r"""How good is a model? avg@k, pass@k and maj@k with honest intervals; curves against temperature and length.

    python eval.py MODEL --data aime24 --data aime25 -n 32 --temperature 1.4 --top-k 20 --max-tokens 90000 \
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

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    from lab.options import evaluation_arguments

    ARGUMENTS = evaluation_arguments(__doc__)

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lab.problems import Problem

if TYPE_CHECKING:  # those who only read figures need no torch
    from engine.rollout_worker import Attempt, RolloutWorker
    from rollout import Sampling

NORMAL_95 = 1.959964  # half the width of a 95% interval in standard errors


# --------------------------------------------------------------------------------------------------- responses


@dataclass(frozen=True)
class Response:
    """One graded response, as it is kept on disk."""

    data: str  # name of the data set
    problem_id: str
    sample: int  # which of the problem's n
    tokens: int  # with the end-of-sequence token
    finish_reason: str  # "stop" or "length"
    verdict: str  # one of reward.VERDICTS
    answer: str | None  # content of the last box
    text: str
    cuts: dict[str, int] | None = None  # characters that the first so many tokens make; for accuracy against length

    @property
    def correct(self) -> bool:
        """Whether the verdict is "right"."""
        return self.verdict == "right"


def response_of(name: str, attempt: "Attempt", cuts: dict[str, int] | None = None) -> Response:
    """What is kept of an attempt: everything but its tokens and log-probs."""
    rollout, grade = attempt.rollout, attempt.grade
    return Response(
        name, rollout.problem_id, rollout.index, len(rollout.tokens), rollout.finish_reason,
        grade.verdict, grade.answer, attempt.text, cuts,
    )  # fmt: skip


def evaluate(
    worker: "RolloutWorker", name: str, problems: Sequence[Problem], n: int, sampling: "Sampling", label: str = ""
) -> list[list[Response]]:
    """n graded responses to every problem, in order; nothing is written. A label shows progress.

    Every process calls it and gets the same. lab.scores.summarise turns them into a table of figures.
    """
    attempts, _ = worker.attempt(problems, n, sampling, label)
    return [[response_of(name, attempt) for attempt in group] for group in attempts]


# ------------------------------------------------------------------------------------------- accuracy: avg@k, pass@k


def interval(problem_means: Sequence[float]) -> tuple[float, float]:
    """95% interval of avg@k, the mean of problems' means: problems are the sampling unit. Within [0, 1].

    Where all problems scored the same there is no spread to measure: Wilson's interval, a problem counting once.
    """
    means = np.asarray(problem_means, dtype=float)
    problems, mean = len(means), means.mean()
    if problems < 2:
        return 0.0, 1.0  # one problem says nothing about the next
    if np.ptp(means) < 1e-9:
        z2 = NORMAL_95**2
        centre = (mean + z2 / (2 * problems)) / (1 + z2 / problems)
        half = NORMAL_95 / (1 + z2 / problems) * math.sqrt(mean * (1 - mean) / problems + z2 / (4 * problems**2))
    else:
        centre, half = mean, NORMAL_95 * means.std(ddof=1) / math.sqrt(problems)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def half_width(values: Sequence[float]) -> float:
    """Half of the 95% interval of a mean over problems, at most 1; 1 for fewer than two.

    Without any spread 3 / problems: the largest share of other values that none seen among so many leaves possible.
    """
    if len(values) < 2:
        return 1.0
    spread = float(np.std(values, ddof=1))
    return min(1.0, NORMAL_95 * spread / math.sqrt(len(values)) if spread > 1e-9 else 3 / len(values))


def pass_at(right: np.ndarray, n: int, k: int) -> np.ndarray:
    """Unbiased chance that k of n responses hold a right one, by the number of right ones (P,) -> (P,).

    1 - C(n - right, k) / C(n, k): equation 1 of arXiv 2107.03374.
    """
    table = np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return table[right]


# ------------------------------------------------------------------------------------------- diversity: distinct-4


def distinct_share(texts: Sequence[str], n: int = 4) -> float | None:
    """Distinct n-grams / all n-grams over one problem's responses; None when no response has n whitespace tokens."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def distinct_ngrams(texts_by_problem: Sequence[Sequence[str]], n: int = 4) -> tuple[float | None, int]:
    """The recipe's diversity (RECIPE section 2): `distinct_share`, averaged over problems.

    Returns the score (None when no problem has an n-gram) and how many problems were left out for having none.
    """
    shares = [share for texts in texts_by_problem if (share := distinct_share(texts, n)) is not None]
    return (sum(shares) / len(shares) if shares else None), len(texts_by_problem) - len(shares)


# ------------------------------------------------------------------------------- the temperature to train at

FIRST_PROBLEMS = 32  # taken at first; then twice as many, until the margin is met
SAG, COLLAPSE = 0.05, 0.25  # relative losses of accuracy that end the robust and the exploration zone
ROUND_TO = 0.05  # of a recommended temperature
RESAMPLES = 1000  # of the problems, for the interval of the recommendation

Answer = Callable[[Sequence[Problem], float], list[list[Response]]]  # responses to problems at a temperature
Diversity = float | Mapping[str, float]  # a distinct-4, or that of each problem by its id


@dataclass(frozen=True)
class TemperaturePoint:
    """Accuracy and diversity at one temperature; the halves are of 95% intervals, problems being the sampling unit."""

    temperature: float
    accuracy: float
    distinct4: float | None  # None when no response has a 4-gram
    problems: int = 0
    accuracy_half: float = 1.0
    distinct4_half: float = 1.0
    target: float | None = None  # the distinct-4 to restore, on the very problems measured
    accuracies: tuple[float, ...] = ()  # of each of them, in their order

    def row(self) -> dict:
        """What is kept of it: everything but the accuracies of single problems."""
        return {name: value for name, value in vars(self).items() if name != "accuracies"}


@dataclass(frozen=True)
class Zones:
    """Where accuracy begins to fall and where it has fallen; None when the curve does not go that far."""

    plateau: float  # the accuracy that the zones are relative to
    robust_end: float | None
    exploration_end: float | None
    start: float  # the temperature to start training at
    start_low: float | None = None  # its 95% interval, by resampling problems; None where these are not known
    start_high: float | None = None


def measure_temperature(
    answer: Answer,
    problems: Sequence[Problem],
    temperature: float,
    margin: float = 0.0,
    target: Diversity | None = None,
) -> TemperaturePoint:
    """Accuracy and distinct-4 at one temperature, on the first so many problems as the stated confidence needs.

    It stops when both 95% intervals are within +-margin (0: all problems are asked). With a target, distinct-4 alone
    counts, and being surely above or below the target is enough; a target known by problem is compared problem by
    problem, which takes fewer.
    """
    groups: list[list[Response]] = []
    while True:
        most = len(problems) if not margin else min(len(problems), max(FIRST_PROBLEMS, 2 * len(groups)))
        groups += answer(problems[len(groups) : most], temperature)
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
    answer: Answer,
    problems: Sequence[Problem],
    target: Diversity,
    start: float,
    step: float = 0.05,
    most: float = 2.0,
    margin: float = 0.0,
    say: Callable[[str], None] = print,
    collapse: float = COLLAPSE,
) -> tuple[float, list[TemperaturePoint]]:
    """Search upward from `start` for the first temperature that restores a diversity score.

    Returns it with every point measured. When none up to `most` does, or none before accuracy has collapsed, the most
    diverse one up to there is returned and said so. The target must come from the same problems, the same number of
    responses and the same length limit; given by problem, it is a paired comparison.
    """
    curve: list[TemperaturePoint] = []
    above = int(math.floor((most - start) / step + 1e-9))
    for i in range(max(0, above) + 1):  # the first is measured even beyond `most`
        temperature = round(start + i * step, 6)
        point = measure_temperature(answer, problems, temperature, margin, target)
        curve.append(point)
        if has_collapsed(point, curve[0], collapse):
            where = f"temperature below {temperature}, where accuracy has collapsed ({point.accuracy:.3f}),"
            found = curve[:-1]
            break
        if point.distinct4 is not None and point.distinct4 >= point.target:
            return temperature, curve
    else:
        where, found = f"temperature up to {most}", curve
    best = max(found, key=lambda point: point.distinct4 or 0.0)
    say(
        f"warning: no {where} restores distinct-4 = {best.target or 0:.3f}; "
        f"going on with {best.temperature} ({best.distinct4 or 0:.3f})"
    )
    return best.temperature, curve


def has_collapsed(point: TemperaturePoint, first: TemperaturePoint, collapse: float = COLLAPSE) -> bool:
    """Whether accuracy has lost more than a share `collapse` of what it was at the first point, beyond the noise.

    Compared problem by problem, on those that both have: the 95% interval must lie below the border, or a few unlucky
    rollouts of hard problems would end a search.
    """
    pairs = zip(point.accuracies, first.accuracies, strict=False)
    above = [now - (1 - collapse) * before for now, before in pairs]
    return bool(above) and float(np.mean(above)) + half_width(above) < 0


def never_rising(values: Sequence[float]) -> list[float]:
    """The non-increasing sequence nearest to `values` in squares: neighbours that rise are pooled into their mean."""
    pools: list[tuple[float, int]] = []  # mean, how many
    for value in values:
        mean, size = float(value), 1
        while pools and pools[-1][0] < mean:
            above, count = pools.pop()
            mean, size = (above * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    return [mean for mean, size in pools for _ in range(size)]


def find_zones(curve: Sequence[TemperaturePoint], sag: float = SAG, collapse: float = COLLAPSE) -> Zones:
    """The three zones of a curve of accuracy against temperature, and where to start training.

    Accuracy is smoothed into a curve that never rises; its height at the lowest temperature is the plateau. The robust
    zone ends where the curve has lost `sag` of that, the exploration zone where it has lost `collapse`, both between
    the measured temperatures. Training starts at the end of the robust zone, or, when accuracy never sags, at the
    highest temperature measured; its interval comes from drawing the problems again, the same at all temperatures.
    Raises ValueError for a curve of no accuracy at all.
    """
    points = sorted(curve, key=lambda point: point.temperature)
    temperatures = [point.temperature for point in points]
    zones = _zones(temperatures, [point.accuracy for point in points], sag, collapse)
    known = min(len(point.accuracies) for point in points)  # problems measured at every temperature
    if known < 2:
        return zones
    table = np.array([point.accuracies[:known] for point in points])  # (temperatures, problems)
    random, starts = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        means = table[:, random.integers(0, known, known)].mean(1)
        with suppress(ValueError):  # these problems are never solved
            starts.append(_zones(temperatures, means.tolist(), sag, collapse).start)
    low, high = np.quantile(starts, [0.025, 0.975], method="nearest")
    return replace(zones, start_low=float(low), start_high=float(high))


def _zones(temperatures: list[float], accuracies: list[float], sag: float, collapse: float) -> Zones:
    smooth = never_rising(accuracies)
    plateau = smooth[0]
    if plateau <= 0:
        raise ValueError("accuracy is 0 at every temperature: there are no zones to find; take easier problems")

    def crossing(level: float) -> float | None:
        for i, height in enumerate(smooth):
            if height < level:  # the first height is the plateau and no lower than any level
                share = (smooth[i - 1] - level) / (smooth[i - 1] - height)
                return temperatures[i - 1] + share * (temperatures[i] - temperatures[i - 1])
        return None

    robust_end, exploration_end = crossing((1 - sag) * plateau), crossing((1 - collapse) * plateau)
    start = temperatures[-1] if robust_end is None else round(round(robust_end / ROUND_TO) * ROUND_TO, 6)
    return Zones(plateau, robust_end, exploration_end, start)


if __name__ == "__main__":
    from lab.evaluation import main

    main(ARGUMENTS)
