"""When memory runs out."""

import gc

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


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


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, the accelerator's or the CPU's, had nothing left to give."""
    if error.__context__ is not None and out_of_memory(error.__context__):  # such as a graph's capture cut short
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
