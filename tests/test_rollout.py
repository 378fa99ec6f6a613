"""The sampler draws from the right distribution, independent of the batch, and loses no token and no page."""

import itertools
import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, WINDOW

import rollout
from lab.plan import PUBLISHED, PUBLISHED_KEYS
from lab.plan_memory import Sampling as PlannedSampling
from lab.plan_memory import Shape, sampling_moment
from model import ModelError, Packed, load, parse_config
from rollout import (
    CacheLimits,
    Prompt,
    RolloutError,
    SamplerStats,
    Sampling,
    cache_bytes_per_token,
    counter_uniform,
    generate,
    sample,
    sequence_key,
)

AMPLE = CacheLimits(tokens=100_000, page_size=16, rows=100)
STOP = (3, 14, 15, 92, 65)  # of 97 tokens: a sampled response has about twenty tokens
LENGTHS = (1, 30, 7, 16, 17, 33)


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint("qwen3", tied=False))


def make_prompts(n: int = 2, lengths=LENGTHS) -> list[Prompt]:
    generator = random.Random(5)
    return [Prompt(f"p{i}", [generator.randrange(VOCABULARY) for _ in range(k)], n) for i, k in enumerate(lengths)]


def run(model, prompts, sampling, limits=AMPLE, stats=None) -> dict:
    """Return rollouts by (problem, index), after checking that each requested one came exactly once."""
    with torch.no_grad():
        rollouts = list(generate(model, prompts, sampling, limits, stats))
    found = {(r.problem_id, r.index): r for r in rollouts}
    wanted = {(p.problem_id, i) for p in prompts for i in range(p.first, p.first + p.n)}
    assert len(rollouts) == len(wanted) and found.keys() == wanted
    return found


def assert_same(ours: dict, expected: dict) -> None:
    assert ours.keys() == expected.keys()
    for key, rollout_ in ours.items():
        assert rollout_.tokens.tolist() == expected[key].tokens.tolist(), key
        assert rollout_.finish_reason == expected[key].finish_reason
        np.testing.assert_allclose(rollout_.logprobs, expected[key].logprobs, atol=1e-5)


@torch.no_grad()
def full_logits(model, tokens) -> torch.Tensor:
    """Return logits (T, V) from a forward without a cache."""
    return model.logits(model.hidden(torch.as_tensor(np.array(tokens), dtype=torch.int64), Packed([len(tokens)])))


def warm(**changes) -> Sampling:
    return replace(Sampling(temperature=1.0, max_new_tokens=32, stop_tokens=STOP, seed=11), **changes)


# ------------------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("scaling", ["plain", "warm yarn"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_greedy_tokens_equal_transformers_generate(checkpoint, family, scaling):
    from transformers import AutoModelForCausalLM

    folder = checkpoint(family, False, scaling)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = make_prompts(n=1)  # six prompts for 4 rows: rows are reused
    greedy = warm(temperature=0.0, max_new_tokens=25)
    ours = run(load(folder), prompts, greedy, CacheLimits(tokens=1_000, page_size=16, rows=4))
    for prompt in prompts:
        tokens = torch.tensor([prompt.tokens])
        expected = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=25,
            eos_token_id=list(STOP), pad_token_id=0,
        )  # fmt: skip
        mine = ours[prompt.problem_id, 0]
        assert mine.tokens.tolist() == expected[0, len(prompt.tokens) :].tolist()
        assert mine.prompt.tolist() == list(prompt.tokens)
        assert mine.finish_reason == ("stop" if mine.tokens[-1] in STOP else "length")


def test_greedy_responses_of_one_prompt_are_equal_and_scored_without_temperature(model):
    ours = run(model, make_prompts(n=3), warm(temperature=0.0))
    for (problem, _), found in ours.items():
        assert found.tokens.tolist() == ours[problem, 0].tokens.tolist()
        check_logprobs(model, found, 1.0)


# ------------------------------------------------------------------------------- independence of the batch


@pytest.fixture(scope="module")
def expected(model):
    return run(model, make_prompts(), warm())


