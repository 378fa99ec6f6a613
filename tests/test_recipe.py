"""lab/recipe.py: valid recipes are read, invalid ones are refused, and the shipped ones have the published numbers."""

import re
import subprocess
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine.run import Run
from lab.problems import Columns
from lab.recipe import (
    Recipe,
    RecipeError,
    RlStage,
    SftStage,
    VariantSettings,
    World,
    describe_keys,
    how_to_read,
    load_recipe,
    override_values,
    to_toml,
)
from train import learning_rate

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(ROOT.glob("recipes/*.toml"))
SMALL = """
name = "small"
model = "some/model"
max_position_embeddings = 4096
[eval]
data = "held-out.jsonl"
[[stage]]
kind = "sft"
data = "solutions.jsonl"
steps = 3
[[stage]]
kind = "rl"
data = "problems.jsonl"
steps = 5
temperature = 1
max_prompt_tokens = 96
max_response_tokens = 4000
[[stage]]
kind = "rl"
steps = 7
temperature = "match"
max_response_tokens = 3000
"""


def load(tmp_path, text=SMALL, overrides=()):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_recipe(path, overrides)


def refusal(tmp_path, text=SMALL, overrides=()):
    """Return the error message for a recipe."""
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ reading


def test_values_are_read_and_the_rest_has_defaults(tmp_path):
    recipe = load(tmp_path)
    assert (recipe.name, recipe.seed, recipe.eval.data, recipe.eval.samples) == ("small", 0, "held-out.jsonl", 8)
    assert recipe.world is None
    assert [type(stage) for stage in recipe.stage] == [SftStage, RlStage, RlStage]
    assert [stage.steps for stage in recipe.stage] == [3, 5, 7]
    assert recipe.stage[1] == RlStage(
        data="problems.jsonl", steps=5, temperature=1.0, max_prompt_tokens=96, max_response_tokens=4000
    )


def test_an_integer_becomes_a_float_where_one_is_expected(tmp_path):
    recipe = load(tmp_path, overrides=["eval.temperature=1", "stage.1.clip_low=1"])
    for value in (recipe.stage[1].temperature, recipe.eval.temperature, recipe.stage[1].clip_low):
        assert type(value) is float and value == 1.0


def test_a_range_in_the_world_must_be_two_integers(tmp_path):
    assert load(tmp_path, overrides=["world.beyond_tokens=[2, 4]"]).world == World(beyond_tokens=(2, 4))
    for wrong in ("[2]", "[2, 3, 4]", "[2, 3.5]", "3", "[2, true]"):
        assert refusal(tmp_path, overrides=[f"world.beyond_tokens={wrong}"]).startswith(
            "world.beyond_tokens must be two whole numbers"
        )


