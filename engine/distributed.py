"""The one device object: where this process computes, and with which others.

torchrun starts as many processes as there are devices and tells each its place through the environment; a plain
`python train.py` is a group of one. On CUDA the collectives of tensors go over nccl, those of Python objects over
gloo; on a CPU everything goes over gloo.

A rank that hangs, dies or raises ends the job with one sentence. Every rank notes the place where it is in torchrun's
store, so that those who wait in vain can say who is missing and where it was last; whoever has something to say first
says it, and the others leave quietly, or torchrun ends them.
"""

import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from engine.errors import UserError

# ranks sample responses of very different length, and the first to finish waits for the last
COLLECTIVE_TIME_LIMIT_SECONDS = 6 * 3600.0  # an environment variable of this name sets another
NCCL_GRACE = timedelta(minutes=1)  # nccl's own watchdog aborts a process without a word of where it was


class RankError(UserError):
    """Another rank is missing from a collective; one sentence that names it, and the place."""


@dataclass(frozen=True)
class Processes:
    """This process's accelerator and its place among the others."""

    device: torch.device
    compute_dtype: torch.dtype  # of weights and activations in forward and backward; master weights are float32
    rank: int
    world_size: int
    mesh: DeviceMesh
    gloo: dist.ProcessGroup  # gloo, for Python objects

    @property
    def is_main(self) -> bool:
        """The process that writes files and speaks."""
        return self.rank == 0

    def say(self, *words: object) -> None:
        """Print once, not once per process."""
        if self.is_main:
            print(*words, flush=True)

    def broadcast(self, value: Any, place: str = "") -> Any:
        """The main process's value, on every process. The place is for errors: without one, the caller's name."""
        if self.world_size == 1:
            return value
        box = [value]
        note_place(place or caller())
        try:
            dist.broadcast_object_list(box, src=0, group=self.gloo)
        except RuntimeError as error:
            raise_lost(error)
        return box[0]

    def all_gather(self, value: Any, place: str = "") -> list[Any]:
        """Every process's value, in the order of ranks, on every process. The place is as in `share`."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        note_place(place or caller())
        try:
            dist.all_gather_object(values, value, group=self.gloo)
        except RuntimeError as error:
            raise_lost(error)
        return values

    def free_memory_bytes(self) -> int:
        """What this process may take: the GPU's free memory, or its share of half of a CPU's memory."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info()[0]
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))  # ranks on this machine
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // here

    def peak_memory_gib(self) -> float:
        """The most memory held so far: on the GPU, or by the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        import resource  # POSIX only, and only here

        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
        return kilobytes / 2**20


def is_main_process() -> bool:
    """Whether this is the process that speaks, also before `start` and after `stop`."""
    return os.environ.get("RANK", "0") == "0"


def collective_time_limit() -> timedelta:
    """How long a collective may wait for the slowest rank."""
    text = os.environ.get("COLLECTIVE_TIME_LIMIT_SECONDS", str(COLLECTIVE_TIME_LIMIT_SECONDS))
    try:
        limit = timedelta(seconds=float(text))
    except (ValueError, OverflowError):
        limit = timedelta()
    if limit <= timedelta():
        raise RankError(f"COLLECTIVE_TIME_LIMIT_SECONDS={text} in the environment: give a number of seconds above 0")
    return limit


def start() -> Processes:
    """Join the process group that torchrun described, or make one of a single process."""
    global _watch
    cuda, limit = torch.cuda.is_available(), collective_time_limit()
    # the sampler's cache comes and goes every step: without this, what lives on splits its place for good; the
    # allocator reads it when CUDA begins
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        store, rank, ranks = next(dist.rendezvous("env://"))
        # torchrun keeps its store over a restart, and gloo would dial the dead processes' ports
        store = dist.PrefixStore(f"launch-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        grace = NCCL_GRACE if cuda else timedelta()
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=limit + grace)
        if ranks > 1:
            _watch = Watch(store, rank, ranks, limit, alarms=cuda)
            note_place("starting up", collective=False)
        if not cuda:  # torchrun gives each process one thread; share the cores instead
            here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    else:
        device = torch.device("cuda", 0) if cuda else torch.device("cpu")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32; the work is done in bfloat16
    return Processes(
        device=device,
        compute_dtype=torch.bfloat16 if cuda else torch.float32,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
        gloo=dist.new_group(backend="gloo", timeout=limit),
    )


def stop() -> None:
    """Leave the process group; where the job fails, others may still wait in it, and only the process can end."""
    global _watch
    failed = others_spoke()
    note_place("leaving", collective=False)
    _watch = None
    if dist.is_initialized() and not failed:
        dist.destroy_process_group()


def exit_process(status: int | str) -> None:
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


# ------------------------------------------------------------------------------------ a rank that hangs, dies, raises


@dataclass
class Watch:
    """Where this rank is, noted where every rank can read it."""

    store: dist.Store
    rank: int
    ranks: int
    limit: timedelta
    alarms: bool  # whether collectives raise nothing by themselves when their time is up, as those of nccl
    entered: int = 0  # collective places so far: all ranks come to the same ones in the same order
    place: str = ""
    alarm: threading.Timer | None = None


_watch: Watch | None = None  # of this process; None where it is alone


def caller() -> str:
    """The function that called `share` or `gather`, as a place."""
    code = sys._getframe(2).f_code
    return f"{code.co_qualname} of {os.path.basename(code.co_filename)}"


def note_place(place: str, collective: bool = True) -> None:
    """Note that this rank is now at a place, for those who may have to say that it never came to the next.

    A collective place is one that all ranks come to, and in which they wait for each other.
    """
    if _watch is None:
        return
    if _watch.alarm is not None:
        _watch.alarm.cancel()
        _watch.alarm = None
    _watch.place, _watch.entered = place, _watch.entered + collective
    try:
        _watch.store.set(f"place/{_watch.rank}", f"{_watch.entered} {place}")
    except RuntimeError:  # with the store's process gone the next collective fails, and says so
        return
    if _watch.alarms and collective:
        _watch.alarm = threading.Timer(_watch.limit.total_seconds(), give_up)
        _watch.alarm.daemon = True
        _watch.alarm.start()


def give_up() -> NoReturn:
    """What an alarm does: the main thread waits on the accelerator, where nothing can be raised."""
    report_error(RankError(who_is_missing("timed out")), "alarm")
    os._exit(1)


def lost_contact(error: BaseException) -> bool:
    """Whether a collective failed for want of another rank: its time was up, or the connection was."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def raise_lost(error: RuntimeError) -> NoReturn:
    """The error of a collective as a RankError; any other as it is."""
    if not lost_contact(error):
        raise error
    raise RankError(who_is_missing(str(error))) from None


