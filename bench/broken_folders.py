"""Break a model folder in many ways: eval.py must load it rightly or stop with one sentence, within 10 s and 4 GiB.

    python bench/broken_folders.py                  # two minutes on a CPU, nothing is downloaded
    python bench/broken_folders.py --only fifo

Each folder is a copy of a tiny model (whole, in two shards, or an adapter of it) with one thing broken. Prints how many
were loaded, refused with a sentence, ended in a traceback or hung, by the file that is broken, and all that are not
refused. A folder that loads is right where transformers ignores the damage as well.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import bad_inputs
import torch
from safetensors.torch import load_file, save_file

from engine import huggingface
from engine.adapter import Lora, add_lora, initialise_lora
from model import load, save

MOST_BYTES = 4 * 2**30  # of address space beyond what the imports take
OUTCOMES = ("loaded", "sentence", "traceback", "hung")
CONFIG, ADAPTER, WEIGHTS = "config.json", "adapter_config.json", "model.safetensors"
INDEX, PART = "model.safetensors.index.json", "adapter_model.safetensors"
JSON_FILES = {  # the broken file, and the folder that has it
    CONFIG: "whole", "generation_config.json": "whole", "tokenizer_config.json": "whole", "tokenizer.json": "whole",
    INDEX: "shards", ADAPTER: "adapter", "trained_config.json": "adapter",
}  # fmt: skip
CONTENTS = {
    "a list": b"[1]", "a string": b'"text"', "a number": b"7", "null": b"null", "no bytes": b"", "cut off": b'{"a": [',
    "not UTF-8": b'{"a": "\xe9"}', "zeros": bytes(64), "deeply nested": b"[" * 100_000, "an empty object": b"{}",
}  # fmt: skip
NUMBERS = ("64", "many", -1, 0, 2.5, 10**12, 10**30, float("nan"), True, [4], {})
FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
)  # fmt: skip
WORDS = {
    "model_type": (7, ["qwen3"], {}), "tie_word_embeddings": ("false", 7), "layer_types": ("full_attention", 7, [7]),
    "rope_scaling": ("yarn", 7, ["yarn"], {"type": 7}, {"type": []}, {"type": "yarn"}),
    "eos_token_id": ("</s>", -1, 10**6, 10**30, 2.5, [[1]], {}, True), "hidden_act": (7, []),
    "quantization_config": ("4bit",), "use_sliding_window": ("no",),
}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_KEYS = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")
ADAPTER_FIELDS = {
    "r": NUMBERS, "lora_alpha": ("two", float("nan"), 10**400, -1, [4]),
    "target_modules": ("all", [], [7], [["q_proj"]], {"q_proj": 1}, None),
    "base_model_name_or_path": (7, None, "", "\0", "adapter"), "peft_type": (7, []), "bias": ([], {}),
}  # fmt: skip

Mutation = Callable[[Path], None]


def write(file: str, content: bytes, folder: Path) -> None:
    (folder / file).write_bytes(content)


def replace(file: str, make: Mutation, folder: Path) -> None:
    (folder / file).unlink(missing_ok=True)
    make(folder / file)


def change(file: str, key: str, value: object, folder: Path) -> None:
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {key: value}))


def tensors(edit: Callable[[dict], object], folder: Path, file: str = WEIGHTS) -> None:
    found = load_file(folder / file)
    edit(found)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / file)


def header(text: bytes, length: int | None, folder: Path) -> None:
    write(WEIGHTS, (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(256), folder)


def mutations() -> Iterator[tuple[str, str, str, Mutation]]:
    """Yield (file, damage, folder to copy, mutation)."""
    places = {
        "a fifo": os.mkfifo, "a folder": Path.mkdir, "a dangling link": lambda path: path.symlink_to("gone"),
        "a link to itself": lambda path: path.symlink_to(path.name), "a device": lambda path: path.symlink_to("/dev/zero"),
    }  # fmt: skip
    for file, kind in (JSON_FILES | {WEIGHTS: "whole", PART: "adapter"}).items():
        for name, make in places.items():
            yield file, name, kind, partial(replace, file, make)
        for name, content in CONTENTS.items():
            yield file, name, kind, partial(write, file, content)
    for key, values in (dict.fromkeys(FIELDS, NUMBERS) | WORDS).items():
        for value in values:
            yield CONFIG, f"{key} = {value!r}"[:60], "whole", partial(change, CONFIG, key, value)
    for key in YARN_KEYS:
        for value in NUMBERS:
            yield CONFIG, f"{key} = {value!r}"[:60], "whole", partial(change, CONFIG, "rope_scaling", YARN | {key: value})
    for value in WORDS["eos_token_id"]:
        yield "generation_config.json", f"eos = {value!r}"[:60], "whole", partial(
            change, "generation_config.json", "eos_token_id", value
        )
    for key, values in ADAPTER_FIELDS.items():
        for value in values:
            yield ADAPTER, f"{key} = {value!r}"[:60], "adapter", partial(change, ADAPTER, key, value)
    first, norm = "model.embed_tokens.weight", "model.norm.weight"
    edits = {
        "a missing tensor": lambda t: t.pop(norm), "a surplus tensor": lambda t: t.update(extra=torch.ones(2)),
        "one row less": lambda t: t.update({first: t[first][1:]}), "transposed": lambda t: t.update({first: t[first].T}),
        "whole numbers": lambda t: t.update({norm: t[norm].long()}), "no rows": lambda t: t.update({first: t[first][:0]}),
        "float8": lambda t: t.update({norm: t[norm].to(torch.float8_e4m3fn)}), "booleans": lambda t: t.update({norm: t[norm] > 0}),
        "no tensors": dict.clear, "a scalar": lambda t: t.update({norm: torch.tensor(1.0)}),
    }  # fmt: skip
    for name, edit in edits.items():
        yield WEIGHTS, name, "whole", partial(tensors, edit)
    rows = json.dumps({first: {"dtype": "F32", "shape": [10**10, 48], "data_offsets": [0, 192 * 10**10]}}).encode()
    for name, text, length in (
        ("a header that is a list", b"[]", None), ("a gigantic header", b"{}", 2**62), ("a header beyond the file", b"{}", 9999),
        ("1e10 rows in the header", rows, None), ("a header not UTF-8", b'{"\xe9": 1}', None),
    ):  # fmt: skip
        yield WEIGHTS, name, "whole", partial(header, text, length)
    yield WEIGHTS, "cut off by 100 bytes", "whole", lambda folder: os.truncate(folder / WEIGHTS, 5000)
    for value in (7, None, [], {}, {first: 7}, {first: None}, {first: "gone.safetensors"}, {first: "../x"}, {first: "\0"}):
        yield INDEX, f"weight_map = {value!r}", "shards", partial(change, INDEX, "weight_map", value)
    yield INDEX, "shards gone, stale", "shards", lambda folder: [path.unlink() for path in folder.glob("model-*")]
    yield INDEX, "a tensor in two shards", "shards", lambda folder: tensors(
        lambda t: t.update({norm: torch.ones(32)}), folder, min(path.name for path in folder.glob("model-*"))
    )


def make_folders() -> None:
    """Write the whole model, one in shards and an adapter into the current folder."""
    bad_inputs.make_inputs()
    tokenizer = Path("world/model")
    model = load(tokenizer)
    save(model, Path("whole"), tokenizer_from=tokenizer)
    huggingface.SHARD_BYTES = 20_000
    save(model, Path("shards"), tokenizer_from=tokenizer)
    add_lora(model, Lora(2, 4.0, str(Path("whole").resolve())))
    initialise_lora(model, 0)
    save(model, Path("adapter"))


def outcome(folder: str) -> tuple[str, str]:
    """Evaluate a folder on one problem; return the outcome and the last line on stderr."""
    options = "--data good.jsonl --limit 1 -n 1 --max-tokens 2 --no-thinking --workers 1 --out e --temperature 0"
    status, errors = bad_inputs.start("eval.py", folder, *options.split())
    shutil.rmtree("e", ignore_errors=True)
    last = (errors.strip().splitlines() or [""])[-1]
    if status == 124:
        return "hung", last
    if status == 0:
        return "loaded", last
    return ("traceback" if "Traceback" in errors or not last.startswith("eval.py: ") else "sentence"), last


def main() -> None:
    """Try all folders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="folders whose file or damage contains this")
    parser.add_argument("--all", action="store_true", help="print the sentences too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a fork must not wait for threads that it does not have
    bad_inputs.MOST_SECONDS = 10
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, resource.RLIM_INFINITY))
    counts: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if os.fork() == 0:
            make_folders()
            os._exit(0)
        os.wait()
        for kind in ("whole", "shards", "adapter"):
            if (found := outcome(kind))[0] != "loaded":
                sys.exit(f"broken_folders.py: the intact folder {kind} was not loaded: {found}")
        for file, damage, kind, mutate in mutations():
            if arguments.only not in f"{file} {damage}":
                continue
            shutil.copytree(kind, "broken")
            mutate(Path("broken"))
            found, line = outcome("broken")
            shutil.rmtree("broken")
            counts.setdefault(file, Counter())[found] += 1
            if arguments.all or found != "sentence":
                print(f"{found:10} {file}: {damage}: {line[:200]}", flush=True)
    total = sum(counts.values(), Counter())
    print(f"| file | folders | {' | '.join(OUTCOMES)} |\n|---|---|---|---|---|---|")
    for file, counted in [*counts.items(), ("together", total)]:
        print(f"| {file} | {counted.total()} | {' | '.join(str(counted[name]) for name in OUTCOMES)} |")
    sys.exit(bool(total["traceback"] or total["hung"]))


if __name__ == "__main__":
    main()
