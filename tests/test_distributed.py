"""engine/distributed.py: a rank that raises, hangs or dies ends the job with its own sentence or one that names it."""

import os
import pty
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist
from forked import free_port, in_processes

from engine import distributed
from engine.distributed import RankError
from lab.data_files import DataError

ROOT = Path(__file__).resolve().parent.parent


def join(rank: int, port: int, ranks: int, seconds: str) -> distributed.Processes:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "COLLECTIVE_TIME_LIMIT_SECONDS": seconds}
    return distributed.start()


def wait_in_vain(rank: int, port: int, fault: str) -> None:
    processes = join(rank, port, 3, "3")
    assert processes.all_gather(rank) == [0, 1, 2] and processes.broadcast(rank) == 0
    if rank == 1:
        distributed.note_place("sampling", collective=False)
        if fault == "dies":
            os._exit(0)  # a failure would make the parent end the others before they have noticed
        time.sleep(6)
        return
    begun = time.monotonic()
    with pytest.raises(RankError) as caught:
        processes.all_gather(rank, "the exchange of attempts")
    message, waited = str(caught.value), time.monotonic() - begun
    assert "\n" not in message
    if fault == "hangs":
        assert "did not arrive within 3 seconds at: the exchange of attempts" in message and 2 < waited < 5.5
    else:
        assert "ended before it arrived at: the exchange of attempts" in message and waited < 3
    if rank == 0:  # rank 2 may have noticed first, and ended
        assert message.startswith("rank 1 (last: sampling) ")


@pytest.mark.parametrize("fault", ["hangs", "dies"])
def test_a_rank_that_waits_in_vain_names_the_missing_rank_and_the_place(fault):
    in_processes(wait_in_vain, free_port(), fault, processes=3)


def join_and_gather(rank: int, port: int, launch: int) -> None:
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(launch)}
    assert join(rank, port, 2, "20").all_gather(rank) == [0, 1]


def test_a_restarted_job_does_not_connect_to_the_dead_processes():
    """Guards: torchrun's store outlives a restart; gloo connected to the ports of the dead processes."""
    store = dist.TCPStore("localhost", free_port(), is_master=True, wait_for_workers=False)
    for launch in range(4):
        in_processes(join_and_gather, store.port, launch)


def fail(rank: int, port: int, folder: Path, kind: type[Exception]) -> None:
    processes = join(rank, port, 2, "60")
    sys.stderr = (folder / str(rank)).open("w")
    if rank == 1:
        try:
            raise kind("one sentence")
        except kind as error:
            assert distributed.report_error(error, "train.py") == 1
        os._exit(0)
    try:
        processes.all_gather(rank)
    except RankError as error:
        assert "fail of test_distributed.py" in str(error)  # without a place, the calling function
        assert distributed.report_error(error, "train.py") == 1  # and prints nothing
        sys.stderr.flush()
        return
    raise AssertionError("the other rank has not ended")


@pytest.mark.parametrize("kind", [DataError, ValueError])
def test_the_rank_that_raises_prints_its_error_and_the_others_nothing(tmp_path, kind):
    in_processes(fail, free_port(), tmp_path, kind)
    printed = (tmp_path / "1").read_text()
    if kind is DataError:
        assert printed == "rank 1: train.py: one sentence\n"
    else:  # a bug comes with its traceback
        assert printed.startswith("rank 1: train.py: Traceback") and "ValueError: one sentence" in printed
    assert (tmp_path / "0").read_text() == ""


def test_a_single_process_reports_a_user_error_as_a_sentence_and_raises_any_other():
    assert distributed.report_error(DataError("no"), "train.py") == "train.py: no"
    with pytest.raises(KeyError):
        distributed.report_error(KeyError("a bug"), "train.py")


def test_memory_that_runs_out_outside_of_training_is_a_sentence():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert distributed.report_error(error, "eval.py").startswith("eval.py: out of memory (CUDA out of memory. Tried to")
    try:
        raise DataError("this says what to change") from error
    except DataError as better:
        better.__context__ = error
        assert distributed.report_error(better, "eval.py") == "eval.py: this says what to change"


