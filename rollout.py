"""The sampler: n responses per prompt, from the training weights, through a paged KV cache.

`generate` yields rollouts as they finish, so that grading can overlap sampling. One loop serves every device:

    admit    waiting responses take free rows and pages; a prompt is prefilled once for its whole group
    decode   one token for every row: attention over pages, then one draw per row (decode.py says how fast)
    retire   finished rows leave at once, and the last row closes the gap

A row that needs a page when none is free preempts the row admitted last, which waits and is prefilled again;
nothing fails for lack of memory as long as one whole sequence fits.

Randomness is counted, not streamed: the draw for a token is a hash of (seed, step, problem id, rollout,
position), so the batch that a response happens to share changes nothing (up to float rounding of the logits).

Log-probs are those of the policy at the sampling temperature, log softmax(logits / T), before any top-k or
top-p cut: with the cuts off, as in training, they are those of the very distribution that was sampled.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import flash_attn_varlen_func, packed_attention, varlen_attn
from engine.decode import DecodeState, StepGraphs, sampling_forward
from engine.memory import out_of_memory
from model import ModelConfig, Packed, Transformer

LARGEST_PREFILL = 16_384  # tokens in one prefill forward; a longer prompt goes alone
LARGEST_CPU_PREFILL = 2_048  # what the caches of a CPU hold
STEPS_BETWEEN_SYNCS = 8  # with graphs: tokens that every row draws before the host looks for the ends of responses


class RolloutError(ValueError):
    """A request that cannot be sampled, in one sentence."""


@dataclass(frozen=True)
class Prompt:
    """One problem's prompt, to be answered n times. `first` is the number of its first rollout."""

    problem_id: str
    tokens: Sequence[int]
    n: int
    first: int = 0
    limits: Sequence[int] | None = None  # most new tokens of each of the n, within Sampling's


@dataclass(frozen=True)
class Sampling:
    """How to sample. Temperature 0 is greedy; top_k 0 and top_p 1 are off, as the recipe trains."""

    temperature: float
    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    seed: int
    step: int = 0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class CacheLimits:
    """What the KV cache may take. A page as long as the longest sequence makes every slot one page."""

    tokens: int  # of all sequences together
    page_size: int  # tokens
    rows: int  # sequences decoded at once


@dataclass
class Rollout:
    """One response and the policy's own account of it."""

    problem_id: str
    index: int  # which of the problem's n
    prompt: np.ndarray  # int32 (P,)
    tokens: np.ndarray  # int32 (R,), with the stop token that was sampled
    logprobs: np.ndarray  # float32 (R,), at `temperature`
    finish_reason: str  # "stop" or "length"
    temperature: float


# ---------------------------------------------------------------------------------------- counted randomness


def sequence_key(seed: int, step: int, problem_id: str, index: int) -> int:
    """A signed 64-bit key for one response."""
    name = f"{seed}/{step}/{problem_id}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


