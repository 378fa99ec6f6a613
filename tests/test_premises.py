"""lab/premises.py: predictions against exact probabilities and the run's own rules, with chances it does not see."""

import math
from dataclasses import replace

import numpy as np
import pytest

from data_filter import DataOrder, History, Visit, drop_easy, filter_mirrored_j
from grpo import Group, Sinks, substitute
from lab import premises
from lab.problems import Problem
from lab.recipe import FinalSettings, Recipe, RlStage, VariantSettings
from yarn import Rope


def stage_of(**settings):
    return RlStage(**({"steps": 20, "batch_problems": 24, "data": "d", "temperature": 1.0} | settings))


def recipe_of(*stages, **settings):
    return Recipe(name="r", model="m", stage=stages, **settings)


def file_of(counts, n=8, tokens=None, lengths=None):
    """A file of pass rates: problem i was solved counts[i] times in n, with tokens[i] tokens."""
    history = History()
    history.settings = {"n": n, "temperature": 1.0}
    for i, k in enumerate(counts):
        rewards = (1.0,) * int(k) + (0.0,) * int(n - k)
        visit = Visit(str(i), -0.5, 0, rewards, tokens[i] if tokens is not None else 80, lengths[i] if lengths else ())
        history.append(visit)
    return history


def all_stay(rates):
    return rates >= 0


def rows_of(found):
    return {mechanism: (figure, verdict) for mechanism, figure, verdict in found.table}


def foreseen(recipe, history, index=None, **options):
    return premises.expect(recipe, index, history, list(history.by_problem), **options)


# ---- against exact probabilities ------------------------------------------------------------------


