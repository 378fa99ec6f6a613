"""Metrics of graded responses: avg@k, pass@k and maj@k with intervals, accuracy by group, paired differences.

Every figure has two 95% intervals, by Student's t and cut to [0, 1]:

    low, high                       over other problems of the same kind: clustered by problem, since the responses to
                                    one problem are correlated
    resampled_low, resampled_high   over new responses to the same problems
"""

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval import Response, distinct_ngrams, half_width, interval, pass_at, share_interval, student_95
from lab.answers import normal_form
from lab.data_files import DataError
from lab.problems import Problem

FALSE_DISCOVERIES = 0.05  # expected share, at most, of the problems that are said to have moved
RESAMPLES = 400  # bootstrap draws for maj@k
LENGTH_BANDS = (0.25, 0.5, 1.0)  # of the trained length; of 32K: the 8K, 16K and 32K of RECIPE section 3
MOST_DIFFICULTIES = 12  # more distinct values than this are grouped into quartiles


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its two 95% intervals; the second is None with one response per problem."""

    value: float
    low: float
    high: float
    resampled_low: float | None
    resampled_high: float | None


@dataclass(frozen=True)
class GroupAccuracy:
    """avg@n of a subset of the problems, with its 95% interval."""

    avg: float
    low: float
    high: float
    problems: int


@dataclass(frozen=True)
class LengthBand:
    """Responses of more than `above` and at most `up_to` tokens; up_to None is unbounded."""

    above: float
    up_to: float | None
    responses: int
    accuracy: float | None  # None without a response
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Evaluation:
    """Metrics of n responses to each problem of a set; shares are of all responses."""

    name: str
    problems: int
    n: int
    temperature: float
    avg: float  # avg@n
    low: float  # 95% interval of avg, clustered by problem
    high: float
    pass_at: dict[str, Estimate]  # by k, powers of two up to n, and n
    maj_at: dict[str, Estimate]  # empty if the right responses have no answer, as a reward function may need none
    by_type: dict[str, GroupAccuracy]
    by_difficulty: dict[str, GroupAccuracy]
    by_length: list[LengthBand]
    length_mean: float  # tokens
    truncated_share: float
    no_box_share: float
    distinct4: float | None
    tokens: int
    verdicts: dict[str, int]
    unanswerable: int  # problems without a usable answer, which count as wrong
    tokens_per_s: float | None = None  # while sampling; None for responses read from disk
    peak_memory_gib: float | None = None
    by_problem: tuple[tuple[str, float], ...] = ()  # problem id, share of its responses that are right


# ----------------------------------------------------------------------------------------------------- intervals


def pass_half_width(right: np.ndarray, n: int, k: int) -> float:
    """Return the half width of pass@k over new responses, from the number of right responses of each problem (P,).

    The variance of pass@k is exact given a problem's chance p, and averaged over the posterior of p: a problem solved 0
    or n times of n need not have p = 0 or 1. The prior is the Beta distribution with the mean and the spread within
    problems, p (1 - p), of these problems and one more with p = 1/2.
    """
    problems, counts = len(right), np.arange(n + 1)
    chances = (np.arange(2000) + 0.5) / 2000  # (M,)
    log_p, log_q = np.log(chances), np.log1p(-chances)
    ways = np.array([math.lgamma(n + 1) - math.lgamma(c + 1) - math.lgamma(n - c + 1) for c in counts])[:, None]
    likelihood = np.exp(ways + counts[:, None] * log_p + (n - counts[:, None]) * log_q)  # (n + 1, M)
    mean = ((right / n).sum() + 0.5) / (problems + 1)
    within = ((right * (n - right)).sum() / (n * (n - 1)) + 0.25) / (problems + 1)  # unbiased for the mean p (1 - p)
    between = max(mean * (1 - mean) - within, mean * (1 - mean) / 50)
    size = within / between  # a + b of Beta(a, b)
    posterior = likelihood * np.exp((mean * size - 1) * log_p + ((1 - mean) * size - 1) * log_q)
    posterior /= posterior.sum(1, keepdims=True)
    error = pass_at(counts, n, k)[:, None] - (1 - (1 - chances) ** k)  # (n + 1, M)
    variance = (error**2 * likelihood).sum(0)  # per problem at each p, (M,)
    return student_95(problems * (n - 1)) * math.sqrt(float((posterior @ variance)[right].sum())) / problems


def majority_half_width(votes: np.ndarray, vote_is_right: np.ndarray, k: int) -> float:
    """Return the half width of maj@k over new responses, by resampling each problem's votes; 0 if votes never differ.

    A bootstrap variance has n in its denominator; sqrt(n / (n - 1)) corrects it.
    """
    problems, n = votes.shape
    rng = np.random.default_rng(0)
    figures = [
        majority(np.take_along_axis(votes, rng.integers(0, n, (problems, n)), 1), vote_is_right, k).mean()
        for _ in range(RESAMPLES)
    ]
    return student_95(problems * (n - 1)) * float(np.std(figures)) * math.sqrt(n / (n - 1))


# -------------------------------------------------------------------------------------------------- the metrics


def majority(votes: np.ndarray, vote_is_right: np.ndarray, k: int) -> np.ndarray:
    """Return maj@k of each problem, (P,), unbiased: the mean over n // k disjoint blocks of k consecutive responses.

    votes (P, n) holds the number of the problem's answer that each response gave, -1 for none; vote_is_right is (P, A).
    A tie earns the share of its answers that are right, the expectation of a random tie-break; no votes earn 0.
    """
    problems, n = votes.shape
    blocks, answers = n // k, vote_is_right.shape[1]
    if not answers:
        return np.zeros(problems)
    votes = votes[:, : blocks * k].reshape(problems * blocks, k)  # (P x blocks, k)
    place = np.arange(problems * blocks)[:, None] * (answers + 1) + votes + 1  # column 0 is "no answer"
    counts = np.bincount(place.ravel(), minlength=problems * blocks * (answers + 1))
    counts = counts.reshape(problems, blocks, answers + 1)[:, :, 1:]
    most = counts.max(2, keepdims=True)
    leads = (counts == most) & (most > 0)  # (P, blocks, A)
    earned = (leads & vote_is_right[:, None]).sum(2) / np.maximum(leads.sum(2), 1)
    return earned.mean(1)


def count_votes(groups: Sequence[Sequence[Response]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the votes (P, n) and vote_is_right (P, A) for `majority`, by the normal form of the answers."""
    votes, right = [], []
    for group in groups:
        forms = [None if r.answer is None else normal_form(r.answer) for r in group]
        numbers: dict[str, int] = {}
        votes.append([-1 if form is None else numbers.setdefault(form, len(numbers)) for form in forms])
        right.append({vote for vote, response in zip(votes[-1], group, strict=True) if response.correct})
    answers = range(max(map(max, votes)) + 1)
    return np.array(votes), np.array([[answer in own for answer in answers] for own in right], dtype=bool)


