"""Break a model folder in many ways: eval.py must load it as transformers does, or stop with one sentence.

    python bench/broken_folders.py                  # three minutes on a CPU, nothing is downloaded
    python bench/broken_folders.py --only fifo

Each folder is a copy of a tiny model (whole, in shards, or an adapter of it) with one thing broken, and has 10 s and
4 GiB. Prints those that are not refused with a sentence, and the number of each outcome by the file that is broken.
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

MOST_SECONDS, MOST_BYTES = 10, 4 * 2**30  # of address space beyond what the imports take
OUTCOMES = ("loaded", "sentence", "traceback", "hung")
CONFIG, GENERATION, ADAPTER = "config.json", "generation_config.json", "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
FILES = {  # the folders that have them
    "whole": (CONFIG, GENERATION, "tokenizer_config.json", "tokenizer.json", WEIGHTS), "shards": (INDEX,),
    "adapter": (ADAPTER, "trained_config.json", "adapter_model.safetensors"),
}  # fmt: skip
CONTENTS = {
    "a list": b"[1]", "a string": b'"text"', "a number": b"7", "null": b"null", "no bytes": b"", "cut": b'{"a": [',
    "not UTF-8": b'{"a": "\xe9"}', "zeros": bytes(64), "nested deeply": b"[" * 100_000, "an empty object": b"{}",
}  # fmt: skip
PLACES = {
    "a fifo": os.mkfifo, "a folder": Path.mkdir, "a link to nothing": lambda path: path.symlink_to("gone"),
    "a link to itself": lambda path: path.symlink_to(path.name), "a device": lambda path: path.symlink_to("/dev/zero"),
}  # fmt: skip
NUMBERS = ("64", "many", -1, 0, 2.5, 10**12, 10**30, float("nan"), True, [4], {})
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
ENDS = ("</s>", -1, 10**6, 10**30, 2.5, [[1]], {}, True)
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_KEYS = (*YARN, "attention_factor", "beta_fast", "beta_slow")
VALUES = {  # (file, key): values
    **{(CONFIG, key): NUMBERS for key in (*SIZES, "num_key_value_heads", "max_position_embeddings")},
    **{(CONFIG, key): NUMBERS for key in ("rms_norm_eps", "rope_theta")},
    (CONFIG, "rope_scaling"): ["yarn", 7, ["yarn"], *(YARN | {key: n} for key in YARN_KEYS for n in NUMBERS)],
    (CONFIG, "model_type"): (7, ["qwen3"], {}), (CONFIG, "layer_types"): ("full_attention", 7, [7]),
    (CONFIG, "tie_word_embeddings"): ("false", 7), (CONFIG, "use_sliding_window"): ("no",),
    (CONFIG, "hidden_act"): (7, []), (CONFIG, "quantization_config"): ("4bit",),
    (CONFIG, "eos_token_id"): ENDS, (GENERATION, "eos_token_id"): ENDS,
    (INDEX, "weight_map"): (
        7, None, [], {}, *({EMBEDDING: file} for file in (7, None, "gone.safetensors", "../x", "\0")),
    ),
    (ADAPTER, "r"): NUMBERS, (ADAPTER, "lora_alpha"): ("two", float("nan"), 10**400, -1, [4]),
    (ADAPTER, "target_modules"): ("all", [], [7], [["q_proj"]], {"q_proj": 1}, None),
    (ADAPTER, "base_model_name_or_path"): (7, None, "", "\0", "broken"),
    (ADAPTER, "peft_type"): (7, []), (ADAPTER, "bias"): ([], {}),
}  # fmt: skip
EDITS = {  # of the tensors
    "a missing tensor": lambda t: t.pop(NORM), "a surplus tensor": lambda t: t.update(extra=torch.ones(2)),
    "one row less": lambda t: t.update({EMBEDDING: t[EMBEDDING][1:]}), "no tensors": dict.clear,
    "transposed": lambda t: t.update({EMBEDDING: t[EMBEDDING].T}),
    "none": lambda t: t.update({EMBEDDING: t[EMBEDDING][:0]}), "a scalar": lambda t: t.update({NORM: torch.ones(())}),
    "whole numbers": lambda t: t.update({NORM: t[NORM].long()}), "booleans": lambda t: t.update({NORM: t[NORM] > 0}),
    "float8": lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}),
}  # fmt: skip
ROWS = json.dumps({EMBEDDING: {"dtype": "F32", "shape": [10**10, 48], "data_offsets": [0, 192 * 10**10]}}).encode()
HEADERS = {  # the stated length and the bytes
    "a header that is a list": (2, b"[]"), "a gigantic header": (2**62, b"{}"), "a header past the end": (9999, b"{}"),
    "1e10 rows in the header": (len(ROWS), ROWS), "a header that is not UTF-8": (9, b'{"\xe9": 1}'),
}  # fmt: skip


def replace(file: str, make: Callable[[Path], object], folder: Path) -> None:
    """Put something else in a file's place."""
    (folder / file).unlink(missing_ok=True)
    make(folder / file)


