"""engine/memory.py: an update that runs out of memory is retried with smaller micro-batches, or stops with an error."""

import types

import numpy as np
import pytest
import torch
from test_offload import prepared, tiny, whole
from torch.multiprocessing.reductions import StorageWeakRef

import grpo
import model as models
from engine import distributed
from engine.batches import TrainingSequence
from engine.checkpoint import RunState
from engine.errors import UserError
from engine.memory import UpdateError, out_of_memory
from engine.run import Run
from grpo import PolicyLoss
from lab.recipe import RlStage


@pytest.fixture(scope="module")
def processes():
    yield distributed.start()
    distributed.stop()


def ragged_sequences(count=20):
    random, sequences = np.random.default_rng(0), []
    for _ in range(count):
        prompt, response = int(random.integers(1, 6)), int(random.integers(1, 9))
        tokens = random.integers(0, 23, prompt + response).astype(np.int32)
        logprobs = random.normal(-3, 0.7, response).astype(np.float32)
        sequences.append(TrainingSequence(tokens, prompt, float(random.normal()), logprobs))
    return sequences


class Recorder(torch.optim.SGD):
    """Record the gradients passed to a step."""

    def step(self, closure=None):
        self.seen = [whole(p.grad) for group in self.param_groups for p in group["params"]]


class Burst(torch.autograd.Function):
    """Call `turn` in backward, which may raise an out-of-memory error."""

    @staticmethod
    def forward(ctx, x, turn):
        ctx.turn = turn
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.turn()
        return gradient, None


def run_out(monkeypatch, where, at, error=None):
    """Make MLPs fail in forward, or in backward, at these turns, counted over all layers.

    Return a list to which each failure adds the number of inputs of the failed attempt that are still in memory."""
    turns, inputs, held, failed = 0, [], [], False
    forward = models.MLP.forward

    def turn():
        nonlocal turns, failed
        turns += 1
        if at == "always" or turns in at:
            failed = True
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def failing(self, x):
        nonlocal failed
        if failed:
            held.append(sum(not reference.expired() for reference in inputs))
            inputs.clear()
            failed = False
        inputs.append(StorageWeakRef(x.untyped_storage()))
        if where == "forward":
            turn()
            return forward(self, x)
        return forward(self, Burst.apply(x, turn))

    monkeypatch.setattr(models.MLP, "forward", failing)
    return held


def update(model, max_tokens, sequences=None):
    optimizer = Recorder(model.parameters(), lr=0.0)
    stats = grpo.optimizer_step(model, optimizer, sequences or ragged_sequences(), PolicyLoss(), max_tokens, 1e9)
    return stats, optimizer.seen


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("at", [(2,), (5,), (5, 10)])  # in the first micro-batch, in the second, and again
def test_a_retried_step_has_the_same_gradient(processes, monkeypatch, where, at, recompute, sharded):
    mesh = processes.mesh if sharded else None
    expected, gradient = update(tiny(), 10_000)
    assert (expected.micro_batch_tokens, expected.memory_retries) == (10_000, 0)
    with monkeypatch.context() as patch:
        held = run_out(patch, where, at)
        model = prepared(tiny(mesh), recompute, recompute)
        stats, found = update(model, 80)
    assert stats.memory_retries == len(at) == len(held) and not any(held)
    assert stats.micro_batch_tokens <= 80 / 2 ** len(at)
    assert stats.loss == pytest.approx(expected.loss, abs=1e-6)
    for mine, wanted in zip(found, gradient, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
    again, found = update(model, 10_000)  # the next step is not affected
    assert again.memory_retries == 0
    for mine, wanted in zip(found, gradient, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)


def test_a_limit_above_the_batch_is_halved_from_the_size_used(monkeypatch):
    sequences = ragged_sequences()
    tokens = sum(len(sequence.tokens) for sequence in sequences)
    run_out(monkeypatch, "forward", (1,))
    assert update(tiny(), 1_000_000)[0].micro_batch_tokens == tokens // 2


def test_one_sequence_that_does_not_fit_is_an_update_error(monkeypatch):
    run_out(monkeypatch, "forward", "always")
    with pytest.raises(UpdateError, match="one sequence at a time, of at most 13 tokens: train a LoRA") as caught:
        update(tiny(), 1_000)
    assert "\n" not in str(caught.value) and isinstance(caught.value, UserError)


def test_moments_that_do_not_fit_are_an_update_error():
    class Greedy(torch.optim.SGD):
        def step(self, closure=None):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model = tiny()
    with pytest.raises(UpdateError, match="set offload_optimizer = true"):
        grpo.optimizer_step(model, Greedy(model.parameters(), lr=0.0), ragged_sequences(), PolicyLoss(), 1_000)


def test_several_processes_do_not_retry(monkeypatch):
    monkeypatch.setattr(grpo.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(grpo.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(grpo.dist, "get_world_size", lambda: 2)
    run_out(monkeypatch, "forward", (1,))
    with pytest.raises(UpdateError, match="set micro_batch_tokens to [0-9]+ or less and resume") as caught:
        update(tiny(), 1_000)
    assert "\n" not in str(caught.value)


def test_another_runtime_error_is_raised_unchanged(monkeypatch):
    run_out(monkeypatch, "backward", (1,), RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        update(tiny(), 1_000)


def test_out_of_memory_recognises_the_errors_of_each_allocator():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)  # the error of this machine's allocator
    assert out_of_memory(caught.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory.")) and out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not out_of_memory(RuntimeError("shapes do not match")) and not out_of_memory(ValueError("not enough memory"))


def test_the_smaller_size_is_kept_and_reported_once(processes, monkeypatch, capsys):
    model, stage = tiny(), RlStage()
    run = types.SimpleNamespace(model=model, processes=processes, micro_batch_tokens=80, state=RunState(step=6))
    run.asked_to_stop = lambda: False
    with monkeypatch.context() as patch:
        run_out(patch, "forward", (1,))
        for _ in range(2):
            run.optimizer = Recorder(model.parameters(), lr=0.0)
            stats = Run.update(run, ragged_sequences(), PolicyLoss(), stage, learning_rate=0.0)
    assert stats.memory_retries == 0 and stats.micro_batch_tokens == run.micro_batch_tokens < 80
    said = capsys.readouterr().out
    assert said.count("out of memory") == 1 and said.startswith("step 7: ")
