"""Attention of one new token per row over the pages of a KV cache: the decode step's kernel, in Triton.

A decode step reads every key and value of every sequence once, so memory bandwidth limits it. One program takes a row,
a key head with all its query heads, and a part of the row's tokens (flash-decoding,
https://pytorch.org/blog/flash-decoding); a second kernel joins the parts. Sums are float32. How a row is split depends
on its own length alone, so its result is the same, bit for bit, whatever the other rows of the batch are.

rollout.Decode has the same in plain PyTorch: the reference. TRITON_INTERPRET=1 runs the kernels on a CPU.
"""

import math
import sys
from functools import cache

import torch
from torch import Tensor

try:  # torch brings it for CUDA on Linux
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SPLITS = 16  # of a row's tokens at most: enough for a few long rows to occupy a GPU
LEAST_SPLIT = 256  # tokens: shorter parts cost more to join than they save
BLOCK = 64  # tokens read at a time
WARPS, STAGES = 4, 3


def has_paged_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether decode steps use the kernel: on CUDA in half precision, where Triton can build it."""
    return device.type == "cuda" and dtype != torch.float32 and triton is not None and _kernel_builds(device)


@cache
def _kernel_builds(device: torch.device) -> bool:
    """Whether the kernels run on a device; Triton builds their launcher with a C compiler and Python's headers."""
    try:
        q, page = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for shape in ((1, 1, 64), (1, 16, 1, 64)))
        table, lengths = (torch.full(shape, n, device=device) for shape, n in (((1, 1), 0), ((1,), 1)))
        paged_attention(q, page, page, table, lengths)
    except Exception as error:  # of Triton, its compilers or the driver
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        cure = "install a C compiler and Python's headers"
        print(f"warning: decoding is slower, as Triton cannot build its kernel ({reason}): {cure}", file=sys.stderr)
        return False
    return True


def paged_attention(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """Compute the attention (B, H, D) of one query token per row, q (B, H, D), over its own pages.

    keys and values (pages, page size, K, D) with equal strides; table (B, pages of a row); lengths (B,) in tokens,
    from 1, the new token included. What lies in a page beyond a row's length is never read.
    """
    rows, heads, size = q.shape
    page_size, key_heads = keys.shape[1:3]
    group, head = triton.next_power_of_2(heads // key_heads), triton.next_power_of_2(size)
    out = torch.empty_like(q)
    parts = torch.empty(rows, heads, SPLITS, size, dtype=torch.float32, device=q.device)
    weights = torch.empty(rows, heads, SPLITS, dtype=torch.float32, device=q.device)  # log2 of each part's sum
    _attend[rows, key_heads, SPLITS](
        q, keys, values, table, lengths, parts, weights, size**-0.5 * math.log2(math.e),
        *q.stride()[:2], *keys.stride()[:3], table.stride(0), PAGE=page_size, GROUP=heads // key_heads, SIZE=size,
        GROUP_CELLS=max(16, group), SIZE_CELLS=max(16, head), BLOCK=BLOCK, SPLITS=SPLITS, LEAST_SPLIT=LEAST_SPLIT,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    _join[rows, heads](
        parts, weights, lengths, out, *out.stride()[:2], HEADS=heads, SIZE=size, SIZE_CELLS=max(16, head),
        BLOCK=BLOCK, SPLITS=SPLITS, LEAST_SPLIT=LEAST_SPLIT, num_warps=2,
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit
    def _split_tokens(length, BLOCK: tl.constexpr, SPLITS: tl.constexpr, LEAST_SPLIT: tl.constexpr):
        return tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK, LEAST_SPLIT)

    @triton.jit(do_not_specialize=["table_row"])  # else another length of the table would compile again
    def _attend(
        q, keys, values, table, lengths, parts, weights, scale,
        q_row, q_head, page_stride, token_stride, head_stride, table_row,
        PAGE: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, GROUP_CELLS: tl.constexpr,
        SIZE_CELLS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, LEAST_SPLIT: tl.constexpr,
    ):  # fmt: skip
        """Attend from the query heads of one key head to one part of a row's tokens."""
        row, key_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        length = tl.load(lengths + row).to(tl.int32)
        tokens = _split_tokens(length, BLOCK, SPLITS, LEAST_SPLIT)
        first = split * tokens
        last = tl.minimum(first + tokens, length)
        if first >= length:
            return
        member, column = tl.arange(0, GROUP_CELLS), tl.arange(0, SIZE_CELLS)  # padded to what tl.dot takes
        heads = key_head * GROUP + member
        queries = (member < GROUP)[:, None] & (column < SIZE)[None]
        query = tl.load(q + row * q_row + heads[:, None] * q_head + column[None], mask=queries, other=0.0)
        highest = tl.full([GROUP_CELLS], -float("inf"), tl.float32)
        total = tl.zeros([GROUP_CELLS], tl.float32)
        attended = tl.zeros([GROUP_CELLS, SIZE_CELLS], tl.float32)
        for start in range(first, last, BLOCK):
            token = start + tl.arange(0, BLOCK)
            seen = token < last
            page = tl.load(table + row * table_row + token // PAGE, mask=seen, other=0).to(tl.int64)
            cell = page * page_stride + (token % PAGE) * token_stride + key_head * head_stride
            there = seen[:, None] & (column < SIZE)[None]  # (BLOCK, SIZE_CELLS)
            key = tl.load(keys + cell[:, None] + column[None], mask=there, other=0.0)
            value = tl.load(values + cell[:, None] + column[None], mask=there, other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale  # (GROUP_CELLS, BLOCK)
            scores = tl.where(seen[None], scores, -float("inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            shrink, weight = tl.exp2(highest - higher), tl.exp2(scores - higher[:, None])
            total = total * shrink + tl.sum(weight, 1)
            attended = attended * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
            highest = higher
        place = (row * tl.num_programs(1) * GROUP + heads) * SPLITS + split
        tl.store(weights + place, highest + tl.log2(total), mask=member < GROUP)
        tl.store(parts + place[:, None] * SIZE + column[None], attended / total[:, None], mask=queries)

    @triton.jit
    def _join(
        parts, weights, lengths, out, out_row, out_head, HEADS: tl.constexpr, SIZE: tl.constexpr,
        SIZE_CELLS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, LEAST_SPLIT: tl.constexpr,
    ):  # fmt: skip
        """Join the parts of one query head of a row, each weighted by its share of the softmax's sum."""
        row, head, split, column = tl.program_id(0), tl.program_id(1), tl.arange(0, SPLITS), tl.arange(0, SIZE_CELLS)
        length = tl.load(lengths + row).to(tl.int32)
        used = split < tl.cdiv(length, _split_tokens(length, BLOCK, SPLITS, LEAST_SPLIT))
        place = (row * HEADS + head) * SPLITS + split
        logarithm = tl.load(weights + place, mask=used, other=-float("inf"))
        share = tl.exp2(logarithm - tl.max(logarithm, 0))
        there = used[:, None] & (column < SIZE)[None]
        part = tl.load(parts + place[:, None] * SIZE + column[None], mask=there, other=0.0)  # (SPLITS, SIZE_CELLS)
        joined = tl.sum(part * share[:, None], 0) / tl.sum(share, 0)
        place = out + row * out_row + head * out_head + column
        tl.store(place, joined.to(out.dtype.element_ty), mask=column < SIZE)