@pytest.mark.parametrize("batch, known", [(8, 0.55), (24, 0.73), (128, 0.79)])
def test_the_rule_of_a_third_skips_as_often_as_the_binomial_says(batch, known):
    def share(p):
        return 1 - p**8 - (1 - p) ** 8

    low, high = 0.0, 0.5  # bisect for the chance with which 0.3 of the groups are informative
    for _ in range(60):
        low, high = ((low + high) / 2, high) if share((low + high) / 2) < 0.3 else (low, (low + high) / 2)
    exact = sum(math.comb(batch, k) * 0.3**k * 0.7 ** (batch - k) for k in range(batch // 3 + 1))
    assert round(exact, 2) == known  # RECIPE section 9
    steps, size = 4000, 20 * batch
    stage = stage_of(batch_problems=batch, rescue=False)
    played = premises.replay(
        stage, steps, all_stay, np.full(size, low), np.zeros((2, size)), np.zeros(size, bool), np.random.default_rng(1)
    )
    assert played["skipped"] / steps == pytest.approx(exact, abs=0.03)
    assert played["zero_variance"] == pytest.approx(0.7, abs=0.01)


def test_a_rarely_solved_problem_is_rescued_as_often_as_the_geometric_says():
    solved, visits, size = 1 - (1 - 0.01) ** 8, 12, 4000
    expected = sum((1 - solved) * (1 - (1 - solved) ** i) for i in range(visits)) * size
    stage = stage_of(batch_problems=size)
    chances, none, random = np.full(size, 0.01), np.zeros((2, size)), np.random.default_rng(2)
    played = premises.replay(stage, visits, all_stay, chances, none, none[0] > 0, random)
    assert played["rescued"] == pytest.approx(expected, rel=0.03)
    positive = solved * visits * size
    assert 5 < (positive + played["rescued"]) / positive < 6  # RECIPE section 9, at 12 visits


# ---- against the run's own rules -------------------------------------------------------------------


SHAPES = {
    "J": lambda u: u.beta(3, 0.5, 300),
    "mirrored J": lambda u: u.beta(0.5, 2.5, 300),
    "U, with a bump": lambda u: np.where(u.random(300) < 0.6, u.beta(0.3, 0.3, 300), 0.5),
    "half never solved": lambda u: np.where(u.random(300) < 0.5, 0.002, u.beta(1, 3, 300)),
}


def play_the_run(recipe, index, truth, history, seed):
    """Train on coins with the run's own order, rescue, substitution and drop."""
    stage, random = recipe.stage[index], np.random.default_rng(seed)
    problems = [Problem(str(i), "?", ("1",)) for i in range(len(truth))]
    problems = filter_mirrored_j(problems, history, stage.drop_at).kept
    order, sinks, seen = DataOrder(problems, stage.batch_problems, seed, index), Sinks(), dict.fromkeys(KEYS, 0)
    own = History()
    own.load_state_dict(history.state_dict())
    for step in range(stage.steps):
        groups = []
        for problem in order.batch(step * stage.batch_problems):
            right = random.random(stage.group_size) < truth[int(problem.id)]
            groups.append(Group(problem, [None] * stage.group_size, right.astype(float), right))
            own.append(Visit(problem.id, index, step, tuple(right.astype(float))))
        seen["zero_variance"] += sum(not group.informative for group in groups) / stage.batch_problems / stage.steps
        sinks.remember(groups)
        groups = sinks.rescue(groups, seed, step)
        seen["rescued"] += sum(group.rescued is not None for group in groups)
        seen["skipped"] += substitute(groups, seed, step, stage.informative_share).skip_update
    seen["dropped"] = len(drop_easy(problems, own, index, stage.drop_above, stage.drop_window).dropped)
    return seen


KEYS = ("zero_variance", "rescued", "skipped", "dropped")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stage_goes_as_predicted_from_eight_samples_a_problem(shape):
    recipe, random = recipe_of(stage_of(steps=30, filter_before=True), stage_of(data="")), np.random.default_rng(7)
    truth = SHAPES[shape](random)
    history = file_of(random.binomial(8, truth))
    found = foreseen(recipe, history).predicted
    seen = [play_the_run(recipe, 0, truth, history, seed) for seed in range(4)]
    for key, allowed in zip(KEYS, (0.04, 8, 1.5, 8), strict=True):
        mean, low, high = found[key]
        assert low <= mean <= high
        actual = np.mean([one[key] for one in seen])
        assert mean == pytest.approx(actual, abs=max(allowed, high - mean, mean - low)), key
        assert high - low < {"zero_variance": 0.15, "skipped": 12}.get(key, 70)  # so wide says nothing


@pytest.mark.parametrize("window, dropped", [("stage", 40), ("all", 10)])
def test_the_drop_counts_the_visits_of_its_window(window, dropped):
    stage, never = stage_of(steps=1, batch_problems=40, drop_window=window), np.zeros(30)
    known = np.stack([np.append(never, np.full(10, 7)), np.full(40, 8)])  # 8 of 16, or 15 of 16, after a visit of 8
    played = premises.replay(
        stage, 1, lambda rates: rates <= 0.9, np.ones(40), known, known[0] > 0, np.random.default_rng(0)
    )
    assert played["dropped"] == dropped
    history = file_of(known[0])
    for i in range(40):
        history.append(Visit(str(i), 0, 0, (1.0,) * 8))
    problems = [Problem(str(i), "?", ("1",)) for i in range(40)]
    assert len(drop_easy(problems, history, 0, 0.9, window).dropped) == dropped


def test_a_rate_of_eight_in_eight_is_no_certainty():
    random = np.random.default_rng(3)
    truth = np.full(400, 0.92)
    counts = random.binomial(8, truth)
    kept = counts < 8
    measured = np.mean((counts / 8) ** 8 + (1 - counts / 8) ** 8)  # as if the rates were the chances
    actual = np.mean(truth**8 + (1 - truth) ** 8)
    chances = premises.draw_chances(counts, np.full(400, 8), random)
    predicted, of_kept = (np.mean(some**8 + (1 - some) ** 8) for some in (chances, chances[:, kept]))
    assert abs(predicted - actual) < 0.03 < 0.05 < abs(measured - actual)
    assert of_kept == pytest.approx(actual, abs=0.05)  # not the low rates of those that failed once by chance


def test_a_problem_without_a_visit_is_as_hard_as_the_others():
    solved, samples = np.array([6] * 200 + [0] * 50), np.array([8] * 200 + [0] * 50)
    chances = premises.draw_chances(solved, samples, np.random.default_rng(0))
    assert chances[:, 200:].mean() == pytest.approx(0.75, abs=0.02)


# ---- the words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "always, wasted, planned, verdict",
    [
        (5, 1 / 148, 480 / 320, "no: it pays after 148.0 epochs, not 1.5"),
        (192, 1 / 3, 480 / 320, "no: it pays after 3.0 epochs, not 1.5"),
        (192, 1 / 3, 3.75, "yes"),
        (0, 0, 9.0, "no: it drops nothing"),
    ],
)
def test_a_filter_pays_after_one_over_the_wasted_share_of_epochs(always, wasted, planned, verdict):
    total, rest = 1_000_000, 320 - always
    tokens = [total * wasted / max(1, always)] * always + [total * (1 - wasted) / rest] * rest
    history = file_of([8] * always + [4] * rest, tokens=tokens)
    steps = round(planned * 320 / 24)
    figure, said = rows_of(foreseen(recipe_of(stage_of(steps=steps)), history))["filter"]
    assert figure == f"drops {always} of 320, {wasted:.1%} of tokens" and said == verdict


def test_estimating_with_more_samples_than_a_group_pays_later():
    history = file_of([32] * 8 + [16] * 8, n=32)
    assert "it pays after 8.0 epochs" in rows_of(foreseen(recipe_of(stage_of(steps=5)), history))["filter"][1]


def test_what_cannot_matter_is_said_with_its_reason():
    rows = rows_of(foreseen(recipe_of(stage_of(steps=10, rescue=False)), file_of([4] * 240)))
    assert rows["substitution"][1] == "no: nearly all have one"
    assert rows["rule of a third"] == ("skips 0 (0 to 0) of 10 updates", "no: enough have a signal")
    assert rows["rescue (off)"] == ("0 (0 to 0), at 1.0 visits a problem",
                                    "no: too few failures were solved before")  # fmt: skip
    assert rows["drop"][1] == "no: no later stage uses the rest"
    assert rows["clip-higher"] == ("1 update a batch", "no: it is on policy")
    assert "response limits" not in rows and "YaRN" not in rows


def test_what_can_matter_is_said():
    stages = stage_of(steps=100, variant=VariantSettings(optimizer_steps=4)), stage_of(data="")
    random = np.random.default_rng(0)
    found = foreseen(recipe_of(*stages), file_of(random.binomial(8, np.where(np.arange(240) < 200, 0.03, 0.97))))
    rows = rows_of(found)
    assert [rows[name][1] for name in ("substitution", "rule of a third", "rescue", "drop", "clip-higher")] == [
        "yes"
    ] * 5
    mean, low, high = found.predicted["skipped"]
    assert rows["rule of a third"][0] == f"skips {mean:.0f} ({low:.0f} to {high:.0f}) of 100 updates"


def test_limits_are_compared_with_the_measured_lengths():
    stages = stage_of(max_response_tokens=30), stage_of(max_response_tokens=50, data="")
    history = file_of([4, 4], lengths=[(10, 20, 30, 40, 20, 20, 20, 20), (10,) * 8])
    found = foreseen(recipe_of(*stages), history)
    assert rows_of(found)["response limits"] == ("12.5% reach 30, <=6.2% reach 50", "yes")
    assert found.predicted["truncated_share"][0] == 2 / 16
    longer = foreseen(recipe_of(stage_of(max_response_tokens=90)), file_of([4] * 20, lengths=[(9,) * 7 + (10,)] * 20))
    assert "truncated_share" not in longer.predicted  # nobody knows what goes on beyond the longest


def test_without_pass_rates_only_what_they_do_not_decide_is_said():
    once, often = stage_of(steps=10), stage_of(steps=100)
    depends = "pass rates decide: data_filter.py estimate"
    rows = rows_of(premises.expect(recipe_of(once), None, History(), [""] * 240))
    assert rows["rescue"] == ("1.0 visits a problem", "no: hardly a problem comes twice")
    assert rows["filter, substitution, drop"] == ("", depends)
    assert rows_of(premises.expect(recipe_of(often), None, History(), [""] * 240))["rescue"][1] == depends


@pytest.mark.parametrize(
    "rope, window, beta_fast, kept, verdict",
    [
        (Rope(1e6, 128), 65_536, 32.0, "27 of 64", "yes"),
        (Rope(1e4, 32), 128, 2.0, "5 of 16", "yes"),
        (Rope(1e4, 32), 128, 32.0, "1 of 16", "it harms: under a quarter, lower yarn_beta_fast"),
    ],
)
def test_the_pairs_that_yarn_leaves_alone_are_those_of_the_recipe(rope, window, beta_fast, kept, verdict):
    final = FinalSettings(data="d", yarn_original_window=window, yarn_beta_fast=beta_fast)
    found = premises.expect(recipe_of(stage_of(), final=final), None, History(), [], rope=rope)
    assert rows_of(found)["YaRN"] == (f"leaves {kept} pairs as they are", verdict)  # RECIPE section 9


def test_nothing_is_said_of_problems_whose_number_is_unknown():
    rows = rows_of(premises.expect(recipe_of(stage_of()), None, History(), []))
    assert rows["rescue"] == ("problems unknown", "pass rates decide: data_filter.py estimate")


def test_another_temperature_than_the_stages_is_named():
    history = file_of([4] * 24)
    assert "measured at" not in foreseen(recipe_of(stage_of()), history).title
    title = foreseen(recipe_of(stage_of(temperature=1.4)), history).title
    assert title.endswith("\n  measured at temperature 1.0, the stage has 1.4")


def test_a_later_stage_starts_with_full_sinks_and_the_latest_visits():
    history = file_of([0] * 48)
    for i in range(48):
        history.append(Visit(str(i), 0, 3, (1.0,) + (0.0,) * 7))
        history.append(Visit(str(i), 0, 9, (0.0,) * 8))
    history.settings = None
    recipe = recipe_of(stage_of(), stage_of(data="", steps=2))
    found = foreseen(recipe, history, 1)
    assert "filter" not in rows_of(found)
    mean, _, _ = found.predicted["rescued"]
    assert mean > 40 and found.predicted["skipped"][0] == 0  # all fail, all were solved once: a rescue is a signal
    empty = foreseen(replace(recipe, stage=(recipe.stage[1],)), file_of([0] * 48), 0)
    assert empty.predicted["rescued"][0] == 0 and empty.predicted["skipped"][0] == 2


def test_a_stage_that_ends_by_tokens_is_played_to_their_end():
    history = file_of([4] * 48, tokens=[800] * 48)  # 24 groups of 8 rollouts of 100 tokens a step
    found = foreseen(recipe_of(stage_of(steps=500, generated_tokens=24 * 800 * 7)), history)
    assert rows_of(found)["rule of a third"][0].endswith("of 7 updates")


def test_the_comparison_counts_what_was_seen():
    steps = [
        {"zero_variance": 3, "groups": 10, "skipped": 0, "rescued": 2, "truncated_share": 0.25},
        {"zero_variance": 5, "groups": 10, "skipped": 1, "rescued": 1, "truncated_share": 0.75},
    ]
    predicted = {"zero_variance": [0.39, 0, 1], "rescued": [4.4, 0, 9], "dropped": [7.0, 0, 9]}
    seen, words = premises.compare(predicted, steps, 6)
    assert seen == {"zero_variance": 0.4, "rescued": 3, "dropped": 6}
    assert words == (
        "at the pass rates before it\n  predicted 39% of groups without a signal, seen 40%\n"
        "  predicted 4 rescues, seen 3\n  predicted 7 problems dropped, seen 6"
    )
    predicted = {"truncated_share": [0.2] * 3, "dropped": [7.0] * 3}
    assert premises.compare(predicted, steps, 6)[0] == {"truncated_share": 0.5, "dropped": 6}
