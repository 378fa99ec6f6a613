"""The processes of a run: this one's device and rank, collectives of Python objects, and how a job ends.

torchrun starts one process per device and sets each one's rank in the environment; a plain `python train.py` is a group
of one. On CUDA, collectives of tensors use nccl and those of Python objects use gloo; on a CPU both use gloo.

A rank that hangs, dies or raises ends the job with one sentence. Every rank writes the place it has reached to
torchrun's store, so that the ranks that wait in vain can name the missing one and its last place. The first rank with
an error prints it; the others exit without output, or torchrun ends them.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from engine.errors import UserError, sentence
from engine.memory import out_of_memory
from engine.terminal import is_main_process, printable

# ranks sample responses of very different length, and the first to finish waits for the last
COLLECTIVE_TIME_LIMIT_SECONDS = 6 * 3600.0  # the environment variable of this name overrides it
NCCL_GRACE = timedelta(minutes=1)  # nccl's own watchdog aborts a process without saying where it was


class RankError(UserError):
    """Another rank is missing from a collective; names the rank and the place."""


class DeviceError(UserError):
    """The GPU cannot run this code."""


@dataclass(frozen=True)
class Processes:
    """This process's device and its rank among the others."""

    device: torch.device
    compute_dtype: torch.dtype  # of weights and activations in forward and backward; master weights are float32
    rank: int
    world_size: int
    mesh: DeviceMesh
    gloo: dist.ProcessGroup  # for Python objects

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """Return the device's name and what it computes in."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "the CPU"
        return f"{name} in {str(self.compute_dtype).removeprefix('torch.')}"

    def say(self, *words: object) -> None:
        """Print on the main process only."""
        if self.is_main:
            print(*words, flush=True)

    def broadcast(self, value: Any, place: str = "") -> Any:
        """Return the main process's value on every process. Errors name the place, by default the calling function."""
        if self.world_size == 1:
            return value
        values = [value]
        with _collective(place or _caller()):
            dist.broadcast_object_list(values, src=0, group=self.gloo)
        return values[0]

    def all_gather(self, value: Any, place: str = "") -> list[Any]:
        """Return every process's value, by rank, on every process. The place is as in `broadcast`."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with _collective(place or _caller()):
            dist.all_gather_object(values, value, group=self.gloo)
        return values

    def peak_memory_gib(self) -> float:
        """Return the most memory allocated so far: on the GPU, or by the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
        return kilobytes / 2**20


def collective_time_limit() -> timedelta:
    """Return how long a collective may wait for the slowest rank. Raises RankError for a bad environment variable."""
    text = os.environ.get("COLLECTIVE_TIME_LIMIT_SECONDS", str(COLLECTIVE_TIME_LIMIT_SECONDS))
    try:
        limit = timedelta(seconds=float(text))
    except (ValueError, OverflowError):
        limit = timedelta()
    if limit <= timedelta():
        raise RankError(f"COLLECTIVE_TIME_LIMIT_SECONDS={text} in the environment: give a number of seconds above 0")
    return limit