def test_samples_differ_within_a_group_and_end_both_ways(expected):
    assert len({tuple(r.tokens.tolist()) for r in expected.values()}) == len(expected)
    assert {r.finish_reason for r in expected.values()} == {"stop", "length"}


@pytest.mark.parametrize("rows", [1, 3, 5, 100])
def test_slot_limit_changes_nothing(model, expected, rows):
    assert_same(run(model, make_prompts(), warm(), replace(AMPLE, rows=rows)), expected)


def test_order_of_the_prompts_changes_nothing(model, expected):
    assert_same(run(model, make_prompts()[::-1], warm()), expected)


def test_a_prompt_alone_draws_the_same_as_in_a_batch(model, expected):
    for prompt in make_prompts():
        alone = run(model, [prompt], warm())
        assert_same(alone, {key: r for key, r in expected.items() if key[0] == prompt.problem_id})


def test_later_rollouts_of_a_problem_equal_those_of_one_larger_request(model, expected):
    tail = run(model, [replace(prompt, n=1, first=1) for prompt in make_prompts()], warm())
    assert_same(tail, {key: r for key, r in expected.items() if key[1] == 1})


def test_per_rollout_limits_only_shorten_responses(model, expected):
    limits = [[3, 1], [2, 10_000], [5, 4], [1, 2]]
    prompts = [replace(p, limits=own) for p, own in zip(make_prompts(), itertools.cycle(limits), strict=False)]
    wanted = {(p.problem_id, i): p.limits[i] for p in prompts for i in range(2)}
    for key, found in run(model, prompts, warm()).items():
        cut = expected[key].tokens[: wanted[key]]
        assert found.tokens.tolist() == cut.tolist()
        assert found.finish_reason == ("stop" if cut[-1] in STOP else "length")


@pytest.mark.parametrize("page_size", [1, 5, 16, 65, 10_000])
def test_page_size_changes_nothing(model, expected, page_size):
    assert_same(run(model, make_prompts(), warm(), replace(AMPLE, page_size=page_size)), expected)


@pytest.mark.parametrize("rows", [3, 100])
def test_one_page_per_row_in_a_tight_cache_changes_nothing(model, expected, rows):
    """Room for two and a half sequences: one row decodes while another prompt is held, and rows move into gaps."""
    assert_same(run(model, make_prompts(), warm(), CacheLimits(tokens=165, page_size=65, rows=rows)), expected)


@pytest.mark.parametrize("page_size, tokens", [(16, 96), (8, 100), (4, 72), (1, 66)])
def test_preemption_changes_nothing(model, expected, page_size, tokens):
    stats = SamplerStats()
    ours = run(model, make_prompts(), warm(), CacheLimits(tokens, page_size, rows=100), stats)
    assert stats.preemptions > 0
    assert_same(ours, expected)


def test_prefilling_in_several_forwards_changes_nothing(model, expected, monkeypatch):
    monkeypatch.setattr(rollout, "LARGEST_CPU_PREFILL", 20)
    assert_same(run(model, make_prompts(), warm()), expected)


@pytest.mark.parametrize("change", [{"seed": 12}, {"step": 1}])
def test_another_seed_or_step_draws_other_tokens(model, expected, change):
    other = run(model, make_prompts(), warm(**change))
    same = sum(other[key].tokens.tolist() == expected[key].tokens.tolist() for key in expected)
    assert same <= 1


def test_random_limits_and_prompts_never_change_what_is_drawn(model):
    """Compare random page sizes, tight budgets, few rows and random group sizes with an ample cache."""
    dice = random.Random(20)
    preempted = 0
    for case in range(20):
        prompts, sampling, limits = random_request(dice)
        stats = SamplerStats()
        try:
            assert_same(run(model, prompts, sampling, limits, stats), run(model, prompts, sampling))
        except BaseException:
            print(f"case {case}: {limits} {sampling} {[(len(p.tokens), p.n) for p in prompts]}")
            raise
        preempted += stats.preemptions > 0
    assert preempted >= 3


