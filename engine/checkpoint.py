"""Saving and resuming a run: everything that the next step depends on.

    RUN/checkpoints/step-N/    weights (with LoRA, only the adapter) and optimizer, by torch.distributed.checkpoint
                    run.pt         the RunState: stage, data position, pass rates, sinks, temperature
                    manifest.json  size and checksum of every file, written last

A checkpoint is written under a temporary name, synced to disk, and renamed once it is complete, so that step-N is
always complete. Loading checks every file and uses the newest undamaged checkpoint. A run may resume on another number
of processes.

Checksums are CRC-32, computed per block on several threads: they detect a failing disk, not an attacker, and no other
hash of the standard library is as fast (4 GB/s on one core; SHA-256 1.8, BLAKE2b 0.9). Full training of a 4B model
saves 48 GB, which take 12 core seconds; each process reads its own files, which are still in the page cache.

A checkpoint may come from somebody else: nothing that it contains is executed. torch.distributed.checkpoint itself
would run code from a pickle in two places, `.metadata` and the values that are no tensors; both are read here.
"""

import io
import json
import math
import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from data_filter import History
from engine.distributed import Processes
from engine.errors import UserError
from engine.files import atomic_file, checksum, file_checksums, sync_folder, write_atomically
from grpo import Sinks
from lab.metrics import FILES
from lab.recipe import RlStage, SftStage
from model import Transformer
from rollout import Rollout

MANIFEST = "manifest.json"


class CheckpointError(UserError):
    """A checkpoint cannot be used or written."""


@dataclass
class RunState:
    """The state of a run between two steps; with the weights it determines all later steps (draws are counted)."""

    step: int = 0  # over all stages
    stage: int = 0
    stage_step: int = 0
    stage_tokens: int = 0  # of this stage's training rollouts so far
    prepared: bool = False  # the stage's filter and temperature search are done
    position: int = 0  # problems used so far in this stage
    problem_ids: list[str] = field(default_factory=list)  # of the stage; empty before the first rl stage
    probe_ids: list[str] = field(default_factory=list)  # problems on which diversity is measured, in every stage
    probe_tokens: int = 0  # length limit of responses to them
    temperature: float = 0.0
    diversity: float | None = None  # distinct-4 at the start of the first rl stage, which "match-first" restores
    previous_diversity: float | None = None  # of the previous one, which "match" restores
    predicted: dict[str, list[float]] = field(default_factory=dict)  # of this stage, by lab/premises.py
    nonfinite_steps: int = 0  # consecutive updates up to now without a finite gradient
    history: History = field(default_factory=History)
    sinks: Sinks = field(default_factory=Sinks)
    metrics_position: list[int] = field(default_factory=lambda: [0, 0])  # lines of metrics.jsonl and rollouts.jsonl

    def steps_left(self, stage: SftStage | RlStage) -> int:
        """Return the steps until the stage ends: by count or, at its mean tokens per step, by token budget."""
        left = stage.steps - self.stage_step
        if isinstance(stage, RlStage) and stage.generated_tokens and self.stage_tokens:
            tokens_left = max(0, stage.generated_tokens - self.stage_tokens)
            left = min(left, math.ceil(tokens_left * self.stage_step / self.stage_tokens))
        return max(0, left)


# ------------------------------------------------------------------------------------------------------- saving


def save_checkpoint(
    folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, state: RunState, processes: Processes, kept: int
) -> Path:
    """Write RUN/checkpoints/step-N and remove the oldest beyond `kept`. Every process calls it.

    Raises CheckpointError on all processes when one cannot write its part; older checkpoints then stay as they were.
    """
    final = folder / "checkpoints" / f"step-{state.step}"
    unfinished, replaced = final.with_suffix(".unfinished"), final.with_suffix(".replaced")
    checksums: dict[str, list[int]] = {}

    def begin() -> None:
        if processes.is_main:
            for path in final.parent.glob("step-*.*"):  # left by a launch that was killed
                if path.suffix != ".replaced" or path.with_suffix("").exists():
                    shutil.rmtree(path)
            unfinished.mkdir(parents=True)

    def write_tensors() -> dict[str, list[int]]:
        parts = trained_parts(model, optimizer)
        # a writer thread with its own OpenMP team would leave more threads than cores, and slow down all later work
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            dcp.save(parts, checkpoint_id=unfinished, process_group=processes.gloo)  # syncs its files
        finally:
            torch.set_num_threads(threads)
        return file_checksums(unfinished.glob(f"__{processes.rank}_*"))

    def complete() -> None:
        if not processes.is_main:
            return
        with atomic_file(unfinished / "run.pt") as file:  # sinks may be gigabytes: not twice in memory
            torch.save(_pack(state), file)
        write_manifest(unfinished, checksums | file_checksums([unfinished / "run.pt", unfinished / ".metadata"]))
        if final.exists():  # the same step again: the old one counts until the new one has its name
            final.rename(replaced)
        unfinished.rename(final)
        sync_folder(final.parent)

    try:
        _together(processes, begin)
        for part in _together(processes, write_tensors):
            checksums |= part
        _together(processes, complete)
    except CheckpointError as error:
        if processes.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)  # it may fill the disk
        raise CheckpointError(
            f"{final} cannot be written ({error}); older checkpoints are unchanged: free some space, then resume with "
            f"--resume {folder}"
        ) from None
    if processes.is_main:
        found = list_checkpoints(folder)
        later = [path for path in found if _step(path) > state.step]  # damaged: this run resumed from an older one
        older = found[: len(found) - len(later)][:-kept]
        for path in [*later, *older, *([replaced] if replaced.exists() else [])]:
            removed = path.with_suffix(".removed")  # so that step-N stays complete until it is gone
            path.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)
    processes.broadcast(None)  # no process continues before the checkpoint is complete
    return final


