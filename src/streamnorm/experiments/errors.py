"""The error that a user can mend."""


class UserError(Exception):
    """Says in one line what is wrong and what to do; the command line prints it and exits with 2."""
