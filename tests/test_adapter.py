"""Adapter folders give the same logits in PEFT and from PEFT; unsupported adapters are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import FAMILIES, adapted, our_logits, peft_loads, peft_model, relative, their_logits

from engine.adapter import LORA_TARGETS, tokenizer_folder
from model import ModelError, load, read_config, save

# ------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("family, tied", FAMILIES)
@pytest.mark.parametrize("alpha", [12.0, 2.5])
def test_exported_adapter_has_the_same_logits_in_peft(checkpoint, tmp_path, family, tied, alpha):
    base = checkpoint(family, tied)
    model = adapted(base, alpha=alpha)
    save(model, tmp_path / "adapter", torch.bfloat16)  # the dtype applies to full models only: adapters are float32
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "trained_config.json",
    ]  # fmt: skip
    with torch.no_grad():
        ours, theirs = our_logits(model), their_logits(peft_loads(base, tmp_path / "adapter"))
        assert relative(theirs, ours) < 1e-5
        assert torch.equal(our_logits(load(tmp_path / "adapter")), ours)


def test_transformers_finds_the_base_of_an_exported_adapter(checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    model = adapted(checkpoint())
    save(model, tmp_path / "adapter")
    with torch.no_grad():
        found = their_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval())
        assert relative(found, our_logits(model)) < 1e-5


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], LORA_TARGETS])
def test_adapter_made_by_peft_is_read(checkpoint, tmp_path, targets):
    theirs = peft_model(checkpoint("llama"), targets, rank=3, alpha=5, lora_dropout=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load(tmp_path / "adapter")
    adapters = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert adapters == set(targets)
    with torch.no_grad():
        assert relative(our_logits(model), their_logits(theirs)) < 1e-5
        save(model, tmp_path / "again")
        found = their_logits(peft_loads(checkpoint("llama"), tmp_path / "again"))
        assert relative(found, their_logits(theirs)) < 1e-5


def test_an_adapter_keeps_the_window_of_its_training(checkpoint, tmp_path):
    model = adapted(checkpoint())
    model.config = replace(model.config, max_position_embeddings=1000)
    save(model, tmp_path / "adapter")
    assert load(tmp_path / "adapter").config.max_position_embeddings == 1000


def test_an_adapter_without_a_tokenizer_uses_its_bases(checkpoint, tmp_path):
    save(adapted(checkpoint()), tmp_path / "adapter")
    assert tokenizer_folder(tmp_path / "adapter") == checkpoint()
    (tmp_path / "adapter" / "tokenizer_config.json").write_text("{}")
    assert tokenizer_folder(tmp_path / "adapter") == tmp_path / "adapter"
    assert tokenizer_folder(checkpoint()) == checkpoint()


# ---------------------------------------------------------------------------------------------------- bad input

WRONG_CONFIGS = [
    ({"use_dora": True}, "use_dora = True is not supported"),
    ({"use_rslora": True}, "use_rslora = True is not supported"),
    ({"bias": "all"}, "bias = 'all' is not supported"),
    ({"lora_bias": True}, "lora_bias = True"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head']"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
    ({"layers_to_transform": [1]}, "layers_to_transform = [1]"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    ({"a_key_of_the_future": 1}, "a_key_of_the_future = 1 is not supported"),
    ({"peft_type": "LOHA"}, "only LORA adapters"),
    ({"target_modules": "all-linear"}, "target_modules must be a list"),
    ({"target_modules": ["q_proj", "lm_head"]}, "the target module lm_head is not supported"),
    ({"r": 0}, "r must be a whole number from 1"),
    ({"r": "four"}, "r must be a whole number from 1 to 262,144, not 'four'"),
    ({"r": 8}, "down_proj.lora_A.weight has shape (4, 80), the config says (8, 80)"),
    ({"target_modules": ["q_proj"]}, "is not part of this model"),
    ({"base_model_name_or_path": "./nowhere"}, "nowhere: no such model folder"),
]


def refusal(adapter: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(adapter)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def adapter(checkpoint, tmp_path) -> Path:
    save(adapted(checkpoint()), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("change, sentence", WRONG_CONFIGS)
def test_an_unsupported_adapter_config_is_refused(adapter, change, sentence):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert sentence in refusal(adapter)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path"])
def test_an_adapter_config_without_a_key_is_refused(adapter, key):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    assert f"the key '{key}' is missing" in refusal(adapter)


def test_broken_adapter_files_are_refused(adapter, tmp_path):
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, text = load_file(weights), config.read_text()
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights)
    assert f"the tensor {name} is missing" in refusal(adapter)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(1)}, weights)
    assert "the tensor base_model.model.lm_head.weight is not part of this model" in refusal(adapter)
    weights.write_bytes(b"cut off")
    assert f"{weights}: cannot be read" in refusal(adapter)
    weights.unlink()
    assert f"{weights}: cannot be read" in refusal(adapter)
    for wrong in ("{", "[]", "null", '"lora"'):
        config.write_text(wrong)
        assert "adapter_config.json: not " in refusal(adapter)
    config.write_text(text)


def test_an_adapter_of_another_base_is_refused(adapter, checkpoint):
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace(str(checkpoint()), str(checkpoint("qwen2", False))))
    assert "tensor" in refusal(adapter)  # with the config from training
    (adapter / "trained_config.json").unlink()
    assert "has shape" in refusal(adapter)


def test_training_from_an_adapter_folder_says_to_export_it(adapter):
    with pytest.raises(ModelError, match="an adapter, no model: export it first"):
        read_config(adapter)
