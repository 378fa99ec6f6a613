"""Packed attention and its back ends: flash-attn, torch's variable-length kernel, SDPA on padded runs."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

try:  # optional, and the fastest
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
try:  # torch's variable-length flash attention, CUDA only
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
VARLEN_OPTIONS = inspect.signature(varlen_attn).parameters if varlen_attn else {}
if "window_size" not in VARLEN_OPTIONS:  # before torch 2.11
    varlen_attn = None
# torch 2.11 accepts fewer key heads without a flag; newer versions require it
GROUPED = {"enable_gqa": True} if "enable_gqa" in VARLEN_OPTIONS else {}


@dataclass(frozen=True)
class PaddedRun:
    """Consecutive sequences of similar length as rows of one padded rectangle for SDPA."""

    rows: int
    gather: Tensor  # (rows x longest,) the token in each cell; padding repeats a sequence's last token
    keep: Tensor  # (tokens of the run,) the cells that hold tokens
    start: int  # the run's first token
    unpadded: bool  # all sequences have the same length, so the rectangle is a view


def padded_runs(lengths: Sequence[int], device: torch.device | str, most_padding: float = 0.25) -> list[PaddedRun]:
    """Split packed sequences into runs with at most `most_padding` of their cells as padding."""
    runs, first, offset = [], 0, 0
    while first < len(lengths):
        last, tokens, longest = first, 0, 0
        while last < len(lengths):
            width = max(longest, lengths[last])
            if tokens + lengths[last] < (1 - most_padding) * width * (last - first + 1):
                break
            last, tokens, longest = last + 1, tokens + lengths[last], width
        sizes = torch.tensor(lengths[first:last])[:, None]  # (rows, 1)
        starts = offset + sizes.cumsum(0) - sizes
        column = torch.arange(longest)[None]  # (1, longest)
        gather = (starts + torch.minimum(column, sizes - 1)).flatten()
        keep = (column < sizes).flatten().nonzero().squeeze(1)
        unpadded = tokens == longest * (last - first)
        runs.append(PaddedRun(last - first, gather.to(device), keep.to(device), offset, unpadded))
        first, offset = last, offset + tokens
    return runs


class PackedLayout:
    """The boundaries of S packed sequences, in the form that each back end needs."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str):
        self.lengths, self.device, self.longest = lengths, device, max(lengths)
        self.ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)  # (S + 1,), starts with 0

    @cached_property
    def runs(self) -> list[PaddedRun]:
        """The sequences as padded rectangles, computed once for all layers."""
        return padded_runs(self.lengths, self.device)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Compute causal attention (T, H, D) of packed sequences: q (T, H, D), k and v (T, K, D).

    CUDA in half precision uses flash-attn if installed, else torch's variable-length flash attention. Everything
    else uses SDPA on padded runs; right padding needs no mask, since no token sees later ones.
    """
    if q.is_cuda and q.dtype != torch.float32:
        ends, longest = layout.ends, layout.longest
        if flash_attn_varlen_func is not None:
            return flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)
        if varlen_attn is not None:
            return varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), **GROUPED)
    outputs = []
    for run in layout.runs:
        tokens = slice(run.start, run.start + len(run.keep))
        q_run, k_run, v_run = (
            (x[tokens] if run.unpadded else x.index_select(0, run.gather)).unflatten(0, (run.rows, -1)).transpose(1, 2)
            for x in (q, k, v)
        )  # (rows, H, longest, D)
        grouped = q.shape[1] != k.shape[1]
        attended = F.scaled_dot_product_attention(q_run, k_run, v_run, is_causal=True, enable_gqa=grouped)
        attended = attended.transpose(1, 2).flatten(0, 1)  # (cells, H, D)
        outputs.append(attended if run.unpadded else attended.index_select(0, run.keep))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
