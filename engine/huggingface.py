"""Hugging Face model folders: read config, weights and tokenizer strictly, and write them for transformers."""

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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
from engine.terminal import note
from yarn import Llama3Scaling, Rope, Yarn

SHARD_BYTES = 5 * 2**30
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
ADAPTER_CONFIG = "adapter_config.json"  # marks an adapter folder, see engine/adapter.py
SETTINGS = "nanopolaris.json"  # how a run of train.py has sampled its model, see lab/model_card.py
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json", "tokenizer.model",
)  # fmt: skip
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", list: "a list"}
# keys of config.json, its rotary blocks, an adapter's config, SETTINGS, by type and, for numbers, bounds (included)
KEYS_BY_RULE = {
    (str,): "model_type rope_type peft_type base_model_name_or_path instruction",
    (bool,): "tie_word_embeddings attention_bias mlp_bias use_sliding_window",
    (list,): "layer_types target_modules",
    (dict,): "rope_scaling rope_parameters evaluation training",
    (int, 1, 1000): "num_hidden_layers",
    (int, 1, 2**14): "num_attention_heads num_key_value_heads",
    (int, 2, 2**14): "head_dim",
    (int, 1, 2**18): "hidden_size r",
    (int, 1, 2**20): "intermediate_size",
    (int, 1, 2**24): "vocab_size",
    (int, 1, 2**32): "max_position_embeddings original_max_position_embeddings n max_tokens",
    (int, 0, 2**32): "top_k",
    (float, 0, 1e6): "temperature",
    (float, 0, 1): "rms_norm_eps",
    (float, 1, 1e6): "factor",
    (float, 2, 1e12): "rope_theta",
    (float, 1e-3, 1e3): "attention_factor attn_factor",
    (float, 1e-3, 1e6): "beta_fast beta_slow low_freq_factor high_freq_factor",
    (float, -1e6, 1e6): "lora_alpha",
}
KEYS = {key: rule for rule, keys in KEYS_BY_RULE.items() for key in keys.split()}
ROTARY_BUFFER = "rotary_emb.inv_freq"  # of old checkpoints: computed from the config
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes in which weights may be stored


class ModelError(UserError):
    """A model cannot be used."""


