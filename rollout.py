"""The sampler: n responses per prompt, from the training weights, through a paged KV cache.

`generate` yields rollouts as they finish, so that grading can overlap sampling. One loop serves every device:

    admit    waiting responses take free rows and pages; a prompt is prefilled once for its whole group
    decode   one token for every row: attention over its pages, then one draw
    retire   finished rows leave at once, and the last row closes the gap

All of it is here in plain PyTorch; engine/decode.py has the faster weights, kernel and graphs that stand in for it.

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
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.decode import KERNEL_PAGE_TOKENS, PagedKernel, pages_have_kernels, sampling_forward, step_graphs
from engine.errors import UserError
from engine.memory import out_of_memory
from model import ModelConfig, Packed, Transformer

LARGEST_PREFILL = 16_384  # tokens in one prefill forward; a longer prompt goes alone
LARGEST_CPU_PREFILL = 2_048  # what the caches of a CPU hold
STEPS_BETWEEN_SYNCS = 8  # with graphs: tokens that every row draws before the host looks for the ends of responses


class RolloutError(UserError):
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


@dataclass
class SamplerStats:
    """What a call of `generate` did; filled in as it goes."""

    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    decode_steps: int = 0
    preemptions: int = 0
    memory_retries: int = 0  # times that memory ran out and the batch was made smaller


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
    if sampling.top_k or sampling.top_p < 1:  # the top_k likeliest, and of these the fewest that hold top_p of the mass
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


# -------------------------------------------------------------------------------------------- the paged cache


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


class PagedCache:
    """Keys and values of every layer, in pages of `page_size` tokens that any sequence may use."""

    def __init__(self, model: Transformer, pages: int, page_size: int, dtype: torch.dtype, scratch: bool = False):
        """With `scratch` there is one more page, number `pages`, which is never handed out."""
        config, device = model.config, model.device
        self.page_size, self.pages = page_size, pages

        def zeros() -> Tensor:  # (layers, pages, page_size, K, D)
            order = (0, 1, 3, 2, 4) if device.type == "cpu" else (0, 1, 2, 3, 4)  # on a CPU a head's tokens in a row
            shape = (config.num_hidden_layers, pages + scratch, page_size, config.num_key_value_heads, config.head_dim)
            return torch.zeros([shape[i] for i in order], dtype=dtype, device=device).permute(order)

        self.keys, self.values = zeros(), zeros()
        self.free = list(range(pages - 1, -1, -1))  # the lowest page is handed out first
        self.users = [0] * pages

    def take(self, count: int, highest: bool = False) -> list[int]:
        """Free pages: the lowest, or the highest."""
        return self.share([self.free.pop(0 if highest else -1) for _ in range(count)])

    def share(self, pages: list[int]) -> list[int]:
        """The same pages, with one more user each."""
        for page in pages:
            self.users[page] += 1
        return pages

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

    def store(self, layer: int, page: Tensor, offset: Tensor, k: Tensor, v: Tensor) -> None:
        """Write the keys and values (T, K, D) of T tokens to their places: page and offset in it (T,)."""
        self.keys[layer][page, offset] = k.to(self.keys.dtype)
        self.values[layer][page, offset] = v.to(self.values.dtype)


class Prefill(Packed):
    """Packed prompts whose keys and values go into the cache on the way."""

    def __init__(self, cache: PagedCache, lengths: list[int], page_tables: list[list[int]], device: torch.device):
        super().__init__(lengths, device)
        self.cache, size = cache, cache.page_size
        pages = [np.repeat(table, size)[:n] for table, n in zip(page_tables, lengths, strict=True)]
        self.page = torch.from_numpy(np.concatenate(pages)).to(device)  # (T,)
        self.offset = self.positions % size  # (T,)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store keys and values, and attend within each prompt: q (T, H, D) -> (T, H, D)."""
        self.cache.store(layer, self.page, self.offset, k, v)
        return super().attend(layer, q, k, v)


