"""lab/scores.py against brute force, bootstraps and hand counts."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from eval import Response, interval, pass_at
from lab import scores
from lab.data_files import DataError
from lab.eval_page import k_chart, k_table
from lab.problems import Problem
from lab.scores import (
    accuracy_by,
    compare,
    count_votes,
    difficulty_groups,
    fisher_p,
    length_bands,
    majority,
    majority_half_width,
    mean_over_runs,
    moved_problems,
    pass_half_width,
    summarise,
)

Z = 1.959964


def response(problem_id, sample, verdict, answer, text="", tokens=1, finish_reason="stop"):
    return Response("set", problem_id, sample, tokens, finish_reason, verdict, answer, text)


# ---------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("k", [1, 4, 8])
def test_the_resampled_interval_of_pass_has_the_spread_of_new_responses(k):
    """The oracle: 4,000 sets of new responses to the same problems, from their true chances. k = n is the hardest."""
    random = np.random.default_rng(3)
    chances = random.beta(0.8, 0.8, size=(40, 1))
    again = (random.random((4000, 40, 8)) < chances).sum(2)  # (4000, 40)
    spread = 1.959964 * pass_at(again, 8, k).mean(1).std()
    halves = [pass_half_width(row, 8, k) for row in again[:200]]
    assert np.mean(halves) == pytest.approx(spread, rel=0.06)


def test_the_resampled_interval_of_maj_has_the_spread_of_new_responses():
    random = np.random.default_rng(9)
    chances = random.beta(0.8, 0.8, size=(40, 1))
    right = np.tile([True, False, False], (40, 1))
    fresh = []
    for _ in range(1500):
        wrong = random.integers(1, 3, (40, 8))
        fresh.append(np.where(random.random((40, 8)) < chances, 0, wrong))
    spread = 1.959964 * np.std([majority(votes, right, 4).mean() for votes in fresh])
    assert np.mean([majority_half_width(votes, right, 4) for votes in fresh[:8]]) == pytest.approx(spread, rel=0.12)


@pytest.mark.parametrize("a, b", [(1, 1), (5, 5)])
def test_resampled_intervals_of_few_responses_cover_the_truth(a, b):
    """Guards: Jeffreys' prior, by which 0.88 to 0.93 of the intervals of 2 to 4 responses to 30 problems did."""
    random, held = np.random.default_rng(12), []
    for n, k in ((2, 1), (2, 2), (4, 1)):
        chances = random.beta(a, b, (600, 30))
        right = random.binomial(n, chances)
        away = pass_at(right, n, k).mean(1) - (1 - (1 - chances) ** k).mean(1)
        held.append(np.abs(away) <= [pass_half_width(row, n, k) for row in right])
    assert np.mean(held) > 0.94 - 0.005  # one standard error of 1,800 trials


def test_the_variance_of_a_certain_pass_is_not_negative_and_of_many_responses_not_too_large():
    """Guards: after all sampling, the root of -1e-16 at n = 32, and a binomial beyond a float from n = 1,030 on."""
    for k in (1, 2, 4, 8, 16, 32):
        assert 0 <= pass_half_width(np.array([31, 32] * 15), 32, k) < 0.01
    right = np.array([515, 300] * 8)
    exact = math.sqrt(sum(c / 1030 * (1 - c / 1030) / 1030 for c in right)) / 16  # pass@1 is a mean
    assert pass_half_width(right, 1030, 1) == pytest.approx(Z * exact, rel=0.01)


@pytest.mark.parametrize("solved", [0, 8])
def test_equal_responses_have_a_resampled_interval(solved):
    halves = [pass_half_width(np.full(10, solved), 8, k) for k in (1, 8)]
    assert 0.01 < halves[0] < 0.1
    assert (halves[1] > halves[0]) == (solved == 0)  # pass@8 of a problem solved 8 of 8 times is the more certain
    votes = np.full((10, 8), -1)
    assert majority_half_width(votes, np.zeros((10, 0), dtype=bool), 4) == 0.0


# ------------------------------------------------------------------------------------------------- pass@k, maj@k


