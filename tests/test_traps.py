"""The traps of RECIPE.md, one by one, and the update against a slow implementation in plain Python.

Tested elsewhere: the sampler's log-probs at its temperature (test_rollout.py), equal steps of one and two processes in
a run (test_train.py), each clip (test_grpo.py), YaRN's traps (test_yarn.py).
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forked import in_processes
from torch.distributed.device_mesh import init_device_mesh

import grpo
import model as models
import train
from engine import batches as batching
from engine import distributed, sharding
from engine.batches import TrainingSequence
from engine.checkpoint import RunState, read_state, save_checkpoint
from engine.distributed import Interrupted
from engine.grader import Grader
from engine.rollout_worker import Attempt, SamplingStats
from engine.run import Run
from grpo import Group, PolicyLoss, Sinks
from lab.problems import Problem
from lab.recipe import Recipe, RlStage
from reward import Grade
from rollout import CacheLimits, Prompt, Rollout, Sampling, generate

EOS = 0  # also the pad token, as in the laptop world and in Qwen's base models
SOURCE = {
    "model_type": "qwen3", "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


def tiny_model():
    """Two layers with weights wide enough that log-probs differ between tokens."""
    model = models.Transformer(models.parse_config(SOURCE))
    models.initialise(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def rollout(problem_id="p", index=0, tokens=(5, 6, EOS), prompt=(1, 2), temperature=1.0, logprob=-1.0, end="stop"):
    tokens = np.array(tokens, dtype=np.int32)
    logprobs = np.full(len(tokens), logprob, dtype=np.float32)
    return Rollout(problem_id, index, np.array(prompt, dtype=np.int32), tokens, logprobs, end, temperature)


def group(problem_id, rewards):
    rewards = np.array(rewards, dtype=float)
    rollouts = [rollout(problem_id, i, tokens=(i + 1, EOS)) for i in range(len(rewards))]
    return Group(Problem(problem_id, "?", ("1",)), rollouts, rewards, rewards > 0)


# --------------------------------------------------------------------- a slow implementation, from the formulas


def slow_advantages(rewards):
    """(r - mean) / (std + 1e-6), std with Bessel's correction."""
    mean = sum(rewards) / len(rewards)
    variance = sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)
    return [(reward - mean) / (math.sqrt(variance) + 1e-6) for reward in rewards]


def slow_token(logprob, old, advantage, low=0.2, high=0.28, dual=3.0):
    """Return a token's loss and its derivative by the log-prob, case by case."""
    ratio = math.exp(logprob - old)
    if advantage > 0 and ratio > 1 + high:
        return -(1 + high) * advantage, 0.0
    if advantage < 0 and ratio < 1 - low:
        return -(1 - low) * advantage, 0.0
    if advantage < 0 and ratio > dual:
        return -dual * advantage, 0.0
    return -ratio * advantage, -ratio * advantage


def slow_update(groups, logprobs, token=slow_token):
    """Return the mean over all response tokens of the batch, and its derivative by every log-prob."""
    count = sum(len(rollout.tokens) for group in groups for rollout in group.rollouts)
    loss, gradient = 0.0, [0.0] * len(logprobs)
    for g in groups:
        for r, advantage in zip(g.rollouts, slow_advantages(g.rewards.tolist()), strict=True):
            for name, old in zip(r.tokens.tolist(), r.logprobs.tolist(), strict=True):
                value, derivative = token(logprobs[name], old, advantage)
                loss += value / count
                gradient[name] += derivative / count
    return loss, gradient


class Table(torch.nn.Module):
    """A policy whose only parameters are log-probs: the log-prob of token k is parameter k."""

    device = torch.device("cpu")

    def __init__(self, logprobs):
        super().__init__()
        self.logprobs = torch.nn.Parameter(torch.tensor(logprobs, dtype=torch.float64))

    def forward(self, tokens, context, predict, targets, temperature=None):
        return self.logprobs[targets]


class Recorder(torch.optim.SGD):
    """Record the gradients passed to a step; leave the weights unchanged."""

    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        self.seen = [g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in gradients]


