"""The start of a run: builds everything it needs, and checks its inputs before the first step."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data_filter import DataOrder
from engine.adapter import Lora, add_lora, initialise_lora
from engine.batches import TrainingSequence
from engine.checkpoint import load_trained_weights
from engine.distributed import Processes, StopRequest
from engine.errors import first_names
from engine.grader import Grader
from engine.huggingface import named
from engine.offload import Offload
from engine.rollout_worker import RolloutWorker
from engine.run import Run
from engine.run_folder import (
    FINISHED,
    WANTS_RESUMING,
    model_source,
    open_run,
    read_recipe,
    require_same_prompts,
    run_folder,
)
from engine.sharding import shard
from engine.tokenizer import END_THINK, THINK, load_tokenizer, read_chat, stop_tokens
from lab.benchmarks import find_data
from lab.data_files import DATA_FILES, DataError, existing_file
from lab.metrics import Metrics, read_metrics
from lab.problems import Problem
from lab.recipe import Recipe, RecipeError, RlStage, SftStage, how_to_read, load_recipe
from lab.run_data import RunData, rl_source
from lab.tracker import open_tracker, require_tracker
from lab.variants import try_functions
from model import ModelConfig, Transformer, extend_window, load_weights, read_config, resolve_folder
from rollout import CacheLimits, cache_bytes_per_token, check_requests
from yarn import describe_ramp


def start_run(arguments: argparse.Namespace, processes: Processes, stop: StopRequest) -> Run:
    """Build a run, after the checks that need the least work. If it cannot start, a new run's folder is removed."""
    recipe = read_recipe(arguments)
    check_recipe(recipe)
    with run_folder(arguments, recipe, processes) as (folder, resumed):
        return build_run(arguments, recipe, folder, resumed, processes, stop)


