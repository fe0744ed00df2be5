"""Runs a command and waits for all that it leaves behind, so that their CPU time and memory count as its own.

The second process of a run on two is not waited for by the first; on Linux such an orphan becomes a child of this one.
"""

import ctypes
import os
import subprocess
import sys

PR_SET_CHILD_SUBREAPER = 36  # of <sys/prctl.h>


def main(words: list[str]) -> int:
    """Run the command, wait for its descendants and return its exit code, 128 + the number for a signal."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    code = subprocess.call(words)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
