"""Saving and resuming a run: everything that the next step depends on.

    RUN/checkpoints/step-N/         weights (of LoRA, the adapter alone) and optimizer, by torch.distributed.checkpoint
    RUN/checkpoints/step-N/run.pt   where the run stands: stage, data position, pass rates, sinks, temperature

A checkpoint is written under another name and renamed when it is complete, so that a name that can be seen is a
checkpoint that can be used. It may be resumed on another number of processes.
"""

import pickle
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from data_filter import History
from device import Device
from grpo import Sinks
from model import Transformer
from rollout import Rollout


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, in one sentence."""


@dataclass
class RunState:
    """Where a run stands between two steps. Sampling is counted, so this and the weights fix all that follows."""

    step: int = 0  # over all stages
    stage: int = 0
    stage_step: int = 0
    stage_tokens: int = 0  # of this stage's training rollouts so far
    prepared: bool = False  # the stage's filter and temperature search are done
    position: int = 0  # problems handed out in this stage
    problem_ids: list[str] = field(default_factory=list)  # of the stage; empty before the first rl stage
    probe_ids: list[str] = field(default_factory=list)  # problems on which diversity is measured, in every stage
    probe_tokens: int = 0  # and the longest response there
    temperature: float = 0.0
    diversity: float | None = None  # distinct-4 at the stage's start, which the next stage restores
    history: History = field(default_factory=History)
    sinks: Sinks = field(default_factory=Sinks)
    response_lengths: dict[str, float] = field(default_factory=dict)  # mean of a problem's newest group, in tokens
    metrics_position: list[int] = field(default_factory=lambda: [0, 0])  # lines of metrics.jsonl and rollouts.jsonl


def save_checkpoint(
    folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, state: RunState, device: Device, kept: int
) -> Path:
    """Write RUN/checkpoints/step-N and drop the oldest beyond `kept`. Every process calls it."""
    final = folder / "checkpoints" / f"step-{state.step}"
    unfinished = final.with_suffix(".unfinished")
    if device.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    device.share(None)  # nobody writes before the folder is there
    parts = trained_parts(model, optimizer)
    # a writer thread with an OpenMP team of its own would leave more threads than cores, and every later operation slow
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        dcp.save(parts, checkpoint_id=unfinished, process_group=device.objects)
    finally:
        torch.set_num_threads(threads)
    if device.is_main:
        torch.save(_pack(state), unfinished / "run.pt")
        if final.exists():  # the same step saved again, when a stage ends on a checkpoint
            shutil.rmtree(final)
        unfinished.rename(final)
        for old in list_checkpoints(folder)[:-kept]:
            shutil.rmtree(old)
    device.share(None)  # nobody goes on before it is complete
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in (folder / "checkpoints").glob("step-*") if path.suffix != ".unfinished"]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read_state(folder: Path) -> tuple[Path, RunState] | None:
    """The newest checkpoint's folder and where the run stood; None when there is no checkpoint."""
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return None
    newest = checkpoints[-1]
    try:
        return newest, _unpack(torch.load(newest / "run.pt", weights_only=True))
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{newest}: run.pt cannot be read ({reason}): remove the folder to resume from an older one"
        ) from None


def trained_parts(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """The tensors of a checkpoint. A frozen base is left out: it is in the model's folder."""
    weights = get_model_state_dict(model)
    if model.lora:
        weights = {name: tensor for name, tensor in weights.items() if ".lora_" in name}
    return {"model": weights, "optimizer": get_optimizer_state_dict(model, optimizer)}


def adapter_rank(checkpoint: Path) -> int:
    """The rank of the adapter in a checkpoint; 0 when it holds whole weights."""
    tensors = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return next((tensor.size[0] for name, tensor in tensors.items() if name.endswith(".lora_A")), 0)


def load_weights_and_optimizer(
    checkpoint: Path, model: Transformer, optimizer: torch.optim.Optimizer, device: Device
) -> None:
    """Fill model and optimizer, on any number of processes. Every process calls it."""
    parts = trained_parts(model, optimizer)
    wanted = model.lora.rank if model.lora else 0
    try:
        saved = adapter_rank(checkpoint)
        if saved == wanted:
            dcp.load(parts, checkpoint_id=checkpoint, process_group=device.objects)
    except (OSError, RuntimeError, ValueError, dcp.api.CheckpointException) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{checkpoint} cannot be read ({reason}): remove it to resume from an older one"
        ) from None
    if saved != wanted:
        raise CheckpointError(f"{checkpoint} was saved with lora.rank = {saved}, not {wanted}: resume with that rank")
    # not strict: a frozen base is no part of a checkpoint
    set_model_state_dict(model, parts["model"], options=StateDictOptions(strict=not wanted))
    set_optimizer_state_dict(model, optimizer, parts["optimizer"])


def _pack(state: RunState) -> dict:
    """Plain types and tensors only: what torch.load reads without running code."""
    plain = {key: value for key, value in vars(state).items() if key not in ("history", "sinks")}
    sinks = {}
    for problem_id, (rollout, reward) in state.sinks.held.items():
        arrays = {
            key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for key, value in asdict(rollout).items()
        }
        sinks[problem_id] = arrays | {"reward": reward}
    return plain | {"history": state.history.state_dict(), "sinks": sinks, "torch_rng": torch.get_rng_state()}


def _unpack(packed: dict) -> RunState:
    torch.set_rng_state(packed.pop("torch_rng"))
    history, sinks = History(), Sinks()
    history.load_state_dict(packed.pop("history"))
    for problem_id, fields in packed.pop("sinks").items():
        reward = fields.pop("reward")
        arrays = {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in fields.items()}
        sinks.held[problem_id] = (Rollout(**arrays), reward)
    return RunState(**packed, history=history, sinks=sinks)
