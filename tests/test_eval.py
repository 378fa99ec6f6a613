"""eval.py: graded responses, avg@k and pass@k with their intervals, distinct-4, temperature zones and search."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from eval import (
    Response,
    TemperaturePoint,
    distinct_ngrams,
    distinct_share,
    evaluate,
    find_zones,
    half_width,
    has_collapsed,
    interval,
    match_diversity,
    measure_temperature,
    pass_at,
    pool_adjacent_violators,
    student_95,
)
from lab.problems import Problem
from reward import Grade

Z = 1.959964
PROBLEMS = [Problem(str(i), "?", ("1",)) for i in range(400)]


class Model:
    """Responds with a given accuracy and diversity at each temperature, and records the calls."""

    def __init__(self, accuracy=lambda t: 0.5, diversity=lambda t: 0.5, spread=0.0):
        self.accuracy, self.diversity, self.spread = accuracy, diversity, spread
        self.asked = []

    def __call__(self, problems, temperature):
        self.asked.append((temperature, len(problems)))
        return [self.group(problem, temperature) for problem in problems]

    def group(self, problem, temperature):
        random = np.random.default_rng(int(problem.id))
        share = self.diversity(temperature)
        words = "a b c"
        if share is not None:  # 100 four-grams, `distinct` of them distinct
            distinct = int(np.clip(round(100 * (share + self.spread * random.normal())), 1, 100))
            words = " ".join(["x"] * (104 - distinct) + [f"y{i}" for i in range(distinct - 1)])
        right = random.random(8) < self.accuracy(temperature)
        verdicts = ["right" if r else "wrong" for r in right]
        texts = [words] + [""] * 7
        return [
            Response("s", problem.id, i, 1, "stop", v, "1", t)
            for i, (v, t) in enumerate(zip(verdicts, texts, strict=True))
        ]


def test_evaluate_converts_every_attempt():
    class Sampled:
        def attempt(self, problems, n, sampling, label):
            assert (sampling, label) == ("sampling", "set, step 3")
            return [[self.one(problem.id, i) for i in range(n)] for problem in problems], "work"

        def one(self, problem_id, i):
            rollout = SimpleNamespace(problem_id=problem_id, index=i, tokens=[7] * (i + 1), finish_reason="length")
            return SimpleNamespace(rollout=rollout, grade=Grade("right", 1.0, 1.0, 0.0, "5"), text="five")

    groups = evaluate(Sampled(), "set", PROBLEMS[:2], 2, "sampling", "set, step 3")
    places = [[(response.problem_id, response.sample) for response in group] for group in groups]
    assert places == [[("0", 0), ("0", 1)], [("1", 0), ("1", 1)]]
    assert groups[1][1] == Response("set", "1", 1, 2, "length", "right", "5", "five") and groups[1][1].correct


# ------------------------------------------------------------------------------------------------ avg@k, pass@k


def test_students_quantiles_are_the_textbooks():
    closed = {1: math.tan(0.475 * math.pi), 2: 0.95 * math.sqrt(2 / (1 - 0.95**2))}
    tables = {3: 3.182446, 5: 2.570582, 10: 2.228139, 29: 2.045230, 30: 2.042272, 100: 1.983972, 10**6: 1.959966}
    for freedom, quantile in (closed | tables).items():
        assert student_95(freedom) == pytest.approx(quantile, rel=2e-5)


def test_interval_of_known_values():
    """Wilson's bounds solve (p - mean)^2 = t^2 p (1 - p) / trials, where the mean is 0.5 in both."""
    # a variance of 0.5^2, with one more problem's 0.5^2 still that: of the mean, as of 3 trials
    # squares 0.01, 0, 0.01, 0 and 0.25 for one more: 0.27 / 4 over 4 x 4 / 3 problems
    cases = [([0.0, 0.5, 1.0], 3, 4.302653), ([0.4, 0.5, 0.6, 0.5], 0.25 / (0.02 / 16 + 0.25 / 16), 3.182446)]
    for means, trials, t in cases:
        half = math.sqrt(0.25 / (1 + trials / t**2))
        assert interval(means) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))


def test_one_problem_has_the_full_interval():
    assert interval([0.75]) == (0.0, 1.0)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.25])