def random_request(dice: random.Random) -> tuple[list[Prompt], Sampling, CacheLimits]:
    """Return some prompts, and limits with little more room than their longest sequence needs."""
    lengths = [dice.randint(1, dice.choice([2, 20, 45])) for _ in range(dice.randint(1, 6))]
    prompts = [
        Prompt(f"p{i}", [dice.randrange(VOCABULARY) for _ in range(n)], dice.randint(1, 4))
        for i, n in enumerate(lengths)
    ]
    stop = tuple(dice.sample(range(VOCABULARY), dice.choice([0, 1, 5, 20])))
    sampling = warm(max_new_tokens=dice.choice([1, 2, 9, 30]), stop_tokens=stop, seed=dice.randrange(1000))
    page_size = dice.randint(1, 40)
    least = (math.ceil((max(lengths) + sampling.max_new_tokens) / page_size) + 1) * page_size
    return prompts, sampling, CacheLimits(least + dice.choice([0, 1, 10, 60]), page_size, dice.randint(1, 10))


# ------------------------------------------------------------------------------------ contents of a rollout


def check_logprobs(model, found, temperature: float) -> None:
    sequence = np.concatenate([found.prompt, found.tokens])
    logits = full_logits(model, sequence)[len(found.prompt) - 1 : -1]
    naive = (logits / temperature).log_softmax(1)[torch.arange(len(found.tokens)), torch.as_tensor(found.tokens).long()]
    np.testing.assert_allclose(found.logprobs, naive.numpy(), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.4])
def test_logprobs_equal_a_full_forward_at_the_sampling_temperature(model, temperature):
    for found in run(model, make_prompts(), warm(temperature=temperature)).values():
        assert found.temperature == temperature and found.logprobs.dtype == np.float32
        assert len(found.logprobs) == len(found.tokens)
        check_logprobs(model, found, temperature)


def test_logprobs_after_preemption_equal_a_full_forward(model):
    stats = SamplerStats()
    rollouts = run(model, make_prompts(), warm(temperature=1.4), CacheLimits(96, 16, 100), stats)
    assert stats.preemptions > 0
    for found in rollouts.values():
        check_logprobs(model, found, 1.4)


def test_logprobs_ignore_top_k_and_top_p(model):
    for found in run(model, make_prompts(), warm(temperature=1.4, top_k=5, top_p=0.9)).values():
        check_logprobs(model, found, 1.4)


def test_a_response_ends_with_the_stop_token_it_sampled_or_at_the_limit(expected):
    for found in expected.values():
        assert not set(found.tokens[:-1].tolist()) & set(STOP)
        if found.finish_reason == "stop":
            assert found.tokens[-1] in STOP and len(found.tokens) <= 32
        else:
            assert found.finish_reason == "length" and found.tokens[-1] not in STOP and len(found.tokens) == 32


def test_a_stop_token_at_the_length_limit_counts_as_a_stop(model, expected):
    key, found = next((key, r) for key, r in expected.items() if r.finish_reason == "stop" and len(r.tokens) > 1)
    again = run(model, make_prompts(), warm(max_new_tokens=len(found.tokens)))[key]
    assert again.tokens.tolist() == found.tokens.tolist() and again.finish_reason == "stop"


def test_one_new_token(model, expected):
    for key, found in run(model, make_prompts(), warm(max_new_tokens=1)).items():
        assert found.tokens.tolist() == expected[key].tokens[:1].tolist()
        assert found.finish_reason == ("stop" if found.tokens[0] in STOP else "length")


def test_without_stop_tokens_every_response_fills_its_length(model):
    for found in run(model, make_prompts(), warm(stop_tokens=())).values():
        assert len(found.tokens) == 32 and found.finish_reason == "length"


def test_a_sequence_may_fill_the_window_to_its_last_token(model):
    prompt = Prompt("p", list(range(90)), 2)
    for found in run(model, [prompt], warm(max_new_tokens=WINDOW - 90, stop_tokens=())).values():
        assert len(found.tokens) == WINDOW - 90
        check_logprobs(model, found, 1.0)


def test_prompts_may_be_numpy_arrays(model, expected):
    prompts = [replace(prompt, tokens=np.array(prompt.tokens, dtype=np.int32)) for prompt in make_prompts()]
    assert_same(run(model, prompts, warm(), CacheLimits(96, 16, 100)), expected)


