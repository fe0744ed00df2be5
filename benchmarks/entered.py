"""How many files and functions of headprobe a command enters.

``python -m benchmarks.entered test --mask-spec layer:3``


A reader follows a command through so many files. Counted are functions that run, in the main thread and in others;
importing a module and executing a class body is not entering it. `__init__.py` is left out: it finds public names.
Run it where no earlier run left units.
"""

import json
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType

OPTIMISED = 1  # the code flag (CO_OPTIMIZED) of functions; modules and class bodies lack it


class Entered:
    """The functions that have been called, by file.

    Args:
        package: Folder of the package.
    """

    def __init__(self, package: Path) -> None:
        self.package = f"{package}/"
        self.functions: set[tuple[str, str, int]] = set()

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        """Note a call; `sys.setprofile` calls this."""
        code = frame.f_code
        if event == "call" and code.co_flags & OPTIMISED and code.co_filename.startswith(self.package):
            self.functions.add((code.co_filename.removeprefix(self.package), code.co_qualname, code.co_firstlineno))

    @property
    def by_file(self) -> dict[str, int]:
        """Functions of each file that was entered."""
        files = (file for file, *_ in self.functions if not file.endswith("__init__.py"))
        return dict(sorted(Counter(files).items()))


def main(words: list[str]) -> int:
    """Run a command and write to the standard error what it entered, as one line of JSON at the end."""
    import headprobe
    from headprobe.cli import main as run

    entered = Entered(Path(headprobe.__file__).parent)
    threading.setprofile(entered.profile)
    sys.setprofile(entered.profile)
    try:
        code = run(words)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    files = entered.by_file
    counts = {"files": len(files), "functions": sum(files.values()), "by_file": files}
    sys.stderr.write(json.dumps(counts) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