def test_equal_scores_have_wilsons_interval(value):
    """Guards: an interval of no width. Wilson's bound solves (p - value)^2 = z^2 p (1 - p) / problems."""
    low, high = interval([value] * 30)
    assert low <= value <= high and high - low > 0.05
    for bound in (low, high):
        if 0 < bound < 1:
            assert (bound - value) ** 2 == pytest.approx(Z**2 * bound * (1 - bound) / 30)


def answers_of(random, problems, n):
    """Return correctness (P, n), correlated within a problem since problems differ in difficulty."""
    return random.random((problems, n)) < random.beta(0.6, 0.6, size=(problems, 1))


def test_the_interval_is_a_bootstrap_over_problems():
    random = np.random.default_rng(1)
    right = answers_of(random, 60, 8)
    draws = random.integers(0, 60, (8000, 60))  # problems with all their answers
    means = right[draws].mean(axis=(1, 2))
    low, high = interval(right.mean(axis=1))
    width = 2 * Z * means.std() * math.sqrt(60 / 59)
    assert high - low == pytest.approx(width, rel=0.04)
    assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=0.01)
    independent = 2 * Z * math.sqrt(right.mean() * (1 - right.mean()) / right.size)
    assert high - low > 1.5 * independent  # the width if answers were independent


@pytest.mark.parametrize("k", [2, 4])
def test_the_interval_of_pass_at_k_is_a_bootstrap_over_problems(k):
    random = np.random.default_rng(4)
    values = pass_at(answers_of(random, 80, 8).sum(1), 8, k)
    means = values[random.integers(0, 80, (8000, 80))].mean(1)
    low, high = interval(values)
    assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=0.012)


def test_the_interval_covers_the_truth_in_95_percent_of_trials():
    random = np.random.default_rng(2)
    held = 0
    for _ in range(2000):
        low, high = interval(answers_of(random, 60, 8).mean(axis=1))
        held += low <= 0.5 <= high
    assert abs(held / 2000 - 0.95) < 0.02  # 4 standard errors of 2,000 trials, plus the normal approximation


@pytest.mark.parametrize("a, b", [(0.6, 0.6), (1, 1), (5, 5), (0.3, 1), (1, 9), (0.2, 2)])
def test_intervals_over_30_problems_cover_the_truth_in_94_percent_of_trials(a, b):
    """Guards: normal quantiles, which covered 0.90 to 0.94. Chances are Beta(a, b); 5 standard errors are 0.011."""
    random, held, paired = np.random.default_rng(11), 0, 0
    for n in (1, 4, 8, 32):
        chances = random.beta(a, b, (2500, 30))
        one, two = (random.binomial(n, chances) / n for _ in range(2))
        bounds = np.array([interval(means) for means in one])
        held += np.mean((bounds[:, 0] <= a / (a + b)) & (a / (a + b) <= bounds[:, 1])) / 4
        paired += np.mean([abs(moved.mean()) <= half_width(moved) for moved in two - one]) / 4
    assert held > 0.94 and paired > 0.94


def test_half_width_of_known_values():
    assert half_width([0.0, 0.5, 1.0, 0.5]) == pytest.approx(3.182446 * math.sqrt(0.5 / 3) / 2)
    assert half_width([0.5] * 30) == 0.1 and half_width([0.5]) == half_width([]) == 1.0


def test_pass_at_k_is_the_mean_over_all_subsets():
    random = np.random.default_rng(5)
    for n in (1, 2, 5, 8):
        right = random.random((6, n)) < 0.4
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(range(n), k))
            brute = [np.mean([row[list(subset)].any() for subset in subsets]) for row in right]
            assert pass_at(right.sum(1), n, k) == pytest.approx(brute)


# ---------------------------------------------------------------------------------------------------- distinct-4


@pytest.mark.parametrize(
    "texts_by_problem, score, left_out",
    [
        ([["a b c d"]], 1.0, 0),
        ([["a b c d", "a b c d"]], 1 / 2, 0),
        ([["a b c d e", "a b c d f"]], 3 / 4, 0),  # abcd bcde abcd bcdf
        ([["a a a a a a a"]], 1 / 4, 0),
        ([["a b c d", "too short here"]], 1.0, 0),  # a rollout of fewer than four tokens adds nothing
        ([["a b c d", "a b c d"], ["no", "grams at all", ""]], 1 / 2, 1),  # a problem without a 4-gram is left out
        ([["a b c d", "a b c d"], ["a b c d"]], 3 / 4, 0),  # the mean over problems, not over n-grams
        ([["a  b\tc\nd"], ["a b c d", "a b c d"]], 3 / 4, 0),  # whitespace of any kind; problems share nothing
        ([["a b c"]], None, 1),
        ([], None, 0),
    ],
)
def test_distinct_4_of_known_texts(texts_by_problem, score, left_out):
    found, out = distinct_ngrams(texts_by_problem)
    assert found == (None if score is None else pytest.approx(score)) and out == left_out