def test_no_prompts_no_rollouts(model):
    assert run(model, [], warm()) == {}
    assert run(model, [Prompt("p", [1], 0)], warm()) == {}


# ----------------------------------------------------------------------------------------- prefills, rows, pages


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("page_size", [16, 10_000])
def test_a_prompt_is_prefilled_once_for_all_its_responses(model, rows, page_size):
    stats = SamplerStats()
    prompts = make_prompts(n=4)
    run(model, prompts, warm(max_new_tokens=8), CacheLimits(100_000, page_size, rows), stats)
    assert stats.prefilled_tokens == sum(len(prompt.tokens) - 1 for prompt in prompts)
    assert stats.preemptions == 0


def test_finished_rows_are_replaced_by_waiting_ones_at_once(model):
    stats = SamplerStats()
    rollouts = run(model, make_prompts(), warm(), replace(AMPLE, rows=4), stats)
    lengths = [len(r.tokens) for r in rollouts.values()]
    assert stats.decoded_tokens == sum(lengths)  # no response is decoded past its end
    assert stats.decode_steps < sum(lengths) / 4 + 32  # no row idles while responses wait


def test_rollouts_are_yielded_as_they_finish(model):
    stats = SamplerStats()
    seen = []
    with torch.no_grad():
        for found in generate(model, make_prompts(), warm(), AMPLE, stats):
            assert len(found.tokens) == stats.decode_steps  # all rows started together
            seen.append(len(found.tokens))
    assert seen == sorted(seen) and seen[0] < seen[-1]


def test_an_abandoned_call_ends_before_the_next_decode(model):
    stats, answers = SamplerStats(), iter([False, False, False, True])
    with torch.no_grad():
        done = list(generate(model, make_prompts(), warm(), AMPLE, stats, lambda: next(answers)))
    assert stats.decode_steps == 3 and all(len(response.tokens) <= 3 for response in done)


ANY_LIMITS = [AMPLE, *(CacheLimits(*x) for x in [(96, 16, 100), (66, 1, 5), (165, 65, 100), (100_000, 10_000, 3)])]


@pytest.mark.parametrize("limits", ANY_LIMITS)
def test_every_page_comes_back(model, limits):
    with torch.no_grad():
        sampler = rollout._Sampler(model, make_prompts(), warm(), limits, SamplerStats())
        assert len(list(sampler.run(lambda: False))) == 2 * len(LENGTHS)
    assert sorted(sampler.cache.free) == list(range(sampler.cache.pages))
    assert set(sampler.cache.users) == {0}
    assert sampler.cache.pages * sampler.page_size <= limits.tokens


@pytest.mark.parametrize("limits", [CacheLimits(96, 16, 100), CacheLimits(120, 7, 100), CacheLimits(165, 65, 100)])
def test_page_users_are_correct_at_every_step(model, limits):
    """A page's users are the rows and the prefix that list it; free pages have none."""
    with torch.no_grad():
        sampler = rollout._Sampler(model, make_prompts(), warm(), limits, SamplerStats())
        retire = sampler._retire

        def checked(*drawn):
            rollouts = retire(*drawn)
            users = [0] * sampler.cache.pages
            prefixes = {id(row.prefix): row.prefix for row in sampler.waiting}
            for pages in [row.pages for row in sampler.rows] + [p.pages for p in prefixes.values()]:
                for page in pages:
                    users[page] += 1
            assert users == sampler.cache.users
            assert sorted(sampler.cache.free) == [page for page, n in enumerate(users) if n == 0]
            return rollouts

        sampler._retire = checked
        assert len(list(sampler.run(lambda: False))) == 2 * len(LENGTHS)


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "prompt, sampling, limits, said",
    [
        (Prompt("p7", [], 1), warm(), AMPLE, "problem p7: the prompt is empty"),
        (Prompt("p7", [1] * 225, 1), warm(), AMPLE, "exceeds the model's window of 256"),
        (Prompt("p7", [1] * 20, 1), warm(), CacheLimits(79, 16, 4), "exceed the cache of 79 tokens"),
        (Prompt("p7", [1] * 20, 1), warm(), CacheLimits(103, 60, 4), "exceed the cache of 103 tokens"),
        (Prompt("p7", [1], 2, limits=[3, 0]), warm(), AMPLE, "problem p7: a limit of 0 new tokens is below 1"),
        (Prompt("p7", [1], 1), warm(temperature=-1.0), AMPLE, "cannot sample"),
        (Prompt("p7", [1], 1), warm(max_new_tokens=0), AMPLE, "cannot sample"),
        (Prompt("p7", [1], 1), warm(top_p=0.0), AMPLE, "cannot sample"),
        (Prompt("p7", [1], 1), warm(top_p=1.5), AMPLE, "cannot sample"),
        (Prompt("p7", [1], 1), warm(top_k=-1), AMPLE, "cannot sample"),
        (Prompt("p7", [1], 1), warm(), replace(AMPLE, rows=0), "cannot sample"),
        (Prompt("p7", [1], 1), warm(), replace(AMPLE, page_size=0), "cannot sample"),
    ],
)
def test_invalid_requests_are_refused_before_any_work(model, prompt, sampling, limits, said):
    with pytest.raises(RolloutError, match="^[^\n]+$") as error:
        generate(model, [Prompt("fine", [1], 1), prompt], sampling, limits)  # raises before iteration
    assert said in str(error.value)


