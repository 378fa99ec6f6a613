"""Hugging Face model folders: config keys, weights and tokenizer files, read strictly and written for transformers."""

import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from engine.errors import UserError
from engine.sharding import fill, full_tensor
from yarn import Llama3Scaling, Rope, Yarn

SHARD_BYTES = 5 * 2**30
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
ADAPTER_CONFIG = "adapter_config.json"  # marks a folder that holds an adapter: see engine/adapter.py
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json", "tokenizer.model",
)  # fmt: skip


class ModelError(UserError):
    """A model that cannot be used, in one sentence: what, where, what to do."""


# --------------------------------------------------------------------------------------------------- config.json


def config_fields(source: dict, where: str | Path) -> dict:
    """A Hugging Face config as the fields of model.ModelConfig; ModelError where it describes another model."""

    def refuse(what: object) -> ModelError:
        return ModelError(f"{where}: {what}")

    kind = source.get("model_type")
    if kind not in ARCHITECTURES:
        raise refuse(f"model_type {kind!r} is not supported (known: {', '.join(ARCHITECTURES)})")
    if source.get("quantization_config"):
        raise refuse("the weights are quantised: give the folder of the unquantised model")
    if source.get("use_sliding_window") or "sliding_attention" in (source.get("layer_types") or ()):
        raise refuse("sliding-window attention is in use, which is not supported")
    if source.get("hidden_act", "silu") != "silu":
        raise refuse(f"hidden_act {source['hidden_act']!r} is not supported (only silu)")
    if kind != "qwen2" and (source.get("attention_bias") or source.get("mlp_bias")):
        raise refuse("attention_bias / mlp_bias are not supported")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    try:
        heads = source["num_attention_heads"]
        key_heads = source.get("num_key_value_heads") or heads
        head_dim = source.get("head_dim") or source["hidden_size"] // heads
        rope, notes = rope_from_config(source, head_dim)
        fields = {size: source[size] for size in sizes}
    except KeyError as missing:
        raise refuse(f"the key {missing} is missing") from None
    except ModelError as error:
        raise refuse(error) from None
    for note in notes:
        print(f"{where}: {note}", file=sys.stderr)
    if heads % key_heads or head_dim % 2:
        raise refuse(f"{heads} heads cannot share {key_heads} key/value heads of {head_dim}")
    return fields | {
        "model_type": kind,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "rms_norm_eps": source.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": bool(source.get("tie_word_embeddings", False)),
        "rope": rope,
        "source": source,
    }


def config_to_json(fields: dict, dtype: torch.dtype) -> dict:
    """The config.json with which transformers computes the model of these fields, its weights saved in `dtype`."""
    written = (
        "model_type", "head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings",
        "max_position_embeddings",
    )  # fmt: skip
    config = fields["source"] | {"architectures": [ARCHITECTURES[fields["model_type"]]]}
    config |= {key: fields[key] for key in written} | rope_to_config(fields["rope"])
    config.pop("torch_dtype", None)  # its older name
    return config | {"dtype": str(dtype).removeprefix("torch.")}


def rope_from_config(config: dict, head_dim: int) -> tuple[Rope, list[str]]:
    """Read the rotary keys of a Hugging Face config, old style and new. Returns what they mean and notes to show.

    Raises ModelError on a kind of scaling, or a key, that would change the frequencies in a way not computed here.
    """
    keys: dict = {}
    for block in ("rope_scaling", "rope_parameters"):
        stated = {key: value for key, value in (config.get(block) or {}).items() if value is not None}
        if "type" in stated:
            stated.setdefault("rope_type", stated.pop("type"))
        for key, value in stated.items():
            if isinstance(value, dict):
                raise ModelError(f"{block} of one kind of layer ({key}) is not supported")
            if keys.setdefault(key, value) != value:
                raise ModelError(f"rope_scaling and rope_parameters disagree about {key}: keep one of the two")
    theta = float(keys.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0)
    kind = keys.pop("rope_type", "default")
    if keys.pop("partial_rotary_factor", 1.0) != 1.0 or config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("partial_rotary_factor other than 1 (rotating part of each head) is not supported")

    notes: list[str] = []
    if kind == "default":
        return Rope(theta, head_dim), notes
    if kind not in ("yarn", "llama3"):
        raise ModelError(f"rope scaling {kind!r} is not supported (known: default, yarn, llama3)")
    window = keys.pop("original_max_position_embeddings", None) or config.get("max_position_embeddings")
    if not window:
        raise ModelError(f"rope scaling {kind!r} needs original_max_position_embeddings: add it to config.json")
    try:
        if kind == "yarn":
            factor = float(keys.pop("factor"))
            stated, misspelt = keys.pop("attention_factor", None), keys.pop("attn_factor", None)
            if stated is None and misspelt is not None:
                stated = misspelt
                notes.append(
                    f'YaRN: "attn_factor": {misspelt} is read as attention_factor, as POLARIS meant it '
                    f"(transformers ignores the key and applies {0.1 * math.log(factor) + 1:.4f})"
                )
            elif stated is None:  # somebody else's YaRN: the paper's default is what the model was shipped with
                stated = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
                notes.append(f"YaRN: no attention_factor in the config: the paper's {stated:.4f} is applied")
            betas = float(keys.pop("beta_fast", 32.0)), float(keys.pop("beta_slow", 1.0))
            scaling = Yarn(factor, int(window), float(stated), *betas)
            if keys.pop("truncate", True) is not True:
                raise ModelError("YaRN with truncate=false is not supported")
        else:
            low, high = float(keys.pop("low_freq_factor")), float(keys.pop("high_freq_factor"))
            scaling = Llama3Scaling(float(keys.pop("factor")), int(window), low, high)
    except KeyError as missing:
        raise ModelError(f"rope scaling {kind!r} lacks {missing} in config.json") from None
    if keys:
        raise ModelError(f"rope scaling {kind!r} has keys that are not understood: {', '.join(sorted(keys))}")
    return Rope(theta, head_dim, scaling), notes


