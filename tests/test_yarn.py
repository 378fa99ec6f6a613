"""Rotary frequencies equal transformers' and a second implementation; configs of YaRN are read without surprises."""

import json
import math

import pytest
import torch

from engine.huggingface import ModelError, rope_from_config, rope_to_config
from yarn import (
    Llama3Scaling,
    Rope,
    Yarn,
    attention_factor,
    describe_ramp,
    frequencies,
    plain_frequencies,
    rotate,
    rotation,
    yarn_ramp,
)

WINDOW = 131_072
ROPES = {
    "plain qwen3": Rope(1e6, 128),
    "plain smollm2": Rope(1e5, 64),
    "polaris": Rope(1e6, 128, Yarn(1.5, 65_536)),
    "qwen3's own window": Rope(1e6, 128, Yarn(1.5, 40_960)),
    "paper's temperature": Rope(1e6, 128, Yarn(4.0, 32_768, attention_factor=0.1 * math.log(4) + 1)),
    "other betas": Rope(1e4, 64, Yarn(3.0, 2_048, 0.9, beta_fast=16.0, beta_slow=0.5)),
    "tiny heads": Rope(1e4, 8, Yarn(2.0, 64)),
    "llama 3.2": Rope(5e5, 64, Llama3Scaling(32.0, 8_192, 1.0, 4.0)),
    "llama 3.1": Rope(5e5, 128, Llama3Scaling(8.0, 8_192, 1.0, 4.0)),
    "odd llama": Rope(1e4, 64, Llama3Scaling(1.7, 2_048, 1.0, 8.0)),
}
YARN = {"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 65_536}


def transformers_rotary(config_keys: dict, family: str = "qwen3", head_dim: int = 128):
    """Build transformers' rotary embedding from the keys of a config.json."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config_class, rotary = {
        "qwen3": (Qwen3Config, Qwen3RotaryEmbedding),
        "qwen2": (Qwen2Config, Qwen2RotaryEmbedding),
        "llama": (LlamaConfig, LlamaRotaryEmbedding),
    }[family]
    sizes = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "head_dim": head_dim}
    keys = json.loads(json.dumps(config_keys))
    return rotary(config_class.from_dict({"max_position_embeddings": WINDOW} | sizes | keys))


@pytest.mark.parametrize("name", ROPES)
def test_cos_and_sin_equal_transformers_at_every_position_to_131072(name):
    rope = ROPES[name]
    family = "llama" if isinstance(rope.scaling, Llama3Scaling) else "qwen3"
    reference = transformers_rotary(rope_to_config(rope), family, rope.head_dim)
    inverse = frequencies(rope)
    for positions in torch.arange(WINDOW).split(16_384):
        cos, sin = rotation(inverse, positions, attention_factor(rope))
        expected_cos, expected_sin = reference(torch.zeros(1), positions[None])
        half = rope.head_dim // 2
        signed_sin = torch.cat((-expected_sin[..., :half], expected_sin[..., half:]), -1)
        for ours, theirs in ((cos, expected_cos), (sin, signed_sin)):
            assert torch.equal(ours[:, 0], theirs[0])


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("style", ["old", "new", "both"])
def test_exported_config_gives_the_same_frequencies_in_transformers(name, family, style):
    """Regression: frequencies one bit off gave angles 1e-4 radians off at position 100,000."""
    rope = ROPES[name]
    keys = rope_to_config(rope)
    dropped = {"old": ["rope_parameters"], "new": ["rope_scaling", "rope_theta"], "both": []}[style]
    reference = transformers_rotary({k: v for k, v in keys.items() if k not in dropped}, family, rope.head_dim)
    assert torch.equal(reference.inv_freq, frequencies(rope))
    assert reference.attention_scaling == attention_factor(rope)


def reference_ramp(theta, head_dim, original, beta_fast, beta_slow):
    """Compute the ramp in Python floats, by search instead of logarithms; pairs from fast to slow."""

    def rotations(pair: float) -> float:
        return original * theta ** (-2 * pair / head_dim) / (2 * math.pi)

    pairs = range(head_dim)
    low = max((i for i in pairs if rotations(i) >= beta_fast), default=0)  # the slowest with enough rotations
    high = min((i for i in pairs if rotations(i) <= beta_slow), default=head_dim - 1)
    ramp = []
    for i in range(head_dim // 2):
        if i <= low:
            ramp.append(0.0)
        elif i >= high:
            ramp.append(1.0)
        else:
            ramp.append((i - low) / (high - low))
    return ramp


@pytest.mark.parametrize(
    "theta, head_dim, original, beta_fast, beta_slow",
    [(1e6, 128, 65_536, 32, 1), (1e6, 128, 40_960, 32, 1), (1e4, 64, 2_048, 32, 1), (1e5, 64, 4_096, 16, 0.5)],
)
def test_ramp_equals_the_reference(theta, head_dim, original, beta_fast, beta_slow):
    ramp = yarn_ramp(theta, head_dim, original, beta_fast, beta_slow)
    expected = reference_ramp(theta, head_dim, original, beta_fast, beta_slow)
    assert ramp.tolist() == pytest.approx(expected, abs=1e-6)
    assert 0 in expected and 1 in expected and any(0 < x < 1 for x in expected)


def test_yarn_frequencies_equal_the_reference():
    rope = ROPES["polaris"]
    ramp = reference_ramp(1e6, 128, 65_536, 32, 1)
    plain = [1e6 ** (-2 * i / 128) for i in range(64)]
    expected = [p / 1.5 * r + p * (1 - r) for p, r in zip(plain, ramp, strict=True)]
    assert frequencies(rope).tolist() == pytest.approx(expected, rel=1e-6)


def test_ramp_of_the_polaris_setting():
    """pair_index(32) = 26.83 -> 26, pair_index(1) = 42.88 -> 43 (theta 1e6, d 128, 65,536)."""
    ramp = yarn_ramp(1e6, 128, 65_536, 32, 1)
    assert ramp[26] == 0 and ramp[43] == 1
    assert ramp[27:43].tolist() == pytest.approx([i / 17 for i in range(1, 17)])


@pytest.mark.parametrize(
    "theta, head_dim, window, beta_fast, kept",
    [(1e6, 128, 65_536, 32.0, 27), (1e5, 64, 8192, 32.0, 11), (1e4, 32, 128, 32.0, 1), (1e4, 32, 128, 2.0, 5)],
)
def test_the_pairs_that_yarn_leaves_alone_are_said_and_too_few_warned_of(theta, head_dim, window, beta_fast, kept):
    rope = Rope(theta, head_dim, Yarn(1.5, window, beta_fast=beta_fast))
    unchanged = int((frequencies(rope) == plain_frequencies(theta, head_dim)).sum())
    text = describe_ramp(rope)
    assert unchanged == kept and f"leaves {kept} of {head_dim // 2} pairs" in text
    assert text.startswith("warning") == (kept == 1)


def test_ramp_without_a_pair_between_the_betas_is_a_step():
    assert set(yarn_ramp(1e4, 2, 16, 32, 1).tolist()) <= {0.0, 1.0}


def test_llama3_frequencies_equal_the_reference():
    expected = []
    for i in range(32):
        plain = 5e5 ** (-2 * i / 64)
        wavelength = 2 * math.pi / plain
        if wavelength < 8_192 / 4:
            expected.append(plain)
        elif wavelength > 8_192 / 1:
            expected.append(plain / 32)
        else:
            smooth = (8_192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * plain / 32 + smooth * plain)
    assert frequencies(ROPES["llama 3.2"]).tolist() == pytest.approx(expected, rel=1e-5)


def test_rotate_rotates_each_pair_by_its_angle():
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    inverse, positions = torch.tensor([1.0, 0.3, 0.1, 0.02]), torch.tensor([0, 1, 5, 40, 41])
    turned = rotate(x, *rotation(inverse, positions))
    angle = positions[:, None] * inverse
    as_complex = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 1, 4), angle[:, None])
    assert torch.allclose(turned, torch.cat((as_complex.real, as_complex.imag), -1), atol=1e-6)


def test_angles_are_float32_and_distinguish_positions_40000_and_40001():
    inverse, positions = frequencies(ROPES["plain qwen3"]), torch.tensor([40_000, 40_001])
    exact = rotation(inverse, positions)
    rounded = rotation(inverse, positions, dtype=torch.bfloat16)
    assert abs(exact[0][0, 0, 0] - exact[0][1, 0, 0]) > 0.1
    assert all(torch.equal(x.bfloat16(), y) for x, y in zip(exact, rounded, strict=True))  # only the result is rounded


# ------------------------------------------------------------------------------------------- the YaRN trap


def test_attention_factor_1_means_off():
    rope, notes = rope_from_config({"rope_theta": 1e6, "rope_scaling": YARN | {"attention_factor": 1.0}}, 128)
    assert rope == ROPES["polaris"] and notes == []
    assert attention_factor(rope) == 1.0
    cos, sin = rotation(frequencies(rope), torch.arange(100), attention_factor(rope))
    assert torch.allclose(cos**2 + sin**2, torch.ones(()), atol=1e-6)


def test_yarn_defaults_to_attention_temperature_off():
    assert Yarn(1.5, 65_536).attention_factor == 1.0


def test_attn_factor_alone_is_read_as_attention_factor_with_a_note():
    published = {"rope_type": "yarn", "attn_factor": 1.0, "factor": 1.5}
    rope, notes = rope_from_config({"max_position_embeddings": 65_536, "rope_scaling": published}, 128)
    assert rope.scaling == Yarn(1.5, 65_536, attention_factor=1.0)
    assert len(notes) == 1 and "attn_factor" in notes[0] and "1.0405" in notes[0]
    # transformers reads the same keys differently, which is why the note is shown
    theirs = transformers_rotary({"max_position_embeddings": 65_536, "rope_scaling": published})
    assert theirs.attention_scaling == pytest.approx(1.0405, abs=1e-4)


def test_another_attn_factor_multiplies_the_papers_value():
    """DeepSeek-R1-0528-Qwen3-8B: 1 / (0.1 ln 4 + 1), which switches the attention temperature off."""
    published = YARN | {"factor": 4.0, "attn_factor": 0.8782488562869419}
    rope, notes = rope_from_config({"rope_scaling": published}, 128)
    assert rope.scaling.attention_factor == pytest.approx(1.0, abs=1e-12)
    assert len(notes) == 1 and "a factor on the paper's 1.1386" in notes[0]


def test_attention_factor_wins_over_attn_factor():
    keys = YARN | {"attention_factor": 1.1, "attn_factor": 1.0}
    rope, notes = rope_from_config({"rope_scaling": keys}, 128)
    assert rope.scaling.attention_factor == 1.1 and notes == []


@pytest.mark.parametrize("factor, expected", [(1.5, 0.1 * math.log(1.5) + 1), (4.0, 0.1 * math.log(4) + 1), (1.0, 1.0)])
def test_without_either_key_the_papers_value_is_applied_with_a_note(factor, expected):
    rope, notes = rope_from_config({"rope_scaling": YARN | {"factor": factor}}, 128)
    assert rope.scaling.attention_factor == pytest.approx(expected)
    assert transformers_rotary({"rope_scaling": YARN | {"factor": factor}}).attention_scaling == pytest.approx(expected)
    assert len(notes) == 1 and f"{expected:.4f}" in notes[0]


# ---------------------------------------------------------------------------------------- reading configs


def test_old_style_scaling_with_type_is_read():
    rope, _ = rope_from_config(
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 1.5, "attention_factor": 1.0,
                                             "original_max_position_embeddings": 65_536}}, 128
    )  # fmt: skip
    assert rope == ROPES["polaris"]


def test_type_and_rope_type_together_are_read():
    both = YARN | {"type": "yarn", "attention_factor": 1.0}
    assert rope_from_config({"rope_theta": 1e6, "rope_scaling": both}, 128)[0] == ROPES["polaris"]


def test_new_style_parameters_with_theta_inside_are_read():
    parameters = YARN | {"attention_factor": 1.0, "rope_theta": 1e6}
    assert rope_from_config({"rope_parameters": parameters}, 128)[0] == ROPES["polaris"]


@pytest.mark.parametrize("config", [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}])
def test_no_scaling_is_plain_rope_at_the_default_theta(config):
    assert rope_from_config(config, 64) == (Rope(10_000.0, 64), [])


def test_original_window_defaults_to_the_models_window():
    rope, _ = rope_from_config({"max_position_embeddings": 4_096, "rope_scaling": {"type": "yarn", "factor": 2.0}}, 64)
    assert rope.scaling.original_max_position_embeddings == 4_096


@pytest.mark.parametrize("scaling", [
    {"rope_type": "yarn", "factor": 4.0, "beta_slow": 2}, {"rope_type": "yarn", "factor": 2, "attention_factor": 1.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
])  # fmt: skip
@pytest.mark.parametrize("places", [{"original_max_position_embeddings": 256}, {}])
def test_the_original_window_is_found_where_transformers_finds_it(scaling, places):
    """Regression: one at the top of the config was ignored."""
    keys = {"max_position_embeddings": 4_096, "rope_theta": 1e6, "rope_scaling": scaling} | places
    rope, _ = rope_from_config(keys, 64)
    reference = transformers_rotary(keys, "llama" if scaling["rope_type"] == "llama3" else "qwen3", 64)
    assert torch.equal(frequencies(rope), reference.inv_freq)
    assert attention_factor(rope) == pytest.approx(reference.attention_scaling)


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("dropped", [["rope_parameters"], ["rope_scaling", "rope_theta"], []])
def test_round_trip_through_old_and_new_keys(name, dropped):
    keys = json.loads(json.dumps(rope_to_config(ROPES[name])))
    for key in dropped:
        del keys[key]
    assert rope_from_config(keys, ROPES[name].head_dim) == (ROPES[name], [])


@pytest.mark.parametrize(
    "config, sentence",
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, "'longrope' is not supported"),
        ({"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}, "mscale, mscale_all_dim"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate"),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 64}}, "lacks 'factor'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position_embeddings"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64,
                           "low_freq_factor": 1.0}}, "lacks 'high_freq_factor'"),
        ({"rope_scaling": YARN | {"beta_fast": 0}}, "beta_fast must be a number from 0.001 to 1,000,000"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "factor must be a number"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 64}, "disagree about original_max_position"),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 1e6}}, "about rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ],
)  # fmt: skip
def test_unsupported_rope_configs_are_refused(config, sentence):
    with pytest.raises(ModelError, match="^[^\n]+$") as error:
        rope_from_config(config, 64)
    assert sentence in str(error.value)


def test_rope_scaling_next_to_rope_parameters_is_not_silently_ignored():
    """Regression: rope_parameters hid a rope_scaling that a user had added; transformers prefers the latter."""
    config = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN}
    with pytest.raises(ModelError, match="disagree about .*rope_type"):
        rope_from_config(config, 128)
