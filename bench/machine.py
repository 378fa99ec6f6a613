"""What the machine under a benchmark can do, and what a piece of work takes of it, measured in this very process."""

import gc
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = Callable[[], float]  # seconds: time.perf_counter, or time.process_time where others share the cores


def seconds_of(
    work: Callable[[], object], device: torch.device | str = "cpu", clock: Clock = time.perf_counter
) -> float:
    """How long some work takes, with what it leaves queued on a GPU."""
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
    """The best of several rounds: bandwidth in bytes/s (reading a large array) and matrix rate in FLOP/s."""
    size = 8192 if torch.device(device).type == "cuda" else 2048
    array = torch.ones(1 << 27, dtype=dtype, device=device)  # 512 MiB in float32, beyond any cache
    matrix = torch.randn(size, size, dtype=dtype, device=device)
    read = min(seconds_of(array.sum, device, clock) for _ in range(rounds))
    multiply = min(seconds_of(lambda: matrix @ matrix, device, clock) for _ in range(rounds))
    return array.nbytes / read, 2 * size**3 / multiply


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that is made inside and still alive: exact, and blind to the allocator.

    `most` is their largest sum. What was there before is not counted; FSDP's resizing of storages is followed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.sizes: dict[int, int] = {}  # by the storage's address as an object
        self.before: dict[int, weakref.ref] = {}  # storages that were passed in and not made here

    def __enter__(self) -> "LiveBytes":
        resize = self._resize = torch.UntypedStorage.resize_

        def followed(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            found = resize(storage, size)
            if storage._cdata in self.sizes:
                self._add(storage._cdata, storage.nbytes())
            return found

        torch.UntypedStorage.resize_ = followed
        return super().__enter__()

    def __exit__(self, *error) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes and key not in self.before:
                    self.before[key] = weakref.ref(storage, lambda _, key=key: self.before.pop(key, None))
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if type(tensor) is torch.Tensor:
                self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.before:
            return
        if key not in self.sizes:
            weakref.finalize(storage, self._add, key, None).atexit = False
        self._add(key, storage.nbytes())

    def _add(self, key: int, size: int | None) -> None:
        """A storage has this size from now on; None: it is gone."""
        self.live += (size or 0) - self.sizes.pop(key, 0)
        if size is not None:
            self.sizes[key] = size
        self.most = max(self.most, self.live)


@dataclass
class Peak:
    """The most memory that some work held above what was held before it, in bytes."""

    live: int  # of tensors: exact
    resident: int | None  # of the process (Linux), or None; as the operating system sees it, rounded by the allocator


def peak_of(work: Callable[[], object], device: torch.device | str = "cpu") -> Peak:
    """Run some work once and say what it took. For `resident`, run it in a process of its own."""
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
    """The process's resident high-water mark in bytes; `reset` lowers the mark to what is held now."""
    try:
        if reset:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