def with_intervals(values: np.ndarray, half: float | None) -> Estimate:
    """Return the mean of a metric over problems, (P,), with its intervals; `half` belongs to the resampled one."""
    value = float(values.mean())
    again = (None, None) if half is None else (max(0.0, value - half), min(1.0, value + half))
    return Estimate(value, *interval(values), *again)


def difficulty_groups(problems: Sequence[Problem]) -> list[str]:
    """Return a label for each problem: its difficulty, or the quartile if there are many values; "" without one."""
    figures = [problem.difficulty for problem in problems if problem.difficulty is not None]
    if len(set(figures)) <= MOST_DIFFICULTIES:
        return ["" if p.difficulty is None else f"{p.difficulty:,g}" for p in problems]
    edges = np.quantile(figures, [0, 0.25, 0.5, 0.75, 1])
    labels = [f"{low:,g} to {high:,g}" for low, high in itertools.pairwise(edges)]
    return ["" if p.difficulty is None else labels[np.searchsorted(edges[1:4], p.difficulty)] for p in problems]


def accuracy_by(
    labels: Sequence[str], means: Sequence[float], places: Sequence[float | None] = ()
) -> dict[str, GroupAccuracy]:
    """Return the accuracy of the problems with each non-empty label.

    They are in the order of the problems' places, or else of the labels' leading numbers.
    """
    grouped: dict[str, list[float]] = defaultdict(list)
    for label, mean in zip(labels, means, strict=True):
        if label:
            grouped[label].append(float(mean))

    def order(label: str) -> tuple[float, str]:
        if places:
            return places[labels.index(label)], label
        number = re.match(r"-?[0-9]+(?:\.[0-9]+)?", label)
        return (float(number[0]) if number else math.inf), label

    return {
        label: GroupAccuracy(float(np.mean(own)), *interval(own), len(own))
        for label, own in sorted(grouped.items(), key=lambda item: order(item[0]))
    }


def length_bands(groups: Sequence[Sequence[Response]], trained_length: int) -> list[LengthBand]:
    """Return accuracy by response length, in bands that are fractions of the trained length.

    It is a ratio of two sums over problems; its interval is by linearisation, clustered by problem.
    """
    edges = [0.0, *(share * trained_length for share in LENGTH_BANDS), math.inf]
    bands = []
    for above, up_to in itertools.pairwise(edges):
        inside = [band for group in groups if (band := [r.correct for r in group if above < r.tokens <= up_to])]
        responses = np.array([len(band) for band in inside], dtype=float)  # of each problem with any, (P',)
        right = np.array([sum(band) for band in inside], dtype=float)
        accuracy = low = high = None
        if inside:
            accuracy = float(right.sum() / responses.sum())
            m, spread = len(inside), right - accuracy * responses
            low, high = share_interval(accuracy, m / max(1, m - 1) * (spread**2).sum() / responses.sum() ** 2, m)
        bands.append(LengthBand(above, None if math.isinf(up_to) else up_to, int(responses.sum()), accuracy, low, high))
    return bands


