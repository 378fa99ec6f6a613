"""LoRA adapters in folders as PEFT reads and writes them; one that would compute something else is refused."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from engine.huggingface import ADAPTER_CONFIG, ModelError, open_tensors, read_tensors, resolve_folder, write_json
from engine.sharding import whole

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# the base's config with the window of the training; under the name config.json transformers would take it for a model
TRAINED_CONFIG = "trained_config.json"
# keys of PEFT's config that do not change what a finished adapter computes; any other must be off
HARMLESS_KEYS = {
    "base_model_name_or_path", "r", "lora_alpha", "target_modules", "peft_type", "peft_version", "task_type",
    "inference_mode", "auto_mapping", "lora_dropout", "megatron_core", "qalora_group_size",
}  # fmt: skip
HARMLESS_VALUES = {
    "bias": ("none",),
    "revision": ("main",),
    "init_lora_weights": (True, "gaussian", "orthogonal"),  # not PiSSA's kind, which begins by changing the base
}


def read_config(folder: Path) -> dict | None:
    """The adapter that a folder holds, as the fields of model.Lora; None when it holds none."""
    path = folder / ADAPTER_CONFIG
    if not path.exists():
        return None
    try:
        source = json.loads(path.read_text())
        rank, alpha, base = int(source["r"]), float(source["lora_alpha"]), str(source["base_model_name_or_path"])
        kind, targets = source["peft_type"], source["target_modules"]
    except KeyError as missing:
        raise ModelError(f"{path}: the key {missing} is missing") from None
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: not the config of a LoRA adapter ({error})") from None
    for key, value in source.items():
        if value and key not in HARMLESS_KEYS and value not in HARMLESS_VALUES.get(key, ()):
            raise ModelError(f"{path}: {key} = {value!r} is not supported: merge the adapter with peft and use that")
    if kind != "LORA" or not isinstance(targets, list) or rank < 1:
        raise ModelError(f"{path}: only LORA adapters with r above 0 and a list of target_modules are supported")
    if unknown := sorted(set(targets) - set(LORA_TARGETS)):
        raise ModelError(f"{path}: the target module {unknown[0]} is not supported (known: {', '.join(LORA_TARGETS)})")
    targets = tuple(target for target in LORA_TARGETS if target in targets)
    return {"rank": rank, "alpha": alpha, "base": base, "targets": targets}


def read_weights(folder: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Fill an adapter's parameters from a folder. Strict: see `read_tensors`."""
    path = folder / ADAPTER_WEIGHTS
    with open_tensors(path) as tensors:
        files = dict.fromkeys(tensors.keys(), path)
    read_tensors(path, files, peft_names(parameters))


def write_adapter(folder: Path, parameters: Mapping[str, nn.Parameter], lora: dict, trained_config: dict) -> None:
    """Write an adapter's parameters, sharded or not, in float32, and the fields of its model.Lora."""
    tensors = {
        name: whole(parameter).to("cpu", torch.float32).contiguous()
        for name, parameter in peft_names(parameters).items()
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lora["base"],
        "r": lora["rank"],
        "lora_alpha": int(lora["alpha"]) if lora["alpha"].is_integer() else lora["alpha"],
        "target_modules": list(lora["targets"]),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    write_json(folder / ADAPTER_CONFIG, config)
    write_json(folder / TRAINED_CONFIG, trained_config)


def peft_names(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """An adapter's parameters by the names that PEFT gives them in a file."""
    return {f"base_model.model.{name}.weight": parameter for name, parameter in parameters.items()}


def tokenizer_folder(folder: Path) -> Path:
    """Where a model folder's tokenizer is: an adapter that was saved without one has its base's."""
    lora = read_config(folder)
    return resolve_folder(lora["base"]) if lora and not (folder / "tokenizer_config.json").exists() else folder
