"""What a recipe holds in memory, from the shapes alone: no weights, no GPU, no run folder.

A step's peak is the larger of its two phases, for the KV cache is freed before the update; the update's is the largest
of its moments (a layer's backward, the log-probs, the gradients' reduction, the optimizer). bench/plan.py compares
every figure with the bytes that the code holds. `b` is the bytes of the compute dtype; float32 has 4.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from engine.adapter import Lora, add_lora
from engine.huggingface import SHARD_BYTES
from lab.recipe import Recipe, RlStage, SftStage
from model import LOGIT_CHUNK_BYTES, ModelConfig, Transformer
from rollout import DRAW_BLOCK, LARGEST_PREFILL, cache_bytes_per_token

GIB = 2**30
# what no tensor of ours holds: the driver's own (a card of 24 GiB offers 23.6), the context with its kernels and
# workspaces (about 0.6), and what the allocator loses to rounding
CUDA_BYTES = round(1.25 * GIB)
HOST_BYTES = 3 * GIB  # Python, torch and the CUDA libraries of one process
INPUTS_IN_FLIGHT = 2  # offloaded layer inputs that are on the device at once: one in use, one on its way

Moment = dict[str, float]  # what is held -> bytes


class Shape:
    """The sizes of a model, its parameters counted on the meta device (one layer stands for all)."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.layers, self.vocabulary = config.num_hidden_layers, config.vocab_size
        self.width, self.inner = config.hidden_size, config.intermediate_size
        self.queries = config.num_attention_heads * config.head_dim  # of all heads; keys and values likewise
        self.keys = config.num_key_value_heads * config.head_dim
        with torch.device("meta"):
            model = Transformer(replace(config, num_hidden_layers=1))
        layer = model.model.layers[0]
        self.layer = sum(p.numel() for p in layer.parameters())
        # embedding, head and last norm: the group that stays gathered through forward and backward
        self.root = sum(p.numel() for p in model.parameters()) - self.layer
        self.parameters = self.layers * self.layer + self.root
        self.products = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))  # a layer's matrices
        self.head = model.lm_head.weight.numel()
        add_lora(model, Lora(1, 1.0, ""))
        self.adapter = sum(p.numel() for p in layer.parameters() if p.requires_grad)  # of one layer, per rank


# ---------------------------------------------------------------------------------------------------- one phase


@dataclass(frozen=True)
class Update:
    """What the update's memory depends on, besides the model's shape."""

    tokens: int  # T, of one micro-batch
    predicted: int  # N, the response tokens among them
    dtype: torch.dtype = torch.bfloat16  # compute
    kernels: bool = True  # fused norms and variable-length attention, as on CUDA
    recompute: bool = True
    offload_activations: bool = False
    lora_rank: int = 0
    processes: int = 1


def saved_by_layer(shape: Shape, update: Update) -> tuple[float, float]:
    """Bytes that autograd saves of one layer's forward: (up to attention's output, from the second norm on)."""
    t, b, trained, config = update.tokens, update.dtype.itemsize, not update.lora_rank, shape.config
    norm = 4 + b * trained  # the float32 input, and the normalised value if the weight that multiplies it is trained
    first = shape.width * (norm + b)  # the output is what the projections save
    if b == 4 and update.recompute:
        first -= 4 * shape.width  # nothing was converted: it is the layer's input, which is counted already
    heads = (shape.queries + shape.keys) * (norm * config.qk_norm + b)  # rotated, as attention saves it
    attended = shape.keys * b + shape.queries * b * (1 if update.kernels else 2)  # values, output (its unpadded copy)
    small = 4 * config.num_attention_heads + 2 * config.head_dim * b  # log-sum-exp; cos and sin
    adapters = 7 * update.lora_rank * b
    second = shape.width * (norm + b) + 3 * shape.inner * b  # gate, up, silu(gate) x up
    return t * (first + heads + attended + small + adapters), t * second


