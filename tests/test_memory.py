"""Memory does not grow with the number of images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.parquet_sets import write_files

pytestmark = pytest.mark.slow

CALLBACKS = ("HeadAttention", "HeadSimilarity", "HeadSpectrum")


def peak(folder: Path, images: int) -> int:
    """Largest resident memory, in KiB on Linux, of a run that describes all heads on so many images."""
    folder.mkdir()
    write_files(folder / "set", [[100]] * (images // 100))
    added = [word for name in CALLBACKS for word in ("--trainer.callbacks+", name)]
    words = ["test", "--data.path", "set", "--data.num_workers", "0", "--trainer.accelerator", "cpu", *added]
    process = subprocess.Popen(
        [sys.executable, "-m", "headprobe", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads of several tests would wait for each other
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # wait4 has taken it from Popen
    assert process.returncode == 0
    return used.ru_maxrss


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="the system does not say how much memory a process has used")
def test_describing_5000_images_takes_the_memory_of_500(tmp_path: Path) -> None:
    assert peak(tmp_path / "many", 5000) <= 1.05 * peak(tmp_path / "few", 500)
