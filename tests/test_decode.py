"""Fast decoding equals the reference: packed weights, replayed steps, smaller batches after running out of memory."""

import gc
import importlib.util
import weakref

import numpy as np
import pytest
import torch
from test_rollout import AMPLE, LENGTHS, assert_same, check_logprobs, make_prompts, run, warm

import rollout
from bench.machine import LiveBytes
from engine import decode
from engine.adapter import Lora, add_lora, initialise_lora
from engine.batches import TrainingSequence
from grpo import PolicyLoss, optimizer_step
from model import Packed, load
from rollout import CacheLimits, RolloutError, SamplerStats


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint("qwen3", tied=False))


@pytest.fixture(scope="module")
def expected(model):
    """Return reference rollouts: the model's own forward, one sequence at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "sampling_forward", lambda model, rows: model)
        return run(model, make_prompts(), warm(), CacheLimits(tokens=1_000, page_size=16, rows=1))


# ------------------------------------------------------------------------------------------------ packed weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaling", ["plain", "warm yarn"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@torch.no_grad()
def test_packed_logits_equal_those_of_the_model(checkpoint, family, scaling, tied):
    model = load(checkpoint(family, tied, scaling))
    for rows in (1, 7, 64):
        fast = decode.PackedModel(model, rows)
        tokens = torch.randint(0, 97, (rows + 30,), generator=torch.Generator().manual_seed(rows))
        context = Packed([rows, 30])
        slow = model.logits(model.hidden(tokens, context))
        torch.testing.assert_close(fast.logits(fast.hidden(tokens, context)), slow, atol=1e-5, rtol=1e-5)


def test_sampling_with_packed_weights_changes_nothing(model, expected):
    assert isinstance(decode.sampling_forward(model, 8), decode.PackedModel)
    assert_same(run(model, make_prompts(), warm()), expected)


@torch.no_grad()
def test_packed_copies_follow_weight_changes_and_never_change_the_weights(checkpoint):
    model = load(checkpoint("qwen3", tied=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(model, make_prompts(), warm())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for parameter in model.parameters():
        parameter.mul_(1.2)
    for found in run(model, make_prompts(), warm()).values():
        check_logprobs(model, found, 1.0)


@pytest.mark.parametrize("family, tied", [("qwen3", True), ("qwen2", False), ("llama", True)])
@torch.no_grad()
def test_sampling_with_packed_weights_applies_a_lora_adapter(checkpoint, family, tied):
    """Cover fused projections and folded norms; random B matrices make the adapter change the logits."""
    model = load(checkpoint(family, tied))
    plain = run(model, make_prompts(), warm())
    add_lora(model, Lora(rank=3, alpha=6.0, base=""))
    initialise_lora(model, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(1))
    found = run(model, make_prompts(), warm())
    assert any(found[key].tokens.tolist() != plain[key].tokens.tolist() for key in found)
    for response in found.values():
        check_logprobs(model, response, 1.0)


# ------------------------------------------------------------------------------------------------ replayed steps


class FakeGraph:
    """A stand-in for CUDA graphs: recording runs nothing, replaying runs the recorded step."""

    recorded: list = []

    @classmethod
    def capture(cls, step, pool):
        cls.recorded.append(step)
        return step, pool


@pytest.fixture
def graphed(monkeypatch):
    """Decode as on CUDA: static tensors, idle rows, several steps per synchronisation."""
    FakeGraph.recorded = []
    monkeypatch.setattr(rollout, "step_graphs", lambda rows, device, dtype: decode.StepGraphs(rows))
    monkeypatch.setattr(decode, "capture_graph", FakeGraph.capture)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton==3.7.1")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU there is no interpreter: bench/gpu_check.py")
def test_sampling_with_the_paged_kernel_draws_the_same(model, graphed, monkeypatch):
    """Sample as on CUDA, with the kernel in Triton's interpreter: small pages, idle rows, a scratch page."""
    request = make_prompts(n=1), warm(max_new_tokens=6), CacheLimits(tokens=1_000, page_size=16, rows=5)
    expected = run(model, *request)
    monkeypatch.setattr(rollout, "has_paged_attention", lambda device, dtype: True)
    assert_same(run(model, *request), expected)


def test_the_cache_is_freed_when_sampling_ends(model, graphed):
    """Regression: graphs kept the sampler and its cache alive until garbage collection."""
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            sampler = rollout._Sampler(model, make_prompts(), warm(), AMPLE, SamplerStats())
            cache = weakref.ref(sampler.cache)
            list(sampler.run(lambda: False))
        FakeGraph.recorded.clear()
        sampler.graphs.replays.clear()  # unlike a CUDA graph, the stand-in holds its step
        del sampler
        assert cache() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize(
    "limits",
    [AMPLE, CacheLimits(100_000, 16, 3), CacheLimits(112, 16, 100), CacheLimits(66, 1, 5), CacheLimits(165, 65, 9)],
)
def test_replaying_several_steps_changes_nothing(model, expected, graphed, monkeypatch, steps, limits):
    monkeypatch.setattr(rollout, "STEPS_BETWEEN_SYNCS", steps)
    stats = SamplerStats()
    assert_same(run(model, make_prompts(), warm(), limits, stats), expected)
    drawn = sum(len(r.tokens) for r in expected.values())
    assert stats.decoded_tokens == drawn  # tokens drawn past the end of a response are dropped
    assert FakeGraph.recorded


