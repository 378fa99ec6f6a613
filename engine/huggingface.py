"""Hugging Face model folders: read config, weights and tokenizer strictly, and write them for transformers."""

import json
import math
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from engine.errors import UserError
from engine.files import writing
from engine.sharding import fill, full_tensor
from yarn import Llama3Scaling, Rope, Yarn

SHARD_BYTES = 5 * 2**30
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
ADAPTER_CONFIG = "adapter_config.json"  # marks an adapter folder, see engine/adapter.py
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json", "tokenizer.model",
)  # fmt: skip


class ModelError(UserError):
    """A model cannot be used."""


# --------------------------------------------------------------------------------------------------- config.json


def config_fields(source: dict, where: str | Path) -> dict:
    """Read a Hugging Face config as the fields of model.ModelConfig; ModelError if the model is not supported."""

    def refuse(what: object) -> ModelError:
        return ModelError(f"{where}: {what}")

    kind = source.get("model_type")
    if kind not in ARCHITECTURES:
        raise refuse(f"model_type {kind!r} is not supported (known: {', '.join(ARCHITECTURES)})")
    if source.get("quantization_config"):
        raise refuse("the weights are quantised: use the unquantised model")
    if source.get("use_sliding_window") or "sliding_attention" in (source.get("layer_types") or ()):
        raise refuse("sliding-window attention is not supported")
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
    """Return the config.json of a model with these fields and with weights in `dtype`, for transformers."""
    config = fields["source"] | fields | rope_to_config(fields["rope"])
    for key in ("source", "rope", "torch_dtype"):  # torch_dtype: the older name of dtype
        config.pop(key, None)
    architecture = ARCHITECTURES[fields["model_type"]]
    return config | {"architectures": [architecture], "dtype": str(dtype).removeprefix("torch.")}


def rope_from_config(config: dict, head_dim: int) -> tuple[Rope, list[str]]:
    """Read the rotary keys, old style and new, of a Hugging Face config. Return the rope and notes for the user.

    Raise ModelError on any kind of scaling, or key, that yarn.py does not compute.
    """
    keys: dict = {}
    for block in ("rope_scaling", "rope_parameters"):
        stated = {key: value for key, value in (config.get(block) or {}).items() if value is not None}
        if "type" in stated:
            stated.setdefault("rope_type", stated.pop("type"))
        for key, value in stated.items():
            if isinstance(value, dict):
                raise ModelError(f"{block} for one kind of layer ({key}) is not supported")
            if keys.setdefault(key, value) != value:
                raise ModelError(f"rope_scaling and rope_parameters disagree about {key}: keep one of the two")
    theta = float(keys.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0)
    kind = keys.pop("rope_type", "default")
    if keys.pop("partial_rotary_factor", 1.0) != 1.0 or config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("partial_rotary_factor other than 1 is not supported")

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
            default = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0  # in the paper and in transformers
            attention_factor, attn_factor = keys.pop("attention_factor", None), keys.pop("attn_factor", None)
            if attention_factor is None and attn_factor is not None:
                attention_factor = attn_factor
                notes.append(
                    f'YaRN: "attn_factor": {attn_factor} is read as attention_factor, as POLARIS meant it '
                    f"(transformers ignores the key and applies {default:.4f})"
                )
            elif attention_factor is None:
                attention_factor = default
                notes.append(f"YaRN: no attention_factor in the config: the paper's {default:.4f} is applied")
            betas = float(keys.pop("beta_fast", 32.0)), float(keys.pop("beta_slow", 1.0))
            scaling = Yarn(factor, int(window), float(attention_factor), *betas)
            if keys.pop("truncate", True) is not True:
                raise ModelError("YaRN with truncate=false is not supported")
        else:
            low, high = float(keys.pop("low_freq_factor")), float(keys.pop("high_freq_factor"))
            scaling = Llama3Scaling(float(keys.pop("factor")), int(window), low, high)
    except KeyError as missing:
        raise ModelError(f"rope scaling {kind!r} lacks {missing} in config.json") from None
    if keys:
        raise ModelError(f"rope scaling {kind!r} has unknown keys: {', '.join(sorted(keys))}")
    return Rope(theta, head_dim, scaling), notes


def rope_to_config(rope: Rope) -> dict:
    """Return the config.json keys with which transformers (4 and 5) computes the same frequencies and factor."""
    kinds = {Yarn: "yarn", Llama3Scaling: "llama3"}
    scaling = {"rope_type": kinds[type(rope.scaling)], **vars(rope.scaling)} if rope.scaling else None
    parameters = {"rope_theta": rope.theta, **(scaling or {"rope_type": "default"})}
    return {"rope_theta": rope.theta, "rope_scaling": scaling, "rope_parameters": parameters}


