"""Will it fit, how long does it take, what does it cost? A recipe on given cards, before any of them is rented.

    python train.py recipes/polaris-4b.toml --plan --device 80GB --gpus 8

Reckoned from the shapes alone: no weights, no GPU, no run folder. First memory: a step's peak is the larger of its two
phases, for the KV cache is freed before the update; the update's is the largest of its moments (a layer's backward,
the log-probs, the gradients' reduction, the optimizer). Then compute: tokens, FLOPs, hours. Then the words: what to
change. bench/plan.py holds every figure of memory against the code it speaks of, tests/test_plan.py those of compute.

Letters as in model.py: T tokens, C hidden size, Q = H x D and K the widths of queries and of keys, I the MLP's width,
V vocabulary. `b` is the bytes of the compute dtype; float32 has 4.
"""

import argparse
import json
import math
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path

import torch

from engine.huggingface import SHARD_BYTES
from lab.problems import read_problems
from lab.recipe import Recipe, RecipeError, RlStage, SftStage
from model import LOGIT_CHUNK_BYTES, ModelConfig, ModelError, parse_config, read_config
from rollout import DRAW_BLOCK, LARGEST_PREFILL, cache_bytes_per_token

GIB = 2**30
# what no tensor of ours holds: the driver's own (a card of 24 GiB offers 23.6), the context with its kernels and
# workspaces (about 0.6), and what the allocator loses to rounding
CUDA_BYTES = round(1.25 * GIB)
HOST_BYTES = 3 * GIB  # Python, torch and the CUDA libraries of one process
INPUTS_IN_FLIGHT = 2  # offloaded layer inputs that are on the device at once: one in use, one on its way

PUBLISHED = {  # config.json of the models that recipes/ name: read only where the model is not at hand
    "Qwen/Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151_936, True, 40_960),
    "Qwen/Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151_936, True, 40_960),
    "Qwen/Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151_936, True, 40_960),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": ("qwen2", 3584, 18_944, 28, 28, 4, 128, 152_064, False, 131_072),
}
PUBLISHED_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip

PROBLEMS = {"POLARIS-Project/Polaris-Dataset-53K": 53_000, "HuggingFaceH4/aime_2024": 30}  # where the data is not here


@dataclass(frozen=True)
class Machine:
    """So many cards, what each can do at its best, and how much of that is expected. 0 stands for not known."""

    memory_gib: float  # a card sold as 24 GB has 24 GiB
    gpus: int = 1
    name: str = ""
    tflops: float = 0.0  # bfloat16 products summed in float32, without sparsity
    bandwidth_gbs: float = 0.0  # of the card's memory, in 10^9 bytes
    price_per_hour: float = 0.0  # of one card, in dollars
    utilisation: float = 0.4  # the share of both rates that is reached
    response_tokens: int = 0  # the mean; 0: RESPONSE_SHARE of the limit

    @property
    def flops_per_s(self) -> float:
        """What is reached of one card's."""
        return self.tflops * 1e12 * self.utilisation

    @property
    def bytes_per_s(self) -> float:
        """What is reached of one card's."""
        return self.bandwidth_gbs * 1e9 * self.utilisation

    @property
    def timed(self) -> bool:
        """Whether hours can be told."""
        return min(self.flops_per_s, self.bytes_per_s) > 0


# Rates: NVIDIA's Ada GPU architecture whitepaper (appendix A, RTX 4090; a 3090 has 71 and 936) and its data sheets of
# H100 SXM and H200 SXM, whose 1,979 TFLOP/s are with sparsity. Prices are a choice: about what such cards rent for.
CARDS = {
    24.0: Machine(24, 1, "RTX 4090", 165, 1008, 0.4),
    80.0: Machine(80, 1, "H100 SXM", 989, 3350, 2.5),
    141.0: Machine(141, 1, "H200 SXM", 989, 4800, 3.5),
}
RESPONSE_SHARE = 0.4  # a choice: mean length of responses over their limit
PATIENCE_DAYS = 30  # what takes longer is called impractical
PARTS = (1, 2, 4, 8, 16)  # how many times smaller batches and responses are tried then


def find_config(name: str) -> tuple[ModelConfig, str]:
    """A model's shape and where it was read: a folder, the hub's cache, the table above. Nothing is downloaded."""
    if Path(name).is_dir():
        return read_config(Path(name)), name
    if name.count("/") == 1 and not name.startswith((".", "/")):
        from huggingface_hub import try_to_load_from_cache  # only here, so that local models need no hub

        if isinstance(cached := try_to_load_from_cache(name, "config.json"), str):
            return parse_config(json.loads(Path(cached).read_text()), cached), "the hub's cache"
    if name in PUBLISHED:
        source = dict(zip(PUBLISHED_KEYS, PUBLISHED[name], strict=True))
        return parse_config(source, name), "the table of published shapes in plan.py"
    raise ModelError(f"{name}: no model folder, not in the hub's cache and not in plan.py's table: give a local folder")