@contextmanager
def named(where: object) -> Iterator[None]:
    """Say in a ModelError which file or row it is about."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None


# ---------------------------------------------------------------------------------------------------- JSON files


def regular_file(path: Path) -> Path:
    """Return a path that can be opened; ModelError where there is nothing, or a folder, pipe or device."""
    if not path.is_file():
        what = "it is not a regular file" if path.exists() else "no such file"
        raise ModelError(f"{path}: cannot be read ({what}): download it again")
    return path


def read_json(path: Path) -> dict:
    """Read a file of one JSON object, in UTF-8; ModelError if it is anything else."""
    try:
        value = json.loads(regular_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8 and not JSON are ValueErrors
        raise ModelError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object but {TYPE_NAMES.get(type(value), 'null')}")
    return value


def read_optional_json(path: Path) -> dict:
    """Read a file as `read_json` does; {} if there is none."""
    return read_json(path) if path.exists() else {}


def check_keys(source: dict, required: Sequence[str] = ()) -> None:
    """Raise ModelError for a missing key and for a value against KEYS_BY_RULE; null counts as missing."""
    if missing := [key for key in required if source.get(key) is None]:
        raise ModelError(f"the key {missing[0]!r} is missing")
    for key in source.keys() & KEYS.keys():
        (kind, *bounds), value = KEYS[key], source[key]
        is_kind = type(value) is kind or (kind is float and type(value) is int)  # isinstance takes a bool for an int
        if value is not None and not (is_kind and (not bounds or bounds[0] <= value <= bounds[1])):
            between = " from {:,} to {:,}".format(*bounds) if bounds else ""
            raise ModelError(f"{key} must be {TYPE_NAMES.get(kind, 'an object')}{between}, not {str(value)[:60]!r}")


def end_tokens(source: dict, vocabulary: int) -> set[int]:
    """Return the eos_token_id of a config: none, one or several. ModelError unless all are below `vocabulary`."""
    ends = source.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    for end in ends:
        if type(end) is not int or not 0 <= end < vocabulary:
            raise ModelError(f"eos_token_id {str(end)[:60]!r} is no token of the {vocabulary:,} of the model")
    return set(ends)


# --------------------------------------------------------------------------------------------------- config.json


def config_fields(source: dict, where: str | Path) -> dict:
    """Read a Hugging Face config as the fields of model.ModelConfig; ModelError if the model is not supported."""
    check_keys(source)
    kind = source.get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelError(f"model_type {kind!r} is not supported (known: {', '.join(ARCHITECTURES)})")
    if source.get("quantization_config"):
        raise ModelError("the weights are quantised: use the unquantised model")
    if source.get("use_sliding_window") or "sliding_attention" in (source.get("layer_types") or ()):
        raise ModelError("sliding-window attention is not supported")
    if source.get("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act {source['hidden_act']!r} is not supported (only silu)")
    if kind != "qwen2" and (source.get("attention_bias") or source.get("mlp_bias")):
        raise ModelError("attention_bias / mlp_bias are not supported")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    check_keys(source, (*sizes, "num_attention_heads", "max_position_embeddings"))
    end_tokens(source, source["vocab_size"])
    heads = source["num_attention_heads"]
    key_heads = source.get("num_key_value_heads") or heads
    head_dim = source.get("head_dim") or (128 if kind == "qwen3" else source["hidden_size"] // heads)
    rope, notes = rope_from_config(source, head_dim)
    if heads % key_heads or head_dim % 2 or not head_dim:
        raise ModelError(f"{heads} heads cannot share {key_heads} key/value heads of {head_dim}")
    window = source["max_position_embeddings"]
    if isinstance(rope.scaling, Yarn):  # Qwen documents rope_scaling alone, and vLLM reads it so
        extended = round(rope.scaling.factor * rope.scaling.original_max_position_embeddings)
        if extended > window:
            notes.append(f"YaRN: the window is factor x original = {extended:,} tokens, beyond the {window:,} stated")
            window = extended
    for text in notes:
        note(f"{where}: {text}")
    return {size: source[size] for size in sizes} | {
        "model_type": kind,
        "max_position_embeddings": window,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-6 if source.get("rms_norm_eps") is None else source["rms_norm_eps"],
        "tie_word_embeddings": bool(source.get("tie_word_embeddings", False)),
        "rope": rope,
        "source": source,
    }


def config_to_json(fields: dict, dtype: torch.dtype) -> dict:
    """Return the config.json of a model with these fields and with weights in `dtype`, for transformers."""
    config = fields["source"] | fields | rope_to_config(fields["rope"])
    # torch_dtype is the older name of dtype; transformers prefers an original_... at the top to that of rope_scaling
    for key in ("source", "rope", "torch_dtype", "original_max_position_embeddings"):
        config.pop(key, None)
    architecture = ARCHITECTURES[fields["model_type"]]
    return config | {"architectures": [architecture], "dtype": str(dtype).removeprefix("torch.")}


def rope_from_config(config: dict, head_dim: int) -> tuple[Rope, list[str]]:
    """Read the rotary keys, old style and new, of a Hugging Face config. Return the rope and notes for the user.

    Raise ModelError on any kind of scaling, or key, that yarn.py does not compute.
    """
    original, blocks = "original_max_position_embeddings", []
    default = {"rope_theta": config.get("rope_theta") or 10_000.0, "rope_type": "default"}
    for name in ("rope_scaling", "rope_parameters"):
        stated = {key: value for key, value in (config.get(name) or {}).items() if value is not None}
        if "type" in stated:
            stated.setdefault("rope_type", stated.pop("type"))
        check_keys(stated)
        if nested := [key for key, value in stated.items() if isinstance(value, dict)]:
            raise ModelError(f"{name} for one kind of layer ({nested[0]}) is not supported")
        if (at_top := config.get(original)) is not None and stated.setdefault(original, at_top) != at_top:
            raise ModelError(f"config.json and {name} disagree about {original}: keep one of the two")
        if stated.keys() - {original}:
            blocks.append(default | stated)
    keys, other = (blocks[0], blocks[-1]) if blocks else (default, default)
    if differing := sorted(key for key in keys.keys() | other.keys() if keys.get(key) != other.get(key)):
        raise ModelError(f"rope_scaling and rope_parameters disagree about {', '.join(differing)}: keep one of the two")
    theta, kind = float(keys.pop("rope_theta")), keys.pop("rope_type")
    if keys.pop("partial_rotary_factor", 1.0) != 1.0 or config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("partial_rotary_factor other than 1 is not supported")

    notes: list[str] = []
    if kind == "default":
        return Rope(theta, head_dim), notes
    if kind not in ("yarn", "llama3"):
        raise ModelError(f"rope scaling {kind!r} is not supported (known: default, yarn, llama3)")
    window = keys.pop(original, None) or config.get("max_position_embeddings")
    if not window:
        raise ModelError(f"rope scaling {kind!r} needs {original}: add it to config.json")
    try:
        if kind == "yarn":
            factor = float(keys.pop("factor"))
            default = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0  # in the paper and in transformers
            attention_factor, attn_factor = keys.pop("attention_factor", None), keys.pop("attn_factor", None)
            if attention_factor is None and attn_factor is not None:
                off = float(attn_factor) == 1.0
                attention_factor = 1.0 if off else float(attn_factor) * default
                meant = "attention_factor, as POLARIS meant it" if off else f"a factor on the paper's {default:.4f}"
                notes.append(
                    f'YaRN: "attn_factor": {attn_factor} is read as {meant} '
                    f"(transformers ignores the key and applies {default:.4f})"
                )
            elif attention_factor is None:
                attention_factor = default
                notes.append(f"YaRN: no attention_factor in the config: the paper's {default:.4f} is applied")
            betas = float(keys.pop("beta_fast", 32.0)), float(keys.pop("beta_slow", 1.0))
            scaling = Yarn(factor, window, float(attention_factor), *betas)
            if keys.pop("truncate", True) is not True:
                raise ModelError("YaRN with truncate=false is not supported")
        else:
            low, high = float(keys.pop("low_freq_factor")), float(keys.pop("high_freq_factor"))
            scaling = Llama3Scaling(float(keys.pop("factor")), window, low, high)
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
    if not (folder / name).exists():
        for file, what in ((ADAPTER_CONFIG, "an adapter"), ("manifest.json", "a checkpoint of a run")):
            if (folder / file).exists():
                raise ModelError(f"{folder}: this is {what}, no model: export it first (python model.py {folder} OUT)")
        if (folder / "recipe.toml").exists():
            raise ModelError(f"{folder}: this is a run, no model: its models are stage-N and checkpoints/step-N")
        raise ModelError(f"{folder}: no {name}, so this is not a Hugging Face model folder")
    return read_json(folder / name)


@contextmanager
def open_tensors(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file; ModelError if it is missing or damaged."""
    try:
        with safe_open(regular_file(path), "pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({error}): download it again") from None