def ragged_groups(seed, count=6, size=None, drift=0.8):
    """Return groups of ragged responses in which every token has a unique name, and the new log-prob of each token."""
    random, groups, logprobs = np.random.default_rng(seed), [], []
    for number in range(count):
        responses = []
        for i in range(size or int(random.integers(2, 9))):
            length = int(random.integers(1, 13))
            names = np.arange(len(logprobs), len(logprobs) + length, dtype=np.int32)
            old = random.normal(-3, 1, length).astype(np.float32)
            prompt = np.full(1 + number, 10_000 + number, dtype=np.int32)
            end = "length" if random.random() < 0.3 else "stop"
            responses.append(Rollout(f"p{number}", i, prompt, names, old, end, 1.0))
            logprobs += (old + random.normal(0, drift, length)).tolist()
        rewards = random.choice([0.0, 1.0, 0.25], len(responses))
        groups.append(Group(Problem(f"p{number}", "?", ("1",)), responses, rewards, rewards == 1))
    return groups, logprobs


def fast_update(sequences, logprobs, loss, max_tokens, divisor=None):
    """Return grpo.optimizer_step's statistics and gradient by every log-prob."""
    table = Table(logprobs)
    optimizer = Recorder(table.parameters(), lr=0.0)
    stats = grpo.optimizer_step(table, optimizer, sequences, loss, max_tokens, 1e9, divisor)
    return stats, optimizer.seen[0].tolist()


@pytest.mark.parametrize("max_tokens", [1, 20, 10_000])
@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradient_by_the_log_probs_equal_the_slow_per_token_mean(seed, max_tokens):
    # the mean is over the global batch: not per micro-batch, not per sequence
    groups, logprobs = ragged_groups(seed)
    groups.append(groups[0])  # as substitution does: the same tokens twice
    loss, gradient = slow_update(groups, logprobs)
    stats, found = fast_update(grpo.training_sequences(groups), logprobs, PolicyLoss(), max_tokens)
    assert stats.loss == pytest.approx(loss, abs=1e-6)
    np.testing.assert_allclose(found, gradient, rtol=0, atol=1e-6)
    assert any(d == 0 for d in gradient) and any(abs(d) > 1e-4 for d in gradient)


@pytest.mark.parametrize("seed", range(20))
def test_advantages_equal_the_slow_ones(seed):
    random = np.random.default_rng(seed)
    rewards = random.choice([0.0, 0.3, 1.0], int(random.integers(2, 17)))
    np.testing.assert_allclose(grpo.advantages(rewards), slow_advantages(rewards.tolist()), rtol=0, atol=1e-6)


def ragged_sequences(seed=0, count=9):
    random, sequences = np.random.default_rng(seed), []
    for _ in range(count):
        prompt, response = int(random.integers(1, 6)), int(random.integers(1, 9))
        tokens = random.integers(0, 23, prompt + response).astype(np.int32)
        old = random.normal(-3, 0.7, response).astype(np.float32)
        temperature = float(random.choice([0.7, 1.0, 1.4]))
        sequences.append(TrainingSequence(tokens, prompt, float(random.normal()), old, temperature))
    return sequences


def slow_gradient(model, sequences):
    """Return loss and gradient by the weights, from slow_token's derivatives and one forward per sequence."""
    count, loss = sum(s.response_length for s in sequences), 0.0
    total = [torch.zeros_like(p) for p in model.parameters()]
    for s in sequences:
        tokens = torch.tensor(s.tokens, dtype=torch.int64)
        logits = model.logits(model.hidden(tokens, models.Packed([len(tokens)])))
        rows = (logits[s.prompt_length - 1 : -1].float() / s.temperature).log_softmax(-1)
        logprobs = rows[torch.arange(s.response_length), tokens[s.prompt_length :]]
        slow = [
            slow_token(new, old, s.advantage)
            for new, old in zip(logprobs.tolist(), s.old_logprobs.tolist(), strict=True)
        ]
        loss += sum(value for value, _ in slow) / count
        by_logprob = torch.tensor([derivative / count for _, derivative in slow])
        for sum_, part in zip(total, torch.autograd.grad(logprobs, list(model.parameters()), by_logprob), strict=True):
            sum_ += part
    return loss, total


