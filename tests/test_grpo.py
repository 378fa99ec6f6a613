"""grpo.py against worked examples and an independent per-token implementation; test_traps.py covers its traps."""

import math

import numpy as np
import pytest
import torch

import grpo
import model as models
from engine import batches as batching
from engine.batches import TrainingSequence
from engine.distributed import Interrupted
from grpo import Group, PolicyLoss, Sinks
from lab.problems import Problem
from rollout import Rollout


def rollout(problem_id="p", index=0, tokens=(5, 6, 0), prompt=(1, 2), temperature=1.0, logprob=-1.0):
    tokens = np.array(tokens, dtype=np.int32)
    logprobs = np.full(len(tokens), logprob, dtype=np.float32)
    return Rollout(problem_id, index, np.array(prompt, dtype=np.int32), tokens, logprobs, "stop", temperature)


def group(problem_id, rewards):
    rewards = np.array(rewards, dtype=float)
    rollouts = [rollout(problem_id, i, tokens=(i + 1, 0)) for i in range(len(rewards))]
    return Group(Problem(problem_id, "?", ("1",)), rollouts, rewards, rewards > 0)


@pytest.fixture
def tiny():
    """A two-layer Qwen3 with random weights wide enough that log-probs differ between tokens."""
    source = {
        "model_type": "qwen3", "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    model = models.Transformer(models.parse_config(source))
    models.initialise(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return model


def ragged_sequences(count=9, seed=0):
    random = np.random.default_rng(seed)
    sequences = []
    for i in range(count):
        prompt, response = int(random.integers(1, 6)), int(random.integers(1, 9))
        sequences.append(
            TrainingSequence(
                tokens=random.integers(0, 23, prompt + response).astype(np.int32),
                prompt_length=prompt,
                advantage=float(random.normal()),
                old_logprobs=random.normal(-3, 0.7, response).astype(np.float32),
                temperature=float(random.choice([0.7, 1.0, 1.4])),
                rescued=i % 4 == 0,
            )
        )
    return sequences


# ------------------------------------------------------------------------------------------------- advantages


def test_advantages_of_equal_rewards_are_zero():
    assert (grpo.advantages(np.ones(8)) == 0).all()


def test_advantages_refuse_a_group_of_one():
    with pytest.raises(ValueError, match="at least 2"):
        grpo.advantages(np.array([1.0]))


# ----------------------------------------------------------------------------------------------------- rescue


def test_rescue_leaves_the_original_group_untouched():
    sinks = Sinks()
    sinks.remember([group("p", [1, 0])])
    failed = group("p", [0, 0])
    sinks.rescue([failed], seed=0, step=0)
    assert failed.rewards.sum() == 0 and failed.rescued is None


def test_rescue_replaces_any_rollout_and_is_deterministic():
    sinks = Sinks()
    sinks.remember([group("p", [1, 0, 0, 0])])
    places = [sinks.rescue([group("p", [0, 0, 0, 0])], 0, step)[0].rescued for step in range(60)]
    again = [sinks.rescue([group("p", [0, 0, 0, 0])], 0, step)[0].rescued for step in range(60)]
    assert places == again and set(places) == {0, 1, 2, 3}


# ----------------------------------------------------------------------------------------------- substitution


def test_substitution_is_without_replacement_when_there_are_enough():
    groups = [group(f"good{i}", [1, 0]) for i in range(5)] + [group(f"bad{i}", [0, 0]) for i in range(5)]
    for step in range(20):
        done = grpo.substitute(groups, seed=0, step=step)
        assert len({g.problem.id for g in done.groups[5:]}) == 5


def test_substitution_draws_with_replacement_when_there_are_too_few():
    groups = [group(f"good{i}", [1, 0]) for i in range(4)] + [group(f"bad{i}", [0, 0]) for i in range(6)]
    done = grpo.substitute(groups, seed=0, step=0)
    assert done.substituted == 6 and all(g.informative for g in done.groups)


def test_substitution_leaves_a_fully_informative_batch_alone():
    groups = [group(f"good{i}", [1, 0]) for i in range(4)]
    assert grpo.substitute(groups, 0, 0) == grpo.Substitution(groups, 0, False)


# ------------------------------------------------------------------------------------------------------- loss


def loss_of_one_token(logprob, old, advantage, clip):
    """The formulas for one token in plain Python: an oracle that shares no code with grpo.py."""
    ratio = math.exp(logprob - old)
    clipped = min(max(ratio, 1 - clip.clip_low), 1 + clip.clip_high)
    objective = min(ratio * advantage, clipped * advantage)
    if advantage < 0:
        objective = max(objective, clip.dual_clip * advantage)
    return -objective


def token_batch(logprobs, old, advantages):
    size = len(logprobs)
    return batching.TokenBatch(
        None,
        None,
        None,
        None,
        torch.tensor(advantages),
        torch.tensor(old),
        torch.ones(size),
        torch.zeros(size, dtype=bool),
        torch.arange(size),
    )


def test_loss_of_each_token_equals_the_formula():
    random = np.random.default_rng(0)
    old = random.normal(-2, 1, 500)
    logprobs = old + random.normal(0, 0.8, 500)
    advantages = random.normal(0, 1, 500)
    clip = PolicyLoss()
    found = clip(torch.tensor(logprobs), token_batch(logprobs, old, advantages))
    expected = [loss_of_one_token(*values, clip) for values in zip(logprobs, old, advantages, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 1.0, -1.0),
        (1.27, 1.0, -1.27),  # inside clip-higher
        (1.5, 1.0, -1.28),  # clipped above
        (0.5, 1.0, -0.5),  # a good token that became less likely is not clipped
        (0.5, -1.0, 0.8),  # a bad token clipped below
        (2.0, -1.0, 2.0),  # a bad token that became more likely is not clipped ...
        (9.0, -1.0, 3.0),  # ... up to the dual clip
        (9.0, 1.0, -1.28),  # which is for negative advantages only
    ],
)
def test_clips_at_given_ratios(ratio, advantage, expected):
    logprobs = torch.tensor([math.log(ratio)], dtype=torch.float64)
    found = PolicyLoss()(logprobs, token_batch([0.0], [0.0], [advantage]))
    assert found.item() == pytest.approx(expected, abs=1e-12)


# ----------------------------------------------------------------------------------------------------- update


def naive_loss(model, sequences, clip):
    """One sequence and one token at a time, mean over all response tokens: slow and obvious."""
    total, count = 0.0, 0
    for sequence in sequences:
        tokens = torch.tensor(sequence.tokens, dtype=torch.int64)
        logits = model.logits(model.hidden(tokens, models.Packed([len(tokens)])))
        for i in range(sequence.response_length):
            position = sequence.prompt_length + i
            logprob = (logits[position - 1] / sequence.temperature).log_softmax(-1)[tokens[position]]
            ratio = (logprob - float(sequence.old_logprobs[i])).exp()
            clipped = ratio.clamp(1 - clip.clip_low, 1 + clip.clip_high)
            objective = torch.minimum(ratio * sequence.advantage, clipped * sequence.advantage)
            if sequence.advantage < 0:
                objective = torch.maximum(objective, torch.tensor(clip.dual_clip * sequence.advantage))
            total, count = total - objective, count + 1
    return total / count


class Recorder(torch.optim.SGD):
    """Keeps the gradients that a step was given."""

    def step(self, closure=None):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def update(model, sequences, max_tokens, loss=None, norm=1e9):
    optimizer = Recorder(model.parameters(), lr=0.0)
    stats = grpo.optimizer_step(model, optimizer, sequences, loss or PolicyLoss(), max_tokens, norm)
    return stats, optimizer


def test_loss_and_gradient_equal_the_naive_per_token_mean(tiny):
    sequences = ragged_sequences()
    expected = naive_loss(tiny, sequences, PolicyLoss())
    gradients = torch.autograd.grad(expected, list(tiny.parameters()))
    stats, optimizer = update(tiny, sequences, max_tokens=10_000)
    assert stats.loss == pytest.approx(expected.item(), abs=1e-6)
    for found, wanted in zip(optimizer.seen, gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_tokens", [1, 15, 40])
def test_gradient_does_not_depend_on_how_the_batch_is_cut(tiny, max_tokens):
    sequences = ragged_sequences()
    whole, whole_optimizer = update(tiny, sequences, max_tokens=10_000)
    cut, cut_optimizer = update(tiny, sequences, max_tokens)
    assert cut.loss == pytest.approx(whole.loss, abs=1e-6) and cut.tokens == whole.tokens
    for found, wanted in zip(cut_optimizer.seen, whole_optimizer.seen, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def grouped_sequences(prompts=(7, 1, 4, 7), seed=3):
    """Return shuffled groups of responses to prompts of these lengths. The first and last prompt are the same, the last
    response of each group appears twice (as after substitution), and shorter prompts are prefixes of longer ones.
    """
    random = np.random.default_rng(seed)
    long = random.integers(0, 23, 7)
    sequences = []
    for length in prompts:
        prompt = long[:length]
        for _ in range(int(random.integers(2, 5))):
            response = int(random.integers(1, 9))
            sequences.append(
                TrainingSequence(
                    tokens=np.concatenate([prompt, random.integers(0, 23, response)]).astype(np.int32),
                    prompt_length=length,
                    advantage=float(random.normal()),
                    old_logprobs=random.normal(-3, 0.7, response).astype(np.float32),
                    temperature=float(random.choice([0.7, 1.0, 1.4])),
                )
            )
        sequences.append(sequences[-1])
    return [sequences[i] for i in random.permutation(len(sequences))]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 12, 25, 60, 10_000])
def test_a_prompt_shared_by_its_group_gives_the_naive_loss_and_gradient(tiny, max_tokens, recompute):
    sequences = grouped_sequences()
    expected = naive_loss(tiny, sequences, PolicyLoss())
    gradients = torch.autograd.grad(expected, list(tiny.parameters()))
    for layer in tiny.model.layers:
        layer.recompute = recompute
    stats, optimizer = update(tiny, sequences, max_tokens)
    assert stats.loss == pytest.approx(expected.item(), abs=1e-6)
    for found, wanted in zip(optimizer.seen, gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_supervised_loss_is_the_mean_cross_entropy_of_response_tokens(tiny):
    sequences = ragged_sequences()
    total = []
    for sequence in sequences:
        tokens = torch.tensor(sequence.tokens, dtype=torch.int64)
        logits = tiny.logits(tiny.hidden(tokens, models.Packed([len(tokens)])))
        start = sequence.prompt_length
        losses = torch.nn.functional.cross_entropy(logits[start - 1 : -1], tokens[start:], reduction="none")
        total.append(losses.detach())
    plain = [TrainingSequence(s.tokens, s.prompt_length) for s in sequences]
    stats, _ = update(tiny, plain, 30, grpo.supervised_loss)
    assert stats.loss == pytest.approx(torch.cat(total).mean().item(), abs=1e-6)


def test_gradient_norm_is_clipped_and_reported_before_clipping(tiny):
    sequences = ragged_sequences()
    free, free_optimizer = update(tiny, sequences, 50)
    clipped, optimizer = update(tiny, sequences, 50, norm=free.grad_norm / 2)
    norm = math.sqrt(sum(float((g**2).sum()) for g in free_optimizer.seen))
    assert free.grad_norm == pytest.approx(norm, rel=1e-5) and clipped.grad_norm == pytest.approx(norm, rel=1e-5)
    assert math.sqrt(sum(float((g**2).sum()) for g in optimizer.seen)) == pytest.approx(norm / 2, rel=1e-4)


def test_statistics_of_the_ratio(tiny):
    sequences = ragged_sequences()
    batch = batching.pack(sequences, torch.device("cpu"))
    with torch.no_grad():
        logprobs = tiny(batch.tokens, batch.context, batch.predict, batch.targets, batch.temperature).double()
    ratio = (logprobs - batch.old_logprobs.double()).exp()
    stats = update(tiny, sequences, 25)[0].ratios
    assert stats.ratio_mean == pytest.approx(ratio[~batch.rescued].mean().item(), rel=1e-5)
    assert stats.rescued_ratio_mean == pytest.approx(ratio[batch.rescued].mean().item(), rel=1e-5)
    difference = (logprobs - batch.old_logprobs.double()).abs()[~batch.rescued]
    assert stats.logprob_diff_mean == pytest.approx(difference.mean().item(), rel=1e-5)
    assert stats.logprob_diff_max == pytest.approx(difference.max().item(), rel=1e-5)
    high = ((batch.advantages > 0) & (ratio > 1.28)).double().mean()
    low = ((batch.advantages < 0) & (ratio < 0.8)).double().mean()
    dual = ((batch.advantages < 0) & (ratio > 3)).double().mean()
    shares = (stats.clip_high_share, stats.clip_low_share, stats.dual_clip_share)
    assert shares == pytest.approx((float(high), float(low), float(dual)))


def test_a_gradient_that_is_not_finite_changes_nothing(tiny):
    before = [p.clone() for p in tiny.parameters()]
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=0.1)
    stats = grpo.optimizer_step(tiny, optimizer, ragged_sequences(), lambda logprobs, batch: logprobs * math.nan, 50)
    assert not stats.stepped
    assert all(torch.equal(a, b) for a, b in zip(before, tiny.parameters(), strict=True))


def test_an_abandoned_step_leaves_no_gradient_and_does_not_affect_the_next(tiny):
    sequences, before, asked = ragged_sequences(), [p.clone() for p in tiny.parameters()], []
    loss, optimizer = PolicyLoss(), torch.optim.AdamW(tiny.parameters(), lr=0.1)

    def abandon():
        asked.append(any(p.grad is not None for p in tiny.parameters()))
        return len(asked) == 3

    with pytest.raises(Interrupted):
        grpo.optimizer_step(tiny, optimizer, sequences, loss, 25, 1e9, None, abandon)
    assert asked == [False, True, True]  # called before each forward: two micro-batches were computed
    assert all(p.grad is None for p in tiny.parameters()) and not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(before, tiny.parameters(), strict=True))
    expected, whole = update(tiny, sequences, 25)
    again = Recorder(tiny.parameters(), lr=0.0)
    asked.clear()
    stats = grpo.optimizer_step(tiny, again, sequences, loss, 25, 1e9, None, lambda: bool(asked.append(0)))
    assert len(asked) == len(batching.micro_batches(sequences, 25, 1)) > 3
    assert stats == expected and all(map(torch.equal, again.seen, whole.seen))