def _together(processes: Processes, work: Callable[[], Any]) -> list[Any]:
    """Return the results of `work` on all processes; raise CheckpointError on all of them when it fails on one."""
    result, fault = None, None
    try:
        result = work()
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        fault = _reason(error)
    results, faults = zip(*processes.all_gather((result, fault)), strict=True)
    if any(faults):
        raise CheckpointError(next(filter(None, faults)))
    return results


def _reason(error: BaseException) -> str:
    """Return an error as one line."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]  # of the first process that failed
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write_manifest(checkpoint: Path, files: dict[str, list[int]]) -> None:
    """Write the list of a checkpoint's files, with the list's own checksum."""
    text = json.dumps({"files": files, "checksum": _list_checksum(files)}, indent=1)
    write_atomically(checkpoint / MANIFEST, [text.encode()])


def _list_checksum(files: dict[str, list[int]]) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


# ------------------------------------------------------------------------------------------------------ loading


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found: dict[int, Path] = {}
    for path in sorted((folder / "checkpoints").glob("step-*")):  # step-8 comes before step-8.replaced
        if path.suffix in ("", ".replaced") and path.stem.removeprefix("step-").isdigit():
            found.setdefault(_step(path), path)
    return [found[step] for step in sorted(found)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step-"))


def damage(checkpoint: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """Return what has changed in a checkpoint since it was written, None if nothing; each rank checks some files."""
    name = MANIFEST
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if _list_checksum(files) != manifest["checksum"]:
            return f"{MANIFEST} has changed since it was written"
        for name, (size, crc) in sorted(files.items())[rank::ranks]:
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes, not {size:,}"
            if checksum(checkpoint / name) != crc:
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{name} cannot be read ({_reason(error)})"
    return None


def read_state(
    folder: Path, processes: Processes | None = None, lines: Sequence[int] | None = None
) -> tuple[Path, RunState] | None:
    """Return the newest undamaged checkpoint and its RunState, None when there is no checkpoint; restore torch's RNG.

    Every process calls it, or a single one without `processes`. `lines` are the complete lines of metrics.jsonl and
    rollouts.jsonl: a checkpoint that continues from more of them is skipped as well. Prints which checkpoints are
    skipped and why. Raises CheckpointError when none can be used.
    """
    gather, say, share = (lambda value: [value]), print, (0, 1)
    if processes:
        gather, say, share = processes.all_gather, processes.say, (processes.rank, processes.world_size)
    skipped = []
    for checkpoint in gather(list_checkpoints(folder)[::-1])[0]:
        fault = next(filter(None, gather(damage(checkpoint, *share))), None)
        if not fault:
            try:
                packed = torch.load(checkpoint / "run.pt", weights_only=True)
                torch.set_rng_state(packed.pop("torch_rng"))
                state = _unpack(packed)
            except Exception as error:  # of any type: the file may contain anything
                fault = f"run.pt cannot be read ({_reason(error)})"
            else:
                for name, now, then in zip(FILES, lines or state.metrics_position, state.metrics_position, strict=True):
                    if now < then:
                        fault = f"{name} has only {now} of the {then} lines that it continues from"
        if not fault:
            return checkpoint, state
        skipped.append(f"{checkpoint.name} ({fault})")
        say(f"skipped {checkpoint}: {fault}")
    if skipped:
        raise CheckpointError(
            f"no checkpoint of {folder} can be used: {'; '.join(skipped)}: restore one, or remove "
            f"{folder / 'checkpoints'} to start over"
        )
    return None


# all that a pickled Metadata refers to, in addition to dtypes
PICKLED = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        metadata.Metadata, metadata.TensorStorageMetadata, metadata.BytesStorageMetadata, metadata.TensorProperties,
        metadata.ChunkStorageMetadata, metadata.MetadataIndex, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo, torch.Size,
    )
}  # fmt: skip
PICKLED |= {("torch.serialization", "_get_layout"): lambda name: torch.strided}
PICKLED |= {  # Python 3.13 pickles a path under another name
    (module, kind): os.path.join for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "WindowsPath")
}


class MetadataUnpickler(pickle.Unpickler):
    """Read a pickled Metadata without running anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class of PICKLED or a dtype. Raises UnpicklingError for any other name, which may be a program."""
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if (module, name) not in PICKLED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint")
        return PICKLED[module, name]


class DataReader(dcp.FileSystemReader):
    """DCP's reader, which reads `.metadata` with MetadataUnpickler."""

    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        """Return what the checkpoint contains, and in which files."""
        with (self.path / ".metadata").open("rb") as file:
            return MetadataUnpickler(file).load()


