"""Estimate whether a recipe fits on given GPUs, how long it takes and what it costs.

    python train.py recipes/polaris-4b.toml --plan --device 80GB --gpus 8

Uses shapes only: no weights and no GPU; if the recipe is in a run's folder, the run's own steps correct the hours.
Prints each stage's memory (plan_memory.py), settings that make it fit, then tokens, FLOPs, hours and cost.
tests/test_plan.py compares FLOPs and hours with torch's counter and the sampler's roofline.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, pairwise
from pathlib import Path

import torch

from data_filter import History
from engine.memory import host_memory_bytes
from lab import premises
from lab.machine import RESPONSE_SHARE, Machine
from lab.metrics import read_metrics
from lab.plan_memory import GIB, Shape, StagePlan, longest_sequence, plan_stages, size_cache, stage_sampling
from lab.problems import prompt_text, read_problems
from lab.recipe import Recipe, RecipeError, RlStage, SftStage, how_to_read
from lab.run_data import rl_source
from model import ModelError, parse_config, read_config
from rollout import cache_bytes_per_token

PUBLISHED = {  # config.json of known models, for when the model is not on this machine
    "Qwen/Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151_936, True, 40_960, 1e6),
    "Qwen/Qwen3-0.6B-Base": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151_936, True, 32_768, 1e6),
    "Qwen/Qwen3-1.7B-Base": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151_936, True, 32_768, 1e6),
    "Qwen/Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151_936, True, 40_960, 1e6),
    "Qwen/Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151_936, True, 40_960, 1e6),
    "Qwen/Qwen2.5-3B-Instruct": ("qwen2", 2048, 11_008, 36, 16, 2, 128, 151_936, True, 32_768, 1e6),
    "Qwen/Qwen2.5-Math-7B": ("qwen2", 3584, 18_944, 28, 28, 4, 128, 152_064, False, 4096, 1e4),
    "Qwen/Qwen2.5-32B": ("qwen2", 5120, 27_648, 64, 40, 8, 128, 152_064, False, 131_072, 1e6),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151_936, False, 131_072, 1e4),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": ("qwen2", 3584, 18_944, 28, 28, 4, 128, 152_064, False, 131_072, 1e4),
}
PUBLISHED_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "max_position_embeddings",
    "rope_theta",
)  # fmt: skip

PROBLEMS = {  # of data that is not local, by hub id without the split
    "POLARIS-Project/Polaris-Dataset-53K": 53_000,
    "HuggingFaceH4/aime_2024": 30,
    "HuggingFaceH4/MATH-500": 500,
    "rasbt/math_full_minus_math500": 12_000,
    "openai/gsm8k:main/train": 7473,
    "openai/gsm8k:main/test": 1319,
}
PATIENCE_DAYS = 30  # a longer run is called impractical


def find_shape(name: str) -> tuple[Shape, str]:
    """Return a model's shape and its source: a folder, the hub's cache or PUBLISHED. Downloads nothing."""
    if Path(name).is_dir():
        return Shape(read_config(Path(name))), name
    if name.count("/") == 1 and not name.startswith((".", "/")):
        from huggingface_hub import try_to_load_from_cache  # local models do not need it

        if isinstance(cached := try_to_load_from_cache(name, "config.json"), str):
            return Shape(parse_config(json.loads(Path(cached).read_text(encoding="utf-8")), cached)), "the hub's cache"
    if name in PUBLISHED:
        source = dict(zip(PUBLISHED_KEYS, PUBLISHED[name], strict=True))
        return Shape(parse_config(source, name)), "the table of published shapes in plan.py"
    raise ModelError(f"{name}: no model folder, not in the hub's cache and not in plan.py's table; give a local folder")


# ------------------------------------------------------------------------------------------------------ compute


@dataclass(frozen=True)
class Work:
    """One phase on all GPUs together; `seconds` is 0 if the GPU's rates are unknown."""

    tokens: float = 0.0  # of responses
    flops: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Job:
    """A part of a run that is repeated `times` times."""

    what: str
    times: float
    sampling: Work = Work()
    update: Work = Work()

    @property
    def hours(self) -> float:
        """Hours of all repetitions."""
        return self.times * (self.sampling.seconds + self.update.seconds) / 3600


