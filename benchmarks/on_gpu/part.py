"""What the parts have in common: their options, their numbers, a headprobe command and what it left."""

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from headprobe.cli import main as headprobe

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--model.options.img_size", "32", "--model.options.embed_dim", "24", "--model.options.depth", "3")
"""Options of a ViT of 3 layers for 32 x 32 pixels, to try the script."""


def parser_of(module: str, about: str | None, folder: bool = True) -> argparse.ArgumentParser:
    """Return the parser of a part."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.on_gpu.{module}", description=about)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and few images, to try the script")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    if folder:
        parser.add_argument("--folder", type=Path, required=True, help="for images and runs")
    return parser


def publish(numbers: Mapping[str, Any], file: Path | None) -> None:
    """Print the numbers as JSON, and write them if a file is given: after every step, so that a stop loses little."""
    print(json.dumps(numbers), flush=True)
    if file is not None:
        file.write_text(json.dumps(numbers) + "\n")


def command(words: Sequence[str], folder: Path) -> list[str]:
    """Return the words of a test that writes into `folder`."""
    return [sys.executable, "-m", "headprobe", "test", "--trainer.default_root_dir", str(folder), *words]


def on(device: str) -> tuple[str, ...]:
    """Return the option of the device: none for a GPU, which Lightning finds by itself, as users would."""
    return ("--trainer.accelerator", "cpu") if device == "cpu" else ()


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a command of this checkout."""
    path = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{path}" if path else str(ROOT), "HF_HUB_OFFLINE": "1", **more}


def ran(words: Sequence[str], folder: Path, limit: float, **more: str) -> dict[str, Any]:
    """Run a test and return its code, its seconds by part and, if it failed, the end of what it said.

    Args:
        words: Options of the test.
        folder: Where the run goes.
        limit: Seconds that it may take.
        **more: Variables of its environment.
    """
    began = time.monotonic()
    try:
        ended = subprocess.run(
            command(words, folder), env=environment(**more), capture_output=True, text=True, timeout=limit, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return {"code": None, "said": [f"stopped after {limit:.0f} s"]}
    sys.stderr.write(f"--- {' '.join(words)}\n{ended.stdout}{ended.stderr}\n")
    found: dict[str, Any] = {"code": ended.returncode, "seconds": round(time.monotonic() - began, 2)}
    if ended.returncode:
        return found | {"said": (ended.stdout + ended.stderr).splitlines()[-8:]}
    return found | of_run(run_in(folder))


def once(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a test in this process, which has imported everything by then; return its code, what it said, its numbers.

    `said` holds lines of memory and of precision; all of them if it failed.
    """
    began, said = time.monotonic(), io.StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        code = headprobe(["test", "--trainer.default_root_dir", str(folder), *words])
    sys.stderr.write(f"--- {' '.join(words)}\n{said.getvalue()}\n")
    found: dict[str, Any] = {"code": code, "seconds": round(time.monotonic() - began, 2)}
    lines = said.getvalue().splitlines()
    if code:
        return found | {"said": lines[-8:]}
    told = [line for line in lines if "memory" in line or "baseline prediction" in line]
    return found | {"said": told[:8]} | of_run(run_in(folder))


def run_in(folder: Path) -> Path:
    """Return the only run below a folder."""
    (about,) = (folder / "lightning_logs").glob("version_*/run.json")
    return about.parent


def of_run(run: Path) -> dict[str, Any]:
    """Return the seconds of a run by part, its images, images/s of its loop, and its row budgets."""
    about = json.loads((run / "run.json").read_text())
    found = {name: about.get(name) for name in ("seconds_setup", "seconds_loop", "seconds_writing")}
    images = int((run / "masks.csv").read_text().splitlines()[1].split(",")[6])
    return {**found, "images": images, "images_per_second": images / about["seconds_loop"]} | {
        "rows": about.get("units_by_row_budget")
    }