@pytest.mark.parametrize("n, ks", [(1, "1"), (8, "1 2 4 8"), (12, "1 2 4 8 12")])
def test_k_takes_the_powers_of_two_and_n(n, ks):
    found = summarise("set", [Problem("p", "?", ("1",))], [[response("p", i, "right", "1") for i in range(n)]], 1.0, 9)
    assert list(found.pass_at) == list(found.maj_at) == ks.split()


@pytest.mark.parametrize(
    "votes, k, earned, why",
    [
        ([0, 0, 1, 2], 4, 1.0, "two votes for the right answer beat one and one"),
        ([1, 1, 0, 2], 4, 0.0, "a wrong majority earns nothing"),
        ([0, 0, 1, 1], 4, 0.5, "a tie earns the share of its answers that are right"),
        ([0, 1, 2, -1], 4, 1 / 3, "three answers tie; no answer is no vote"),
        ([-1, -1, -1, 0], 4, 1.0, "no answer never wins"),
        ([-1, -1, -1, -1], 4, 0.0, "no votes"),
        ([0, 0, 1, 1], 2, 0.5, "two blocks of two: one right, one wrong"),
        ([0, 1, 1, 1], 2, 0.25, "the first block ties"),
        ([0, 0, 1], 2, 1.0, "an incomplete last block is left out"),
        ([0, 1, 0, 1], 1, 0.5, "maj@1 is avg"),
    ],
)
def test_majority_of_known_votes(votes, k, earned, why):
    right = np.array([[True, False, False]])
    assert majority(np.array([votes]), right, k)[0] == pytest.approx(earned), why


def test_majority_equals_counting_one_by_one():
    random = np.random.default_rng(6)
    votes, right = random.integers(-1, 4, (50, 8)), random.random((50, 4)) < 0.5
    for k in (1, 2, 4, 8):
        slow = []
        for row, is_right in zip(votes.tolist(), right, strict=True):
            blocks = []
            for start in range(0, 8 - k + 1, k):
                cast = [vote for vote in row[start : start + k] if vote >= 0]
                top = max((cast.count(vote) for vote in cast), default=0)
                leaders = {vote for vote in cast if cast.count(vote) == top}
                blocks.append(np.mean([is_right[vote] for vote in leaders]) if leaders else 0.0)
            slow.append(np.mean(blocks))
        assert majority(votes, right, k) == pytest.approx(slow)


def test_votes_are_counted_on_the_normal_form():
    group = [
        response("p", 0, "right", "0.5"),
        response("p", 1, "right", r"\frac{1}{2}"),
        response("p", 2, "wrong", "7"),
        response("p", 3, "no answer", None),
        response("p", 4, "wrong", "7.0"),
        response("p", 5, "right", r"\dfrac12"),
    ]
    votes, right = count_votes([group])
    assert votes.tolist() == [[0, 0, 1, -1, 1, 0]] and right.tolist() == [[True, False]]
    assert majority(votes, right, 6)[0] == 1.0  # as written, "7" and "7.0" would tie with each of the three halves


# ----------------------------------------------------------------------------------------------------- groupings


def test_difficulties_are_labels_or_quartiles():
    def problems(difficulties):
        return [Problem(str(i), "?", ("1",), difficulty=d) for i, d in enumerate(difficulties)]

    assert difficulty_groups(problems([5.0, 2.0, None, 2.5])) == ["5", "2", "", "2.5"]
    labels = difficulty_groups(problems([i / 100 for i in range(101)]))
    assert sorted(labels.count(label) for label in set(labels)) == [25, 25, 25, 26]
    assert labels[0] == "0 to 0.25" and labels[100] == "0.75 to 1"
    assert list(accuracy_by(["10", "9", "", "10"], [1, 0, 1, 0])) == ["9", "10"]
    assert list(accuracy_by(["² x", "b", "0.5 to 1", "0 to 0.5"], [1, 0, 1, 0])) == ["0 to 0.5", "0.5 to 1", "b", "² x"]
    grouped = accuracy_by(["b", "a", "b"], [1.0, 0.5, 0.0])
    assert {label: (group.avg, group.problems) for label, group in grouped.items()} == {"a": (0.5, 1), "b": (0.5, 2)}
    assert (grouped["b"].low, grouped["b"].high) == interval([1.0, 0.0])


