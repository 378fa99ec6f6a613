"""The beginning of a run: its folder, its data and its model, and the place where it goes on.

Whatever can be found wrong is found here, before the first step: a recipe, data or a model that do not go together,
a run that was made otherwise than it is to go on, a folder that another process writes.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from data_filter import DataOrder
from engine.attempts import Respondent
from engine.batches import TrainingSequence
from engine.checkpoint import RunState, load_weights_and_optimizer, save_checkpoint
from engine.device import Device, Interrupted, StopRequest
from engine.grader import Grader
from engine.offload import HostAdamW, Offload
from engine.run_folder import (
    FINISHED,
    WANTS_RESUMING,
    final_config,
    model_config,
    model_source,
    open_run,
    problems_of,
    steps_left,
)
from engine.sharding import shard
from engine.tokenizer import encode, encode_chat, load_tokenizer, stop_tokens
from grpo import TokenLoss, UpdateError, UpdateStats, optimizer_step
from lab.benchmarks import find_data
from lab.problems import DataError, Problem, benchmark_copies, duplicated, has_chats, read_chats, read_problems
from lab.recipe import EvalSettings, FinalSettings, Recipe, RlStage, SftStage
from lab.report import Metrics, console_line, new_alarms, read_metrics
from model import Lora, Transformer, add_lora, initialise_lora, load_weights
from rollout import CacheLimits, Sampling, cache_bytes_per_token, check_requests

# samples drawn for a purpose other than a training step are counted from a place of their own
EVALUATION_DRAW, SEARCH_DRAW = -1, -3
FEW = 3  # pairs of problems that guard_data names


@dataclass
class Run:
    """What all parts of a run need."""

    recipe: Recipe
    folder: Path
    device: Device
    model: Transformer
    model_folder: Path  # where the tokenizer came from
    respondent: Respondent
    metrics: Metrics
    state: RunState
    stop: StopRequest
    resume_from: Path | None  # a checkpoint whose weights and optimizer the first stage to run loads
    micro_batch_tokens: int  # the recipe's, until memory runs out; a resumed run tries the recipe's again
    # ids by (kind of stage, data): see guard_data
    excluded: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    sft_sequences: dict[int, list[TrainingSequence]] = field(default_factory=dict)  # by stage
    stage_began: float = 0.0  # for the ETA: when, and at which of its steps, the stage began in this launch
    stage_first_step: int = 0
    saved: tuple[int, int, bool] | None = None  # step, stage, prepared: of the newest checkpoint
    nonfinite_batch: list[TrainingSequence] | None = None  # of the newest update without a finite gradient
    lock: int | None = None  # the folder, held as long as this process lives


def start_run(arguments: argparse.Namespace, device: Device) -> Run:
    """Everything that a run needs, in the order in which it can go wrong."""
    recipe, folder, lock, resume_from, state = open_run(arguments, device)
    model_folder = model_source(recipe, folder)
    model = build_model(model_folder, recipe, device)
    tokenizer = load_tokenizer(model_folder, model)
    sampler, reward, stop = recipe.sampler, recipe.reward, StopRequest()
    grader = Grader(reward.workers, reward.time_limit_seconds, thinking=recipe.thinking)
    limits = CacheLimits(sampler.cache_tokens, sampler.page_tokens, sampler.rows)
    stops = stop_tokens(tokenizer, model, model_folder)
    respondent = Respondent(
        model, tokenizer, stops, limits, grader, device, recipe.instruction, stop, reward.most_failed_share
    )
    metrics = Metrics(folder, recipe.run.tensorboard, device.is_main, state.metrics_position)
    most = recipe.micro_batch_tokens
    run = Run(recipe, folder, device, model, model_folder, respondent, metrics, state, stop, resume_from, most)
    run.lock, run.saved = lock, (state.step, state.stage, state.prepared) if resume_from else None
    guard_data(run)
    check_inputs(run)
    if device.is_main:
        for name in (WANTS_RESUMING, FINISHED):  # it goes on
            (folder / name).unlink(missing_ok=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    of_these = f" ({trained:,} of them trained)" * (trained < parameters)
    cache_gib = sampler.cache_tokens * cache_bytes_per_token(model.config, device.compute_dtype) / 2**30
    device.say(
        f"{recipe.name}: {parameters:,} parameters{of_these}, {device.ranks} processes, "
        f"at most {cache_gib:.2f} GiB of cache each, {folder}"
    )
    return run


def check_inputs(run: Run) -> None:
    """Find before the first step what a later stage or evaluation would stumble over: rows, prompts, lengths."""
    respondent, recipe = run.respondent, run.recipe
    for index, stage in enumerate(recipe.stage):
        if index < run.state.stage:
            continue
        if isinstance(stage, SftStage):
            run.sft_sequences[index] = sft_sequences(run, stage)
            continue
        problems = stage_problems(run, index, stage)
        DataOrder(problems, stage.batch_problems, recipe.seed, index)
        prompts = [respondent.prompt(problem, 1, stage.max_prompt_tokens) for problem in problems]
        check_requests(run.model, prompts, training_sampling(run, stage, 1.0, 0), respondent.limits)
    windows = {recipe.eval: run.model.config}
    if recipe.final.data:
        windows[recipe.final] = final_config(run.model.config, recipe)
    trained = run.model.config
    for settings, config in windows.items():
        if settings.data:
            run.model.config = config
            prompts = [respondent.prompt(problem, 1) for problem in problems_of(data_path(run, settings.data))]
            check_requests(run.model, prompts, evaluation_sampling(run, settings), respondent.limits)
    run.model.config = trained


def training_sampling(run: Run, stage: RlStage, temperature: float, draw: int) -> Sampling:
    """Training samples the policy itself: no top-k, no top-p, logits / temperature."""
    return Sampling(temperature, stage.max_response_tokens, run.respondent.stop_tokens, run.recipe.seed, draw)


def evaluation_sampling(run: Run, settings: EvalSettings | FinalSettings) -> Sampling:
    """How evaluations sample: with the recipe's own top-k, and from draws that training never uses."""
    return Sampling(
        temperature=settings.temperature,
        max_new_tokens=settings.max_response_tokens,
        stop_tokens=run.respondent.stop_tokens,
        seed=run.recipe.seed,
        step=EVALUATION_DRAW,
        top_k=settings.top_k,
    )


