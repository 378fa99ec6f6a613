"""lab/variants.py: each variant against a slow implementation of its paper's formula, per token, in plain Python."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_traps import Table, fast_update, group, ragged_groups, run_stage, slow_advantages, slow_token

import grpo
from grpo import PolicyLoss, RatioStats, UpdateStats
from lab.recipe import RlStage, VariantSettings
from lab.variants import (
    VariantLoss,
    centred_advantages,
    maxrl_advantages,
    merge_updates,
    mini_batches,
    punish_overlong,
    update,
)

LIMIT = 12  # max_response_tokens
SIZE = 6  # rollouts in a group


def stage_of(problems=6, **settings):
    variant = VariantSettings(**settings)
    return RlStage(
        batch_problems=problems, group_size=SIZE, max_response_tokens=LIMIT, substitute=False, variant=variant
    )


def updates_of(stage, groups, logprobs, max_tokens=40):
    """Return each optimizer step's statistics and gradient by every log-prob, without changing the log-probs."""
    parts = mini_batches(punish_overlong(groups, stage), stage)
    return [fast_update(sequences, logprobs, VariantLoss(stage), max_tokens, divisor) for sequences, divisor in parts]


def responses(groups, logprobs, advantages_of=slow_advantages, shaped=lambda reward, response: reward):
    """Yield (token names, new log-probs, old log-probs, advantage, response) of every response."""
    for g in groups:
        rewards = [shaped(reward, response) for reward, response in zip(g.rewards.tolist(), g.rollouts, strict=True)]
        for response, advantage in zip(g.rollouts, advantages_of(rewards), strict=True):
            names = response.tokens.tolist()
            yield names, [logprobs[name] for name in names], response.logprobs.tolist(), advantage, response


def assert_same(found, loss, gradient):
    stats, by_logprob = found
    assert stats.loss == pytest.approx(loss, abs=1e-6)
    np.testing.assert_allclose(by_logprob, gradient, rtol=0, atol=1e-6)
    assert max(map(abs, gradient)) > 1e-3


@pytest.fixture(params=range(3))
def batch(request):
    return ragged_groups(request.param, size=SIZE)


# ----------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("drift, low, high", [(0.8, 0.1, 0.15), (1e-3, 3e-4, 4e-4)])
def test_gspo(drift, low, high, max_tokens):
    """Equations 5 and 7: mean over responses of min(s A, clip(s) A), s the geometric mean of the tokens' ratios."""
    groups, logprobs = ragged_groups(1, size=SIZE, drift=drift)
    groups.append(groups[0])  # as after substitution: the same response twice in a batch is two responses
    loss, gradient, cut = 0.0, [0.0] * len(logprobs), {"low": 0, "high": 0}
    count, tokens = SIZE * len(groups), 0
    for names, new, old, advantage, _ in responses(groups, logprobs):
        ratio = math.exp(sum(n - o for n, o in zip(new, old, strict=True)) / len(names))
        bounded = min(max(ratio, 1 - low), 1 + high)
        loss -= min(ratio * advantage, bounded * advantage) / count
        tokens += len(names)
        cut["low"] += len(names) * (advantage < 0 and ratio < 1 - low)
        cut["high"] += len(names) * (advantage > 0 and ratio > 1 + high)
        for name in names:
            acts = ratio * advantage <= bounded * advantage
            gradient[name] -= acts * advantage * ratio / len(names) / count
    [found] = updates_of(
        stage_of(problems=7, loss="gspo", gspo_clip_low=low, gspo_clip_high=high), groups, logprobs, max_tokens
    )
    assert_same(found, loss, gradient)
    assert cut["low"] and cut["high"]
    ratios = found[0].ratios
    assert ratios.clip_low_share == pytest.approx(cut["low"] / tokens)
    assert ratios.clip_high_share == pytest.approx(cut["high"] / tokens) and ratios.dual_clip_share == 0


def test_gspo_ignores_the_clip_range_of_polaris():
    stage = replace(stage_of(loss="gspo"), clip_low=0.7, clip_high=0.8)
    groups, logprobs = ragged_groups(0, size=SIZE)
    assert updates_of(stage, groups, logprobs) == updates_of(stage_of(loss="gspo"), groups, logprobs)