def rope_to_config(rope: Rope) -> dict:
    """The config.json keys that make transformers (4 and 5) compute the very same frequencies and scale."""
    kinds = {Yarn: "yarn", Llama3Scaling: "llama3"}
    scaling = {"rope_type": kinds[type(rope.scaling)], **vars(rope.scaling)} if rope.scaling else None
    parameters = {"rope_theta": rope.theta, **(scaling or {"rope_type": "default"})}
    return {"rope_theta": rope.theta, "rope_scaling": scaling, "rope_parameters": parameters}


# ------------------------------------------------------------------------------------------------ reading folders


def resolve_folder(name: str | Path) -> Path:
    """A local folder as it is; a hub id is downloaded (config, tokenizer, safetensors) and its folder returned."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(name).count("/") != 1 or str(name).startswith("."):
        raise ModelError(f"{name}: no such model folder, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download  # only here, so that local models need no hub

    try:
        return Path(
            snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"])
        )
    except (OSError, ValueError, RuntimeError) as error:  # the hub client's errors derive from these
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{name}: not a local folder, and the hub did not give it ({reason})") from None


def read_config(folder: Path, name: str = "config.json") -> dict:
    """The config of a model folder."""
    path = folder / name
    if (folder / ADAPTER_CONFIG).exists() and not path.exists():
        raise ModelError(f"{folder}: an adapter, not a model: merge it first (python model.py {folder} OUT)")
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{folder}: no {name}, so this is not a Hugging Face model folder") from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from None


@contextmanager
def open_tensors(path: Path) -> Iterator[safe_open]:
    """A safetensors file; ModelError when it is missing or damaged."""
    try:
        with safe_open(path, "pt") as tensors:
            yield tensors
    except (FileNotFoundError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({error}): download it again") from None


def weight_files(folder: Path) -> dict[str, Path]:
    """Which safetensors file of a folder holds which tensor."""
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.exists():
        try:
            return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (json.JSONDecodeError, KeyError) as error:
            raise ModelError(f"{index}: cannot be read ({error}): download it again") from None
    if not path.exists():
        raise ModelError(f"{folder}: no model.safetensors and no index of shards: convert the weights first")
    with open_tensors(path) as tensors:
        return dict.fromkeys(tensors.keys(), path)


def read_weights(folder: Path, parameters: Mapping[str, nn.Parameter], tied: bool) -> None:
    """Copy a model folder's tensors into the parameters of their names, sharded or not; see `read_tensors`."""
    files = {name: path for name, path in weight_files(folder).items() if not name.endswith("rotary_emb.inv_freq")}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    copy = files.pop(head, None) if tied else None  # some tied checkpoints carry a copy of the embedding
    read_tensors(folder, files, parameters)
    if copy:
        with open_tensors(copy) as ours, open_tensors(files[embedding]) as others:
            if not torch.equal(ours.get_tensor(head), others.get_tensor(embedding)):
                raise ModelError(f"{copy}: tie_word_embeddings is true but {head} is another tensor")


def read_tensors(where: Path, files: Mapping[str, Path], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy each named tensor into its parameter, or this rank's shard of it, one at a time.

    Raises ModelError when one is missing, left over or of another shape.
    """
    if missing := sorted(parameters.keys() - files.keys()):
        raise ModelError(f"{where}: the tensor {missing[0]} is missing (and {len(missing) - 1} more)")
    if surplus := sorted(files.keys() - parameters.keys()):
        raise ModelError(f"{where}: the tensor {surplus[0]} is not part of this model (and {len(surplus) - 1} more)")
    for path, names in groupby(sorted(files, key=lambda name: (files[name], name)), files.get):
        with open_tensors(path) as tensors:
            for name in names:
                tensor, shape = tensors.get_tensor(name), parameters[name].shape
                if tensor.shape != shape:
                    shapes = f"{tuple(tensor.shape)}, the config says {tuple(shape)}"
                    raise ModelError(f"{path}: {name} has shape {shapes}")
                fill(parameters[name], tensor)


# ------------------------------------------------------------------------------------------------ writing folders


@contextmanager
def new_folder(folder: Path, tokenizer_from: Path | None = None) -> Iterator[Path]:
    """Where to write a folder that appears whole, when the block ends, or not at all; one that exists is refused.

    With the tokenizer's files of another folder, if given.
    """
    if folder.exists():
        raise ModelError(f"{folder}: exists already; give another name")
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    for file in TOKENIZER_FILES if tokenizer_from else ():
        if (tokenizer_from / file).exists():
            shutil.copy(tokenizer_from / file, unfinished / file)
    unfinished.rename(folder)


def write_model(folder: Path, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype, config: dict) -> None:
    """Write config.json, and parameters, sharded or not, in files of about SHARD_BYTES, one in memory at a time."""
    shards, size = [[]], 0
    for name, parameter in parameters.items():
        if size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += parameter.numel() * dtype.itemsize
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: full_tensor(parameters[name]).to("cpu", dtype).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(parameter.numel() * dtype.itemsize for parameter in parameters.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", config)


def write_json(path: Path, value: dict) -> None:
    """Write JSON as Hugging Face lays it out."""
    path.write_text(json.dumps(value, indent=2) + "\n")
