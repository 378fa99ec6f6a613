"""What programs print, and the encoding of what they read and write."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOORS = ("train.py", "eval.py", "data_filter.py drop a b c.jsonl", "model.py a b")
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(*command, **environment) -> subprocess.CompletedProcess:
    """Run Python in the project's folder; input and output are bytes."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"} | environment
    return subprocess.run([sys.executable, *command], capture_output=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize("environment", [C_LOCALE, {"LC_ALL": "C.UTF-8", "PYTHONUTF8": ""}])
def test_files_names_and_output_are_utf8_in_any_locale(tmp_path, environment):
    script = (
        "import sys; from pathlib import Path; from engine.terminal import prepare_terminal; prepare_terminal()\n"
        r"Path(sys.argv[1], 'k\u00f6pfe').write_text('gr\u00fcn'); print(sys.argv[2], '\u221a', '\ud83d')"
    )
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    done = run(tmp_path / "script.py", tmp_path, "ä", PYTHONPATH=str(ROOT), **environment)
    assert done.stdout.decode() == "ä √ \\ud83d\n", done.stderr.decode()
    assert (tmp_path / "köpfe").read_bytes() == "grün".encode()


@pytest.mark.parametrize("door", DOORS)
def test_a_program_prints_utf8_and_escapes_what_would_steer_the_terminal(door):
    hostile = "--ö\x1b[31m\x1b]0;title\x07\r\x9b2J\u202e"
    done = run(*door.split(), hostile, **C_LOCALE)
    error = done.stderr.decode()
    assert done.returncode == 2 and r"--ö\x1b[31m\x1b]0;title\x07\r\x9b2J\u202e" in error
    assert not set("\x1b\x07\r\x9b\u202e") & set(error)


def test_an_argument_that_is_not_utf8_is_refused_before_it_names_a_file():
    done = run("eval.py", "model", "--data", os.fsdecode(b"\xff.jsonl"), LC_ALL="C.UTF-8")
    assert done.returncode == 1
    assert done.stderr.decode() == "the argument '\\udcff.jsonl' is not UTF-8: give the file or folder another name\n"


def test_a_progress_bar_still_redraws_its_line():
    script = (
        "import sys; from engine.terminal import prepare_terminal; prepare_terminal(); from tqdm import tqdm\n"
        "bar = tqdm(total=2, file=sys.stderr, position=1, mininterval=0); bar.update(1); bar.close()"
    )
    error = run("-c", script).stderr.decode()
    assert "\\" not in error and "\r" in error and "\x1b[A" in error


def test_a_log_has_what_was_printed_but_no_progress_bar(tmp_path):
    script = (
        "import sys; from pathlib import Path; from engine.terminal import keep_log, prepare_terminal; prepare_terminal()\n"
        f"print('before'); keep_log(Path({str(tmp_path / 'log.txt')!r})); print('a\\x1b[2Jb'); from tqdm import tqdm\n"
        "bar = tqdm(total=2, file=sys.stderr, mininterval=0); bar.update(1); print('warning', file=sys.stderr)"
    )
    (tmp_path / "log.txt").write_text("of an earlier launch\n")
    run("-c", script)
    assert (tmp_path / "log.txt").read_text() == "of an earlier launch\na\\x1b[2Jb\nwarning\n"


def test_text_files_are_opened_with_their_encoding():
    """A library's callers have run no `prepare_terminal`."""
    missing = []
    for path in [path for folder in (".", "engine", "lab") for path in (ROOT / folder).glob("*.py")]:
        for call in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(call, ast.Call):
                text = ast.unparse(call)
                binary = re.search(r"\bopen\((?:\w+, )?'\w*b\+?'|\bos\.open\(", text)
                opens = re.search(r"(?:\bopen|fdopen|read_text|write_text)$", ast.unparse(call.func)) and not binary
                missing += [f"{path.name}: {text}"] if opens and "encoding=" not in text else []
    assert not missing