@pytest.mark.parametrize("low, high, step, labels", [
    (800, 1600, 7, ["800 to 999.5", "999.5 to 1,199", "1,199 to 1,398.5", "1,398.5 to 1,598"]),
    (1161, 1165, 0.25, ["1,161 to 1,161.94", "1,161.94 to 1,162.88", "1,162.88 to 1,163.81", "1,163.81 to 1,164.75"]),
])  # fmt: skip
def test_quartiles_of_large_difficulties_are_told_apart_and_in_order(low, high, step, labels):
    """Guards: of Elo ratings "1.16e+03 to 1.16e+03" several times, as one group, before "800 to 999"."""
    problems = [Problem(str(d), "?", ("1",), difficulty=d) for d in np.arange(low, high, step)[::-1]]
    found = summarise("set", problems, [[response(p.id, 0, "right", "1")] for p in problems], 1.0, 9)
    assert list(found.by_difficulty) == labels
    few = [Problem(str(d), "?", ("1",), difficulty=d) for d in (1000, 900, 1e6)]
    found = summarise("set", few, [[response(p.id, 0, "right", "1")] for p in few], 1.0, 9)
    assert list(found.by_difficulty) == ["900", "1,000", "1e+06"]


def test_accuracy_by_length_of_known_responses():
    groups = [
        [response("a", 0, "right", "1", tokens=10), response("a", 1, "wrong", "2", tokens=30)],
        [response("b", 0, "wrong", "1", tokens=25), response("b", 1, "right", "2", tokens=101)],
        [response("c", 0, "right", "1", tokens=20), response("c", 1, "right", "1", tokens=100)],
    ]
    bands = length_bands(groups, trained_length=100)
    assert [(b.above, b.up_to, b.responses, b.accuracy) for b in bands] == [
        (0, 25, 3, pytest.approx(2 / 3)),
        (25, 50, 1, 0.0),
        (50, 100, 1, 1.0),
        (100, None, 1, 1.0),
    ]
    # the first band: residuals 1 - 2/3, 0 - 2/3, 1 - 2/3 of the ratio over three problems, of which each is one trial
    # with the variance of one more problem, 2/9: Wilson's bounds solve (p - 2/3)^2 = t^2 p (1 - p) / trials
    trials = 2 / 9 / ((1 / 9 + 4 / 9 + 1 / 9) / 9 + 2 / 9 / 9)
    for bound in (bands[0].low, bands[0].high):
        assert (bound - 2 / 3) ** 2 == pytest.approx(4.302653**2 * bound * (1 - bound) / trials)
    assert (bands[3].low, bands[3].high) == (0.0, 1.0)  # one problem


def test_the_interval_of_a_length_band_is_a_bootstrap_over_problems():
    random = np.random.default_rng(7)
    groups = []
    for i in range(150):
        chance, length = random.random(), random.integers(20, 180)
        tokens = np.maximum(1, random.normal(length, 25, 8)).astype(int)
        right = random.random(8) < chance
        groups.append([response(str(i), j, "right" if r else "wrong", "1", tokens=int(t))
                       for j, (r, t) in enumerate(zip(right, tokens, strict=True))])  # fmt: skip
    inside = np.array([[50 < r.tokens <= 100 for r in group] for group in groups])
    right = np.array([[r.correct for r in group] for group in groups]) & inside
    draws = random.integers(0, 150, (4000, 150))
    ratios = right.sum(1)[draws].sum(1) / inside.sum(1)[draws].sum(1)
    band = length_bands(groups, 100)[2]
    assert [band.low, band.high] == pytest.approx(np.quantile(ratios, [0.025, 0.975]).tolist(), abs=0.015)


# ----------------------------------------------------------------------------------------------------- all metrics


