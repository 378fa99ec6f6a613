"""Shard parameters over ranks (FSDP2), gather them for sampling, and copy full tensors into and out of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def fill(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Copy a full tensor into a parameter, or this rank's part of it into the rank's shard."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            tensor = distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)
        parameter.copy_(tensor)


def full_tensor(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's full value, detached. For a sharded parameter a collective, which every rank must call."""
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(model: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shard every parameter over the mesh: float32 master weights, forward and backward in compute_dtype.

    With an adapter, shard only the adapter; every rank holds the full frozen base in compute_dtype.
    """
    # sampling gathers the full base, so a shard of it would only add memory
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for parameter in frozen:
        parameter.data = parameter.data.to(compute_dtype)
    # do not cast inputs: a temperature of 1.45 in bfloat16 would be scored as 1.453
    policy = MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=frozen)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather all weights for sampling, without gradients; no collective runs until the block ends."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
    try:
        # not inference_mode: its tensors would break the next backward
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            module.reshard()
