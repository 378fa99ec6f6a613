"""Parameters split over ranks (FSDP2), gathered for sampling, filled from whole tensors and read as such."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def fill(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this rank's part of it into its shard."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            tensor = distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)
        parameter.copy_(tensor)


def full_tensor(parameter: nn.Parameter) -> Tensor:
    """A parameter's whole value, without its graph; of a sharded one by a collective, which every rank must call."""
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(model: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Split every parameter over the mesh (FSDP2); float32 master weights, forward and backward in compute_dtype.

    Of a model with an adapter only the adapter is split; the frozen base is whole on every rank, in compute_dtype.
    """
    # sampling needs all of the base at once: a shard of it would be a second copy beside what is gathered
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for parameter in frozen:
        parameter.data = parameter.data.to(compute_dtype)
    # inputs are left alone: a temperature of 1.45 cast to bfloat16 would be scored as 1.453
    policy = MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=frozen)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Sampling reads whole weights: gather all of them once, so that no collective runs until this block ends."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
    try:
        # not inference_mode: its tensors break the backward that follows
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            module.reshard()
