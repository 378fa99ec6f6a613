"""Will it fit? What a device and its host must hold while a recipe samples and while it updates.

    python train.py recipes/polaris-4b.toml --plan --memory-gib 80 --processes 8

Reckoned from the shapes alone: no weights, no GPU, no run folder. A step's peak is the larger of its two phases, for
the KV cache is freed before the update; the update's is the largest of its moments (a layer's backward, the
log-probs, the gradients' reduction, the optimizer). bench/plan.py holds every figure against the code it speaks of.

Letters as in model.py: T tokens, C hidden size, Q = H x D and K the widths of queries and of keys, I the MLP's width,
V vocabulary. `b` is the bytes of the compute dtype; float32 has 4.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch

from model import LOGIT_CHUNK_BYTES, SHARD_BYTES, ModelConfig, ModelError, parse_config, read_config
from recipe import Recipe, RecipeError, RlStage, SftStage
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


# ------------------------------------------------------------------------------------------------------ advice


Change = Callable[[Recipe], Recipe]


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
    return found


def fit_cache(config: ModelConfig, recipe: Recipe, index: int, processes: int, memory: float) -> Recipe:
    """The recipe with the largest cache that leaves sampling inside the memory, or the smallest that can work."""
    asked, size = stage_sampling(recipe, index, processes), recipe.sampler.page_tokens
    page = size * cache_bytes_per_token(config, torch.bfloat16)

    def with_pages(pages: int) -> Recipe:
        return replace(recipe, sampler=replace(recipe.sampler, cache_tokens=pages * size))

    least = with_pages(asked.pages_per_row + 1)
    spare = memory - sum(plan_stage(config, least, index, processes).sampling.values())
    most = min(asked.pages, asked.pages_per_row + 1 + max(0, math.floor(spare / page)))
    return with_pages(max(asked.pages_per_row + 1, most))


def advise(config: ModelConfig, recipe: Recipe, index: int, processes: int, memory: float) -> str:
    """The fewest changes that make a stage fit, as one sentence."""
    options = changes(config, recipe, index, processes, memory)
    for count in range(1, len(options) + 1):
        for chosen in combinations(options, count):
            changed = recipe
            for _, change in sorted(
                chosen, key=lambda option: option[0] == ""
            ):  # the cache takes what the others leave
                changed = change(changed)
            plan = plan_stage(config, changed, index, processes)
            if plan.peak <= memory and not plan.problem:
                words = [word or f"sampler.cache_tokens={changed.sampler.cache_tokens}" for word, _ in chosen]
                return "set " + " and ".join(words)
    return "no setting alone makes it fit: shorten the responses, use more processes or a smaller model"


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


def show_plan(recipe: Recipe, memory_gib: float, processes: int = 1) -> bool:
    """Print every stage's table and whether it fits into so much memory per device. Says whether all of them do."""
    if recipe.model.startswith("world/"):
        raise RecipeError(f"{recipe.model} is made by the run itself and fits anywhere: plan a recipe of a real model")
    if not 0 < memory_gib < math.inf or processes < 1:
        raise RecipeError(f"cannot plan for {processes} processes of {memory_gib:g} GiB: both must be above 0")
    config, where = find_config(recipe.model)
    how = f"LoRA of rank {recipe.lora.rank}" if recipe.lora.rank else "full fine-tuning"
    print(f"{recipe.name}: {recipe.model}, {model_parameters(config):,} parameters (shape from {where})")
    print(f"{how}, bfloat16 compute on CUDA, {processes} x {memory_gib:g} GiB; below, GiB of one process")
    memory, all_fit = memory_gib * GIB, True
    for index in range(len(recipe.stage) + bool(recipe.final.data)):
        plan = plan_stage(config, recipe, index, processes)
        fits = plan.peak <= memory and not plan.problem
        phase = (
            "sampling" if sum(plan.sampling.values()) > sum(plan.update.values()) else f"the update, in {plan.moment}"
        )
        line = (
            f"  {'fits' if fits else 'does not fit'}: at most {plan.peak / GIB:.1f} of {memory_gib:g} GiB, in {phase}"
        )
        line += f"; {plan.problem}" if plan.problem else ""
        line += "" if fits else f": {advise(config, recipe, index, processes, memory)}"
        print("", *table(plan), line, sep="\n")
        all_fit &= fits
    return all_fit
