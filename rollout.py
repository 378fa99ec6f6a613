"""The sampler: n responses per prompt, from the training weights, through a paged KV cache.

`generate` yields rollouts as they finish, so that grading can overlap sampling. One loop serves every device:

    admit    waiting responses take free rows and pages; a prompt is prefilled once for its whole group
    decode   every row draws one token, after attention over its pages
    retire   finished rows leave at once, and the last row fills the gap

This file is plain PyTorch; engine/decode.py has the packed weights and the CUDA graphs that speed it up,
engine/paged_attention.py the kernel that reads pages in place. A row that needs a page when none is free preempts the
row admitted last, which waits and is prefilled again.

The draw for a token is a hash of (seed, step, problem id, rollout, position), so the other responses in the batch
change nothing (up to float rounding of the logits). Log-probs are log softmax(logits / T) before any top-k or top-p
cut; with the cuts off, as in training, they describe exactly the distribution that was sampled.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.decode import sampling_forward, step_graphs
from engine.errors import UserError
from engine.memory import free_memory_bytes, out_of_memory
from engine.paged_attention import has_paged_attention, paged_attention
from model import ModelConfig, ModelError, Packed, Transformer

LARGEST_PREFILL = 16_384  # tokens in one prefill forward; a longer prompt is prefilled alone
LARGEST_CPU_PREFILL = 2_048  # fits the caches of a CPU
STEPS_BETWEEN_SYNCS = 8  # with graphs: tokens drawn for every row before the host checks which responses have ended
DESKTOP_BYTES = 3 * 2**29  # of a GPU's free memory that an unlimited cache leaves to a desktop and fragmentation
DRAW_BLOCK = 128  # weights summed together, so that no cumulative sum runs over a whole vocabulary


# --------------------------------------------------------------------------------------- requests and results


class RolloutError(UserError):
    """A request that cannot be sampled."""


@dataclass(frozen=True)
class Prompt:
    """One problem's prompt and the number of rollouts to sample for it."""

    problem_id: str
    tokens: Sequence[int]
    n: int
    first: int = 0  # index of the first rollout
    limits: Sequence[int] | None = None  # max_new_tokens of each of the n, capped by Sampling's


@dataclass(frozen=True)
class Sampling:
    """How to sample. Temperature 0 is greedy; top_k 0 and top_p 1, the recipe's values, cut nothing."""

    temperature: float
    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    seed: int
    step: int = 0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class CacheLimits:
    """The size of the KV cache. Pages as long as the longest sequence give each row a single page."""

    tokens: int  # of all sequences together; 0: what fits into the free memory, see `free_cache_tokens`
    page_size: int  # tokens
    rows: int  # sequences decoded at once


@dataclass
class Rollout:
    """One sampled response and the log-probs of its tokens."""

    problem_id: str
    index: int  # among the problem's rollouts
    prompt: np.ndarray  # int32 (P,)
    tokens: np.ndarray  # int32 (R,), including a sampled stop token
    logprobs: np.ndarray  # float32 (R,), at `temperature`
    finish_reason: str  # "stop" or "length"; "" while it is being sampled
    temperature: float


@dataclass
class SamplerStats:
    """Counters of one `generate` call, updated as it runs."""

    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    decode_steps: int = 0
    preemptions: int = 0
    memory_retries: int = 0  # times that memory ran out and the batch was made smaller


