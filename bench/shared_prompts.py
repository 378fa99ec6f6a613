"""Would it pay to compute a group's prompt once in attention, too? Time of both ways, forward and backward, on a CPU.

    python bench/shared_prompts.py

Today the layers compute a shared prompt once, but attention once a response (`model.SharedPrompts`). Here the other way
is tried on groups of 8 with equal lengths: the prompt attends on its own, and the responses attend to it and to
themselves under a mask, which SDPA's causal flag cannot say.
"""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.attention import PackedLayout, packed_attention  # noqa: E402

GROUP = 8
CASES = {  # groups, tokens of a prompt and of a response, heads, key heads, head size
    "laptop world's shape": (32, 64, 49, 4, 1, 32),
    "SmolLM2, 64 + 64 tokens": (4, 64, 64, 9, 3, 64),
    "SmolLM2, 200 + 64 tokens": (4, 200, 64, 9, 3, 64),
    "SmolLM2, 200 + 1,000 tokens": (1, 200, 1000, 9, 3, 64),
}


def ways(groups: int, prompt: int, response: int, grouped: bool) -> tuple[Callable, Callable]:
    """Return both functions of q (T, H, D), k and v (T, K, D), with T = groups x (prompt + 8 x response)."""
    starts = torch.arange(groups)[:, None] * (prompt + GROUP * response)
    prompts = starts + torch.arange(prompt)  # (groups, P)
    responses = starts[:, None] + prompt + torch.arange(GROUP * response).view(GROUP, response)  # (groups, 8, R)
    whole = torch.cat([prompts[:, None].expand(-1, GROUP, -1), responses], 2).flatten(0, 1)  # (S, P + R)
    layout, unshare = PackedLayout([prompt + response] * len(whole), "cpu"), whole.flatten()
    share = torch.empty(groups * (prompt + GROUP * response), dtype=torch.int64)
    share[unshare.flip(0)] = torch.arange(len(unshare)).flip(0)  # a token's first place
    mask = torch.ones(response, prompt + response, dtype=torch.bool).tril(prompt)

    def once_a_response(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(*(x.index_select(0, unshare) for x in (q, k, v)), layout).index_select(0, share)

    def attend(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, **options: object) -> Tensor:
        rows = q[queries], k[keys], v[keys]  # (rows, tokens, heads, D)
        attended = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in rows), enable_gqa=grouped, **options)
        return attended.transpose(1, 2).reshape(groups, -1, *q.shape[1:])

    def once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = attend(q, k, v, prompts, prompts, is_causal=True)
        return torch.cat([first, attend(q, k, v, responses.flatten(0, 1), whole, attn_mask=mask)], 1).flatten(0, 1)

    return once_a_response, once


def main() -> None:
    """Print the seconds of both ways for each case, and their ratio; stop if their results differ."""
    torch.manual_seed(0)
    for name, (groups, prompt, response, heads, key_heads, size) in CASES.items():
        tokens = groups * (prompt + GROUP * response)
        inputs = [torch.randn(tokens, n, size, requires_grad=True) for n in (heads, key_heads, key_heads)]
        slope, seconds, results = torch.randn(tokens, heads, size), [], []
        for way in ways(groups, prompt, response, heads != key_heads):
            results.append(way(*inputs))
            work = functools.partial(lambda way: torch.autograd.grad(way(*inputs), inputs, slope), way)  # noqa: B023
            times = []
            for _ in range(8):
                begun = time.perf_counter()
                work()
                times.append(time.perf_counter() - begun)
            seconds.append(min(times))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        now, once = seconds
        print(f"{name}: {now * 1e3:.1f} ms now, {once * 1e3:.1f} ms with the prompt once: {once / now:.2f}", flush=True)


if __name__ == "__main__":
    main()
