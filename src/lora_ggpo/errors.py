"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """Bad input: its message says in one sentence what is wrong, where, and what to do.

    The command line prints the message alone and exits with code 2; library callers may catch it.
    """
