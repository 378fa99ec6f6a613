"""Scripts and functions in processes that begin with the imports done, so that a test need not wait for them.

A server, one for each pytest process, imports the libraries once and forks. The project's own modules are not among
them: a script imports those as ever. What is about the start of a process itself has real ones.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIPE = subprocess.PIPE
TORCHRUN = ROOT / "tests" / "torchrun.py"
CompletedProcess, TimeoutExpired = subprocess.CompletedProcess, subprocess.TimeoutExpired
# threads do not survive a fork, and none of these starts one where OMP_NUM_THREADS is 1 (conftest.py)
LIBRARIES = [
    "torch", "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp",
    "torch.distributed.run", "torch.distributed.tensor", "torch.nn.attention.varlen", "transformers",
    "transformers.modeling_utils", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "tokenizers.trainers", "safetensors.torch", "numpy",
    "pyarrow.parquet", "matplotlib.figure", "matplotlib.backends.backend_svg", "pytest",
]  # fmt: skip
multiprocessing.set_forkserver_preload(LIBRARIES)
_processes = multiprocessing.get_context("forkserver")


class Popen:
    """[sys.executable, script, *arguments] as a forked process; what subprocess.Popen has, as far as tests use it.

    What it says goes through files, so that nobody need read along.
    """

    def __init__(self, args: Sequence, cwd=None, env=None, stdout=None, stderr=None, start_new_session=False):
        executable, *self.args = map(str, args)
        assert executable == sys.executable and self.args[0].endswith(".py")
        self.returncode: int | None = None
        self._said = [tempfile.NamedTemporaryFile() if to is PIPE else None for to in (stdout, stderr)]
        files = [said or to for said, to in zip(self._said, (stdout, stderr), strict=True)]
        inherited = [f"/proc/{os.getpid()}/fd/{number}" for number in (1, 2)]
        paths = [inherited[i] if to is None else to.name for i, to in enumerate(files)]
        where, environment = os.path.abspath(cwd or "."), dict(os.environ if env is None else env)
        cores = os.sched_getaffinity(0)  # inherited as well, and not the server's
        arguments = self.args, where, environment, cores, paths, start_new_session
        self._process = _processes.Process(target=_run_script, args=arguments)
        self._process.start()
        self.pid = self._process.pid
        with suppress(ProcessLookupError):
            while start_new_session and os.getpgid(self.pid) != self.pid:
                time.sleep(0.001)

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, when it is there."""
        self._process.join(timeout)
        if self.poll() is None:
            raise TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """A signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """All that it said, when it has ended."""
        self.wait(timeout)
        return tuple(Path(said.name).read_text() if said else None for said in self._said)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()


def run(args: Sequence, timeout: float | None = None, capture_output=False, **options) -> CompletedProcess:
    """As subprocess.run."""
    if capture_output:
        options |= {"stdout": PIPE, "stderr": PIPE}
    job = Popen(args, **options)
    try:
        said = job.communicate(timeout)
    finally:
        job.kill()
    return CompletedProcess(args, job.returncode, *said)


def run_ranks(ranks: int, args: Sequence, timeout: float) -> CompletedProcess:
    """The ranks of one job on this machine; as under torchrun, one that fails ends the others."""
    here = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    jobs, limit = [], time.monotonic() + timeout
    for rank in range(ranks):
        place = {name: str(value) for name, value in ({"RANK": rank, "LOCAL_RANK": rank} | here).items()}
        jobs.append(Popen(args, env=os.environ | place, stdout=PIPE, stderr=PIPE))
    try:
        while any(job.poll() is None for job in jobs) and not any(job.returncode for job in jobs):
            if time.monotonic() > limit:
                raise TimeoutExpired(args, timeout)
            time.sleep(0.01)
        status = next((job.returncode for job in jobs if job.returncode), 0)
    finally:
        for job in jobs:
            job.kill()
    return CompletedProcess(args, status, *map("".join, zip(*(job.communicate() for job in jobs), strict=True)))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def in_processes(function, *arguments, processes=2):
    """Call function(rank, *arguments) in several processes at once."""
    import torch

    torch.multiprocessing.start_processes(
        _call_and_leave, (function, arguments), nprocs=processes, start_method="forkserver"
    )


def _call_and_leave(rank, function, arguments):
    function(rank, *arguments)
    os._exit(0)  # as distributed.exit_process does, for the same reason


def _run_script(words, where, environment, cores, paths, own_session):
    """What a forked process does instead of `python script`, from the streams to the end of the interpreter."""
    if own_session:
        os.setsid()
    for number, path in enumerate(paths, 1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(where)
    os.sched_setaffinity(0, cores)
    os.environ.clear()
    os.environ.update(environment)
    if "PYTHONUNBUFFERED" in environment:
        sys.stdout.reconfigure(write_through=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()  # as in conftest.py: searches for garbage need not go through the libraries
    own = {str(ROOT), str(ROOT / "tests"), ""}  # of pytest: the script has its own folder instead
    sys.path[:] = [os.path.dirname(os.path.abspath(words[0])), *(path for path in sys.path if path not in own)]
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
