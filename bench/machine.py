"""Measure the speed of the machine, and the time and memory of a piece of work, in this process."""

import gc
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = Callable[[], float]  # seconds: time.perf_counter, or time.process_time on a shared machine


def seconds_of(
    work: Callable[[], object], device: torch.device | str = "cpu", clock: Clock = time.perf_counter
) -> float:
    """Return how long `work` takes, including the work that it queues on a GPU."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    begun = clock()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    return clock() - begun


def measure_machine(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 5,
    clock: Clock = time.perf_counter,
) -> tuple[float, float]:
    """Return the best of several rounds: bandwidth in bytes/s (reading a large array) and matrix rate in FLOP/s."""
    size = 8192 if torch.device(device).type == "cuda" else 2048
    array = torch.ones(1 << 27, dtype=dtype, device=device)  # 512 MiB in float32, beyond any cache
    matrix = torch.randn(size, size, dtype=dtype, device=device)
    read = min(seconds_of(array.sum, device, clock) for _ in range(rounds))
    multiply = min(seconds_of(lambda: matrix @ matrix, device, clock) for _ in range(rounds))
    return array.nbytes / read, 2 * size**3 / multiply


class LiveBytes(TorchDispatchMode):
    """Count the bytes of every live storage created inside, exactly and without the allocator's rounding.

    `most` is the peak. Earlier tensors are not counted unless passed to `count`; storages that FSDP resizes are
    followed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.sizes: dict[int, tuple[int, weakref.ref]] = {}  # by id; a storage is removed before its id is reused
        self.resize = torch.UntypedStorage.resize_

    def count(self, tensor: torch.Tensor) -> None:
        """Count a tensor's memory from now on."""
        owner = memory_of(tensor)
        self._know(owner, 0)
        self._measure(owner)

    def _know(self, owner: object, size: int) -> None:
        key = id(owner)
        if key not in self.sizes:
            self.sizes[key] = size, weakref.ref(owner, lambda _: self._forget(key))

    def _measure(self, owner: object) -> None:
        """Update the size of a known storage."""
        key = id(owner)
        before, reference = self.sizes[key]
        size = owner.nbytes() if isinstance(owner, torch.UntypedStorage) else owner.numel() * owner.itemsize
        self.sizes[key] = size, reference
        self.live += size - before
        self.most = max(self.most, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)[0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors are dispatched separately
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and isinstance(owner := memory_of(leaf), torch.UntypedStorage):
                self._know(owner, owner.nbytes())  # older than this block: counts 0 until resized
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return found

    def __enter__(self) -> "LiveBytes":
        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            self._know(storage, storage.nbytes())
            self.resize(storage, size)
            self._measure(storage)
            return storage

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error) -> None:
        torch.UntypedStorage.resize_ = self.resize
        super().__exit__(*error)


def memory_of(tensor: torch.Tensor) -> torch.UntypedStorage | torch.Tensor:
    """Return the owner of a tensor's memory: its storage, or the tensor itself if its layout is oneDNN's."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local if local.layout == torch._mkldnn else local.untyped_storage()


@dataclass
class Peak:
    """The peak memory of a piece of work, in bytes above the memory in use before."""

    live: int  # of tensors: exact
    resident: int | None  # of the process (Linux), or None; as the operating system sees it, rounded by the allocator


def peak_of(work: Callable[[], object], device: torch.device | str = "cpu") -> Peak:
    """Run `work` once and return its peak memory. `resident` needs a separate process."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return Peak(torch.cuda.max_memory_allocated(device) - before, None)
    before = _resident(reset=True)
    with LiveBytes() as memory:
        work()
    after = _resident()
    return Peak(memory.most, after - before if before is not None and after is not None else None)


def _resident(reset: bool = False) -> int | None:
    """Return the process's peak resident memory in bytes; `reset` sets it to the current value first."""
    try:
        if reset:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