def build_model(folder: Path, recipe: Recipe, device: Device) -> Transformer:
    """The model, split over all processes before any weight is read, so that no process holds all of it.

    With an adapter, every process holds the frozen base (see `shard`), and the adapter is split.
    """
    with torch.device("meta"):
        model = Transformer(model_config(folder, recipe))
    if recipe.lora.rank:
        is_hub_id = not recipe.model.startswith("world/") and not Path(recipe.model).is_dir()
        add_lora(model, Lora(recipe.lora.rank, recipe.lora.alpha, recipe.model if is_hub_id else str(folder.resolve())))
    stream = torch.cuda.Stream() if recipe.offload_activations and device.device.type == "cuda" else None
    offload = Offload(stream) if recipe.offload_activations else None
    for layer in model.model.layers:
        layer.recompute, layer.offload = recipe.recompute_activations, offload
    model.float32_head = recipe.float32_head
    shard(model, device.mesh, device.compute_dtype)
    model.to_empty(device=device.device)
    model.tie()
    load_weights(model, folder)
    initialise_lora(model, recipe.seed)
    return model


# ------------------------------------------------------------------------------------------------------------- the data


def data_path(run: Run, source: str) -> str:
    """A recipe's data: world/... is what this run has written; anything else is a file or a hub data set."""
    return str(run.folder / source) if source.startswith("world/") else source


def stage_problems(run: Run, index: int, stage: RlStage) -> list[Problem]:
    """The stage's own data, or what the stage before has left of its data."""
    own = [earlier.data for earlier in run.recipe.stage[: index + 1] if isinstance(earlier, RlStage) and earlier.data]
    problems = training_problems(run, "rl", own[-1])
    state = run.state
    if index == state.stage and state.problem_ids and (state.prepared or not stage.data):
        problems = by_ids(problems, state.problem_ids, own[-1])
    return problems


