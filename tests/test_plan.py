"""lab/plan.py: estimates compared with the bytes of the real update and sampler, and the output of --plan."""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import rollout
from bench.sampler import Case, roofline_seconds
from engine.adapter import initialise_lora
from engine.batches import TrainingSequence
from grpo import PolicyLoss, optimizer_step
from lab import machine as cards
from lab import plan
from lab.plan_memory import GIB, Sampling, Shape, Update, plan_stages, sampling_moment
from lab.recipe import RecipeError, load_recipe
from model import ModelError, Transformer, parse_config

ROOT = Path(__file__).resolve().parent.parent
specification = importlib.util.spec_from_file_location("bench_plan", ROOT / "bench" / "plan.py")
bench = importlib.util.module_from_spec(specification)
specification.loader.exec_module(bench)

LORA_24GB = ROOT / "recipes" / "polaris-4b-lora-24gb.toml"


def machine(memory=24.0, gpus=1, **others):
    """GPUs with this memory."""
    return replace(cards.CARDS.get(memory, cards.Machine(memory)), gpus=gpus, **others)


def lines(capsys, recipe, overrides=(), memory=24.0, processes=1, **others):
    """Return whether a recipe fits, and the printed plan."""
    fits = plan.show_plan(load_recipe(recipe, overrides), machine(memory, processes, **others))
    return fits, capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- against the code


@pytest.mark.parametrize("name", bench.UPDATES)
def test_the_updates_memory_matches_the_plan(name):
    overrides, update, sequences = bench.UPDATES[name]
    config = parse_config(bench.SMALL | overrides)
    measured = bench.update_bytes(config, update, sequences)
    assert bench.estimated_update(config, update)[1] == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("name", bench.SAMPLERS)
def test_the_samplers_memory_matches_the_plan(name):
    overrides, sampling = bench.SAMPLERS[name]
    config = parse_config(bench.SMALL | overrides)
    measured = bench.sampling_bytes(config, sampling)
    assert sum(sampling_moment(Shape(config), sampling).values()) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("processes", [1, 8])
def test_the_updates_memory_at_full_width_in_bfloat16_matches_the_plan(processes):
    config = bench.published("Qwen/Qwen3-4B", 2)
    update = Update(40_960, 39_936, processes=processes)
    measured = bench.update_bytes(config, update)
    assert measured > 7 * GIB  # the tensors are fake
    assert bench.estimated_update(config, update)[1] == pytest.approx(measured, rel=0.15)


def test_the_counter_counts_live_tensors_only():
    counter = bench.LiveBytes()
    with counter:
        first = torch.zeros(1000)
        view = first[10:]
        del first
        for _ in range(3):
            second = torch.ones(500)
        second.untyped_storage().resize_(0)
    assert counter.live == 4000 and view.numel() == 990
    assert counter.most == 4000 + 2 * 2000  # the new tensor is made before the name lets go of the old one


def test_the_parameter_count_is_the_models():
    for family, tied in (("qwen3", True), ("qwen2", False), ("llama", True)):
        config = parse_config(bench.SMALL | {"model_type": family, "tie_word_embeddings": tied})
        built = sum(parameter.numel() for parameter in Transformer(config).parameters())
        assert Shape(config).parameters == built


def test_prefills_of_preempted_rows_match_the_plan(monkeypatch):
    config = parse_config(bench.SMALL | {"num_hidden_layers": 1})
    sampling = Sampling(40, 120, 8, 2, 8, 16, 400, torch.float32, kernels=False)
    seen, original = [], rollout.Prefill.__init__

    def note(self, cache, lengths, tables, device):
        seen.append(sum(lengths))
        original(self, cache, lengths, tables, device)

    monkeypatch.setattr(rollout.Prefill, "__init__", note)
    bench.sampling_bytes(config, sampling)
    assert 4 * 40 >= seen[0] > 100  # four prompts in one forward
    assert 160 < max(seen) <= sampling.prefill_tokens == 400  # several preempted rows at once