@pytest.mark.parametrize("seed", range(3))
def test_gradient_by_the_weights_equals_the_slow_one(seed):
    model, sequences = tiny_model(), ragged_sequences(seed)
    loss, gradient = slow_gradient(model, sequences)
    optimizer = Recorder(model.parameters(), lr=0.0)
    stats = grpo.optimizer_step(model, optimizer, sequences, PolicyLoss(), max_tokens=30, max_grad_norm=1e9)
    assert stats.loss == pytest.approx(loss, abs=1e-6)
    for found, expected in zip(optimizer.seen, gradient, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def in_two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = tiny_model()
    sharding.shard(model, init_device_mesh("cpu", (2,)), torch.float32)
    results, asked = [], []

    def abandon():  # one process wants to stop before its second micro-batch, and all stop
        asked.append(torch.tensor(float(rank == 1 and len(asked) == 1)))
        dist.all_reduce(asked[-1])
        return bool(asked[-1])

    with pytest.raises(Interrupted):
        optimizer = Recorder(model.parameters(), lr=0.0)
        grpo.optimizer_step(model, optimizer, ragged_sequences(count=5), PolicyLoss(), 1, 1e9, None, abandon)
    assert len(asked) == 2
    for max_tokens in (1, 12, 10_000):
        optimizer = Recorder(model.parameters(), lr=0.0)
        stats = grpo.optimizer_step(model, optimizer, ragged_sequences(count=5), PolicyLoss(), max_tokens, 1e9)
        results.append((stats.loss, stats.tokens, optimizer.seen))
    if rank == 0:
        torch.save(results, folder / "found.pt")
    dist.destroy_process_group()


def test_token_mean_is_over_the_global_batch_across_processes_and_micro_batches(tmp_path):
    # five ragged sequences give unequal shares; with one per micro-batch, a process has none in the last round. The
    # abandoned step before must have no effect
    in_processes(in_two_processes, tmp_path)
    sequences = ragged_sequences(count=5)
    loss, gradient = slow_gradient(tiny_model(), sequences)
    for found_loss, tokens, found in torch.load(tmp_path / "found.pt"):
        assert tokens == sum(s.response_length for s in sequences)
        assert found_loss == pytest.approx(loss, abs=1e-6)
        for one, expected in zip(found, gradient, strict=True):
            torch.testing.assert_close(one, expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------- substitution


def test_substitution_copies_groups_with_their_answers_and_rewards():
    # guards against a bug of the official code: tokens were copied, ground truth and reward were not
    informative = [group(f"good{i}", [1, 0, 0, 1]) for i in range(3)]
    empty = [group("none", [0, 0, 0, 0]), group("all", [1, 1, 1, 1])]
    done = grpo.substitute([empty[0], *informative, empty[1]], seed=0, step=0)
    assert done.substituted == 2 and not done.skip_update
    assert done.groups[1:4] == informative
    for copied in (done.groups[0], done.groups[4]):
        assert any(copied is one for one in informative)  # problem, rollouts, rewards and all
        original = next(one for one in informative if one.problem.id == copied.problem.id)
        np.testing.assert_array_equal(grpo.advantages(copied.rewards), grpo.advantages(original.rewards))
    assert all(g.informative for g in done.groups)


def test_grading_again_after_substitution_changes_nothing():
    # a response's first token is its answer: token 5 is a box with 5 in it
    written = {f"p{answer}": [answer, 9, answer, 8] for answer in (2, 3, 4)} | {"hard": [9] * 4, "easy": [6] * 4}
    answers = {"p2": "2", "p3": "3", "p4": "4", "hard": "5", "easy": "6"}
    groups = []
    with Grader(thinking=False) as grader:

        def grade(problem, rollouts):
            texts = [rf"so \boxed{{{r.tokens[0]}}}" for r in rollouts]
            return np.array([one.correct for one in grader.grade([(text, problem.answers) for text in texts])])

        for name, said in written.items():
            problem, rollouts = Problem(name, "?", (answers[name],)), [rollout(name, tokens=(n, EOS)) for n in said]
            rewards = grade(problem, rollouts)
            groups.append(Group(problem, rollouts, rewards, rewards > 0))
        assert [g.rewards.tolist() for g in groups] == [[1, 0, 1, 0]] * 3 + [[0] * 4, [1] * 4]
        done = grpo.substitute(groups, seed=0, step=0)
        assert done.substituted == 2
        for g in done.groups:
            assert grade(g.problem, g.rollouts).tolist() == g.rewards.tolist() == [1, 0, 1, 0]


def test_update_is_skipped_unless_informative_groups_exceed_a_third():
    bad = [group(f"bad{i}", [0, 0]) for i in range(4)]
    good = [group(f"good{i}", [1, 0]) for i in range(3)]
    at_a_third = good[:2] + bad
    assert grpo.substitute(at_a_third, 0, 0).skip_update
    assert grpo.substitute(at_a_third, 0, 0).groups == at_a_third
    assert not grpo.substitute(good + bad, 0, 0).skip_update


# ------------------------------------------------------------------------------------------------------- rescue


def test_rescue_uses_the_stored_old_logprobs():
    sinks = Sinks()
    earlier = group("p", [0, 1, 0, 0])
    earlier.rollouts[1].logprobs[:] = -0.125
    earlier.rollouts[1].temperature = 1.4
    sinks.remember([earlier])
    [rescued] = sinks.rescue([group("p", [0, 0, 0, 0])], seed=0, step=5)
    place = rescued.rescued
    assert rescued.rewards.sum() == 1 and rescued.rewards[place] == 1 and rescued.correct[place]
    assert rescued.informative
    # off-policy: with the log-probs and temperature of the policy that wrote it
    assert (rescued.rollouts[place].logprobs == -0.125).all() and rescued.rollouts[place].temperature == 1.4
    sequences = grpo.training_sequences([rescued])
    assert [s.rescued for s in sequences] == [i == place for i in range(4)]
    assert sequences[place].temperature == 1.4 and (sequences[place].old_logprobs == -0.125).all()


def test_rescue_evicts_the_older_response():
    sinks = Sinks()
    sinks.remember([group("p", [1, 0])])
    newer = group("p", [0, 1])
    sinks.remember([newer])
    assert list(sinks.held) == ["p"] and sinks.held["p"][0] is newer.rollouts[1]
    sinks.remember([group("p", [0, 0])])  # an all-wrong group leaves it in place
    assert sinks.held["p"][0] is newer.rollouts[1]


@pytest.fixture
def processes():
    yield distributed.start()
    distributed.stop()


def test_rescue_survives_a_resume(processes, tmp_path):
    model = tiny_model()
    sharding.shard(model, processes.mesh, processes.compute_dtype)
    state, seen = RunState(step=3), group("p", [0, 1, 0, 1])
    for place, one in enumerate(seen.rollouts):
        one.logprobs[:] = [-0.1 * (place + 1), -1e-7]
        one.temperature = 1.45
    state.sinks.remember([seen])
    save_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters()), state, processes, 1)
    resumed = read_state(tmp_path)[1]
    failed = [group("p", [0, 0, 0, 0]), group("q", [0, 0, 0, 0])]
    straight, again = (one.sinks.rescue(failed, seed=0, step=4) for one in (state, resumed))
    assert again[1] is failed[1] and again[0].rescued == straight[0].rescued is not None
    np.testing.assert_array_equal(again[0].rewards, straight[0].rewards)
    for found, expected in zip(again[0].rollouts, straight[0].rollouts, strict=True):
        assert (found.temperature, found.finish_reason) == (expected.temperature, expected.finish_reason)
        for name in ("prompt", "tokens", "logprobs"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert again[0].rollouts[again[0].rescued].logprobs.tolist() == pytest.approx([-0.4, -1e-7])


def test_rescue_never_crosses_problems():
    sinks = Sinks()
    sinks.remember([group("p", [1, 0])])
    other = group("q", [0, 0])
    assert sinks.rescue([other], seed=0, step=0)[0] is other


def test_rescue_never_touches_a_group_with_a_correct_rollout():
    sinks = Sinks()
    sinks.remember([group("p", [1, 1, 1, 1])])
    right = group("p", [0, 0, 1, 0])
    assert sinks.rescue([right], seed=0, step=0)[0] is right
    unrewarded = Group(right.problem, right.rollouts, np.zeros(4), right.correct)  # correct despite the reward
    assert sinks.rescue([unrewarded], seed=0, step=0)[0] is unrewarded


# ------------------------------------------------------------------------------------- the order of train.rl_stage


def run_stage(script, **settings):
    """Run train.rl_stage with scripted rewards: for each step, the rewards of each problem's rollouts.

    Sampling, files and the choice of temperature are replaced; grouping, rescue, substitution and the update are real.
    Return the rows of metrics, the sequences of each optimizer step, and the run.
    """
    names = list(script[0])
    model, problems, updates, rows = tiny_model(), [Problem(name, "?", ("1",)) for name in names], [], []
    state = RunState(prepared=True, temperature=1.0, problem_ids=names)
    settings = {
        "steps": len(script),
        "batch_problems": len(names),
        "group_size": 4,
        "max_response_tokens": 9,
    } | settings
    stage = RlStage(data="problems.jsonl", learning_rate=1e-2, **settings)

    def attempt(batch, size, sampling, expected_tokens):
        attempts = []
        for problem in batch:
            tried = []
            for i, right in enumerate(script[state.step][problem.id]):
                random = np.random.default_rng([state.step, names.index(problem.id), i])
                tokens = [*random.integers(1, 23, int(random.integers(1, 8))), EOS]
                one = rollout(problem.id, i, tokens, (3, 1 + names.index(problem.id)), logprob=-3 - 0.01 * state.step)
                tried.append(Attempt(one, "x", Grade("right" if right else "wrong", float(right), 0.0, 0.0, "1")))
            attempts.append(tried)
        return attempts, SamplingStats(tokens=1, sample_seconds=1.0)

    class ScriptedRun(Run):
        """A run with replaced data, optimizer and metrics."""

        def stage_problems(self, index):
            return problems

        def begin_steps(self, stage):
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

        def update(self, sequences, *rest, **more):
            updates.append((state.step, sequences))
            return super().update(sequences, *rest, **more)

        def end_step(self, index, stage, row):
            rows.append(row)
            state.step, state.stage_step = state.step + 1, state.stage_step + 1

    run = ScriptedRun(
        recipe=Recipe("test", "none", (stage,)),
        folder=None,
        processes=SimpleNamespace(
            say=lambda *_: None, peak_memory_gib=lambda: 0.0, all_gather=lambda value: [value],
            is_main=False,
        ),
        model=model,
        model_folder=None,
        data=None,
        worker=SimpleNamespace(
            attempt=attempt, stop_tokens=(EOS,), message=lambda problem: {"content": problem.text},
            chat=SimpleNamespace(decode=str),
        ),
        metrics=SimpleNamespace(write_rollouts=lambda rows: None),
        state=state,
        stop=SimpleNamespace(asked=False),
        resume_from=None,
        lock=None,
        micro_batch_tokens=60,
        saved=None,
    )
    train.rl_stage(run, 0, stage)
    return rows, updates, run


SCRIPT = [
    {"a": [0, 1, 0, 0], "b": [0, 0, 0, 0], "c": [1, 1, 1, 1], "d": [1, 1, 0, 0]},
    {"a": [0, 0, 0, 0], "b": [0, 0, 0, 0], "c": [0, 0, 1, 1], "d": [1, 0, 1, 0]},  # "a" can be rescued
    {"a": [1, 1, 1, 1], "b": [0, 0, 0, 0], "c": [1, 0, 0, 0], "d": [1, 1, 1, 1]},  # one group in four has a signal
]


def test_zero_variance_is_counted_before_rescue_and_substitution():
    rows, updates, run = run_stage(SCRIPT)
    counted = [[row[key] for row in rows] for key in ("zero_variance", "solve_none", "solve_all")]
    assert counted == [[2, 2, 3], [1, 2, 1], [1, 0, 2]]
    assert [row["rescued"] for row in rows] == [0, 1, 0]
    assert [row["substituted"] for row in rows] == [2, 1, 0]
    # pass rates also use the original rewards, including those of the skipped step
    assert [v.rewards for v in run.state.history.visits("a")] == [(0, 1, 0, 0), (0, 0, 0, 0), (1, 1, 1, 1)]
    assert [row["skipped"] for row in rows] == [0, 0, 1] and [step for step, _ in updates] == [0, 1]
    assert [row["optimizer_steps"] for row in rows] == [1, 1, 0]


def test_the_update_gets_the_rescued_and_substituted_groups():
    _, updates, _ = run_stage(SCRIPT)
    (_, first), (_, second) = updates
    assert len(first) == len(second) == 16 and all(s.advantage != 0 for s in first + second)
    [written] = [s for s in first if s.advantage > 0 and s.tokens[1] == 1][:1]  # the right answer to "a"
    rescued = [s for s in second if s.rescued]
    assert rescued and all(np.array_equal(s.tokens, written.tokens) for s in rescued)
    assert all(np.array_equal(s.old_logprobs, written.old_logprobs) for s in rescued)  # of step 0, not of step 1
    assert all((s.old_logprobs != written.old_logprobs[0]).all() for s in second if not s.rescued)


# ------------------------------------------------------------------------------------------------- the update


def test_the_standard_deviation_has_bessels_correction():
    # rewards 1 0 0 0: mean 1/4, squared deviations 9/16 + 3/16 = 3/4, / (4 - 1) = 1/4, std 1/2
    found = grpo.advantages(np.array([1.0, 0.0, 0.0, 0.0]))
    np.testing.assert_allclose(found, np.array([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-6), rtol=1e-12)


def test_the_dual_clip_acts_on_negative_advantages_only():
    for advantage, learned in ((1.0, 0), (-1.0, 1)):
        for ratio in (2.9, 3.1):
            sequence = TrainingSequence(np.array([7, 0]), 1, advantage, np.zeros(1, np.float32))
            wide = PolicyLoss(clip_high=100.0)  # so that no other clip acts on a good token
            stats, [gradient] = fast_update([sequence], [math.log(ratio)], wide, 100)
            cut = learned and ratio > 3
            assert stats.loss == pytest.approx(-advantage * (3 if cut else ratio), abs=1e-6)
            assert gradient == pytest.approx(0 if cut else -advantage * ratio, abs=1e-6)
            assert stats.ratios.dual_clip_share == cut


def test_end_of_sequence_is_in_the_loss_even_where_it_is_the_pad_token():
    batch = batching.pack([TrainingSequence(np.array([3, 4, 5, EOS], dtype=np.int32), 2)], torch.device("cpu"))
    assert batch.targets.tolist() == [5, EOS] and batch.predict.tolist() == [1, 2]
    # and its log-prob has a gradient: one generated EOS per response, but not the prompt's
    g = group("p", [1, 0, 0])
    for one in g.rollouts:
        one.prompt = np.array([EOS, 2], dtype=np.int32)
    g.rollouts[0].tokens, g.rollouts[0].logprobs = g.rollouts[0].tokens[:1], g.rollouts[0].logprobs[:1]  # truncated
    good, bad = slow_advantages([1, 0, 0])[:2]
    stats, gradient = fast_update(grpo.training_sequences([g]), [-1.0] * 4, PolicyLoss(), 1000)
    assert stats.tokens == 1 + 2 + 2
    assert gradient == pytest.approx([-2 * bad / 5, -good / 5, -bad / 5, -bad / 5], abs=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.4])
def test_ratio_is_one_on_the_first_step_on_policy_and_only_at_the_sampling_temperature(temperature):
    # two different forwards: token by token through the cache, and packed in training
    model = tiny_model()
    prompts = [Prompt("p", [3, 1, 4], 4), Prompt("q", [1, 5], 4)]
    with torch.no_grad():
        rollouts = list(generate(model, prompts, Sampling(temperature, 12, (EOS,), 0), CacheLimits(1000, 16, 8)))
    assert {r.temperature for r in rollouts} == {temperature}
    groups = []
    for name in ("p", "q"):
        own = [r for r in rollouts if r.problem_id == name]
        groups.append(Group(Problem(name, "?", ("1",)), own, np.array([1.0, 0, 0, 0]), np.array([True] + 3 * [False])))
    sequences = grpo.training_sequences(groups)

    def ratios(batch):
        optimizer = Recorder(model.parameters(), lr=0.0)
        return grpo.optimizer_step(model, optimizer, batch, PolicyLoss(), 40, 1e9).ratios

    stats = ratios(sequences)
    assert 0 < stats.logprob_diff_max < 1e-5  # not 0: one tensor compared with itself would be
    assert stats.ratio_mean == pytest.approx(1.0, abs=1e-5)
    assert stats.clip_low_share == stats.clip_high_share == stats.dual_clip_share == 0
    scored_at_one = ratios([replace(s, temperature=1.0) for s in sequences])
    assert scored_at_one.logprob_diff_mean > 0.1 and scored_at_one.clip_low_share + scored_at_one.clip_high_share > 0.1