# ---------------------------------------------------------------------------------------------------- parameters


def layer_parameters(config: ModelConfig) -> int:
    """Of one decoder layer."""
    width, queries, keys = config.hidden_size, *attention_widths(config)
    projections = sum(inputs * outputs for inputs, outputs in linear_shapes(config))
    biases = (queries + 2 * keys) * config.qkv_bias
    return projections + biases + 2 * width + 2 * config.head_dim * config.qk_norm


def model_parameters(config: ModelConfig) -> int:
    """All of them."""
    return config.num_hidden_layers * layer_parameters(config) + root_parameters(config)


def linear_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of a layer's seven linear maps."""
    width, inner, queries, keys = config.hidden_size, config.intermediate_size, *attention_widths(config)
    attention = [(width, queries), (width, keys), (width, keys), (queries, width)]
    return [*attention, (width, inner), (width, inner), (inner, width)]


def attention_widths(config: ModelConfig) -> tuple[int, int]:
    """Q and K: all heads of the queries, and of the keys (or values)."""
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim


def root_parameters(config: ModelConfig) -> int:
    """Embedding, head and last norm: the group that stays gathered through forward and backward."""
    return config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2) + config.hidden_size


def adapter_parameters(config: ModelConfig, rank: int) -> int:
    """Of LoRA on every linear map of every layer."""
    return config.num_hidden_layers * rank * sum(map(sum, linear_shapes(config)))


# ---------------------------------------------------------------------------------------------------- one phase


Moment = dict[str, float]  # what is held -> bytes


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


def saved_by_layer(config: ModelConfig, update: Update) -> tuple[float, float]:
    """Bytes that autograd saves of one layer's forward: (up to attention's output, from the second norm on)."""
    t, b, trained = update.tokens, update.dtype.itemsize, not update.lora_rank
    width, inner, (queries, keys) = config.hidden_size, config.intermediate_size, attention_widths(config)
    norm = 4 + b * trained  # the float32 input, and the normalised value if the weight that multiplies it is trained
    first = width * (norm + b)  # the output is what the projections save
    if b == 4 and update.recompute:
        first -= 4 * width  # nothing was converted: it is the layer's input, which is counted already
    heads = (queries + keys) * (norm * config.qk_norm + b)  # rotated, as attention saves it
    attended = keys * b + queries * b * (1 if update.kernels else 2)  # values, output (and its unpadded copy)
    small = 4 * config.num_attention_heads + 2 * config.head_dim * b  # log-sum-exp; cos and sin
    adapters = 7 * update.lora_rank * b
    second = width * (norm + b) + 3 * inner * b  # gate, up, silu(gate) x up
    return t * (first + heads + attended + small + adapters), t * second


