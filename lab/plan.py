"""Will it fit, how long does it take, what does it cost? A recipe on given cards, before any of them is rented.

    python train.py recipes/polaris-4b.toml --plan --device 80GB --gpus 8

Estimated from the shapes alone: no weights, no GPU, no run folder. First each stage's memory (plan_memory.py), then
tokens, FLOPs, hours and cost, with the settings that make it fit. tests/test_plan.py compares FLOPs and hours with
torch's counter and the sampler's roofline.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from lab.machine import RESPONSE_SHARE, Machine
from lab.plan_memory import GIB, Shape, StagePlan, longest_sequence, plan_stages, stage_sampling
from lab.problems import read_problems
from lab.recipe import Recipe, RecipeError, RlStage, SftStage
from model import ModelError, parse_config, read_config
from rollout import cache_bytes_per_token

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
PATIENCE_DAYS = 30  # what takes longer is called impractical


def find_shape(name: str) -> tuple[Shape, str]:
    """A model's shape and where it was read: a folder, the hub's cache, the table above. Nothing is downloaded."""
    if Path(name).is_dir():
        return Shape(read_config(Path(name))), name
    if name.count("/") == 1 and not name.startswith((".", "/")):
        from huggingface_hub import try_to_load_from_cache  # only here, so that local models need no hub

        if isinstance(cached := try_to_load_from_cache(name, "config.json"), str):
            return Shape(parse_config(json.loads(Path(cached).read_text()), cached)), "the hub's cache"
    if name in PUBLISHED:
        source = dict(zip(PUBLISHED_KEYS, PUBLISHED[name], strict=True))
        return Shape(parse_config(source, name)), "the table of published shapes in plan.py"
    raise ModelError(f"{name}: no model folder, not in the hub's cache and not in plan.py's table: give a local folder")


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


def pair_flops(shape: Shape) -> int:
    """One query and one key that it sees, in all layers: the score and the value's share, 2 FLOPs a number each."""
    return 4 * shape.layers * shape.queries


def update_flops(
    shape: Shape, tokens: float, predicted: float, pairs: float, recompute: bool, lora_rank: int = 0
) -> float:
    """FLOPs of forward and backward, what is computed twice counted twice; elementwise work is left out.

    tokens: rows of the layers' products; predicted: response tokens; pairs: of a query and a key, causal.
    """
    products, adapters = shape.products, lora_rank * shape.adapter
    # recomputation ends before the layer's last product, whose result no backward needs
    last = (lora_rank or shape.inner) * shape.width
    # forward, the input's gradient, the weight's where it is trained, and forward again; 2 each
    of_layer = products * (4 if lora_rank else 6) + adapters * 6 + 2 * (products + adapters - last) * recompute
    # forward, the same again in backward, the gradients of states and weight; a frozen head does with forward's slopes
    of_head = shape.head * (4 if lora_rank else 8)
    of_pair = pair_flops(shape) * (1 + 2.5 + recompute)  # backward: five products, for the scores are made again
    return shape.layers * of_layer * tokens + of_head * predicted + of_pair * pairs


def update_work(shape: Shape, recipe: Recipe, stage: SftStage | RlStage, machine: Machine) -> Work:
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
    flops = update_flops(shape, tokens, predicted, pairs, recipe.recompute_activations, recipe.lora.rank)
    return Work(predicted, flops, flops / machine.gpus / machine.flops_per_s if machine.timed else 0.0)