def lengths_below(limit: int, machine: Machine) -> tuple[float, float]:
    """Return the mean and the mean square of response lengths, in tokens.

    Length / limit has the distribution Beta(1, 1 / m - 1) with mean m: near exponential for small m, uniform at 1/2,
    constant at 1.
    """
    mean = min(machine.response_tokens or RESPONSE_SHARE * limit, limit)
    return mean, 2 * mean**2 / (1 + mean / limit)


def pair_flops(shape: Shape) -> int:
    """Return the FLOPs of one query and one key in all layers: score and weighted value, 2 FLOPs per element each."""
    return 4 * shape.layers * shape.queries


def update_flops(
    shape: Shape, tokens: float, predicted: float, pairs: float, recompute: bool, lora_rank: int = 0
) -> float:
    """Return the FLOPs of forward, backward and recomputation, without elementwise operations.

    tokens: rows of the layers' matrix products; predicted: response tokens; pairs: causal pairs of a query and a key.
    """
    products, adapters = shape.products, lora_rank * shape.adapter
    # recomputation stops before the layer's last product: backward does not need its result
    last = (lora_rank or shape.inner) * shape.width
    # 2 each: forward, gradient of the input, gradient of a trained weight, recomputed forward
    of_layer = products * (4 if lora_rank else 6) + adapters * 6 + 2 * (products + adapters - last) * recompute
    # 2 each: forward, recomputed forward, gradients of states and weight; a frozen head recomputes nothing
    of_head = shape.head * (4 if lora_rank else 8)
    of_pair = pair_flops(shape) * (1 + 2.5 + recompute)  # backward: five products, as it recomputes the scores
    return shape.layers * of_layer * tokens + of_head * predicted + of_pair * pairs


def update_work(shape: Shape, recipe: Recipe, stage: SftStage | RlStage, machine: Machine) -> Work:
    """Return the work of one optimizer step."""
    if isinstance(stage, SftStage):
        sequences, group, prompt, limit = stage.batch_sequences, 1, 0, stage.max_tokens
    else:
        sequences, group = stage.batch_problems * stage.group_size, stage.group_size
        prompt, limit = stage.max_prompt_tokens, stage.max_response_tokens
    mean, square = lengths_below(limit, machine)
    predicted = sequences * mean
    # responses of a group in the same micro-batch share the computation of their prompt
    sharing = max(1.0, min(group, (recipe.micro_batch_tokens - prompt) / mean))
    pairs = sequences * (prompt**2 + 2 * prompt * mean + square) / 2
    tokens = predicted + prompt * sequences / sharing
    flops = update_flops(shape, tokens, predicted, pairs, recipe.recompute_activations, recipe.lora.rank)
    return Work(predicted, flops, machine.seconds(flops / machine.gpus))


def sampling_work(
    shape: Shape, recipe: Recipe, problems: int, group: int, prompt: int, limit: int, machine: Machine
) -> Work:
    """Return the work of sampling `group` responses to each of `problems` problems, bound by bandwidth or by FLOPs.

    A decode step reads the weights once and every row's keys and values. The number of steps is what full rows need,
    but at least the tokens of the longest response, which more GPUs do not shorten. Preemption is assumed to be free.
    """
    mean, square = lengths_below(limit, machine)
    context = prompt + square / (2 * mean)  # average over a row's lifetime
    requests = math.ceil(problems / machine.gpus) * group  # on the busiest GPU
    # rows that fit into the cache; a row holds its context and half a page
    held = math.floor(recipe.sampler.cache_tokens / (context + recipe.sampler.page_tokens / 2))
    rows = min(requests, recipe.sampler.rows, max(1, held))
    steps = max(requests * mean / rows, limit)
    body, head = shape.layers * shape.products, shape.head
    token = 2 * (body + head) + pair_flops(shape) * context + 2 * recipe.lora.rank * shape.layers * shape.adapter
    prefill = prompt * (2 * body + pair_flops(shape) * prompt / 2)
    read = steps * (body + head) * torch.bfloat16.itemsize
    read += requests * mean * context * cache_bytes_per_token(shape.config, torch.bfloat16)
    seconds = machine.seconds(requests * mean * token + requests / group * prefill, read)
    return Work(problems * group * mean, problems * group * mean * token + problems * prefill, seconds)


