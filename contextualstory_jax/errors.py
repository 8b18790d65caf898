"""The one exception that means "the user can mend this".

Commands print it as one line and exit with status 2.
"""


class UserError(Exception):
    """Bad input: the message names the thing and the mend, in one line."""
