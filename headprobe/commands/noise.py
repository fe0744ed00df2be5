"""Silences what a user can do nothing about, one line each with its reason; every other warning stays."""

import logging
import threading
import warnings


def silence() -> None:
    """Quieten the libraries below us; call it before they are imported."""
    # "Seed set to 0", "GPU available: ...", tips: news about a run that works. Warnings and errors of theirs stay.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning says at this level why it kills a run: a process was ended from outside (out of memory).
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    # Lightning 2.6 uses two functions that torch 2.9 to 2.14 rename; both still work.
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", message=r"torch\.distributed\.nn\.functional\.all_gather is deprecated")
    # The number of workers is ours to choose: data.num_workers is filled in from the cores and the units.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    threading.excepthook = _without_full_disks(threading.excepthook)


def _without_full_disks(usual):  # type: ignore[no-untyped-def]
    def hook(args: threading.ExceptHookArgs) -> None:
        if not (args.thread is not None and "AsyncWriter" in type(args.thread).__name__):
            usual(args)

    return hook