def weight_files(folder: Path) -> dict[Path, set[str]]:
    """Return the safetensors files of a folder, each with the tensors that an index names.

    As in transformers, an index counts only without model.safetensors.
    """
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if path.exists():
        return {path: set()}
    if not index.exists():
        raise ModelError(f"{folder}: no model.safetensors and no index of shards: convert the weights first")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
        raise ModelError(f"{index}: weight_map does not name the file of each tensor: download it again")
    names = defaultdict(set)
    for name, file in shards.items():
        names[folder / Path(file).name].add(name)
    return dict(names)


def find_tensors(paths: Mapping[Path, set[str]], parameters: Mapping[str, nn.Parameter], tied: bool) -> dict[str, Path]:
    """Return each parameter's file. ModelError unless the files' headers have its names, shapes and a float dtype.

    The parameters may be on the meta device: nothing is allocated.
    """
    files: dict[str, Path] = {}
    layouts: dict[str, tuple[tuple[int, ...], str]] = {}
    for path, named in paths.items():
        with open_tensors(path) as tensors:
            if absent := sorted(name for name in named - set(tensors.keys()) if not name.endswith(ROTARY_BUFFER)):
                raise ModelError(f"{path}: {absent[0]} is missing, which the index names: download both again")
            for name in tensors.keys():
                if name.endswith(ROTARY_BUFFER):
                    continue
                if name in files:
                    raise ModelError(f"{path}: {name} is in {files[name].name} too: remove the stale file")
                header = tensors.get_slice(name)
                files[name], layouts[name] = path, (tuple(header.get_shape()), header.get_dtype())
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    copy = files.pop(head, None) if tied else None  # some tied checkpoints carry a copy of the embedding
    if missing := sorted(parameters.keys() - files.keys()):
        where = " and ".join(sorted({str(path.parent) for path in paths}))
        raise ModelError(f"{where}: the tensor {missing[0]} is missing (and {len(missing) - 1} more)")
    if surplus := sorted(files.keys() - parameters.keys()):
        where = files[surplus[0]].parent
        raise ModelError(f"{where}: the tensor {surplus[0]} is not part of this model (and {len(surplus) - 1} more)")
    for name, path in files.items():
        (shape, dtype), expected = layouts[name], tuple(parameters[name].shape)
        if shape != expected:
            raise ModelError(f"{path}: {name} has shape {shape}, the config says {expected}")
        if dtype not in FLOATS:
            raise ModelError(f"{path}: {name} has dtype {dtype}: use the unquantised model ({', '.join(FLOATS)})")
    if copy:
        with open_tensors(copy) as ours, open_tensors(files[embedding]) as others:
            if not torch.equal(ours.get_tensor(head), others.get_tensor(embedding)):
                raise ModelError(f"{copy}: tie_word_embeddings is true but {head} is not the embedding")
    return files


def read_tensors(files: Mapping[str, Path], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy each tensor found by `find_tensors` into its parameter or this rank's shard of it."""
    for path, names in groupby(sorted(files, key=lambda name: (files[name], name)), files.get):
        with open_tensors(path) as tensors:
            for name in names:
                fill(parameters[name], tensors.get_tensor(name))


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
        for file in (*TOKENIZER_FILES, SETTINGS) if tokenizer_from else ():
            if (tokenizer_from / file).exists():
                shutil.copy(tokenizer_from / file, unfinished / file)
        yield unfinished
        for path in unfinished.iterdir():  # safetensors lets only the owner read, and a copy keeps its mode
            path.chmod(unfinished.stat().st_mode & 0o666)
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
