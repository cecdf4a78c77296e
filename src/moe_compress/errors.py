"""The one exception for mistakes a user can mend; the command line prints it as a single line, without a traceback."""


class UserError(Exception):
    """What is wrong, where, and what to do about it, in one line."""
