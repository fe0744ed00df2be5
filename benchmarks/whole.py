"""Runs a command, waits for all that it leaves behind, and writes the CPU time and memory of them all.

The second process of a run on two is not waited for by the first; on Linux such an orphan becomes a child of this one.
What the kernel says of this process itself is of no use: its peak begins at that of the process that started it.
"""

import ctypes
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # of <sys/prctl.h>


def main(words: list[str]) -> int:
    """Run the command, wait for its descendants and return its exit code, 128 + the number for a signal.

    Args:
        words: The file to write to, then the command. It gets CPU seconds, and the peak of the largest process in the
            system's unit.
    """
    file, *command = words
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    code = subprocess.call(command)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    Path(file).write_text(json.dumps({"cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss}))
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
