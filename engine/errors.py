"""The one kind of error that a person can put right."""


class UserError(Exception):
    """Ends a program with one sentence (what, where, what to do) and without a traceback."""
