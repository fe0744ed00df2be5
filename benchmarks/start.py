"""What `test` on the bundled images takes beside importing torch, timm and lightning: ``python -m benchmarks.start``.

The command and the bare imports take turns, each a process of its own. Once more the command runs with a clock around
its stages. Python keeps compiled files, as it does of installed packages; the first round, which makes them, is left
out.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import markdown, publish, refuse_below_one

IMPORTS = ("-c", "import torch, timm, lightning")
COMMAND = ("test", "--mask-spec", "layer:3", "--trainer.accelerator", "cpu", "--resume", "never")
STAGES = {
    "build the parser": ("lightning.pytorch.cli", "LightningCLI", "setup_parser"),
    "parse the words": ("headprobe.commands.test_and_fit", "RunCLI", "parse_arguments"),
    "build model, data and trainer": ("headprobe.commands.test_and_fit", "RunCLI", "instantiate_classes"),
    "choose masks": ("headprobe.commands.test_and_fit", "TestCLI", "after_instantiate_classes"),
    "open the data": ("headprobe.commands.test_and_fit", "RunCLI", "open_data"),
    "digests, units, kept proofs": ("headprobe.callbacks.resume", "Resume", "setup"),
    "prove masks, plan": ("headprobe.module", "HeadProbe", "plan_passes"),
    "the loop": ("headprobe.module", "HeadProbe", "test_step"),
    "write results": ("headprobe.callbacks.results", "ResultsWriter", "on_test_end"),
}
"""Stages of the command, and the methods that they are; what reads the images is in `other`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, each of them one run of both")
    parser.add_argument("--images", type=int, default=500, help="of the bundled 500")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    refuse_below_one(parser, options, "threads", "repeats", "images")
    words = (*COMMAND, "--data.max_images", str(options.images))
    with tempfile.TemporaryDirectory() as scratch:
        rounds = [one_round(words, Path(scratch), options.threads) for _ in range(options.repeats + 1)][1:]
        inside = stages(words, Path(scratch), options.threads)
    cases = [*totals(rounds, inside["the loop"]), *({"case": name, "cpu": seconds} for name, seconds in inside.items())]
    setting = {"images": options.images, "threads": options.threads, "repeats": options.repeats}
    columns = ("", "clock: minimum", "median", "CPU: minimum", "median")
    lines = []
    for case in cases:
        cells = (case.get(name) for name in ("clock", "clock_median", "cpu", "cpu_median"))
        lines.append((case["case"], *("" if cell is None else f"{cell:.2f}" for cell in cells)))
    publish(markdown(setting, columns, lines), setting, cases, options.json)


def one_round(words: Sequence[str], scratch: Path, threads: int) -> dict[str, float]:
    """Return clock and CPU seconds of the imports, of the command, and the command's own account of its loop."""
    imports = run(IMPORTS, scratch, scratch, threads)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        command = run(("-m", "headprobe", *words), Path(folder), scratch, threads)
        record = json.loads((Path(folder) / "lightning_logs/version_0/run.json").read_text(encoding="utf-8"))
    return {
        "imports": imports[0],
        "imports_cpu": imports[1],
        "command": command[0],
        "command_cpu": command[1],
        "loop": record["seconds_loop"],
    }


def run(words: Sequence[str], folder: Path, scratch: Path, threads: int) -> tuple[float, float]:
    """Return clock and CPU seconds of a Python process and of all that it waited for."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=environment(scratch, threads),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with code {process.returncode}")
    return time.perf_counter() - began, used.ru_utime + used.ru_stime


def environment(scratch: Path, threads: int) -> dict[str, str]:
    """Return the environment of a process: it finds this checkout, and keeps compiled files apart from others'."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [kept.get("PYTHONPATH")])])
    more = {"PYTHONPATH": path, "PYTHONPYCACHEPREFIX": str(scratch / "compiled"), "OMP_NUM_THREADS": str(threads)}
    return kept | more


def stages(words: Sequence[str], scratch: Path, threads: int) -> dict[str, float]:
    """Return CPU seconds of the stages of one run, in a process of its own."""
    code = f"from benchmarks.start import inside; inside({list(words)!r})"
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=environment(scratch, threads),
            capture_output=True,
            text=True,
            check=True,
        )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def inside(words: list[str]) -> None:
    """Run the command in this process with a clock around its stages, and print their CPU seconds as JSON."""
    seconds: dict[str, float] = {}
    clock = time.process_time
    began = clock()
    for name in ("torch", "timm", "lightning"):
        before = clock()
        __import__(name)
        seconds[f"import {name}"] = clock() - before
    before = clock()
    for name, (module, kind, method) in STAGES.items():
        owner = getattr(__import__(module, fromlist=[kind]), kind)
        setattr(owner, method, timed(getattr(owner, method), seconds, name))
    seconds["import the rest"] = clock() - before

    from headprobe.cli import main as headprobe

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        code = headprobe(words)
    seconds["other"] = clock() - began - sum(seconds.values())
    print(json.dumps(seconds))
    sys.exit(code)


def timed(method: Callable[..., Any], seconds: dict[str, float], name: str) -> Callable[..., Any]:
    """Return a method that adds its CPU seconds to those of a stage."""

    @functools.wraps(method)
    def wrapper(*args: Any, **options: Any) -> Any:
        before = time.process_time()
        try:
            return method(*args, **options)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - before

    return wrapper


def totals(rounds: Sequence[dict[str, float]], loop: float) -> list[dict[str, Any]]:
    """Return imports, loop and command as cases, and the command relative to imports and loop together.

    Args:
        rounds: From `one_round`.
        loop: CPU seconds of the loop, from the run with a clock around its stages.
    """
    found = []
    for name in ("imports", "loop", "command"):
        case: dict[str, Any] = {"case": name}
        for kind, key in (("clock", name), ("cpu", f"{name}_cpu")):
            values = [one[key] for one in rounds if key in one]
            case |= {kind: min(values), f"{kind}_median": median(values)} if values else {}
        found.append(case)
    clock = [one["command"] / (one["imports"] + one["loop"]) for one in rounds]
    cpu = [one["command_cpu"] / (one["imports_cpu"] + loop) for one in rounds]
    ratio = {"clock": min(clock), "clock_median": median(clock), "cpu": min(cpu), "cpu_median": median(cpu)}
    return [*found, {"case": "command / (imports + loop)", **ratio}]


if __name__ == "__main__":
    main()
