"""The one device object: where this process computes, and with which others.

torchrun starts as many processes as there are devices and tells each its place through the environment; a plain
`python train.py` is a group of one. On CUDA the collectives of tensors go over nccl, those of Python objects over
gloo; on a CPU everything goes over gloo.
"""

import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# ranks sample responses of very different length, and the first to finish waits for the last
COLLECTIVE_TIME_LIMIT = timedelta(hours=6)


@dataclass(frozen=True)
class Device:
    """This process's accelerator and its place among the others."""

    device: torch.device
    compute_dtype: torch.dtype  # of weights and activations in forward and backward; master weights are float32
    rank: int
    ranks: int
    mesh: DeviceMesh
    objects: dist.ProcessGroup  # gloo, for Python objects

    @property
    def is_main(self) -> bool:
        """The process that writes files and speaks."""
        return self.rank == 0

    def say(self, *words: object) -> None:
        """Print once, not once per process."""
        if self.is_main:
            print(*words, flush=True)

    def share(self, value: Any) -> Any:
        """The main process's value, on every process."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.objects)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks, on every process."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=self.objects)
        return values

    def free_memory_bytes(self) -> int:
        """What this process may take: the GPU's free memory, or its share of half of a CPU's memory."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info()[0]
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // self.ranks

    def peak_memory_gib(self) -> float:
        """The most memory held so far: on the GPU, or by the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        import resource  # POSIX only, and only here

        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
        return kilobytes / 2**20


def speaks() -> bool:
    """Whether this is the process that speaks, also before `start` and after `stop`."""
    return os.environ.get("RANK", "0") == "0"


def start() -> Device:
    """Join the process group that torchrun described, or make one of a single process."""
    cuda = torch.cuda.is_available()
    # the sampler's cache comes and goes every step: without this, what lives on splits its place for good; the
    # allocator reads it when CUDA begins
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=COLLECTIVE_TIME_LIMIT)
        if not cuda:  # torchrun gives each process one thread; share the cores instead
            here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    else:
        device = torch.device("cuda", 0) if cuda else torch.device("cpu")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIME_LIMIT)
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32; the work is done in bfloat16
    return Device(
        device=device,
        compute_dtype=torch.bfloat16 if cuda else torch.float32,
        rank=dist.get_rank(),
        ranks=dist.get_world_size(),
        mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
        objects=dist.new_group(backend="gloo", timeout=COLLECTIVE_TIME_LIMIT),
    )


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status: int | str) -> None:
    """End with a status as sys.exit takes it; one of several processes goes without Python's own teardown.

    There, a thread of gloo's that lets go of a Python object would abort a process whose work is done and saved.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if status:
            sys.exit(status)
        return
    if isinstance(status, str):
        print(status, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, the accelerator's or the CPU's, had nothing left to give."""
    if error.__context__ is not None and out_of_memory(error.__context__):  # such as a graph's capture cut short
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


class Interrupted(Exception):
    """Sampling was abandoned because the run was asked to stop; every process raises it."""


class StopRequest:
    """Ctrl-C, or a machine taken away: save what is whole and leave. A second signal is obeyed at once."""

    def __init__(self, saved: str = "the last whole step is being saved") -> None:
        self.asked, self.saved = False, saved
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print(f"\nstopping: {self.saved}; once more to stop at once", file=sys.stderr, flush=True)

    def agreed(self, device: Device) -> bool:
        """Whether any process was asked to stop: all of them leave at the same step."""
        return any(device.gather(self.asked))