def test_distinct_ngrams_of_another_length():
    assert distinct_ngrams([["a b a b a"]], n=2) == (pytest.approx(2 / 4), 0)


# ------------------------------------------------------------------------------------------------- one temperature


def test_without_a_margin_every_problem_is_sampled_once():
    model = Model(diversity=lambda t: 0.25)
    point = measure_temperature(model, PROBLEMS[:50], 1.2)
    assert model.asked == [(1.2, 50)] and point.problems == 50
    assert point.distinct4 == pytest.approx(0.25) and 0.4 < point.accuracy < 0.6


def test_a_margin_samples_until_both_intervals_are_within_it():
    model = Model(spread=0.2)
    point = measure_temperature(model, PROBLEMS, 1.0, margin=0.05)
    assert 0 < point.problems < 400 and max(point.accuracy_half, point.distinct4_half) <= 0.05
    taken = list(itertools.accumulate(count for _, count in model.asked))
    assert taken == [32 * 2**i for i in range(len(taken))]
    before = measure_temperature(Model(spread=0.2), PROBLEMS[: taken[-2]], 1.0)
    assert max(before.accuracy_half, before.distinct4_half) > 0.05  # one round fewer was not enough
    assert point.distinct4_half == pytest.approx(1.959964 * 0.2 / point.problems**0.5, rel=0.25)
    wide = measure_temperature(Model(spread=0.2), PROBLEMS, 1.0, margin=0.2)
    assert wide.problems == 32
    assert measure_temperature(Model(spread=0.2), PROBLEMS, 1.0, margin=0.001).problems == 400


def test_a_target_outside_the_interval_is_decided_early():
    model = Model(diversity=lambda t: 0.3, spread=0.1)
    assert measure_temperature(model, PROBLEMS, 1.0, margin=0.001, target=0.8).problems == 32
    assert measure_temperature(model, PROBLEMS, 1.0, margin=0.001, target=0.3).problems == 400


def test_equal_accuracies_do_not_end_the_measurement():
    """Guards: 32 problems without a right answer gave "0.0 +-0.0", which ended the measurement."""
    point = measure_temperature(Model(accuracy=lambda t: 0.0, diversity=lambda t: 0.3), PROBLEMS, 1.0, margin=0.03)
    assert point.problems > 32 and 0 < point.accuracy_half <= 0.03


def test_a_target_per_problem_is_a_paired_comparison():
    """Problems differ much, temperatures little: pairs tell them apart, means of a few problems do not."""
    before = Model(diversity=lambda t: 0.3, spread=0.2)
    target = {problem.id: distinct_share([r.text for r in before.group(problem, 1.0)]) for problem in PROBLEMS}
    now = Model(diversity=lambda t: 0.3 * t, spread=0.2)
    chosen, curve = match_diversity(now, PROBLEMS, target, 0.9, margin=0.005, say=print)
    assert chosen == 1.0 and [point.temperature for point in curve] == [0.9, 0.95, 1.0]
    assert sum(count for _, count in now.asked) < 0.4 * 3 * 400
    for point in curve:
        assert point.target == pytest.approx(np.mean([target[p.id] for p in PROBLEMS[: point.problems]]))
    # the first problems are more diverse than the rest, in both: the mean over all problems would mislead
    ordered = sorted(PROBLEMS, key=lambda problem: -target[problem.id])
    assert match_diversity(Model(diversity=lambda t: 0.3 * t, spread=0.2), ordered, target, 0.9, margin=0.005)[0] == 1.0


# -------------------------------------------------------------------------------------------------------- the search


def search(diversity, start, target, **settings):
    said, model = [], Model(diversity=diversity)
    chosen, curve = match_diversity(model, PROBLEMS[:4], target, start, say=said.append, **settings)
    measured = [temperature for temperature, _ in model.asked]
    assert [point.temperature for point in curve] == measured
    return chosen, measured, said