def training_problems(run: Run, kind: str, source: str) -> list[Problem]:
    """A stage's data without what guard_data excludes."""
    excluded = run.excluded.get((kind, source), ())
    return [problem for problem in problems_of(data_path(run, source)) if problem.id not in excluded]


def by_ids(problems: list[Problem], ids: list[str], source: str) -> list[Problem]:
    """The problems that a run noted, in that order; DataError where some are no longer to be had."""
    by_id = {problem.id: problem for problem in problems}
    if gone := [problem_id for problem_id in ids if problem_id not in by_id]:
        raise DataError(
            f"{source}: {len(gone):,} of the {len(ids):,} problems that this run goes on with are not there "
            f"(first: {gone[0]}): resume with the data and the [guard] that it began with"
        )
    return [by_id[problem_id] for problem_id in ids]


def sft_sequences(run: Run, stage: SftStage) -> list[TrainingSequence]:
    """Worked solutions, or chats, as tokens; the loss is on the assistant's part alone, end-of-sequence included."""
    ending = encode(run.respondent.tokenizer, run.respondent.tokenizer.eos_token)
    sequences = []
    for name, prompt, reply in sft_rows(run, stage):
        response = encode(run.respondent.tokenizer, reply) + ending
        if len(prompt) + len(response) > stage.max_tokens:
            raise DataError(
                f"{name} in {stage.data}: {len(prompt) + len(response)} tokens exceed the stage's "
                f"max_tokens = {stage.max_tokens}: raise it or remove the row"
            )
        sequences.append(TrainingSequence(np.array([*prompt, *response], dtype=np.int32), len(prompt)))
    if len(sequences) < stage.batch_sequences:
        raise DataError(f"{stage.data}: {len(sequences)} solutions cannot fill a batch of {stage.batch_sequences}")
    return sequences


def sft_rows(run: Run, stage: SftStage) -> Iterator[tuple[str, list[int], str]]:
    """What to learn from: a name for errors, the prompt's tokens, the assistant's reply."""
    tokenizer, path = run.respondent.tokenizer, data_path(run, stage.data)
    if has_chats(path):
        for number, messages in enumerate(read_chats(path), 1):
            if f"row {number}" in run.excluded.get(("sft", stage.data), ()):
                continue
            for turn, message in enumerate(messages):
                if message["role"] == "assistant":  # every reply is learned, after all that came before it
                    yield f"row {number}", encode_chat(tokenizer, messages[:turn]), message["content"]
        return
    for problem in training_problems(run, "sft", stage.data):
        if not problem.solution:
            raise DataError(f"problem {problem.id} in {stage.data} has no worked solution to learn from")
        yield f"problem {problem.id}", list(run.respondent.prompt(problem, 1).tokens), problem.solution


# --------------------------------------------------------------------------- twice in the data, or in a benchmark


def guard_data(run: Run) -> None:
    """Find what stands twice in the training data, or in a benchmark, and exclude what [guard] says to.

    What is excluded depends on files and recipe alone: it is the same on every process and after a resume.
    """
    recipe, guard, benchmark = run.recipe, run.recipe.guard, []
    for source in dict.fromkeys(filter(None, [recipe.eval.data, recipe.final.data])):
        benchmark += problems_of(data_path(run, source))
        if pairs := duplicated(problems_of(data_path(run, source))):
            run.device.say(f"{source}: {len(pairs):,} problems repeat an earlier one's text ({some_pairs(pairs)})")
    for source in find_data(guard.benchmarks).values():
        benchmark += read_problems(source, "keep")  # to be compared with, a problem needs no answer
    seen: dict[str, dict[str, Problem]] = {"sft": {}, "rl": {}}
    held = [] if not run.device.is_main else [row | {"step": 0} for row in read_metrics(run.folder)]
    for index, stage in enumerate(recipe.stage):
        place = stage.kind, stage.data
        if not stage.data or place in run.excluded:
            continue
        asked, learned = training_texts(run, stage)
        found = {
            "duplicates": (guard.duplicates, "repeat an earlier one's text", duplicated(learned, seen[stage.kind])),
            "contamination": (guard.contamination, "are a benchmark's", benchmark_copies(asked, benchmark)),
        }
        excluded = {p.id for rule, _, pairs in found.values() if rule == "exclude" for p, _ in pairs}
        run.excluded[place] = excluded
        row = {"kind": "guard", "step": 0, "stage": index, "data": stage.data, "rows": len(learned)}
        for name, (rule, what, pairs) in found.items():
            count = len({problem.id for problem, _ in pairs})
            row |= {name: count, f"{name}_first": [[a.id, b.id] for a, b in pairs[:FEW]], f"{name}_rule": rule}
            if pairs:
                done = "excluded" if rule == "exclude" else f'trained on all the same (guard.{name} = "exclude" drops)'
                run.device.say(f"{stage.data}: {count:,} of {len(learned):,} {what} ({some_pairs(pairs)}): {done}")
        row |= {"excluded": len(excluded), "excluded_ids": sorted(excluded)}
        if run.device.is_main and row not in held:  # a resumed run has its rows
            run.metrics.write(row | {"step": run.state.step})


