"""Do the CUDA paths of the sampler and the trainer work and agree? One command, random weights, no download.

    python bench/gpu_check.py                # on a GPU: the shape of Qwen3-0.6B in bfloat16
    python bench/gpu_check.py --small        # anywhere: a shape that a CPU can do, in float32

Prints the log-prob difference between sampler and trainer (random weights are flat: trained ones say more), the
share of greedy tokens on which the paged kernel and plain SDPA agree, speed and peak memory.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rollout  # noqa: E402
from grpo import PolicyLoss, TrainingSequence, pack  # noqa: E402
from model import Transformer, initialise, parse_config  # noqa: E402

SHAPE = {
    "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40_960, "rope_theta": 1e6, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


def sample(model: Transformer, temperature: float, new_tokens: int) -> tuple[list[rollout.Rollout], float]:
    """8 responses to each of 8 prompts, and tokens per second."""
    random = np.random.default_rng(0)
    prompts = [rollout.Prompt(str(i), random.integers(0, 500, 20 + 40 * i).tolist(), 8) for i in range(8)]
    limits = rollout.CacheLimits(tokens=200_000, page_size=256, rows=64)
    begun = time.perf_counter()
    with torch.no_grad():
        found = list(rollout.generate(model, prompts, rollout.Sampling(temperature, new_tokens, (), 0), limits))
    tokens = sum(len(response.tokens) for response in found)
    return sorted(found, key=lambda r: (r.problem_id, r.index)), tokens / (time.perf_counter() - begun)


def main() -> None:
    """Run the checks and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a shape that a CPU can do")
    parser.add_argument("--tokens", type=int, default=256, help="of each response")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.small:
        sys.exit("gpu_check.py: no CUDA device here; use --small to try the script on a CPU")
    model = Transformer(parse_config(SHAPE | (SMALL if arguments.small else {})))
    initialise(model, 0)
    model.to("cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)

    responses, speed = sample(model, 1.0, arguments.tokens)
    sequences = [
        TrainingSequence(np.concatenate([r.prompt, r.tokens]), len(r.prompt), 1.0, r.logprobs, r.temperature)
        for r in responses
    ]
    batch = pack(sequences, model.device)
    with torch.no_grad():
        logprobs = model(batch.tokens, batch.context, batch.predict, batch.targets, batch.temperature)
    sums = PolicyLoss().sums(logprobs, batch)
    greedy, _ = sample(model, 0.0, arguments.tokens)
    kernels = rollout.flash_attn_varlen_func, rollout.varlen_attn
    rollout.flash_attn_varlen_func = rollout.varlen_attn = None
    plain, plain_speed = sample(model, 0.0, arguments.tokens)
    same = np.mean([np.mean(a.tokens == b.tokens) for a, b in zip(greedy, plain, strict=True)])

    names = [name for name, kernel in zip(("flash-attn", "torch varlen"), kernels, strict=True) if kernel and cuda]
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else 'CPU'}, kernels: {names or 'SDPA'}")
    print("| what | value |\n|---|---|")
    print(f"| mean, largest log-prob difference, sampler to trainer | {sums['own_difference'] / len(logprobs):.2e}, "
          f"{sums['largest_difference']:.2e} |")  # fmt: skip
    print(f"| greedy tokens equal, paged kernel to SDPA | {same:.1%} |")
    print(f"| tokens per second, kernel; SDPA | {speed:,.0f}; {plain_speed:,.0f} |")
    if cuda:
        print(f"| peak memory | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB |")


if __name__ == "__main__":
    main()