class DataPlanner(dcp.DefaultLoadPlanner):
    """DCP's planner, which reads values that are no tensors as plain data."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Read a value without running code, and hand DCP, which would run it, a copy of our own."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        super().load_bytes(read_item, io.BytesIO(plain.getvalue()))


def trained_weights(model: Transformer) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint, without a frozen base, which is in the model's folder."""
    weights = get_model_state_dict(model)
    return {name: tensor for name, tensor in weights.items() if not model.lora or ".lora_" in name}


def trained_parts(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """Return the tensors of a checkpoint."""
    fresh = not optimizer.state
    moments = get_optimizer_state_dict(model, optimizer)
    if fresh:  # torch has created the moments with a step at rate 0, and counted it
        for state in [*moments["state"].values(), *optimizer.state.values()]:
            state["step"].zero_()
    return {"model": trained_weights(model), "optimizer": moments}


def load_weights_and_optimizer(
    checkpoint: Path, model: Transformer, optimizer: torch.optim.Optimizer, processes: Processes
) -> None:
    """Load a checkpoint into model and optimizer, on any number of processes. Every process calls it."""
    parts = trained_parts(model, optimizer)
    _load(parts, checkpoint, model, process_group=processes.gloo)
    # not strict: a checkpoint does not contain a frozen base
    set_model_state_dict(model, parts["model"], options=StateDictOptions(strict=not model.lora))
    set_optimizer_state_dict(model, optimizer, parts["optimizer"])


def load_trained_weights(checkpoint: Path, model: Transformer) -> None:
    """Copy a checkpoint's weights into an unsharded model, without processes: for export."""
    if fault := damage(checkpoint):
        raise CheckpointError(f"{checkpoint} cannot be used ({fault}): export another one")
    with warnings.catch_warnings(action="ignore"):  # of a single process, as intended
        _load({"model": trained_weights(model)}, checkpoint, model, no_dist=True)


def _load(parts: dict[str, dict], checkpoint: Path, model: Transformer, **options: Any) -> None:
    """Copy a checkpoint's tensors into those of `parts`. Raises CheckpointError for another lora.rank."""
    wanted = model.lora.rank if model.lora else 0
    try:
        reader = DataReader(checkpoint)
        saved_tensors = reader.read_metadata().state_dict_metadata
        saved = next((tensor.size[0] for name, tensor in saved_tensors.items() if name.endswith(".lora_A")), 0)
        if saved == wanted:
            dcp.load(parts, storage_reader=reader, planner=DataPlanner(), **options)
    except (Exception, dcp.api.CheckpointException) as error:  # of any type: the files may contain anything
        raise CheckpointError(
            f"{checkpoint} cannot be read ({_reason(error)}): remove it to resume from an older one"
        ) from None
    if saved != wanted:
        raise CheckpointError(f"{checkpoint} was saved with lora.rank = {saved}, not {wanted}: resume with that rank")


def _pack(state: RunState) -> dict:
    """Return the state as plain types and tensors, which torch.load reads without running code."""
    sinks = {}
    for problem_id, (rollout, reward) in state.sinks.held.items():
        fields = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in vars(rollout).items()}
        sinks[problem_id] = fields | {"reward": reward}
    return vars(state) | {"history": state.history.state_dict(), "sinks": sinks, "torch_rng": torch.get_rng_state()}


def _unpack(packed: dict) -> RunState:
    history, sinks = History(), Sinks()
    history.load_state_dict(packed.pop("history"))
    for problem_id, fields in packed.pop("sinks").items():
        reward = fields.pop("reward")
        arrays = {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in fields.items()}
        sinks.held[problem_id] = (Rollout(**arrays), reward)
    return RunState(**packed, history=history, sinks=sinks)