def test_the_smallest_accepted_cache_suffices(model):
    prompt = Prompt("p", [1] * 20, 5)
    run(model, [prompt], warm(stop_tokens=()), CacheLimits(80, 16, 4))  # 52 tokens: four pages and a spare one


def test_pages_longer_than_any_sequence_need_no_larger_cache(model, expected):
    """Regression: the check used the requested page size, the sampler the length of the longest sequence."""
    assert_same(run(model, make_prompts(), warm(), CacheLimits(tokens=500, page_size=10_000, rows=9)), expected)


def test_a_cache_of_the_free_memorys_size_changes_nothing_but_the_preemptions(model, expected, monkeypatch):
    size = cache_bytes_per_token(model.config, torch.float32)
    stats = SamplerStats()
    assert_same(run(model, make_prompts(), warm(), replace(AMPLE, tokens=0, page_size=4), stats), expected)
    assert not stats.preemptions
    longest = max(len(prompt.tokens) for prompt in make_prompts()) + warm().max_new_tokens
    monkeypatch.setattr(rollout, "free_memory_bytes", lambda device: (longest + 8) * size)
    assert_same(run(model, make_prompts(), warm(), replace(AMPLE, tokens=0, page_size=4), stats), expected)
    assert stats.preemptions
    monkeypatch.setattr(rollout, "free_memory_bytes", lambda device: 3 * size)
    with pytest.raises(RolloutError, match="a cache for one sequence of .* does not fit"):
        run(model, make_prompts(), warm(), replace(AMPLE, tokens=0))


def test_a_cache_that_does_not_fit_is_shrunk_by_eighths(model, expected, monkeypatch):
    tried, cache = [], rollout.PagedCache

    def allocate(model, pages, *rest):
        tried.append(pages)
        if pages > 45:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return cache(model, pages, *rest)

    monkeypatch.setattr(rollout, "PagedCache", allocate)
    assert_same(run(model, make_prompts(), warm(), replace(AMPLE, tokens=64 * 4, page_size=4)), expected)
    assert tried == [64, 56, 49, 42]


def test_a_free_gpu_leaves_room_for_a_prefill_logits_and_a_desktop():
    config = parse_config(dict(zip(PUBLISHED_KEYS, PUBLISHED["Qwen/Qwen3-0.6B"], strict=True)))
    sampling = PlannedSampling(1024, 16_384, 256, 8, 48, 256, 0)
    shape = Shape(config)
    tokens = rollout.free_cache_tokens(20 * 2**30, config, torch.bfloat16, True, 48, sampling.longest)
    left = 20 * 2**30 - sum(sampling_moment(shape, replace(sampling, cache_tokens=tokens)).values())
    assert 1.5 * 2**30 <= left < 1.8 * 2**30
    assert rollout.free_cache_tokens(2**30, config, torch.bfloat16, True, 48, sampling.longest) == 0


# --------------------------------------------------------------------------------------------------- the draw