@pytest.mark.parametrize("cap", [1.2, 5.0])
def test_cispo(batch, cap):
    """Equations 4 and 5: the mean over tokens of sg(min(r, cap)) A log pi."""
    groups, logprobs = batch
    loss, gradient, cut = 0.0, [0.0] * len(logprobs), 0
    for names, new, old, advantage, _ in responses(groups, logprobs):
        for name, n, o in zip(names, new, old, strict=True):
            weight = min(math.exp(n - o), cap)
            loss -= weight * advantage * n / len(logprobs)
            gradient[name] -= weight * advantage / len(logprobs)
            cut += advantage != 0 and math.exp(n - o) > cap
    [found] = updates_of(stage_of(loss="cispo", cispo_cap=cap), groups, logprobs)
    assert_same(found, loss, gradient)
    assert found[0].ratios.clip_high_share == pytest.approx(cut / len(logprobs)) and cut
    assert found[0].ratios.clip_low_share == found[0].ratios.dual_clip_share == 0


@pytest.mark.parametrize("cap", [1.1, 2.0])
def test_truncated_importance_sampling(batch, cap):
    """min(pi_trainer_old / pi_sampler, C) x the clipped loss of pi / pi_trainer_old, which is 1 in the only step."""
    groups, logprobs = batch
    loss, gradient = 0.0, [0.0] * len(logprobs)
    for names, new, old, advantage, _ in responses(groups, logprobs):
        for name, n, o in zip(names, new, old, strict=True):
            weight = min(math.exp(n - o), cap)
            value, derivative = slow_token(n, n, advantage)
            loss += weight * value / len(logprobs)
            gradient[name] += weight * derivative / len(logprobs)
    [found] = updates_of(stage_of(importance_cap=cap), groups, logprobs)
    assert_same(found, loss, gradient)
    # the metrics still show the mismatch: their ratios are to the sampler
    assert found[0].ratios.logprob_diff_mean > 0.1 and found[0].ratios.clip_high_share > 0


def test_importance_weights_of_the_second_step_use_its_own_policy(batch):
    # no clip acts, however far the earlier steps have moved the policy: only the cap does
    groups, logprobs = batch
    first, second = updates_of(stage_of(importance_cap=3.0, optimizer_steps=2), groups, logprobs)
    for part, (_, found) in zip((groups[0::2], groups[1::2]), (first, second), strict=True):
        count = sum(len(r.tokens) for g in part for r in g.rollouts)
        for names, new, old, advantage, _ in responses(part, logprobs):
            for name, n, o in zip(names, new, old, strict=True):
                assert found[name] == pytest.approx(-min(math.exp(n - o), 3.0) * advantage / count, abs=1e-6)


# ------------------------------------------------------------------------------------------ averages, advantages


def test_dr_grpo(batch):
    """No std, and the sum over tokens divided by a constant: responses x token limit."""
    groups, logprobs = batch
    loss, gradient, divisor = 0.0, [0.0] * len(logprobs), SIZE * len(groups) * LIMIT

    def minus_mean(rewards):
        return [reward - sum(rewards) / len(rewards) for reward in rewards]

    for names, new, old, advantage, _ in responses(groups, logprobs, minus_mean):
        for name, n, o in zip(names, new, old, strict=True):
            value, derivative = slow_token(n, o, advantage)
            loss += value / divisor
            gradient[name] += derivative / divisor
    [found] = updates_of(stage_of(advantage="centred", average="constant"), groups, logprobs)
    assert_same(found, loss, gradient)
    assert found[0].tokens == len(logprobs)  # the divisor does not change the token count


def test_the_constant_divisor_counts_dropped_groups(batch):
    groups, logprobs = batch
    groups = [group(f"none{i}", [0] * SIZE) for i in range(2)] + groups[2:]
    _, kept = updates_of(stage_of(average="constant"), groups, logprobs)[0]
    _, dropped = updates_of(stage_of(average="constant", drop_zero_variance=True), groups, logprobs)[0]
    np.testing.assert_allclose(dropped, kept, rtol=0, atol=1e-9)


