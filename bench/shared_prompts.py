"""A group's prompt once in attention, or once a response: CPU seconds of both, forward and backward, one thread.

    python bench/shared_prompts.py

The layers always compute a shared prompt once. Attention does where its masks, which SDPA computes in full, cost less
than the prompts (engine/attention.py, MOST_MASKED): "yes" in the last column. Ragged responses are of 60 to 100%.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import attention  # noqa: E402
from engine.batches import TrainingSequence, pack  # noqa: E402

GROUP = 8
CASES = {  # groups, tokens of a prompt (from, to) and of the longest response, heads, key heads, head size
    "laptop world, equal lengths": (48, (49, 49), 49, 4, 1, 32),
    "laptop world, ragged": (48, (17, 57), 57, 4, 1, 32),
    "SmolLM2, 64 + 64 tokens": (4, (56, 72), 64, 9, 3, 64),
    "SmolLM2, 200 + 64 tokens": (4, (190, 220), 64, 9, 3, 64),
    "SmolLM2, 200 + 300 tokens": (1, (200, 200), 300, 9, 3, 64),
    "SmolLM2, 200 + 1,000 tokens": (1, (200, 200), 1000, 9, 3, 64),
}


def sequences(groups: int, prompts: tuple[int, int], longest: int, equal: bool) -> list[TrainingSequence]:
    """Draw groups of responses; prompts have every eighth length only, as of problems with few shapes."""
    random, drawn = np.random.default_rng(0), []
    for group in range(groups):
        prompt = np.full(int(random.choice(np.arange(prompts[0], prompts[1] + 1, 8))), group)
        for _ in range(GROUP):
            response = longest if equal else int(random.integers(0.6 * longest, longest + 1))
            drawn.append(TrainingSequence(np.concatenate([prompt, np.ones(response)]).astype(np.int32), len(prompt)))
    return drawn


def main() -> None:
    """Print the seconds of both ways for each case, and their ratio; stop if their results differ."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    most_masked = attention.MOST_MASKED
    for name, (groups, prompts, longest, heads, key_heads, size) in CASES.items():
        batch = sequences(groups, prompts, longest, "equal" in name)
        chosen, *layouts = (pack(batch, torch.device("cpu")).context.layout for _ in range(3))
        tokens, seconds, results = len(chosen.share), [], []
        inputs = [torch.randn(tokens, n, size, requires_grad=True) for n in (heads, key_heads, key_heads)]
        slope = torch.randn(tokens, heads, size)
        for layout, attention.MOST_MASKED in zip(layouts, (0.0, float("inf")), strict=True):
            results.append(attention.packed_attention(*inputs, layout))
            times = []
            for _ in range(8):
                begun = time.process_time()
                torch.autograd.grad(attention.packed_attention(*inputs, layout), inputs, slope)
                times.append(time.process_time() - begun)
            seconds.append(min(times))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        attention.MOST_MASKED, (again, once) = most_masked, seconds
        taken = "yes" if chosen.once else "no"
        print(f"{name:28} {again * 1e3:7.1f} ms, once {once * 1e3:7.1f} ms: {once / again:.2f}  {taken}", flush=True)


if __name__ == "__main__":
    main()
