"""Estimate a recipe's memory from shapes only: no weights, no GPU, no run folder.

A step's peak is the larger of its two phases, as the KV cache is freed before the update. The update's peak is the
largest of its moments: a layer's backward, the log-probs, the gradients' reduction, the optimizer. bench/plan.py
compares every figure with the bytes that the code allocates. `b` is the bytes of the compute dtype.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from engine.adapter import Lora, add_lora
from engine.huggingface import SHARD_BYTES
from lab.machine import RESPONSE_SHARE
from lab.recipe import Recipe, RlStage, SftStage
from model import LOGIT_CHUNK_BYTES, ModelConfig, Transformer
from rollout import DRAW_BLOCK, LARGEST_PREFILL, cache_bytes_per_token, free_cache_tokens

GIB = 2**30
# memory outside of tensors: the driver (a 24 GiB card offers 23.6), the context with its kernels and workspaces (about
# 0.6), and the allocator's rounding
CUDA_BYTES = round(1.25 * GIB)
HOST_BYTES = 3 * GIB  # Python, torch and the CUDA libraries of one process
INPUTS_IN_FLIGHT = 2  # offloaded layer inputs on the device at once: one in use, one being copied

Moment = dict[str, float]  # bytes by what they hold


class Shape:
    """The sizes of a model; parameters are counted on the meta device, in one layer for all."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.layers, self.vocabulary = config.num_hidden_layers, config.vocab_size
        self.width, self.inner = config.hidden_size, config.intermediate_size
        self.queries = config.num_attention_heads * config.head_dim  # width of all heads
        self.keys = config.num_key_value_heads * config.head_dim
        with torch.device("meta"):
            model = Transformer(replace(config, num_hidden_layers=1))
        layer = model.model.layers[0]
        self.layer = sum(p.numel() for p in layer.parameters())
        # embedding, head and last norm, which stay gathered through forward and backward
        self.root = sum(p.numel() for p in model.parameters()) - self.layer
        self.parameters = self.layers * self.layer + self.root
        self.products = sum(
            m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear)
        )  # matrices of a layer
        self.head = model.lm_head.weight.numel()
        add_lora(model, Lora(1, 1.0, ""))
        self.adapter = sum(p.numel() for p in layer.parameters() if p.requires_grad)  # of one layer, per rank


# ---------------------------------------------------------------------------------------------------- one phase


@dataclass(frozen=True)
class Update:
    """The settings that decide the update's memory, in addition to the model's shape."""

    tokens: int  # T, in a micro-batch
    predicted: int  # N, response tokens among them
    dtype: torch.dtype = torch.bfloat16  # compute
    kernels: bool = True  # fused norms and variable-length attention, as on CUDA
    recompute: bool = True
    offload_activations: bool = False
    lora_rank: int = 0
    processes: int = 1


def saved_by_layer(shape: Shape, update: Update) -> tuple[float, float]:
    """Return the bytes that autograd saves in one layer's forward: (up to attention's output, from the second norm)."""
    t, b, trained, config = update.tokens, update.dtype.itemsize, not update.lora_rank, shape.config
    # the fused norm saves its input; without it the float32 input and, if the norm's weight is trained, its product
    norm = b if update.kernels else 4 + 4 * trained
    first = shape.width * (norm + b)  # the projections save the output
    if update.recompute:
        first -= b * shape.width  # the layer's input, already counted
    heads = (shape.queries + shape.keys) * (norm * config.qk_norm + b)  # rotated, as attention saves it
    attended = shape.keys * b + shape.queries * b * (1 if update.kernels else 2)  # values, output (its unpadded copy)
    small = 4 * config.num_attention_heads  # log-sum-exp
    adapters = 7 * update.lora_rank * b
    second = shape.width * (norm + b) + 3 * shape.inner * b  # gate, up, silu(gate) x up
    return t * (first + heads + attended + small + adapters), t * second