def exact_probabilities(logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> list[float]:
    """Compute the distribution by sorting and summing Python floats."""
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    order = order[: top_k or len(order)]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


CUTS = [(0, 1.0), (5, 1.0), (0, 0.8), (6, 0.7), (1, 1.0), (0, 1e-6), (1_000, 0.999)]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("top_k, top_p", CUTS)
def test_draws_follow_the_exact_distribution(temperature, top_k, top_p):
    """Pearson's chi-square over 20,000 draws stays within five standard deviations of its mean."""
    draws, size = 20_000, 12
    logits = torch.randn(size, generator=torch.Generator().manual_seed(8)) * 1.5
    exact = exact_probabilities(logits, temperature, top_k, top_p)
    sampling = warm(temperature=temperature, top_k=top_k, top_p=top_p)
    keys = torch.tensor([sequence_key(0, 0, "p", i) for i in range(draws)])
    tokens, logprobs = sample(logits.expand(draws, -1), sampling, counter_uniform(keys, torch.zeros_like(keys)))
    counts = tokens.bincount(minlength=size).tolist()
    statistic = 0.0
    for count, probability in zip(counts, exact, strict=True):
        if probability == 0:
            assert count == 0
        else:
            statistic += (count - draws * probability) ** 2 / (draws * probability)
    freedom = sum(p > 0 for p in exact) - 1
    assert statistic <= freedom + 5 * math.sqrt(2 * freedom)
    assert torch.allclose(logprobs, (logits / temperature).log_softmax(0)[tokens], atol=1e-6)


@pytest.mark.parametrize("top_k, top_p", [(1, 1.0), (4, 1.0), (0, 0.5), (3, 0.9)])
def test_sampled_tokens_stay_within_the_cut(model, top_k, top_p):
    rollouts = run(model, make_prompts(), warm(temperature=1.2, top_k=top_k, top_p=top_p))
    for found in rollouts.values():
        logits = full_logits(model, np.concatenate([found.prompt, found.tokens]))[len(found.prompt) - 1 : -1]
        for row, token in zip(logits, found.tokens, strict=True):
            assert exact_probabilities(row, 1.2, top_k, top_p)[token] > 0


def test_each_row_is_drawn_from_its_own_logits_with_its_own_uniform():
    generator = torch.Generator().manual_seed(4)
    logits, uniform = torch.randn(50, 20, generator=generator), torch.rand(50, generator=generator, dtype=torch.float64)
    for sampling in (warm(), warm(top_k=5, top_p=0.8), warm(temperature=0.0)):
        together = sample(logits, sampling, uniform)
        for i in range(50):
            alone = sample(logits[i : i + 1], sampling, uniform[i : i + 1])
            assert torch.equal(together[0][i], alone[0][0]) and torch.allclose(together[1][i], alone[1][0], atol=1e-6)


@pytest.mark.parametrize("cut", [{}, {"top_k": 7}, {"top_p": 0.99999}])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_extreme_uniforms_never_draw_a_token_of_probability_zero(cut, scale):
    size = 1_000
    logits = torch.randn(64, size, generator=torch.Generator().manual_seed(6)) * scale
    logits[:, :3] = -math.inf
    logits[:, 500:] = -math.inf  # rounding at the upper end would draw one of these
    for uniform in (0.0, 2.0**-53, 0.5, 1 - 2.0**-24, 1 - 2.0**-25, 1 - 2.0**-53):
        tokens, logprobs = sample(logits, warm(**cut), torch.full((64,), uniform, dtype=torch.float64))
        assert logprobs.isfinite().all() and tokens.max() < 500 and tokens.min() >= 3


def test_nan_logits_draw_a_token_within_the_vocabulary():
    """On CUDA an index past the vocabulary would kill the process before its work is saved."""
    uniform = torch.tensor([0.0, 0.9], dtype=torch.float64)
    for size in (5, 128, 300):
        tokens, logprobs = sample(torch.full((2, size), math.nan), warm(), uniform)
        assert ((tokens >= 0) & (tokens < size)).all() and logprobs.isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}])
