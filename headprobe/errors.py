"""The two ways a command can fail: a request that cannot be carried out, or a run that breaks half-way; and Ctrl-C.

And the category of headprobe's own warnings.
"""


class UsageError(ValueError):
    """The request cannot be carried out as written; the message names the culprit and the remedy (exit code 2)."""


class RunError(RuntimeError):
    """A run started and failed; the message says why and what to do next (exit code 1)."""


class HeadprobeWarning(UserWarning):
    """A warning of headprobe's own; the command line prints it as one line, without the file that it came from."""


def was_interrupted(error: BaseException) -> bool:
    """Return whether an error is a KeyboardInterrupt, or was raised while one ended the work.

    An interrupt in the middle of PyTorch's own bookkeeping makes its clean-up fail ("pop from empty mode stack"), and
    that error then hides the interrupt.
    """
    while not isinstance(error, KeyboardInterrupt):
        if error.__context__ is None:
            return False
        error = error.__context__
    return True