def test_metrics_of_known_responses():
    problems = [Problem("p/a", "?", ("1",), "algebra", 1.0), Problem("p/b", "?", ("2",), "geometry", 2.0),
                Problem("p/c", "?", ("3",), "algebra", 2.0), Problem("p/d", "?", ())]  # fmt: skip
    groups = [
        [response("p/a", 0, "right", "1", "a b c d", 4), response("p/a", 1, "right", "1", "a b c d", 6)],
        [response("p/b", 0, "right", "2", "a b c d e", 10), response("p/b", 1, "wrong", "7", "short", 2)],
        [response("p/c", 0, "no answer", None, "", 30, "length"), response("p/c", 1, "wrong", "4", "x", 8)],
        [response("p/d", 0, "timed out", "5", "", 1), response("p/d", 1, "grader failed", "6", "", 3, "length")],
    ]
    found = summarise("four", problems, groups, 0.7, trained_length=40)
    assert (found.name, found.problems, found.n, found.temperature) == ("four", 4, 2, 0.7)
    assert found.avg == (1 + 0.5 + 0 + 0) / 4 and (found.low, found.high) == interval([1, 0.5, 0, 0])
    assert found.pass_at["1"].value == found.avg and found.pass_at["2"].value == 0.5
    assert found.maj_at["1"].value == found.avg and found.maj_at["2"].value == (1 + 0.5 + 0 + 0) / 4
    assert (found.pass_at["2"].low, found.pass_at["2"].high) == interval([1, 1, 0, 0])
    # a problem without a type is in no group
    assert {label: group.avg for label, group in found.by_type.items()} == {"algebra": 0.5, "geometry": 0.5}
    assert {label: group.avg for label, group in found.by_difficulty.items()} == {"1": 1.0, "2": 0.25}
    assert [band.responses for band in found.by_length] == [7, 0, 1, 0]
    assert found.length_mean == 64 / 8 and found.tokens == 64 and found.truncated_share == 2 / 8
    assert found.no_box_share == 1 / 8
    assert found.distinct4 == (1 / 2 + 2 / 2) / 2  # the two problems that have a 4-gram
    assert found.verdicts == {"right": 3, "wrong": 2, "no answer": 1, "timed out": 1, "grader failed": 1}
    assert found.unanswerable == 1 and found.tokens_per_s is None
    assert found.pass_at["2"].resampled_low < found.pass_at["2"].value < found.pass_at["2"].resampled_high


def test_rewards_that_read_no_box_have_no_majority():
    """Guards: maj@k was 0.0 beside a pass@k of 1. Without a right response it is 0 and said to be."""
    for verdict, ks in (("right", []), ("no answer", ["1", "2"])):
        groups = [[response("p", i, verdict, None) for i in range(2)]]
        found = summarise("set", [Problem("p", "?", ("1",))], groups, 1.0, 9)
        assert list(found.maj_at) == ks and list(found.pass_at) == ["1", "2"]
        shown = [row[0] for row in k_table(found)]
        assert shown == ["", "pass@1", "pass@2", *(f"maj@{k}" for k in ks)]
        assert k_chart(found)[0] == "pass@k" + " and maj@k" * bool(ks)


def test_equal_votes_have_a_resampled_interval_of_the_majority():
    """Guards: the mean of three problems is rounded, and the spread of 400 such means was 1e-16, not 0."""
    groups = [[response(str(p), i, "right" if p else "wrong", "1") for i in range(4)] for p in range(3)]
    found = summarise("set", [Problem(str(p), "?", ("1",)) for p in range(3)], groups, 1.0, 9).maj_at["2"]
    assert found.value == pytest.approx(2 / 3) and found.resampled_low < 0.6 < 0.7 < found.resampled_high


def test_one_response_each_has_no_resampling_interval_and_no_diversity():
    found = summarise("short", [Problem("p", "?", ("1",))], [[response("p", 0, "wrong", "2", "one two three")]], 1.0, 9)
    assert found.distinct4 is None and (found.low, found.high) == (0.0, 1.0)
    assert found.pass_at["1"].resampled_low is None and found.maj_at["1"].resampled_high is None


def test_a_missing_response_is_an_error():
    groups = [[response("a", 0, "right", "1")], []]
    with pytest.raises(ValueError, match="2 problems do not all have 1 responses"):
        summarise("gap", [Problem("a", "?", ("1",)), Problem("b", "?", ("1",))], groups, 1.0, 9)


# --------------------------------------------------------------------------------------------------- comparison