def summarise(
    name: str,
    problems: Sequence[Problem],
    groups: Sequence[Sequence[Response]],
    temperature: float,
    trained_length: int,
) -> Evaluation:
    """Compute the metrics of n graded responses to each problem; groups are in the order of problems."""
    n = len(groups[0])
    if any(len(group) != n for group in groups):
        raise ValueError(f"{name}: {len(groups)} problems do not all have {n} responses")
    correct = np.array([[r.correct for r in group] for group in groups])  # (P, n)
    votes, vote_is_right = count_votes(groups)
    right, means = correct.sum(1), correct.mean(1)
    has_majority = vote_is_right.shape[1] > 0 or not correct.any()
    pass_figures, majority_figures = {}, {}
    for k in sorted({2**i for i in range(n.bit_length())} | {n}):
        pass_half = majority_half = None
        if n > 1:
            pass_half = pass_half_width(right, n, k)
            majority_half = majority_half_width(votes, vote_is_right, k)
            if majority_half < 1e-9:  # votes never differ, but for the rounding of means
                majority_half = pass_half_width(right, n, 1)
        pass_figures[str(k)] = with_intervals(pass_at(right, n, k), pass_half)
        if has_majority:
            majority_figures[str(k)] = with_intervals(majority(votes, vote_is_right, k), majority_half)
    low, high = interval(means)
    everything = list(itertools.chain(*groups))
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
        by_difficulty=accuracy_by(difficulty_groups(problems), means, [problem.difficulty for problem in problems]),
        by_length=length_bands(groups, trained_length),
        length_mean=float(np.mean([response.tokens for response in everything])),
        truncated_share=float(np.mean([response.finish_reason == "length" for response in everything])),
        no_box_share=float(np.mean([response.answer is None for response in everything])),
        distinct4=distinct_ngrams([[response.text for response in group] for group in groups])[0],
        tokens=sum(response.tokens for response in everything),
        verdicts=dict(Counter(response.verdict for response in everything)),
        unanswerable=sum(not problem.answers and not problem.row for problem in problems),
        by_problem=tuple((problem.id, float(mean)) for problem, mean in zip(problems, means, strict=True)),
    )


def print_evaluation(found: Evaluation) -> None:
    """Print the score, the metrics, and a line for each grouping of the data."""
    verdicts = ", ".join(f"{count:,} {verdict}" for verdict, count in found.verdicts.items())
    print(
        f"{found.name}: avg@{found.n} {100 * found.avg:.1f} (95% {100 * found.low:.1f} to {100 * found.high:.1f}) over "
        f"{found.problems} problems"
    )
    print(
        f"  mean length {found.length_mean:,.0f}, truncated {found.truncated_share:.1%}, no box "
        f"{found.no_box_share:.1%}; {verdicts}"
    )
    for groups in (found.by_type, found.by_difficulty):
        if len(groups) > 1:
            parts = [f"{label} {100 * group.avg:.1f} ({group.problems})" for label, group in groups.items()]
            print(f"  {', '.join(parts)}")


# ------------------------------------------------------------------------------------------ comparing two models


@dataclass(frozen=True)
class Comparison:
    """B minus A on the problems that both evaluations have."""

    problems: int
    avg_a: float
    avg_b: float
    difference: float
    low: float  # 95% interval of the difference, paired by problem
    high: float
    up: int  # problems that B solves more often; `down`: less often
    down: int
    same: int
    only_a: int  # problems that only one evaluation has; left out
    only_b: int


def compare(name: str, means_a: dict[str, float], means_b: dict[str, float]) -> Comparison:
    """Compute the paired difference of two models from their accuracy per problem id. Raises DataError if disjoint."""
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


def mean_over_runs(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of a figure over runs and half its 95% interval, by Student's t; None for one run."""
    mean, n = float(np.mean(values)), len(values)
    return mean, student_95(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None


def fisher_p(right_a: int, n_a: int, right_b: int, n_b: int) -> float:
    """Return the two-sided p-value of Fisher's exact test: are two shares of right responses the same?"""
    right = right_a + right_b
    least = max(0, right - n_b)
    ways = [math.comb(n_a, k) * math.comb(n_b, right - k) for k in range(least, min(n_a, right) + 1)]
    return sum(w for w in ways if w <= ways[right_a - least]) / math.comb(n_a + n_b, right)


def moved_problems(a: dict[str, Sequence[bool]], b: dict[str, Sequence[bool]]) -> list[str]:
    """Return the ids of the problems that B solves more or less often than A beyond noise, surest first.

    By Fisher's exact test of each problem, with the procedure of Benjamini and Hochberg (1995) over all of them.
    """
    p = {key: fisher_p(sum(a[key]), len(a[key]), sum(b[key]), len(b[key])) for key in a if key in b}
    ranked = sorted(p, key=p.__getitem__)
    significant = [i for i, key in enumerate(ranked, 1) if p[key] <= FALSE_DISCOVERIES * i / len(p)]
    return ranked[: max(significant, default=0)]