def test_logits_that_are_not_finite_are_an_error_of_the_model(checkpoint, value, how):
    """Regression: NaN weights were evaluated to the end, as a model that is never right."""
    folder = checkpoint("qwen3", tied=False)
    model = load(folder)
    with torch.no_grad():
        model.lm_head.weight[3] = value  # one token of the vocabulary
    sentence = f"^{re.escape(str(folder))}: the logits of token 1 of a response to problem p0 are not finite: its weights "
    with pytest.raises(ModelError, match=sentence):
        run(model, make_prompts(1)[:1], warm(**how))


def test_the_smallest_and_largest_uniforms_draw_the_first_and_last_token():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, 0.0, -math.inf]])
    ends = [sample(logits, warm(), torch.tensor([u], dtype=torch.float64))[0].item() for u in (0.0, 1 - 2.0**-53)]
    assert ends == [1, 3]


def test_bfloat16_logits_are_scored_in_float32():
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(2)).bfloat16()
    tokens, logprobs = sample(logits, warm(), torch.full((8,), 0.3, dtype=torch.float64))
    assert logprobs.dtype == torch.float32
    assert torch.allclose(logprobs, logits.float().log_softmax(1)[torch.arange(8), tokens], atol=1e-6)


# ----------------------------------------------------------------------------------- counter-based randomness


def splitmix64(key: int, count: int) -> float:
    """Return output number `count` of the reference generator with state `key`, in Python integers."""
    mask = 2**64 - 1
    z = (key + (count + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def test_splitmix64_reference_gives_the_published_first_number():
    assert splitmix64(1234567, 0) == (6457827717110365317 >> 11) * 2.0**-53


def test_counter_uniform_equals_splitmix64():
    dice = random.Random(1)
    keys = [0, 1, -1, 2**63 - 1, -(2**63)] + [dice.randrange(-(2**63), 2**63) for _ in range(500)]
    counts = [dice.choice([0, 1, 2, 131_071, dice.randrange(10**6)]) for _ in keys]
    ours = counter_uniform(torch.tensor(keys), torch.tensor(counts))
    assert ours.dtype == torch.float64
    assert ours.tolist() == [splitmix64(key, count) for key, count in zip(keys, counts, strict=True)]
    assert 0 <= ours.min() and ours.max() < 1


def test_counter_uniforms_are_even_along_keys_and_along_counters():
    keys = torch.tensor([sequence_key(1, 2, "p", i) for i in range(10_000)])
    along_keys = counter_uniform(keys, torch.zeros_like(keys))
    along_counts = counter_uniform(keys[:1].expand(10_000), torch.arange(10_000))
    for uniforms in (along_keys, along_counts):
        counts = (uniforms * 20).long().bincount(minlength=20)
        assert ((counts - 500) ** 2 / 500).sum() < 19 + 5 * math.sqrt(2 * 19)
        pairs = (uniforms[:-1] * 4).long() * 4 + (uniforms[1:] * 4).long()
        counts = pairs.bincount(minlength=16)
        assert ((counts - 625) ** 2 / 625).sum() < 15 + 5 * math.sqrt(2 * 15)


def test_sequence_keys_differ_in_every_argument():
    numbers = (0, 1, 11)
    keys = {sequence_key(*x) for x in itertools.product(numbers, numbers, ("a", "b", "1"), numbers)}
    assert len(keys) == 81 and all(-(2**63) <= key < 2**63 for key in keys)


def test_live_rollouts_grow_by_what_is_drawn_and_change_nothing(model):
    prompts, sampling = make_prompts(), Sampling(1.0, 24, STOP, seed=3)
    expected, seen, ended = run(model, prompts, sampling), {}, {}
    with torch.no_grad():
        for found in generate(model, prompts, sampling, replace(AMPLE, rows=5), live=True):
            key, tokens = (found.problem_id, found.index), found.tokens.tolist()
            assert key not in ended
            whole = expected[key].tokens.tolist()
            assert tokens == whole[: seen.get(key, 0) + 1]  # without graphs a decode draws one token
            assert found.finish_reason == ("" if len(tokens) < len(whole) else expected[key].finish_reason)
            seen[key] = len(tokens)
            if found.finish_reason:
                ended[key] = found
    assert_same(ended, expected)