def training_texts(run: Run, stage: SftStage | RlStage) -> tuple[list[Problem], list[Problem]]:
    """What a stage's data asks, to compare with benchmarks, and what it teaches, of which once is enough.

    Fine-tuning may learn a problem from several solutions, so that there a copy has the same solution.
    """
    path = data_path(run, stage.data)
    if isinstance(stage, RlStage):
        return (problems := problems_of(path)), problems
    if not has_chats(path):
        return (problems := problems_of(path)), [replace(p, text=p.text + p.solution) for p in problems]
    chats = [(f"row {number}", messages) for number, messages in enumerate(read_chats(path), 1)]
    asked = [Problem(name, m["content"], ()) for name, messages in chats for m in messages if m["role"] == "user"]
    return asked, [Problem(name, "\n".join(m["content"] for m in messages), ()) for name, messages in chats]


def some_pairs(pairs: list[tuple[Problem, Problem]]) -> str:
    """The first few of the pairs found, by their ids."""
    return ", ".join(f"{a.id} is {b.id}" for a, b in pairs[:FEW]) + ", ..." * (len(pairs) > FEW)


class Stopped(Exception):
    """The run was asked to stop and has saved its work."""


def update_model(
    run: Run,
    optimizer: torch.optim.Optimizer,
    sequences: list[TrainingSequence],
    loss: TokenLoss,
    stage: SftStage | RlStage,
    divisor: float | None = None,
    begun: bool = False,
) -> UpdateStats:
    """One optimizer step; micro-batches that memory has made smaller stay so for the rest of the run.

    A step whose update was abandoned, between two micro-batches, is done again whole: its visits replace themselves.
    One whose weights have `begun` to change, by an earlier mini-batch, is not abandoned.
    """

    def leave_when_asked(*_: object) -> None:
        # all leave before the same forward, of which each has as many
        if not begun and any(run.device.gather(run.stop.asked)):
            raise Interrupted

    watch = run.model.register_forward_pre_hook(leave_when_asked, prepend=True)  # before sharded weights are gathered
    try:
        update = optimizer_step(
            run.model, optimizer, sequences, loss, run.micro_batch_tokens, stage.max_grad_norm, divisor
        )
    except Interrupted:
        optimizer.zero_grad(set_to_none=True)
        save_and_stop(run, optimizer)
    finally:
        watch.remove()
    if not update.stepped:
        run.nonfinite_batch = sequences
    if update.micro_batch_tokens < run.micro_batch_tokens:
        run.device.say(
            f"step {run.state.step + 1}: out of memory in the update: micro-batches of at most "
            f"{update.micro_batch_tokens:,} tokens from now on, not {run.micro_batch_tokens:,}"
        )
        run.micro_batch_tokens = update.micro_batch_tokens
    return update


def describe_update(update: UpdateStats | None, seconds: float) -> dict:
    """The batch's update in numbers; None is a batch from which there is too little to learn, which is skipped."""
    if update is None:
        return {"skipped": 1, "nonfinite": 0, "seconds_update": seconds}
    return {
        "skipped": 0,
        "nonfinite": int(not update.stepped),
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "update_tokens_per_s": update.tokens / seconds,
        "update_idle_share": update.idle_share,
        "seconds_update": seconds,
    } | asdict(update.ratios)