def change(file: str, key: str, value: object, folder: Path) -> None:
    """Change a value of a JSON file."""
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {key: value}))


def edit(how: Callable[[dict], object], folder: Path) -> None:
    """Change the tensors of the first file with weights."""
    path = min(folder.glob("model*.safetensors"))
    how(tensors := load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def mutations() -> Iterator[tuple[str, str, str, Callable[[Path], object]]]:
    """Yield (file, damage, folder to copy, what damages the copy)."""
    folder_of = {file: folder for folder, files in FILES.items() for file in files}
    for file, folder in folder_of.items():
        for damage, make in PLACES.items():
            yield file, damage, folder, partial(replace, file, make)
        for damage, content in CONTENTS.items():
            yield file, damage, folder, partial(replace, file, lambda path, content=content: path.write_bytes(content))
    for (file, key), values in VALUES.items():
        for value in values:
            yield file, f"{key} = {value!r}"[:100], folder_of[file], partial(change, file, key, value)
    for damage, how in EDITS.items():
        yield WEIGHTS, damage, "whole", partial(edit, how)
    for damage, (length, text) in HEADERS.items():
        content = length.to_bytes(8, "little") + text + bytes(256)
        yield (
            WEIGHTS,
            damage,
            "whole",
            partial(replace, WEIGHTS, lambda path, content=content: path.write_bytes(content)),
        )
    yield WEIGHTS, "a cut file", "whole", lambda folder: os.truncate(folder / WEIGHTS, 5000)
    yield INDEX, "no shards", "shards", lambda folder: [path.unlink() for path in folder.glob("model-*")]
    yield INDEX, "a tensor in two shards", "shards", partial(edit, lambda t: t.update({NORM: torch.ones(32)}))


def make_folders() -> None:
    """Write the whole model, one in shards and an adapter into the current folder."""
    bad_inputs.make_inputs()
    tokenizer, shard_bytes = Path("world/model"), huggingface.SHARD_BYTES
    model = load(tokenizer)
    for folder, huggingface.SHARD_BYTES in (("whole", shard_bytes), ("shards", 20_000)):
        save(model, Path(folder), tokenizer_from=tokenizer)
    add_lora(model, Lora(2, 4.0, str(Path("whole").resolve())))
    initialise_lora(model, 0)
    save(model, Path("adapter"))


def outcome(folder: str) -> tuple[str, str]:
    """Evaluate a folder on one problem; return the outcome and the last line on stderr."""
    options = "--data one.jsonl -n 1 --max-tokens 2 --temperature 0 --no-thinking --workers 1 --instruction x --out e"
    status, errors = bad_inputs.start("eval.py", folder, *options.split())
    shutil.rmtree("e", ignore_errors=True)
    last = (errors.strip().splitlines() or [""])[-1]
    refused = "sentence" if last.startswith("eval.py: ") and "Traceback" not in errors else "traceback"
    return {124: "hung", 0: "loaded"}.get(status, refused), last


def main() -> None:
    """Try all folders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="folders whose file or damage contains this")
    parser.add_argument("--all", action="store_true", help="print the sentences as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a fork must not wait for threads that it does not have
    bad_inputs.MOST_SECONDS = MOST_SECONDS
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, resource.RLIM_INFINITY))
    counts: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if os.fork() == 0:
            make_folders()
            os._exit(0)
        os.wait()
        for intact in FILES:
            if (found := outcome(intact))[0] != "loaded":
                sys.exit(f"broken_folders.py: the intact folder {intact} was not loaded: {found}")
        for file, damage, intact, mutate in mutations():
            if arguments.only not in f"{file} {damage}":
                continue
            shutil.copytree(intact, "broken")
            mutate(Path("broken"))
            found, line = outcome("broken")
            shutil.rmtree("broken")
            counts.setdefault(file, Counter())[found] += 1
            if arguments.all or found != "sentence":
                print(f"{found:10} {file}: {damage}: {line[:200]}", flush=True)
    counts["together"] = sum(counts.values(), Counter())
    print(f"| file | folders | {' | '.join(OUTCOMES)} |\n|---|---|---|---|---|---|")
    for file, counted in counts.items():
        print(f"| {file} | {counted.total()} | {' | '.join(str(counted[name]) for name in OUTCOMES)} |")
    sys.exit(bool(counts["together"]["traceback"] or counts["together"]["hung"]))


if __name__ == "__main__":
    main()
