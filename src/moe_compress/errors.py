"""The one exception for mistakes a user can mend; the command line prints it as a single line, without a traceback."""


class UserError(Exception):
    """What is wrong, where, and what to do about it, in one line."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to quote in one of ours; the type's name where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