def counted_uniform(keys: Tensor, counts: Tensor) -> Tensor:
    """One uniform in [0, 1), float64, per (key, count): the SplitMix64 finaliser (doi 10.1145/2660193.2660195)."""

    def shift_right(x: Tensor, bits: int) -> Tensor:  # int64 shifts drag the sign along
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = keys + (counts + 1) * -0x61C8864680B583EB
    x = (x ^ shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    x = x ^ shift_right(x, 31)
    return shift_right(x, 11).double() * 2.0**-53


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row: logits (B, V), uniform (B,) in [0, 1) -> tokens (B,) int64, log-probs (B,) float32."""
    logits = logits.float()
    if sampling.temperature == 0:
        tokens = logits.argmax(1)
        logprobs = logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(1)
        return tokens, logprobs
    # one pass each: shift, exponentiate in place, sum; a vocabulary is too wide for more than is needed
    scaled = (logits - logits.amax(1, keepdim=True)).div_(sampling.temperature)
    if sampling.top_k or sampling.top_p < 1:
        tokens = _draw_from_top(scaled, sampling, uniform)
        chosen = scaled.gather(1, tokens[:, None]).squeeze(1)
        return tokens, chosen - scaled.logsumexp(1)
    weights = scaled.exp_()
    tokens, total = _draw(weights, uniform)
    return tokens, weights.gather(1, tokens[:, None]).squeeze(1).log() - total.log()


DRAW_BLOCK = 128  # weights that are summed first, so that no cumulative sum runs over a whole vocabulary


def _draw(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution: unnormalised weights (B, V) -> indices (B,), the weights' sums (B,)."""
    vocabulary = weights.shape[1]
    if vocabulary % DRAW_BLOCK:
        weights = F.pad(weights, (0, -vocabulary % DRAW_BLOCK))
    blocks = weights.unflatten(1, (-1, DRAW_BLOCK))  # (B, V / 128, 128)
    sums = blocks.sum(2)
    total = sums.sum(1)
    block, rest = _invert(sums, uniform[:, None] * total[:, None])
    inside = blocks[torch.arange(len(blocks), device=block.device), block]  # (B, 128)
    place, _ = _invert(inside, rest)
    # in the padding only where weights are not numbers; a token past the end would kill the process on CUDA
    return (block * DRAW_BLOCK + place).clamp_(max=vocabulary - 1), total


def _invert(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of weights (B, n) passes target (B, 1): indices (B,), and what is left of it there (B, 1).

    Rounding never carries a draw past the last weight above zero.
    """
    cumulative = weights.cumsum(1, dtype=torch.float64)
    target = torch.minimum(target.double(), cumulative[:, -1:] * (1 - 2.0**-50))
    index = torch.searchsorted(cumulative, target, right=True)  # (B, 1)
    index = index.clamp_(max=weights.shape[1] - 1)  # past the end only where weights are not numbers
    before = cumulative.gather(1, index) - weights.gather(1, index)
    return index.squeeze(1), target - before


def _draw_from_top(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Keep the top_k likeliest tokens, then of these the fewest that hold top_p of the mass, and draw."""
    keep = min(sampling.top_k or logits.shape[1], logits.shape[1])
    best, index = logits.topk(keep, dim=1)  # (B, keep), likeliest first
    probability = best.softmax(1)
    mass_before = probability.cumsum(1) - probability
    probability = probability.masked_fill(mass_before >= sampling.top_p, 0.0)
    return index.gather(1, _draw(probability, uniform)[0][:, None]).squeeze(1)


# -------------------------------------------------------------------------------------------- the paged cache


KERNEL_PAGE_TOKENS = 256  # the paged flash kernels take pages of a multiple of this


def pages_have_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention reads pages through a table by itself: CUDA, half precision, a kernel at hand."""
    return device.type == "cuda" and dtype != torch.float32 and bool(flash_attn_varlen_func or varlen_attn)


def steps_become_graphs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether decode steps are recorded: only kernels that read lengths on the device can be replayed as they grow."""
    return pages_have_kernels(device, dtype)


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


class PagedCache:
    """Keys and values of every layer, in pages of `page_size` tokens that any sequence may use."""

    def __init__(self, model: Transformer, pages: int, page_size: int, dtype: torch.dtype, scratch: bool = False):
        """With `scratch` there is one more page, number `pages`, which is never handed out."""
        config, device = model.config, model.device
        heads, size = config.num_key_value_heads, config.head_dim
        self.page_size, self.pages = page_size, pages
        self.has_kernels = pages_have_kernels(device, dtype)
        shape = (config.num_hidden_layers, pages + scratch, page_size, heads, size)
        if device.type == "cpu":  # attention reads one head's tokens in a row; the view has the same shape
            shape = (config.num_hidden_layers, pages + scratch, heads, page_size, size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        if device.type == "cpu":
            self.keys, self.values = self.keys.transpose(2, 3), self.values.transpose(2, 3)
        self.free = list(range(pages - 1, -1, -1))  # the lowest page is handed out first
        self.users = [0] * pages

    def take(self, highest: bool = False) -> int:
        """A free page: the lowest, or the highest."""
        page = self.free.pop(0 if highest else -1)
        self.users[page] = 1
        return page

    def share(self, page: int) -> int:
        """The same page, with one more user."""
        self.users[page] += 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """One user fewer for each page; those without any are free again."""
        for page in pages:
            self.users[page] -= 1
            if self.users[page] == 0:
                self.free.append(page)
        self.free.sort(reverse=True)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of a page, in every layer."""
        self.keys[:, target, :tokens] = self.keys[:, source, :tokens]
        self.values[:, target, :tokens] = self.values[:, source, :tokens]


class Prefill(Packed):
    """Packed prompts whose keys and values go into the cache on the way."""

    def __init__(self, cache: PagedCache, lengths: list[int], page_tables: list[list[int]], device: torch.device):
        super().__init__(lengths, device)
        self.cache = cache
        size = cache.page_size
        pages = [page for table, n in zip(page_tables, lengths, strict=True) for page in np.repeat(table, size)[:n]]
        offsets = [np.arange(n) % size for n in lengths]
        self.page = torch.tensor(np.array(pages), device=device)  # (T,)
        self.offset = torch.tensor(np.concatenate(offsets), device=device)  # (T,)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within each prompt; keys and values are stored."""
        self.cache.keys[layer][self.page, self.offset] = k.to(self.cache.keys.dtype)
        self.cache.values[layer][self.page, self.offset] = v.to(self.cache.values.dtype)
        return packed_attention(q, k, v, self.layout)


class Decode:
    """One new token per row, which sees all of its sequence through the page table."""

    def __init__(self, cache: PagedCache, table: Tensor, positions: Tensor, longest: int, in_place: bool):
        self.cache, self.table, self.positions, self.longest = cache, table, positions, longest  # table (B, pages)
        self.page = table.gather(1, (positions // cache.page_size)[:, None]).squeeze(1)  # (B,)
        self.offset = positions % cache.page_size
        self.in_place = in_place  # row i is page i, and nothing more: the cache itself is the batch, ungathered
        if in_place and 2 * longest > cache.page_size:
            # slots side by side are one stream: skipping the unwritten rest of each costs more than reading it
            self.longest = longest = cache.page_size
        lengths = positions + 1
        if cache.has_kernels:
            self.lengths, self.table = lengths.int(), table.int()
            self.query_ends = torch.arange(len(table) + 1, dtype=torch.int32, device=table.device)
            self.key_ends = F.pad(lengths.cumsum(0), (1, 0)).int()
        else:
            seen = torch.arange(longest, device=positions.device)[None] < lengths[:, None]  # (B, longest)
            bias = torch.zeros(seen.shape, dtype=cache.keys.dtype, device=seen.device)
            self.bias = bias.masked_fill(~seen, -math.inf)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store this token's key and value, then attend: q (B, H, D) -> (B, H, D)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # (pages, page_size, K, D)
        keys[self.page, self.offset] = k.to(keys.dtype)
        values[self.page, self.offset] = v.to(values.dtype)
        return paged_attention(q, keys, values, self)


def paged_attention(q: Tensor, keys: Tensor, values: Tensor, decode: Decode) -> Tensor:
    """Attention of one query token per row over its pages: q (B, H, D), keys and values (pages, size, K, D)."""
    if decode.cache.has_kernels:
        ends, key_ends, table, longest = decode.query_ends, decode.key_ends, decode.table, decode.longest
        if flash_attn_varlen_func is not None:
            return flash_attn_varlen_func(q, keys, values, ends, key_ends, 1, longest, block_table=table)
        # one split: splitting by the longest row would make a row's result depend on the others (flash-attn, above,
        # chooses for itself)
        options = {"enable_gqa": True, "seqused_k": decode.lengths, "block_table": table, "num_splits": 1}
        return varlen_attn(q, keys, values, ends, key_ends, 1, longest, **options)
    rows, heads, size = q.shape
    if decode.in_place:
        k, v = keys[:rows], values[:rows]
    else:
        k, v = keys[decode.table].flatten(1, 2), values[decode.table].flatten(1, 2)  # (B, pages x size, K, D)
    k, v = k[:, : decode.longest].transpose(1, 2), v[:, : decode.longest].transpose(1, 2)  # (B, K, longest, D)
    q = q.unflatten(1, (k.shape[1], -1))  # (B, K, H/K, D): queries that share a key head become its rows
    q, k, v = (q * size**-0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B x K, ., D)
    # keys first: with few queries to a key, the product reads memory twice as fast in this order
    scores = torch.bmm(k, q.transpose(1, 2)).transpose(1, 2).contiguous()  # (B x K, H/K, longest)
    scores.view(rows, -1, decode.longest).add_(decode.bias[:, None])
    return torch.bmm(scores.softmax(-1), v).view(rows, heads, size)


# ------------------------------------------------------------------------------------------------ the sampler


@dataclass
class _Prefix:
    """Tokens whose keys and values are prefilled once and held until every row that starts from them has started."""

    tokens: np.ndarray  # all but the last token known: that one is decoded
    rows_to_start: int
    pages: list[int] | None = None


@dataclass
class _Row:
    """A response in the making."""

    prompt: Prompt
    index: int
    key: int
    prefix: _Prefix
    limit: int  # most new tokens
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    admitted: int = 0  # a running number: preemption takes the highest

    @property
    def room(self) -> int:
        """New tokens that it may still make."""
        return self.limit - len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens so far, prompt and response."""
        return len(self.prompt.tokens) + len(self.tokens)


@dataclass
class SamplerStats:
    """What a call of `generate` did; filled in as it goes."""

    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    decode_steps: int = 0
    preemptions: int = 0
    memory_retries: int = 0  # times that memory ran out and the batch was made smaller


def generate(
    model: Transformer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    limits: CacheLimits,
    stats: SamplerStats | None = None,
    abandon: Callable[[], bool] = lambda: False,
) -> Iterator[Rollout]:
    """Yield every rollout as it finishes, in no particular order. Call it with the weights gathered, without grad.

    `abandon` is asked before every token (with graphs: every few); after a yes the unfinished is forgotten.

    Raises RolloutError before any work when a sequence could outgrow the model's window or the cache.
    """
    check_requests(model, prompts, sampling, limits)
    return _Sampler(model, prompts, sampling, limits, stats or SamplerStats(), abandon).run() if prompts else iter(())


def _page_size(model: Transformer, limits: CacheLimits, longest: int) -> int:
    """The page size to use: no longer than a sequence, except where a kernel wants pages of its own size."""
    if not pages_have_kernels(model.device, model.lm_head.weight.dtype):
        return min(limits.page_size, longest)
    if limits.page_size % KERNEL_PAGE_TOKENS:
        raise RolloutError(f"pages of {limits.page_size} tokens: on CUDA use a multiple of {KERNEL_PAGE_TOKENS}")
    return limits.page_size


def check_requests(model: Transformer, prompts: Sequence[Prompt], sampling: Sampling, limits: CacheLimits) -> None:
    """Raise RolloutError when a sequence could outgrow the model's window or the cache."""
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0 or sampling.max_new_tokens < 1:
        raise RolloutError(f"cannot sample with {sampling}")
    if limits.rows < 1 or limits.page_size < 1:
        raise RolloutError(f"cannot sample with {limits}")
    window = model.config.max_position_embeddings
    longest = max((len(prompt.tokens) for prompt in prompts), default=0) + sampling.max_new_tokens
    page_size = _page_size(model, limits, longest)
    for prompt in prompts:
        needs = len(prompt.tokens) + sampling.max_new_tokens
        what = f"problem {prompt.problem_id}: prompt of {len(prompt.tokens)} tokens + {sampling.max_new_tokens} new"
        if min(prompt.limits or [1]) < 1:
            least = min(prompt.limits)
            raise RolloutError(f"problem {prompt.problem_id}: a limit of {least} new tokens is below 1: raise it")
        if not len(prompt.tokens):
            raise RolloutError(f"problem {prompt.problem_id}: the prompt is empty")
        if needs > window:
            raise RolloutError(f"{what} exceeds the model's window of {window}: shorten either or extend with YaRN")
        if math.ceil(needs / page_size) + 1 > limits.tokens // page_size:
            raise RolloutError(f"{what} and a spare page exceed the cache of {limits.tokens} tokens: enlarge it")


class _Sampler:
    """The state of one `generate` call: the rows in flight, and the device tensors that mirror them."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        limits: CacheLimits,
        stats: SamplerStats,
        abandon: Callable[[], bool],
    ):
        self.model, self.sampling, self.stats, self.abandon = model, sampling, stats, abandon
        self.device = model.device
        self.rows: list[_Row] = []
        self.waiting: deque[_Row] = deque()
        self.admissions = 0
        for prompt in prompts:
            prefix = _Prefix(np.asarray(prompt.tokens[:-1], dtype=np.int64), prompt.n)
            for index in range(prompt.first, prompt.first + prompt.n):
                key = sequence_key(sampling.seed, sampling.step, prompt.problem_id, index)
                limit = sampling.max_new_tokens
                if prompt.limits is not None:
                    limit = min(limit, prompt.limits[index - prompt.first])
                self.waiting.append(_Row(prompt, index, key, prefix, limit))
        longest = max(len(prompt.tokens) for prompt in prompts) + sampling.max_new_tokens
        self.page_size = _page_size(model, limits, longest)
        self.pages_per_row = math.ceil(longest / self.page_size)
        self.most_rows = min(limits.rows, len(self.waiting))
        self.most_prefill = LARGEST_CPU_PREFILL if self.device.type == "cpu" else LARGEST_PREFILL
        self.one_page = self.pages_per_row == 1
        self.dtype = model.lm_head.weight.dtype
        self.graphed = steps_become_graphs(self.device, self.dtype)
        self.cache = self._make_cache(limits)
        self.forward = sampling_forward(model, self.most_rows)
        self.graphs = None
        if self.graphed:
            self.graphs = StepGraphs(self.most_rows, self.pages_per_row, self.cache.pages, self.device)
        self.state: DecodeState | None = None  # None: the rows have changed since the last step

    def _make_cache(self, limits: CacheLimits) -> PagedCache:
        """As many pages as the budget holds, and no more than full rows and as many held prompts could use."""
        pages = min(limits.tokens // self.page_size, 2 * self.most_rows * self.pages_per_row)
        while True:
            try:
                return PagedCache(self.model, pages, self.page_size, self.dtype, scratch=self.graphed)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            pages //= 2
            if pages <= self.pages_per_row:
                raise RolloutError(
                    f"out of memory: not even one sequence of {self.pages_per_row * self.page_size} tokens fits a "
                    f"cache: shorten the responses or take a smaller model"
                )
            self.stats.memory_retries += 1

    def run(self) -> Iterator[Rollout]:
        """Decode until nothing runs and nothing waits."""
        stop = set(self.sampling.stop_tokens)
        while (self.rows or self.waiting) and not self.abandon():
            tokens, logprobs = self._next_tokens()  # each steps x B
            self.stats.decode_steps += len(tokens)
            finished = []
            for i, row in enumerate(self.rows):
                before = len(row.tokens)
                for drawn, scored in zip(tokens, logprobs, strict=True):
                    row.tokens.append(drawn[i])
                    row.logprobs.append(scored[i])
                    if drawn[i] in stop or len(row.tokens) == row.limit:
                        finished.append(i)
                        break  # what it drew after its end is forgotten
                self.stats.decoded_tokens += len(row.tokens) - before
            for i in finished:
                yield self._rollout(self.rows[i], "stop" if self.rows[i].tokens[-1] in stop else "length")
            self._retire(finished)

    def _next_tokens(self) -> tuple[list[list[int]], list[list[float]]]:
        """The next tokens of all rows and their log-probs, steps x B; with fewer rows when memory runs out."""
        while True:
            try:
                self._admit()
                steps = 1
                if self.graphs is not None:
                    steps = min([STEPS_BETWEEN_SYNCS, *(row.room for row in self.rows)])
                self._give_every_row_pages(steps)
                return self._decode(steps)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            self._shrink()  # not inside the except: the error's traceback keeps its tensors alive

    def _shrink(self) -> None:
        """Go on with half the rows and half the prefill. Raises RolloutError when there is nothing left to halve."""
        if self.most_rows == 1 and self.most_prefill == 1:
            raise RolloutError("out of memory with one row: lower cache_tokens, shorten the responses, or use LoRA")
        self.most_rows = max(1, (len(self.rows) or self.most_rows) // 2)
        self.most_prefill = max(1, self.most_prefill // 2)
        while len(self.rows) > self.most_rows:
            self._preempt()
        self.state = None
        if self.graphs is not None:
            self.graphs.forget()
        self.stats.memory_retries += 1
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _step(self, state: DecodeState, longest: int | None = None, in_place: bool = False) -> None:
        """Draw one token for every row of a state, in place; this is what a graph holds."""
        context = Decode(self.cache, state.table, state.positions, longest or self._capacity, in_place)
        logits = self.forward.logits(self.forward.hidden(state.inputs, context))
        state.advance(*sample(logits, self.sampling, counted_uniform(state.keys, state.counts)))

    @property
    def _capacity(self) -> int:
        """The most tokens that a page table can hold."""
        return self.pages_per_row * self.page_size

    def _decode(self, steps: int) -> tuple[list[list[int]], list[list[float]]]:
        """So many tokens for every row, and their log-probs: steps x B. The host waits for the device once."""
        if self.state is None:
            self.state = self._mirror()
            if self.graphs is not None:
                self.state = self.graphs.load(self.state)
            # so it is unless a tight cache left a held prompt among the low pages
            self.in_place = self.one_page and all(row.pages == [i] for i, row in enumerate(self.rows))
        rows, longest, drawn = len(self.rows), max(row.length for row in self.rows), []
        for i in range(steps):
            if self.graphs is not None:
                self.graphs.run(self._step, rows)
            else:
                self._step(self.state, longest + i, self.in_place)
            drawn.append((self.state.inputs[:rows].clone(), self.state.logprobs[:rows].clone()))
        tokens, logprobs = zip(*drawn, strict=True)
        return torch.stack(tokens).tolist(), torch.stack(logprobs).tolist()

    def _admit(self) -> None:
        """Start waiting responses while there are rows and pages. A prefix is prefilled once for all its rows."""
        started: list[_Row] = []
        prefills: list[tuple[np.ndarray, list[int]]] = []  # tokens and the pages that they fill
        held: list[_Prefix] = []
        while self.waiting and len(self.rows) < self.most_rows:
            row = self.waiting[0]
            prefix, size = row.prefix, self.page_size
            whole, part = divmod(len(prefix.tokens), size)
            alone = prefix.pages is None and prefix.rows_to_start == 1  # its pages can be the row's own
            needed = 1 + (0 if prefix.pages else whole if alone else whole + bool(part))
            # rows that are to grow keep a page each in reserve, or they would only preempt each other
            reserve = 0 if self.one_page else len(self.rows)
            if len(self.cache.free) < needed + reserve:
                if not self.rows and self._forget_waiting():
                    continue
                break
            if alone:
                row.pages = [self.cache.take() for _ in range(whole + 1)]
                prefills.append((prefix.tokens, row.pages))
            else:
                if prefix.pages is None:  # from the far end, so that rows keep the low pages to themselves
                    prefix.pages = [self.cache.take(highest=True) for _ in range(whole + bool(part))]
                    prefills.append((prefix.tokens, prefix.pages))
                    held.append(prefix)
                row.pages = [self.cache.share(page) for page in prefix.pages[:whole]] + [self.cache.take()]
            row.admitted = self.admissions = self.admissions + 1
            self.rows.append(self.waiting.popleft())
            started.append(row)
        if not started:
            return
        self.state = None
        try:
            self._prefill([prefill for prefill in prefills if len(prefill[0])])
        except BaseException:  # as if nothing had been admitted
            del self.rows[len(self.rows) - len(started) :]
            for row in reversed(started):
                self.cache.release(row.pages)
                row.pages = []
                self.waiting.appendleft(row)
            for prefix in held:
                self._forget(prefix)
            raise
        for row in started:
            whole, part = divmod(len(row.prefix.tokens), self.page_size)
            if part and row.prefix.pages:  # the page that the row goes on writing is its own copy
                self.cache.copy(row.prefix.pages[whole], row.pages[whole], part)
            row.prefix.rows_to_start -= 1
            if row.prefix.rows_to_start == 0:
                self._forget(row.prefix)

    def _prefill(self, prefills: list[tuple[np.ndarray, list[int]]]) -> None:
        """Write keys and values of tokens into their pages, several sequences packed into one forward."""
        while prefills:
            batch, tokens = [], 0
            while prefills and (not batch or tokens + len(prefills[0][0]) <= self.most_prefill):
                tokens += len(prefills[0][0])
                batch.append(prefills.pop(0))
            context = Prefill(self.cache, [len(t) for t, _ in batch], [pages for _, pages in batch], self.device)
            self.forward.hidden(torch.from_numpy(np.concatenate([t for t, _ in batch])).to(self.device), context)
            self.stats.prefilled_tokens += tokens

    def _give_every_row_pages(self, steps: int) -> None:
        """The tokens about to be decoded need a place; without a free page the row admitted last must wait."""
        for row in sorted(self.rows, key=lambda row: row.admitted):
            while row.pages and (row.length + steps - 2) // self.page_size >= len(row.pages):
                if self.cache.free:
                    row.pages.append(self.cache.take())
                else:
                    self._preempt()
                self.state = None

    def _preempt(self) -> None:
        """Free the pages of the row admitted last; or, when one row is left, those of a prompt held for others."""
        if len(self.rows) == 1:
            self._forget_waiting()
            return
        victim = max(self.rows, key=lambda row: row.admitted)
        self.rows.remove(victim)
        self.cache.release(victim.pages)
        victim.pages = []
        if victim.tokens:  # its own tokens are now part of what is to be prefilled
            known = np.concatenate([victim.prompt.tokens, victim.tokens]).astype(np.int64)
            victim.prefix = _Prefix(known[:-1], 1)
        else:
            victim.prefix.rows_to_start += 1
        self.waiting.appendleft(victim)
        self.stats.preemptions += 1

    def _forget(self, prefix: _Prefix) -> None:
        """Let go of a prefix's pages; rows that share them keep them."""
        self.cache.release(prefix.pages or [])
        prefix.pages = None

    def _forget_waiting(self) -> bool:
        """Let go of prefixes held for waiting rows, which will be prefilled again. Was there any?"""
        held = {id(row.prefix): row.prefix for row in self.waiting if row.prefix.pages}
        for prefix in held.values():
            self._forget(prefix)
        return bool(held)

    def _mirror(self) -> DecodeState:
        """The rows as device tensors."""
        widest = max(len(row.pages) for row in self.rows)
        table = np.zeros((len(self.rows), widest), dtype=np.int64)
        for i, row in enumerate(self.rows):
            table[i, : len(row.pages)] = row.pages
        last = [row.tokens[-1] if row.tokens else int(row.prompt.tokens[-1]) for row in self.rows]
        columns = (
            [row.length - 1 for row in self.rows],
            last,
            [row.key for row in self.rows],
            [len(row.tokens) for row in self.rows],
        )
        numbers = (np.asarray(x, dtype=np.int64) for x in (table, *columns))
        return DecodeState(*(torch.from_numpy(x).to(self.device) for x in numbers))

    def _retire(self, finished: list[int]) -> None:
        """Remove finished rows; the last row moves into each gap, with its page where a row is one page."""
        if finished:
            self.state = None
        for i in reversed(finished):
            self.cache.release(self.rows[i].pages)
            last = self.rows.pop()
            if i == len(self.rows):
                continue
            self.rows[i] = last
            if self.one_page:
                source, last.pages = last.pages, [self.cache.take()]
                self.cache.copy(source[0], last.pages[0], last.length)
                self.cache.release(source)

    def _rollout(self, row: _Row, finish_reason: str) -> Rollout:
        return Rollout(
            problem_id=row.prompt.problem_id,
            index=row.index,
            prompt=np.asarray(row.prompt.tokens, dtype=np.int32),
            tokens=np.asarray(row.tokens, dtype=np.int32),
            logprobs=np.asarray(row.logprobs, dtype=np.float32),
            finish_reason=finish_reason,
            temperature=self.sampling.temperature,
        )


# --------------------------------------------------------------------------------------------------- diversity


def distinct_share(texts: Sequence[str], n: int = 4) -> float | None:
    """Distinct n-grams / all n-grams over one problem's rollouts; None when no rollout has n whitespace tokens."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def distinct_ngrams(texts_by_problem: Sequence[Sequence[str]], n: int = 4) -> tuple[float | None, int]:
    """The recipe's diversity (RECIPE.md section 2): `distinct_share`, averaged over problems.

    Returns the score (None when no problem has an n-gram) and how many problems were left out for having none.
    """
    shares = [share for texts in texts_by_problem if (share := distinct_share(texts, n)) is not None]
    return (sum(shares) / len(shares) if shares else None), len(texts_by_problem) - len(shares)