class Decode:
    """One new token per row, which sees all of its sequence through the page table."""

    def __init__(self, cache: PagedCache, table: Tensor, positions: Tensor, longest: int, in_place: bool = False):
        """table (B, pages), positions (B,) of the new tokens; no row has more than `longest` tokens with its new one.

        `in_place`: row i is page i, and nothing more: the cache itself is the batch, ungathered.
        """
        self.cache, self.positions, self.in_place, size = cache, positions, in_place, cache.page_size
        self.page = table.gather(1, (positions // size)[:, None]).squeeze(1)  # (B,)
        self.offset = positions % size
        self.kernel = None
        if pages_have_kernels(table.device, cache.keys.dtype):
            self.kernel = PagedKernel(table, positions + 1, longest)
            return
        if in_place and 2 * longest > size:
            longest = size  # pages side by side are one stream: skipping the rest of each costs more than reading it
        self.table, self.longest = table[:, : math.ceil(longest / size)], longest
        unseen = torch.arange(longest, device=table.device)[None] > positions[:, None]  # (B, longest)
        bias = torch.zeros(unseen.shape, dtype=cache.keys.dtype, device=table.device)
        self.bias = bias.masked_fill_(unseen, -math.inf)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store this token's key and value, then attend: q (B, H, D) -> (B, H, D)."""
        self.cache.store(layer, self.page, self.offset, k, v)
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # (pages, size, K, D)
        if self.kernel:
            return self.kernel.attend(q, keys, values)
        rows, heads, size = q.shape
        if self.in_place:
            k, v = keys[:rows], values[:rows]
        else:
            k, v = keys[self.table].flatten(1, 2), values[self.table].flatten(1, 2)  # (B, pages x size, K, D)
        k, v = k[:, : self.longest].transpose(1, 2), v[:, : self.longest].transpose(1, 2)  # (B, K, longest, D)
        q = q.unflatten(1, (k.shape[1], -1))  # (B, K, H/K, D): queries that share a key head become its rows
        q, k, v = (q * size**-0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B x K, ., D)
        # keys first: with few queries to a key, the product reads memory twice as fast in this order
        scores = torch.bmm(k, q.transpose(1, 2)).transpose(1, 2).contiguous()  # (B x K, H/K, longest)
        scores.view(rows, -1, self.longest).add_(self.bias[:, None])
        return torch.bmm(scores.softmax(-1), v).view(rows, heads, size)


# ------------------------------------------------------------------------------------------------ the sampler


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
    return (
        _Sampler(model, list(prompts), sampling, limits, stats or SamplerStats()).run(abandon) if prompts else iter(())
    )


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
        if prompt.limits and (least := min(prompt.limits)) < 1:
            raise RolloutError(f"problem {prompt.problem_id}: a limit of {least} new tokens is below 1: raise it")
        if not len(prompt.tokens):
            raise RolloutError(f"problem {prompt.problem_id}: the prompt is empty")
        if needs > window:
            raise RolloutError(f"{what} exceeds the model's window of {window}: shorten either or extend with YaRN")
        if math.ceil(needs / page_size) + 1 > limits.tokens // page_size:
            raise RolloutError(f"{what} and a spare page exceed the cache of {limits.tokens} tokens: enlarge it")


@dataclass
class _Prefix:
    """Tokens whose keys and values are prefilled once and held until every row that starts from them has started."""

    rows_to_start: int
    pages: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Row:
    """A response in the making."""

    prompt: Prompt
    index: int
    key: int
    limit: int  # most new tokens
    prefix: _Prefix  # all but the last of its tokens when it starts: that one is decoded
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    admitted: int = 0  # a running number: preemption takes the highest

    @property
    def length(self) -> int:
        """Tokens so far, prompt and response."""
        return len(self.prompt.tokens) + len(self.tokens)


class _Sampler:
    """The state of one `generate` call: the rows in flight, the rows that wait, and the cache that they share."""

    def __init__(
        self, model: Transformer, prompts: list[Prompt], sampling: Sampling, limits: CacheLimits, stats: SamplerStats
    ):
        self.sampling, self.stats, self.device = sampling, stats, model.device
        self.rows: list[_Row] = []
        self.waiting: deque[_Row] = deque()
        self.admissions = 0
        for prompt in prompts:
            prefix = _Prefix(prompt.n)
            for i in range(prompt.n):
                key = sequence_key(sampling.seed, sampling.step, prompt.problem_id, prompt.first + i)
                limit = min(sampling.max_new_tokens, prompt.limits[i] if prompt.limits else sampling.max_new_tokens)
                self.waiting.append(_Row(prompt, prompt.first + i, key, limit, prefix))
        longest = max(len(prompt.tokens) for prompt in prompts) + sampling.max_new_tokens
        self.page_size = _page_size(model, limits, longest)
        self.pages_per_row = math.ceil(longest / self.page_size)
        self.one_page = self.pages_per_row == 1  # then row i keeps to page i, as long as the cache is not tight
        rows = self.most_rows = min(limits.rows, len(self.waiting))
        self.most_prefill = LARGEST_CPU_PREFILL if self.device.type == "cpu" else LARGEST_PREFILL
        self.graphs = step_graphs(rows, self.device, model.lm_head.weight.dtype)
        self.cache = self._make_cache(model, limits)
        self.forward = sampling_forward(model, rows)
        # the rows as tensors, made once: a step reads and updates them in place, so that a graph can replay it
        self.table = torch.zeros(rows, self.pages_per_row, dtype=torch.int64, device=self.device)
        self.numbers = torch.zeros(5, rows, dtype=torch.int64, device=self.device)  # what _step unpacks
        self.logprobs = torch.zeros(rows, device=self.device)  # of the tokens drawn
        self.loaded: list[tuple[int, int]] | None = None  # which rows, with how many pages, the tensors hold

    def _make_cache(self, model: Transformer, limits: CacheLimits) -> PagedCache:
        """As many pages as the budget holds, and no more than full rows and as many held prompts could use."""
        pages = min(limits.tokens // self.page_size, 2 * self.most_rows * self.pages_per_row)
        while True:
            try:
                return PagedCache(model, pages, self.page_size, model.lm_head.weight.dtype, self.graphs is not None)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            pages //= 2
            self.stats.memory_retries += 1
            if pages <= self.pages_per_row:
                what = f"a cache for one sequence of {self.pages_per_row * self.page_size} tokens does not fit"
                raise RolloutError(f"out of memory: {what}: shorten the responses or use a smaller model")

    def run(self, abandon: Callable[[], bool]) -> Iterator[Rollout]:
        """Decode until nothing runs and nothing waits."""
        while (self.rows or self.waiting) and not abandon():
            drawn = None
            try:
                self._admit()
                drawn = self._decode()
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            if drawn is None:  # outside the except clause: the error's traceback keeps its tensors alive
                self._shrink()
            else:
                yield from self._retire(*drawn)

    def _admit(self) -> None:
        """Start waiting responses while there are rows and pages. A prefix is prefilled once for all its rows."""
        started: list[_Row] = []
        prefills: list[tuple[_Row, list[int]]] = []  # rows and the pages that all but their last token fill
        while self.waiting and len(self.rows) < self.most_rows:
            row = self.waiting[0]
            prefix = row.prefix
            whole, part = divmod(row.length - 1, self.page_size)
            alone = not prefix.pages and prefix.rows_to_start == 1  # its pages can be the row's own
            needed = 1 if prefix.pages else 1 + whole + (part > 0 and not alone)
            # rows that are to grow keep a page each in reserve, or they would only preempt each other
            reserve = 0 if self.one_page else len(self.rows)
            if len(self.cache.free) < needed + reserve:
                if self.rows:
                    break
                self._free_pages()
                continue
            if alone:
                row.pages = self.cache.take(whole + 1)
                prefills.append((row, row.pages))
            else:
                if not prefix.pages:  # from the far end, so that rows keep the low pages to themselves
                    prefix.pages = self.cache.take(whole + (part > 0), highest=True)
                    prefills.append((row, prefix.pages))
                row.pages = self.cache.share(prefix.pages[:whole]) + self.cache.take(1)
            prefix.rows_to_start -= 1
            row.admitted = self.admissions = self.admissions + 1
            self.rows.append(self.waiting.popleft())
            started.append(row)
        try:
            self._prefill([(row, pages) for row, pages in prefills if row.length > 1])
        except BaseException:  # as if nothing had been admitted
            for row in reversed(started):
                self._forget(row.prefix)
                self._preempt(row)
            raise
        for row in started:
            whole, part = divmod(row.length - 1, self.page_size)
            if part and row.prefix.pages:  # the page that the row goes on writing is its own copy
                self.cache.copy(row.prefix.pages[whole], row.pages[whole], part)
        for row in started:
            if row.prefix.rows_to_start == 0:
                self._forget(row.prefix)

    def _prefill(self, prefills: list[tuple[_Row, list[int]]]) -> None:
        """Write keys and values of all but the last token of rows into pages, several rows packed into one forward."""
        while prefills:
            tokens, tables, total = [], [], 0
            while prefills and (not tokens or total + prefills[0][0].length - 1 <= self.most_prefill):
                row, pages = prefills.pop(0)
                tokens.append(np.concatenate([row.prompt.tokens, row.tokens])[:-1].astype(np.int64))
                tables.append(pages)
                total += len(tokens[-1])
            context = Prefill(self.cache, [len(t) for t in tokens], tables, self.device)
            self.forward.hidden(torch.from_numpy(np.concatenate(tokens)).to(self.device), context)
            self.stats.prefilled_tokens += total

    def _decode(self) -> tuple[list[list[int]], list[list[float]]]:
        """The next tokens of every row and their log-probs, B x steps. The host waits for the device once."""
        steps = 1
        if self.graphs:
            steps = min([STEPS_BETWEEN_SYNCS, *(row.limit - len(row.tokens) for row in self.rows)])
        self._give_every_row_pages(steps)
        self._load()
        rows, longest, drawn = len(self.rows), max(row.length for row in self.rows), []
        # no page i is another's, unless a tight cache left a held prompt among the low pages
        in_place = self.one_page and all(row.pages == [i] for i, row in enumerate(self.rows))
        for _ in range(steps):
            if self.graphs:  # recorded once for all lengths
                self.graphs.run(partial(self._step, longest=self.pages_per_row * self.page_size), rows)
            else:
                self._step(rows, longest, in_place)
            drawn.append((self.numbers[1, :rows].clone(), self.logprobs[:rows].clone()))
        self.stats.decode_steps += steps
        tokens, logprobs = zip(*drawn, strict=True)
        return torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist()

    def _step(self, rows: int, longest: int, in_place: bool = False) -> None:
        """Draw one token for each of the first rows and leave their tensors ready for the next step."""
        positions, inputs, keys, counts, alive = self.numbers[:, :rows]  # each int64 (B,)
        context = Decode(self.cache, self.table[:rows], positions, longest, in_place)
        logits = self.forward.logits(self.forward.hidden(inputs, context))  # (B, V)
        tokens, logprobs = sample(logits, self.sampling, counted_uniform(keys, counts))
        inputs.copy_(tokens)
        self.logprobs[:rows] = logprobs
        positions += alive
        counts += alive

    def _load(self) -> None:
        """Write the rows to the tensors that a step reads, unless they have not changed since the last one."""
        rows = [(row.admitted, len(row.pages)) for row in self.rows]
        if rows == self.loaded:
            return
        # rows beyond them only fill up a graph's batch: they stay where they are, on the scratch page
        table = np.full(self.table.shape, self.cache.pages if self.graphs else 0)
        numbers = np.zeros(self.numbers.shape, dtype=np.int64)
        for i, row in enumerate(self.rows):
            table[i, : len(row.pages)] = row.pages
            last = row.tokens[-1] if row.tokens else int(row.prompt.tokens[-1])
            numbers[:, i] = row.length - 1, last, row.key, len(row.tokens), 1
        self.table.copy_(torch.from_numpy(table))
        self.numbers.copy_(torch.from_numpy(numbers))
        self.loaded = rows

    def _give_every_row_pages(self, steps: int) -> None:
        """The tokens about to be decoded need a place; without a free page the row admitted last must wait."""
        for row in sorted(self.rows, key=lambda row: row.admitted):
            while row.pages and (row.length + steps - 2) // self.page_size >= len(row.pages):
                if self.cache.free:
                    row.pages += self.cache.take(1)
                else:
                    self._free_pages()

    def _retire(self, tokens: list[list[int]], logprobs: list[list[float]]) -> list[Rollout]:
        """Give every row what was drawn for it, B x steps. Finished responses leave and are returned."""
        stop, finished = self.sampling.stop_tokens, []
        for i, row in enumerate(self.rows):
            for token, logprob in zip(tokens[i], logprobs[i], strict=True):
                row.tokens.append(token)
                row.logprobs.append(logprob)
                self.stats.decoded_tokens += 1
                if token in stop or len(row.tokens) == row.limit:
                    finished.append(row)
                    break  # what it drew after its end is forgotten
        for row in reversed(finished):  # the last row moves into each gap
            self.cache.release(row.pages)
            gap, last = self.rows.index(row), self.rows.pop()
            if last is not row:
                self.rows[gap] = last
                if self.one_page:  # and so does its page
                    source, last.pages = last.pages, self.cache.take(1)
                    self.cache.copy(source[0], last.pages[0], last.length)
                    self.cache.release(source)
        return [
            Rollout(
                problem_id=row.prompt.problem_id,
                index=row.index,
                prompt=np.asarray(row.prompt.tokens, dtype=np.int32),
                tokens=np.asarray(row.tokens, dtype=np.int32),
                logprobs=np.asarray(row.logprobs, dtype=np.float32),
                finish_reason="stop" if row.tokens[-1] in stop else "length",
                temperature=self.sampling.temperature,
            )
            for row in finished
        ]

    def _free_pages(self) -> None:
        """Preempt the row admitted last; when there is at most one, let go of the prompts held for waiting rows."""
        if len(self.rows) > 1:
            self._preempt(max(self.rows, key=lambda row: row.admitted))
            self.stats.preemptions += 1
        else:
            for row in self.waiting:
                self._forget(row.prefix)

    def _preempt(self, row: _Row) -> None:
        """A row waits again, first in line. It is prefilled again where it has drawn tokens or its prefix is gone."""
        self.rows.remove(row)
        self.cache.release(row.pages)
        row.pages = []
        if row.tokens:
            row.prefix = _Prefix(0)
        row.prefix.rows_to_start += 1
        self.waiting.appendleft(row)

    def _forget(self, prefix: _Prefix) -> None:
        """Let go of a prefix's pages; rows that share them keep them."""
        self.cache.release(prefix.pages)
        prefix.pages = []

    def _shrink(self) -> None:
        """Go on with half the rows and half the prefill. Raises RolloutError when there is nothing left to halve."""
        if self.most_rows == 1 and self.most_prefill == 1:
            raise RolloutError("out of memory with one row: lower cache_tokens, shorten the responses, or use LoRA")
        self.most_rows = max(1, (len(self.rows) or self.most_rows) // 2)
        self.most_prefill = max(1, self.most_prefill // 2)
        while len(self.rows) > self.most_rows:
            self._free_pages()
        self.loaded = None  # a step that died may have changed the tensors
        if self.graphs:
            self.graphs.forget()
        self.stats.memory_retries += 1
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


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
