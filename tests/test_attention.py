"""Packed attention equals a masked softmax, and padded runs keep every token once."""

import random

import pytest
import torch
from test_model import difference

from engine import attention
from engine.attention import PackedLayout, SharedLayout, packed_attention, padded_runs


def naive_attention(q, k, v, lengths):
    """Compute masked softmax attention, one sequence and one head at a time."""
    outputs, group = [], q.shape[1] // k.shape[1]
    for q_s, k_s, v_s in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        heads = []
        for h in range(q.shape[1]):
            scores = q_s[:, h] @ k_s[:, h // group].T / q.shape[2] ** 0.5
            mask = torch.ones_like(scores).tril() == 0
            heads.append(scores.masked_fill(mask, float("-inf")).softmax(1) @ v_s[:, h // group])
        outputs.append(torch.stack(heads, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", [[1], [5, 9, 1, 30, 2, 31], [40, 40, 39], [1] * 7])
def test_packed_attention_equals_a_naive_masked_softmax(lengths, heads, key_heads):
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(sum(lengths), n, 8) for n in (heads, key_heads, key_heads)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    assert difference(packed_attention(q, k, v, PackedLayout(lengths, "cpu")), naive_attention(q, k, v, lengths)) < 1e-5


@pytest.mark.parametrize("most_padding", [0.0, 0.25, 0.6])
def test_padded_runs_keep_every_token_once_and_bound_the_padding(most_padding):
    generator = random.Random(7)
    for _ in range(100):
        lengths = [generator.choice([1, 2, 3, generator.randint(1, 50)]) for _ in range(generator.randint(1, 20))]
        kept = []
        for run in padded_runs(lengths, "cpu", most_padding):
            longest = run.queries.shape[1]
            assert len(run.keep) >= (1 - most_padding) * run.queries.numel()
            row_of_cell = run.keep // longest
            for row in range(len(run.queries)):  # a row is one complete sequence, then padding
                tokens = run.queries.flatten()[run.keep[row_of_cell == row]].tolist()
                start = sum(lengths[: sequences_done(kept, lengths)])
                assert tokens == list(range(start, start + len(tokens)))
                kept.extend(tokens)
                assert run.keep[row_of_cell == row].tolist() == [row * longest + i for i in range(len(tokens))]
        assert kept == list(range(sum(lengths)))


def sequences_done(kept: list[int], lengths: list[int]) -> int:
    """Count the complete sequences in the kept tokens."""
    done, tokens = 0, len(kept)
    while tokens:
        tokens -= lengths[done]
        done += 1
    return done


@pytest.mark.parametrize("most_masked", [0.0, 1e9])
@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 1)])
def test_shared_prompts_give_the_attention_of_separate_sequences(heads, key_heads, most_masked, monkeypatch):
    monkeypatch.setattr(attention, "MOST_MASKED", most_masked)  # each prompt once, or once a response
    prompts, responses = [9, 9, 9, 3, 9, 3], [5, 1, 5, 7, 2, 7]
    places, first, row = [], {}, 0  # groups: sequences 0, 1, 2; 3, 5; and 4 with another prompt of 9 tokens
    for group, prompt, response in zip("aaabcb", prompts, responses, strict=True):
        if group not in first:
            first[group], row = list(range(row, row + prompt)), row + prompt
        places.append(first[group] + list(range(row, row + response)))
        row += response
    lengths, unshare = [len(sequence) for sequence in places], torch.tensor(sum(places, []))
    share = torch.tensor([unshare.tolist().index(token) for token in range(row)])
    q, k, v = (torch.randn(row, n, 8, requires_grad=True) for n in (heads, key_heads, key_heads))
    layout = SharedLayout(lengths, prompts, unshare, share, "cpu")
    assert (layout.once is None) == (most_masked == 0.0)
    found = packed_attention(q, k, v, layout)
    expected = naive_attention(*(x[unshare] for x in (q, k, v)), lengths)
    assert difference(found[unshare], expected) < 1e-5  # all copies of a prompt's token, too
    slope = torch.randn_like(found)
    wanted = torch.autograd.grad(naive_attention(*(x[unshare] for x in (q, k, v)), lengths)[share], (q, k, v), slope)
    for ours, oracle in zip(torch.autograd.grad(found, (q, k, v), slope), wanted, strict=True):
        assert difference(ours, oracle) < 1e-5


def test_masks_are_taken_where_prompts_are_long_and_never_beyond_their_limit(monkeypatch):
    def layout(prompt, response):
        place = torch.arange(prompt + 2 * response)
        unshare = torch.cat([place[: prompt + response], place[:prompt], place[prompt + response :]])
        share = torch.tensor([unshare.tolist().index(token) for token in place.tolist()])
        return SharedLayout([prompt + response] * 2, [prompt] * 2, unshare, share, "cpu")

    assert layout(60, 50).once and not layout(10, 90).once
    monkeypatch.setattr(attention, "MAX_MASK_CELLS", 50 * 110 - 1)
    assert not layout(60, 50).once
