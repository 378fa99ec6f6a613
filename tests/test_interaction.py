"""The analysis of bench/interaction.py: against figures computed by hand, before any run is read."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import interaction as bench  # noqa: E402


def test_the_sign_flip_test_counts_all_flips():
    assert bench.sign_flip_p([1.0, 2.0, 3.0]) == 2 / 8  # only all signs alike give |sum| >= 6
    assert bench.sign_flip_p([3.0, -1.0]) == 1.0  # of +-3 +-1, the sums 4, 2, -2 and -4 reach |2|
    assert bench.sign_flip_p([1.0] * 8) == 2 / 256
    assert bench.sign_flip_p([0.1, 0.2, 0.3]) == 2 / 8  # equal sums in other float rounding count


def test_holm_multiplies_by_the_tests_that_are_left():
    tests = {("a", "b"): [1.0, 2.0, 3.0], ("c", "b"): [1.0] * 8}  # p 0.25 and 0.0078
    assert bench.holm(tests) == {("c", "b"): 2 * 2 / 256, ("a", "b"): 0.25}
    falling = {("a", "b"): [1.0] * 3, ("c", "b"): [2.0] * 3}  # the second is no smaller than the first
    assert bench.holm(falling) == {("a", "b"): 0.5, ("c", "b"): 0.5}


def curve(tokens, band) -> bench.Curve:
    tokens, band = np.array(tokens, dtype=float), np.array(band)
    return bench.Curve(tokens, tokens, band, band, band, silent=0.5, heard=4.0, given=0.0, skipped=0.0, always=None)


def test_the_area_is_the_mean_height_up_to_the_budget():
    half, budget = bench.BUDGET / 2, bench.BUDGET
    assert bench.area(np.array([0, budget]), np.array([0.2, 0.6])) == pytest.approx(0.4)
    # 0.2 until the first evaluation, 0.4 on average in the second half; after the budget nothing counts
    assert bench.area(np.array([half, 3 * half]), np.array([0.2, 1.0])) == pytest.approx(0.3, abs=1e-3)


def test_the_tokens_to_a_height_are_interpolated_and_at_most_the_budget():
    rising = curve([0, bench.BUDGET], [0.2, 0.6])
    assert bench.tokens_to(rising, 0.3) == pytest.approx(bench.BUDGET / 4, abs=bench.BUDGET / (bench.GRID - 1))
    assert bench.tokens_to(rising, 0.7) == bench.BUDGET


def test_every_arm_samples_the_same_training_tokens_and_takes_its_own_mechanisms(tmp_path):
    for premise in bench.PREMISES.values():
        for setting in premise.settings.values():
            recipes = {arm: bench.recipe_of(setting, arm, 1e-4, 0, tmp_path) for arm in premise.arms}
            for arm, recipe in recipes.items():
                stages = recipe.stage
                assert len(stages) == (3 if arm in bench.STAGED else 1)
                assert sum(stage.generated_tokens for stage in stages) == bench.BUDGET
                assert {stage.batch_problems for stage in stages} == {setting.batch_problems}
                assert all(stage.rescue == stage.substitute == (arm in ("full", "substitute", "no-third"))
                           for stage in stages)  # fmt: skip
                assert stages[0].filter_before == (arm == "full")
    assert recipes["no-third"].stage[0].informative_share == 0 != recipes["substitute"].stage[0].informative_share


def test_a_curve_counts_the_tokens_of_filters_and_searches(tmp_path):
    def evaluation(five: float) -> dict:
        by_type = {"3 terms": 1.0, "4 terms": 0.8, "5 terms": five, "6 terms": 0.1}
        return {"kind": "eval", "step": 0, "stage": 0, "by_type": by_type, "avg": 0.5}

    rl = {"kind": "rl", "step": 1, "stage": 0, "tokens": 100, "groups": 8, "zero_variance": 2, "rescued": 1}
    rows = [
        {"kind": "filter", "step": 0, "stage": 0, "tokens": 40, "before": [1, 2, 1]}, evaluation(0.3),
        rl | {"substituted": 1, "skipped": 0}, {"kind": "temperature", "step": 1, "stage": 0, "tokens": 7},
        evaluation(0.5), rl | {"substituted": 0, "skipped": 1, "zero_variance": 4}, evaluation(0.7),
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = bench.read_curve(tmp_path)
    assert found.tokens.tolist() == [40, 147, 247] and found.trained.tolist() == [0, 100, 200]
    assert found.band == pytest.approx([0.2, 0.3, 0.4]) and found.easy == pytest.approx([0.9] * 3)
    assert (found.silent, found.heard, found.given, found.skipped, found.always) == (6 / 16, 5.0, 3 / 16, 0.5, 0.25)
