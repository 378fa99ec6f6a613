"""When memory runs out in the update: retry with smaller micro-batches, or say which setting to change."""

import gc
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from engine.batches import TrainingSequence, packed_tokens
from engine.errors import UserError

Batches = list[list[TrainingSequence]]
Result = TypeVar("Result")


class UpdateError(UserError):
    """The update cannot be made with the memory available."""


def retry_with_smaller_batches(
    attempt: Callable[[Batches], Result],
    cut: Callable[[int], Batches],
    max_tokens: int,
    model: nn.Module,
    ranks: int,
) -> tuple[Result, Batches, int, int]:
    """Call `attempt(cut(max_tokens))`, and again with half the size each time memory runs out.

    Return its result, the micro-batches and the size that fitted, and the number of retries. Raise UpdateError if no
    micro-batch can be cut further, or if the attempt cannot be repeated.
    """
    retries = 0
    while True:
        batches = cut(max_tokens)
        try:
            return attempt(batches), batches, max_tokens, retries
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            max_tokens, retries = smaller_size(batches, model, ranks), retries + 1
        # only after the except block do the frames of the error's traceback release their tensors
        reset_after_failed_pass(model)


def smaller_size(batches: Batches, model: nn.Module, ranks: int) -> int:
    """Return half the tokens of the largest micro-batch that can be cut; raise UpdateError if a retry is impossible."""
    sizes = [packed_tokens(batch) for batch in batches if len(batch) > 1]
    if not sizes:
        longest = max(len(sequence.tokens) for batch in batches for sequence in batch)
        raise UpdateError(
            f"out of memory in the update with one sequence at a time, of at most {longest:,} tokens: "
            "train a LoRA adapter, set offload_activations or offload_optimizer, or shorten the stage"
        ) from None
    # the other ranks wait in a collective of this micro-batch and cannot be told to retry; a torch without this
    # method cannot undo the partial pass of a sharded model
    if ranks > 1 or (isinstance(model, FSDPModule) and not hasattr(model, "reset_iter_state")):
        raise UpdateError(
            f"out of memory in the update: set micro_batch_tokens to {max(sizes) // 2} or less and resume the run; "
            "a retry with smaller micro-batches needs a run of one process, on torch 2.13 or newer"
        ) from None
    return max(sizes) // 2


def reset_after_failed_pass(model: nn.Module) -> None:
    """Release the memory and gradients of a forward or backward that failed, and reshard all weights."""
    if isinstance(model, FSDPModule):
        model.reset_iter_state()
        for module in model.modules():
            if isinstance(module, FSDPModule):  # the gradients of weights that were still gathered remain
                module.unshard()
                module.zero_grad(set_to_none=True)
                module.reshard()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step_within_memory(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's step; raise UpdateError if there is no memory for the moments, allocated in the first."""
    try:
        optimizer.step()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if isinstance(error, MemoryError):
            raise UpdateError(
                f"{error or 'out of memory'}: the moments exceed host memory: train a LoRA adapter"
            ) from None
        raise UpdateError(
            "out of memory in the optimizer step: set offload_optimizer = true or train a LoRA adapter"
        ) from None


def host_memory_bytes() -> int:
    """Return the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory_bytes(device: torch.device) -> int:
    """Return the GPU's free memory; on a CPU, this process's share of a third of the machine's memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return host_memory_bytes() // 3 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def out_of_memory(error: BaseException) -> bool:
    """Whether the accelerator's or the CPU's allocator ran out of memory."""
    if error.__context__ is not None and out_of_memory(error.__context__):  # for example, during a graph's capture
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
