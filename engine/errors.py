"""The base class of all errors that a person can correct."""


class UserError(Exception):
    """Ends a program without a traceback. The message is one sentence: what is wrong, where, and what to do."""