def update_moments(config: ModelConfig, update: Update) -> dict[str, Moment]:
    """The moments of forward and backward that can be the peak, each with what is held besides weights and optimizer.

    In every moment all gradients are there: from a step's second micro-batch on they are.
    """
    t, n, b, ranks = update.tokens, update.predicted, update.dtype.itemsize, update.processes
    width, inner, (queries, keys) = config.hidden_size, config.intermediate_size, attention_widths(config)
    layers, layer, root = config.num_hidden_layers, layer_parameters(config), root_parameters(config)
    trained = not update.lora_rank
    vocabulary = config.vocab_size * width
    before, after = saved_by_layer(config, update)
    row = t * width * b  # one hidden state of every token

    if update.recompute:
        alive = min(layers, INPUTS_IN_FLIGHT) if update.offload_activations else layers
        kept = {"layer inputs": alive * row}
        one = before + after
    else:
        kept, one = {"activations of all layers": layers * (before + after)}, 0.0
    gathered = {"gathered embedding and head": root * b * trained}
    head_gradient = {"gradient of the head": vocabulary * b * trained}
    # the layer in work and, over several processes, the one fetched ahead; the gradient being reduced is float32
    in_work = trained * layer * (b * (1 if ranks == 1 else 3) + 4 + 4 / ranks)
    # a layer's backward: down_proj's gradient is there; one more tensor of the MLP's width than was saved, then two
    mlp = t * inner * b * 2 + row + trained * width * inner * b
    # attention's backward: float32 dq, dk and dv of every query head; the MLP's share is gone, its gradients are not
    wide = queries * (3 * b + 4) + keys * 2 * b + (queries * b if config.num_key_value_heads < queries else 0)
    attention = t * wide + 2 * row + trained * (3 * width * inner + width * queries) * b - after
    moments = {
        "a layer's backward": kept
        | {"one layer, forward and backward": one + max(mlp, attention)}
        | {"that layer's weights and gradients": in_work}
        | gathered
        | head_gradient
    }
    rows = min(n, max(1, LOGIT_CHUNK_BYTES // (4 * config.vocab_size)))
    chunk = rows * config.vocab_size * (4 if b == 4 else 4 + b)  # float32, and the slopes in the compute dtype
    of_head = vocabulary * (4 if b == 4 else 8) * trained  # the sum in float32, and what a chunk adds
    moments["the log-probs"] = (
        kept
        | {"logits": chunk}
        | {"last hidden states": t * width * (4 + b) + 2 * n * width * b}
        | gathered
        | {"gradient of the head": of_head}
    )
    reduced = trained * (root * b + root * 4 * (1 + 1 / ranks))
    summed = trained * (root * b + vocabulary * b * (3 if config.tie_word_embeddings else 2)) + 2 * row
    moments["the embedding's gradient"] = {"embedding, head and their gradients": max(reduced, summed)}
    largest = max(vocabulary, width * inner) if trained else update.lora_rank * max(width + inner, width + queries)
    moments["the optimizer"] = {"the optimizer at work": 2 * 4 * largest / ranks}
    return moments


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


def prefill_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype, kernels: bool) -> float:
    """The most that a forward without gradients holds besides the weights and the cache."""
    b, width, inner, (queries, keys) = (
        dtype.itemsize, config.hidden_size, config.intermediate_size, attention_widths(config),
    )  # fmt: skip
    norm = 2 * width * b + 8 * width  # float32 before and after
    normed = 2 * width * b + (queries * (b + 8) + 2 * keys * b) * config.qk_norm
    copies = 2 if kernels else 4  # without kernels queries, keys and values are laid out in padded rows
    attend = 2 * width * b + copies * (queries + keys) * b
    mlp = 3 * (width + inner) * b  # two hidden states and their norm; silu(gate), up and their product
    indices = 4 * config.head_dim + 40  # cos and sin; tokens, positions, pages
    return tokens * (max(norm, normed, attend, mlp) + indices)


def sampling_moment(config: ModelConfig, sampling: Sampling) -> Moment:
    """What sampling holds besides the weights: the cache, prefilling and decoding (the larger, where they share)."""
    rows, kernels = min(sampling.rows, sampling.requests), sampling.kernels
    prefill = prefill_bytes(config, sampling.prefill_tokens, sampling.dtype, kernels)
    # float32: logits, their weights, and those padded to whole blocks
    decode = rows * config.vocab_size * 4 * (2 + bool(config.vocab_size % DRAW_BLOCK))
    cache_tokens = sampling.pages * sampling.page_size
    cache = {f"KV cache, {cache_tokens:,} tokens": cache_tokens * cache_bytes_per_token(config, sampling.dtype)}
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


def plan_stage(config: ModelConfig, recipe: Recipe, index: int, processes: int) -> StagePlan:
    """A stage's phases on one of so many GPUs; the number after the last stage is the final evaluation."""
    rank, dtype, final = recipe.lora.rank, torch.bfloat16, index == len(recipe.stage)
    b, weights = dtype.itemsize, model_parameters(config)
    trained = adapter_parameters(config, rank) if rank else weights
    share = trained / processes
    moments = {"AdamW moments": share * 8}  # two, float32
    standing = {"frozen weights, bfloat16": weights * b} if rank else {}
    standing |= {"adapters, float32" if rank else "weights, float32": share * 4}
    standing |= {} if recipe.offload_optimizer or final else moments
    cuda = {"CUDA itself": CUDA_BYTES}
    host = {"Python, torch, CUDA": HOST_BYTES, "a shard being written": min(SHARD_BYTES, trained * 4)}

    sampling, problem = {}, ""
    if (asked := stage_sampling(recipe, index, processes)) is not None:
        sampling = standing | {"gathered weights, bfloat16": trained * b} | sampling_moment(config, asked) | cuda
        if (asked.pages_per_row + 1) > recipe.sampler.cache_tokens // asked.page_size:
            problem = f"{recipe.sampler.cache_tokens:,} cache tokens cannot hold one sequence and a spare page"
    if final:
        return StagePlan(f"final evaluation: {asked.longest:,} tokens", sampling, {}, "", host, problem)

    tokens, predicted, title = stage_tokens(recipe, recipe.stage[index], processes)
    update = Update(
        tokens,
        predicted,
        recompute=recipe.recompute_activations,
        offload_activations=recipe.offload_activations,
        lora_rank=rank,
        processes=processes,
    )
    found = update_moments(config, update)
    peak = max(found, key=lambda name: sum(found[name].values()))
    host |= moments if recipe.offload_optimizer else {}
    if recipe.offload_activations and recipe.recompute_activations:
        host |= {"layer inputs": config.num_hidden_layers * tokens * config.hidden_size * b}
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


# ------------------------------------------------------------------------------------------------------ compute


@dataclass(frozen=True)
class Work:
    """What one phase does on all cards together, and how long that takes (0 where the card is not known)."""

    tokens: float = 0.0  # of responses
    flops: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Job:
    """Something that a recipe does so many times."""

    what: str
    times: float
    sampling: Work = Work()
    update: Work = Work()

    @property
    def hours(self) -> float:
        """Of all times together."""
        return self.times * (self.sampling.seconds + self.update.seconds) / 3600


def lengths_below(limit: int, machine: Machine) -> tuple[float, float]:
    """Mean and mean square of lengths, in tokens.

    Their shares of the limit are spread like Beta(1, 1 / m - 1) of mean m: from exponential (m near 0) over uniform
    (1/2) to all alike (1).
    """
    mean = min(machine.response_tokens or RESPONSE_SHARE * limit, limit)
    return mean, 2 * mean**2 / (1 + mean / limit)


def pair_flops(config: ModelConfig) -> int:
    """One query and one key that it sees, in all layers: the score and the value's share, 2 FLOPs a number each."""
    return 4 * config.num_hidden_layers * attention_widths(config)[0]


def layer_products(config: ModelConfig) -> int:
    """Weights of one layer that every token is multiplied by."""
    return sum(inputs * outputs for inputs, outputs in linear_shapes(config))


def update_flops(
    config: ModelConfig, tokens: float, predicted: float, pairs: float, recompute: bool, lora_rank: int = 0
) -> float:
    """FLOPs of forward and backward, what is computed twice counted twice; elementwise work is left out.

    tokens: rows of the layers' products; predicted: response tokens; pairs: of a query and a key, causal.
    """
    products, adapters = layer_products(config), lora_rank * sum(map(sum, linear_shapes(config)))
    # recomputation ends before the layer's last product, whose result no backward needs
    last = (lora_rank or config.intermediate_size) * config.hidden_size
    # forward, the input's gradient, the weight's where it is trained, and forward again; 2 each
    of_layer = products * (4 if lora_rank else 6) + adapters * 6 + 2 * (products + adapters - last) * recompute
    # forward, the same again in backward, the gradients of states and weight; a frozen head does with forward's slopes
    of_head = config.vocab_size * config.hidden_size * (4 if lora_rank else 8)
    of_pair = pair_flops(config) * (1 + 2.5 + recompute)  # backward: five products, for the scores are made again
    return config.num_hidden_layers * of_layer * tokens + of_head * predicted + of_pair * pairs


def update_work(config: ModelConfig, recipe: Recipe, stage: SftStage | RlStage, machine: Machine) -> Work:
    """One optimizer step."""
    if isinstance(stage, SftStage):
        sequences, group, prompt, limit = stage.batch_sequences, 1, 0, stage.max_tokens
    else:
        sequences, group = stage.batch_problems * stage.group_size, stage.group_size
        prompt, limit = stage.max_prompt_tokens, stage.max_response_tokens
    mean, square = lengths_below(limit, machine)
    predicted = sequences * mean
    # a prompt is computed once for those of its group that share a micro-batch
    together = max(1.0, min(group, (recipe.micro_batch_tokens - prompt) / mean))
    pairs = sequences * (prompt**2 + 2 * prompt * mean + square) / 2
    tokens = predicted + prompt * sequences / together
    flops = update_flops(config, tokens, predicted, pairs, recipe.recompute_activations, recipe.lora.rank)
    return Work(predicted, flops, flops / machine.gpus / machine.flops_per_s if machine.timed else 0.0)


def sampling_work(
    config: ModelConfig, recipe: Recipe, problems: int, group: int, prompt: int, limit: int, machine: Machine
) -> Work:
    """So many responses to each of so many problems, dealt over the cards; bound by bandwidth or by FLOPs.

    A decode step reads the weights once and every row's keys and values. There are as many steps as full rows need,
    and at least as many as the longest response has tokens, whose end no other card can hasten. Preempted rows are
    taken to cost nothing.
    """
    b = torch.bfloat16.itemsize
    mean, square = lengths_below(limit, machine)
    context = prompt + square / (2 * mean)  # of a row, on average over its life
    requests = math.ceil(problems / machine.gpus) * group  # of the busiest card
    # a row holds its context and half a page
    held = math.floor(recipe.sampler.cache_tokens / (context + recipe.sampler.page_tokens / 2))
    rows = min(requests, recipe.sampler.rows, max(1, held))
    steps = max(requests * mean / rows, limit)
    body, head = config.num_hidden_layers * layer_products(config), config.vocab_size * config.hidden_size
    token = 2 * (body + head) + pair_flops(config) * context
    token += 2 * recipe.lora.rank * config.num_hidden_layers * sum(map(sum, linear_shapes(config)))
    prefill = prompt * (2 * body + pair_flops(config) * prompt / 2)
    read = steps * (body + head) * b + requests * mean * context * cache_bytes_per_token(config, torch.bfloat16)
    flops, seconds = requests * mean * token + requests / group * prefill, 0.0
    if machine.timed:
        seconds = max(read / machine.bytes_per_s, flops / machine.flops_per_s)
    return Work(problems * group * mean, problems * group * mean * token + problems * prefill, seconds)


@cache
def count_problems(data: str) -> int:
    """Problems of a file that is here or known; 0: nobody can tell."""
    return len(read_problems(data)) if Path(data).is_file() else PROBLEMS.get(data, 0)


def stage_data(recipe: Recipe, index: int) -> str:
    """What an rl stage takes its problems from: its own data, or those of the stage before it that names any."""
    return next(s.data for s in reversed(recipe.stage[: index + 1]) if isinstance(s, RlStage) and s.data)


def uncounted(recipe: Recipe) -> list[str]:
    """Data whose pass rates or evaluations are left out of the hours, for nobody can tell how many problems it has."""
    filtered = [i for i, stage in enumerate(recipe.stage) if isinstance(stage, RlStage) and stage.filter_before]
    data = dict.fromkeys([*(stage_data(recipe, i) for i in filtered), recipe.eval.data, recipe.final.data])
    return [name for name in data if name and not count_problems(name)]


def jobs(config: ModelConfig, recipe: Recipe, machine: Machine) -> Iterator[Job]:
    """All that train.py does with a recipe: the steps, and what stands around them."""
    rl = [stage for stage in recipe.stage if isinstance(stage, RlStage)]
    prompt = max((stage.max_prompt_tokens for stage in rl), default=1024)

    def sample(problems: int, samples: int, limit: int) -> Work:
        return sampling_work(config, recipe, problems, samples, prompt, limit, machine)

    for index, stage in enumerate(recipe.stage):
        update = update_work(config, recipe, stage, machine)
        if isinstance(stage, SftStage):
            yield Job(f"stage {index}, a step", stage.steps, update=update)
            continue
        if stage.filter_before:
            if problems := count_problems(stage_data(recipe, index)):
                work = sample(problems, stage.group_size, stage.max_response_tokens)
                yield Job(f"stage {index}, pass rates of {problems:,} problems", 1, work)
        work = sample(stage.batch_problems, stage.group_size, stage.max_response_tokens)
        yield Job(f"stage {index}, a step", stage.steps, work, update)
    if rl:
        search = recipe.search
        work = sample(search.problems, search.samples, rl[0].max_response_tokens)
        yield Job("diversity before a stage", len(rl), work)
    held, final = recipe.eval, recipe.final
    if problems := count_problems(held.data):
        problems = min(problems, held.problems or problems)
        work = sample(problems, held.samples, held.max_response_tokens)
        yield Job("evaluation, around the stages", len(rl) + 1, work)
        if held.every_steps:
            problems = held.problems_within_stage or problems
            within = sum((stage.steps - 1) // held.every_steps for stage in rl)
            yield Job("evaluation, within them", within, sample(problems, held.samples, held.max_response_tokens))
    if problems := count_problems(final.data):
        work = sample(problems, final.samples, final.max_response_tokens)
        yield Job("final evaluation, YaRN on and off", 2, work)


# ------------------------------------------------------------------------------------------------------ advice


Change = Callable[[Recipe], Recipe]
HOPELESS = "no setting alone makes it fit: shorten the responses, use more processes or a smaller model"


def changes(config: ModelConfig, recipe: Recipe, index: int, processes: int, memory: float) -> list[tuple[str, Change]]:
    """What could make a stage smaller, the cheapest first: the setting, and the recipe with it."""
    found: list[tuple[str, Change]] = []
    if stage_sampling(recipe, index, processes) is not None:
        found.append(("", lambda r: fit_cache(config, r, index, processes, memory)))
    if index < len(recipe.stage):
        longest = longest_sequence(recipe.stage[index])
        if recipe.micro_batch_tokens > longest:
            found.append((f"micro_batch_tokens={longest}", lambda r: replace(r, micro_batch_tokens=longest)))
        for name in ("recompute_activations", "offload_optimizer", "offload_activations"):
            if not getattr(recipe, name):
                found.append((f"{name}=true", lambda r, name=name: replace(r, **{name: True})))
    if not recipe.lora.rank:
        found.append(("lora.rank=32", lambda r: replace(r, lora=replace(r.lora, rank=32))))
    if index == len(recipe.stage):
        half = recipe.final.max_response_tokens // 2
        shorter = replace(recipe.final, max_response_tokens=half)
        found.append((f"final.max_response_tokens={half}", lambda r: replace(r, final=shorter)))
    return found


def fit_cache(config: ModelConfig, recipe: Recipe, index: int, processes: int, memory: float) -> Recipe:
    """The recipe with the largest cache that leaves sampling inside the memory, or the smallest that can work."""
    asked, size = stage_sampling(recipe, index, processes), recipe.sampler.page_tokens
    page, least, pages = size * cache_bytes_per_token(config, torch.bfloat16), asked.pages_per_row + 1, asked.pages
    while True:  # a smaller cache preempts, and prefills more at once
        changed = replace(recipe, sampler=replace(recipe.sampler, cache_tokens=max(pages, least) * size))
        over = sum(plan_stage(config, changed, index, processes).sampling.values()) - memory
        if over <= 0 or pages <= least:
            return changed
        pages -= math.ceil(over / page)


def advise(
    config: ModelConfig, recipe: Recipe, index: int, processes: int, memory: float
) -> tuple[list[str], Recipe] | None:
    """The fewest changes that make a stage fit, as overrides, and the recipe with them; None where none do."""
    options = changes(config, recipe, index, processes, memory)
    for count in range(1, len(options) + 1):
        for chosen in combinations(options, count):
            changed = recipe
            for _, change in sorted(chosen, key=lambda option: option[0] == ""):  # the cache takes what others leave
                changed = change(changed)
            if fits(plan_stage(config, changed, index, processes), memory):
                return [word or f"sampler.cache_tokens={changed.sampler.cache_tokens}" for word, _ in chosen], changed
    return None


def fits(plan: StagePlan, memory: float) -> bool:
    """Into so many bytes."""
    return plan.peak <= memory and not plan.problem


def stages(recipe: Recipe) -> range:
    """Numbers of all stages, the final evaluation's too where there is one."""
    return range(len(recipe.stage) + bool(recipe.final.data))


def fit_recipe(config: ModelConfig, recipe: Recipe, machine: Machine) -> tuple[list[str], Recipe] | None:
    """The changes that make every stage fit, as overrides, and the recipe with them; None where none do."""
    words: dict[str, str] = {}  # by setting: a later stage may want a smaller cache
    for index in stages(recipe):
        if not fits(plan_stage(config, recipe, index, machine.gpus), machine.memory_gib * GIB):
            if (advice := advise(config, recipe, index, machine.gpus, machine.memory_gib * GIB)) is None:
                return None
            words |= {word.partition("=")[0]: word for word in advice[0]}
            recipe = advice[1]
    return list(words.values()), recipe


def days(config: ModelConfig, recipe: Recipe, machine: Machine) -> float:
    """Of the whole recipe, with the changes that make it fit; infinite where none do."""
    fitted = fit_recipe(config, recipe, machine)
    return sum(job.hours for job in jobs(config, fitted[1], machine)) / 24 if fitted else math.inf


def smaller(recipe: Recipe, batch: int = 1, length: int = 1, known: bool = False) -> Recipe:
    """The recipe with batches, and all responses, so many times smaller; known: no pass rates are estimated."""

    def cut(settings: typing.Any) -> typing.Any:
        settings = replace(settings, max_response_tokens=max(1, settings.max_response_tokens // length))
        if isinstance(settings, RlStage):
            filtered = settings.filter_before and not known
            settings = replace(
                settings, batch_problems=max(1, settings.batch_problems // batch), filter_before=filtered
            )
        return settings

    stages = tuple(cut(stage) if isinstance(stage, RlStage) else stage for stage in recipe.stage)
    return replace(recipe, stage=stages, eval=cut(recipe.eval), final=cut(recipe.final))


def ways_out(config: ModelConfig, recipe: Recipe, machine: Machine) -> Iterator[tuple[str, str, float]]:
    """What would make a plan practical: the kind of change, the least of it that does, and the days that it then takes.

    Each kind alone, then together. Where no amount does, the best that was tried, with its days.
    """
    rl = [stage for stage in recipe.stage if isinstance(stage, RlStage)]
    batch, limit = max(s.batch_problems for s in rl), max(s.max_response_tokens for s in rl)
    cards = [n for k in range(1, 12) if (n := machine.gpus * 2**k) <= batch]
    models = {name: find_config(name)[0] for name in PUBLISHED}
    models = {name: model for name, model in models.items() if model_parameters(model) < model_parameters(config)}
    parts = [n for n in PARTS if n <= min(batch, limit)]

    def together(model: ModelConfig) -> list[tuple[str, ModelConfig, Recipe, Machine]]:
        cuts = sorted(product(parts, repeat=2), key=lambda cut: (cut[0] * cut[1], cut[0]))
        words = [f"batch_problems={batch // b}, at most {limit // n:,} tokens" for b, n in cuts]
        return [(w, model, smaller(recipe, b, n, known=True), machine) for w, (b, n) in zip(words, cuts, strict=True)]

    kinds = {  # what is tried: words, and the plan
        "more cards": [(f"--gpus {n}", config, recipe, replace(machine, gpus=n)) for n in cards],
        "smaller batches": [(f"batch_problems={batch // n}", config, smaller(recipe, n), machine) for n in parts[1:]],
        "shorter responses": [
            (f"at most {limit // n:,} tokens", config, smaller(recipe, 1, n), machine) for n in parts[1:]
        ],
        "a smaller model": [(name, model, recipe, machine) for name, model in reversed(models.items())],
        "pass rates known beforehand": together(config),
    }
    for name, model in list(models.items())[:1]:  # the smallest
        kinds[f"{name}, pass rates known beforehand"] = together(model)
    for kind, tried in kinds.items():
        best = ("", math.inf)
        for words, *plan in tried:
            best = min(best, (words, days(*plan)), key=lambda way: way[1])
            if best[1] <= PATIENCE_DAYS:
                break
        if best[0]:
            yield kind, *best


# ------------------------------------------------------------------------------------------------------- output


def table(plan: StagePlan) -> list[str]:
    """What is held, a line each, in GiB."""
    lines = [plan.title, f"  {'GiB':46}{'sampling':>10}{'update':>10}{'host':>10}"]
    for what in dict.fromkeys([*plan.sampling, *plan.update, *plan.host]):
        values = [phase.get(what, 0) for phase in (plan.sampling, plan.update, plan.host)]
        if any(values):
            lines.append(f"  {what:46}" + "".join(f"{v / GIB:10.2f}" if v else " " * 10 for v in values))
    totals = [sum(phase.values()) / GIB for phase in (plan.sampling, plan.update, plan.host)]
    lines.append(f"  {'together':46}" + "".join(f"{v:10.2f}" if v else " " * 10 for v in totals))
    return lines


def cost_table(found: list[Job], machine: Machine) -> list[str]:
    """Tokens, FLOPs and hours of each job, a line each."""
    lines = [
        f"  {'':38}{'':>6}{'tokens':>11}{'PFLOP once':>11}{'':>10}{'hours once':>12}{'':>9}{'hours':>10}",
        f"  {'':38}{'times':>6}{'once':>11}{'sampling':>11}{'update':>10}{'sampling':>12}{'update':>9}{'in all':>10}",
    ]
    for job in found:
        phases = (job.sampling, job.update)
        line = f"  {job.what:38}{job.times:6}{short(max(work.tokens for work in phases)):>11}"
        for work, width in zip(phases, (11, 10), strict=True):
            line += f"{f'{work.flops / 1e15:,.0f}' if work.flops else '':>{width}}"
        if machine.timed:
            hours = (job.sampling.seconds / 3600, job.update.seconds / 3600, job.hours)
            for value, width in zip(hours, (12, 9, 10), strict=True):
                line += f"{f'{value:,.2f}' if 0 < value < 100 else f'{value:,.0f}' if value else '':>{width}}"
        lines.append(line)
    return lines


def short(count: float) -> str:
    """A large number in thousands, millions or billions."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return f"{count:.0f}"


def show_plan(recipe: Recipe, machine: Machine) -> bool:
    """Print every stage's memory, then tokens, FLOPs, hours and cost. Says whether all stages fit."""
    if recipe.model.startswith("world/"):
        raise RecipeError(f"{recipe.model} is made by the run itself and fits anywhere: plan a recipe of a real model")
    config, where = find_config(recipe.model)
    how = f"LoRA of rank {recipe.lora.rank}" if recipe.lora.rank else "full fine-tuning"
    print(f"{recipe.name}: {recipe.model}, {model_parameters(config):,} parameters (shape from {where})")
    print(f"{how}, bfloat16 compute on CUDA, {machine.gpus} x {machine.memory_gib:g} GiB; below, GiB of one process")
    memory, all_fit = machine.memory_gib * GIB, True
    for index in stages(recipe):
        plan = plan_stage(config, recipe, index, machine.gpus)
        does = fits(plan, memory)
        sampling = sum(plan.sampling.values()) > sum(plan.update.values())
        phase = "sampling" if sampling else f"the update, in {plan.moment}"
        line = f"  {'fits' if does else 'does not fit'}: at most {plan.peak / GIB:.1f} of {machine.memory_gib:g} GiB"
        line += f", in {phase}" + (f"; {plan.problem}" if plan.problem else "")
        if not does:
            advice = advise(config, recipe, index, machine.gpus, memory)
            line += f": set {' and '.join(advice[0])}" if advice else f": {HOPELESS}"
        print("", *table(plan), line, sep="\n")
        all_fit &= does
    show_cost(config, recipe, machine)
    return all_fit


def show_cost(config: ModelConfig, recipe: Recipe, machine: Machine) -> None:
    """Print what the recipe takes, as it would fit, and what would make it practical."""
    words, fitted = fit_recipe(config, recipe, machine) or (["as if it fitted"], recipe)
    print(f"\ntime and cost{', with ' * bool(words)}{' and '.join(words)}")
    mean = f"{machine.response_tokens:,} tokens" if machine.response_tokens else f"{RESPONSE_SHARE:.0%} of their limit"
    print(f"  assumed: responses of {mean} in the mean, prompts at theirs")
    if machine.timed:
        rates = f"{machine.tflops:g} TFLOP/s and {machine.bandwidth_gbs:g} GB/s"
        print(f"  assumed: {machine.utilisation:.0%} of {rates}{f', as of an {machine.name}' * bool(machine.name)}")
    else:
        print(f"  nothing is known of a card of {machine.memory_gib:g} GB: hours want --tflops and --bandwidth-gbs")
    found = list(jobs(config, fitted, machine))
    print(*cost_table(found, machine), sep="\n")
    tokens = sum(job.times * max(job.sampling.tokens, job.update.tokens) for job in found)
    flops = sum(job.times * (job.sampling.flops + job.update.flops) for job in found)
    print(f"  together: {short(tokens)} tokens of responses, {flops:.2g} FLOP")
    if left_out := uncounted(recipe):
        print(f"  not counted: what is sampled of {', '.join(left_out)}, which is not here to count its problems")
    hours = sum(job.hours for job in found)
    if not machine.timed:
        return
    cards = f"{machine.gpus} card{'s' * (machine.gpus > 1)}"
    cost = f"${hours * machine.gpus * machine.price_per_hour:,.0f} at ${machine.price_per_hour:g} an hour and card"
    cost = cost if machine.price_per_hour else "the cost wants --price-per-hour"
    print(f"  {hours:,.0f} hours ({hours / 24:,.1f} days) on {cards}; {cost}")
    if hours / 24 > PATIENCE_DAYS and any(isinstance(stage, RlStage) for stage in recipe.stage):
        slowest = max(job.hours / job.times for job in found if job.update.flops)
        print(f"  impractical: up to {slowest:,.1f} hours a step. What would be done in {PATIENCE_DAYS} days:")
        for kind, way, took in ways_out(config, recipe, machine):
            print(f"    {kind}: {way}, {took:,.1f} days{' (not enough)' * (took > PATIENCE_DAYS)}")


# ------------------------------------------------------------------------------------------------- the command


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """The options of --plan."""
    group = parser.add_argument_group("for --plan")
    known = ", ".join(f"{card.memory_gib:g}GB ({card.name})" for card in CARDS.values())
    group.add_argument("--device", default="24GB", metavar="GB", help=f"memory of one card; rates are known of {known}")
    group.add_argument("--gpus", type=int, default=1, metavar="N", help="cards, a process on each")
    group.add_argument("--tflops", type=float, help="of one card, bfloat16 without sparsity; default: the known card's")
    group.add_argument("--bandwidth-gbs", type=float, help="of its memory, in GB/s; default: the known card's")
    group.add_argument(
        "--price-per-hour", type=float, help="of one card, in dollars; default: about what the known one rents for"
    )
    group.add_argument("--utilisation", type=float, default=0.4, help="share of both rates reached (default 0.4)")
    group.add_argument(
        "--response-tokens",
        type=int,
        default=0,
        metavar="N",
        help=f"in the mean; default {RESPONSE_SHARE} of the limit",
    )


def read_machine(arguments: argparse.Namespace) -> Machine:
    """What the options of --plan describe. Raises RecipeError."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB|GiB)?", arguments.device, re.IGNORECASE)
    if not size or not float(size[1]):
        raise RecipeError(f"--device {arguments.device}: write the memory of one card, such as 24GB")
    memory = float(size[1])
    given = {name: getattr(arguments, name) for name in ("tflops", "bandwidth_gbs", "price_per_hour")}
    given = {name: value for name, value in given.items() if value is not None}
    given |= {"gpus": arguments.gpus, "utilisation": arguments.utilisation}
    for name, value in given.items():
        if not 0 < value < math.inf or (name == "utilisation" and value > 1):
            bound = "and at most 1" if name == "utilisation" else "and finite"
            raise RecipeError(f"--{name.replace('_', '-')} {value:g}: it must be above 0 {bound}")
    if arguments.response_tokens < 0:
        raise RecipeError(f"--response-tokens {arguments.response_tokens}: it must be above 0, or left out")
    return replace(CARDS.get(memory, Machine(memory)), **given, response_tokens=arguments.response_tokens)
