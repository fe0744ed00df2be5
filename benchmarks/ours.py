"""headprobe as a contestant: the real command, images decoded and results written."""

import csv
import json
import sys
from pathlib import Path

from benchmarks.contestant import Contestant, Found
from benchmarks.peers.common import Setting, read


def headprobe(name: str, file: Path, spec: str, threads: int, *words: str, exact: bool = True) -> Contestant:
    """Return `headprobe test` under a mask spec as a contestant.

    Args:
        name: As it stands in the table.
        file: The setting.
        spec: As `--mask-spec`.
        threads: `OMP_NUM_THREADS` of each process.
        words: Further options.
        exact: Whether it computes in float32.
    """
    command = (sys.executable, "-m", "headprobe", "test", *options(read(file)), *words, "--mask-spec", spec)
    return Contestant(name, command, found, threads, exact=exact, ours=True)


def options(setting: Setting) -> tuple[str, ...]:
    """Return the options that give headprobe the images and weights of a setting."""
    given = ("--model.options", json.dumps(setting.given)) if setting.given else ()
    return (
        *("--model.name", setting.named),
        *("--model.weights", setting.weights),
        *given,
        *("--data.path", setting.images),
        *("--data.class_map", "identity"),
        *("--data.num_workers", str(setting.workers)),
        *("--trainer.accelerator", "cpu"),
        *("--resume", "never"),
    )


def two_processes() -> tuple[str, ...]:
    """Return the options that share a run between two processes."""
    return ("--trainer.devices", "2", "--trainer.strategy", "ddp")


def found(folder: Path, _: str) -> Found:
    """Read what a run wrote: in run.json the time of decoding, computing and writing, and masks.csv."""
    directory = folder / "lightning_logs" / "version_0"
    record = json.loads((directory / "run.json").read_text())
    with (directory / "masks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return Found(
        record["seconds_loop"] + record["seconds_writing"],
        {row["mask"]: int(row["top1_count"]) for row in rows},
        {row["mask"]: float(row["nll"]) for row in rows if row["nll"]},
    )
