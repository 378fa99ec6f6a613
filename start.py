"""The beginning of a run: its folder, its data and its model, and the place where it goes on.

Whatever can be found wrong is found here, before the first step: a recipe, data or a model that do not go together,
a run that was made otherwise than it is to go on, a folder that another process writes.
"""

import argparse
import fcntl
import glob
import json
import math
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from arithmetic import write_world
from attempts import Respondent, encode, encode_chat, load_tokenizer, stop_tokens
from benchmarks import find_data
from checkpoint import (
    CheckpointError,
    RunState,
    code_version,
    data_identity,
    differences,
    git_commit,
    model_identity,
    read_state,
    together,
)
from data_filter import DataOrder
from device import Device, StopRequest
from grpo import TrainingSequence
from model import (
    Lora,
    ModelConfig,
    Offload,
    Transformer,
    add_lora,
    extend_window,
    initialise_lora,
    load_weights,
    read_config,
    resolve_folder,
    shard,
)
from problems import (
    DATA_FILES,
    DataError,
    Problem,
    benchmark_copies,
    duplicated,
    existing_file,
    has_chats,
    read_chats,
    read_problems,
)
from recipe import EvalSettings, FinalSettings, Recipe, RecipeError, RlStage, SftStage, load_recipe, to_toml
from report import Metrics, read_metrics, whole_lines, write_atomically
from reward import Grader
from rollout import CacheLimits, Sampling, cache_bytes_per_token, check_requests

# samples drawn for a purpose other than a training step are counted from a place of their own
EVALUATION_DRAW, SEARCH_DRAW = -1, -3
FEW = 3  # pairs of problems that guard_data names
WANTS_RESUMING = "resume-me"  # in a run's folder: it was asked to stop, and wants to go on
FINISHED = "finished"  # and: it came to its end
AGREED = "agreed.json"  # and: what changed on purpose since its newest checkpoint, so that it is asked once


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


# ----------------------------------------------------------------------------------------- a folder, new or found again


def new_name(parent: Path, name: str, ending: str = "") -> Path:
    """NAME, or NAME-2 and so on when that is taken: nothing is ever overwritten."""
    numbered = (parent / f"{name}{f'-{number}' if number > 1 else ''}{ending}" for number in count(1))
    return next(path for path in numbered if not path.exists())


def new_folder(parent: Path, name: str) -> Path:
    """A new folder runs/NAME, or runs/NAME-2 and so on."""
    while True:
        try:
            folder = new_name(parent, name)
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run took the name in the meantime
            continue
        except OSError as error:
            raise RecipeError(f"{folder} cannot be made ({error.strerror}); give another --out") from None


def versions() -> str:
    """What the run was made with, as TOML comments."""
    parts = [
        f"python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
    ]
    return f"# {', '.join(parts)}, commit {git_commit(Path(__file__).parent)}\n"


def find_unfinished(out: Path, recipe: Recipe, anyway: bool) -> Path | None:
    """The newest unfinished run of this very recipe in `out`; None where none has its name.

    Raises CheckpointError when those of its name differ, unless that is allowed: none is passed over in silence.
    """
    found, told = [], []
    for path in out.glob(f"{glob.escape(recipe.name)}*/recipe.toml"):
        own = re.fullmatch(rf"{re.escape(recipe.name)}(-\d+)?", path.parent.name)
        if own and not (path.parent / FINISHED).exists():
            found.append(path)
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        differing = differences({"recipe": path.read_text(encoding="utf-8")}, {"recipe": to_toml(recipe)})
        if anyway or not differing:
            return path.parent
        told.append(f"{path.parent} ({differing[0]}{f' and {len(differing) - 1} more' * (len(differing) > 1)})")
    if told:
        raise CheckpointError(
            f"no unfinished run in {out} has this recipe: {'; '.join(told)}: name one with --resume RUN, leave "
            "--resume out to begin another, or take the newest as it is with --resume-anyway"
        )
    return None


def hold(folder: Path) -> int:
    """Take a run's folder for this process, until it ends however it ends; CheckpointError when another has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(f"{folder} is being written by another process: wait for its end, or stop it") from None
    except OSError:  # a file system without locks
        pass
    return descriptor


def run_fingerprint(recipe: Recipe, folder: Path) -> dict[str, str]:
    """What a run depends on beside its checkpoint: see `differences`."""
    found = {"recipe": to_toml(recipe), "code": code_version(Path(__file__).parent)}
    found["model"] = model_identity(model_source(recipe, folder))
    for source in {stage.data for stage in recipe.stage} | {recipe.eval.data, recipe.final.data}:
        if source:
            path = str(folder / source) if source.startswith("world/") else source
            found[f"data {source}"] = data_identity(read_chats(path) if has_chats(path) else problems_of(path))
    return found


def model_source(recipe: Recipe, folder: Path) -> Path:
    """The folder of the model that the run begins with."""
    return folder / recipe.model if recipe.model.startswith("world/") else resolve_folder(recipe.model)


def by_main(device: Device, work: Callable[[], Any]) -> Any:
    """What the main process's `work` returned; when it fails, it fails on every process, and none is left waiting."""
    return together(device, lambda: work() if device.is_main else None)[0]


