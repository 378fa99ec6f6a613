"""When memory runs out: begin the update again with smaller micro-batches, or say in one sentence what to set."""

import gc
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
    """An update that cannot be made, in one sentence."""


def with_smaller_batches(
    attempt: Callable[[Batches], Result],
    cut: Callable[[int], Batches],
    most_tokens: int,
    model: nn.Module,
    ranks: int,
) -> tuple[Result, Batches, int, int]:
    """`attempt(cut(most_tokens))`, begun again at half the size each time memory runs out.

    Returns its result, the micro-batches and the size that fitted, and how often memory ran out. UpdateError where no
    micro-batch can be cut further, or where the attempt cannot be repeated.
    """
    retries = 0
    while True:
        batches = cut(most_tokens)
        try:
            return attempt(batches), batches, most_tokens, retries
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            most_tokens, retries = smaller_size(batches, model, ranks), retries + 1
        # only here, where the error is forgotten, do the frames of its traceback release what they held
        forget_half_done_pass(model)


def smaller_size(batches: Batches, model: nn.Module, ranks: int) -> int:
    """Half the tokens of the largest micro-batch that can be cut; UpdateError where there is none, or no second try."""
    sizes = [packed_tokens(batch) for batch in batches if len(batch) > 1]
    if not sizes:
        longest = max(len(sequence.tokens) for batch in batches for sequence in batch)
        raise UpdateError(
            f"out of memory in the update with one sequence at a time, of at most {longest:,} tokens: "
            "train a LoRA adapter, set offload_activations or offload_optimizer, or shorten the stage"
        ) from None
    # the other processes wait in a collective of this micro-batch and cannot be told to begin again; a torch
    # without this method cannot undo the half-done pass of a sharded model
    if ranks > 1 or (isinstance(model, FSDPModule) and not hasattr(model, "reset_iter_state")):
        raise UpdateError(
            f"out of memory in the update: set micro_batch_tokens to {max(sizes) // 2} or less and resume the "
            "run; a smaller one is found by itself only in a run of one process, on torch 2.13 or newer"
        ) from None
    return max(sizes) // 2


def forget_half_done_pass(model: nn.Module) -> None:
    """After a forward or backward that died: no memory held, no gradient begun, every weight sharded again."""
    if isinstance(model, FSDPModule):
        model.reset_iter_state()
        for module in model.modules():
            if isinstance(module, FSDPModule):  # it leaves the gradients of weights that were still gathered
                module.unshard()
                module.zero_grad(set_to_none=True)
                module.reshard()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step_within_memory(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's step, the first of which allocates the moments; UpdateError where there is no memory for them."""
    try:
        optimizer.step()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UpdateError(
            "out of memory in the optimizer's step: set offload_optimizer = true or train a LoRA adapter"
        ) from None


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, the accelerator's or the CPU's, had nothing left to give."""
    if error.__context__ is not None and out_of_memory(error.__context__):  # such as a graph's capture cut short
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
