"""What waits in host memory: the inputs of recomputed layers, and AdamW's moments.

`recomputed` keeps only a layer's input for backward, on the device or, with `Offload`, in host memory. `HostAdamW`
keeps 8 bytes a parameter off the device; everything else about it, the checkpoint included, is torch.optim.AdamW's, so
a run may be resumed with either.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

BUCKET_VALUES = 2**26  # of a parameter, updated at once: 256 MiB on the device for each of its two moments
MOMENTS = ("exp_avg", "exp_avg_sq")


# ------------------------------------------------------------------------------------------------- layer inputs


class KeptInput:
    """A layer's input (T, C), in host memory from its forward until backward repeats the layer.

    On CUDA the copies run on `stream`, beside the computation: out while the layer computes, and back while the layer
    above is repeated, which is why an input knows the one `below`.
    """

    def __init__(self, x: Tensor, below: "KeptInput | None", stream: torch.cuda.Stream | None):
        self.on_device, self.below, self.stream, self.left = x, below, stream, False
        self.requires_grad, self.device = x.requires_grad, x.device
        self.host = torch.empty_like(x, device="cpu", requires_grad=False, pin_memory=stream is not None)
        self._copy(self.host, x.detach())

    def take(self) -> Tensor:
        """The input: in forward as it came, in backward from host memory."""
        if self.left:
            self._fetch()
            if self.stream is not None:
                torch.cuda.current_stream().wait_stream(self.stream)
            if self.below is not None:
                self.below._fetch()
        self.left, x, self.on_device = True, self.on_device, None
        return x

    def _fetch(self) -> None:
        if self.on_device is None:
            x = torch.empty_like(self.host, device=self.device, pin_memory=False)
            self._copy(x, self.host)
            self.on_device = x.requires_grad_(self.requires_grad)

    def _copy(self, to: Tensor, source: Tensor) -> None:
        if self.stream is None:
            to.copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
        (source if source.is_cuda else to).record_stream(self.stream)  # its memory is not reused before that


@dataclass
class Offload:
    """What the layers of a model share when their inputs wait in host memory."""

    stream: torch.cuda.Stream | None
    last: "weakref.ref[KeptInput] | None" = None  # weak: only the graph that needs them holds the inputs

    def keep(self, x: Tensor, layer: int) -> KeptInput:
        """Begin to move a layer's input (T, C) out."""
        kept = KeptInput(x, self.last() if layer and self.last is not None else None, self.stream)
        self.last = weakref.ref(kept)
        return kept


def recomputed(function: Callable, offload: Offload | None, layer: int, x: Tensor, *shared) -> Tensor:
    """function(x, *shared), computed again in backward, for which x alone is kept; what layers share stays in place."""
    options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a layer is random
    if offload is None:
        return checkpoint(function, x, *shared, **options)
    return checkpoint(lambda kept, *shared: function(kept.take(), *shared), offload.keep(x, layer), *shared, **options)


# ------------------------------------------------------------------------------------------------------ moments


class HostAdamW(torch.optim.AdamW):
    """torch.optim.AdamW (arXiv 1711.05101, algorithm 2) with float32 moments in host memory, pinned on CUDA.

    In `step` the moments travel to the device a bucket at a time, are updated there beside weights and gradient, and
    travel back. Parameters may be sharded (FSDP2): every rank keeps the moments of its own shards.
    """

    _mesh: DeviceMesh | None = None  # the parameters' ranks, as CPUs

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient; on CUDA it returns when all moments are back on the host."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a checkpoint reads host memory without waiting for the device

    def _update(self, parameter: nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": torch.tensor(0.0)} | {name: self._zeros_on_host(parameter) for name in MOMENTS}
        state["step"] += 1
        (beta1, beta2), rate, count = group["betas"], group["lr"], state["step"].item()
        whole = parameter, parameter.grad, *(state[name] for name in MOMENTS)
        for w, g, *host in zip(*(_local(x).view(-1).split(BUCKET_VALUES) for x in whole), strict=True):
            # all on one stream, so a copy back ends before its memory serves the next bucket; not hidden behind the
            # arithmetic, for 64 GB there and back (4B parameters) is little beside a step of minutes
            m, v = (moment.to(w.device, non_blocking=True) for moment in host)
            w.mul_(1 - rate * group["weight_decay"])
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denominator = (v.sqrt() / (1 - beta2**count) ** 0.5).add_(group["eps"])
            w.addcdiv_(m, denominator, value=-rate / (1 - beta1**count))
            for moment, updated in zip(host, (m, v), strict=True):
                moment.copy_(updated, non_blocking=True)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but the moments stay on the host: torch's own would move all of them to the device."""
        before = self.state
        super().load_state_dict(state_dict | {"state": {}})
        names = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for name, parameter in zip(names, parameters, strict=True):
            if name in state_dict["state"]:
                saved, state = state_dict["state"][name], before.get(parameter) or {}
                for moment in MOMENTS:
                    if moment not in state:
                        state[moment] = self._zeros_on_host(parameter)
                    _local(state[moment]).copy_(_local(saved[moment]))
                self.state[parameter] = state | {"step": saved["step"].clone()}

    def _zeros_on_host(self, parameter: Tensor) -> Tensor:
        """Zeros like a parameter; of a sharded one a DTensor, so that a checkpoint knows which shard it is."""
        local = _local(parameter)
        zeros = torch.zeros(local.shape, dtype=torch.float32, pin_memory=local.is_cuda)
        if not isinstance(parameter, DTensor):
            return zeros
        if self._mesh is None:  # on the accelerator's own mesh, from_local would move it there
            self._mesh = DeviceMesh("cpu", parameter.device_mesh.mesh)
        whole = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
        return DTensor.from_local(zeros, self._mesh, parameter.placements, **whole)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
