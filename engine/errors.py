"""The base class of all errors that a person can correct, and what their sentences are made of."""

from collections.abc import Sequence
from errno import EDQUOT, EFBIG, ENOSPC


class UserError(Exception):
    """Ends a program without a traceback. The message is one sentence: what is wrong, where, and what to do."""


def sentence(error: BaseException, then: str = "repeat the command") -> str:
    """Return what ends a program as one sentence; `then` is what to do once the disk takes more."""
    if not isinstance(error, OSError) or error.errno not in (EDQUOT, EFBIG, ENOSPC):
        return str(error)
    path = error.filename2 or error.filename or "a file, or the program's output,"
    return f"{path} cannot be written ({error.strerror}): free some space there, then {then}"


def first_names(names: Sequence[str], most: int = 20) -> str:
    """Return names for a sentence, the first ones of many."""
    return ", ".join(names[:most]) + f" and {len(names) - most:,} more" * (len(names) > most)