def on_a_gpu(monkeypatch, capability):
    """Make torch report a GPU; return the devices that are set."""
    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 2080 Ti")
    return used


def test_a_gpu_older_than_ampere_is_refused_with_its_name(monkeypatch):
    on_a_gpu(monkeypatch, (7, 5))
    with pytest.raises(distributed.DeviceError, match="^NVIDIA GeForce RTX 2080 Ti: .*CUDA_VISIBLE_DEVICES=") as caught:
        distributed.start()
    assert "\n" not in str(caught.value) and not dist.is_initialized()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    on_a_gpu(monkeypatch, (8, 0))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(distributed.DeviceError, match="process 1 has no GPU, there are 1: start at most 1 per machine"):
        distributed.start()


def test_without_torchrun_the_first_gpu_is_used_with_float32_sums(monkeypatch):
    used, settings = on_a_gpu(monkeypatch, (8, 0)), torch.backends.cuda.matmul
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(distributed, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    before = settings.allow_bf16_reduced_precision_reduction
    try:
        settings.allow_bf16_reduced_precision_reduction = True
        processes = distributed.start()
        assert not settings.allow_bf16_reduced_precision_reduction
    finally:
        settings.allow_bf16_reduced_precision_reduction = before
    assert used == [torch.device("cuda", 0)] == [processes.device] and processes.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("given", ["soon", "0", "-3", "nan", "1e300"])
def test_an_invalid_time_limit_is_refused(monkeypatch, given):
    monkeypatch.setenv("COLLECTIVE_TIME_LIMIT_SECONDS", given)
    with pytest.raises(RankError, match="give a number of seconds above 0"):
        distributed.collective_time_limit()
    monkeypatch.setenv("COLLECTIVE_TIME_LIMIT_SECONDS", "90")
    assert distributed.collective_time_limit() == timedelta(seconds=90)


def test_an_alarm_ends_a_process_in_which_nothing_can_be_raised(tmp_path):
    """nccl raises nothing while the main thread waits for the GPU; in this test it sleeps."""
    script = f"""
import sys, time, datetime
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
from engine import distributed
store = dist.HashStore()
store.set("place/1", "0 sampling")
distributed._watch = distributed.Watch(store, 0, 2, datetime.timedelta(seconds=0.5), alarms=True)
distributed.note_place("a collective that ends in time")
distributed.note_place("sampling", collective=False)
time.sleep(1)
print("still running", flush=True)
store.set("place/1", "1 sampling")
distributed.note_place("the update")
time.sleep(60)
"""
    (tmp_path / "script.py").write_text(script)
    done = forked.run([sys.executable, tmp_path / "script.py"], capture_output=True, timeout=60)
    assert done.returncode == 1 and done.stdout == "still running\n"
    assert done.stderr.splitlines()[-1].startswith(
        "rank 0: alarm: rank 1 (last: sampling) did not arrive within 0.5 seconds at: the update; it hangs"
    )


@pytest.fixture
def stop():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield distributed.StopRequest
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_stop_after_the_terminal_has_gone_says_the_rest_to_nobody(stop, monkeypatch):
    """Guards: a closed ssh session takes the terminal away with the signal, and printing to it fails."""
    controller, terminal = pty.openpty()
    os.close(controller)
    replaced = []

    def note(file, number):
        replaced.append((os.readlink(f"/proc/self/fd/{file}"), number))

    monkeypatch.setattr(os, "dup2", note)
    asked = stop()
    with open(terminal, "w", closefd=False) as gone, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", gone)
        signal.raise_signal(signal.SIGHUP)
        patch.undo()
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)  # what is still in the buffer
    os.close(terminal)
    assert replaced == [("/dev/null", 1), ("/dev/null", 2)] and asked.asked == signal.SIGHUP
    assert distributed.stop_status() == 129


