"""The decode kernel equals attention in float64, on a CPU in Triton's interpreter."""

import importlib.util

import pytest
import torch

from engine import paged_attention as kernel

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, a large package: pip install triton==3.7.1"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNUSED = 1e4  # fills the cells that belong to no row: reading one would show


def reference(q, keys, values, table, length):
    """Attend in float64, one row at a time: q (H, D) over the row's first `length` tokens."""
    k, v = (x[table].flatten(0, 1)[:length].double() for x in (keys, values))  # (length, K, D)
    repeat = q.shape[0] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)  # (length, H, D)
    scores = torch.einsum("hd,thd->ht", q.double(), k) * q.shape[-1] ** -0.5
    return torch.einsum("ht,thd->hd", scores.softmax(-1), v)


def make_rows(lengths, heads, key_heads, size, page_size, dtype=torch.float32, per_head=False):
    """Return q, keys, values, table and lengths with shuffled pages; `per_head` is the cache's order on a CPU."""
    random = torch.Generator().manual_seed(sum(lengths) + size)
    most = -(-max(lengths) // page_size)
    pages = most * len(lengths) + 3
    shape = (pages, key_heads, page_size, size) if per_head else (pages, page_size, key_heads, size)
    keys, values = (torch.full(shape, UNUSED, dtype=dtype) for _ in range(2))
    if per_head:
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    order, table = torch.randperm(pages, generator=random).tolist(), torch.zeros(len(lengths), most, dtype=torch.int64)
    for row, length in enumerate(lengths):
        for i in range(-(-length // page_size)):
            table[row, i] = page = order.pop()
            cells = min(page_size, length - i * page_size)
            for cache in (keys, values):
                cache[page, :cells] = torch.randn(cells, key_heads, size, generator=random).to(dtype)
    q = torch.randn(len(lengths), heads, size, generator=random).to(dtype)
    return [x.to(DEVICE) for x in (q, keys, values, table, torch.tensor(lengths))]


def check(rows, tolerance):
    q, keys, values, table, lengths = rows
    found = kernel.paged_attention(*rows)
    expected = torch.stack(
        [reference(*x, n) for *x, n in zip(q, [keys] * len(q), [values] * len(q), table, lengths, strict=True)]
    )
    assert (found.double() - expected).abs().max() < tolerance


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 2), (16, 8)])
@pytest.mark.parametrize("size, page_size", [(16, 16), (64, 256), (128, 16), (80, 24)])
def test_each_row_attends_to_its_own_tokens(heads, key_heads, size, page_size):
    check(make_rows([1, 7, 256, 257, 1000], heads, key_heads, size, page_size), 2e-6)


def test_half_precision_is_summed_in_float32():
    """Half-precision values differ from float64 by the rounding of the weights and of the result alone."""
    check(make_rows([5, 300, 1000], 4, 2, 64, 32, torch.float16), 1e-3)


def test_a_row_longer_than_all_splits_at_their_least(monkeypatch):
    monkeypatch.setattr(kernel, "LEAST_SPLIT", 64)
    check(make_rows([64 * kernel.SPLITS + 1, 64 * kernel.SPLITS * 2 + 77, 3], 4, 2, 16, 16), 2e-6)


def test_the_order_of_the_cache_on_a_cpu():
    check(make_rows([30, 9], 4, 2, 16, 32, per_head=True), 2e-6)


def test_a_row_does_not_depend_on_the_others():
    """Bit for bit: a response must not change with its batch."""
    q, keys, values, table, lengths = make_rows([700, 1, 300, 33], 4, 2, 32, 16)
    together = kernel.paged_attention(q, keys, values, table, lengths)
    for i in range(len(q)):
        row = slice(i, i + 1)
        assert torch.equal(kernel.paged_attention(q[row], keys, values, table[row], lengths[row]), together[row])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel can be built")
def test_where_triton_cannot_build_the_kernel_the_plain_path_serves(capsys):
    """Guards: without a C compiler the first decoded token ended in a traceback."""
    assert not kernel.has_paged_attention(torch.device("cuda"), torch.bfloat16)
    assert "warning: decoding is slower, as Triton cannot build its kernel (" in capsys.readouterr().err
    assert not kernel.has_paged_attention(torch.device("cpu"), torch.bfloat16)


def test_queries_may_be_a_view():
    """q comes as a slice of a fused projection's output."""
    q, keys, values, table, lengths = make_rows([40, 20], 4, 2, 16, 16)
    wide = torch.cat([q, q + 1], 1)
    expected = kernel.paged_attention(q, keys, values, table, lengths)
    assert torch.equal(kernel.paged_attention(wide[:, :4], keys, values, table, lengths), expected)