def test_the_search_takes_the_first_temperature_that_restores_diversity():
    chosen, measured, said = search(lambda t: t / 2, 1.0, 0.62)
    assert (chosen, measured, said) == (1.25, [1.0, 1.05, 1.1, 1.15, 1.2, 1.25], [])


def test_reaching_the_target_exactly_is_enough():
    assert search(lambda t: {1.4: 0.5, 1.45: 0.6, 1.5: 0.7}[t], 1.4, 0.6)[:2] == (1.45, [1.4, 1.45])


def test_the_search_never_goes_below_its_start():
    assert search(lambda t: 0.9, 1.4, 0.1)[:2] == (1.4, [1.4])


def test_the_step_and_the_end_are_parameters():
    chosen, measured, _ = search(lambda t: t / 2, 0.7, 5.0, step=0.1, most=1.0)
    assert (chosen, measured) == (1.0, [0.7, 0.8, 0.9, 1.0])
    assert search(lambda t: t / 2, 0.7, 5.0, step=0.2, most=1.0)[1] == [0.7, 0.9]  # never beyond the end


def test_the_search_falls_back_on_the_most_diverse():
    curve = {1.0: 0.3, 1.05: 0.5, 1.1: None, 1.15: 0.4}
    chosen, measured, said = search(curve.get, 1.0, 0.8, most=1.15)
    assert (chosen, measured) == (1.05, [1.0, 1.05, 1.1, 1.15])
    assert said == ["warning: no temperature up to 1.15 restores distinct-4 = 0.800; continuing with 1.05 (0.500)"]


def test_a_start_beyond_the_end_is_measured():
    """Guards: a stage above search.most measured nothing, and the search failed."""
    chosen, measured, said = search(lambda t: 0.4, 1.6, 0.5, most=1.5)
    assert (chosen, measured, len(said)) == (1.6, [1.6], 1)


def falling(t):
    """Accuracy 0.5 up to 1.1; a tenth of it is lost at 1.15, half at 1.2, all from 1.25 on."""
    return 0.5 * float(np.interp(t, [1.1, 1.15, 1.2, 1.25], [1.0, 0.9, 0.5, 0.0]))


def test_the_search_ends_where_accuracy_collapses():
    model, said = Model(falling, lambda t: t / 2), []
    chosen, curve = match_diversity(model, PROBLEMS[:64], 0.62, 1.0, say=said.append)
    measured = [point.temperature for point in curve]
    assert measured == [1.0, 1.05, 1.1, 1.15, 1.2] and chosen == 1.15  # 1.25 would restore it: gibberish is diverse
    accuracy = curve[-1].accuracy
    assert accuracy < 0.75 * curve[0].accuracy < curve[-2].accuracy
    assert said == [
        f"warning: no temperature below 1.2, where accuracy has collapsed ({accuracy:.3f}), restores "
        "distinct-4 = 0.620; continuing with 1.15 (0.570)"
    ]


def test_a_collapsed_temperature_is_not_chosen():
    model, said = Model(lambda t: 0.9 if t < 1.05 else 0.1, lambda t: 0.3 if t < 1.05 else 0.99), []
    assert match_diversity(model, PROBLEMS[:32], 0.5, 1.0, say=said.append)[0] == 1.0 and len(said) == 1


def test_a_few_unlucky_rollouts_are_not_a_collapse():
    """8 problems of 2 rollouts: 3 right of 16, then 1; a model that solves none cannot collapse."""

    def point(right):
        accuracies = tuple(count / 2 for count in right)
        return TemperaturePoint(1.0, float(np.mean(accuracies)), 0.5, len(accuracies), accuracies=accuracies)

    first, unlucky = point([1, 1, 1, 0, 0, 0, 0, 0]), point([0, 0, 1, 0, 0, 0, 0, 0])
    assert not has_collapsed(unlucky, first) and not has_collapsed(point([0] * 8), point([0] * 8))
    # 0 - 0.75 x 0.5 = -0.375 on all 64 problems; equal values have the half width 3/64: below 0
    assert has_collapsed(point([0] * 64), point([1] * 64)) and not has_collapsed(first, first)
    assert not has_collapsed(point([0] * 4), point([1] * 4))  # the half width of 4 equal values is 3/4


def test_without_any_4_gram_the_search_keeps_its_start():
    assert search(lambda t: None, 1.0, 0.5, most=1.1)[0] == 1.0


