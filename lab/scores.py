"""What graded responses say about a model: avg@k, pass@k, maj@k with honest intervals, groups, paired differences.

Pure functions of responses; they know nothing of models or files. Two intervals stand beside every figure:

    low, high                    how far it would move with other problems of the same kind: problems are the
                                 sampling unit, since the responses to one problem are alike
    resampled_low, _high         how far it would move if these very problems were answered again

All are 95% intervals in the normal approximation, cut to [0, 1].
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from eval import NORMAL_95, Response, distinct_ngrams, half_width, interval, pass_at
from lab.answers import normal_form
from lab.problems import DataError, Problem

RESAMPLES = 400
LENGTH_BANDS = (0.25, 0.5, 1.0)  # of the trained length; with 32K these are the 8K, 16K and 32K of RECIPE section 3
MOST_DIFFICULTIES = 12  # more distinct figures than this are grouped by quarters


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its two 95% intervals; with one response per problem the second is not known."""

    value: float
    low: float
    high: float
    resampled_low: float | None
    resampled_high: float | None


@dataclass(frozen=True)
class GroupAccuracy:
    """avg@n of some of the problems, with its 95% interval."""

    avg: float
    low: float
    high: float
    problems: int


@dataclass(frozen=True)
class LengthBand:
    """Responses whose length lies in (above, up_to] tokens; up_to None is without end."""

    above: float
    up_to: float | None
    responses: int
    accuracy: float | None  # None without a response
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Evaluation:
    """Figures of n responses to each problem of a set; shares are of all responses."""

    name: str
    problems: int
    n: int
    temperature: float
    avg: float  # avg@n
    low: float  # 95% interval of avg, problems being the sampling unit
    high: float
    pass_at: dict[str, Estimate]  # by k, powers of two up to n, and n
    maj_at: dict[str, Estimate]
    by_type: dict[str, GroupAccuracy]
    by_difficulty: dict[str, GroupAccuracy]
    by_length: list[LengthBand]
    length_mean: float  # tokens
    truncated_share: float
    no_box_share: float
    distinct4: float | None
    tokens: int
    verdicts: dict[str, int]
    unanswerable: int  # problems without a usable answer, which nothing can solve
    tokens_per_s: float | None = None  # of the sampling itself; None for responses read from disk
    peak_memory_gib: float | None = None


# ----------------------------------------------------------------------------------------------------- intervals


def pass_half_width(right: np.ndarray, n: int, k: int) -> float:
    """Half width of pass@k when every problem is answered again, from the number of right responses (P,).

    The variance of pass@k at a chance p is exact; p is what `right` of n leave possible (Jeffreys' prior), since a
    problem solved 0 or n times in n need not be one that is never or always solved.
    """
    chances = (np.arange(2000) + 0.5) / 2000  # (M,)
    counts = np.arange(n + 1)
    binomial = np.array([float(math.comb(n, c)) for c in counts])[:, None]
    likelihood = binomial * chances ** counts[:, None] * (1 - chances) ** (n - counts[:, None])  # (n + 1, M)
    posterior = likelihood / np.sqrt(chances * (1 - chances))
    posterior /= posterior.sum(1, keepdims=True)
    variance = pass_at(counts, n, k) ** 2 @ likelihood - (1 - (1 - chances) ** k) ** 2  # of one problem, (M,)
    return NORMAL_95 * math.sqrt(float((posterior @ variance)[right].sum())) / len(right)


def majority_half_width(votes: np.ndarray, vote_is_right: np.ndarray, k: int, seed: int = 0) -> float:
    """Half width of maj@k when every problem is answered again: its votes are drawn from themselves RESAMPLES times.

    A bootstrap's variance has n in the denominator: sqrt(n / (n - 1)) corrects it. 0 where no votes ever differ.
    """
    problems, n = votes.shape
    rng = np.random.default_rng(seed)
    figures = [
        majority(np.take_along_axis(votes, rng.integers(0, n, (problems, n)), 1), vote_is_right, k).mean()
        for _ in range(RESAMPLES)
    ]
    return NORMAL_95 * float(np.std(figures)) * math.sqrt(n / (n - 1))