def test_mean_over_sequences(batch):
    """GRPO's equation 3: the mean over responses of the mean over their tokens."""
    groups, logprobs = batch
    loss, gradient = 0.0, [0.0] * len(logprobs)
    for names, new, old, advantage, _ in responses(groups, logprobs):
        for name, n, o in zip(names, new, old, strict=True):
            value, derivative = slow_token(n, o, advantage)
            loss += value / len(names) / (SIZE * len(groups))
            gradient[name] += derivative / len(names) / (SIZE * len(groups))
    [found] = updates_of(stage_of(average="sequences"), groups, logprobs)
    assert_same(found, loss, gradient)


@pytest.mark.parametrize("failed", [0, 2])
def test_maxrl(batch, failed):
    """The released code: (r - mean) / (mean + 1e-6) over the group; a group without a success has no gradient."""
    groups, logprobs = batch
    groups = [replace(g, rewards=g.rewards * (i >= failed)) for i, g in enumerate(groups)]
    loss, gradient = 0.0, [0.0] * len(logprobs)

    def over_mean(rewards):
        mean = sum(rewards) / len(rewards)
        return [(reward - mean) / (mean + 1e-6) for reward in rewards]

    for names, new, old, advantage, _ in responses(groups, logprobs, over_mean):
        for name, n, o in zip(names, new, old, strict=True):
            value, derivative = slow_token(n, o, advantage)
            loss += value / len(logprobs)
            gradient[name] += derivative / len(logprobs)
    [found] = updates_of(stage_of(advantage="maxrl"), groups, logprobs)
    assert_same(found, loss, gradient)


def test_maxrl_weighs_a_rare_success_as_the_gradient_of_log_p():
    """K successes of N: the sum of their advantages over N is (1 - K / N), whatever K: 1 / p times p (1 - p)."""
    for right in (1, 2, 6):
        found = maxrl_advantages((np.arange(8) < right).astype(float))
        np.testing.assert_allclose(found[:right].sum() / 8, 1 - right / 8, atol=1e-5)
        np.testing.assert_allclose(found[right:], -1, atol=1e-5)


def test_centred_advantages():
    assert centred_advantages(np.array([1.0, 0, 0, 0])).tolist() == [0.75, -0.25, -0.25, -0.25]


# ------------------------------------------------------------------------------------- rewards and filters


def slow_polaris(groups, logprobs, learned=lambda response: True, shaped=lambda reward, response: reward):
    rows = [row for row in responses(groups, logprobs, shaped=shaped) if learned(row[-1])]
    count, loss, gradient = sum(len(row[0]) for row in rows), 0.0, [0.0] * len(logprobs)
    for names, new, old, advantage, _ in rows:
        for name, n, o in zip(names, new, old, strict=True):
            value, derivative = slow_token(n, o, advantage)
            loss += value / count
            gradient[name] += derivative / count
    return loss, gradient


def test_overlong_filtering(batch):
    """A truncated response is not in the loss or its divisor; its reward is in its group's mean and deviation."""
    groups, logprobs = batch
    expected = slow_polaris(groups, logprobs, lambda response: response.finish_reason != "length")
    [found] = updates_of(stage_of(drop_truncated=True), groups, logprobs)
    assert_same(found, *expected)
    assert found[0].tokens < len(logprobs)


@pytest.mark.parametrize("last", [1, 5, LIMIT])
def test_soft_overlong_punishment(batch, last):
    """Equation 13, case by case, added to the reward."""

    def punished(reward, response):
        length = len(response.tokens)
        if length <= LIMIT - last:
            return reward
        return reward + (((LIMIT - last) - length) / last if length <= LIMIT else -1)

    groups, logprobs = batch
    before = [g.rewards.copy() for g in groups]
    [found] = updates_of(stage_of(punish_last_tokens=last), groups, logprobs)
    assert_same(found, *slow_polaris(groups, logprobs, shaped=punished))
    assert all((g.rewards == b).all() for g, b in zip(groups, before, strict=True))  # pass rates use the originals


def test_soft_overlong_punishment_at_its_bounds():
    group_of = group("p", [1.0, 1, 1, 1])
    for rollout, length in zip(group_of.rollouts, (8, 9, 12, 13), strict=True):
        rollout.tokens = np.zeros(length, dtype=np.int32)
    [found] = punish_overlong([group_of], stage_of(punish_last_tokens=4))
    assert found.rewards.tolist() == [1, 0.75, 0, 0] and found.informative


