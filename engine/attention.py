"""Packed attention and its back ends: flash-attn, torch's variable-length kernel, SDPA on padded runs."""

import inspect
from collections import defaultdict
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


MAX_MASK_CELLS = 2**24  # of one mask: 64 MiB once SDPA has converted it to float32
MOST_MASKED = 0.9  # cells of all masks, of those of all sequences, up to which they pay (bench/shared_prompts.py)


@dataclass(frozen=True)
class PaddedRun:
    """Sequences of similar length as rows of one padded rectangle for SDPA."""

    queries: Tensor  # (rows, longest) the token in each cell; padding repeats a sequence's last token
    keep: Tensor  # (tokens of the run,) the cells that hold tokens
    view: slice | None = None  # these tokens, if they are a rectangle without padding: needs no gather
    keys: Tensor | None = None  # (rows, key tokens), if they are not the queries
    mask: Tensor | None = None  # bool (longest, key tokens); None: causal

    @property
    def tokens(self) -> Tensor:
        """The run's tokens, in the order of its output."""
        return self.queries.flatten()[self.keep]


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
        queries = starts + torch.minimum(column, sizes - 1)
        keep = (column < sizes).flatten().nonzero().squeeze(1)
        view = slice(offset, offset + tokens) if tokens == queries.numel() else None
        runs.append(PaddedRun(queries.to(device), keep.to(device), view))
        first, offset = last, offset + tokens
    return runs


def shared_prompt_runs(
    lengths: Sequence[int], prompts: Sequence[int], unshare: Tensor, device: torch.device | str
) -> list[PaddedRun] | None:
    """Return runs in which each prompt attends once, and each response to its prompt and itself under a mask.

    For sequences whose first `prompts` tokens may be shared; `unshare` (sum of lengths,) gives each token's place in
    the row. None where computing the prompts again costs less than the masks, whose every cell SDPA computes.
    """
    same_length: dict[int, list[Tensor]] = defaultdict(list)
    for prompt, tokens in zip(prompts, unshare.split(list(lengths)), strict=True):
        same_length[prompt].append(tokens)
    runs, cells = [], 0
    for prompt, sequences in same_length.items():
        sizes = torch.tensor([len(tokens) for tokens in sequences])[:, None]  # (rows, 1)
        columns = torch.arange(int(sizes.max()))
        longest = len(columns) - prompt
        if longest * len(columns) > MAX_MASK_CELLS:
            return None
        cells += len(sequences) * longest * len(columns)
        keys = torch.stack([tokens[columns.clamp(max=len(tokens) - 1)] for tokens in sequences])
        once = torch.stack(list({int(tokens[0]): tokens[:prompt] for tokens in sequences}.values()))
        keep = (columns < sizes)[:, prompt:].flatten().nonzero().squeeze(1)
        mask = torch.ones(longest, len(columns), dtype=torch.bool).tril(prompt)
        runs.append(PaddedRun(once.to(device), torch.arange(once.numel(), device=device)))
        queries = keys[:, prompt:].contiguous()
        runs.append(PaddedRun(queries.to(device), keep.to(device), keys=keys.to(device), mask=mask.to(device)))
    return runs if cells < MOST_MASKED * sum(length**2 for length in lengths) else None


class PackedLayout:
    """The boundaries of S packed sequences, in the form that each back end needs."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str):
        self.lengths, self.device, self.longest = lengths, device, max(lengths)
        self.ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)  # (S + 1,), starts with 0

    @cached_property
    def runs(self) -> list[PaddedRun]:
        """The sequences as padded rectangles, computed once for all layers."""
        return padded_runs(self.lengths, self.device)


class SharedLayout(PackedLayout):
    """The same of sequences with common prompts, which are in the row once.

    `unshare` (sum of lengths,) int64 gives the row's token at each place of the sequences end to end; `share` (T,)
    int64 gives one place of each of the row's tokens.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        prompts: Sequence[int],
        unshare: Tensor,
        share: Tensor,
        device: torch.device | str,
    ):
        super().__init__(lengths, device)
        self.prompts, self.unshare, self.share = prompts, unshare.to(device), share.to(device)

    @cached_property
    def once(self) -> tuple[list[PaddedRun], Tensor] | None:
        """The runs that compute each prompt once, and where (T,) their outputs have each of the row's tokens."""
        runs = shared_prompt_runs(self.lengths, self.prompts, self.unshare.cpu(), self.device)
        return runs and (runs, torch.cat([run.tokens for run in runs]).argsort())


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Compute causal attention (T, H, D) of packed sequences: q (T, H, D), k and v (T, K, D).

    CUDA in half precision uses flash-attn if installed, else torch's variable-length flash attention. Everything
    else uses SDPA on padded runs; right padding needs no mask, since no token sees later ones.
    """
    has_kernel = q.is_cuda and q.dtype != torch.float32 and (flash_attn_varlen_func or varlen_attn)
    if isinstance(layout, SharedLayout):
        if not has_kernel and layout.once is not None:
            runs, order = layout.once
            return padded_attention(q, k, v, runs).index_select(0, order)
        q, k, v = (x.index_select(0, layout.unshare) for x in (q, k, v))  # (sum of lengths, H or K, D)
    ends, longest = layout.ends, layout.longest
    if not has_kernel:
        attended = padded_attention(q, k, v, layout.runs)
    elif flash_attn_varlen_func is not None:
        attended = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)
    else:
        attended = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), **GROUPED)
    return attended.index_select(0, layout.share) if isinstance(layout, SharedLayout) else attended


def padded_attention(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[PaddedRun]) -> Tensor:
    """Compute attention (tokens of all runs, H, D) with SDPA, the runs' tokens in their order."""
    outputs = []
    for run in runs:
        keys = run.queries if run.keys is None else run.keys
        q_run, k_run, v_run = (
            (x[run.view] if run.view else x.index_select(0, cells.flatten())).unflatten(0, cells.shape).transpose(1, 2)
            for x, cells in ((q, run.queries), (k, keys), (v, keys))
        )  # (rows, H, longest, D)
        attended = F.scaled_dot_product_attention(
            q_run, k_run, v_run, run.mask, is_causal=run.mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        attended = attended.transpose(1, 2).flatten(0, 1)  # (cells, H, D)
        outputs.append(attended if run.view else attended.index_select(0, run.keep))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