def test_a_list_of_numbers_in_the_world_is_checked_number_by_number(tmp_path):
    recipe = load(tmp_path, overrides=["world.sft_terms=[2, 4, 3]", "world.sft_noise=[0, 0.5]"])
    assert recipe.world == World(sft_terms=(2, 4, 3), sft_noise=(0.0, 0.5))
    (tmp_path / "again.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "again.toml") == recipe
    for name, wrong, message in (
        ("sft_terms", "[]", "must be a list of numbers, not []"),
        ("sft_terms", "3", "must be a list of numbers, not 3"),
        ("sft_terms", "[2, 3.5]", "must be of type int, not 3.5"),
        ("sft_terms", "[2, true]", "must be of type int, not True"),
        ("sft_terms", "[2, 0]", "must be at least 1, not (2, 0)"),
        ("sft_noise", "[0.1, 1.5]", "must be at most 1, not (0.1, 1.5)"),
    ):
        assert refusal(tmp_path, overrides=[f"world.{name}={wrong}"]) == f"world.{name} {message}"


def test_a_list_of_texts_in_the_guard_survives_a_round_trip(tmp_path):
    recipe = load(tmp_path, overrides=['guard.benchmarks=["aime24", "a b.jsonl"]', "guard.duplicates=exclude"])
    assert recipe.guard.benchmarks == ("aime24", "a b.jsonl") and recipe.guard.contamination == "report"
    assert load(tmp_path, to_toml(recipe)) == recipe


def test_offload_activations_needs_recompute_activations(tmp_path):
    assert load(tmp_path, overrides=["offload_activations=true"]).offload_activations
    message = refusal(tmp_path, overrides=["offload_activations=true", "recompute_activations=false"])
    assert message.startswith("offload_activations moves what recompute_activations keeps")


@pytest.mark.parametrize(
    "override, message",
    [
        ("sead=1", "unknown key sead: did you mean seed?"),
        ("eval.sample=4", "unknown key eval.sample: did you mean samples?"),
        ("world.hidden=4", "unknown key world.hidden: did you mean hidden_size?"),
        ("stage.1.temprature=1.2", "unknown key stage.1.temprature: did you mean temperature?"),
        ("stage.0.group_size=8", "unknown key stage.0.group_size"),  # a key of the other kind of stage
        ("evaluation.samples=4", "unknown key evaluation"),
    ],
)
def test_an_unknown_key_names_itself_and_the_nearest(tmp_path, override, message):
    assert refusal(tmp_path, overrides=[override]).startswith(message)


def test_an_unknown_key_without_a_near_match_lists_the_known_keys(tmp_path):
    message = refusal(tmp_path, overrides=["run.zzzz=1"])
    assert "unknown key run.zzzz: known are " in message and "checkpoint_every_steps" in message


@pytest.mark.parametrize(
    "override, message",
    [
        ("seed=0.5", "seed must be of type int, not 0.5"),
        ("seed=true", "seed must be of type int, not True"),  # bool is an int to Python
        ("thinking=1", "thinking must be of type bool or str, not 1"),
        ("name=3", "name must be of type str, not 3"),
        ("eval.samples=many", "eval.samples must be of type int, not 'many'"),
        ("eval.temperature=hot", "eval.temperature must be of type float, not 'hot'"),
        ("stage.1.temperature=true", "stage.1.temperature must be of type float or str, not True"),
        ("stage.1.rescue=no", "stage.1.rescue must be of type bool, not 'no'"),
        ("eval=3", "eval: expected a table, not 3"),
        ("world=big", "world: expected a table, not 'big'"),
        ("stage=3", "a recipe needs at least one [[stage]]"),
        ("stage=[]", "a recipe needs at least one [[stage]]"),
        ("stage=[3]", "stage.0.kind must be sft or rl, not None"),
        ("stage.2.kind=ppo", "stage.2.kind must be sft or rl, not 'ppo'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(tmp_path, override, message):
    assert refusal(tmp_path, overrides=[override]) == message


@pytest.mark.parametrize("key", ["name", "model", "stage"])
def test_a_missing_key_is_named(tmp_path, key):
    text = SMALL.split("[[stage]]")[0] if key == "stage" else re.sub(rf"(?m)^{key} = .*$", "", SMALL)
    assert refusal(tmp_path, text) == f"the key {key} is missing"


def test_a_missing_file_lists_the_shipped_recipes(tmp_path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "absent.toml")
    assert str(caught.value).startswith(f"{tmp_path / 'absent.toml'}: no such recipe file")
    assert SHIPPED and all(path.name in str(caught.value) for path in SHIPPED)


def test_a_file_that_is_not_toml_is_refused(tmp_path):
    message = refusal(tmp_path, 'name = "unfinished')
    assert message.startswith(f"{tmp_path / 'recipe.toml'}: not valid TOML (")
    (tmp_path / "weights").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "weights", tmp_path):  # not text, and a folder
        with pytest.raises(RecipeError, match=re.escape(str(path))):
            load_recipe(path)


# ------------------------------------------------------------------------------------------------- --set


def test_set_reaches_scalars_tables_and_stages(tmp_path):
    overrides = [
        "seed=7", "name=renamed", 'instruction=""', "eval.samples=3", "search.most=1.5", "stage.1.temperature=1.25",
        "stage.2.temperature=1.3", "stage.0.data=elsewhere/a=b.jsonl", "thinking=false",
    ]  # fmt: skip
    recipe = load(tmp_path, overrides=overrides)
    assert (recipe.seed, recipe.name, recipe.instruction, recipe.thinking) == (7, "renamed", "", False)
    assert (recipe.eval.samples, recipe.eval.data, recipe.search.most) == (3, "held-out.jsonl", 1.5)
    assert [stage.temperature for stage in recipe.stage[1:]] == [1.25, 1.3]
    assert recipe.stage[0].data == "elsewhere/a=b.jsonl"


def test_the_later_of_two_overrides_wins(tmp_path):
    assert load(tmp_path, overrides=["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    "override, message",
    [
        ("seed", "--set seed: write NAME=VALUE, such as stage.0.temperature=1.2"),
        ("stage.3.steps=1", "--set stage.3.steps=1: there is no number 3; the recipe has 3"),
        ("stage.-1.steps=1", "--set stage.-1.steps=1: there is no number -1; the recipe has 3"),
        ("stage.first.steps=1", "--set stage.first.steps=1: there is no number first; the recipe has 3"),
        ("stage.0=1", "--set stage.0=1: stage is not a table"),
        ("name.value=1", "--set name.value=1: name is not a table"),
        ("stage.1.temperature.a.b=1", "--set stage.1.temperature.a.b=1: stage.1.temperature.a is not a table"),
    ],
)
def test_an_override_of_a_missing_place_is_refused(tmp_path, override, message):
    assert refusal(tmp_path, overrides=[override]) == message


def test_a_star_sets_a_key_of_all_stages_that_have_it(tmp_path):
    overrides = ["stage.*.max_grad_norm=0.5", "stage.rl.learning_rate=2e-6", "stage.*.temperature=1.1"]
    recipe = load(tmp_path, overrides=[*overrides, "stage.*.variant.loss=gspo", "stage.2.temperature=1.2"])
    assert [stage.max_grad_norm for stage in recipe.stage] == [0.5] * 3
    assert [stage.learning_rate for stage in recipe.stage] == [load(tmp_path).stage[0].learning_rate, 2e-6, 2e-6]
    assert [(stage.temperature, stage.variant.loss) for stage in recipe.stage[1:]] == [(1.1, "gspo"), (1.2, "gspo")]


@pytest.mark.parametrize(
    "override, message",
    [
        ("stage.*.temprature=1", "--set stage.*.temprature: no such stage has the key temprature: did you mean temper"),
        ("stage.sft.temperature=1", "--set stage.sft.temperature: no such stage has the key temperature: known are"),
        ("stage.*.temperature=1,2", "--set stage.*.temperature=1,2: 2 values are a sweep, which --plan and --resume"),
        ("stage.*=1", "--set stage.*=1: stage is not a table"),
    ],
)
def test_a_star_that_no_stage_takes_is_refused(tmp_path, override, message):
    assert refusal(tmp_path, overrides=[override]).startswith(message)


@pytest.mark.parametrize(
    "text, values",
    [
        ("1e-6,3e-6", [1e-6, 3e-6]), ("1e-6, 3e-6", [1e-6, 3e-6]), ("true,false", [True, False]),
        ("match,1.2", ["match", 1.2]), ("gspo,cispo", ["gspo", "cispo"]), ('"a,b","c"', ["a,b", "c"]),
        ("[1,2]", [[1, 2]]), ("[1,2],[3,4]", [[1, 2], [3, 4]]), ('"a,b"', ["a,b"]), ("a, then b", ["a, then b"]),
        ("", [""]), ("[]", [[]]), ("owner/name:test", ["owner/name:test"]), ("a=b.jsonl", ["a=b.jsonl"]),
    ],
)  # fmt: skip
def test_commas_separate_the_values_of_a_sweep_but_not_within_a_value(text, values):
    assert override_values(text) == values


# ------------------------------------------------------------------------------------- rules beyond types


@pytest.mark.parametrize(
    "override, message",
    [
        ("stage.1.temperature=match", "stage.1.temperature is 'match-previous': the first rl stage needs a number"),
        ("stage.2.temperature=same", "stage.2.temperature is 'same': write a number or match-previous or match-first"),
        ("stage.1.temperature=0", "stage.1.temperature must be above 0"),
        ("stage.2.temperature=-1.0", "stage.2.temperature must be above 0"),
        ("stage.1.group_size=1", "stage.1.group_size must be at least 2"),
        ("stage.0.steps=0", "stage.0.steps must be at least 1, not 0"),
        ("stage.2.steps=0", "stage.2.steps must be at least 1, not 0"),
        ('stage.0.data=""', "stage.0.data is missing: a file of worked solutions"),
        ('stage.1.data=""', "stage.1.data is missing: the first rl stage needs problems"),
        ("stage.1.variant.loss=gpso", "stage.1.variant.loss must be FILE.py:NAME or one of ('polaris', 'gspo', 'cispo'), no"),
        ("stage.1.variant.loss=''", "stage.1.variant.loss must be FILE.py:NAME or one of ('polaris', 'gspo', 'cispo'), not"),
        ("stage.1.variant.average=sequence", "stage.1.variant.average must be one of ('', 'tokens', 'sequences', 'c"),
        ("stage.1.drop_window=none", "stage.1.drop_window must be one of ('stage', 'all'), not 'none'"),
        ("stage.1.variant.optimiser_steps=2", "unknown key stage.1.variant.optimiser_steps: did you mean optimizer_s"),
        ("stage.1.variant.drop_zero_variance=true", "stage.1.variant.drop_zero_variance leaves out the groups that"),
        ("stage.1.variant.optimizer_steps=0", "stage.1.variant.optimizer_steps must be at least 1, not 0"),
        ("stage.1.variant.optimizer_steps=3", "stage.1.variant.optimizer_steps = 3 does not divide the 128 problems"),
        ("stage.1.variant.importance_cap=0.5", "stage.1.variant.importance_cap must be 0 (none) or at least 1"),
        ("stage.1.variant.cispo_cap=0.5", "stage.1.variant.cispo_cap must be at least 1, not 0.5"),
        ("stage.1.variant.punish_last_tokens=5000", "stage.1.variant.punish_last_tokens = 5000 exceeds"),
        ("stage.0.variant.loss=gspo", "unknown key stage.0.variant"),
        ("stage.1.variant={advantage='maxrl', punish_last_tokens=9}", "stage.1.variant.punish_last_tokens makes rewards"),
        ("stage.1.learning_rate=nan", "stage.1.learning_rate must be a finite number of at most 64 bits, not nan"),
        ("final.temperature=-inf", "final.temperature must be a finite number of at most 64 bits, not -inf"),
        ("stage.1.temperature=0x" + "f" * 9999, "stage.1.temperature must be a finite number of at most 64 bits"),
        ("seed=9223372036854775808", "seed must be a finite number of at most 64 bits, not 9223372036854775808"),
        ("seed=" + "9" * 9999, "seed must be of type int, not '999"),  # too long for Python: a string
        ("stage.²=1", "--set stage.²=1: stage is not a table"),
        ("stage.².steps=1", "--set stage.².steps=1: there is no number ²"),
        ("stage.1.kind=[1]", "stage.1.kind must be sft or rl, not [1]"),
        ("name=\ud800", "name holds a character that no file can"),
        ("name=../up", "name must be the name of a folder without a path"),
        ("search.step=0", "search.step must be at least 0.001"),
        ("search.problems=0", "search.problems must be at least 1, not 0"),
        ("eval.temperature=-1", "eval.temperature must be at least 0, not -1.0"),
        ("stage.1.informative_share=1.5", "stage.1.informative_share must be at most 1, not 1.5"),
        ("stage.1.max_grad_norm=0", "stage.1.max_grad_norm must be above 0, not 0.0"),
        ("stage.1.adam_beta2=1.0", "stage.1.adam_beta2 must be below 1, not 1.0"),
        ("world.hidden_size=33", "world.hidden_size must be a multiple of 32"),
        ("world.beyond_tokens=[5, 2]", "world.beyond_tokens must be a range from 1 upward"),
        ("guard.duplicates=drop", "guard.duplicates must be one of ('report', 'exclude'), not 'drop'"),
        ("guard.contamination=true", "guard.contamination must be of type str, not True"),
        ("guard.benchmarks=aime24", "guard.benchmarks must be a list of texts, not 'aime24'"),
        ("guard.benchmarks=[24]", "guard.benchmarks must be a list of texts, not [24]"),
        ("stage.1.max_response_tokens=4001", "stage.1: 96 + 4001 tokens exceed max_position_embeddings = 4096"),
    ],
)
def test_an_impossible_setting_is_refused(tmp_path, override, message):
    assert refusal(tmp_path, overrides=[override]).startswith(message)


def test_a_variant_is_a_table_of_its_stage_and_survives_a_round_trip(tmp_path):
    text = SMALL + '[stage.variant]\nloss = "gspo"\noptimizer_steps = 4\n'
    recipe = load(tmp_path, text, ["stage.1.variant.importance_cap=2", "stage.1.variant.punish_last_tokens=64"])
    assert recipe.stage[2].variant == VariantSettings(loss="gspo", optimizer_steps=4)
    assert recipe.stage[1].variant == VariantSettings(importance_cap=2.0, punish_last_tokens=64)
    assert load(tmp_path, to_toml(recipe)) == recipe


def test_a_window_of_zero_means_the_models_own(tmp_path):
    load(tmp_path, overrides=["max_position_embeddings=0", "stage.1.max_response_tokens=1000000"])


def test_every_key_is_described_with_its_default_and_its_bounds():
    lines = list(describe_keys())
    assert len(lines) == len({*lines}) + 11  # keys that both kinds of stages have
    assert any(line.split() == "stage.group_size = 8 rollouts per problem, at least 2".split() for line in lines)
    for key in ("name", "seed = 0", "world.layers = 4", "stage.variant.loss = 'polaris'", "run.tracker = ''"):
        assert any(line.startswith(key) for line in lines), key


def test_reading_a_recipe_needs_no_heavy_library():
    code = "import sys, lab.recipe; print({'torch', 'transformers', 'numpy'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


# ----------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_survives_a_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert load(tmp_path, to_toml(recipe)) == recipe


def test_every_key_is_written(tmp_path):
    recipe = load(tmp_path, overrides=["world.seed=3"])
    written = to_toml(recipe)
    for table in (recipe, recipe.eval, recipe.final, recipe.run, recipe.world, *recipe.stage):
        for f in fields(table):
            assert re.search(rf"(?m)^(\[*{f.name}\]*$|{f.name} = )", written), f.name


@pytest.mark.parametrize("text", ['say "\\boxed{}"', "two\nlines\r\n\ttab", "delete \x7f, bell \x07", "écrit ∑ 🙂", ""])
def test_any_text_survives_a_round_trip(tmp_path, text):
    recipe = replace(load(tmp_path), instruction=text)
    assert load(tmp_path, to_toml(recipe)) == recipe


@pytest.mark.parametrize("number", [1e-6, 1e22, 0.1 + 0.2, 5e-324, 1.0])
def test_any_number_survives_a_round_trip(tmp_path, number):
    recipe = load(tmp_path)
    recipe = replace(recipe, stage=(replace(recipe.stage[0], learning_rate=number), *recipe.stage[1:]))
    assert load(tmp_path, to_toml(recipe)) == recipe


# ------------------------------------------------------------------------------------ the published recipe

PUBLISHED = {  # temperatures, response lengths, the window (0: the model's own), rescue
    "polaris-1.7b": ([1.5, 1.55, 1.55], [39_936, 48_128, 52_224], 131_072, False),
    "polaris-4b": ([1.4, 1.45, 1.5], [39_936, 48_128, 52_224], 131_072, False),
    "polaris-7b": ([0.7, 1.0, 1.1], [15_360, 23_552, 31_744], 0, True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_polaris_recipes_have_the_published_numbers(name):
    temperatures, lengths, window, rescue = PUBLISHED[name]
    recipe = load_recipe(ROOT / f"recipes/{name}.toml")
    assert [stage.temperature for stage in recipe.stage] == temperatures
    assert [stage.max_response_tokens for stage in recipe.stage] == lengths
    assert recipe.max_position_embeddings == window
    assert recipe.thinking and recipe.world is None
    assert recipe.instruction == "Let's think step by step and output the final answer within \\boxed{}."
    for stage in recipe.stage:
        assert isinstance(stage, RlStage)
        assert (stage.group_size, stage.batch_problems, stage.max_prompt_tokens) == (8, 128, 1024)
        assert (stage.clip_low, stage.clip_high, stage.dual_clip) == (0.2, 0.28, 3.0)
        assert (stage.learning_rate, stage.warmup_steps, stage.adam_beta2) == (1e-6, 0, 0.999)
        assert (stage.weight_decay, stage.max_grad_norm) == (0.01, 1.0)
        assert (stage.drop_at, stage.drop_above) == (1.0, 0.9)
        assert (stage.rescue, stage.substitute, stage.informative_share) == (rescue, True, 1 / 3)
    assert [stage.filter_before for stage in recipe.stage] == [True, False, False]
    assert [bool(stage.data) for stage in recipe.stage] == [True, False, False]  # later ones use what is left
    assert (recipe.reward.correct, recipe.reward.format, recipe.reward.steps) == (1.0, 0.0, 0.0)
    assert recipe.search.step == 0.05


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_polaris_recipes_evaluate_as_published(name):
    recipe = load_recipe(ROOT / f"recipes/{name}.toml")
    final = recipe.final
    assert (final.temperature, final.top_k, final.max_response_tokens, final.samples) == (1.4, 20, 90_000, 32)
    assert (final.yarn_factor, final.yarn_original_window, final.yarn_attention_factor) == (1.5, 65_536, 1.0)
    assert final.yarn_factor * final.yarn_original_window == 96 * 1024  # "up to 96K", and room for every response
    assert (recipe.eval.temperature, recipe.eval.top_k) == (1.4, 20)


OF_EVERY_RECIPE = {  # RECIPE.md's numbers by dotted key
    "thinking": True,  # section 5: the closing tag is required
    "reward.correct": 1.0, "reward.format": 0.0, "reward.steps": 0.0,  # sections 5 and 7: the outcome alone
    "eval.temperature": 1.4, "eval.top_k": 20,  # section 2
    "final.data": "HuggingFaceH4/aime_2024", "final.samples": 32,  # section 6: avg@32
    "final.temperature": 1.4, "final.top_k": 20, "final.max_response_tokens": 90_000,  # section 2
    "final.yarn_factor": 1.5, "final.yarn_attention_factor": 1.0,  # section 3
    "search.step": 0.05,  # section 2
    "stage.0.data": "POLARIS-Project/Polaris-Dataset-53K", "stage.0.filter_before": True, "stage.0.drop_at": 1.0,  # 1
}  # fmt: skip
OF_EVERY_STAGE = {
    "kind": "rl", "max_prompt_tokens": 1024, "drop_above": 0.9,  # sections 3, 1
    "group_size": 8, "batch_problems": 128, "substitute": True, "informative_share": 1 / 3,  # section 4
    "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0,  # section 5, to the end
    "learning_rate": 1e-6, "warmup_steps": 0, "adam_beta2": 0.999, "weight_decay": 0.01, "max_grad_norm": 1.0,
}  # fmt: skip
MODELS = {
    "polaris-1.7b": "Qwen/Qwen3-1.7B",
    "polaris-4b": "Qwen/Qwen3-4B",
    "polaris-7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
}


def published_numbers(name):
    """Return RECIPE.md's numbers for one recipe, by dotted key."""
    temperatures, lengths, window, rescue = PUBLISHED[name]
    found = (
        OF_EVERY_RECIPE
        | {"name": name, "model": MODELS[name]}
        | ({"max_position_embeddings": window} if window else {})
    )
    for i, (temperature, length) in enumerate(zip(temperatures, lengths, strict=True)):
        of_stage = OF_EVERY_STAGE | {"temperature": temperature, "max_response_tokens": length, "rescue": rescue}
        found |= {f"stage.{i}.{key}": value for key, value in of_stage.items()}
    if name == "polaris-1.7b":
        del found["stage.2.temperature"]  # only two are published
    return found


def written_lines(name):
    """Return {dotted key: (line, value)} of a recipe file."""
    text, prefix, stages, found = (ROOT / f"recipes/{name}.toml").read_text(), "", 0, {}
    for line in text.splitlines():
        if line.startswith("[["):
            prefix, stages = f"stage.{stages}.", stages + 1
        elif line.startswith("["):
            prefix = line[1 : line.index("]")] + "."
        elif line and not line.startswith("#"):
            found[prefix + line.split(" = ")[0]] = (line, *tomllib.loads(line).values())
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_number_is_written_and_everything_else_is_marked_as_a_choice(name):
    written, published = written_lines(name), published_numbers(name)
    assert {key: written[key][1] for key in published if key in written} == published
    for key, (line, _) in written.items():
        assert ("# a choice" in line) == (key not in published), line


NOTHING_ELSE = {"drop_above": 1.0, "rescue": False, "substitute": False, "kind": "rl", "learning_rate": 1e-6}
DISTILL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
OF_THE_FIELD = {  # RECIPE.md section 11, by dotted key; a list has a value for each stage
    "deepscaler-1.5b": {
        "model": DISTILL, "thinking": True, "micro_batch_tokens": 32_768, "eval.data": "HuggingFaceH4/aime_2024",
        "eval.samples": 16, "eval.temperature": 0.6, "eval.every_steps": 20,
        "stage.0.data": "agentica-org/DeepScaleR-Preview-Dataset", "stage.0.steps": 1040, "stage.1.steps": 1520 - 1040,
        "batch_problems": 128, "group_size": [8, 16, 16], "temperature": 0.6, "max_prompt_tokens": 1024,
        "max_response_tokens": [8192, 16_384, 24_576], "clip_high": 0.2, "dual_clip": 1e9,
        "variant.optimizer_steps": 128 // 64,
    },
    "dapo-32b": {
        "model": "Qwen/Qwen2.5-32B", "eval.data": "HuggingFaceH4/aime_2024", "eval.samples": 32, "eval.temperature": 1.0,
        "eval.max_response_tokens": 20_480, "eval.every_steps": 5, "stage.0.data": "BytedTsinghua-SIA/DAPO-Math-17k",
        "batch_problems": 512, "group_size": 16, "temperature": 1.0, "max_prompt_tokens": 2048,
        "max_response_tokens": 16_384 + 4096, "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1e9, "warmup_steps": 20,
        "weight_decay": 0.1, "max_grad_norm": 1.0, "variant.optimizer_steps": 512 * 16 // 512,
        "variant.drop_zero_variance": True, "variant.punish_last_tokens": 4096,
    },
    "dr-grpo-7b": {
        "model": "Qwen/Qwen2.5-Math-7B", "instruction": "", "eval.data": "HuggingFaceH4/MATH-500:test",
        "eval.samples": 1, "eval.temperature": 0.0, "eval.max_response_tokens": 3000, "eval.every_steps": 16,
        "stage.0.data": "math3to5.parquet", "batch_problems": 128, "group_size": 8, "temperature": 1.0,
        "max_prompt_tokens": 1024, "max_response_tokens": 3000, "clip_high": 0.2, "dual_clip": 1e9, "adam_beta2": 0.95,
        "weight_decay": 0.0, "max_grad_norm": 1.0, "variant.advantage": "centred", "variant.average": "constant",
        "variant.optimizer_steps": 128 * 8 // 128,
    },
    "gspo-3b": {
        "model": "Qwen/Qwen2.5-3B-Instruct", "eval.data": "openai/gsm8k:main/test", "eval.samples": 1,
        "eval.temperature": 1.0, "eval.max_response_tokens": 8192, "eval.every_steps": 10,
        "stage.0.data": "openai/gsm8k:main/train", "steps": 500, "batch_problems": 512, "group_size": 16,
        "temperature": 1.0, "max_prompt_tokens": 2048, "max_response_tokens": 8192, "warmup_steps": 500 * 0.05,
        "weight_decay": 0.1, "max_grad_norm": 1.0, "variant.loss": "gspo", "variant.gspo_clip_low": 3e-4,
        "variant.gspo_clip_high": 4e-4, "variant.optimizer_steps": 512 // 128,
    },
    "justrl-1.5b": {
        "model": DISTILL, "instruction": BOXED, "micro_batch_tokens": 32_768, "eval.data": "HuggingFaceH4/aime_2024",
        "eval.samples": 32, "eval.temperature": 0.7, "eval.max_response_tokens": 31_744, "eval.every_steps": 50,
        "stage.0.data": "BytedTsinghua-SIA/DAPO-Math-17k", "steps": 4000, "batch_problems": 256, "group_size": 8,
        "temperature": 1.0, "max_prompt_tokens": 1024, "max_response_tokens": 15_360, "on_bad_row": "skip",
        "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0, "warmup_steps": 10, "weight_decay": 0.1,
        "max_grad_norm": 1.0, "variant.optimizer_steps": 256 // 64,
    },
    "maxrl-1.7b": {
        "model": "Qwen/Qwen3-1.7B-Base", "instruction": BOXED, "eval.data": "HuggingFaceH4/MATH-500:test",
        "eval.samples": 32, "eval.temperature": 0.6, "eval.max_response_tokens": 4096, "eval.every_steps": 50,
        "stage.0.data": "POLARIS-Project/Polaris-Dataset-53K", "steps": 1000, "batch_problems": 256, "group_size": 16,
        "temperature": 1.0, "max_prompt_tokens": 1024, "max_response_tokens": 4096, "on_bad_row": "skip",
        "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "max_grad_norm": 0.3, "variant.advantage": "maxrl",
    },
}  # fmt: skip
OF_A_STAGE = {f.name for f in fields(RlStage)} - {"data"}


@pytest.mark.parametrize("name", OF_THE_FIELD)
def test_recipes_of_the_field_have_the_published_numbers_and_mark_all_others_as_choices(name):
    recipe, choices, expected = load_recipe(ROOT / f"recipes/{name}.toml"), set(), {"name": name}
    for key, value in (NOTHING_ELSE | OF_THE_FIELD[name]).items():
        if key.partition(".")[0] not in OF_A_STAGE:
            expected[key] = value
            continue
        for i in range(len(recipe.stage)):
            expected[f"stage.{i}.{key}"] = value[i] if isinstance(value, list) else value
    written, prefix, stages = {}, "", 0
    for line in (ROOT / f"recipes/{name}.toml").read_text().splitlines():
        if line.startswith("[["):
            prefix, stages = f"stage.{stages}.", stages + 1
        elif line.startswith("["):
            prefix = line[1 : line.index("]")].replace("stage.", f"stage.{stages - 1}.") + "."
        elif line and not line.startswith("#"):
            [(key, value)] = tomllib.loads(line).items()
            table = value if isinstance(value, dict) else {"": value}
            inner = {f"{prefix}{key}.{k}".rstrip("."): v for k, v in table.items()}
            written |= inner
            choices |= inner.keys() if "# a choice" in line else set()
    assert {key: value for key, value in written.items() if key not in choices} == expected
    for stage in recipe.stage:  # of the published number that is a default here, and so not written
        assert (stage.clip_low, stage.filter_before, stage.variant.importance_cap) == (0.2, False, 0.0)


def test_training_samples_the_policy_itself_as_published():
    """A recipe has no key for top_p and top_k of training: they are always 1 and 0."""
    run = SimpleNamespace(worker=SimpleNamespace(stop_tokens=(2,)), recipe=SimpleNamespace(seed=5))
    sampling = Run.sampling(run, load_recipe(ROOT / "recipes/polaris-4b.toml").stage[1], 1.45, draw=7)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens) == (1.45, 1.0, 0, 48_128)
    assert not {"top_p", "top_k"} & {f.name for f in fields(RlStage)}
    evaluation = Run.evaluation_sampling(run, load_recipe(ROOT / "recipes/polaris-4b.toml").final)
    assert (evaluation.temperature, evaluation.top_p, evaluation.top_k, evaluation.max_new_tokens) == (
        1.4,
        1,
        20,
        90_000,
    )


def test_the_optimizer_is_adamw_as_published():
    recipe = load_recipe(ROOT / "recipes/polaris-4b.toml")
    run = SimpleNamespace(model=nn.Linear(2, 2), resume_from=None, recipe=recipe, state=SimpleNamespace())
    run.metrics = SimpleNamespace(position=[7, 3])
    Run.begin_steps(run, recipe.stage[0])
    assert run.state.metrics_position == [7, 3]  # a stop in the first step must not lose the rows before it
    group = run.optimizer.param_groups[0]
    assert type(run.optimizer) is torch.optim.AdamW
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-6, (0.9, 0.999), 0.01)
    assert learning_rate(recipe.stage[0], 0) == learning_rate(recipe.stage[0], 299) == 1e-6


def test_the_4b_takes_700_steps():
    assert sum(stage.steps for stage in load_recipe(ROOT / "recipes/polaris-4b.toml").stage) == 700


def test_the_defaults_are_the_published_numbers():
    stage, final = RlStage(), Recipe("a", "b", ()).final
    written = load_recipe(ROOT / "recipes/polaris-4b.toml")
    same = {f.name for f in fields(RlStage)} - {"data", "steps", "filter_before", "rescue"}
    assert all(getattr(stage, name) == getattr(written.stage[0], name) for name in same)
    assert final == replace(written.final, data="", samples=8)


# ------------------------------------------------------------------------------------------------ data


def test_columns_stand_beside_data_and_are_the_same_wherever_it_is_read(tmp_path):
    columns = 'columns = { problem = "Q", answer = "A" }\non_bad_row = "skip"\n'
    text = SMALL.replace('data = "problems.jsonl"\n', f'data = "problems.jsonl"\n{columns}')
    recipe = load(tmp_path, text)
    assert how_to_read(recipe, "problems.jsonl") == ("skip", False, Columns(problem="Q", answer="A"))
    assert how_to_read(recipe, "held-out.jsonl") == how_to_read(recipe, "other") == ("stop", False, Columns())
    assert load(tmp_path, to_toml(recipe)) == recipe
    assert "stage.1.columns.problm" in refusal(tmp_path, text.replace("problem =", "problm ="))
    assert "on_bad_row must be one of" in refusal(tmp_path, text.replace('"skip"', '"drop"'))
    said = refusal(tmp_path, text.replace("held-out.jsonl", "problems.jsonl"))
    assert "must be the same wherever 'problems.jsonl' is read" in said
    # a stage without data goes on with the problems before it, and nothing is read for the final evaluation
    assert load(tmp_path, SMALL, ["stage.*.on_bad_row=skip"]).stage[-1].on_bad_row == "skip"
