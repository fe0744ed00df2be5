"""Silences what a user can do nothing about, each with its reason; every other warning stays."""

import logging
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any


def silence() -> None:
    """Quieten the libraries below us; call it after importing Lightning, which sets its loggers' levels."""
    # "Seed set to 0", "GPU available: ...", tips: news about a run that works. Warnings and errors of theirs stay.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # At this level Lightning says why it kills a run: one of its processes was ended from outside (out of memory).
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    # Lightning 2.6 itself calls what torch 2.9 and later rename; it still works.
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated")
    # The number of workers is filled in from the cores and the units, unless the user chose it.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # TensorBoard writes in a thread; that a disk is full reaches the main thread too, which says so in one message.
    threading.excepthook = partial(_all_but_full_disks, threading.excepthook)
    # Two lines for each of up to ten tries; what follows from it is said once at the end, with the remedy.
    logging.getLogger("huggingface_hub.utils._http").addFilter(_FirstRetry())


def _all_but_full_disks(usual: Callable[[threading.ExceptHookArgs], Any], args: threading.ExceptHookArgs) -> None:
    ours = type(args.thread).__module__.startswith("tensorboard.") and isinstance(args.exc_value, OSError)
    if not ours:
        usual(args)


class _FirstRetry(logging.Filter):
    """Says once, in a few words, that the hub does not answer: a minute of silence would look like a hang."""

    def __init__(self) -> None:
        super().__init__()
        self.said = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Let the first warning through, reworded."""
        if record.levelno != logging.WARNING:
            return True
        first, self.said = not self.said, True
        record.msg, record.args = "headprobe: the hub does not answer; trying again for up to a minute", None
        return first
