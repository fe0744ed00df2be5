"""Run the parts of a visit to a GPU, each in a process and with its own time limit: ``bash benchmarks/gpu.sh all``.

A part that fails or takes too long is reported, and the next one runs all the same; the exit code is 1 then. After each
part its seconds and a line of JSON are printed, and all that is known so far is written to ``--json``; what the parts
print goes to a log beside it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MODULES = "benchmarks.on_gpu"
HALVES = ("cpu heads", "heads", "heads, bf16-mixed", "heads, bf16-true")
"""Commands that are compared by the part `halves`: all on the GPU against float32 on the CPU."""
LARGE = ("--rows", "4096")
LEAST_SECONDS = 8.0
"""A part is not begun with less time than this: importing torch takes as long."""
MOST_LINES = 25
"""Lines of a failed part that are printed; all are in the log."""
MOST_LETTERS = 2500
"""Of a line of JSON that is printed; the file has all."""


@dataclass(frozen=True)
class Part:
    """One question.

    Attributes:
        name: Its name in `--only` and in the results.
        words: The module and its options; `--json FILE` is added.
        limit: Seconds that it may take.
    """

    name: str
    words: tuple[str, ...]
    limit: float


def parts(options: argparse.Namespace, folder: Path) -> list[Part]:
    """Return all parts in their order; `folder` is for images and runs."""
    device = ("--device", options.device, *(("--tiny",) if options.tiny else ()))
    own = (*device, "--folder", str(folder))
    threads = str(min(8, os.cpu_count() or 1))
    fitting = ("--batch", "256", "--repeats", "7") if not options.tiny else ("--model", "digits_vit", "--repeats", "1")
    found = [
        Part("sweep", ("benchmarks.gpu", *device, "--repeats", "3"), 130),
        Part("commands", (f"{MODULES}.commands", *own), 110),
        Part("halves", (f"{MODULES}.commands", *device, "--folder", str(folder / "halves"), "--cases", *HALVES), 60),
        Part("formats", (f"{MODULES}.formats", *device), 100),
        Part("check", (f"{MODULES}.checks", *device), 60),
        Part("memory", (f"{MODULES}.memory", *own), 60),
        Part("fitting", ("benchmarks.calibration", "--device", options.device, "--threads", threads, *fitting), 60),
        Part("profile", (f"{MODULES}.trials", "profile", *device), 60),
        Part("profile_bf16", (f"{MODULES}.trials", "profile", *device, *LARGE, "--all-bfloat16"), 45),
        Part("compile", (f"{MODULES}.trials", "compile", *device), 75),
        Part("images", (f"{MODULES}.images", *own), 130),
    ]
    return [replace(part, limit=3 * part.limit) for part in found] if options.tiny else found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; return 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and few images, to try the script")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="file of all results; a log lies beside it")
    parser.add_argument("--only", nargs="+", default=[], help="names of parts")
    parser.add_argument("--limit", type=float, help="seconds of everything [420, tiny ones 1800]")
    options = parser.parse_args(arguments)
    limit = options.limit or (1800 if options.tiny else 420)
    with tempfile.TemporaryDirectory() as folder:
        everything = parts(options, Path(folder))
        known = [part.name for part in everything]
        if unknown := set(options.only) - set(known):
            parser.error(f"--only must name parts ({', '.join(known)}), got {', '.join(sorted(unknown))}")
        chosen = [part for part in everything if not options.only or part.name in options.only]
        found = run_all(chosen, options.json, time.monotonic() + limit)
    wrong = [one["part"] for one in found if one["ended"] != "done"]
    print(f"\n{len(found) - len(wrong)} of {len(found)} parts done" + (f", not {', '.join(wrong)}" if wrong else ""))
    return int(bool(wrong))


def run_all(chosen: Sequence[Part], file: Path, until: float) -> list[dict[str, Any]]:
    """Run parts one after the other and return what each gave; the file always holds all that is known.

    Args:
        chosen: The parts.
        file: Where the results go.
        until: When everything must have ended, on the monotonic clock.
    """
    found: list[dict[str, Any]] = []
    file.parent.mkdir(parents=True, exist_ok=True)
    log = file.with_suffix(".log")
    log.write_text("")
    for part in chosen:
        one = run_part(part, log, until - time.monotonic())
        found.append(one)
        report(one)
        written = file.with_suffix(".part")
        written.write_text(json.dumps({"parts": found}, indent=1) + "\n")
        written.replace(file)
    return found


def run_part(part: Part, log: Path, left: float) -> dict[str, Any]:
    """Run one part in a process of its own and return how it ended, its seconds and its numbers."""
    limit = min(part.limit, left)
    if limit < LEAST_SECONDS:
        return {"part": part.name, "ended": "no time was left", "seconds": 0.0}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("a") as out:
        out.write(f"\n===== {part.name}: {' '.join(part.words)}\n")
        out.flush()
        first, numbers = out.tell(), Path(folder) / "numbers.json"
        words = [sys.executable, "-m", *part.words, "--json", str(numbers)]
        # a session of its own, so that its workers can be ended with it
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=limit)
            ended = "done" if code == 0 else f"code {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        finally:
            end(process)
        seconds = round(time.monotonic() - began, 1)
        known = json.loads(numbers.read_text()) if numbers.exists() else None
    one = {"part": part.name, "ended": ended, "seconds": seconds, "numbers": known}
    if ended != "done":
        said = log.read_bytes()[first:].decode(errors="replace").splitlines()
        one["said"] = said[-MOST_LINES:]
    return one


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all of its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def report(one: dict[str, Any]) -> None:
    """Print what a part gave: how it ended and its seconds, the end of its log if it failed, and a line of JSON."""
    print(f"\n== {one['part']}: {one['ended']}, {one['seconds']} s", flush=True)
    for line in one.get("said", ()):
        print(f"   {line[:300]}")
    if one.get("numbers") is not None:
        text = json.dumps(rounded(one["numbers"]))
        print(
            text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]} ... (all of it is in the file)", flush=True
        )


def rounded(value: Any) -> Any:
    """Return numbers to four digits, and no lists of single times."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items() if not (name == "seconds" and isinstance(one, list))}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