def test_the_last_sentence_comes_after_what_the_launcher_prints_at_its_end(tmp_path):
    """Guards: torchrun, stopped by Ctrl-C, prints a traceback below the command that resumes the run."""
    with (tmp_path / "screen").open("ab") as screen:
        program = "import time; time.sleep(0.3); print('its traceback', flush=True)"
        with subprocess.Popen([sys.executable, "-c", program], stdout=screen) as launcher:
            ended = os.pidfd_open(launcher.pid)
            words = [sys.executable, "-c", distributed.SAY_AFTER, str(ended), "resume with this"]
            subprocess.run(words, stdout=screen, check=True, timeout=20, pass_fds=[ended])
    assert (tmp_path / "screen").read_text() == "its traceback\nresume with this\n"


def test_several_signals_of_one_stop_are_one_request(stop, monkeypatch):
    """Guards: a session that ends sends SIGTERM and SIGHUP at once, torchrun forwards SIGTERM again: nothing was saved."""
    ended, now = [], [100.0]
    monkeypatch.setattr(distributed, "end_by_signal", ended.append)
    monkeypatch.setattr(distributed.time, "monotonic", lambda: now[0])
    asked = stop()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
        signal.raise_signal(number)
    assert ended == [] and asked.asked == signal.SIGTERM and distributed.stop_status() == 143
    signal.raise_signal(signal.SIGINT)  # a person at the keyboard
    now[0] += distributed.ONE_STOP_SECONDS + 0.1
    signal.raise_signal(signal.SIGTERM)
    assert ended == [signal.SIGINT, signal.SIGTERM]


def test_nohup_is_respected_and_a_start_is_abandoned_at_once(stop):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    asked = stop(starting=True)
    signal.raise_signal(signal.SIGHUP)
    assert not asked.asked
    with pytest.raises(distributed.Interrupted):
        signal.raise_signal(signal.SIGTERM)


# ------------------------------------------------------------------------------------------------ under torchrun

FAULTS = {
    "raises": "raise OSError('the disk of this rank is full')",
    "hangs": "time.sleep(600)",
    "dies": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_rank_in_sampling_ends_the_job(small_world, tmp_path, fault):
    recipe, script = tmp_path / "rl.toml", tmp_path / "faulty.py"
    recipe.write_text(
        f"""name = "rl"
model = "{small_world / "model"}"
instruction = ""
sampler = {{ rows = 40, page_tokens = 96, cache_tokens = 6000 }}
[[stage]]
kind = "rl"
data = "{small_world / "train.jsonl"}"
steps = 3
batch_problems = 5
temperature = 1.0
max_prompt_tokens = 48
max_response_tokens = 8
"""
    )
    script.write_text(
        f"""import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
from engine import rollout_worker
from lab.options import training_arguments
generate = rollout_worker.generate
def faulty(model, prompts, sampling, *rest):
    if os.environ["RANK"] == "1" and sampling.step == 1:
        {FAULTS[fault]}
    return generate(model, prompts, sampling, *rest)
rollout_worker.generate = faulty
train.main(training_arguments(None))
"""
    )
    launch = [forked.TORCHRUN, "--standalone", "--nproc-per-node", "2", "--monitor-interval", "0.1"]
    environment = os.environ | {"COLLECTIVE_TIME_LIMIT_SECONDS": "8" if fault == "hangs" else "600"}
    arguments = [sys.executable, *launch, script, recipe, "--out", tmp_path / "runs"]
    done = forked.run(arguments, capture_output=True, timeout=240, env=environment)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("rank ")]
    assert len(said) == 1, done.stderr[-3000:]
    missing, place = "rank 0: train.py: rank 1 (last: sampling)", "at: the end of sampling"
    expected = {
        "raises": "rank 1: train.py: the disk of this rank is full",
        "hangs": f"{missing} did not arrive within 8 seconds {place}",
        "dies": f"{missing} ended before it arrived {place}",
    }
    assert said[0].startswith(expected[fault])
    # torchrun's own report comes after it, and no rank claims to be stopping on request
    assert done.stderr.index(said[0]) < done.stderr.index("FAILED")
    if fault == "raises":
        assert "stopping:" not in done.stderr
        last = done.stderr.splitlines()[-2]  # of torchrun's report, which ends with a line of =
        assert last.strip() == "traceback : train.py: the disk of this rank is full"
    assert (tmp_path / "runs" / "rl" / "metrics.jsonl").read_text().count("\n") >= 1