def end_step(run: Run, index: int, stage: SftStage | RlStage, row: dict, optimizer: torch.optim.Optimizer) -> None:
    """Count the step, write its line, save where the recipe says so, stop when asked."""
    state, settings = run.state, run.recipe.run
    state.step, state.stage_step = state.step + 1, state.stage_step + 1
    row = {"kind": row["kind"], "step": state.step, "stage": index} | row
    run.metrics.write(row)
    state.metrics_position = list(run.metrics.position)
    left = steps_left(stage, state)
    per_step = (time.perf_counter() - run.stage_began) / (state.stage_step - run.stage_first_step)
    run.device.say(console_line(row, sum(s.steps for s in run.recipe.stage), per_step * left))
    for sentence in new_alarms(run.metrics.steps) if row["kind"] == "rl" else ():
        run.device.say(f"warning: step {state.step}: {sentence}")
    if row["nonfinite"]:
        run.device.say(f"warning: step {state.step}: the gradient is not finite; the weights were left as they are")
    if not row.get("skipped"):
        state.nonfinite_steps = (state.nonfinite_steps + 1) * row["nonfinite"]
    if row["nonfinite"] and state.nonfinite_steps >= settings.most_nonfinite_steps:
        stop_at_nonfinite(run, optimizer)
    if any(run.device.gather(run.stop.asked)):
        save_and_stop(run, optimizer)
    if left == 0 or state.stage_step % settings.checkpoint_every_steps == 0:
        save_whole_step(run, optimizer)


def stop_at_nonfinite(run: Run, optimizer: torch.optim.Optimizer) -> NoReturn:
    """Leave the newest batch where a person can look at it; the weights are those before the first of these steps."""
    state, path = run.state, run.folder / f"nonfinite-step-{run.state.step}.pt"
    steps, state.nonfinite_steps = state.nonfinite_steps, 0  # a resumed run, with another rate perhaps, gets its chance
    if run.device.is_main:
        rows = [asdict(sequence) for sequence in run.nonfinite_batch]
        torch.save(
            [{k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in r.items()} for r in rows], path
        )
    save_whole_step(run, optimizer)
    raise UpdateError(
        f"step {state.step}: {steps} updates in a row without a finite gradient (run.most_nonfinite_steps): the "
        f"batch is in {path} (tokens, advantages, old log-probs); lower the learning rate or mend the data, then "
        f"{how_to_go_on(run)}"
    )


def save_whole_step(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """A checkpoint of the last whole step, unless there is one already: little time may be left."""
    state, kept = run.state, run.recipe.run.checkpoints_kept
    place = state.step, state.stage, state.prepared
    if run.saved != place:
        run.metrics.sync()
        save_checkpoint(run.folder, run.model, optimizer, state, run.device, kept)
        run.saved = place


def save_and_stop(run: Run, optimizer: torch.optim.Optimizer) -> NoReturn:
    """Save the last whole step and leave in order."""
    save_whole_step(run, optimizer)
    raise Stopped(f"stopped after step {run.state.step}; go on with: {how_to_go_on(run)}")


def how_to_go_on(run: Run) -> str:
    """The command for a person."""
    return f"torchrun train.py --resume {run.folder}"


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def make_optimizer(run: Run, stage: SftStage | RlStage) -> torch.optim.Optimizer:
    """AdamW, new in each stage; when the run resumes inside a stage, with the moments (and weights) it had."""
    betas = (0.9, stage.adam_beta2)
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    settings = {"lr": stage.learning_rate, "betas": betas, "weight_decay": stage.weight_decay}
    if run.recipe.offload_optimizer:
        optimizer = HostAdamW(trained, **settings)
    else:
        optimizer = torch.optim.AdamW(trained, **settings, fused=True)
    if run.resume_from is not None:
        load_weights_and_optimizer(run.resume_from, run.model, optimizer, run.device)
        run.resume_from = None
        for group in optimizer.param_groups:  # the recipe's word counts, not the checkpoint's
            group |= {"betas": betas, "weight_decay": stage.weight_decay}
    return optimizer