def build_run(
    arguments: argparse.Namespace, recipe: Recipe, folder: Path, resumed: bool, processes: Processes, stop: StopRequest
) -> Run:
    """Build a run in its folder, and check all of its inputs."""
    sampler, reward = recipe.sampler, recipe.reward
    grader = Grader(reward.workers, reward.time_limit_seconds, reward=reward.function)  # tries the function out
    try_functions(recipe, processes)
    lock, checkpoint, state = open_run(arguments, recipe, folder, resumed, processes)
    model_folder = model_source(recipe, folder)
    model = build_model(model_folder, recipe, processes)
    chat = read_chat(load_tokenizer(model_folder, model), recipe.thinking)
    processes.say(chat.account)
    stops = stop_tokens(chat, model, model_folder)
    limits = CacheLimits(sampler.cache_tokens, sampler.page_tokens, sampler.rows)
    grader.thinking = chat.thinking
    run = Run(
        recipe=recipe,
        folder=folder,
        processes=processes,
        model=model,
        model_folder=model_folder,
        data=RunData(recipe, folder),
        worker=RolloutWorker(
            model, chat, stops, limits, grader, processes, recipe.instruction, stop, reward.most_failed_share
        ),
        metrics=Metrics(folder, processes.is_main, state.metrics_position),
        state=state,
        stop=stop,
        resume_from=checkpoint,
        lock=lock,
        micro_batch_tokens=recipe.micro_batch_tokens,
        saved=(state.step, state.stage, state.prepared) if checkpoint else None,
    )
    if processes.is_main:
        run.metrics.tracker = open_tracker(folder, recipe, state.step + 1 if resumed else None)
    if recipe.final.data:
        processes.say(describe_ramp(final_config(model.config, recipe).rope))
    guard_data(run)
    leave_out_long_prompts(run)
    check_inputs(run)
    require_same_prompts(arguments, folder, run.data, run.worker, resumed=checkpoint is not None)
    if processes.is_main:
        for name in (WANTS_RESUMING, FINISHED):  # of an earlier launch
            (folder / name).unlink(missing_ok=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trained_text = f" ({trained:,} of them trained)" * (trained < parameters)
    cache_gib = sampler.cache_tokens * cache_bytes_per_token(model.config, processes.compute_dtype) / 2**30
    cache_text = f"at most {cache_gib:.2f} GiB of cache" if cache_gib else "a cache of the free memory's size"
    stop.starting = False
    processes.say(
        f"{recipe.name}: {parameters:,} parameters{trained_text}, {processes.world_size} processes on "
        f"{processes.device_name}, {cache_text} each, {folder}"
    )
    return run


def guard_data(run: Run) -> None:
    """Apply the [guard] of the recipe to the data, and write what it found to the metrics."""
    found = run.data.guard(run.processes.say)
    known = [row | {"step": 0} for row in read_metrics(run.folder)] if run.processes.is_main else []
    for row in found:
        if run.processes.is_main and row not in known:  # a resumed run has written its rows
            run.metrics.write(row | {"step": run.state.step})


def leave_out_long_prompts(run: Run) -> None:
    """Exclude prompts that an rl stage does not allow, where on_bad_row = "skip"; from all stages with that data."""
    for index, stage in enumerate(run.recipe.stage):
        if isinstance(stage, SftStage) or how_to_read(run.recipe, rl_source(run.recipe, index))[0] != "skip":
            continue
        source = rl_source(run.recipe, index)
        long = run.worker.too_long(run.data.training_problems("rl", source), stage.max_prompt_tokens, source)
        run.data.excluded.setdefault(("rl", source), set()).update(long)


def check_recipe(recipe: Recipe) -> None:
    """Raise RecipeError or DataError for what can be found wrong before anything is written or loaded."""
    require_tracker(recipe.run.tracker)
    for source in [stage.data for stage in recipe.stage] + [recipe.eval.data, recipe.final.data]:
        if source.startswith("world/") and not recipe.world:
            raise RecipeError(f"{source}: the recipe has no [world] to make it; write ./{source} for a file")
        if source.endswith(DATA_FILES) and not source.startswith("world/"):
            existing_file(Path(source))
    for source in find_data(recipe.guard.benchmarks).values():
        if source.endswith(DATA_FILES):
            existing_file(Path(source))
    if not recipe.model.startswith("world/"):
        config = model_config(resolve_folder(recipe.model), recipe)
        if recipe.final.data:
            final_config(config, recipe)


def check_inputs(run: Run) -> None:
    """Raise now the errors that later stages and evaluations would raise: rows, prompts, lengths."""
    worker, recipe, model, asked = run.worker, run.recipe, run.model, {}
    for index, stage in enumerate(recipe.stage):
        if index < run.state.stage:
            continue
        if isinstance(stage, SftStage):
            run.sft_sequences[index] = sft_sequences(run.data, stage, worker, asked)
            continue
        problems = run.stage_problems(index)
        DataOrder(problems, stage.batch_problems, recipe.seed, index)
        prompts = worker.prompts(problems, asked, stage.max_prompt_tokens)
        check_requests(model, prompts, run.sampling(stage, 1.0, 0), worker.limits)
    trained = model.config
    for settings in (recipe.eval, recipe.final):
        if settings.data:
            model.config = trained if settings is recipe.eval else final_config(trained, recipe)
            prompts = worker.prompts(run.data.problems(settings.data), asked)
            check_requests(model, prompts, run.evaluation_sampling(settings), worker.limits)
    model.config = trained
    worker.check(asked)


def sft_sequences(data: RunData, stage: SftStage, worker: RolloutWorker, asked: dict) -> list[TrainingSequence]:
    """Encode worked solutions or chats; the loss is on the assistant's tokens only, end-of-sequence included.

    Adds the prompts to `asked`, as `RolloutWorker.prompts` does.
    """
    chat, sequences, too_long, closed = worker.chat, [], [], 0
    if chat.end is None:
        raise DataError(f"{stage.data}: the tokenizer names no end of sequence for its solutions: set its eos_token")
    for name, source, reply in data.worked_examples(stage):
        if chat.prompt_tag == END_THINK in reply:
            what = f"{name} in {stage.data} thinks, but the prompt has closed its thinking block"
            raise DataError(f"{what}: set thinking = true or remove the thinking")
        closed += chat.prompt_tag == THINK and END_THINK not in reply
        messages = [worker.message(source)] if isinstance(source, Problem) else source
        with named(f"{name} in {stage.data}"):
            prompt, response = chat.example(messages, reply)
        asked[f"{name} in {stage.data}"] = source.text if isinstance(source, Problem) else source[-1]["content"], prompt
        if len(prompt) + len(response) > stage.max_tokens:
            too_long.append(f"{name} ({len(prompt) + len(response)} tokens)")
            if stage.on_bad_row == "skip":
                continue
        sequences.append(TrainingSequence(np.array([*prompt, *response], dtype=np.int32), len(prompt)))
    if too_long and stage.on_bad_row == "skip":
        what = f"left out {len(too_long):,} rows that exceed max_tokens = {stage.max_tokens}"
        worker.processes.say(f"{stage.data}: {what} ({first_names(too_long)})")
    elif too_long:
        raise DataError(
            f"{stage.data}: {len(too_long):,} of {len(sequences):,} rows exceed the stage's max_tokens = "
            f'{stage.max_tokens}: raise it, set on_bad_row = "skip", or remove {first_names(too_long)}'
        )
    if closed:
        worker.processes.say(
            f"{stage.data}: {closed:,} of {len(sequences):,} solutions do not think: {END_THINK} added"
        )
    if len(sequences) < stage.batch_sequences:
        raise DataError(f"{stage.data}: {len(sequences)} solutions cannot fill a batch of {stage.batch_sequences}")
    return sequences


# ------------------------------------------------------------------------------------------------------------ the model


def model_config(folder: Path, recipe: Recipe) -> ModelConfig:
    """Return the model's config with the recipe's window. Raises RecipeError where an rl stage exceeds the window."""
    config = read_config(folder)
    if recipe.max_position_embeddings:
        config = replace(config, max_position_embeddings=recipe.max_position_embeddings)
    for index, stage in enumerate(recipe.stage):
        if not isinstance(stage, RlStage):
            continue
        if stage.max_prompt_tokens + stage.max_response_tokens > config.max_position_embeddings:
            raise RecipeError(
                f"stage.{index}: {stage.max_prompt_tokens} + {stage.max_response_tokens} tokens exceed the model's "
                f"window of {config.max_position_embeddings}: set max_position_embeddings in the recipe"
            )
    return config


def final_config(config: ModelConfig, recipe: Recipe) -> ModelConfig:
    """Return the config of the final evaluation, with YaRN and the window that it extends."""
    final = recipe.final
    return extend_window(
        config, final.yarn_factor, final.yarn_original_window, final.yarn_attention_factor, final.yarn_beta_fast,
        final.yarn_beta_slow,
    )  # fmt: skip


def empty_model(folder: Path, recipe: Recipe) -> Transformer:
    """Return the recipe's model on the meta device, with the adapter that the recipe trains."""
    with torch.device("meta"):
        model = Transformer(model_config(folder, recipe))
    model.name = str(folder)
    if recipe.lora.rank:
        is_hub_id = not recipe.model.startswith("world/") and not Path(recipe.model).is_dir()
        add_lora(model, Lora(recipe.lora.rank, recipe.lora.alpha, recipe.model if is_hub_id else str(folder.resolve())))
    return model


def load_checkpoint(checkpoint: Path) -> tuple[Transformer, Path]:
    """Return the unsharded model of RUN/checkpoints/step-N and the folder of the model that the run started from."""
    run = checkpoint.resolve().parent.parent
    recipe = load_recipe(run / "recipe.toml")
    folder = model_source(recipe, run)
    model = empty_model(folder, recipe)
    load_weights(model, folder, "cpu")
    load_trained_weights(checkpoint, model)
    return model, folder


def build_model(folder: Path, recipe: Recipe, processes: Processes) -> Transformer:
    """Build the model, sharded over all processes before weights are read, so that none holds the full model.

    With an adapter, every process holds the frozen base (see `shard`), and only the adapter is sharded.
    """
    model = empty_model(folder, recipe)
    stream = torch.cuda.Stream() if recipe.offload_activations and processes.device.type == "cuda" else None
    offload = Offload(stream) if recipe.offload_activations else None
    for layer in model.model.layers:
        layer.recompute, layer.offload = recipe.recompute_activations, offload
    model.float32_head = recipe.float32_head
    shard(model, processes.mesh, processes.compute_dtype)
    load_weights(model, folder, processes.device)
    initialise_lora(model, recipe.seed)
    return model
