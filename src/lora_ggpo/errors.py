"""The exceptions that a user can do something about."""


class UserError(Exception):
    """Bad input: its message says in one sentence what is wrong, where, and what to do.

    The command line prints the message alone and exits with code 2; library callers may catch it.
    """


class DivergedError(UserError):
    """Training went to values that are not finite: the settings of this one run are at fault."""