@cache
def count_problems(data: str, *reading) -> int:
    """Return the number of problems of a local file or folder or of a set in PROBLEMS, else 0."""
    if data and Path(data).exists():
        return len(read_problems(data, *reading))
    return PROBLEMS.get(data) or PROBLEMS.get(data.partition(":")[0], 0)


@cache
def mean_prompt(model: str, data: str, instruction: str, thinking: bool | str = "auto", *reading) -> int:
    """Return the mean tokens of the prompts of a local file, by a local model's tokenizer; 0 if either is missing."""
    if not Path(data).exists() or not (Path(model) / "tokenizer_config.json").is_file():
        return 0
    from engine.tokenizer import read_chat, read_tokenizer  # slow to import, and only here

    chat = read_chat(read_tokenizer(Path(model)), thinking)
    texts = [prompt_text(problem, instruction) for problem in read_problems(data, *reading)]
    lengths = [len(chat.prompt([{"role": "user", "content": text}])) for text in texts]
    return round(sum(lengths) / max(1, len(lengths)))


def stage_prompt(recipe: Recipe, index: int) -> int:
    """Return the mean tokens of the prompts of an rl stage, 0 if unknown."""
    data = rl_source(recipe, index)
    return mean_prompt(recipe.model, data, recipe.instruction, recipe.thinking, *how_to_read(recipe, data))


def uncounted(recipe: Recipe) -> list[str]:
    """Return the data left out of the hours: sampled for pass rates or evaluations, of unknown size."""
    filtered = [i for i, stage in enumerate(recipe.stage) if isinstance(stage, RlStage) and stage.filter_before]
    data = dict.fromkeys([*(rl_source(recipe, i) for i in filtered), recipe.eval.data, recipe.final.data])
    return [name for name in data if name and not count_problems(name, *how_to_read(recipe, name))]


def with_mean_prompt(recipe: Recipe, index: int) -> SftStage | RlStage:
    """Return a stage whose prompts have the mean length of its data, where that is on this machine."""
    stage = recipe.stage[index]
    if isinstance(stage, SftStage):
        return stage
    mean = stage_prompt(recipe, index)
    return replace(stage, max_prompt_tokens=min(mean or stage.max_prompt_tokens, stage.max_prompt_tokens))


def steps_of(stage: SftStage | RlStage, update: Work) -> int:
    """Return the steps of a stage, which may end earlier by its budget of generated tokens."""
    if isinstance(stage, SftStage) or not stage.generated_tokens:
        return stage.steps
    return min(stage.steps, math.ceil(stage.generated_tokens / update.tokens))