def sampling_work(
    shape: Shape, recipe: Recipe, problems: int, group: int, prompt: int, limit: int, machine: Machine
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
    body, head = shape.layers * shape.products, shape.head
    token = 2 * (body + head) + pair_flops(shape) * context
    token += 2 * recipe.lora.rank * shape.layers * shape.adapter
    prefill = prompt * (2 * body + pair_flops(shape) * prompt / 2)
    read = steps * (body + head) * b + requests * mean * context * cache_bytes_per_token(shape.config, torch.bfloat16)
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


def jobs(shape: Shape, recipe: Recipe, machine: Machine) -> Iterator[Job]:
    """All that train.py does with a recipe: the steps, and what stands around them."""
    rl = [stage for stage in recipe.stage if isinstance(stage, RlStage)]
    prompt = max((stage.max_prompt_tokens for stage in rl), default=1024)

    def sample(problems: int, samples: int, limit: int) -> Work:
        return sampling_work(shape, recipe, problems, samples, prompt, limit, machine)

    for index, stage in enumerate(recipe.stage):
        update = update_work(shape, recipe, stage, machine)
        if isinstance(stage, SftStage):
            yield Job(f"stage {index}, a step", stage.steps, update=update)
            continue
        if stage.filter_before and (problems := count_problems(stage_data(recipe, index))):
            work = sample(problems, stage.group_size, stage.max_response_tokens)
            yield Job(f"stage {index}, pass rates of {problems:,} problems", 1, work)
        work = sample(stage.batch_problems, stage.group_size, stage.max_response_tokens)
        yield Job(f"stage {index}, a step", stage.steps, work, update)
    if rl:
        work = sample(recipe.search.problems, recipe.search.samples, rl[0].max_response_tokens)
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


def excess(plans: list[StagePlan], machine: Machine) -> float:
    """Bytes of all phases beyond a card's memory; infinite where a stage cannot work whatever the memory."""
    if any(plan.problem for plan in plans):
        return math.inf
    phases = [sum(phase.values()) for plan in plans for phase in (plan.sampling, plan.update)]
    return sum(max(0.0, phase - machine.memory_gib * GIB) for phase in phases)


def fit_cache(shape: Shape, recipe: Recipe, machine: Machine) -> Recipe:
    """The recipe with the largest cache that leaves sampling inside the memory, or the smallest that can work."""
    size = recipe.sampler.page_tokens
    page = size * cache_bytes_per_token(shape.config, torch.bfloat16)
    while True:  # a smaller cache preempts, and prefills more at once
        plans = plan_stages(shape, recipe, machine.gpus)
        asked = [s for i in range(len(plans)) if (s := stage_sampling(recipe, i, machine.gpus))]
        pages, least = max((s.pages for s in asked), default=0), max((s.pages_per_row + 1 for s in asked), default=0)
        over = max(sum(plan.sampling.values()) for plan in plans) - machine.memory_gib * GIB
        if pages == least or (pages > least and over <= 0):
            return recipe
        pages = max(pages - math.ceil(max(over, 0) / page), least)
        recipe = replace(recipe, sampler=replace(recipe.sampler, cache_tokens=pages * size))


def fit_recipe(shape: Shape, recipe: Recipe, machine: Machine) -> tuple[list[str], Recipe] | None:
    """Settings that make every stage fit, and the recipe with them; None where all together are not enough.

    They are added in a fixed order, what changes the run least first, until it fits; what does not help is left out.
    """
    shortest, half = min(map(longest_sequence, recipe.stage)), recipe.final.max_response_tokens // 2
    remedies = {
        f"micro_batch_tokens={shortest}": ("micro_batch_tokens", shortest),
        "recompute_activations=true": ("recompute_activations", True),
        "offload_optimizer=true": ("offload_optimizer", True),
        "offload_activations=true": ("offload_activations", True),
        f"final.max_response_tokens={half}": ("final", replace(recipe.final, max_response_tokens=half)),
        "lora.rank=32": ("lora", replace(recipe.lora, rank=32)),
    }

    def treated(words: list[str]) -> Recipe:  # the cache takes what the other settings leave
        return fit_cache(shape, replace(recipe, **dict(remedies[word] for word in words)), machine)

    def left(words: list[str]) -> float:
        return excess(plan_stages(shape, treated(words), machine.gpus), machine)

    chosen: list[str] = []
    for word in remedies:
        if left(chosen) > left([*chosen, word]):
            chosen.append(word)
    if left(chosen):
        return None
    for word in chosen[::-1]:  # a later one may have made it needless
        if not left(others := [other for other in chosen if other != word]):
            chosen = others
    fitted = treated(chosen)
    cache = [f"sampler.cache_tokens={fitted.sampler.cache_tokens}"] if fitted.sampler != recipe.sampler else []
    return chosen + cache, fitted


# ------------------------------------------------------------------------------------------------------- output


def memory_table(plan: StagePlan) -> list[str]:
    """What is held, a line each, in GiB."""
    phases = (plan.sampling, plan.update, plan.host)
    rows = {what: [phase.get(what, 0) for phase in phases] for what in {k: 0 for phase in phases for k in phase}}
    rows["together"] = [sum(phase.values()) for phase in phases]
    lines = [plan.title, f"  {'GiB':46}{'sampling':>10}{'update':>10}{'host':>10}"]
    for what, values in rows.items():
        if any(values):
            lines.append(f"  {what:46}" + "".join(f"{v / GIB:10.2f}" if v else " " * 10 for v in values))
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
    shape, where = find_shape(recipe.model)
    how = f"LoRA of rank {recipe.lora.rank}" if recipe.lora.rank else "full fine-tuning"
    print(f"{recipe.name}: {recipe.model}, {shape.parameters:,} parameters (shape from {where})")
    print(f"{how}, bfloat16 compute on CUDA, {machine.gpus} x {machine.memory_gib:g} GiB; below, GiB of one process")
    plans = plan_stages(shape, recipe, machine.gpus)
    for plan in plans:
        verdict = "does not fit" if excess([plan], machine) else "fits"
        sampling = sum(plan.sampling.values()) > sum(plan.update.values())
        phase = "sampling" if sampling else f"the update, in {plan.moment}"
        line = f"  {verdict}: at most {plan.peak / GIB:.1f} of {machine.memory_gib:g} GiB, in {phase}"
        print("", *memory_table(plan), line + f"; {plan.problem}" * bool(plan.problem), sep="\n")
    fits, timed, assumption = not excess(plans, machine), recipe, ""
    if not fits and (found := fit_recipe(shape, recipe, machine)):
        words, timed = " and ".join(found[0]), found[1]
        assumption = f", with {words}"
        print(f"\nto make it fit: set {words}")
    elif not fits:
        assumption = ", as if it fitted"
        print("\nno setting makes it fit: shorten the responses, use more cards or a smaller model")
    print(f"\ntime and cost{assumption}")
    show_cost(shape, timed, machine)
    return fits


def show_cost(shape: Shape, recipe: Recipe, machine: Machine) -> None:
    """Print what a recipe takes, and what would shorten it if that is too long."""
    mean = f"{machine.response_tokens:,} tokens" if machine.response_tokens else f"{RESPONSE_SHARE:.0%} of their limit"
    print(f"  assumed: responses of {mean} in the mean, prompts at theirs")
    if machine.timed:
        rates = f"{machine.tflops:g} TFLOP/s and {machine.bandwidth_gbs:g} GB/s"
        print(f"  assumed: {machine.utilisation:.0%} of {rates}{f', as of an {machine.name}' * bool(machine.name)}")
    else:
        print(f"  nothing is known of a card of {machine.memory_gib:g} GB: hours want --tflops and --bandwidth-gbs")
    found = list(jobs(shape, recipe, machine))
    print(*cost_table(found, machine), sep="\n")
    tokens = sum(job.times * max(job.sampling.tokens, job.update.tokens) for job in found)
    flops = sum(job.times * (job.sampling.flops + job.update.flops) for job in found)
    print(f"  together: {short(tokens)} tokens of responses, {flops:.2g} FLOP")
    if left_out := uncounted(recipe):
        print(f"  not counted: what is sampled of {', '.join(left_out)}, which is not here to count its problems")
    if not machine.timed:
        return
    hours, gpus = sum(job.hours for job in found), machine.gpus
    cost = f"${hours * gpus * machine.price_per_hour:,.0f} at ${machine.price_per_hour:g} an hour and card"
    cost = cost if machine.price_per_hour else "the cost wants --price-per-hour"
    print(f"  {hours:,.0f} hours ({hours / 24:,.1f} days) on {gpus} card{'s' * (gpus > 1)}; {cost}")
    if hours / 24 > PATIENCE_DAYS and any(isinstance(stage, RlStage) for stage in recipe.stage):
        slowest = max(job.hours / job.times for job in found if job.update.flops)
        doubled = sum(job.hours for job in jobs(shape, recipe, replace(machine, gpus=2 * gpus))) / 24
        print(f"  impractical: up to {slowest:,.1f} hours a step, and still {doubled:,.1f} days with --gpus {2 * gpus}")
        print("  to shorten it: more cards, smaller batches, shorter responses, or a smaller model")