def test_zero_variance_filtering(batch):
    """Groups of equal rewards are not in the loss or its divisor."""
    groups, logprobs = batch
    flat = [replace(g, rewards=np.ones(SIZE)) for g in groups[:2]]
    expected = slow_polaris(groups[2:], logprobs[:])
    count = sum(len(r.tokens) for g in groups[2:] for r in g.rollouts)
    [found] = updates_of(stage_of(drop_zero_variance=True), [flat[0], *groups[2:], flat[1]], logprobs)
    assert_same(found, *expected)
    assert found[0].tokens == count
    [kept] = updates_of(stage_of(), [flat[0], *groups[2:], flat[1]], logprobs)
    assert kept[0].tokens > count  # POLARIS without substitution: zeros count in the mean


def test_no_update_without_sequences(batch):
    stage = stage_of(drop_zero_variance=True)
    assert mini_batches([group("p", [0, 0])], stage) == [] and merge_updates([]) is None
    for one in batch[0]:
        for rollout in one.rollouts:
            rollout.finish_reason = "length"
    assert mini_batches(batch[0], stage_of(drop_truncated=True, optimizer_steps=3)) == []


# ------------------------------------------------------------------------------------------------- several steps


def test_several_steps_clip_against_the_sampler(batch):
    """Gradient descent in plain Python: each step on its share of the groups, with the sampler's old log-probs."""
    groups, logprobs = batch
    stage, rate = stage_of(optimizer_steps=3), 3.0
    groups, now = groups + groups[:3], list(logprobs)  # some groups twice: later steps see the changes of earlier ones
    for start in range(3):
        _, gradient = slow_polaris(groups[start::3], now)
        now = [n - rate * g for n, g in zip(now, gradient, strict=True)]
    table = Table(logprobs)
    optimizer = torch.optim.SGD(table.parameters(), lr=rate)
    parts = mini_batches(groups, stage)
    assert len(parts) == 3
    for sequences, divisor in parts:
        grpo.optimizer_step(table, optimizer, sequences, VariantLoss(stage), 40, 1e9, divisor)
    np.testing.assert_allclose(table.logprobs.tolist(), now, rtol=0, atol=1e-5)
    assert max(abs(n - o) for n, o in zip(now, logprobs, strict=True)) > 0.1


def test_every_group_is_in_exactly_one_step():
    groups = [group(f"p{i}", [1, 0, 0]) for i in range(8)]
    parts = mini_batches(groups, stage_of(problems=8, optimizer_steps=4))
    assert [len(sequences) for sequences, _ in parts] == [6] * 4 and {divisor for _, divisor in parts} == {None}
    assert mini_batches(groups, stage_of(problems=8, optimizer_steps=4, average="constant"))[0][1] == 2 * SIZE * LIMIT


def test_metrics_of_several_steps():
    first = UpdateStats(0.1, 2.0, 30, True, 64, 1, RatioStats(0.0, 0.0, 0.0, 1.0, 1e-7, 1e-6, None), 0.0, 1)
    second = UpdateStats(0.3, 4.0, 10, False, 32, 0, RatioStats(0.2, 0.4, 0.1, 1.5, 0.5, 0.9, 3.0), 0.0, 0)
    ratios = RatioStats(0.1, 0.2, 0.05, 1.25, 1e-7, 1e-6, 3.0)  # the log-prob difference is the first step's
    assert merge_updates([first, second]) == UpdateStats(0.2, 3.0, 40, False, 32, 1, ratios, 0.0, 1)
    assert merge_updates([second]) is second


def test_update_says_whether_an_earlier_step_has_changed_the_weights():
    made, stage = [], stage_of(problems=8, optimizer_steps=4, loss="cispo")

    def run_update(sequences, loss, of_stage, divisor, begun):
        assert loss == VariantLoss(stage) and of_stage is stage and divisor is None
        made.append((len(sequences), begun))
        stepped = len(made) > 1  # the first gradient is not finite
        ratios = RatioStats(0.0, 0.0, 0.0, 1.0, 0.0, 0.0, None)
        return UpdateStats(0.0, 1.0, 6, stepped, 64, 0, ratios, 0.0, int(stepped))

    whole = update(run_update, [group(f"p{i}", [1, 0, 0]) for i in range(8)], stage)
    assert made == [(6, False), (6, False), (6, True), (6, True)]
    assert (whole.tokens, whole.optimizer_steps, whole.stepped) == (24, 3, False)
    assert update(run_update, [group("p", [0, 0])], stage_of(drop_zero_variance=True)) is None


