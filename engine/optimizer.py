"""AdamW whose moments live in host memory: 8 bytes a parameter that the device need not hold.

In `step` the moments travel to the device a bucket at a time, are updated there beside weights and gradient, and
travel back. Everything else, the checkpoint included, is torch.optim.AdamW's: a run may be resumed either way.
"""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

BUCKET_VALUES = 2**26  # of a parameter, updated at once: 256 MiB on the device for each of its two moments
MOMENTS = ("exp_avg", "exp_avg_sq")


class HostAdamW(torch.optim.AdamW):
    """torch.optim.AdamW (arXiv 1711.05101, algorithm 2) with float32 moments in host memory, pinned on CUDA.

    Parameters may be sharded (FSDP2): every process keeps the moments of its own shards.
    """

    _mesh: DeviceMesh | None = None  # the parameters' processes, as CPUs

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient; on CUDA it returns when all moments are home again."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a checkpoint reads the host's memory without asking the device

    def _update(self, parameter: nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": torch.tensor(0.0)} | {name: self._zeros_at_home(parameter) for name in MOMENTS}
        state["step"] += 1
        (beta1, beta2), rate, count = group["betas"], group["lr"], state["step"].item()
        whole = parameter, parameter.grad, *(state[name] for name in MOMENTS)
        for w, g, *home in zip(*(_local(x).view(-1).split(BUCKET_VALUES) for x in whole), strict=True):
            # all on one stream: a copy home ends before the allocator gives its place to the next bucket; not hidden
            # behind the arithmetic, for 64 GB there and back (4B parameters) is little beside a step of minutes
            m, v = (moment.to(w.device, non_blocking=True) for moment in home)
            w.mul_(1 - rate * group["weight_decay"])
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denominator = (v.sqrt() / (1 - beta2**count) ** 0.5).add_(group["eps"])
            w.addcdiv_(m, denominator, value=-rate / (1 - beta1**count))
            for moment, updated in zip(home, (m, v), strict=True):
                moment.copy_(updated, non_blocking=True)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but the moments stay at home: torch's own would move all of them to the device."""
        before = self.state
        super().load_state_dict(state_dict | {"state": {}})
        names = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for name, parameter in zip(names, parameters, strict=True):
            if name in state_dict["state"]:
                saved, state = state_dict["state"][name], before.get(parameter) or {}
                for moment in MOMENTS:
                    if moment not in state:
                        state[moment] = self._zeros_at_home(parameter)
                    _local(state[moment]).copy_(_local(saved[moment]))
                self.state[parameter] = state | {"step": saved["step"].clone()}

    def _zeros_at_home(self, parameter: Tensor) -> Tensor:
        """Zeros like a parameter in host memory; of a sharded one a DTensor, so that a checkpoint knows its place."""
        local = _local(parameter)
        home = torch.zeros(local.shape, dtype=torch.float32, pin_memory=local.is_cuda)
        if not isinstance(parameter, DTensor):
            return home
        if self._mesh is None:  # on the accelerator's own mesh, from_local would move it there
            self._mesh = DeviceMesh("cpu", parameter.device_mesh.mesh)
        whole = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
        return DTensor.from_local(home, self._mesh, parameter.placements, **whole)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
