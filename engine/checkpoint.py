"""Saving and resuming a run: everything that the next step depends on.

    RUN/checkpoints/step-N/    weights (of LoRA, the adapter alone) and optimizer, by torch.distributed.checkpoint
                    run.pt         where the run stands: stage, data position, pass rates, sinks, temperature
                    manifest.json  size and checksum of every file, written last

A checkpoint is written under another name, brought to the disk, and renamed when it is complete: a name that can be
seen is a checkpoint that was whole. What has happened to it since is seen on loading, and the newest that is still
whole is used. It may be resumed on another number of processes.

Checksums are CRC-32, a block at a time on several threads: they are to find a broken disk, not an attacker, and no
other hash of the standard library comes near (4 GB/s on one core; SHA-256 1.8, BLAKE2b 0.9). 48 GB, all that full
training of a 4B saves, take 12 core seconds; each process reads its own files, which the page cache still holds.
"""

import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
from engine.distributed import Processes
from engine.errors import UserError
from engine.files import sync_folder
from grpo import Sinks
from lab.metrics import FILES
from model import Transformer
from rollout import Rollout

MANIFEST = "manifest.json"
CHECKSUM_BLOCK = 2**26  # bytes that one thread reads


class CheckpointError(UserError):
    """A checkpoint that cannot be used, or written, in one sentence."""


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
    nonfinite_steps: int = 0  # the last so many updates had no finite gradient
    history: History = field(default_factory=History)
    sinks: Sinks = field(default_factory=Sinks)
    metrics_position: list[int] = field(default_factory=lambda: [0, 0])  # lines of metrics.jsonl and rollouts.jsonl


# ------------------------------------------------------------------------------------------------------- saving


def save_checkpoint(
    folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, state: RunState, processes: Processes, kept: int
) -> Path:
    """Write RUN/checkpoints/step-N and drop the oldest beyond `kept`. Every process calls it.

    Raises CheckpointError on all of them when one cannot write its part; older checkpoints stay as they are then.
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
        # a writer thread with an OpenMP team of its own would leave more threads than cores, and every later
        # operation slow
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            dcp.save(parts, checkpoint_id=unfinished, process_group=processes.gloo)  # which brings files to the disk
        finally:
            torch.set_num_threads(threads)
        return file_checksums(unfinished.glob(f"__{processes.rank}_*"))

    def complete() -> None:
        if not processes.is_main:
            return
        with (unfinished / "run.pt").open("wb") as file:
            torch.save(_pack(state), file)
            _sync(file)
        files = checksums | file_checksums([unfinished / "run.pt", unfinished / ".metadata"])
        write_manifest(unfinished, files)
        sync_folder(unfinished)
        if final.exists():  # the same step again: until the new one has its name, the old one counts
            final.rename(replaced)
        unfinished.rename(final)
        sync_folder(final.parent)

    try:
        together(processes, begin)
        for part in together(processes, write_tensors):
            checksums |= part
        together(processes, complete)
    except CheckpointError as error:
        if processes.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)  # the disk may be full of it
        raise CheckpointError(
            f"{final} cannot be written ({error}); older checkpoints are as they were: make room there, then go on "
            f"with --resume {folder}"
        ) from None
    if processes.is_main:
        found = list_checkpoints(folder)
        ahead = [path for path in found if _step(path) > state.step]  # passed over when this run was resumed
        older = found[: len(found) - len(ahead)][:-kept]
        for path in [*ahead, *older, *([replaced] if replaced.exists() else [])]:
            removed = path.with_suffix(".removed")  # a name that can be seen is whole, until the end
            path.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)
    processes.broadcast(None)  # nobody goes on before it is complete
    return final


def together(processes: Processes, work: Callable[[], Any]) -> list[Any]:
    """What `work` returned on every process; when it failed on one, CheckpointError on all: nobody is left waiting."""
    result, fault = None, None
    try:
        result = work()
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        fault = _reason(error)
    outcomes = processes.all_gather((result, fault))
    for _, fault in outcomes:
        if fault:
            raise CheckpointError(fault)
    return [result for result, _ in outcomes]


def _sync(file: Any) -> None:
    """Bring an open file to the disk: a rename must not outlive what it names."""
    file.flush()
    os.fsync(file.fileno())


def _reason(error: BaseException) -> str:
    """An error in a few words, on one line."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]  # of the first process that failed
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def checksum(path: Path) -> int:
    """CRC-32 over the CRC-32s of a file's blocks, which several threads read at once."""

    def of_block(start: int) -> bytes:
        crc, left, buffer = 0, CHECKSUM_BLOCK, bytearray(2**20)
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while left and (count := file.readinto(memoryview(buffer)[: min(left, len(buffer))])):
                crc, left = zlib.crc32(memoryview(buffer)[:count], crc), left - count
        return crc.to_bytes(4, "little")

    starts = range(0, path.stat().st_size, CHECKSUM_BLOCK)
    with ThreadPoolExecutor(max(1, min(8, len(starts)))) as threads:
        return zlib.crc32(b"".join(threads.map(of_block, starts)))


