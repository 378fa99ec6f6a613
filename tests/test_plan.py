"""plan.py: held against the bytes that the real update and the real sampler keep, and what --plan says."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import plan
import rollout
from model import ModelError, Transformer, parse_config
from recipe import RecipeError, load_recipe

ROOT = Path(__file__).resolve().parent.parent
specification = importlib.util.spec_from_file_location("bench_plan", ROOT / "bench" / "plan.py")
bench = importlib.util.module_from_spec(specification)
specification.loader.exec_module(bench)

LORA_24GB = ROOT / "recipes" / "polaris-4b-lora-24gb.toml"


def lines(capsys, recipe, overrides=(), memory=24.0, processes=1):
    """Whether a recipe fits, and the plan as printed."""
    fits = plan.show_plan(load_recipe(recipe, overrides), memory, processes)
    return fits, capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- against the code


@pytest.mark.parametrize("name", bench.UPDATES)
def test_the_update_holds_what_the_plan_says(name):
    overrides, update, sequences = bench.UPDATES[name]
    config = parse_config(bench.SMALL | overrides)
    measured = bench.update_bytes(config, update, sequences)
    assert bench.reckoned_update(config, update)[1] == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("name", bench.SAMPLERS)
def test_the_sampler_holds_what_the_plan_says(name):
    overrides, sampling = bench.SAMPLERS[name]
    config = parse_config(bench.SMALL | overrides)
    measured = bench.sampling_bytes(config, sampling)
    assert sum(plan.sampling_moment(config, sampling).values()) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("processes", [1, 8])
def test_the_update_at_full_width_in_bfloat16_holds_what_the_plan_says(processes):
    config = bench.published("Qwen/Qwen3-4B", 2)
    update = plan.Update(40_960, 39_936, processes=processes)
    measured = bench.update_bytes(config, update)
    assert measured > 8 * plan.GIB  # which nothing here has: the tensors are fake
    assert bench.reckoned_update(config, update)[1] == pytest.approx(measured, rel=0.15)


def test_the_counter_sees_what_lives_and_not_what_died():
    counter = bench.LiveBytes()
    with counter:
        first = torch.zeros(1000)
        view = first[10:]
        del first
        for _ in range(3):
            second = torch.ones(500)
        second.untyped_storage().resize_(0)
    assert counter.live == 4000 and view.numel() == 990
    assert counter.most == 4000 + 2 * 2000  # one made while its predecessor still has its name


def test_parameters_are_those_of_the_model():
    for family, tied in (("qwen3", True), ("qwen2", False), ("llama", True)):
        config = parse_config(bench.SMALL | {"model_type": family, "tie_word_embeddings": tied})
        built = sum(parameter.numel() for parameter in Transformer(config).parameters())
        assert plan.model_parameters(config) == built


def test_preempted_rows_are_prefilled_with_their_responses_as_the_plan_says(monkeypatch):
    config = parse_config(bench.SMALL | {"num_hidden_layers": 1})
    sampling = plan.Sampling(40, 120, 8, 2, 8, 16, 400, torch.float32, kernels=False)
    seen, original = [], rollout.Prefill.__init__

    def note(self, cache, lengths, tables, device):
        seen.append(sum(lengths))
        original(self, cache, lengths, tables, device)

    monkeypatch.setattr(rollout.Prefill, "__init__", note)
    bench.sampling_bytes(config, sampling)
    assert 4 * 40 >= seen[0] > 100  # four prompts in one forward
    assert 160 < max(seen) <= sampling.prefill_tokens == 400  # several preempted rows at once


# -------------------------------------------------------------------------------------------------- what it says


def test_published_shapes_have_the_published_sizes():
    sizes = {"Qwen/Qwen3-0.6B": 0.596, "Qwen/Qwen3-1.7B": 1.72, "Qwen/Qwen3-4B": 4.02}  # billions
    sizes["deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"] = 7.62
    assert sizes.keys() == plan.PUBLISHED.keys()
    for name, billions in sizes.items():
        config, where = plan.find_config(name)
        assert plan.model_parameters(config) / 1e9 == pytest.approx(billions, rel=0.003)
        assert "plan.py" in where


def test_the_4b_with_an_adapter_fits_24_gib_at_every_length(capsys):
    fits, text = lines(capsys, LORA_24GB)
    assert fits and text.count("  fits: ") == 4 and "stage 2: rl, 1,024 + 52,224 tokens" in text


def test_40k_fit_24_gib_without_offloaded_activations_and_53k_do_not(capsys):
    overrides = ["offload_activations=false", "offload_optimizer=true", "micro_batch_tokens=40960"]
    fits, text = lines(capsys, LORA_24GB, overrides)
    verdicts = [line.strip() for line in text.splitlines() if "fit" in line and line.startswith("  ")]
    assert not fits
    assert verdicts[0].startswith("fits") and verdicts[2].endswith("set offload_activations=true")


def test_the_whole_4b_fits_80_gib_with_its_moments_on_the_host_and_not_with_them(capsys):
    recipe = ROOT / "recipes" / "polaris-4b.toml"
    assert lines(capsys, recipe, ["offload_optimizer=true"], memory=80)[0]
    fits, text = lines(capsys, recipe, memory=80)
    assert not fits and text.count("set offload_optimizer=true") == 3
    assert lines(capsys, recipe, memory=80, processes=8)[0]  # as the recipe's first lines say


def test_what_is_advised_makes_it_fit(capsys):
    recipe, memory = load_recipe(ROOT / "recipes" / "polaris-4b.toml"), 40.0
    config, _ = plan.find_config(recipe.model)
    advice = plan.advise(config, recipe, 0, 1, memory * plan.GIB)
    assert advice.startswith("set ")
    changed = load_recipe(ROOT / "recipes" / "polaris-4b.toml", advice.removeprefix("set ").split(" and "))
    assert plan.plan_stage(config, recipe, 0, 1).peak > memory * plan.GIB
    assert plan.plan_stage(config, changed, 0, 1).peak <= memory * plan.GIB


def test_a_cache_too_small_for_one_response_is_named(capsys):
    fits, text = lines(capsys, LORA_24GB, ["sampler.cache_tokens=25600"], memory=200)
    assert not fits and "25,600 cache tokens cannot hold one sequence and a spare page" in text


def test_the_command_needs_no_weights_and_leaves_nothing_behind(tmp_path, checkpoint):
    text = (ROOT / "recipes" / "consumer-24gb.toml").read_text().replace("Qwen/Qwen3-0.6B", str(checkpoint("qwen3")))
    (tmp_path / "recipe.toml").write_text(text)
    command = [sys.executable, ROOT / "train.py", "recipe.toml", "--plan", "--memory-gib", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "does not fit" in done.stdout, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.toml"]


def test_what_cannot_be_planned_is_said_in_one_sentence(tmp_path):
    with pytest.raises(ModelError, match="nobody/nothing: no model folder, not in the hub's cache"):
        plan.find_config("nobody/nothing")
    with pytest.raises(RecipeError, match="made by the run itself"):
        plan.show_plan(load_recipe(ROOT / "recipes" / "tiny.toml"), 24)
    with pytest.raises(RecipeError, match="both must be above 0"):
        plan.show_plan(load_recipe(LORA_24GB), 24, 0)