def update_moments(shape: Shape, update: Update) -> dict[str, Moment]:
    """Return the moments of an update that can be its peak, without weights, gradients and optimizer state.

    All gradients exist in every moment: they do from a step's second micro-batch on.
    """
    t, n, b, ranks = update.tokens, update.predicted, update.dtype.itemsize, update.processes
    width, inner, queries, keys, head = shape.width, shape.inner, shape.queries, shape.keys, shape.head
    trained = not update.lora_rank
    before, after = saved_by_layer(shape, update)
    row = t * width * b  # one hidden state of every token

    if update.recompute:
        alive = min(shape.layers, INPUTS_IN_FLIGHT) if update.offload_activations else shape.layers
        kept, one = {"layer inputs": alive * row}, before + after
    else:
        kept, one = {"activations of all layers": shape.layers * (before + after)}, 0.0
    gathered = {"gathered embedding and head": shape.root * b * trained}
    # the current layer and, with several processes, the prefetched one; the gradient being reduced is float32
    in_work = trained * shape.layer * (b * (1 if ranks == 1 else 3) + 4 + 4 / ranks)
    # the MLP's backward: down_proj's gradient, and up to two more tensors of the MLP's width than were saved
    mlp = t * inner * b * 2 + row + trained * width * inner * b
    # attention's backward: float32 dq, dk and dv of every query head; of the MLP only gradients are left
    wide = queries * (3 * b + 4) + keys * 2 * b + (queries * b if keys < queries else 0)
    attention = t * wide + 2 * row + trained * (3 * width * inner + width * queries) * b - after
    rows = min(n, max(1, LOGIT_CHUNK_BYTES // (4 * shape.vocabulary)))
    chunk = rows * shape.vocabulary * (4 if b == 4 else 4 + b)  # float32 logits; gradients in the compute dtype
    if b < 4:  # in the end the head's gradient is copied to the compute dtype
        chunk = max(chunk, head * b * trained)
    of_head = head * 4 * trained  # float32 sum
    last_states = 2 * t * width * b + 2 * n * width * b
    reduced = trained * (shape.root * b + shape.root * 4 * (1 + 1 / ranks))
    copies = 3 if shape.config.tie_word_embeddings else 2
    summed = trained * (shape.root * b + head * b * copies) + 2 * row
    largest = max(head, width * inner) if trained else update.lora_rank * max(width + inner, width + queries)
    of_layer = {"one layer, forward and backward": one + max(mlp, attention)}
    of_layer |= {"that layer's weights and gradients": in_work}
    of_chunk = {"logits": chunk, "last hidden states": last_states}
    return {
        "a layer's backward": kept | of_layer | gathered | {"gradient of the head": head * b * trained},
        "the log-probs": kept | of_chunk | gathered | {"gradient of the head": of_head},
        "the embedding's gradient": {"embedding, head and their gradients": max(reduced, summed)},
        "the optimizer": {"the optimizer at work": 2 * 4 * largest / ranks},
    }


@dataclass(frozen=True)
class Sampling:
    """The settings that decide the sampler's memory, in addition to the model's shape."""

    prompt: int  # longest, in tokens
    response: int  # longest, in tokens
    requests: int  # responses sampled by one process
    group: int  # responses that share a prompt
    rows: int
    page_tokens: int
    cache_tokens: int
    dtype: torch.dtype = torch.bfloat16
    kernels: bool = True

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + self.response

    @property
    def pages_per_row(self) -> int:
        """Pages of the longest sequence."""
        return math.ceil(self.longest / self.page_size)

    @property
    def page_size(self) -> int:
        """Tokens of a page, as clamped by rollout.py."""
        return min(self.page_tokens, self.longest)

    @property
    def pages(self) -> int:
        """Pages of the cache, as clamped by rollout.py."""
        return min(self.cache_tokens // self.page_size, 2 * min(self.rows, self.requests) * self.pages_per_row)

    @property
    def prefill_tokens(self) -> int:
        """Tokens of the largest prefill; preempted rows are prefilled again, with their responses."""
        rows = min(self.rows, self.requests)
        if self.pages >= rows * self.pages_per_row:  # no preemption
            return max(min(LARGEST_PREFILL, math.ceil(rows / self.group) * self.prompt), self.prompt)
        return max(min(LARGEST_PREFILL, self.pages * self.page_size), self.longest)


def prefill_bytes(shape: Shape, tokens: int, dtype: torch.dtype, kernels: bool) -> float:
    """Return the peak bytes of a forward without gradients, without weights and cache."""
    b, width, queries, keys = dtype.itemsize, shape.width, shape.queries, shape.keys
    norm = 2 * width * b + 8 * width  # float32 before and after
    normed = 2 * width * b + (queries * (b + 8) + 2 * keys * b) * shape.config.qk_norm
    copies = 2 if kernels else 4  # without kernels, padded copies of queries, keys and values
    attend = 2 * width * b + copies * (queries + keys) * b
    mlp = 3 * (width + shape.inner) * b  # two hidden states and their norm; silu(gate), up and their product
    indices = 4 * shape.config.head_dim + 40  # cos and sin; tokens, positions, pages
    return tokens * (max(norm, normed, attend, mlp) + indices)


def sampling_moment(shape: Shape, sampling: Sampling) -> Moment:
    """Return the bytes of sampling without weights: cache, prefill and decode (the larger of the two if they share)."""
    rows, kernels = min(sampling.rows, sampling.requests), sampling.kernels
    prefill = prefill_bytes(shape, sampling.prefill_tokens, sampling.dtype, kernels)
    # float32: logits, their weights, and the weights padded to full blocks
    decode = rows * shape.vocabulary * 4 * (2 + bool(shape.vocabulary % DRAW_BLOCK))
    cache_tokens = sampling.pages * sampling.page_size
    cache = {f"KV cache, {cache_tokens:,} tokens": cache_tokens * cache_bytes_per_token(shape.config, sampling.dtype)}
    phases = {f"prefilling {sampling.prefill_tokens:,} tokens": prefill, f"decoding {rows} rows": decode}
    if not kernels:
        phases = dict([max(phases.items(), key=lambda phase: phase[1])])
    return cache | phases  # with kernels decode steps are CUDA graphs, whose memory is not shared


# ---------------------------------------------------------------------------------------------------- a stage


@dataclass(frozen=True)
class StagePlan:
    """One stage on one device, in bytes."""

    title: str
    sampling: Moment  # empty: the stage does not sample
    update: Moment
    moment: str  # of the update's peak
    host: Moment
    problem: str = ""  # why the stage cannot run with any memory


def plan_stages(shape: Shape, recipe: Recipe, processes: int) -> list[StagePlan]:
    """Plan all stages, and the final evaluation if there is one."""
    return [plan_stage(shape, recipe, i, processes) for i in range(len(recipe.stage) + bool(recipe.final.data))]


def plan_stage(shape: Shape, recipe: Recipe, index: int, processes: int) -> StagePlan:
    """Plan a stage on one of `processes` GPUs; the index after the last stage is the final evaluation."""
    rank, b, final = recipe.lora.rank, torch.bfloat16.itemsize, index == len(recipe.stage)
    trained = rank * shape.layers * shape.adapter or shape.parameters
    share = trained / processes
    moments = {"AdamW moments": share * 8}  # two, float32
    resident = {"frozen weights, bfloat16": shape.parameters * b} if rank else {}
    resident |= {"adapters, float32" if rank else "weights, float32": share * 4}
    resident |= {} if recipe.offload_optimizer or final else moments
    cuda = {"CUDA itself": CUDA_BYTES}
    host = {"Python, torch, CUDA": HOST_BYTES, "a shard being written": min(SHARD_BYTES, trained * 4)}

    sampling, problem = {}, ""
    if settings := stage_sampling(recipe, index, processes):
        sampling = resident | {"gathered weights, bfloat16": trained * b} | sampling_moment(shape, settings) | cuda
        if (
            recipe.sampler.cache_tokens
            and settings.pages_per_row + 1 > recipe.sampler.cache_tokens // settings.page_size
        ):
            problem = f"{recipe.sampler.cache_tokens:,} cache tokens cannot hold one sequence and a spare page"
    if final:
        return StagePlan(f"final evaluation: {settings.longest:,} tokens", sampling, {}, "", host, problem)

    tokens, predicted, title = stage_tokens(recipe, recipe.stage[index], processes)
    kept = {"recompute": recipe.recompute_activations, "offload_activations": recipe.offload_activations}
    found = update_moments(shape, Update(tokens, predicted, lora_rank=rank, processes=processes, **kept))
    peak = max(found, key=lambda name: sum(found[name].values()))
    host |= moments if recipe.offload_optimizer else {}
    if recipe.offload_activations and recipe.recompute_activations:
        host |= {"layer inputs": shape.layers * tokens * shape.width * b}
    if any(isinstance(later, RlStage) and later.rescue for later in recipe.stage[index:]):
        seen = (stage for stage in recipe.stage[: index + 1] if isinstance(stage, RlStage))
        kept = sum(stage.steps * stage.batch_problems * stage.max_response_tokens for stage in seen)
        host |= {"right responses for rescue, at most": kept * RESPONSE_SHARE * 8}  # each token with its log-prob
    held = resident | {"gradients, float32": share * 4} | found[peak] | cuda
    return StagePlan(f"stage {index}: {title}", sampling, held, peak, host, problem)


def size_cache(shape: Shape, recipe: Recipe, processes: int, memory: float) -> Recipe:
    """Return the recipe with the tokens that `cache_tokens = 0` comes to on a card of `memory` bytes, at least."""
    if recipe.sampler.cache_tokens:
        return recipe
    found, fits, most = plan_stages(shape, recipe, processes), [], []
    for index, plan in enumerate(found):
        if settings := stage_sampling(recipe, index, processes):
            rest = sum(plan.sampling.values()) - sum(sampling_moment(shape, settings).values())
            rows, free = min(settings.rows, settings.requests), int(memory - rest)
            fits.append(free_cache_tokens(free, shape.config, settings.dtype, True, rows, settings.longest))
            most.append(((rows + 2) * settings.pages_per_row + 1) * settings.page_size)  # as rollout.py allocates
    tokens = max(1, min([*fits, max(most, default=1)]))
    return replace(recipe, sampler=replace(recipe.sampler, cache_tokens=tokens))


def longest_sequence(stage: SftStage | RlStage) -> int:
    """Return the tokens of a stage's longest sequence, prompt included."""
    return stage.max_tokens if isinstance(stage, SftStage) else stage.max_prompt_tokens + stage.max_response_tokens


def stage_tokens(recipe: Recipe, stage: SftStage | RlStage, processes: int) -> tuple[int, int, str]:
    """Return the tokens of the largest micro-batch, how many of them are predicted, and a title of the stage."""
    longest = longest_sequence(stage)
    if isinstance(stage, SftStage):
        count, prompt, title = stage.batch_sequences, 0, f"sft, {longest:,} tokens"
    else:
        count, prompt = stage.batch_problems * stage.group_size, stage.max_prompt_tokens
        title = f"rl, {prompt:,} + {stage.max_response_tokens:,} tokens"
    tokens = min(max(recipe.micro_batch_tokens, longest), math.ceil(count / processes) * longest)
    return tokens, tokens - tokens // longest * prompt, f"{title}, micro-batches of at most {tokens:,}"


def stage_sampling(recipe: Recipe, index: int, processes: int) -> Sampling | None:
    """Return the largest sampling of a stage, including evaluations, or of the final evaluation; None without any."""
    stages = [stage for stage in recipe.stage if isinstance(stage, RlStage)]
    prompt = max((stage.max_prompt_tokens for stage in stages), default=1024)
    settings, sampler = recipe.final if index == len(recipe.stage) else recipe.eval, recipe.sampler
    response, group, requests = (settings.max_response_tokens if settings.data else 0), settings.samples, sampler.rows
    if index < len(recipe.stage) and isinstance(stage := recipe.stage[index], RlStage):
        response, group = max(response, stage.max_response_tokens), stage.group_size
        requests = math.ceil(stage.batch_problems / processes) * group
    if not response:
        return None
    return Sampling(prompt, response, requests, group, sampler.rows, sampler.page_tokens, sampler.cache_tokens)
