"""Layer inputs in host memory, from a layer's forward until backward repeats it."""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor


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
        (source if source.is_cuda else to).record_stream(self.stream)  # its place is not given away before that


@dataclass
class Offload:
    """What the layers of a model share when the inputs that they keep wait in host memory."""

    stream: torch.cuda.Stream | None
    last: "weakref.ref[KeptInput] | None" = None  # weak: only the graph that needs them holds the inputs

    def keep(self, x: Tensor, layer: int) -> KeptInput:
        """Begin to move a layer's input (T, C) out."""
        kept = KeptInput(x, self.last() if layer and self.last is not None else None, self.stream)
        self.last = weakref.ref(kept)
        return kept