def test_each_batch_size_is_recorded_at_most_once(model, graphed):
    run(model, make_prompts(n=4), warm())
    sizes = {decode.padded_rows(rows, 24) for rows in range(1, 25)}
    assert 0 < len(FakeGraph.recorded) <= len(sizes)


def test_padding_a_batch_wastes_few_rows():
    for most in (1, 5, 24, 64, 100, 384):
        for rows in range(1, most + 1):
            size = decode.padded_rows(rows, most)
            assert rows <= size <= most
            assert size - rows <= max(3, rows // 4)
    assert len({decode.padded_rows(rows, 384) for rows in range(1, 385)}) <= 40


def test_idle_rows_never_write_to_the_pages_of_a_response(model, graphed):
    alone = run(model, make_prompts(n=1)[:1], warm())
    together = run(model, make_prompts(n=3), warm())
    assert_same(alone, {key: together[key] for key in alone})


# ---------------------------------------------------------------------------------------------- out of memory


def fail_at(monkeypatch, owner, name: str, times: set[int], error: Exception) -> list[int]:
    """Make the calls of a method numbered `times`, from 0, raise; return a list with the number of calls."""
    original, calls = getattr(owner, name), [0]

    def sometimes(*args, **kwargs):
        calls[0] += 1
        if calls[0] - 1 in times:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, sometimes)
    return calls


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
@pytest.mark.parametrize("times", [{0}, {1}, {5}, {3, 4}, {0, 1, 2}])
def test_running_out_of_memory_shrinks_the_batch_and_changes_nothing(model, expected, monkeypatch, error, times):
    """The first calls prefill, later ones decode."""
    fail_at(monkeypatch, decode.PackedModel, "hidden", times, error)
    stats = SamplerStats()
    assert_same(run(model, make_prompts(), warm(), AMPLE, stats), expected)
    assert stats.memory_retries == len(times)


def test_every_page_is_free_again_after_running_out_of_memory(model, monkeypatch):
    fail_at(monkeypatch, decode.PackedModel, "hidden", {0, 4, 5}, ERRORS[0])
    with torch.no_grad():
        sampler = rollout._Sampler(model, make_prompts(), warm(), AMPLE, SamplerStats())
        assert len(list(sampler.run(lambda: False))) == 2 * len(LENGTHS)
    assert sorted(sampler.cache.free) == list(range(sampler.cache.pages))


def test_a_cache_that_does_not_fit_is_halved(model, expected, monkeypatch):
    fail_at(monkeypatch, rollout.PagedCache, "__init__", {0, 1}, ERRORS[0])
    stats = SamplerStats()
    assert_same(run(model, make_prompts(), warm(), AMPLE, stats), expected)
    assert stats.memory_retries == 2


def test_too_little_memory_for_one_row_raises_one_sentence(model, monkeypatch):
    fail_at(monkeypatch, decode.PackedModel, "hidden", set(range(1000)), ERRORS[0])
    with pytest.raises(RolloutError, match="^out of memory with one row[^\n]+$"):
        run(model, make_prompts(), warm())


def test_other_errors_are_not_mistaken_for_out_of_memory(model, monkeypatch):
    fail_at(monkeypatch, decode.PackedModel, "hidden", {3}, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        run(model, make_prompts(), warm())


# ----------------------------------------------------------------------------------------- memory of a step


def test_the_peak_of_a_step_is_the_larger_of_its_phases_not_their_sum(checkpoint):
    """The cache is freed before the update begins, while the rollouts stay alive."""
    model = load(checkpoint("qwen3", tied=True))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    prompts, limits = make_prompts(n=8), CacheLimits(tokens=100_000, page_size=64, rows=48)

    def sample() -> list[TrainingSequence]:
        with torch.no_grad():
            rollouts = list(rollout.generate(model, prompts, warm(), limits))
        tokens = [np.concatenate([r.prompt, r.tokens]) for r in rollouts]
        return [TrainingSequence(t, len(r.prompt), 1.0, r.logprobs, 1.0) for t, r in zip(tokens, rollouts, strict=True)]

    def update(sequences: list[TrainingSequence]) -> None:
        optimizer_step(model, optimizer, sequences, PolicyLoss(), max_tokens=4096)

    update(sample())  # allocates the optimizer's moments
    with LiveBytes() as sampling:
        sequences = sample()
    with LiveBytes() as updating:
        update(sequences)
    with LiveBytes() as step:
        update(sample())
    assert min(sampling.most, updating.most) > 0.2 * max(sampling.most, updating.most)
    assert step.most < 1.05 * max(sampling.most, updating.most)
