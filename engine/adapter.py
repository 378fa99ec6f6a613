"""LoRA adapters (arXiv 2106.09685): added to a model, merged into it, read and written as PEFT does."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from engine.huggingface import ADAPTER_CONFIG, ModelError, check_keys, named, read_json, resolve_folder, write_json
from engine.sharding import fill, full_tensor

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# the base's config with the window used in training; transformers would take a file named config.json for a model
TRAINED_CONFIG = "trained_config.json"
# keys of PEFT's config that do not change what a finished adapter computes; any other must be off
HARMLESS_KEYS = {
    "base_model_name_or_path", "r", "lora_alpha", "target_modules", "peft_type", "peft_version", "task_type",
    "inference_mode", "auto_mapping", "lora_dropout", "megatron_core", "qalora_group_size",
}  # fmt: skip
HARMLESS_VALUES = {
    "bias": ("none",),
    "revision": ("main",),
    "init_lora_weights": (True, "gaussian", "orthogonal"),  # not PiSSA, which changes the base first
}


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter of the layers' projections, trained while its base is frozen."""

    rank: int
    alpha: float  # the adapter's output is scaled by alpha / rank
    base: str  # the folder or hub id of the base model
    targets: tuple[str, ...] = LORA_TARGETS  # the adapted projections, by the last part of their names


def add_lora(model: nn.Module, lora: Lora) -> None:
    """Freeze a model.Transformer and give its projections an uninitialised float32 adapter."""
    model.requires_grad_(False)
    model.lora = lora
    for linear in adapted_projections(model):
        options = {"dtype": torch.float32, "device": linear.weight.device}
        linear.lora_A = nn.Parameter(torch.empty(lora.rank, linear.in_features, **options))
        linear.lora_B = nn.Parameter(torch.empty(linear.out_features, lora.rank, **options))
        linear.lora_scale = lora.alpha / lora.rank


def adapted_projections(model: nn.Module) -> list[nn.Module]:
    """Return the projections that the model's adapter extends; none without an adapter."""
    targets = model.lora.targets if model.lora else ()
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] in targets]


def initialise_lora(model: nn.Module, seed: int) -> None:
    """Initialise an adapter, sharded or not, as PEFT does: A uniform within 1 / sqrt(inputs), B zero."""
    generator = torch.Generator().manual_seed(seed)
    for linear in adapted_projections(model):
        a = nn.init.kaiming_uniform_(torch.empty(linear.lora_A.shape), a=math.sqrt(5), generator=generator)
        fill(linear.lora_A, a)
        nn.init.zeros_(linear.lora_B)


def merge_lora(model: nn.Module) -> None:
    """Add an unsharded model's adapter, if any, to its weights, in float32: for export only, never in training."""
    with torch.no_grad():
        for linear in adapted_projections(model):
            change = linear.lora_scale * (linear.lora_B.float() @ linear.lora_A.float())  # (outputs, inputs)
            linear.weight.copy_(linear.weight.float() + change)
            linear.lora_A = linear.lora_B = linear.lora_scale = None
    model.lora = None
    model.requires_grad_(True)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by name, without those of its base."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


# ------------------------------------------------------------------------------------------------ adapter folders


def read_config(folder: Path) -> Lora | None:
    """Read the adapter config of a folder; None where there is none. ModelError if it needs more than plain LoRA."""
    path = folder / ADAPTER_CONFIG
    if not path.exists():
        return None
    source = read_json(path)
    with named(path):
        check_keys(source, ("r", "lora_alpha", "base_model_name_or_path", "peft_type", "target_modules"))
    targets = source["target_modules"]
    for key, value in source.items():
        if value and key not in HARMLESS_KEYS and value not in HARMLESS_VALUES.get(key, ()):
            raise ModelError(f"{path}: {key} = {value!r} is not supported: merge the adapter with peft and use that")
    if source["peft_type"] != "LORA":
        raise ModelError(f"{path}: only LORA adapters are supported, not {source['peft_type']}")
    if unknown := [target for target in targets if target not in LORA_TARGETS]:
        raise ModelError(f"{path}: the target module {unknown[0]} is not supported (known: {', '.join(LORA_TARGETS)})")
    base, alpha = source["base_model_name_or_path"], float(source["lora_alpha"])
    return Lora(source["r"], alpha, base, tuple(target for target in LORA_TARGETS if target in targets))


def write_adapter(folder: Path, parameters: Mapping[str, nn.Parameter], lora: Lora, trained_config: dict) -> None:
    """Write an adapter's parameters, sharded or not, in float32, with its config and the config it was trained with."""
    tensors = {
        name: full_tensor(parameter).to("cpu", torch.float32).contiguous()
        for name, parameter in peft_names(parameters).items()
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lora.base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    write_json(folder / ADAPTER_CONFIG, config)
    write_json(folder / TRAINED_CONFIG, trained_config)


def peft_names(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Rename an adapter's parameters as in PEFT's files."""
    return {f"base_model.model.{name}.weight": parameter for name, parameter in parameters.items()}


def tokenizer_folder(folder: Path) -> Path:
    """Return the folder with a model's tokenizer: the base's for an adapter saved without one."""
    lora = read_config(folder)
    return resolve_folder(lora.base) if lora and not (folder / "tokenizer_config.json").exists() else folder