def update_moments(shape: Shape, update: Update) -> dict[str, Moment]:
    """The moments of forward and backward that can be the peak, each with what is held besides weights and optimizer.

    In every moment all gradients are there: from a step's second micro-batch on they are.
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
    # the layer in work and, over several processes, the one fetched ahead; the gradient being reduced is float32
    in_work = trained * shape.layer * (b * (1 if ranks == 1 else 3) + 4 + 4 / ranks)
    # a layer's backward: down_proj's gradient is there; one more tensor of the MLP's width than was saved, then two
    mlp = t * inner * b * 2 + row + trained * width * inner * b
    # attention's backward: float32 dq, dk and dv of every query head; the MLP's share is gone, its gradients are not
    wide = queries * (3 * b + 4) + keys * 2 * b + (queries * b if keys < queries else 0)
    attention = t * wide + 2 * row + trained * (3 * width * inner + width * queries) * b - after
    rows = min(n, max(1, LOGIT_CHUNK_BYTES // (4 * shape.vocabulary)))
    chunk = rows * shape.vocabulary * (4 if b == 4 else 4 + b)  # float32, and the slopes in the compute dtype
    of_head = head * (4 if b == 4 else 8) * trained  # the sum in float32, and what a chunk adds
    last_states = t * width * (4 + b) + 2 * n * width * b
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
    """What the sampler's memory depends on, besides the model's shape."""

    prompt: int  # the longest, in tokens
    response: int  # the longest
    requests: int  # responses asked of this process
    group: int  # responses that share a prompt
    rows: int
    page_tokens: int
    cache_tokens: int
    dtype: torch.dtype = torch.bfloat16
    kernels: bool = True

    @property
    def longest(self) -> int:
        """Tokens of a whole sequence."""
        return self.prompt + self.response

    @property
    def pages_per_row(self) -> int:
        """Pages of a whole sequence."""
        return math.ceil(self.longest / self.page_size)

    @property
    def page_size(self) -> int:
        """As rollout.py clamps it."""
        return self.page_tokens if self.kernels else min(self.page_tokens, self.longest)

    @property
    def pages(self) -> int:
        """As rollout.py clamps the cache."""
        return min(self.cache_tokens // self.page_size, 2 * min(self.rows, self.requests) * self.pages_per_row)

    @property
    def prefill_tokens(self) -> int:
        """Tokens of the largest prefill; rows that were preempted are prefilled again, responses and all."""
        rows = min(self.rows, self.requests)
        if self.pages >= rows * self.pages_per_row:  # nothing is ever preempted
            return max(min(LARGEST_PREFILL, math.ceil(rows / self.group) * self.prompt), self.prompt)
        return max(min(LARGEST_PREFILL, self.pages * self.page_size), self.longest)


def prefill_bytes(shape: Shape, tokens: int, dtype: torch.dtype, kernels: bool) -> float:
    """The most that a forward without gradients holds besides the weights and the cache."""
    b, width, queries, keys = dtype.itemsize, shape.width, shape.queries, shape.keys
    norm = 2 * width * b + 8 * width  # float32 before and after
    normed = 2 * width * b + (queries * (b + 8) + 2 * keys * b) * shape.config.qk_norm
    copies = 2 if kernels else 4  # without kernels queries, keys and values are laid out in padded rows
    attend = 2 * width * b + copies * (queries + keys) * b
    mlp = 3 * (width + shape.inner) * b  # two hidden states and their norm; silu(gate), up and their product
    indices = 4 * shape.config.head_dim + 40  # cos and sin; tokens, positions, pages
    return tokens * (max(norm, normed, attend, mlp) + indices)


def sampling_moment(shape: Shape, sampling: Sampling) -> Moment:
    """What sampling holds besides the weights: the cache, prefilling and decoding (the larger, where they share)."""
    rows, kernels = min(sampling.rows, sampling.requests), sampling.kernels
    prefill = prefill_bytes(shape, sampling.prefill_tokens, sampling.dtype, kernels)
    # float32: logits, their weights, and those padded to whole blocks
    decode = rows * shape.vocabulary * 4 * (2 + bool(shape.vocabulary % DRAW_BLOCK))
    cache_tokens = sampling.pages * sampling.page_size
    cache = {f"KV cache, {cache_tokens:,} tokens": cache_tokens * cache_bytes_per_token(shape.config, sampling.dtype)}
    phases = {f"prefilling {sampling.prefill_tokens:,} tokens": prefill, f"decoding {rows} rows": decode}
    if not kernels:
        phases = dict([max(phases.items(), key=lambda phase: phase[1])])
    return cache | phases  # with kernels decode steps are graphs, whose memory is theirs alone


# ---------------------------------------------------------------------------------------------------- a stage


@dataclass(frozen=True)
class StagePlan:
    """One stage on one device, in bytes."""

    title: str
    sampling: Moment  # empty: the stage does not sample
    update: Moment
    moment: str  # when the update is at its peak
    host: Moment
    problem: str = ""  # what cannot work whatever the memory

    @property
    def peak(self) -> float:
        """Of the step: the larger of the two phases."""
        return max(sum(self.sampling.values()), sum(self.update.values()))


def plan_stages(shape: Shape, recipe: Recipe, processes: int) -> list[StagePlan]:
    """Of all stages, and of the final evaluation where there is one."""
    return [plan_stage(shape, recipe, i, processes) for i in range(len(recipe.stage) + bool(recipe.final.data))]


def plan_stage(shape: Shape, recipe: Recipe, index: int, processes: int) -> StagePlan:
    """A stage's phases on one of so many GPUs; the number after the last stage is the final evaluation."""
    rank, b, final = recipe.lora.rank, torch.bfloat16.itemsize, index == len(recipe.stage)
    trained = rank * shape.layers * shape.adapter or shape.parameters
    share = trained / processes
    moments = {"AdamW moments": share * 8}  # two, float32
    standing = {"frozen weights, bfloat16": shape.parameters * b} if rank else {}
    standing |= {"adapters, float32" if rank else "weights, float32": share * 4}
    standing |= {} if recipe.offload_optimizer or final else moments
    cuda = {"CUDA itself": CUDA_BYTES}
    host = {"Python, torch, CUDA": HOST_BYTES, "a shard being written": min(SHARD_BYTES, trained * 4)}

    sampling, problem = {}, ""
    if (asked := stage_sampling(recipe, index, processes)) is not None:
        sampling = standing | {"gathered weights, bfloat16": trained * b} | sampling_moment(shape, asked) | cuda
        if (asked.pages_per_row + 1) > recipe.sampler.cache_tokens // asked.page_size:
            problem = f"{recipe.sampler.cache_tokens:,} cache tokens cannot hold one sequence and a spare page"
    if final:
        return StagePlan(f"final evaluation: {asked.longest:,} tokens", sampling, {}, "", host, problem)

    tokens, predicted, title = stage_tokens(recipe, recipe.stage[index], processes)
    kept = {"recompute": recipe.recompute_activations, "offload_activations": recipe.offload_activations}
    found = update_moments(shape, Update(tokens, predicted, lora_rank=rank, processes=processes, **kept))
    peak = max(found, key=lambda name: sum(found[name].values()))
    host |= moments if recipe.offload_optimizer else {}
    if recipe.offload_activations and recipe.recompute_activations:
        host |= {"layer inputs": shape.layers * tokens * shape.width * b}
    held = standing | {"gradients, float32": share * 4} | found[peak] | cuda
    return StagePlan(f"stage {index}: {title}", sampling, held, peak, host, problem)


def longest_sequence(stage: SftStage | RlStage) -> int:
    """Tokens, prompt and response."""
    return stage.max_tokens if isinstance(stage, SftStage) else stage.max_prompt_tokens + stage.max_response_tokens


def stage_tokens(recipe: Recipe, stage: SftStage | RlStage, processes: int) -> tuple[int, int, str]:
    """Tokens of the largest micro-batch, how many of them are predicted, and the stage in words."""
    longest = longest_sequence(stage)
    if isinstance(stage, SftStage):
        count, prompt, title = stage.batch_sequences, 0, f"sft, {longest:,} tokens"
    else:
        count, prompt = stage.batch_problems * stage.group_size, stage.max_prompt_tokens
        title = f"rl, {prompt:,} + {stage.max_response_tokens:,} tokens"
    tokens = min(max(recipe.micro_batch_tokens, longest), math.ceil(count / processes) * longest)
    return tokens, tokens - tokens // longest * prompt, f"{title}, micro-batches of at most {tokens:,}"


def stage_sampling(recipe: Recipe, index: int, processes: int) -> Sampling | None:
    """The longest that is sampled inside a stage, evaluations included, or at the end; None where nothing is."""
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
