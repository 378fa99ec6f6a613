"""All GPU figures in one command: do the CUDA paths agree, and how close are they to the machine's limits?

    python bench/gpu_check.py                            # on a GPU: the shape of Qwen3-4B, random bfloat16 weights
    python bench/gpu_check.py --shape qwen3-0.6b --part decode
    python bench/gpu_check.py --part agree --model Qwen/Qwen3-0.6B    # trained weights: random logits are too flat
    python bench/gpu_check.py --small                    # anywhere: a small shape for CPUs, in float32

    agree     log-prob difference between sampler and trainer, with a float32 head and without; greedy tokens of the
              paged kernel against plain SDPA, and of graphs against single steps
    decode    64 rows at a context of 2K to 4K tokens: share of the bandwidth roofline
    generate  a longer ragged case of bench/sampler.py, against transformers' generate and continuous batching
    update    bench/update.py at 16K and 40K tokens: model-FLOPs utilisation and peak memory

Ends with a table and one line of JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rollout  # noqa: E402
from bench.machine import measure_machine  # noqa: E402
from bench.sampler import Case, run_continuous, run_generate, run_ours  # noqa: E402
from bench.update import SHAPES  # noqa: E402
from engine import decode  # noqa: E402
from engine.batches import TrainingSequence, pack  # noqa: E402
from engine.sharding import gathered  # noqa: E402
from grpo import PolicyLoss  # noqa: E402
from lab.benchmarks import text_table  # noqa: E402
from model import Transformer, initialise, load, parse_config, save  # noqa: E402
from rollout import CacheLimits, Prompt, Rollout, SamplerStats, Sampling, cache_bytes_per_token, generate  # noqa: E402

SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
PARTS = ("agree", "decode", "generate", "update")


def sample(model: Transformer, temperature: float, new_tokens: int) -> list[Rollout]:
    """Sample 8 responses to each of 8 prompts; return them in order."""
    random = np.random.default_rng(0)
    prompts = [Prompt(str(i), random.integers(0, 500, 20 + 40 * i).tolist(), 8) for i in range(8)]
    limits = CacheLimits(tokens=64 * 1024, page_size=256, rows=64)
    with gathered(model):
        found = list(generate(model, prompts, Sampling(temperature, new_tokens, (), 0), limits))
    return sorted(found, key=lambda r: (r.problem_id, r.index))


def equal_share(one: list[Rollout], other: list[Rollout]) -> float:
    """Return the share of positions with equal tokens."""
    return float(np.mean([np.mean(a.tokens == b.tokens) for a, b in zip(one, other, strict=True)]))


def check_agreement(model: Transformer, new_tokens: int) -> dict[str, float]:
    """Compare sampler with trainer, paged kernel with SDPA, and graphs with single steps."""
    found = {}
    for float32_head in (True, False):
        model.float32_head = float32_head
        sequences = [
            TrainingSequence(np.concatenate([r.prompt, r.tokens]), len(r.prompt), 1.0, r.logprobs, r.temperature)
            for r in sample(model, 1.0, new_tokens)
        ]
        batch = pack(sequences, model.device)
        with torch.no_grad():
            logprobs = model(batch.tokens, batch.context, batch.predict, batch.targets, batch.temperature)
        sums, head = PolicyLoss().sums(logprobs, batch), "float32 head" if float32_head else "rounded head"
        found[f"mean log-prob difference, {head}"] = float(sums["difference"]) / len(logprobs)
        found[f"largest log-prob difference, {head}"] = float(sums["max_difference"])
    model.float32_head = True
    greedy = sample(model, 0.0, new_tokens)
    graphs, rollout.step_graphs = rollout.step_graphs, lambda *_: None
    found["greedy tokens equal, graphs to single steps"] = equal_share(greedy, sample(model, 0.0, new_tokens))
    kernels = decode.flash_attn_varlen_func, decode.varlen_attn
    decode.flash_attn_varlen_func = decode.varlen_attn = None
    found["greedy tokens equal, paged kernel to SDPA"] = equal_share(greedy, sample(model, 0.0, new_tokens))
    decode.flash_attn_varlen_func, decode.varlen_attn = kernels
    rollout.step_graphs = graphs
    return found


def check_decode(model: Transformer, rows: int, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """Return tokens per second of decoding alone, and the share of the bandwidth roofline."""
    random, dtype = np.random.default_rng(0), model.lm_head.weight.dtype
    prompts = [Prompt(str(i), random.integers(0, 500, prompt_tokens).tolist(), 1) for i in range(rows)]
    pages = -(-(prompt_tokens + new_tokens) // 256) + 1

    def seconds(new: int) -> tuple[float, SamplerStats]:
        stats, begun = SamplerStats(), time.perf_counter()
        with gathered(model):
            list(generate(model, prompts, Sampling(1.0, new, (), 0), CacheLimits(rows * pages * 256, 256, rows), stats))
        return time.perf_counter() - begun, stats

    seconds(16)  # loads kernels and captures graphs
    short = min(seconds(16)[0] for _ in range(2))
    long, stats = seconds(new_tokens)
    decoded, took = rows * (new_tokens - 16), long - short
    bandwidth, _ = measure_machine(model.device, dtype)
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    weights += model.lm_head.weight.numel() if model.config.tie_word_embeddings else 0
    context = rows * (prompt_tokens + (16 + new_tokens) / 2)  # tokens read in a mean step
    step_bytes = weights * dtype.itemsize + context * cache_bytes_per_token(model.config, dtype)
    limit = (new_tokens - 16) * step_bytes / bandwidth
    return {
        "decode tokens per second": decoded / took,
        "share of the bandwidth roofline": limit / took,
        "measured bandwidth, GB/s": bandwidth / 1e9,
        "preemptions": stats.preemptions,
    }


def check_generate(model: Transformer, mean_tokens: int) -> dict[str, float]:
    """Compare the ragged case with transformers on the same weights."""
    from transformers import AutoModelForCausalLM

    random = np.random.default_rng(0)
    lengths = np.minimum(4 * mean_tokens, random.geometric(1 / mean_tokens, (16, 8)))
    prompts = [random.integers(5, 500, n).tolist() for n in random.integers(64, 257, 16)]
    case = Case("ragged", prompts, lengths.tolist(), 64)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder, "model"), model.lm_head.weight.dtype)
        reference = AutoModelForCausalLM.from_pretrained(Path(folder, "model"), dtype=model.lm_head.weight.dtype)
    reference.to(model.device).eval()
    run_ours(model, case)
    ours = min(run_ours(model, case)[0] for _ in range(2))
    whole, continuous = run_generate(reference, case), run_continuous(reference, case)
    return {
        "ragged case, ours, tokens per second": case.tokens / ours,
        "ratio to generate": whole / ours,
        "ratio to continuous batching": continuous / ours,
    }


def check_update(shape: str, lengths: list[int], sequence: int) -> dict[str, float]:
    """Run bench/update.py with recomputation, which starts a process per case."""
    command = [sys.executable, Path(__file__).with_name("update.py"), "--shape", shape, "--sequence", str(sequence)]
    features = ["recompute", "lora, recompute"]
    command += ["--features", *features, "--lengths", *map(str, lengths), "--rounds", "2"]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = {}
    for case in json.loads(child.stdout.splitlines()[-1])["cases"]:
        name = f"update of {case['tokens']:,} tokens ({case['feature']})"
        if "failed" in case:
            print(f"{name}: {case['failed']}", file=sys.stderr)
            continue
        found[f"{name}, utilisation"] = case["utilisation"]
        found[f"{name}, GiB above weights and optimizer"] = case["live_bytes"] / 2**30
    return found


def main() -> None:
    """Run the parts and print a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--shape", choices=[name for name in SHAPES if "qwen3" in name], default="qwen3-4b")
    parser.add_argument("--model", help="a model folder or hub id instead of random weights")
    parser.add_argument("--small", action="store_true", help="a small shape and short lengths, for a CPU")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.small:
        sys.exit("gpu_check.py: no CUDA device found; use --small to try the script on a CPU")
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    parts, found = arguments.part or PARTS, {}
    if set(parts) - {"update"}:
        if arguments.model:
            model = load(arguments.model, device, dtype)
        else:
            model = Transformer(parse_config(SHAPES[arguments.shape] | (SMALL if arguments.small else {})))
            initialise(model, 0)
            model.to(device, dtype)
        if "agree" in parts:
            found |= check_agreement(model, 24 if arguments.small else 512)
        if "decode" in parts:
            found |= check_decode(model, *((8, 64, 48) if arguments.small else (64, 2048, 2048)))
        if "generate" in parts:
            found |= check_generate(model, 12 if arguments.small else 512)
        del model  # the update's processes need its memory
        if cuda:
            torch.cuda.empty_cache()
    if "update" in parts:
        small = ("smollm2-135m", [256], 128)
        found |= check_update(*(small if arguments.small else (arguments.shape, [16_384, 40_960], 0)))
    kernels = {"flash-attn": decode.flash_attn_varlen_func, "torch varlen": decode.varlen_attn}
    names = [name for name, kernel in kernels.items() if kernel and cuda] or ["SDPA"]
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else 'CPU'}, {names[0]}")
    print(text_table([["what", "value"], *([name, f"{value:.4g}"] for name, value in found.items())]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