# --------------------------------------------------------------------------------------------------- in a stage


def test_the_default_variant_is_polaris(batch):
    stage = replace(stage_of(), clip_low=0.1, clip_high=0.3, dual_clip=4.0)
    assert VariantLoss(stage).token_loss == PolicyLoss(0.1, 0.3, 4.0)
    groups, logprobs = batch
    [found] = updates_of(stage, groups, logprobs)
    assert found == fast_update(grpo.training_sequences(groups), logprobs, PolicyLoss(0.1, 0.3, 4.0), 40)
    assert punish_overlong(groups, stage) is groups
    [(sequences, divisor)] = mini_batches(groups, stage)
    assert divisor is None
    for found, expected in zip(sequences, grpo.training_sequences(groups), strict=True):
        assert found.advantage == expected.advantage and found.old_logprobs is expected.old_logprobs


SCRIPT = [{"a": [0, 1, 0, 0], "b": [0, 0, 0, 0], "c": [0, 1, 1, 1], "d": [1, 1, 0, 0]}] * 2


@pytest.mark.parametrize(
    "settings, made, learned",
    [
        ({"optimizer_steps": 2}, 2, 16),
        ({"optimizer_steps": 4, "drop_zero_variance": True}, 3, 12),
        ({"loss": "gspo", "optimizer_steps": 2}, 2, 16),
        ({"loss": "cispo", "importance_cap": 2.0, "average": "constant", "advantage": "centred"}, 1, 16),
        ({"punish_last_tokens": 5, "drop_truncated": True}, 1, 16),
    ],
)
def test_a_stage_runs_with_a_variant(settings, made, learned):
    rows, updates, _ = run_stage(SCRIPT, substitute=False, variant=VariantSettings(**settings))
    for step, row in enumerate(rows):
        assert row["optimizer_steps"] == made and row["skipped"] == row["nonfinite"] == 0
        assert sum(len(sequences) for at, sequences in updates if at == step) == learned
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
        assert all(0 <= row[name] <= 1 for name in ("clip_low_share", "clip_high_share", "dual_clip_share"))
        assert row["zero_variance"] == 1 and row["substituted"] == 0


def test_punished_rewards_affect_the_update_alone():
    # the all-wrong group now has a signal; counts, sinks and pass rates use the original rewards
    [row], updates, run = run_stage(SCRIPT[:1], variant=VariantSettings(punish_last_tokens=9))
    assert (row["zero_variance"], row["solve_none"], row["substituted"]) == (1, 1, 0)
    assert {reward for _, reward in run.state.sinks.held.values()} == {1.0}
    assert run.state.history.visits("b")[0].rewards == (0, 0, 0, 0)
    failed = [s for _, sequences in updates for s in sequences if s.tokens[1] == 2]
    by_length = sorted(failed, key=lambda s: s.response_length)
    assert by_length[0].advantage > 0 > by_length[-1].advantage


def test_a_batch_without_informative_groups_is_counted_as_skipped():
    script = [{name: [0, 0, 0, 0] for name in "abcd"}]
    variant = VariantSettings(drop_zero_variance=True)
    [row], updates, _ = run_stage(script, substitute=False, variant=variant)
    assert (row["skipped"], row["optimizer_steps"], updates) == (1, 0, [])


def test_learning_from_the_first_step_makes_the_second_off_policy():
    # two steps in one batch, each on different groups
    variant = VariantSettings(optimizer_steps=2)
    _, updates, run = run_stage(SCRIPT[:1], substitute=False, variant=variant)
    assert [at for at, _ in updates] == [0, 0]
    problems = [{int(s.tokens[1]) for s in sequences} for _, sequences in updates]
    assert not problems[0] & problems[1] and len(problems[0] | problems[1]) == 4