def open_run(arguments: argparse.Namespace, device: Device) -> tuple[Recipe, Path, int | None, Path | None, RunState]:
    """A new run's folder, or an old one with the place where it stopped; held by the main process."""
    folder = arguments.resume if isinstance(arguments.resume, Path) else None
    if folder and not (folder / "recipe.toml").is_file():
        raise RecipeError(f"{folder} is no run: it has no recipe.toml; give a folder that train.py has made")
    recipe = load_recipe(folder / "recipe.toml" if folder else arguments.recipe, arguments.set)
    check_recipe(recipe)
    # torchrun --max-restarts starts the same command again: it goes on
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if folder is None and (arguments.resume or restarted):
        anyway = arguments.resume_anyway
        folder = by_main(device, lambda: find_unfinished(arguments.out, recipe, anyway))
        if folder is None:
            device.say(f"no unfinished run of {recipe.name} in {arguments.out}: beginning")
    resumed, found = folder is not None, None
    if not resumed:
        folder = by_main(device, lambda: new_folder(arguments.out, recipe.name))
    lock = by_main(device, lambda: hold(folder))
    lock = lock if device.is_main else None  # a number that means nothing elsewhere
    if not resumed and device.is_main and recipe.world:
        write_world(recipe.world, folder / "world")
    device.share(None)  # nobody reads the world before it is written
    now = run_fingerprint(recipe, folder)
    if resumed:
        found = read_state(folder, device, device.share(whole_lines(folder) if device.is_main else None))
        device.say(
            f"resuming {folder} after step {found[1].step}" if found else f"{folder} has no checkpoint: beginning again"
        )
    state = found[1] if found else RunState()
    if found:
        # a value set beside the name of a run is changed on purpose; in "the same command" nothing is
        chosen = [value.partition("=")[0] for value in arguments.set] if isinstance(arguments.resume, Path) else []
        agreed = json.loads((folder / AGREED).read_text()) if (folder / AGREED).exists() else {}
        differing = differences(agreed.get(found[0].name, state.fingerprint), now, chosen)
        for difference in differing:
            device.say(f"differs from the run so far: {difference}")
        if differing and not arguments.resume_anyway:
            if lock is not None:
                os.close(lock)
            raise CheckpointError(
                f"{folder} was made otherwise: {'; '.join(differing)}: put it back as it was, or go on all the same "
                "with --resume-anyway"
            )
    if device.is_main:
        path = folder / "recipe.toml"
        changed = path.exists() and differences({"recipe": path.read_text(encoding="utf-8")}, now) != []
        if resumed:
            forget_what_follows(folder, recipe, state, changed)
        if changed:  # what the earlier part of the run was made with stays on record
            new_name(folder, "recipe-before", ".toml").write_bytes(path.read_bytes())
        if changed or not path.exists():
            write_atomically(path, [(versions() + to_toml(recipe)).encode()])
        if found and now != state.fingerprint:
            write_atomically(folder / AGREED, [json.dumps({found[0].name: now}).encode()])
    state.fingerprint = now
    return recipe, folder, lock, *(found or (None, state))


def forget_what_follows(folder: Path, recipe: Recipe, state: RunState, changed: bool) -> None:
    """Remove the pass rates of weights that this run will not have: after an older checkpoint, or another recipe.

    Those that the checkpoint's own weights have stay: the next stage's, when the checkpoint is at its stage's end.
    """
    at_end = state.stage < len(recipe.stage) and not steps_left(recipe.stage[state.stage], state)
    first = state.stage + (0 if changed and not state.prepared else 1 if changed or not at_end else 2)
    for index in range(first, len(recipe.stage)):
        (folder / f"pass-rates-{index}.jsonl").unlink(missing_ok=True)


def steps_left(stage: SftStage | RlStage, state: RunState) -> int:
    """Steps until the stage ends, by number or, at the length of its rollouts so far, by their tokens; 0 at its end."""
    left = stage.steps - state.stage_step
    if isinstance(stage, RlStage) and stage.generated_tokens and state.stage_tokens:
        tokens_left = max(0, stage.generated_tokens - state.stage_tokens)
        left = min(left, math.ceil(tokens_left * state.stage_step / state.stage_tokens))
    return max(0, left)


# -------------------------------------------------------------------------------------------------- the recipe's inputs


def check_recipe(recipe: Recipe) -> None:
    """What can be found wrong before anything is written or loaded."""
    for source in [stage.data for stage in recipe.stage] + [recipe.eval.data, recipe.final.data]:
        if source.startswith("world/") and not recipe.world:
            raise RecipeError(f"{source}: the recipe has no [world] that would write it; write ./{source} for a file")
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


# ------------------------------------------------------------------------------------------------------------ the model


def model_config(folder: Path, recipe: Recipe) -> ModelConfig:
    """The model's config with the recipe's window, in which every stage must fit."""
    config = read_config(folder)
    if recipe.max_position_embeddings:
        config = replace(config, max_position_embeddings=recipe.max_position_embeddings)
    for index, stage in enumerate(recipe.stage):
        if isinstance(stage, SftStage):
            continue
        if stage.max_prompt_tokens + stage.max_response_tokens > config.max_position_embeddings:
            raise RecipeError(
                f"stage.{index}: {stage.max_prompt_tokens} + {stage.max_response_tokens} tokens exceed the model's "
                f"window of {config.max_position_embeddings}: set max_position_embeddings in the recipe"
            )
    return config


def final_config(config: ModelConfig, recipe: Recipe) -> ModelConfig:
    """The config of the last evaluation: YaRN, and a window as long as it makes it."""
    final = recipe.final
    return extend_window(config, final.yarn_factor, final.yarn_original_window, final.yarn_attention_factor)


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


@cache
def problems_of(path: str) -> list[Problem]:
    """The problems of a file or hub data set, read once per run."""
    return read_problems(path)


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
