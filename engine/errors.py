"""The base class of all errors that a person can correct, and the sentence for a disk that takes no more."""

from errno import EDQUOT, EFBIG, ENOSPC


class UserError(Exception):
    """Ends a program without a traceback. The message is one sentence: what is wrong, where, and what to do."""


def sentence(error: BaseException, then: str = "repeat the command") -> str:
    """Return what ends a program as one sentence; `then` is what to do once the disk takes more."""
    if not isinstance(error, OSError) or error.errno not in (EDQUOT, EFBIG, ENOSPC):
        return str(error)
    path = error.filename2 or error.filename or "a file, or the program's output,"
    return f"{path} cannot be written ({error.strerror}): free some space there, then {then}"
