"""The two ways a command can fail: a request that cannot be carried out, or a run that breaks half-way."""


class UsageError(ValueError):
    """The request cannot be carried out as written; the message names the culprit and the remedy (exit code 2)."""


class RunError(RuntimeError):
    """A run started and failed; the message says why and what to do next (exit code 1)."""