def check_requests(
    model: Transformer, prompts: Sequence[Prompt], sampling: Sampling, limits: CacheLimits
) -> tuple[int, int]:
    """Return the page size to use, and how many pages of it the longest possible sequence takes.

    Raise RolloutError for invalid settings and for a sequence that could outgrow the model's window or the cache.
    """
    new, size, window = sampling.max_new_tokens, limits.page_size, model.config.max_position_embeddings
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0 or new < 1:
        raise RolloutError(f"cannot sample with {sampling}")
    if limits.rows < 1 or size < 1:
        raise RolloutError(f"cannot sample with {limits}")
    longest = max((len(prompt.tokens) for prompt in prompts), default=0) + new
    size = min(size, longest)
    for prompt in prompts:
        problem, length = f"problem {prompt.problem_id}", len(prompt.tokens)
        if prompt.limits and (least := min(prompt.limits)) < 1:
            raise RolloutError(f"{problem}: a limit of {least} new tokens is below 1: raise it")
        if not length:
            raise RolloutError(f"{problem}: the prompt is empty")
        sequence = f"{problem}: prompt of {length} tokens + {new} new"
        if length + new > window:
            others = [other.problem_id for other in prompts if len(other.tokens) + new > window][1:]
            named = ", ".join(others[:20]) + ", ..." * (len(others) > 20)
            also = f", and {len(others):,} more do so ({named})" * bool(others)
            raise RolloutError(
                f"{sequence} exceeds the model's window of {window}{also}: shorten either, extend with YaRN, or leave "
                "such problems out (--skip-bad-rows of eval.py and data_filter.py)"
            )
        if limits.tokens and math.ceil((length + new) / size) + 1 > limits.tokens // size:
            raise RolloutError(f"{sequence} and a spare page exceed the cache of {limits.tokens} tokens: enlarge it")
    return size, math.ceil(longest / size)


# --------------------------------------------------------------------------------------------------- the draw


def sequence_key(seed: int, step: int, problem_id: str, index: int) -> int:
    """Return a signed 64-bit key for one response."""
    name = f"{seed}/{step}/{problem_id}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