# -------------------------------------------------------------------------------------------------- the figures


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n itself."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def majority(votes: np.ndarray, vote_is_right: np.ndarray, k: int) -> np.ndarray:
    """maj@k of each problem, (P,): the mean over the n // k blocks of k consecutive responses, hence unbiased.

    votes (P, n): which of the problem's answers a response gave, -1 for none. vote_is_right (P, A). A tie is worth
    the share of its answers that are right, which is what drawing lots would earn on average. No vote earns nothing.
    """
    problems, n = votes.shape
    blocks, answers = n // k, vote_is_right.shape[1]
    if not answers:
        return np.zeros(problems)
    votes = votes[:, : blocks * k].reshape(problems * blocks, k)  # (P x blocks, k)
    place = np.arange(problems * blocks)[:, None] * (answers + 1) + votes + 1  # an answer's column is its number + 1
    counts = np.bincount(place.ravel(), minlength=problems * blocks * (answers + 1))
    counts = counts.reshape(problems, blocks, answers + 1)[:, :, 1:]  # the first column is "no answer"
    most = counts.max(2, keepdims=True)
    leads = (counts == most) & (most > 0)  # (P, blocks, A)
    earned = (leads & vote_is_right[:, None]).sum(2) / np.maximum(leads.sum(2), 1)
    return earned.mean(1)


def count_votes(groups: Sequence[Sequence[Response]]) -> tuple[np.ndarray, np.ndarray]:
    """The votes (P, n) and vote_is_right (P, A) of `majority`, on the normal form of the answers."""
    votes, right = [], []
    for group in groups:
        forms = [None if r.answer is None else normal_form(r.answer) for r in group]
        numbers = {form: i for i, form in enumerate(dict.fromkeys(form for form in forms if form is not None))}
        votes.append([numbers.get(form, -1) for form in forms])
        right.append({vote for vote, response in zip(votes[-1], group, strict=True) if response.correct})
    answers = range(max(map(max, votes)) + 1)
    return np.array(votes), np.array([[answer in own for answer in answers] for own in right], dtype=bool)


def estimate(values: np.ndarray, half: float | None) -> Estimate:
    """The mean of a figure over problems, (P,), with its intervals; `half` is of the resampled one."""
    value = float(values.mean())
    again = (None, None) if half is None else (max(0.0, value - float(half)), min(1.0, value + float(half)))
    return Estimate(value, *interval(values), *again)


def difficulty_groups(problems: Sequence[Problem]) -> list[str]:
    """A label for each problem: the data's own figure, or its quarter where there are many; "" where it has none."""
    figures = [problem.difficulty for problem in problems if problem.difficulty is not None]
    if len(set(figures)) <= MOST_DIFFICULTIES:
        return ["" if p.difficulty is None else f"{p.difficulty:g}" for p in problems]
    edges = np.quantile(figures, [0, 0.25, 0.5, 0.75, 1])
    labels = [f"{low:.3g} to {high:.3g}" for low, high in zip(edges, edges[1:], strict=False)]
    return ["" if p.difficulty is None else labels[np.searchsorted(edges[1:4], p.difficulty)] for p in problems]


