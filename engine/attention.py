"""The back ends behind packed attention: flash-attn, torch's variable-length kernel, SDPA on padded runs."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

try:  # optional: the fastest kernels where they are installed
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
try:  # torch's own variable-length flash attention, CUDA only; older versions lack what is needed here
    from torch.nn.attention.varlen import varlen_attn

    if not {"enable_gqa", "block_table", "num_splits"} <= inspect.signature(varlen_attn).parameters.keys():
        varlen_attn = None
except ImportError:
    varlen_attn = None


@dataclass(frozen=True)
class PaddedRun:
    """Neighbouring sequences of similar length, as rows of one padded rectangle for SDPA."""

    rows: int
    gather: Tensor  # (rows x longest,) the token in each cell; padding repeats a sequence's last token
    keep: Tensor  # (tokens of the run,) the cells that hold tokens
    start: int  # the run's first token
    plain: bool  # sequences of one length: the rectangle is a view


def padded_runs(lengths: Sequence[int], device: torch.device | str, most_padding: float = 0.25) -> list[PaddedRun]:
    """Cut packed sequences into runs in which at most this share of the cells is padding."""
    runs, first, offset = [], 0, 0
    while first < len(lengths):
        last, tokens, longest = first, 0, 0
        while last < len(lengths):
            wider = max(longest, lengths[last])
            if (tokens + lengths[last]) < (1 - most_padding) * wider * (last - first + 1):
                break
            last, tokens, longest = last + 1, tokens + lengths[last], wider
        sizes = torch.tensor(lengths[first:last])[:, None]  # (rows, 1)
        starts = offset + sizes.cumsum(0) - sizes
        column = torch.arange(longest)[None]  # (1, longest)
        gather = (starts + torch.minimum(column, sizes - 1)).flatten()
        keep = (column < sizes).flatten().nonzero().squeeze(1)
        plain = tokens == longest * (last - first)
        runs.append(PaddedRun(last - first, gather.to(device), keep.to(device), offset, plain))
        first, offset = last, offset + tokens
    return runs


class PackedLayout:
    """Where S sequences laid end to end begin and end, in the terms of each back end."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str):
        self.lengths, self.device, self.longest = lengths, device, max(lengths)
        self.ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)  # (S + 1,), from 0

    @cached_property
    def runs(self) -> list[PaddedRun]:
        """The sequences as padded rectangles, made once and used by every layer."""
        return padded_runs(self.lengths, self.device)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Causal attention of packed sequences: q (T, H, D), k and v (T, K, D) -> (T, H, D).

    CUDA in half precision: flash-attn when installed, else torch's variable-length flash attention.
    Everything else: SDPA on padded runs; right padding needs no mask, since no token sees what follows it.
    """
    if q.is_cuda and q.dtype != torch.float32:
        ends, longest = layout.ends, layout.longest
        if flash_attn_varlen_func is not None:
            return flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)
        if varlen_attn is not None:
            return varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True)
    outputs = []
    for run in layout.runs:
        of_run = slice(run.start, run.start + len(run.keep))
        q_run, k_run, v_run = (
            (x[of_run] if run.plain else x.index_select(0, run.gather)).unflatten(0, (run.rows, -1)).transpose(1, 2)
            for x in (q, k, v)
        )  # (rows, H, longest, D)
        grouped = q.shape[1] != k.shape[1]
        attended = F.scaled_dot_product_attention(q_run, k_run, v_run, is_causal=True, enable_gqa=grouped)
        attended = attended.transpose(1, 2).flatten(0, 1)  # (cells, H, D)
        outputs.append(attended if run.plain else attended.index_select(0, run.keep))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
