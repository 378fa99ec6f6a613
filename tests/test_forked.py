"""forked.py: a forked script is what one would be that Python has just started, but for the imports."""

import os
import signal
import sys

import forked
import pytest


@pytest.fixture
def script(tmp_path):
    """A function that writes a script and returns the command that runs it."""

    def write(text, *words):
        (tmp_path / "script.py").write_text(text)
        return [sys.executable, tmp_path / "script.py", *words]

    return write


@pytest.mark.parametrize(
    ("end", "status", "says"),
    [
        ("", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('one sentence')", 1, "one sentence\n"),
        ("import grpo", 1, "ModuleNotFoundError: No module named 'grpo'\n"),  # only its own folder is on the path
        ("os.kill(os.getpid(), 9)", -9, ""),
    ],
)
def test_what_a_script_is_given_and_how_it_ends(script, tmp_path, end, status, says):
    text = (
        "import atexit, os, sys; early = set(sys.modules)\n"
        "assert {'torch', 'transformers', 'pyarrow', 'matplotlib'} <= early and not {'grpo', 'train'} & early\n"
        "assert __name__ == '__main__' and len(os.listdir('/proc/self/task')) == 1\n"
        "atexit.register(print, 'the end')\n"
        "print(sys.argv[1:], os.getcwd(), dict(os.environ), os.sched_getaffinity(0), flush=True)\n"
    )
    done = forked.run(script(text + end, "a", 2), cwd=tmp_path, env={"A": "b"}, capture_output=True)
    given = f"{['a', '2']} {tmp_path} { ({'A': 'b'}) } {os.sched_getaffinity(0)}\n"
    assert done.stdout == given + "the end\n" * (status != -9), done.stderr
    assert done.returncode == status and done.stderr.endswith(says) and bool(done.stderr) == bool(says)


def test_it_is_told_and_waited_for(script, tmp_path):
    text = (
        "import time\nprint('here', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('told', flush=True)\n"
    )
    with (tmp_path / "said").open("w") as said:
        process = forked.Popen(script(text), stdout=said, start_new_session=True)
    assert os.getpgid(process.pid) == process.pid
    while (tmp_path / "said").read_text() != "here\n":
        with pytest.raises(forked.TimeoutExpired):
            process.wait(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == process.returncode == 0 and (tmp_path / "said").read_text() == "here\ntold\n"
    process.send_signal(signal.SIGINT)  # to nobody


def test_ranks_know_their_places_and_end_with_the_first_that_fails(script):
    text = "import os, sys, time\nprint(os.environ['RANK'], os.environ['WORLD_SIZE'], flush=True)\n"
    done = forked.run_ranks(2, script(text), timeout=60)
    assert done.returncode == 0 and done.stdout == "0 2\n1 2\n"
    text += "time.sleep(600) if os.environ['RANK'] == '1' else sys.exit(5)"
    assert forked.run_ranks(2, script(text), timeout=60).returncode == 5