def jobs(shape: Shape, recipe: Recipe, machine: Machine) -> Iterator[Job]:
    """Yield the parts of a run: steps, pass rates, diversity searches and evaluations."""
    stages = [with_mean_prompt(recipe, index) for index in range(len(recipe.stage))]
    updates = [update_work(shape, recipe, stage, machine) for stage in stages]
    stages = [replace(stage, steps=steps_of(stage, work)) for stage, work in zip(stages, updates, strict=True)]
    rl = [stage for stage in stages if isinstance(stage, RlStage)]
    prompt = max((stage.max_prompt_tokens for stage in rl), default=1024)

    def sample(problems: int, samples: int, limit: int) -> Work:
        return sampling_work(shape, recipe, problems, samples, prompt, limit, machine)

    for index, (stage, update) in enumerate(zip(stages, updates, strict=True)):
        if isinstance(stage, SftStage):
            yield Job(f"stage {index}, a step", stage.steps, update=update)
            continue
        data = rl_source(recipe, index)
        if stage.filter_before and (problems := count_problems(data, *how_to_read(recipe, data))):
            work = sample(problems, stage.group_size, stage.max_response_tokens)
            yield Job(f"stage {index}, pass rates of {problems:,} problems", 1, work)
        work = sample(stage.batch_problems, stage.group_size, stage.max_response_tokens)
        yield Job(f"stage {index}, a step", stage.steps, work, update)
    if rl:
        work = sample(recipe.search.problems, recipe.search.samples, rl[0].max_response_tokens)
        yield Job("diversity before a stage", len(rl), work)
    held, final = recipe.eval, recipe.final
    if known := count_problems(held.data, *how_to_read(recipe, held.data)):
        problems = min(known, held.problems or known)
        work = sample(problems, held.samples, held.max_response_tokens)
        yield Job("evaluation, around the stages", len(rl) + 1, work)
        if held.every_steps:
            problems = min(known, held.problems_within_stage or problems)
            within = sum((stage.steps - 1) // held.every_steps for stage in rl)
            yield Job("evaluation, within them", within, sample(problems, held.samples, held.max_response_tokens))
    if problems := count_problems(final.data, *how_to_read(recipe, final.data)):
        work = sample(problems, final.samples, final.max_response_tokens)
        yield Job("final evaluation, YaRN on and off", 2, work)


# ------------------------------------------------------------------------------------------------------ advice


def excess(plans: list[StagePlan], machine: Machine) -> float:
    """Return the bytes that all phases need beyond a GPU's memory; infinite if a stage cannot run with any memory."""
    if any(plan.problem for plan in plans):
        return math.inf
    phases = [sum(phase.values()) for plan in plans for phase in (plan.sampling, plan.update)]
    return sum(max(0.0, phase - machine.memory_gib * GIB) for phase in phases)


def fit_cache(shape: Shape, recipe: Recipe, machine: Machine) -> Recipe:
    """Return the recipe with the largest cache with which sampling fits, or else the smallest cache that can work."""
    size = recipe.sampler.page_tokens
    page = size * cache_bytes_per_token(shape.config, torch.bfloat16)
    while True:  # repeated: a smaller cache preempts, which makes prefills larger
        plans = plan_stages(shape, recipe, machine.gpus)
        sampled = [s for i in range(len(plans)) if (s := stage_sampling(recipe, i, machine.gpus))]
        pages = max((s.pages for s in sampled), default=0)
        least = max((s.pages_per_row + 1 for s in sampled), default=0)
        over = max(sum(plan.sampling.values()) for plan in plans) - machine.memory_gib * GIB
        if pages == least or (pages > least and over <= 0):
            return recipe
        pages = max(pages - math.ceil(max(over, 0) / page), least)
        recipe = replace(recipe, sampler=replace(recipe.sampler, cache_tokens=pages * size))


def fit_recipe(shape: Shape, recipe: Recipe, machine: Machine) -> tuple[list[str], Recipe] | None:
    """Return settings that make every stage fit, and the recipe with them; None if all together are not enough.

    Settings are added in order, those that change the run least first, until it fits; useless ones are dropped.
    """
    shortest, half = min(map(longest_sequence, recipe.stage)), recipe.final.max_response_tokens // 2
    settings = {
        f"micro_batch_tokens={shortest}": ("micro_batch_tokens", shortest),
        "recompute_activations=true": ("recompute_activations", True),
        "offload_optimizer=true": ("offload_optimizer", True),
        "offload_activations=true": ("offload_activations", True),
        f"final.max_response_tokens={half}": ("final", replace(recipe.final, max_response_tokens=half)),
        "lora.rank=32": ("lora", replace(recipe.lora, rank=32)),
    }

    def apply(words: list[str]) -> Recipe:  # the cache gets the memory that the other settings leave
        return fit_cache(shape, replace(recipe, **dict(settings[word] for word in words)), machine)

    def missing(words: list[str]) -> float:
        return excess(plan_stages(shape, apply(words), machine.gpus), machine)

    chosen: list[str] = []
    for word in settings:
        if missing(chosen) > missing([*chosen, word]):
            chosen.append(word)
    if missing(chosen):
        return None
    for word in chosen[::-1]:  # a later setting may have made it unnecessary
        if not missing(others := [other for other in chosen if other != word]):
            chosen = others
    fitted = apply(chosen)
    cache = [f"sampler.cache_tokens={fitted.sampler.cache_tokens}"] if fitted.sampler != recipe.sampler else []
    return chosen + cache, fitted


# ------------------------------------------------------------------------------------------------------- output


def memory_table(plan: StagePlan) -> list[str]:
    """Return a line of GiB for each thing held in memory."""
    phases = (plan.sampling, plan.update, plan.host)
    rows = {name: [phase.get(name, 0) for phase in phases] for name in dict.fromkeys(chain(*phases))}
    rows["together"] = [sum(phase.values()) for phase in phases]
    lines = [plan.title, f"  {'GiB':46}{'sampling':>10}{'update':>10}{'host':>10}"]
    for name, values in rows.items():
        if any(values):
            lines.append(f"  {name:46}" + "".join(cell(value / GIB, 10, 2) for value in values))
    return lines


def cost_table(found: list[Job], machine: Machine) -> list[str]:
    """Return a line of tokens, FLOPs and hours for each job."""
    lines = [
        f"  {'':38}{'':>6}{'tokens':>11}{'PFLOP once':>11}{'':>10}{'hours once':>12}{'':>9}{'hours':>10}",
        f"  {'':38}{'times':>6}{'once':>11}{'sampling':>11}{'update':>10}{'sampling':>12}{'update':>9}{'in all':>10}",
    ]
    for job in found:
        sampling, update = job.sampling, job.update
        line = f"  {job.what:38}{job.times:6}{short(max(sampling.tokens, update.tokens)):>11}"
        line += cell(sampling.flops / 1e15, 11) + cell(update.flops / 1e15, 10)
        for hours, width in ((sampling.seconds / 3600, 12), (update.seconds / 3600, 9), (job.hours, 10)):
            line += cell(hours, width, 2 if hours < 100 else 0)
        lines.append(line.rstrip())
    return lines


def cell(value: float, width: int, decimals: int = 0) -> str:
    """Format a number, or blanks for 0."""
    return f"{value:{width},.{decimals}f}" if value else " " * width


def short(count: float) -> str:
    """Format a large number in thousands, millions or billions."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return f"{count:.0f}"


def hours_by_run(found: list[Job], run: Path) -> str:
    """Say how long a run's own steps make the plan's hours; empty with fewer than two.

    The first step of a stage compiles kernels and allocates memory: it does not count. Skipped updates do.
    """
    planned = {job.what: job for job in found if job.sampling.seconds and job.update.seconds}
    rows = [row for row in read_metrics(run) if row.get("kind") == "rl"] if (run / "metrics.jsonl").exists() else []
    rows = [row for last, row in pairwise(rows) if row["stage"] == last["stage"]]
    steps = [(row, planned[name]) for row in rows if (name := f"stage {row['stage']}, a step") in planned]
    if len(steps) < 2:
        return ""
    sampled = sum(row["seconds_sample"] + row.get("seconds_grade", 0.0) for row, _ in steps)
    sampling = sampled / sum(job.sampling.seconds for _, job in steps)
    update = sum(row["seconds_update"] for row, _ in steps) / sum(job.update.seconds for _, job in steps)
    seconds = sum(job.times * (sampling * job.sampling.seconds + update * job.update.seconds) for job in found)
    times = f"{sampling:.2g} times the planned sampling, {update:.2g} times the update"
    return f"  by {len(steps)} steps of {run} (in each {times}): {seconds / 3600:,.1f} hours in all"


def show_plan(recipe: Recipe, machine: Machine, run: Path | None = None) -> bool:
    """Print every stage's memory, then tokens, FLOPs, hours and cost. Return whether all stages fit.

    If the folder `run` has the steps of a run, hours are also given by these.
    """
    if recipe.model.startswith("world/"):
        raise RecipeError(f"{recipe.model} is made by the run itself and fits anywhere; plan a recipe of another model")
    shape, where = find_shape(recipe.model)
    how = f"LoRA of rank {recipe.lora.rank}" if recipe.lora.rank else "full fine-tuning"
    print(f"{recipe.name}: {recipe.model}, {shape.parameters:,} parameters (shape from {where})")
    print(f"{how}, bfloat16 compute on CUDA, {machine.gpus} x {machine.memory_gib:g} GiB; below, GiB of one process")
    if not recipe.sampler.cache_tokens:
        recipe = size_cache(shape, recipe, machine.gpus, machine.memory_gib * GIB)
        tokens = recipe.sampler.cache_tokens
        size = f"{tokens:,} tokens" if tokens > 1 else "nothing: no memory is left"
        print(f"cache_tokens = 0 comes to {size} on this card")
    plans = plan_stages(shape, recipe, machine.gpus)
    for plan in plans:
        sampling, update = sum(plan.sampling.values()), sum(plan.update.values())
        verdict = "does not fit" if excess([plan], machine) else "fits"
        phase = "sampling" if sampling > update else f"the update, in {plan.moment}"
        line = f"  {verdict}: at most {max(sampling, update) / GIB:.1f} of {machine.memory_gib:g} GiB, in {phase}"
        left = machine.memory_gib - max(sampling, update) / GIB
        line += f"; {left:.1f} GiB left" * (left >= 0)
        setting = "sampler.cache_tokens" if sampling > update else "micro_batch_tokens"
        line += f", too little beside a desktop: lower {setting}" * (0 <= left < 1)
        print("", *memory_table(plan), line + f"; {plan.problem}" * bool(plan.problem), sep="\n")
    fits = not excess(plans, machine)
    found = None if fits else fit_recipe(shape, recipe, machine)
    if fits:
        print("\ntime and cost")
    elif found:
        words, recipe = " and ".join(found[0]), found[1]
        print(f"\nto make it fit: set {words}\n\ntime and cost, with {words}")
    else:
        print("\nno setting makes it fit: shorten the responses, use more cards or a smaller model")
        print("\ntime and cost, as if it fitted")
    needed = machine.gpus * max(sum(plan.host.values()) for plan in plan_stages(shape, recipe, machine.gpus))
    if needed > (memory := host_memory_bytes()):
        print(f"  needs {needed / GIB:.0f} GiB of host memory, this machine has {memory / GIB:.0f}")
    show_cost(shape, recipe, machine, run)
    first = next((i for i, stage in enumerate(recipe.stage) if isinstance(stage, RlStage)), None)
    if first is not None:
        rates, data = run and run / f"pass-rates-{first}.jsonl", rl_source(recipe, first)
        history = History.load(rates) if rates and rates.exists() else History()
        ids = list(history.by_problem) or [""] * count_problems(data, *how_to_read(recipe, data))
        print(f"\npremises of {premises.expect(recipe, first, history, ids, shape.config.rope)}")
    return fits


def show_cost(shape: Shape, recipe: Recipe, machine: Machine, run: Path | None = None) -> None:
    """Print a run's tokens, FLOPs, hours and cost, and what would shorten it if it takes too long."""
    mean = f"{machine.response_tokens:,} tokens" if machine.response_tokens else f"{RESPONSE_SHARE:.0%} of their limit"
    local = any(stage_prompt(recipe, i) for i, stage in enumerate(recipe.stage) if isinstance(stage, RlStage))
    prompts = "have the data's mean length" if local else "reach theirs"
    print(f"  assumed: responses average {mean}, prompts {prompts}")
    if machine.timed:
        rates = f"{machine.tflops:g} TFLOP/s and {machine.bandwidth_gbs:g} GB/s"
        print(f"  assumed: {machine.utilisation:.0%} of {rates}{f' of an {machine.name}' * bool(machine.name)}")
    else:
        print(f"  rates of a {machine.memory_gib:g} GB card are unknown: give --tflops and --bandwidth-gbs for hours")
    found = list(jobs(shape, recipe, machine))
    print(*cost_table(found, machine), sep="\n")
    tokens = sum(job.times * max(job.sampling.tokens, job.update.tokens) for job in found)
    flops = sum(job.times * (job.sampling.flops + job.update.flops) for job in found)
    print(f"  together: {short(tokens)} tokens of responses, {flops:.2g} FLOP")
    if left_out := uncounted(recipe):
        print(f"  not counted: samples of {', '.join(left_out)}, whose number of problems is unknown")
    if not machine.timed:
        return
    hours, gpus = sum(job.hours for job in found), machine.gpus
    price = machine.price_per_hour
    cost = f"${hours * gpus * price:,.{0 if hours >= 10 else 1}f} at ${price:g} per card and hour"
    cost = cost if price else "give --price-per-hour for cost"
    length = f"{hours:,.0f} hours ({hours / 24:,.1f} days)" if hours >= 10 else f"{hours:.1f} hours"
    print(f"  {length} on {gpus} card{'s' * (gpus > 1)}; {cost}")
    if run and (measured := hours_by_run(found, run)):
        print(measured)
    if hours / 24 > PATIENCE_DAYS and any(isinstance(stage, RlStage) for stage in recipe.stage):
        slowest = max(job.hours / job.times for job in found if job.update.flops)
        doubled = sum(job.hours for job in jobs(shape, recipe, replace(machine, gpus=2 * gpus))) / 24
        limits = f"up to {slowest:,.1f} hours per step, and still {doubled:,.1f} days with --gpus {2 * gpus}"
        print(f"  impractical: {limits}")
        print("  to shorten it: more cards, smaller batches, shorter responses, or a smaller model")