# ------------------------------------------------------------------------------------------------ reading folders


def resolve_folder(name: str | Path) -> Path:
    """Return a local folder, or download a hub id (config, tokenizer, safetensors) and return its folder."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(name).count("/") != 1 or str(name).startswith("."):
        raise ModelError(f"{name}: no such model folder, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download  # imported late: local models need no hub

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except (OSError, ValueError, RuntimeError) as error:  # the hub client's errors derive from these
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{name}: not a local folder, and the download from the hub failed ({reason})") from None


def read_config(folder: Path, name: str = "config.json") -> dict:
    """Read a JSON config of a model folder."""
    path = folder / name
    if (folder / ADAPTER_CONFIG).exists() and not path.exists():
        raise ModelError(f"{folder}: this is an adapter, not a model: merge it first (python model.py {folder} OUT)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: no {name}, so this is not a Hugging Face model folder") from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from None


@contextmanager
def open_tensors(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file; ModelError if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as tensors:
            yield tensors
    except (FileNotFoundError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({error}): download it again") from None


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the safetensors file of each tensor in a folder."""
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.exists():
        try:
            return {name: folder / file for name, file in json.loads(index.read_bytes())["weight_map"].items()}
        except (json.JSONDecodeError, KeyError) as error:
            raise ModelError(f"{index}: cannot be read ({error}): download it again") from None
    if not path.exists():
        raise ModelError(f"{folder}: no model.safetensors and no index of shards: convert the weights first")
    with open_tensors(path) as tensors:
        return dict.fromkeys(tensors.keys(), path)


def read_weights(folder: Path, parameters: Mapping[str, nn.Parameter], tied: bool) -> None:
    """Copy a model folder's tensors into the parameters with the same names; see `read_tensors`."""
    files = {name: path for name, path in weight_files(folder).items() if not name.endswith("rotary_emb.inv_freq")}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    copy = files.pop(head, None) if tied else None  # some tied checkpoints carry a copy of the embedding
    read_tensors(folder, files, parameters)
    if copy:
        with open_tensors(copy) as ours, open_tensors(files[embedding]) as others:
            if not torch.equal(ours.get_tensor(head), others.get_tensor(embedding)):
                raise ModelError(f"{copy}: tie_word_embeddings is true but {head} is not the embedding")


def read_tensors(where: Path, files: Mapping[str, Path], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy each tensor into its parameter or this rank's shard of it; ModelError if the two do not match."""
    if missing := sorted(parameters.keys() - files.keys()):
        raise ModelError(f"{where}: the tensor {missing[0]} is missing (and {len(missing) - 1} more)")
    if surplus := sorted(files.keys() - parameters.keys()):
        raise ModelError(f"{where}: the tensor {surplus[0]} is not part of this model (and {len(surplus) - 1} more)")
    for path, names in groupby(sorted(files, key=lambda name: (files[name], name)), files.get):
        with open_tensors(path) as tensors:
            for name in names:
                tensor, shape = tensors.get_tensor(name), parameters[name].shape
                if tensor.shape != shape:
                    raise ModelError(f"{path}: {name} has shape {tuple(tensor.shape)}, the config says {tuple(shape)}")
                fill(parameters[name], tensor)


# ------------------------------------------------------------------------------------------------ writing folders


@contextmanager
def new_folder(folder: Path, tokenizer_from: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` when the block ends, with the tokenizer files of another one.

    Raise ModelError if `folder` exists.
    """
    if folder.exists():
        raise ModelError(f"{folder}: exists already; choose another name")
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with writing(folder, unfinished):
        unfinished.mkdir(parents=True)
        yield unfinished
        for file in TOKENIZER_FILES if tokenizer_from else ():
            if (tokenizer_from / file).exists():
                shutil.copy(tokenizer_from / file, unfinished / file)
        unfinished.rename(folder)


def write_model(folder: Path, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype, config: dict) -> None:
    """Write config.json and the parameters, sharded or not, in files of about SHARD_BYTES, one in memory at a time."""
    shards, total = defaultdict(list), 0
    for name, parameter in parameters.items():
        shards[total // SHARD_BYTES].append(name)
        total += parameter.numel() * dtype.itemsize
    weight_map = {}
    for i, names in enumerate(shards.values(), 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: full_tensor(parameters[name]).to("cpu", dtype).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", config)


def write_json(path: Path, value: dict) -> None:
    """Write JSON in Hugging Face's layout."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