# ---------------------------------------------------------------------------------------- FLOPs, hours, cost


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rank", [0, 8])
def test_the_updates_flops_match_the_plan(rank, recompute):
    """All matrix products except attention, as counted by torch during a step."""
    config = parse_config(bench.SMALL | {"num_hidden_layers": 8})
    batch = [TrainingSequence(np.full(64, i, np.int32), 16, 1.0, np.zeros(48, np.float32)) for i in range(4)]

    def addmm(_, left, right, out_shape=None, **rest):  # in place: unknown to the counter
        return 2 * left[0] * left[1] * right[1]

    with bench.processes(1) as mesh:
        model = bench.build(config, mesh, torch.float32, recompute, rank)
        if rank:
            initialise_lora(model, 0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-6)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm}) as counter:
            optimizer_step(model, optimizer, batch, PolicyLoss(), 1000)
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "scaled_dot" not in str(op))
    if rank:  # no gradient of the first layer's input: nothing before it is trained
        counted += 2 * 256 * config.hidden_size * (128 + 64 + 64) + 3 * 2 * 256 * rank * config.hidden_size
    assert plan.update_flops(Shape(config), 256, 192, 0, recompute, rank) == counted


@pytest.mark.parametrize("recompute", [False, True])
def test_attention_flops_match_torchs_count(recompute):
    config = parse_config(bench.SMALL)
    shape = (1, config.num_attention_heads, 512, config.head_dim)
    forward, backward = sdpa_flop_count(shape, shape, shape), sdpa_backward_flop_count(shape, shape, shape, shape)
    expected = config.num_hidden_layers * (forward * (1 + recompute) + backward)
    assert plan.update_flops(Shape(config), 0, 0, 512 * 512, recompute) == expected


def test_a_steps_flops_come_from_its_tokens_and_their_causal_pairs():
    recipe = load_recipe(ROOT / "recipes" / "polaris-4b.toml", ["micro_batch_tokens=1000000"])
    shape, _ = plan.find_shape(recipe.model)
    stage = replace(recipe.stage[0], batch_problems=2, group_size=3, max_prompt_tokens=50, max_response_tokens=200)
    work = plan.update_work(shape, recipe, stage, machine(80.0, 4, response_tokens=200))  # all at the limit
    assert work.tokens == 6 * 200
    pairs = 6 * sum(1 for query in range(250) for _ in range(query + 1))
    expected = plan.update_flops(shape, 2 * 50 + 6 * 200, 6 * 200, pairs, True)
    assert work.flops == pytest.approx(expected, rel=1e-4)  # the pair of a token with itself counts half
    assert work.seconds == pytest.approx(work.flops / 4 / (0.4 * 989e12))


def test_lengths_have_the_moments_of_their_beta_distribution():
    for mean in (100, 400, 500, 900):
        drawn = 1000 * np.random.default_rng(0).beta(1, 1000 / mean - 1, 400_000)
        found = plan.lengths_below(1000, machine(response_tokens=mean))
        assert found == pytest.approx((drawn.mean(), (drawn**2).mean()), rel=0.01)
    assert plan.lengths_below(1000, machine(response_tokens=1000)) == (1000, 1000**2)
    assert plan.lengths_below(1000, machine(response_tokens=5000)) == (1000, 1000**2)
    assert plan.lengths_below(1000, machine())[0] == 400


@pytest.mark.parametrize("tflops, bandwidth", [(1e-3, 1e3), (1e3, 1e-3)])  # bound by FLOPs, bound by bandwidth
@pytest.mark.parametrize("rows", [3, 8])
def test_sampling_time_matches_the_samplers_roofline(tflops, bandwidth, rows):
    config = parse_config(bench.SMALL)
    shape, model = Shape(config), Transformer(config).to(torch.bfloat16)
    recipe = load_recipe(LORA_24GB, ["lora.rank=0", f"sampler.rows={rows}", "sampler.cache_tokens=100000"])
    cards = machine(1.0, 2, tflops=tflops, bandwidth_gbs=bandwidth, utilisation=1.0, response_tokens=300)
    work = plan.sampling_work(shape, recipe, 4, 4, 8, 300, cards)  # two problems to each of two cards
    expected = roofline_seconds(model, Case("", [[1] * 8] * 2, [[300] * 4] * 2, rows), bandwidth * 1e9, tflops * 1e12)
    assert work.seconds == pytest.approx(expected, rel=0.005) and work.tokens == 16 * 300
    slower = plan.sampling_work(shape, recipe, 4, 4, 8, 300, replace(cards, utilisation=0.25))
    assert slower.seconds == pytest.approx(4 * work.seconds)


