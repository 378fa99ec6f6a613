"""Hugging Face folders: loading is strict, unsupported configs are refused, saved models load in transformers."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from conftest import SCALINGS, VOCABULARY, WINDOW, tiny_reference
from safetensors.torch import load_file, save_file
from test_model import FAMILIES, difference, our_logits, random_tokens, their_logits, tiny_config

from engine import huggingface
from model import ModelError, load, parse_config, save


def rewrite(folder: Path, target: Path, change) -> Path:
    """Copy a checkpoint, with `change` applied to its dict of tensors."""
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


# --------------------------------------------------------------------------------------- saved, and loaded again


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folder_loads_in_transformers_with_the_same_logits(checkpoint, tmp_path, family, tied, scaling):
    model = load(checkpoint(family, tied, scaling))
    save(model, tmp_path / "out")
    tokens = random_tokens(100)
    assert difference(our_logits(model, tokens), their_logits(tmp_path / "out", tokens)) < 2e-5
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("tied", [True, False])
def test_saved_shards_load_in_transformers_and_in_load(checkpoint, tmp_path, monkeypatch, tied):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)
    model = load(checkpoint("qwen2", tied))
    save(model, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    tokens = random_tokens(50)
    assert difference(our_logits(model, tokens), their_logits(tmp_path / "out", tokens)) < 2e-5
    assert torch.equal(our_logits(load(tmp_path / "out"), tokens), our_logits(model, tokens))


def test_sharded_checkpoint_of_transformers_loads(tmp_path, checkpoint):
    tiny_reference("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    tokens = random_tokens(50)
    assert torch.equal(our_logits(load(tmp_path), tokens), our_logits(load(checkpoint("llama")), tokens))


def test_rotary_buffers_in_old_checkpoints_are_ignored(checkpoint, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load(rewrite(checkpoint(), tmp_path / "old", lambda tensors: tensors.update({name: torch.ones(8)})))


def test_bfloat16_saves_and_loads_as_bfloat16(checkpoint, tmp_path):
    save(load(checkpoint()), tmp_path / "out", torch.bfloat16)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert {x.dtype for x in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    assert load(tmp_path / "out", dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------ strict loading, saving


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_missing_tensor_is_named(checkpoint, tmp_path, name):
    with pytest.raises(ModelError, match=f"{name} is missing"):
        load(rewrite(checkpoint(), tmp_path / "bad", lambda tensors: tensors.pop(name)))


def test_missing_lm_head_of_an_untied_model_is_named(checkpoint, tmp_path):
    with pytest.raises(ModelError, match="lm_head.weight is missing"):
        load(rewrite(checkpoint("qwen3", False), tmp_path / "bad", lambda tensors: tensors.pop("lm_head.weight")))


def test_surplus_tensor_is_named(checkpoint, tmp_path):
    name = "model.layers.2.mlp.up_proj.weight"
    with pytest.raises(ModelError, match=f"{name} is not part of this model"):
        load(rewrite(checkpoint(), tmp_path / "bad", lambda tensors: tensors.update({name: torch.ones(2)})))


def test_misshaped_tensor_is_named_with_both_shapes(checkpoint, tmp_path):
    def change(tensors):
        tensors["model.norm.weight"] = torch.ones(1)  # a shape that would broadcast

    with pytest.raises(ModelError, match=r"model.norm.weight has shape \(1,\), the config says \(48,\)"):
        load(rewrite(checkpoint(), tmp_path / "bad", change))


def test_equal_lm_head_copy_in_a_tied_checkpoint_is_accepted(checkpoint, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    tokens = random_tokens(20)
    copied = load(rewrite(checkpoint(), tmp_path / "copy", change))
    assert torch.equal(our_logits(copied, tokens), our_logits(load(checkpoint()), tokens))


def test_different_lm_head_in_a_tied_checkpoint_is_an_error(checkpoint, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    with pytest.raises(ModelError, match="tie_word_embeddings is true but lm_head.weight is not the embedding"):
        load(rewrite(checkpoint(), tmp_path / "bad", change))


def test_missing_shard_is_an_error(tmp_path):
    tiny_reference("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002-of-*")).unlink()
    with pytest.raises(ModelError, match="model-00002-of-.*cannot be read"):
        load(tmp_path)


def test_truncated_weights_are_an_error(checkpoint, tmp_path):
    folder = rewrite(checkpoint(), tmp_path / "bad", lambda tensors: None)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        load(folder)


def test_folder_without_config_or_weights_is_an_error(checkpoint, tmp_path):
    with pytest.raises(ModelError, match="no config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text((checkpoint() / "config.json").read_text())
    with pytest.raises(ModelError, match="no model.safetensors"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "no-such-folder", "a/b/c"])
def test_no_such_folder_is_an_error(name):
    with pytest.raises(ModelError, match="no such model folder"):
        load(name)


def test_unreachable_hub_id_is_one_sentence():
    with pytest.raises(ModelError, match="^nobody/nothing: not a local folder, and the download .* failed [^\n]+$"):
        load("nobody/nothing")


def test_save_refuses_an_existing_folder_and_leaves_it_alone(checkpoint, tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ModelError, match="exists already"):
        save(load(checkpoint()), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


def test_save_copies_the_tokenizer_files(checkpoint, tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "from/tokenizer.json").write_text("{}")
    (tmp_path / "from/chat_template.jinja").write_text("hello")
    (tmp_path / "from/notes.txt").write_text("not a tokenizer file")
    save(load(checkpoint()), tmp_path / "out", tokenizer_from=tmp_path / "from")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError, match="^[^\n]+$") as error:
        load(folder)
    return str(error.value)


def test_weights_beside_a_stale_index_are_those_of_transformers(checkpoint, tmp_path):
    """Regression: the index came first, so that shards of another model were read, or shards that were gone."""
    folder = rewrite(checkpoint("llama"), tmp_path / "model", lambda tensors: None)
    shards = tmp_path / "shards"
    tiny_reference("llama", tied=True).save_pretrained(shards, max_shard_size="20KB")
    (folder / "model.safetensors.index.json").write_text((shards / "model.safetensors.index.json").read_text())
    tokens = random_tokens(20)
    assert difference(our_logits(load(folder), tokens), their_logits(folder, tokens)) < 2e-5
    (folder / "model.safetensors").unlink()
    assert "model-00001-of-" in refusal(folder)


def test_a_tensor_that_only_the_index_has_is_an_error(tmp_path):
    tiny_reference("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model.norm.weight"', '"v_head.weight"'))
    assert "v_head.weight is missing, which the index names" in refusal(tmp_path)


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    tiny_reference("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = min(tmp_path.glob("model-*"))
    save_file(load_file(shard) | {"model.norm.weight": torch.ones(48)}, shard)
    assert f"model.norm.weight is in {shard.name} too" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"[1]", b'"a"', b"7", b"null", b"", b'{"a": [', b'{"a": "\xe9"}', b"[" * 10**5])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "adapter_config.json"])
def test_a_file_that_is_no_json_object_is_one_sentence(checkpoint, tmp_path, file, content):
    (tmp_path / "config.json").write_text((checkpoint() / "config.json").read_text())
    (tmp_path / file).write_bytes(content)
    assert refusal(tmp_path).startswith(f"{tmp_path / file}: not ")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_what_is_no_file_is_not_waited_for(checkpoint, tmp_path, file, make):
    """Regression: a pipe was read for ever."""
    folder = rewrite(checkpoint(), tmp_path / "model", lambda tensors: None)
    (folder / file).unlink()
    make(folder / file)
    assert refusal(folder) == f"{folder / file}: cannot be read (it is not a regular file): download it again"


def test_shapes_are_compared_before_anything_is_allocated(checkpoint, tmp_path):
    """Regression: an embedding of 1e10 rows was allocated first."""
    folder = rewrite(checkpoint(), tmp_path / "model", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2**24, "hidden_size": 2**18}))
    assert "the config says (16777216, 262144)" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(checkpoint, tmp_path, dtype):
    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)

    assert "model.norm.weight has dtype" in refusal(rewrite(checkpoint(), tmp_path / "bad", change))


# ------------------------------------------------------------------------------------------------- bad configs


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'linear' is not supported"),
    ],
)
def test_unsupported_config_is_refused(changes, sentence):
    with pytest.raises(ModelError, match="^x/config.json: [^\n]+$") as error:
        parse_config(tiny_config(**changes), "x/config.json")
    assert sentence in str(error.value)


@pytest.mark.parametrize("value", ["64", -1, 0, 2.5, 1e12, 10**30, float("nan"), True, [4], {}])
@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers", "num_key_value_heads", "head_dim"])
def test_a_size_of_another_type_or_beyond_its_bounds_is_refused(key, value):
    """Regression: 1e12 layers were built, and most of the others ended in a traceback."""
    with pytest.raises(ModelError, match=f"^x: {key} must be a whole number from [12] to [0-9,]+, not [^\n]+$"):
        parse_config(tiny_config(**{key: value}), "x")


@pytest.mark.parametrize("value", ["</s>", -1, VOCABULARY, 2.5, [[1]], {}, True, [1, 10**30]])
def test_an_end_that_is_no_token_of_the_model_is_refused(value):
    with pytest.raises(ModelError, match="^x: eos_token_id .* is no token of the 97 of the model$"):
        parse_config(tiny_config(eos_token_id=value), "x")


def test_mlp_bias_of_llama_is_refused():
    with pytest.raises(ModelError, match="mlp_bias"):
        parse_config(tiny_config("llama", mlp_bias=True))


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"])
def test_config_without_a_size_is_refused_by_name(key):
    source = tiny_config()
    del source[key]
    with pytest.raises(ModelError, match=f"the key '{key}' is missing"):
        parse_config(source)


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_a_sliding_window_that_is_off_is_accepted(family):
    source = tiny_config(family, use_sliding_window=False, sliding_window=32, layer_types=["full_attention"] * 2)
    assert parse_config(source).model_type == family


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_a_head_size_that_is_not_stated_is_that_of_transformers(kind):
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 9}
    theirs = transformers.AutoConfig.for_model(kind, **sizes)
    source = {key: value for key, value in theirs.to_dict().items() if key != "head_dim"}
    expected = getattr(theirs, "head_dim", None) or 64 // 2
    assert parse_config(source).head_dim == expected == (128 if kind == "qwen3" else 32)


def test_the_window_of_yarn_is_factor_times_original_as_qwen_documents_it(capsys):
    """Regression: rope_scaling alone left the window as it was, and --yarn was refused since there was scaling."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    for stated, window in ((96, 256), (256, 256), (512, 512)):
        config = parse_config(tiny_config(rope_parameters=None, rope_scaling=scaling, max_position_embeddings=stated))
        assert config.max_position_embeddings == window
        assert ("the window is factor x original = 256" in capsys.readouterr().err) == (stated == 96)
    config = parse_config(tiny_config(rope_parameters=None, rope_scaling={"type": "yarn", "factor": 2.0}))
    assert config.max_position_embeddings == 2 * WINDOW


def test_notes_about_yarn_are_shown(capsys):
    scaling = {"rope_type": "yarn", "factor": 1.5, "attn_factor": 1.0}
    parse_config(tiny_config(rope_parameters=None, rope_scaling=scaling), "x/config.json")
    assert 'x/config.json: YaRN: "attn_factor": 1.0 is read as attention_factor' in capsys.readouterr().err
