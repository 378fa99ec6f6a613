"""Offload to host memory: the inputs of recomputed layers, and AdamW's moments.

`recomputed` keeps only a layer's input for backward, on the device or, with `Offload`, in host memory. `HostAdamW`
keeps 8 bytes per parameter off the device. Its checkpoints are those of torch.optim.AdamW: a run resumes with either.
"""

import mmap
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

BUCKET_VALUES = 2**26  # of a parameter, updated at a time: 256 MiB on the device for each of the two moments
MOMENTS = ("exp_avg", "exp_avg_sq")


def host_zeros(shape: Sequence[int], dtype: torch.dtype, pinned: bool) -> Tensor:
    """Return zeros in host memory, pinned in whole pages; torch's pinned memory is rounded up to a power of two."""
    count, page = torch.Size(shape).numel() * dtype.itemsize, mmap.PAGESIZE
    size = -(-count // page) * page
    memory = np.zeros(size + page, np.uint8)
    start = -memory.ctypes.data % page  # no two tensors share a page: none can be registered twice
    if pinned and size:
        status = int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data + start, size, 0))
        if status:
            if torch.cuda.is_initialized():
                with suppress(RuntimeError):  # takes the error that CUDA would report for the next kernel
                    torch.zeros(1, device="cuda")
            raise MemoryError(f"out of memory: CUDA cannot pin {size:,} bytes of host memory (error {status})")
        weakref.finalize(memory, _unpin, memory.ctypes.data + start).atexit = False
    return torch.from_numpy(memory[start : start + count]).view(dtype).view(shape)


def _unpin(address: int) -> None:
    """Give pinned memory back after the copies to and from it."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)


# ------------------------------------------------------------------------------------------------- layer inputs


class KeptInput:
    """A layer's input (T, C), in host memory from the layer's forward until its recomputation in backward.

    On CUDA the copies run on `stream`, parallel to computation: to the host during the layer's forward, and back
    during the recomputation of the layer above, which prefetches the input `below` its own.
    """

    def __init__(self, x: Tensor, below: "KeptInput | None", stream: torch.cuda.Stream | None, buffer: Tensor):
        self.on_device, self.below, self.stream, self.offloaded, self.returned = x, below, stream, False, False
        self.requires_grad, self.device = x.requires_grad, x.device
        self.host = buffer[: x.nbytes].view(x.dtype).view(x.shape)
        self._copy(self.host, x.detach())

    def take(self) -> Tensor:
        """Return the input: the original in forward, a copy from host memory in backward."""
        if self.offloaded:
            self._fetch()
            self.returned = True
            if self.stream is not None:
                torch.cuda.current_stream().wait_stream(self.stream)
            if self.below is not None:
                self.below._fetch()
        x, self.on_device, self.offloaded = self.on_device, None, True
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
        (source if source.is_cuda else to).record_stream(self.stream)  # no reuse of its memory before the copy ends


@dataclass
class Offload:
    """State shared by the layers of a model whose inputs are offloaded: a host buffer per layer, and its user."""

    stream: torch.cuda.Stream | None
    buffers: dict[int, Tensor] = field(default_factory=dict)  # bytes of the largest micro-batch so far
    users: dict[int, "weakref.ref[KeptInput]"] = field(default_factory=dict)  # only the autograd graph holds the inputs

    def keep(self, x: Tensor, layer: int) -> KeptInput:
        """Start the copy of a layer's input (T, C) to host memory.

        The layer's buffer is used again once backward has taken its last content; the stream keeps the copies in order.
        """
        before, below = (self.users[i]() if i in self.users else None for i in (layer, layer - 1))
        if before is not None and before.returned:
            before.host = None  # a second backward through that graph fails instead of reading another input
        elif before is not None:
            del self.buffers[layer]  # that graph has yet to run backward
        if layer not in self.buffers or self.buffers[layer].numel() < x.nbytes:
            self.buffers.pop(layer, None)  # given back before the larger one is pinned
            self.buffers[layer] = host_zeros([x.nbytes], torch.uint8, pinned=self.stream is not None)
        kept = KeptInput(x, below, self.stream, self.buffers[layer])
        self.users[layer] = weakref.ref(kept)
        return kept


def recomputed(function: Callable, offload: Offload | None, layer: int, x: Tensor, *shared) -> Tensor:
    """Compute function(x, *shared), and again in backward; of the activations keep only x, which may be offloaded."""
    options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a layer is random
    if offload is None:
        return checkpoint(function, x, *shared, **options)
    return checkpoint(lambda kept, *shared: function(kept.take(), *shared), offload.keep(x, layer), *shared, **options)


# ------------------------------------------------------------------------------------------------------ moments


class HostAdamW(torch.optim.AdamW):
    """torch.optim.AdamW (arXiv 1711.05101, algorithm 2) with float32 moments in host memory, pinned on CUDA.

    `step` copies the moments to the device a bucket at a time, updates them and the weights there, and copies them
    back. Parameters may be sharded (FSDP2): every rank keeps the moments of its own shards.
    """

    _cpu_mesh: DeviceMesh | None = None  # the ranks of the parameters' mesh

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient; return when all moments are back on the host."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # checkpoints read host memory without waiting for the device

    def _update(self, parameter: nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": torch.tensor(0.0)} | {name: self._zeros_on_host(parameter) for name in MOMENTS}
        state["step"] += 1
        (beta1, beta2), rate, count = group["betas"], group["lr"], state["step"].item()
        tensors = parameter, parameter.grad, *(state[name] for name in MOMENTS)
        for w, g, *host in zip(*(_local(x).view(-1).split(BUCKET_VALUES) for x in tensors), strict=True):
            # one stream for all, so a copy back ends before the next bucket reuses its memory; no overlap with the
            # arithmetic, because copying 64 GB (4B parameters) takes little of a step that takes minutes
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
        """Load torch's state dict, with the moments on the host: torch's method would copy them to the device."""
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
        """Return host zeros like a parameter; for a sharded one a DTensor, so that checkpoints know the shard."""
        local = _local(parameter)
        zeros = host_zeros(local.shape, torch.float32, pinned=local.is_cuda)
        if not isinstance(parameter, DTensor):
            return zeros
        if self._cpu_mesh is None:  # on the accelerator's mesh, from_local would move the zeros to the accelerator
            self._cpu_mesh = DeviceMesh("cpu", parameter.device_mesh.mesh)
        full = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
        return DTensor.from_local(zeros, self._cpu_mesh, parameter.placements, **full)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