def test_a_small_cache_is_slower_and_the_longest_response_bounds_the_time():
    recipe = load_recipe(ROOT / "recipes" / "polaris-4b.toml")
    shape, _ = plan.find_shape(recipe.model)

    def hours(gpus, cache):
        changed = replace(recipe, sampler=replace(recipe.sampler, cache_tokens=cache))
        return plan.sampling_work(shape, changed, 128, 8, 1024, 39_936, machine(80.0, gpus)).seconds / 3600

    assert hours(1, 60_000) > 1.5 * hours(1, 300_000) > 1.5 * hours(1, 1_000_000)
    # 8 responses to a card at once, 39,936 steps for the one that goes to the limit: weights and rows, in bytes
    weights = 2 * (36 * (2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728) + 151_936 * 2560)
    mean, context = 0.4 * 39_936, 1024 + 0.4 / 1.4 * 39_936
    read = 39_936 * weights + 8 * mean * context * 147_456
    assert hours(128, 300_000) == pytest.approx(read / (0.4 * 3350e9) / 3600, rel=1e-3)


def test_the_published_cost_of_the_4b_is_reproduced():
    """Published: 700 steps, 10 days of RL on 32 H800 (memory and rates of an H100), without pass rates.

    With the default assumptions, 40% of both rates and responses of 40% of the limit, the plan gives 10.5 days. It
    stays within a factor of 2 at 25% to 60% of the rates, and at means of 30% to 60% of the first limit.
    """
    recipe = load_recipe(ROOT / "recipes" / "polaris-4b.toml")
    shape, _ = plan.find_shape(recipe.model)

    def days(**others):
        found = [job for job in plan.jobs(shape, recipe, machine(80.0, 32, **others)) if job.what.endswith("a step")]
        assert sum(job.times for job in found) == 700
        return sum(job.hours for job in found) / 24

    assert days() == pytest.approx(10.5, abs=0.1)
    for others in (
        {"utilisation": 0.25},
        {"utilisation": 0.6},
        {"response_tokens": 12_000},
        {"response_tokens": 24_000},
    ):
        assert 5 < days(**others) < 20, others


def test_the_4b_on_one_24_gb_card_is_called_impractical(capsys):
    _, text = lines(capsys, LORA_24GB)
    first = next(line for line in text.splitlines() if "stage 0, a step" in line).split()
    assert float(first[-3]) + float(first[-2]) == pytest.approx(50, rel=0.25)  # hours per step, at 40K tokens
    assert "impractical: up to 70.3 hours per step" in text and "2,326.7 days) on 1 card;" in text
    doubled = re.search(r"still ([\d,.]+) days with --gpus 2", text)[1]
    assert f"({doubled} days) on 2 cards;" in lines(capsys, LORA_24GB, processes=2)[1]
    assert "impractical" not in lines(capsys, LORA_24GB, processes=128)[1]


def test_a_recipe_that_does_not_fit_is_timed_with_the_settings_that_make_it_fit(capsys):
    recipe = ROOT / "recipes" / "polaris-4b.toml"
    fits, text = lines(capsys, recipe)
    words = re.search(r"time and cost, with (.+)", text)[1].split(" and ")
    assert f"to make it fit: set {' and '.join(words)}\n" in text
    assert not fits and "lora.rank=32" in words and "final.max_response_tokens=45000" in words
    assert lines(capsys, recipe, words)[0]
    parts = [text.split("assumed:", 1)[1].split("impractical")[0] for text in (text, lines(capsys, recipe, words)[1])]
    assert parts[0] == parts[1]