def test_comparison_of_known_accuracies():
    a = {"p": 0.0, "q": 0.5, "r": 1.0, "s": 0.5, "only a": 1.0}
    b = {"p": 0.5, "q": 1.0, "r": 1.0, "s": 0.25, "only b": 0.0, "more": 0.0}
    found = compare("set", a, b)
    moved = np.array([0.5, 0.5, 0.0, -0.25])
    half = 3.182446 * moved.std(ddof=1) / 2
    assert (found.problems, found.up, found.down, found.same, found.only_a, found.only_b) == (4, 2, 1, 1, 1, 2)
    assert (found.avg_a, found.avg_b, found.difference) == (0.5, 0.6875, 0.1875)
    assert (found.low, found.high) == (pytest.approx(0.1875 - half), pytest.approx(0.1875 + half))


def test_a_paired_difference_is_a_bootstrap_over_problems_and_narrower_than_two_intervals():
    random = np.random.default_rng(8)
    chances = random.beta(0.6, 0.6, 100)
    a, b = (
        {str(i): float(x) for i, x in enumerate(random.binomial(8, np.clip(chances + d, 0, 1)) / 8)} for d in (0, 0.1)
    )
    moved = np.array([b[key] - a[key] for key in a])
    means = moved[random.integers(0, 100, (8000, 100))].mean(1)
    found = compare("set", a, b)
    assert [found.low, found.high] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=0.006)
    apart = sum(high - low for low, high in (interval(list(m.values())) for m in (a, b)))
    assert found.high - found.low < apart / 2


def test_equal_accuracies_have_an_interval_and_disjoint_problems_are_an_error():
    same = {str(i): 0.5 for i in range(30)}
    found = compare("set", same, same)
    assert (found.difference, found.low, found.high, found.same) == (0.0, -0.1, 0.1, 30)
    with pytest.raises(DataError, match="no problem in common"):
        compare("set", {"a": 1.0}, {"b": 1.0})


def test_fishers_test_counts_the_ways_to_label_the_responses():
    """The oracle: of all ways to choose which responses are A's, those that are at most as likely as the one seen."""
    cases = [(0, 3, 3, 3), (1, 4, 3, 3), (2, 2, 1, 5), (3, 5, 0, 3), (0, 4, 0, 4), (2, 4, 2, 4)]
    for right_a, n_a, right_b, n_b in cases:
        responses = [1] * (right_a + right_b) + [0] * (n_a + n_b - right_a - right_b)
        seen = [sum(chosen) for chosen in itertools.combinations(responses, n_a)]
        ways = Counter(seen)
        expected = sum(ways[count] for count in ways if ways[count] <= ways[right_a]) / len(seen)
        assert fisher_p(right_a, n_a, right_b, n_b) == pytest.approx(expected)
    assert fisher_p(3, 4, 1, 4) == pytest.approx(34 / 70)  # Fisher's lady tasting tea, two-sided


def test_moved_problems_are_those_of_benjamini_and_hochberg(monkeypatch):
    """The example of their paper, section 3.2: of 15 tests, 4 are rejected at 5%; Bonferroni rejects 3."""
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240]
    p += [0.4262, 0.5719, 0.6528, 0.7590, 1.0000]
    monkeypatch.setattr(scores, "fisher_p", lambda right_a, n_a, right_b, n_b: p[right_a])
    a = {f"p{i}": [True] * i + [False] * (15 - i) for i in range(15)}
    shuffled = dict(reversed(a.items()))
    assert moved_problems(shuffled, a | {"only B": [True]}) == ["p0", "p1", "p2", "p3"]


def test_problems_move_only_beyond_noise():
    random = np.random.default_rng(0)
    same = [{f"{i}": random.random(8) < i / 200 for i in range(200)} for _ in range(2)]
    assert moved_problems(*same) == []
    better = same[1] | {"3": np.ones(8, dtype=bool), "199": np.zeros(8, dtype=bool)}
    assert set(moved_problems(same[0], better)) == {"3", "199"}
    assert moved_problems({"a": [False]}, {"a": [True]}) == []  # one response says nothing


def test_the_interval_over_runs_is_students():
    assert mean_over_runs([0.5]) == (0.5, None)
    mean, half = mean_over_runs([0.4, 0.5, 0.6])
    assert (mean, half) == pytest.approx((0.5, 4.302653 * 0.1 / math.sqrt(3)), rel=1e-5)
