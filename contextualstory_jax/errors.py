"""The exception for bad input: commands print it as one line and exit with status 2."""


class UserError(ValueError):
    """Bad input: the message names the thing and the fix, in one line."""