def counter_uniform(keys: Tensor, counters: Tensor) -> Tensor:
    """Return a float64 in [0, 1) for each key and counter: the SplitMix64 finaliser (doi 10.1145/2660193.2660195)."""

    def shift_right(x: Tensor, bits: int) -> Tensor:  # without the sign bits that an int64 shift brings in
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = keys + (counters + 1) * -0x61C8864680B583EB
    x = (x ^ shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    x = x ^ shift_right(x, 31)
    return shift_right(x, 11).double() * 2.0**-53


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row: logits (B, V), uniform (B,) in [0, 1) -> tokens (B,) int64, log-probs (B,) float32."""
    logits = logits.float()
    if sampling.temperature == 0:
        tokens = logits.argmax(1)
        return tokens, logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(1)
    # shift, exponentiate in place, sum: each pass over a vocabulary is expensive
    scaled = (logits - logits.amax(1, keepdim=True)).div_(sampling.temperature)
    if sampling.top_k or sampling.top_p < 1:  # keep the top_k likeliest, and of these the fewest that hold top_p
        size = logits.shape[1]
        best, index = scaled.topk(min(sampling.top_k or size, size), dim=1)  # (B, kept), likeliest first
        probability = best.softmax(1)
        mass_before = probability.cumsum(1) - probability
        place, _ = _draw(probability.masked_fill(mass_before >= sampling.top_p, 0.0), uniform)
        tokens = index.gather(1, place[:, None])  # (B, 1)
        return tokens.squeeze(1), scaled.gather(1, tokens).squeeze(1) - scaled.logsumexp(1)
    weights = scaled.exp_()
    tokens, total = _draw(weights, uniform)
    return tokens, weights.gather(1, tokens[:, None]).squeeze(1).log() - total.log()


def _draw(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution: unnormalised weights (B, V) -> indices (B,) and sums of the weights (B,)."""
    vocabulary = weights.shape[1]
    if vocabulary % DRAW_BLOCK:
        weights = F.pad(weights, (0, -vocabulary % DRAW_BLOCK))
    blocks = weights.unflatten(1, (-1, DRAW_BLOCK))  # (B, V / 128, 128)
    sums = blocks.sum(2)
    total = sums.sum(1)
    block, rest = _invert(sums, uniform[:, None] * total[:, None])
    inside = blocks[torch.arange(len(blocks), device=block.device), block]  # (B, 128)
    place, _ = _invert(inside, rest)
    # NaN weights lead into the padding, and on CUDA a token past the end would kill the process
    return (block * DRAW_BLOCK + place).clamp_(max=vocabulary - 1), total


def _invert(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Find where the running sum of weights (B, n) passes target (B, 1): indices (B,), and remainders (B, 1)."""
    cumulative = weights.cumsum(1, dtype=torch.float64)
    # rounding must not move the result past the last weight above zero
    target = torch.minimum(target.double(), cumulative[:, -1:] * (1 - 2.0**-50))
    index = torch.searchsorted(cumulative, target, right=True)  # (B, 1)
    index = index.clamp_(max=weights.shape[1] - 1)  # only NaN weights lead past the end
    return index.squeeze(1), target - (cumulative.gather(1, index) - weights.gather(1, index))


# ------------------------------------------------------------------------------------------ the paged KV cache


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def free_cache_tokens(free: int, config: ModelConfig, dtype: torch.dtype, cuda: bool, rows: int, longest: int) -> int:
    """Return the tokens of the cache for which `free` bytes have room, beside prefills, logits and a desktop."""
    if cuda:  # four values of a layer's two widths cover any operation of a prefill; three float32 copies of the logits
        widths = config.hidden_size + config.intermediate_size
        free -= max(LARGEST_PREFILL, longest) * 4 * widths * dtype.itemsize
        free -= rows * config.vocab_size * 3 * torch.float32.itemsize + DESKTOP_BYTES
    return max(0, free) // cache_bytes_per_token(config, dtype)


class PagedCache:
    """Keys and values of every layer, in pages of `page_size` tokens that any sequence may use."""

    def __init__(self, model: Transformer, pages: int, page_size: int, dtype: torch.dtype, scratch: bool = False):
        """With `scratch`, page number `pages` exists too and is never handed out."""
        config, device = model.config, model.device
        self.page_size, self.pages = page_size, pages
        shape = (config.num_hidden_layers, pages + scratch, page_size, config.num_key_value_heads, config.head_dim)
        order = (0, 1, 3, 2, 4) if device.type == "cpu" else (0, 1, 2, 3, 4)  # a CPU reads one head's tokens in a row
        self.keys, self.values = (  # (layers, pages, page_size, K, D)
            torch.zeros([shape[i] for i in order], dtype=dtype, device=device).permute(order) for _ in range(2)
        )
        self.free = list(range(pages - 1, -1, -1))  # the lowest page is handed out first
        self.users = [0] * pages

    def take(self, count: int, highest: bool = False) -> list[int]:
        """Hand out free pages: the lowest, or the highest."""
        return self.share([self.free.pop(0 if highest else -1) for _ in range(count)])

    def share(self, pages: list[int]) -> list[int]:
        """Add one user to each page and return the pages."""
        for page in pages:
            self.users[page] += 1
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Remove one user from each page; pages without users become free."""
        for page in pages:
            self.users[page] -= 1
            if self.users[page] == 0:
                self.free.append(page)
        self.free.sort(reverse=True)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of a page, in every layer."""
        self.keys[:, target, :tokens] = self.keys[:, source, :tokens]
        self.values[:, target, :tokens] = self.values[:, source, :tokens]

    def store(self, layer: int, page: Tensor, offset: Tensor, k: Tensor, v: Tensor) -> None:
        """Write the keys and values (T, K, D) of T tokens, each at its page and the offset in it (T,)."""
        self.keys[layer][page, offset] = k.to(self.keys.dtype)
        self.values[layer][page, offset] = v.to(self.values.dtype)


class Prefill(Packed):
    """Packed prompts whose keys and values are stored in the cache."""

    def __init__(self, cache: PagedCache, lengths: list[int], page_tables: list[list[int]], device: torch.device):
        super().__init__(lengths, device)
        self.cache, size = cache, cache.page_size
        pages = [np.repeat(table, size)[:n] for table, n in zip(page_tables, lengths, strict=True)]
        self.page = torch.from_numpy(np.concatenate(pages)).to(device)  # (T,)
        self.offset = self.positions % size  # (T,)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store keys and values, then attend within each prompt: q (T, H, D) -> (T, H, D)."""
        self.cache.store(layer, self.page, self.offset, k, v)
        return super().attend(layer, q, k, v)


class Decode:
    """One new token per row, which attends to its sequence through the page table.

    With `in_place`, row i uses page i and no other, so that the cache is read without gathering pages.
    """

    def __init__(self, cache: PagedCache, table: Tensor, positions: Tensor, longest: int, in_place: bool = False):
        """table (B, pages), positions (B,) of the new tokens; no row exceeds `longest` tokens, the new one included."""
        self.cache, self.positions, self.in_place, size = cache, positions, in_place, cache.page_size
        self.page = table.gather(1, (positions // size)[:, None]).squeeze(1)  # (B,)
        self.offset = positions % size
        self.table, self.lengths = table, positions + 1
        self.kernel = has_paged_attention(table.device, cache.keys.dtype)
        if self.kernel:
            return
        if in_place and 2 * longest > size:
            longest = size  # reading adjacent pages to their ends is faster than skipping parts of them
        self.table, self.longest = table[:, : math.ceil(longest / size)], longest
        unseen = torch.arange(longest, device=table.device)[None] > positions[:, None]  # (B, longest)
        bias = torch.zeros(unseen.shape, dtype=cache.keys.dtype, device=table.device)
        self.bias = bias.masked_fill_(unseen, -math.inf)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new token's key and value, then attend: q (B, H, D) -> (B, H, D)."""
        self.cache.store(layer, self.page, self.offset, k, v)
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # (pages, size, K, D)
        if self.kernel:
            return paged_attention(q, keys, values, self.table, self.lengths)
        rows, heads, size = q.shape
        if self.in_place:
            k, v = keys[:rows], values[:rows]
        else:
            k, v = keys[self.table].flatten(1, 2), values[self.table].flatten(1, 2)  # (B, pages x size, K, D)
        k, v = k[:, : self.longest].transpose(1, 2), v[:, : self.longest].transpose(1, 2)  # (B, K, longest, D)
        q = q.unflatten(1, (k.shape[1], -1))  # (B, K, H/K, D): the queries that share a key head
        q, k, v = (q * size**-0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B x K, ., D)
        # keys first: with few queries per key, this order reads memory twice as fast
        scores = torch.bmm(k, q.transpose(1, 2)).transpose(1, 2).contiguous()  # (B x K, H/K, longest)
        scores.view(rows, -1, self.longest).add_(self.bias[:, None])
        return torch.bmm(scores.softmax(-1), v).view(rows, heads, size)


# ---------------------------------------------------------------------------- the loop: admit, decode, retire


def generate(
    model: Transformer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    limits: CacheLimits,
    stats: SamplerStats | None = None,
    abandon: Callable[[], bool] = lambda: False,
    live: bool = False,
) -> Iterator[Rollout]:
    """Yield every rollout as it finishes, in no particular order. Needs gathered weights and torch.no_grad.

    `abandon` is called before each decode; when it returns True, unfinished responses are dropped. With `live` the
    unfinished ones are yielded as well, after each decode, and have no finish_reason.
    Raises what `check_requests` raises, before any work, and ModelError where the logits are not finite.
    """
    return _Sampler(model, list(prompts), sampling, limits, stats or SamplerStats()).run(abandon, live)


@dataclass
class _Prefix:
    """Prefilled tokens, held until every row that starts from them has started."""

    rows_to_start: int
    pages: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Row:
    """An unfinished response."""

    prompt: Prompt
    index: int
    key: int
    limit: int  # max_new_tokens
    prefix: _Prefix  # all tokens but the last, which is decoded
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    admitted: int = 0  # serial number of its admission

    @property
    def length(self) -> int:
        return len(self.prompt.tokens) + len(self.tokens)


class _Sampler:
    """The state of one `generate` call: the rows being decoded, the waiting rows, and the cache they share."""

    def __init__(
        self, model: Transformer, prompts: list[Prompt], sampling: Sampling, limits: CacheLimits, stats: SamplerStats
    ):
        self.page_size, self.pages_per_row = check_requests(model, prompts, sampling, limits)
        self.sampling, self.stats, self.device, self.name = sampling, stats, model.device, model.name
        self.rows: list[_Row] = []
        self.waiting: deque[_Row] = deque()
        self.admissions = 0
        for prompt in prompts:
            prefix = _Prefix(prompt.n)
            for i in range(prompt.n):
                key = sequence_key(sampling.seed, sampling.step, prompt.problem_id, prompt.first + i)
                limit = min(sampling.max_new_tokens, prompt.limits[i] if prompt.limits else sampling.max_new_tokens)
                self.waiting.append(_Row(prompt, prompt.first + i, key, limit, prefix))
        self.one_page = self.pages_per_row == 1  # row i then uses page i, unless the cache is tight
        rows = self.max_rows = max(1, min(limits.rows, len(self.waiting)))
        self.max_prefill = LARGEST_CPU_PREFILL if self.device.type == "cpu" else LARGEST_PREFILL
        self.graphs = step_graphs(rows, self.device, model.lm_head.weight.dtype)
        self.cache = self._allocate_cache(model, limits)
        self.forward = sampling_forward(model, rows)
        # a step updates these tensors in place, so that a graph can replay it
        self.table = torch.zeros(rows, self.pages_per_row, dtype=torch.int64, device=self.device)
        self.numbers = torch.zeros(5, rows, dtype=torch.int64, device=self.device)  # unpacked in _step
        self.logprobs = torch.zeros(rows, device=self.device)  # of the tokens just drawn
        self.loaded: list[tuple[int, int]] | None = None  # (admitted, pages) of each row in the tensors

    def _allocate_cache(self, model: Transformer, limits: CacheLimits) -> PagedCache:
        """Allocate the budget's pages, at most twice what full rows use; without a budget, what fits and rows use."""
        longest, dtype = self.pages_per_row * self.page_size, model.lm_head.weight.dtype
        most, tokens = 2 * self.max_rows * self.pages_per_row, limits.tokens
        if not tokens:
            most = (self.max_rows + 2) * self.pages_per_row + 1
            free, cuda = free_memory_bytes(self.device), self.device.type == "cuda"
            tokens = free_cache_tokens(free, model.config, dtype, cuda, self.max_rows, longest)
        pages = min(tokens // self.page_size, most)
        while pages > self.pages_per_row:  # one sequence and a spare page
            try:
                return PagedCache(model, pages, self.page_size, dtype, self.graphs is not None)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            pages -= math.ceil(pages / 8)
            self.stats.memory_retries += 1
        what = f"a cache for one sequence of {longest} tokens does not fit"
        raise RolloutError(f"out of memory: {what}: shorten the responses or use a smaller model")

    def run(self, abandon: Callable[[], bool], live: bool = False) -> Iterator[Rollout]:
        """Sample until no row is left."""
        while (self.rows or self.waiting) and not abandon():
            try:
                self._admit()
                drawn = self._decode()
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                drawn = None
            if drawn:
                yield from self._retire(*drawn)
                yield from map(self._rollout, self.rows if live else ())
            else:  # outside the except clause: the error's traceback keeps its tensors alive
                self._shrink()

    def _admit(self) -> None:
        """Start waiting responses while rows and pages are free. A prefix is prefilled once for all its rows."""
        started: list[_Row] = []
        prefills: list[tuple[_Row, list[int]]] = []  # rows, and the pages for all their tokens but the last
        while self.waiting and len(self.rows) < self.max_rows:
            row = self.waiting[0]
            prefix = row.prefix
            full, rest = divmod(row.length - 1, self.page_size)  # full pages, and tokens on a last one
            alone = not prefix.pages and prefix.rows_to_start == 1  # prefill into the row's own pages
            needed = 1 if prefix.pages else 1 + full + (rest > 0 and not alone)
            # a page in reserve for each growing row, or rows would only preempt each other
            reserve = 0 if self.one_page else len(self.rows)
            if len(self.cache.free) < needed + reserve:
                if self.rows:
                    break
                self._reclaim_pages()
                continue
            if alone:
                row.pages = self.cache.take(full + 1)
                prefills.append((row, row.pages))
            else:
                if not prefix.pages:  # take the highest, so that rows get the low pages
                    prefix.pages = self.cache.take(full + (rest > 0), highest=True)
                    prefills.append((row, prefix.pages))
                row.pages = self.cache.share(prefix.pages[:full]) + self.cache.take(1)
            row.admitted = self.admissions = self.admissions + 1
            self.rows.append(self.waiting.popleft())
            started.append(row)
        try:
            self._prefill([(row, pages) for row, pages in prefills if row.length > 1])
        except BaseException:  # undo the admissions
            for row in reversed(started):
                self._release(row.prefix)
                self._requeue(row)
            raise
        for row in started:
            full, rest = divmod(row.length - 1, self.page_size)
            if rest and row.prefix.pages:  # the row writes on in a copy of the shared last page
                self.cache.copy(row.prefix.pages[full], row.pages[full], rest)
            row.prefix.rows_to_start -= 1
            if row.prefix.rows_to_start == 0:
                self._release(row.prefix)

    def _prefill(self, prefills: list[tuple[_Row, list[int]]]) -> None:
        """Store keys and values of all tokens but the last of each row, several rows packed into one forward."""
        while prefills:
            tokens, tables, total = [], [], 0
            while prefills and (not tokens or total + prefills[0][0].length - 1 <= self.max_prefill):
                row, pages = prefills.pop(0)
                tokens.append(np.concatenate([row.prompt.tokens, row.tokens])[:-1].astype(np.int64))
                tables.append(pages)
                total += len(tokens[-1])
            context = Prefill(self.cache, [len(t) for t in tokens], tables, self.device)
            self.forward.hidden(torch.from_numpy(np.concatenate(tokens)).to(self.device), context)
            self.stats.prefilled_tokens += total

    def _decode(self) -> tuple[list[list[int]], list[list[float]]]:
        """Draw the next tokens of every row and their log-probs, B x steps. The host waits for the device once."""
        steps = 1
        if self.graphs:
            steps = min([STEPS_BETWEEN_SYNCS, *(row.limit - len(row.tokens) for row in self.rows)])
        self._reserve_pages(steps)
        self._load_rows()
        rows, longest, drawn = len(self.rows), max(row.length for row in self.rows), []
        # false only where, in a tight cache, a held prompt occupies low pages
        in_place = self.one_page and all(row.pages == [i] for i, row in enumerate(self.rows))
        for _ in range(steps):
            if self.graphs:  # one recording serves all lengths
                self.graphs.run(partial(self._step, longest=self.pages_per_row * self.page_size), rows)
            else:
                self._step(rows, longest, in_place)
            drawn.append((self.numbers[1, :rows].clone(), self.logprobs[:rows].clone()))
        self.stats.decode_steps += steps
        tokens, logprobs = zip(*drawn, strict=True)
        return torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist()

    def _step(self, rows: int, longest: int, in_place: bool = False) -> None:
        """Draw one token for each of the first rows and update their tensors for the next step."""
        positions, inputs, keys, counters, alive = self.numbers[:, :rows]  # each int64 (B,)
        context = Decode(self.cache, self.table[:rows], positions, longest, in_place)
        logits = self.forward.logits(self.forward.hidden(inputs, context))  # (B, V)
        tokens, logprobs = sample(logits, self.sampling, counter_uniform(keys, counters))
        inputs.copy_(tokens)
        self.logprobs[:rows] = logprobs
        positions += alive
        counters += alive

    def _load_rows(self) -> None:
        """Write the rows to the tensors that a step reads, unless they are still the rows of the last step."""
        rows = [(row.admitted, len(row.pages)) for row in self.rows]
        if rows == self.loaded:
            return
        # the rows beyond them, which only pad a graph's batch, do not advance: they rewrite the scratch page
        table = np.full(self.table.shape, self.cache.pages if self.graphs else 0)
        numbers = np.zeros(self.numbers.shape, dtype=np.int64)
        for i, row in enumerate(self.rows):
            table[i, : len(row.pages)] = row.pages
            last = row.tokens[-1] if row.tokens else int(row.prompt.tokens[-1])
            numbers[:, i] = row.length - 1, last, row.key, len(row.tokens), 1
        self.table.copy_(torch.from_numpy(table))
        self.numbers.copy_(torch.from_numpy(numbers))
        self.loaded = rows

    def _retire(self, tokens: list[list[int]], logprobs: list[list[float]]) -> list[Rollout]:
        """Append the drawn tokens (B x steps) to their rows; remove and return finished responses."""
        stop, finished = self.sampling.stop_tokens, []
        for i, row in enumerate(self.rows):
            for token, logprob in zip(tokens[i], logprobs[i], strict=True):
                if not math.isfinite(logprob):
                    raise ModelError(
                        f"{self.name}: the logits of token {len(row.tokens) + 1} of a response to problem "
                        f"{row.prompt.problem_id} are not finite: its weights hold NaN or infinity, or overflow: "
                        f"download or convert the model again, or train it at a lower learning rate"
                    )
                row.tokens.append(token)
                row.logprobs.append(logprob)
                self.stats.decoded_tokens += 1
                if token in stop or len(row.tokens) == row.limit:
                    finished.append(row)
                    break  # drop what was drawn after the end
        for row in reversed(finished):  # the last row moves into each gap
            self.cache.release(row.pages)
            gap, last = self.rows.index(row), self.rows.pop()
            if last is not row:
                self.rows[gap] = last
                if self.one_page:  # and so does its page
                    source, last.pages = last.pages, self.cache.take(1)
                    self.cache.copy(source[0], last.pages[0], last.length)
                    self.cache.release(source)
        return list(map(self._rollout, finished))

    def _rollout(self, row: _Row) -> Rollout:
        """Return what a row has drawn so far."""
        ended = "length" if len(row.tokens) == row.limit else ""
        return Rollout(
            problem_id=row.prompt.problem_id,
            index=row.index,
            prompt=np.asarray(row.prompt.tokens, dtype=np.int32),
            tokens=np.asarray(row.tokens, dtype=np.int32),
            logprobs=np.asarray(row.logprobs, dtype=np.float32),
            finish_reason="stop" if row.tokens[-1] in self.sampling.stop_tokens else ended,
            temperature=self.sampling.temperature,
        )

    def _reserve_pages(self, steps: int) -> None:
        """Give every row pages for the tokens to be decoded, oldest first; preempt where none is free."""
        for row in sorted(self.rows, key=lambda row: row.admitted):
            while row.pages and (row.length + steps - 2) // self.page_size >= len(row.pages):
                if self.cache.free:
                    row.pages += self.cache.take(1)
                else:
                    self._reclaim_pages()

    def _reclaim_pages(self) -> None:
        """Preempt the row admitted last or, with at most one row, release the prefixes of waiting rows."""
        if len(self.rows) > 1:
            row = max(self.rows, key=lambda row: row.admitted)
            if row.tokens:
                row.prefix = _Prefix(0)
            row.prefix.rows_to_start += 1
            self._requeue(row)
            self.stats.preemptions += 1
        else:
            for row in self.waiting:
                self._release(row.prefix)

    def _requeue(self, row: _Row) -> None:
        """Put a row back, first in line."""
        self.rows.remove(row)
        self._release(row)
        self.waiting.appendleft(row)

    def _release(self, holder: _Row | _Prefix) -> None:
        """Release the pages of a row or prefix; others that share them keep them."""
        self.cache.release(holder.pages)
        holder.pages = []

    def _shrink(self) -> None:
        """Halve the rows and the prefill. Raise RolloutError when both are down to one."""
        if self.max_rows == 1 and self.max_prefill == 1:
            raise RolloutError(
                "out of memory with one row: set a smaller cache_tokens, shorten the responses, or use LoRA"
            )
        self.max_rows = max(1, (len(self.rows) or self.max_rows) // 2)
        self.max_prefill = max(1, self.max_prefill // 2)
        while len(self.rows) > self.max_rows:
            self._reclaim_pages()
        self.loaded = None  # a failed step may have changed the tensors
        if self.graphs:
            self.graphs.forget()
        self.stats.memory_retries += 1
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
