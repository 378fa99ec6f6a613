"""Measure the cost per token as batch, length, group size and model width grow.

    python bench/growth.py                        # needs no download; about ten minutes on two cores
    python bench/growth.py --axis group --model SMOLLM2

Times the functions that train.py calls: `rollout.generate`, and `grpo.optimizer_step` on its rollouts. Each axis
varies one value of a base case of 64 prompts of 64 tokens, 64 new tokens each, on a 4-layer Qwen3 of width 128 (or
the given folder); the group axis has 4 prompts of 512 tokens. The fastest round is reported.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sampler import WIDE128  # noqa: E402

from engine.sharding import gathered  # noqa: E402
from grpo import Group, PolicyLoss, optimizer_step, training_sequences  # noqa: E402
from lab.benchmarks import text_table  # noqa: E402
from lab.problems import Problem  # noqa: E402
from model import Transformer, initialise, load, parse_config  # noqa: E402
from rollout import CacheLimits, Prompt, SamplerStats, Sampling, generate  # noqa: E402

WHY = {
    "batch": "falls while each step reads the same weights for more rows, then levels off as matrix products dominate",
    "length": "rises with the context that each new token reads; in the update, causal attention is quadratic",
    "group": "falls: a prompt is prefilled once for its group (see the counts), and the batch grows",
    "width": "weights grow with the square of the width; at small widths the overhead of each operation dominates",
}


@dataclass(frozen=True)
class Case:
    """The sizes of one measurement."""

    prompts: int = 64
    prompt_tokens: int = 64
    group: int = 1
    new_tokens: int = 64
    width: int = 128


AXES = {
    "batch": [replace(Case(), prompts=n) for n in (1, 4, 16, 64, 256)],
    "length": [replace(Case(), prompts=16, new_tokens=n) for n in (32, 128, 512, 1920)],
    "group": [Case(prompts=4, prompt_tokens=512, group=n, new_tokens=32) for n in (1, 2, 4, 8)],
    "width": [replace(Case(), width=n) for n in (64, 128, 256, 512)],
}


def make_model(width: int) -> Transformer:
    """Build the 128-wide model at another width, with random weights."""
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": width // 32}
    shape |= {"num_key_value_heads": width // 32, "max_position_embeddings": 4096, "model_type": "qwen3"}
    model = Transformer(parse_config(WIDE128 | shape))
    initialise(model, 0)
    return model


def measure(model: Transformer, case: Case) -> tuple[float, float, int]:
    """Return the seconds to sample, the seconds of the update, and the prefilled tokens."""
    random, longest = np.random.default_rng(0), case.prompt_tokens + case.new_tokens
    vocabulary = min(model.config.vocab_size, 40_000)
    prompts = [
        Prompt(str(i), random.integers(5, vocabulary, case.prompt_tokens).tolist(), case.group)
        for i in range(case.prompts)
    ]
    rows, stats = case.prompts * case.group, SamplerStats()
    limits = CacheLimits((rows + case.prompts) * longest, longest, rows)
    begun = time.perf_counter()
    with gathered(model):
        rollouts = list(generate(model, prompts, Sampling(1.0, case.new_tokens, (), 0), limits, stats))
    sampled = time.perf_counter()
    rollouts.sort(key=lambda r: (int(r.problem_id), r.index))
    # at least two rollouts, or there would be no advantages
    rewards = np.arange(len(rollouts)) % 2.0 if len(rollouts) > 1 else np.array([0.0, 1.0])
    group = Group(Problem("all", "?", ("1",)), (rollouts * 2)[: len(rewards)], rewards, rewards > 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)  # plain: its cost does not depend on tokens
    update_begun = time.perf_counter()
    optimizer_step(model, optimizer, training_sequences([group]), PolicyLoss(), 16_384)
    return sampled - begun, time.perf_counter() - update_begun, stats.prefilled_tokens


def main() -> None:
    """Measure each axis; print a table for each, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", action="append", choices=list(AXES), help="default: all")
    parser.add_argument("--model", type=Path, help="a model folder instead of the 128-wide model; not for width")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    results, tables = {}, []
    for axis in arguments.axis or list(AXES):
        field = {"batch": "prompts", "length": "new_tokens"}.get(axis, axis)
        rows = [[axis, "sample us/token", "update us/token", "prefilled tokens"]]
        for case in AXES[axis]:
            model = load(arguments.model) if arguments.model and axis != "width" else make_model(case.width)
            runs = [measure(model, case) for _ in range(arguments.rounds)]
            rollouts = case.prompts * case.group
            sample = 1e6 * min(run[0] for run in runs) / (rollouts * case.new_tokens)
            update = 1e6 * min(run[1] for run in runs) / (max(2, rollouts) * (case.prompt_tokens + case.new_tokens))
            value = getattr(case, field)
            rows.append([str(value), f"{sample:,.1f}", f"{update:,.1f}", f"{runs[0][2]:,}"])
            results.setdefault(axis, {})[value] = {"sample_us": sample, "update_us": update, "prefilled": runs[0][2]}
            print(f"{axis} {value}: {sample:,.1f} us per sampled token, {update:,.1f} per trained token", flush=True)
        tables.append(f"{text_table(rows)}\n{axis}: {WHY[axis]}")
    print("\n\n".join(tables))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