RESPONSES = {"stage.0": 39_936, "stage.1": 48_128, "stage.2": 52_224, "eval": 52_224, "final": 90_000}


def test_the_cache_is_fitted_although_a_smaller_one_makes_prefills_larger():
    shorter = [f"{table}.max_response_tokens={tokens // 4}" for table, tokens in RESPONSES.items()]
    recipe = load_recipe(ROOT / "recipes" / "polaris-4b.toml", shorter)
    shape, _ = plan.find_shape(recipe.model)
    _, fitted = plan.fit_recipe(shape, recipe, machine())
    most = max(sum(stage.sampling.values()) for stage in plan_stages(shape, fitted, 1))
    assert 23.5 * GIB < most <= 24 * GIB


def test_hours_and_cost_follow_the_options(capsys):
    consumer = ROOT / "recipes" / "consumer-24gb.toml"
    total = r"  ([\d,]+) hours \(([\d.]+) days\) on 1 card; \$([\d,]+) at \$0.4 per card and hour"
    hours, days, cost = (float(x.replace(",", "")) for x in re.search(total, lines(capsys, consumer)[1]).groups())
    assert days == pytest.approx(hours / 24, abs=0.1) and cost == pytest.approx(0.4 * hours, abs=0.6)
    longer = re.search(total, lines(capsys, consumer, response_tokens=8000)[1])
    assert float(longer[1].replace(",", "")) > 1.5 * hours
    _, text = lines(capsys, consumer, memory=48.0)
    assert "rates of a 48 GB card are unknown" in text and "hours (" not in text and "PFLOP" in text
    given = options_of("--device", "48GB", "--tflops", "362", "--bandwidth-gbs", "864")
    assert plan.show_plan(load_recipe(consumer), given)
    assert "give --price-per-hour for cost" in capsys.readouterr().out


def test_problems_of_a_local_file_are_counted_and_unknown_data_is_named(capsys, tmp_path):
    consumer = ROOT / "recipes" / "consumer-24gb.toml"
    (tmp_path / "own.jsonl").write_text('{"problem": "1 + 1", "answer": "2"}\n{"problem": "1 + 2", "answer": "3"}\n')
    own = [f"stage.0.data={tmp_path / 'own.jsonl'}", "stage.0.filter_before=true", "eval.data=somebody/some-set"]
    _, text = lines(capsys, consumer, own)
    assert "pass rates of 2 problems" in text
    assert "not counted: samples of somebody/some-set" in text and "evaluation, around" not in text
    recipe = load_recipe(consumer)
    for first, asked in ((0, 30), (10, 10), (99, 30)):  # of AIME24
        found = plan.jobs(
            plan.find_shape(recipe.model)[0], replace(recipe, eval=replace(recipe.eval, problems=first)), machine()
        )
        held_out = next(job for job in found if job.what.startswith("evaluation, around"))
        assert held_out.sampling.tokens == pytest.approx(asked * 8 * 0.4 * 16_384)


def test_a_plan_counts_no_more_than_the_budget_and_the_data_allow():
    recipe = load_recipe(ROOT / "recipes" / "consumer-24gb.toml", ["eval.every_steps=1"])
    shape = plan.find_shape(recipe.model)[0]

    def job(recipe, what):
        return next(job for job in plan.jobs(shape, recipe, machine()) if job.what.startswith(what))

    step, first = job(recipe, "stage 0, a step"), recipe.stage[0]
    for tokens, steps in ((int(2.5 * step.update.tokens), 3), (10**12, first.steps)):
        stages = (replace(first, generated_tokens=tokens), *recipe.stage[1:])
        budget = replace(recipe, stage=stages)
        assert job(budget, "stage 0, a step").times == steps
        fewer = first.steps - steps
        assert job(budget, "evaluation, within").times == job(recipe, "evaluation, within").times - fewer
    for first, within, asked in ((0, 5000, 30), (10, 5000, 30), (10, 20, 20), (10, 0, 10)):  # of AIME24
        some = replace(recipe, eval=replace(recipe.eval, problems=first, problems_within_stage=within))
        assert job(some, "evaluation, within").sampling.tokens == pytest.approx(asked * 8 * 0.4 * 16_384)


