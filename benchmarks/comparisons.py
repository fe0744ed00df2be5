"""The six comparisons: who competes in what, with how many images."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.contestant import hand_written, run_for_json
from benchmarks.ours import headprobe, two_processes
from benchmarks.peers.common import read
from benchmarks.rounds import Comparison
from benchmarks.setting import Materials, prepare, usual, write

OURS, HOOKS = "headprobe", "plain hooks"
PEERS = (
    ("nnsight", "with_nnsight", "nnsight"),
    ("nnsight, skipping by hand", "with_nnsight_skip", "nnsight"),
    ("pyvene", "with_pyvene", "pyvene"),
    ("captum", "with_captum", "captum"),
    ("TransformerLens", "with_transformer_lens", "transformer_lens"),
    ("ViT-Prisma", "with_vit_prisma", "vit_prisma"),
)
"""Name in the table, module of `benchmarks.peers`, package that it needs."""
LAYER = 3
"""The layer that is masked where one mask is scored."""


@dataclass
class Session:
    """What the comparisons share.

    Attributes:
        options: Of the command line.
        scratch: Where images and weights for the contestants lie.
        tried: Fastest batch size of hand-written loops, by model.
    """

    options: argparse.Namespace
    scratch: Path
    tried: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def materials(self) -> Materials:
        """The model and images that were asked for."""
        return usual(self.options.data, self.options.model, self.options.weights)

    def setting(self, name: str, materials: Materials, images: int) -> Path:
        """Prepare images and weights, with the batch size that is fastest by hand, and return the setting's file."""
        folder = self.scratch / name
        file = prepare(materials, images, self.options.threads, self.options.workers, folder)
        kind = f"{materials.model} {json.dumps(materials.options)}"
        if kind not in self.tried:
            words = (sys.executable, "-m", "benchmarks.peers.best_batch", str(file))
            self.tried[kind] = run_for_json(words, self.options.threads)
        return write(replace(read(file), batch=self.tried[kind]["batch"]), folder)

    def described(self, materials: Materials, *files: Path) -> dict[str, Any]:
        """Return what the line above a table says."""
        settings = [read(file) for file in files]
        return {
            "model:": materials.describe(),
            "images": " / ".join(str(one.count) for one in settings),
            "threads": self.options.threads,
            "workers": self.options.workers,
            "batch by hand": settings[0].batch,
        }


def sweep(session: Session) -> Iterator[Comparison]:
    """Every single head, against what users would write and against other libraries."""
    threads, materials = session.options.threads, session.materials
    file = session.setting("sweep", materials, session.options.images)
    half = write(replace(read(file), precision="bfloat16"), _folder(session, "sweep_half"))
    bf16 = ("--trainer.precision", "bf16-mixed")
    yield Comparison(
        "Every single head",
        session.described(materials, file),
        (
            hand_written(HOOKS, "with_hooks", file, threads),
            headprobe(OURS, file, "each:head", threads),
            headprobe(f"{OURS}, bf16-mixed", file, "each:head", threads, *bf16, exact=False),
            hand_written(f"{HOOKS}, bfloat16", "with_hooks", half, threads, exact=False),
            *(hand_written(name, module, file, threads, needs=needs) for name, module, needs in PEERS),
        ),
        notes=(
            f"bfloat16 matrix instructions of this processor: {machine.bfloat16()}; its counts are not held to float32",
        ),
    )


def one_mask(session: Session) -> Iterator[Comparison]:
    """One mask, against a bare loop that does the same forward passes."""
    threads, materials = session.options.threads, session.materials
    file = session.setting("one_mask", materials, 8 * session.options.images)
    yield Comparison(
        f"One mask (layer:{LAYER})",
        session.described(materials, file),
        (
            hand_written("bare PyTorch loop", "bare_loop", file, threads, str(LAYER)),
            headprobe(OURS, file, f"layer:{LAYER}", threads),
        ),
    )


def baseline(session: Session) -> Iterator[Comparison]:
    """No mask, against the loop of timm's validate.py."""
    threads, materials = session.options.threads, session.materials
    file = session.setting("baseline", materials, 8 * session.options.images)
    yield Comparison(
        "Baseline alone",
        session.described(materials, file),
        (
            hand_written("timm's evaluation loop", "timm_loop", file, threads),
            headprobe(OURS, file, "none", threads),
        ),
    )


def swin(session: Session) -> Iterator[Comparison]:
    """Every layer of a Swin, against plain hooks."""
    options, threads = session.options, session.options.threads
    materials = replace(usual(options.data, options.swin, options.swin_weights), options={})
    file = session.setting("swin", materials, max(1, options.images // 2))
    yield Comparison(
        "Every layer of a Swin",
        session.described(materials, file),
        (
            hand_written(HOOKS, "layers_with_hooks", file, threads),
            headprobe(OURS, file, "each:layer", threads),
        ),
    )


def growth(session: Session) -> Iterator[Comparison]:
    """Time and memory as images, masks and layers grow; ratios are to the smallest."""
    images, threads, materials = session.options.images, session.options.threads, session.materials
    counts = [2 * images * factor for factor in (1, 2, 4)]
    files = [session.setting(f"images_{count}", materials, count) for count in counts]
    yield Comparison(
        f"Growth over images (layer:{LAYER})",
        session.described(materials, *files),
        tuple(headprobe(f"{read(file).count} images", file, f"layer:{LAYER}", threads) for file in files),
        same_work=False,
    )
    file = session.setting("masks", materials, max(1, images // 4))
    yield Comparison(
        "Growth over masks (random, of 6 heads)",
        session.described(materials, file),
        tuple(headprobe(f"{masks} masks", file, f"random:6:0-{masks - 1}", threads) for masks in (12, 36, 144)),
        same_work=False,
    )
    small = [
        Materials("digits", "vit_tiny_patch16_224", None, {"img_size": 64, "depth": depth}) for depth in (3, 6, 12)
    ]
    files = [session.setting(f"depth_{one.options['depth']}", one, images) for one in small]
    yield Comparison(
        "Growth over layers (each:layer)",
        session.described(small[0], *files),
        tuple(
            headprobe(f"{one.options['depth']} layers", file, "each:layer", threads)
            for one, file in zip(small, files, strict=True)
        ),
        same_work=False,
    )


def processes(session: Session) -> Iterator[Comparison]:
    """One process with all threads, against two processes that share them."""
    threads, materials = session.options.threads, session.materials
    file = session.setting("processes", materials, 2 * session.options.images)
    half = max(1, threads // 2)
    yield Comparison(
        "One process against two (each:layer)",
        session.described(materials, file),
        (
            headprobe(f"1 process, {threads} threads", file, "each:layer", threads),
            headprobe(f"2 processes, {half} threads each", file, "each:layer", half, *two_processes()),
        ),
        notes=("the peak is that of the larger process, not of both together; throughput is one divided by a ratio",),
    )


def _folder(session: Session, name: str) -> Path:
    folder = session.scratch / name
    folder.mkdir(exist_ok=True)
    return folder


COMPARISONS: dict[str, Callable[[Session], Iterator[Comparison]]] = {
    "sweep": sweep,
    "one-mask": one_mask,
    "baseline": baseline,
    "swin": swin,
    "growth": growth,
    "processes": processes,
}