def accuracy_by(labels: Sequence[str], means: Sequence[float]) -> dict[str, GroupAccuracy]:
    """The accuracy of the problems with each label that is not empty; labels that begin with a number in its order."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for label, mean in zip(labels, means, strict=True):
        grouped[label].append(float(mean))

    def order(label: str) -> tuple[float, str]:
        number = re.match(r"-?[0-9]+(?:\.[0-9]+)?", label)
        return (float(number[0]) if number else math.inf), label

    return {
        label: GroupAccuracy(float(np.mean(grouped[label])), *interval(grouped[label]), len(grouped[label]))
        for label in sorted(grouped, key=order)
        if label
    }


def length_bands(groups: Sequence[Sequence[Response]], trained_length: int) -> list[LengthBand]:
    """Accuracy by response length, in bands that are fractions of the trained length.

    A ratio of two sums over problems; its interval by linearisation, problems being the sampling unit.
    """
    edges = [0.0, *(share * trained_length for share in LENGTH_BANDS), math.inf]
    bands = []
    for above, up_to in zip(edges, edges[1:], strict=False):
        inside = [[r for r in group if above < r.tokens <= up_to] for group in groups]
        responses = np.array([len(part) for part in inside], dtype=float)
        right = np.array([sum(r.correct for r in part) for part in inside], dtype=float)
        accuracy = low = high = None
        if responses.any():
            accuracy = float(right.sum() / responses.sum())
            touched = responses > 0
            if touched.sum() > 1 and 0 < accuracy < 1:
                spread = (right - accuracy * responses)[touched]
                m = int(touched.sum())
                half = NORMAL_95 * math.sqrt(m / (m - 1) * (spread**2).sum()) / responses.sum()
                low, high = max(0.0, accuracy - half), min(1.0, accuracy + half)
            else:
                low, high = interval([accuracy] * int(touched.sum()))
        bands.append(LengthBand(above, None if math.isinf(up_to) else up_to, int(responses.sum()), accuracy, low, high))
    return bands


def summarise(
    name: str,
    problems: Sequence[Problem],
    groups: Sequence[Sequence[Response]],
    temperature: float,
    trained_length: int,
    tokens_per_s: float | None = None,
    peak_memory_gib: float | None = None,
) -> Evaluation:
    """The figures of n graded responses to each of these problems, in the same order."""
    n = len(groups[0])
    if any(len(group) != n for group in groups):
        raise ValueError(f"{name}: {len(groups)} problems do not all have {n} responses")
    correct = np.array([[r.correct for r in group] for group in groups])  # (P, n)
    votes, vote_is_right = count_votes(groups)
    right, means = correct.sum(1), correct.mean(1)
    pass_figures, majority_figures = {}, {}
    for k in powers_of_two(n):
        pass_half = majority_half = None
        if n > 1:
            pass_half = pass_half_width(right, n, k)
            majority_half = majority_half_width(votes, vote_is_right, k) or pass_half_width(right, n, 1)
        pass_figures[str(k)] = estimate(pass_at(right, n, k), pass_half)
        majority_figures[str(k)] = estimate(majority(votes, vote_is_right, k), majority_half)
    low, high = interval(means)
    everything = list(chain(*groups))
    return Evaluation(
        name=name,
        problems=len(problems),
        n=n,
        temperature=temperature,
        avg=float(means.mean()),
        low=low,
        high=high,
        pass_at=pass_figures,
        maj_at=majority_figures,
        by_type=accuracy_by([problem.type for problem in problems], means),
        by_difficulty=accuracy_by(difficulty_groups(problems), means),
        by_length=length_bands(groups, trained_length),
        length_mean=float(np.mean([response.tokens for response in everything])),
        truncated_share=float(np.mean([response.finish_reason == "length" for response in everything])),
        no_box_share=float(np.mean([response.answer is None for response in everything])),
        distinct4=distinct_ngrams([[response.text for response in group] for group in groups])[0],
        tokens=sum(response.tokens for response in everything),
        verdicts=dict(Counter(response.verdict for response in everything)),
        unanswerable=sum(not problem.answers for problem in problems),
        tokens_per_s=tokens_per_s,
        peak_memory_gib=peak_memory_gib,
    )


def print_evaluation(found: Evaluation) -> None:
    """One line, and one for each grouping that the data has."""
    print(
        f"{found.name}: avg@{found.n} {100 * found.avg:.1f} (95% {100 * found.low:.1f} to {100 * found.high:.1f}) over "
        f"{found.problems} problems, mean length {found.length_mean:,.0f}, truncated {found.truncated_share:.1%}, "
        f"no box {found.no_box_share:.1%}, {found.verdicts}"
    )
    for groups in (found.by_type, found.by_difficulty):
        if len(groups) > 1:
            parts = [f"{label} {100 * group.avg:.1f} ({group.problems})" for label, group in groups.items()]
            print(f"  {', '.join(parts)}")


# ------------------------------------------------------------------------------------------ two models compared


@dataclass(frozen=True)
class Comparison:
    """B minus A on the problems that both answered."""

    problems: int
    avg_a: float
    avg_b: float
    difference: float
    low: float  # 95% interval of the difference, paired by problem
    high: float
    up: int  # problems that B solves more often
    down: int
    same: int
    only_a: int  # problems that only one of them answered, left out
    only_b: int


def compare(name: str, means_a: dict[str, float], means_b: dict[str, float]) -> Comparison:
    """The paired difference of two models, from their mean correctness by problem id. Its interval is +-half_width."""
    shared = [problem_id for problem_id in means_a if problem_id in means_b]
    if not shared:
        raise DataError(f"{name}: the two evaluations have no problem in common")
    a, b = (np.array([means[problem_id] for problem_id in shared]) for means in (means_a, means_b))
    moved = b - a
    difference, half = float(moved.mean()), half_width(moved)
    return Comparison(
        problems=len(shared),
        avg_a=float(a.mean()),
        avg_b=float(b.mean()),
        difference=difference,
        low=max(-1.0, difference - half),
        high=min(1.0, difference + half),
        up=int((moved > 0).sum()),
        down=int((moved < 0).sum()),
        same=int((moved == 0).sum()),
        only_a=len(means_a) - len(shared),
        only_b=len(means_b) - len(shared),
    )