def test_the_options_describe_a_machine():
    assert options_of() == cards.CARDS[24.0]
    assert options_of("--device", "80gb", "--gpus", "8") == replace(cards.CARDS[80.0], gpus=8)
    found = options_of("--device", "16", "--tflops", "50", "--bandwidth-gbs", "700", "--response-tokens", "900")
    assert found == cards.Machine(16.0, tflops=50.0, bandwidth_gbs=700.0, response_tokens=900)


def test_the_options_of_a_plan_need_no_torch():
    code = "import sys, lab.machine; print({'torch', 'transformers', 'numpy'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


def options_of(*words):
    """The machine of a command line."""
    parser = argparse.ArgumentParser()
    cards.add_plan_options(parser)
    return cards.read_machine(parser.parse_args(words))


# -------------------------------------------------------------------------------------------------- what it says


def test_published_shapes_have_the_published_sizes():
    sizes = {"Qwen/Qwen3-0.6B": 0.596, "Qwen/Qwen3-1.7B": 1.72, "Qwen/Qwen3-4B": 4.02}  # billions
    sizes |= {"Qwen/Qwen3-0.6B-Base": 0.596, "Qwen/Qwen3-1.7B-Base": 1.72}
    sizes |= {"deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7.62, "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1.78}
    sizes |= {"Qwen/Qwen2.5-3B-Instruct": 3.09, "Qwen/Qwen2.5-Math-7B": 7.62, "Qwen/Qwen2.5-32B": 32.8}
    assert sizes.keys() == plan.PUBLISHED.keys()
    for name, billions in sizes.items():
        shape, where = plan.find_shape(name)
        assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.003)
        assert "plan.py" in where


def test_the_4b_with_lora_fits_24_gib_at_every_length(capsys):
    fits, text = lines(capsys, LORA_24GB)
    assert fits and text.count("  fits: ") == 4 and "stage 2: rl, 1,024 + 52,224 tokens" in text


def test_40k_fit_24_gib_without_offloaded_activations_and_53k_do_not(capsys):
    overrides = ["offload_activations=false", "offload_optimizer=true", "micro_batch_tokens=40960"]
    fits, text = lines(capsys, LORA_24GB, overrides)
    verdicts = [line.strip() for line in text.splitlines() if "fit" in line and line.startswith("  ")]
    assert not fits
    assert verdicts[0].startswith("fits") and verdicts[2].startswith("does not fit")
    assert "to make it fit: set offload_activations=true\n" in text


def test_full_finetuning_of_the_4b_fits_80_gib_only_with_offloaded_moments(capsys):
    recipe = ROOT / "recipes" / "polaris-4b.toml"
    assert lines(capsys, recipe, ["offload_optimizer=true"], memory=80)[0]
    fits, text = lines(capsys, recipe, memory=80)
    assert not fits and text.count("  does not fit:") == 3 and "to make it fit: set offload_optimizer=true\n" in text
    assert lines(capsys, recipe, memory=80, processes=8)[0]  # as the recipe's header says


@pytest.mark.parametrize(
    "name, memory, gpus", [("polaris-4b", 40.0, 1), ("polaris-4b", 24.0, 8), ("polaris-7b", 80.0, 1)]
)
def test_the_advised_settings_make_it_fit_and_all_are_needed(name, memory, gpus):
    path = ROOT / "recipes" / f"{name}.toml"
    recipe, cards = load_recipe(path), machine(memory, gpus)
    shape, _ = plan.find_shape(recipe.model)
    advice, advised = plan.fit_recipe(shape, recipe, cards)
    assert load_recipe(path, advice) == advised
    assert plan.excess(plan_stages(shape, recipe, gpus), cards)
    assert not plan.excess(plan_stages(shape, advised, gpus), cards)
    for word in advice:
        fewer = load_recipe(path, [other for other in advice if other != word])
        assert plan.excess(plan_stages(shape, fewer, gpus), cards), word


