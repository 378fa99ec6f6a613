"""What a program prints: UTF-8 in whatever locale, text that cannot steer a terminal, and a copy in a file."""

import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

# how tqdm redraws a bar: a carriage return before its text, or nothing but moves up
BAR = re.compile(r"\r|(?:\x1b\[A)+\Z")
LOGS: list[TextIO] = []  # the file that gets a copy of what is printed
UNDECODED = re.compile("[\udc80-\udcff]")  # a byte of the command line that is no UTF-8


def prepare_terminal() -> None:
    """Start the program again in Python's UTF-8 mode unless the locale is UTF-8, and print control characters escaped.

    Call it first in a program, which Ctrl-C then ends without a traceback. File names, files, pipes and the processes
    that it starts are UTF-8 as well.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a StopRequest handles it
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if undecoded := next(filter(UNDECODED.search, sys.argv), None):
        sys.exit(f"the argument {undecoded!r} is not UTF-8: give the file or folder another name")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # neither closed nor captured
            stream.reconfigure(errors="backslashreplace")
            stream.write = _escaping(stream.write, BAR if stream is sys.stderr else None)


def keep_log(path: Path) -> None:
    """Append to a file what this program prints from now on, but for progress bars; needs `prepare_terminal`."""
    LOGS[:] = [path.open("a", encoding="utf-8", buffering=1)]


def is_main_process() -> bool:
    """Whether this is the process that prints; valid before a process group is joined, and after."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """Print a note on stderr, on the main process only."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Return a text with escapes (`\\x1b`) for what is neither printable nor a line break nor a tab.

    So responses, names and templates cannot move the cursor, rewrite lines, set titles or turn the reading direction.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _escaping(write: Callable[[str], int], bar: re.Pattern | None) -> Callable[[str], int]:
    """Return a stream's `write` that writes printable text, after what moves a progress bar."""

    of_bar = False

    def write_printable(text: str) -> int:
        nonlocal of_bar
        kept = bar.match(text) if bar else None
        of_bar = kept is not None or (of_bar and text == "\n")  # that ends a bar
        start = kept.end() if kept else 0
        shown = printable(text[start:])
        write(text[:start] + shown)
        for log in () if of_bar else LOGS:
            with suppress(OSError):  # a full disk, which the run's own files report
                log.write(shown)
        return len(text)

    return write_printable