def file_checksums(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Size in bytes and checksum by name."""
    return {path.name: [path.stat().st_size, checksum(path)] for path in paths}


def write_manifest(checkpoint: Path, files: dict[str, list[int]]) -> None:
    """What the checkpoint must hold from now on, with a checksum of the list itself."""
    with (checkpoint / MANIFEST).open("w") as file:
        json.dump({"files": files, "checksum": _checksum_of(files)}, file, indent=1)
        _sync(file)


def _checksum_of(files: dict[str, list[int]]) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


# ------------------------------------------------------------------------------------------------------ loading


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found: dict[int, Path] = {}
    for path in sorted((folder / "checkpoints").glob("step-*")):  # step-8 comes before step-8.replaced
        if path.suffix in ("", ".replaced") and path.stem.removeprefix("step-").isdigit():
            found.setdefault(_step(path), path)
    return [found[step] for step in sorted(found)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step-"))


def damage(checkpoint: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What has happened to a checkpoint since it was written, if anything; of several processes each reads a share."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files = manifest["files"]
        if _checksum_of(files) != manifest["checksum"]:
            return f"{MANIFEST} has changed since it was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({_reason(error)})"
    for name, (size, crc) in sorted(files.items())[rank::ranks]:
        try:
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes, not {size:,}"
            if checksum(checkpoint / name) != crc:
                return f"{name} has changed since it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({_reason(error)})"
    return None


def read_state(
    folder: Path, processes: Processes | None = None, lines: Sequence[int] | None = None
) -> tuple[Path, RunState] | None:
    """The newest checkpoint that is whole, and where the run stood; None when there is none at all.

    Every process calls it; without `processes` a single one reads.

    What is passed over, and why, is said. `lines` are the whole lines that metrics.jsonl and rollouts.jsonl hold now: a
    checkpoint that counts on more of them is passed over too. Raises CheckpointError when none can be used.
    """
    passed_over = []
    checkpoints = list_checkpoints(folder)[::-1]
    for checkpoint in processes.broadcast(checkpoints) if processes else checkpoints:
        if processes:
            fault = next(
                filter(None, processes.all_gather(damage(checkpoint, processes.rank, processes.world_size))), None
            )
        else:
            fault = damage(checkpoint)
        if not fault:
            try:
                packed = torch.load(checkpoint / "run.pt", weights_only=True)
                random = packed.pop("torch_rng")
                state = _unpack(packed)
            except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
                fault = f"run.pt cannot be read ({_reason(error)})"
            else:
                for name, now, then in zip(FILES, lines or state.metrics_position, state.metrics_position, strict=True):
                    if now < then:
                        fault = f"{name} holds only {now} of the {then} lines that it goes on from"
        if not fault:
            torch.set_rng_state(random)
            return checkpoint, state
        passed_over.append(f"{checkpoint.name} ({fault})")
        (processes.say if processes else print)(f"passed over {checkpoint}: {fault}")
    if passed_over:
        raise CheckpointError(
            f"no checkpoint of {folder} can be used: {'; '.join(passed_over)}: put one back, or remove "
            f"{folder / 'checkpoints'} to begin again from nothing"
        )
    return None


def trained_parts(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """The tensors of a checkpoint. A frozen base is left out: it is in the model's folder."""
    weights = get_model_state_dict(model)
    if model.lora:
        weights = {name: tensor for name, tensor in weights.items() if ".lora_" in name}
    fresh = not optimizer.state
    moments = get_optimizer_state_dict(model, optimizer)
    if fresh:  # torch has made the moments by a step with rate 0, and counted it
        for state in [*moments["state"].values(), *optimizer.state.values()]:
            state["step"].zero_()
    return {"model": weights, "optimizer": moments}


def adapter_rank(checkpoint: Path) -> int:
    """The rank of the adapter in a checkpoint; 0 when it holds whole weights."""
    tensors = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return next((tensor.size[0] for name, tensor in tensors.items() if name.endswith(".lora_A")), 0)


def load_weights_and_optimizer(
    checkpoint: Path, model: Transformer, optimizer: torch.optim.Optimizer, processes: Processes
) -> None:
    """Fill model and optimizer, on any number of processes. Every process calls it."""
    parts = trained_parts(model, optimizer)
    wanted = model.lora.rank if model.lora else 0
    try:
        saved = adapter_rank(checkpoint)
        if saved == wanted:
            dcp.load(parts, checkpoint_id=checkpoint, process_group=processes.gloo)
    except (OSError, RuntimeError, ValueError, dcp.api.CheckpointException) as error:
        raise CheckpointError(
            f"{checkpoint} cannot be read ({_reason(error)}): remove it to resume from an older one"
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
    history, sinks = History(), Sinks()
    history.load_state_dict(packed.pop("history"))
    for problem_id, fields in packed.pop("sinks").items():
        reward = fields.pop("reward")
        arrays = {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in fields.items()}
        sinks.held[problem_id] = (Rollout(**arrays), reward)
    return RunState(**packed, history=history, sinks=sinks)