def test_a_recipe_that_cannot_fit_is_reported_and_still_timed(capsys):
    fits, text = lines(capsys, ROOT / "recipes" / "polaris-7b.toml")
    assert not fits and "no setting makes it fit: shorten the responses" in text
    assert "time and cost, as if it fitted" in text and "days) on 1 card" in text


def test_a_cache_too_small_for_one_response_is_reported(capsys):
    fits, text = lines(capsys, LORA_24GB, ["sampler.cache_tokens=25600"], memory=200)
    assert not fits and "25,600 cache tokens cannot hold one sequence and a spare page" in text
    longest = -(-62_464 // 256) + 1  # pages of the final evaluation's longest sequence, and a spare page
    assert f"to make it fit: set sampler.cache_tokens={longest * 256}\n" in text


def test_a_cache_of_the_free_memorys_size_is_planned_for_the_card_and_leaves_room(capsys):
    for memory in (16.0, 24.0):
        fits, text = lines(capsys, ROOT / "recipes" / "consumer-24gb.toml", memory=memory)
        left = [float(found) for found in re.findall(r"; ([\d.]+) GiB left", text)]
        assert fits and len(left) == 4 and min(left) >= 1.5 and "too little" not in text
        tokens = int(re.search(r"cache_tokens = 0 comes to ([\d,]+) tokens", text)[1].replace(",", ""))
        assert f"KV cache, {tokens // 256 * 256:,} tokens" in text
    assert tokens > 100_000
    fits, text = lines(capsys, ROOT / "recipes" / "consumer-24gb.toml", memory=11.0)
    assert not fits and "cache tokens cannot hold one sequence" in text


def test_a_plan_without_room_for_a_desktop_says_so(capsys):
    _, text = lines(capsys, LORA_24GB, ["sampler.cache_tokens=74752"])
    assert "23.6 of 24 GiB, in sampling; 0.4 GiB left, too little beside a desktop: lower sampler.cache_tokens" in text
    assert "too little" not in lines(capsys, LORA_24GB)[1]


def test_too_little_host_memory_is_said_beforehand(capsys, monkeypatch):
    monkeypatch.setattr(plan, "host_memory_bytes", lambda: 32 * GIB)
    assert "host memory" not in lines(capsys, LORA_24GB)[1]
    full = ["lora.rank=0", "offload_optimizer=true"]
    assert "needs 47 GiB of host memory, this machine has 32" in lines(capsys, LORA_24GB, full, memory=80)[1]


def test_the_responses_that_rescue_keeps_are_in_host_memory():
    """One of each problem visited, until the last stage that rescues; each token with its log-prob."""
    shape, name = Shape(bench.published("Qwen/Qwen3-4B", 2)), "right responses for rescue, at most"
    stages = [f"stage.{i}.{key}" for i in (0, 1) for key in ("rescue=true", "steps=10", "batch_problems=100")]
    stages += ["stage.0.max_response_tokens=1000", "stage.1.max_response_tokens=2000", "stage.2.rescue=false"]
    plans = plan_stages(shape, load_recipe(ROOT / "recipes" / "polaris-7b.toml", stages), 8)
    first = 10 * 100 * 400 * 8
    assert [found.host.get(name) for found in plans] == [first, first + 10 * 100 * 800 * 8, None, None]


def test_prompts_have_the_length_of_local_data(capsys, small_world):
    model = small_world / "model"
    settings = [f'model="{model}"', f'stage.0.data="{small_world / "train.jsonl"}"', 'instruction=""']
    recipe, shape = load_recipe(ROOT / "recipes" / "consumer-24gb.toml", settings), plan.find_shape(str(model))[0]
    mean = plan.mean_prompt(str(model), str(small_world / "train.jsonl"), "")
    assert 0 < mean < 100
    step = next(job for job in plan.jobs(shape, recipe, machine()) if job.what == "stage 0, a step")
    stage = replace(recipe.stage[0], max_prompt_tokens=mean)
    assert step.update == plan.update_work(shape, recipe, stage, machine())
    plan.show_plan(recipe, machine())
    assert "prompts have the data's mean length" in capsys.readouterr().out


def test_known_data_needs_no_files():
    assert plan.count_problems("HuggingFaceH4/MATH-500:test") == 500
    assert plan.count_problems("openai/gsm8k:main/test") == 1319
    assert plan.count_problems("openai/gsm8k:main/train") == 7473


def test_the_command_needs_no_weights_and_writes_nothing(tmp_path, checkpoint):
    text = (ROOT / "recipes" / "consumer-24gb.toml").read_text().replace("Qwen/Qwen3-0.6B", str(checkpoint("qwen3")))
    (tmp_path / "recipe.toml").write_text(text)
    command = [sys.executable, ROOT / "train.py", "recipe.toml", "--plan", "--device", "1GB"]
    done = forked.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 1 and "does not fit" in done.stdout, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.toml"]


def test_a_model_that_cannot_be_planned_is_one_sentence(tmp_path):
    with pytest.raises(ModelError, match="nobody/nothing: no model folder, not in the hub's cache"):
        plan.find_shape("nobody/nothing")
    with pytest.raises(RecipeError, match="made by the run itself"):
        plan.show_plan(load_recipe(ROOT / "recipes" / "tiny.toml"), machine())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--gpus", "0"], "--gpus 0: must be above 0"),
        (["--device", "big"], "--device big: give the memory of one card, such as 24GB"),
        (["--device", "0GB"], "--device 0GB: give the memory"),
        (["--utilisation", "40"], "--utilisation 40: must be above 0 and at most 1"),
        (["--tflops", "nan"], "--tflops nan: must be above 0"),
        (["--price-per-hour", "-1"], "--price-per-hour -1: must be above 0"),
        (["--response-tokens", "-5"], "--response-tokens -5: must be above 0 and finite"),
    ],
)
def test_invalid_machine_options_are_one_sentence(options, message):
    with pytest.raises(RecipeError) as caught:
        options_of(*options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_the_steps_of_a_run_correct_the_hours(tmp_path, capsys):
    recipe = load_recipe(ROOT / "recipes" / "first-hour-24gb.toml", ["sampler.cache_tokens=98304"])
    given = machine()
    shape = plan.find_shape(recipe.model)[0]
    jobs = list(plan.jobs(shape, recipe, given))
    step = next(job for job in jobs if job.what == "stage 0, a step")
    row = {"kind": "rl", "stage": 0, "seconds_sample": 1.5 * step.sampling.seconds}
    row |= {"seconds_grade": 0.5 * step.sampling.seconds, "seconds_update": 3 * step.update.seconds}
    slow_first = row | {"seconds_sample": 1e6, "step": 1}
    rows = [slow_first, *(row | {"step": i} for i in (2, 3))]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows[:2]))
    assert plan.hours_by_run(jobs, tmp_path) == ""  # one step that counts is too few
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    plan.show_plan(recipe, given, tmp_path)
    hours = sum(job.times * (2 * job.sampling.seconds + 3 * job.update.seconds) for job in jobs) / 3600
    times = "2 times the planned sampling, 3 times the update"
    assert f"by 2 steps of {tmp_path} (in each {times}): {hours:,.1f} hours in all" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["deepscaler-1.5b", "dapo-32b", "dr-grpo-7b", "gspo-3b", "justrl-1.5b", "maxrl-1.7b"])
def test_a_recipe_of_the_field_can_be_planned(capsys, name):
    fits, text = lines(capsys, ROOT / "recipes" / f"{name}.toml", memory=80, processes=8)
    assert fits == (name != "dapo-32b") and re.search(r"hours \([\d,.]+ days\) on 8 cards", text)