def start() -> Processes:
    """Join the process group that torchrun describes, or make one of a single process."""
    global _watch
    cuda, limit, launched = torch.cuda.is_available(), collective_time_limit(), "RANK" in os.environ
    # the sampler's cache is allocated and freed every step; without this, longer-lived tensors fragment its memory for
    # good. The allocator reads the variable when CUDA initializes
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device, store, rank, world_size = torch.device("cpu"), dist.HashStore(), 0, 1
    if cuda:
        local_rank, cards = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= cards:
            raise DeviceError(f"process {local_rank} has no GPU, there are {cards}: start at most {cards} per machine")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise DeviceError(
                f"{torch.cuda.get_device_name(device)}: bfloat16 and flash attention need an Ampere GPU or newer "
                "(compute capability 8.0): set CUDA_VISIBLE_DEVICES= in the environment to run on the CPU"
            )
        torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32; the work is done in bfloat16
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # partial sums stay float32
    if launched:
        store, rank, world_size = next(dist.rendezvous("env://"))
        # torchrun keeps its store over a restart, and gloo would connect to the dead processes' ports
        store = dist.PrefixStore(f"launch-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend, timeout = ("cpu:gloo,cuda:nccl", limit + NCCL_GRACE) if cuda else ("gloo", limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if world_size > 1:
        _watch = Watch(store, rank, world_size, limit, alarms=cuda)
        note_place("starting up", collective=False)
    if launched and not cuda:  # torchrun gives each process one thread; share the cores instead
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS
        torch.set_num_threads(max(1, cores // local_ranks))
    return Processes(
        device=device,
        compute_dtype=torch.bfloat16 if cuda else torch.float32,
        rank=rank,
        world_size=world_size,
        mesh=init_device_mesh(device.type, (world_size,)),
        gloo=dist.new_group(backend="gloo", timeout=limit),
    )


def stop() -> None:
    """Leave the process group, except after an error: other ranks may still wait in it, and `exit_process` ends it."""
    global _watch
    failed = error_reported()
    note_place("leaving", collective=False)
    _watch = None
    if dist.is_initialized() and not failed:
        dist.destroy_process_group()


def exit_process(status: int | str) -> None:
    """Exit with a status as sys.exit takes it; one of several processes skips the interpreter's shutdown.

    During shutdown, a gloo thread that releases a Python object would abort a process whose work is done and saved.
    Above 128, a signal ends the process, as in a shell's $?.
    """
    if isinstance(status, int) and status > 128:
        end_by_signal(status - 128)
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
    """The place this rank has reached, and the store in which every rank can read it."""

    store: dist.Store
    rank: int
    world_size: int
    limit: timedelta
    alarms: bool  # whether collectives that time out raise nothing, as with nccl, so that an alarm must end the process
    entered: int = 0  # collective places so far: all ranks enter the same ones in the same order
    place: str = ""
    alarm: threading.Timer | None = None


_watch: Watch | None = None  # None in a group of one


@contextmanager
def _collective(place: str) -> Iterator[None]:
    """Note the place of a collective, and raise RankError when it fails because another rank is missing."""
    note_place(place)
    try:
        yield
    except RuntimeError as error:
        if not _lost_contact(error):
            raise
        raise RankError(_missing_ranks(str(error))) from None


def _caller() -> str:
    """Return the function that called the method that calls this, as a place."""
    code = sys._getframe(2).f_code
    return f"{code.co_qualname} of {os.path.basename(code.co_filename)}"


def note_place(place: str, collective: bool = True) -> None:
    """Write to the store that this rank has reached a place, for ranks that may wait for it in vain.

    All ranks enter a collective place, and wait for each other in it.
    """
    if _watch is None:
        return
    if _watch.alarm is not None:
        _watch.alarm.cancel()
        _watch.alarm = None
    _watch.place, _watch.entered = place, _watch.entered + collective
    try:
        _watch.store.set(f"place/{_watch.rank}", f"{_watch.entered} {place}")
    except RuntimeError:  # the store's process is gone: the next collective fails and reports it
        return
    if _watch.alarms and collective:
        _watch.alarm = threading.Timer(_watch.limit.total_seconds(), _give_up)
        _watch.alarm.daemon = True
        _watch.alarm.start()


def _give_up() -> NoReturn:
    """End the process from an alarm: the main thread waits for the GPU, where nothing can be raised."""
    report_error(RankError(_missing_ranks("timed out")), "alarm")
    os._exit(1)


def _lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another rank was too late or its connection closed."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _missing_ranks(reason: str) -> str:
    """Return the sentence of a rank that waited in vain: who is missing, and from which collective."""
    behind: list[tuple[int, str]] = []
    try:
        for rank in range(_watch.world_size):
            noted = _watch.store.get(f"place/{rank}").decode() if _watch.store.check([f"place/{rank}"]) else "0 -"
            entered, place = noted.split(" ", 1)
            if int(entered) < _watch.entered:
                behind.append((rank, place))
    except RuntimeError:
        behind = []  # the store's process is gone
    who = " and ".join(f"rank {rank} (last: {place})" for rank, place in behind[:4]) or "another rank"
    who += f" and {len(behind) - 4} more" * (len(behind) > 4)
    if "timed out" in reason.lower() or "timeout" in reason.lower():
        return (
            f"{who} did not arrive within {_watch.limit.total_seconds():g} seconds at: {_watch.place}; it hangs or "
            f"needs more time: for more time set COLLECTIVE_TIME_LIMIT_SECONDS in the environment"
        )
    return f"{who} ended before it arrived at: {_watch.place}; see its output and torchrun's, then resume the run"


def error_reported() -> bool:
    """Whether a rank has already printed why the job ends."""
    try:
        return _watch is not None and _watch.store.check(["error reported"])
    except RuntimeError:
        return False


def report_error(error: BaseException, program: str, then: str = "repeat the command") -> int | str:
    """Print why this rank ends, unless another rank has; return the status for `exit_process`.

    Errors that a person can put right and failed collectives are one sentence; all others come with their traceback.
    `then` is what to do about a full disk once it has space.
    """
    if _watch is not None and _lost_contact(error):
        error = RankError(_missing_ranks(str(error)))
    elif out_of_memory(error) and not isinstance(error, UserError):  # which says more, and may have such a context
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        error = UserError(f"out of memory ({reason}): see what fits with --plan; LoRA and offload_optimizer need less")
    correctable, text = isinstance(error, (UserError, ImportError, OSError)), f"{program}: {sentence(error, then)}"
    if _watch is None:
        if not correctable:
            raise error
        _tell_torchrun(text)
        return text if is_main_process() else 1
    try:
        first = _watch.store.add("error reported", 1) == 1
    except RuntimeError:  # the store's process is gone
        first = True
    if first:  # before this rank's connections close and the others notice
        shown = text if correctable else f"{program}: {traceback.format_exc()}"
        print(f"rank {_watch.rank}: {shown}", file=sys.stderr, flush=True)
    _tell_torchrun(text, first)
    return 1


def _tell_torchrun(text: str, first: bool = True) -> None:
    """Write why this rank ends into the file that torchrun's own report, the last thing on the screen, repeats."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        text, at = printable(text), int(time.time()) + (not first)  # torchrun takes the earliest for the cause
        details = {"py_callstack": text, "timestamp": str(at)}
        with suppress(OSError):
            Path(path).write_bytes(json.dumps({"message": {"message": text, "extraInfo": details}}).encode())


def end_by_signal(number: int) -> None:
    """End this process by a signal: a shell's loop ends with a program that SIGINT ended, not with an exit of 130."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


_signal = 0  # that asked this process to stop


def stop_status() -> int:
    """Return the exit status, as a shell has it, of a program that a signal stopped, perhaps on another rank."""
    return 128 + (_signal or signal.SIGINT)


ONE_STOP_SECONDS = 3.0  # within which several signals are one request
SAY_AFTER = "import select, sys; select.select([int(sys.argv[1])], [], [], 30)[0] and print(sys.argv[2])"


def say_last(text: str) -> None:
    """Print a sentence, and again when torchrun has ended: it prints a traceback when a signal stops it."""
    print(text, flush=True)
    if dist.is_torchelastic_launched():
        with suppress(AttributeError, OSError):  # Linux alone has pidfd_open
            parent = os.pidfd_open(os.getppid())  # readable when the process has ended
            words = [sys.executable, "-c", SAY_AFTER, str(parent), printable(text)]
            subprocess.Popen(words, start_new_session=True, pass_fds=[parent])


class Interrupted(BaseException):
    """Work was abandoned because the run was asked to stop; every process raises it."""


class StopRequest:
    """A request to save and exit, made by SIGINT, SIGTERM or SIGHUP; a second signal stops the process at once.

    While `starting`, when there is nothing to save, the first signal raises Interrupted. A machine that shuts down, a
    terminal that closes and torchrun send several signals for one stop, so a second one within ONE_STOP_SECONDS counts
    only if it is SIGINT, which a person sends.
    """

    def __init__(self, saved: str = "the last complete step is being saved", starting: bool = False) -> None:
        global _signal
        _signal = 0
        self.asked, self.saved, self.starting = 0, saved, starting  # `asked`: the signal's number
        self.asked_at = 0.0  # by the monotonic clock
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        global _signal
        if self.asked:
            if number == signal.SIGINT or time.monotonic() > self.asked_at + ONE_STOP_SECONDS:
                end_by_signal(number)
            return
        self.asked, self.asked_at = number, time.monotonic()
        _signal = number
        if self.starting:
            raise Interrupted
        if error_reported():  # torchrun is ending the other ranks after one that failed
            return
        try:
            print(f"\nstopping: {self.saved}; signal again to stop at once", file=sys.stderr, flush=True)
        except OSError:  # the terminal is gone
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