def test_a_margin_finds_the_same_temperature_with_fewer_samples():
    exact = Model(diversity=lambda t: 0.3 * t, spread=0.05)
    careful = match_diversity(exact, PROBLEMS, 0.443, 1.0, say=print)[0]
    quick = Model(diversity=lambda t: 0.3 * t, spread=0.05)
    assert match_diversity(quick, PROBLEMS, 0.443, 1.0, margin=0.01, say=print)[0] == careful == 1.5
    assert sum(count for _, count in quick.asked) < 0.4 * sum(count for _, count in exact.asked)


# --------------------------------------------------------------------------------------------------------- the zones


def curve(accuracies, start=0.6, step=0.1):
    return [TemperaturePoint(round(start + i * step, 6), a, 0.5) for i, a in enumerate(accuracies)]


def test_pool_adjacent_violators_is_the_nearest_non_increasing_sequence():
    random = np.random.default_rng(0)
    assert pool_adjacent_violators([3, 1, 2, 0]) == [3, 1.5, 1.5, 0]
    grid = np.linspace(0, 1, 11)
    for _ in range(20):
        values = random.choice(grid, 4)
        candidates = [
            c
            for c in itertools.product(np.linspace(0, 1, 11), repeat=4)
            if all(a >= b for a, b in itertools.pairwise(c))
        ]
        best = min(((np.array(c) - values) ** 2).sum() for c in candidates)
        fitted = np.array(pool_adjacent_violators(values))
        assert (np.diff(fitted) <= 1e-12).all() and ((fitted - values) ** 2).sum() <= best + 1e-9


def test_the_three_zones_of_the_recipes_model():
    """Qwen3-4B on AIME24: flat from 0.6 to 1.4, a sag until 1.55, then the collapse."""
    points = curve([0.74, 0.73, 0.74, 0.745, 0.735, 0.74, 0.74, 0.74, 0.73, 0.66, 0.30, 0.02])
    zones = find_zones(points)
    assert zones.plateau == pytest.approx(0.74, abs=0.005)
    assert zones.robust_end == pytest.approx(1.44, abs=0.02) and zones.start == 1.45
    assert 1.5 < zones.exploration_end < 1.6


def test_zone_borders_are_interpolated():
    zones = find_zones(curve([0.8, 0.8, 0.7], start=1.0))
    assert zones.robust_end == pytest.approx(1.1 + 0.1 * 0.04 / 0.1) and zones.exploration_end is None
    assert find_zones(curve([0.8, 0.8, 0.4], start=1.0)).exploration_end == pytest.approx(1.1 + 0.1 * 0.2 / 0.4)
    assert find_zones(list(reversed(curve([0.8, 0.8, 0.7], start=1.0)))) == zones


def test_a_flat_curve_starts_at_its_end():
    zones = find_zones(curve([0.5, 0.52, 0.49, 0.51]))
    assert (zones.robust_end, zones.exploration_end, zones.start) == (None, None, 0.9)


def test_the_interval_of_the_start_widens_with_noise():
    def measured(problems):
        random = np.random.default_rng(1)
        chances = random.beta(1.2, 1.0, problems)
        factors = [1.0, 1.0, 1.0, 1.0, 0.97, 0.85, 0.4]
        points = []
        for i, factor in enumerate(factors):
            right = tuple((random.binomial(8, chances * factor) / 8).tolist())
            temperature, mean = round(1.0 + i * 0.1, 6), float(np.mean(right))
            points.append(TemperaturePoint(temperature, mean, 0.5, problems, accuracies=right))
        return find_zones(points)

    few, many = measured(30), measured(3000)
    assert many.start_low <= many.start <= many.start_high and few.start_low <= few.start <= few.start_high
    assert many.start == pytest.approx(1.4, abs=0.051)
    assert many.start_high - many.start_low < 0.11 < few.start_high - few.start_low


def test_zones_have_no_interval_where_the_problems_measured_throughout_are_never_solved():
    never, late = (0.0,) * 4, (0.0,) * 4 + (1.0,) * 4  # one temperature ended its measurement after four problems
    points = [TemperaturePoint(1.0, 0.5, 0.5, 8, accuracies=late), TemperaturePoint(1.1, 0.0, 0.5, 4, accuracies=never)]
    zones = find_zones(points)
    assert zones.start is not None and zones.start_low is None and zones.start_high is None


def test_a_curve_of_zeros_has_no_zones():
    with pytest.raises(ValueError, match="accuracy is 0 at every temperature"):
        find_zones(curve([0.0, 0.0]))
