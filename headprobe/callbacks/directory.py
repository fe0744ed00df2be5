"""Where a run's files go."""

from pathlib import Path

import lightning


def run_directory(trainer: lightning.Trainer) -> Path:
    """Return the run's directory, as in `lightning_logs/version_0`.

    Call it from `setup` and on every process: Lightning broadcasts the name each time it is asked, and a process that
    asks alone hangs all of them.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)