def who_is_missing(reason: str) -> str:
    """The sentence of a rank that waited in vain at its place."""
    hangs = "timed out" in reason.lower() or "timeout" in reason.lower()
    behind: list[tuple[int, str]] = []
    if _watch is not None:
        try:
            for rank in range(_watch.ranks):
                noted = _watch.store.get(f"place/{rank}").decode() if _watch.store.check([f"place/{rank}"]) else "0 -"
                entered, place = noted.split(" ", 1)
                if int(entered) < _watch.entered:
                    behind.append((rank, place))
        except RuntimeError:
            behind = []  # the store went with its process
    who = " and ".join(f"rank {rank} (last: {place})" for rank, place in behind[:4]) or "another rank"
    who += f" and {len(behind) - 4} more" * (len(behind) > 4)
    here = _watch.place if _watch is not None else "a collective"
    if not hangs:
        return f"{who} is gone, and was waited for in: {here}; see what it or torchrun said, and resume the run"
    limit = _watch.limit.total_seconds() if _watch is not None else collective_time_limit().total_seconds()
    return (
        f"{who} did not come within {limit:g} seconds to: {here}; it hangs, or needs longer: then set "
        f"COLLECTIVE_TIME_LIMIT_SECONDS in the environment"
    )


def others_spoke() -> bool:
    """Whether a rank has already said why the job ends."""
    try:
        return _watch is not None and _watch.store.check(["spoken"])
    except RuntimeError:
        return False


def report_error(error: BaseException, program: str) -> int | str:
    """Say why this rank ends, unless another already has; returns the status for `exit_process`.

    What a person can put right is one sentence, and so is a collective that failed; all else comes with its traceback.
    """
    if _watch is not None and lost_contact(error):
        error = RankError(who_is_missing(str(error)))
    sentence = f"{program}: {error}"
    if not isinstance(error, (UserError, ImportError, OSError)):
        if _watch is None:
            raise error
        sentence = f"{program}: {traceback.format_exc()}"
    if _watch is None:
        return sentence if is_main_process() else 1
    try:
        first = _watch.store.add("spoken", 1) == 1
    except RuntimeError:
        first = True  # nobody can be asked
    if first:  # before this rank's connections close and the others notice
        print(f"rank {_watch.rank}: {sentence}", file=sys.stderr, flush=True)
    return 1


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
        if others_spoke():  # torchrun clears up after a rank that failed
            return
        print(f"\nstopping: {self.saved}; once more to stop at once", file=sys.stderr, flush=True)

    def agreed(self, processes: Processes) -> bool:
        """Whether any process was asked to stop: all of them leave at the same step."""
        return any(processes.all_gather(self.asked))
