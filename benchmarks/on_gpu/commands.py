"""The real command on the device against the same command on the CPU, with the bundled model and its 500 images.

All commands run side by side, for nothing is timed here. What is compared: counts and NLL of every mask, constants and
scores that are fitted, descriptions of heads. TF32, which convolutions on GPUs use by default, explains differences of
about 1e-3; `ieee` is the same command without it.
"""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from benchmarks.on_gpu import difference
from benchmarks.on_gpu.part import ROOT, on, parser_of, publish, ran, run_in

HEADS = ("--mask-spec", "each:head")
LAYER = ("--mask-spec", "layer:3")
KINDS = "zero,mean,linear,position,resample:2"
FEW = ("--data.max_images", "120", "--data.calibration_images", "40")
FITTING = (*HEADS, "--ablation", KINDS, "--score-heads", *FEW)
SEARCHING = ("--mask-spec", "head:1.1", "--ablation", "mean,optimal", *FEW)
DESCRIBING = ("--config", str(ROOT / "configs" / "describe_heads.yaml"), *LAYER)
DDP = ("--trainer.devices", "1", "--trainer.strategy", "ddp")
IEEE = {"NVIDIA_TF32_OVERRIDE": "0"}
ON_CPU = "cpu"


@dataclass(frozen=True)
class Case:
    """A command.

    Attributes:
        name: Of the case.
        words: Its options.
        against: The case that it is compared with.
        same: Whether `masks.csv` must be the same to the bit.
        nll: Largest difference of NLL that is right, in nats.
        cpu: Whether it runs on the CPU.
        more: Variables of its environment.
    """

    name: str
    words: tuple[str, ...]
    against: str = ""
    same: bool = False
    nll: float = 2e-2
    cpu: bool = False
    more: dict[str, str] = field(default_factory=dict)


CASES = (
    Case("cpu fitting", FITTING, cpu=True),
    Case("fitting", FITTING, "cpu fitting", nll=0.1),
    Case("fitting, ieee", FITTING, "cpu fitting", nll=2e-2, more=IEEE),
    Case("cpu searching", SEARCHING, cpu=True),
    Case("searching, ieee", SEARCHING, "cpu searching", more=IEEE),
    Case("cpu heads", HEADS, cpu=True),
    Case("heads", HEADS, "cpu heads"),
    Case("heads again", HEADS, "heads", same=True),
    Case("heads, ieee", HEADS, "cpu heads", nll=1e-4, more=IEEE),
    Case("heads, ddp with one rank", (*HEADS, *DDP), "heads", same=True),
    Case("heads, bf16-mixed", (*HEADS, "--trainer.precision", "bf16-mixed"), "cpu heads", nll=0.2),
    Case("heads, bf16-true", (*HEADS, "--trainer.precision", "bf16-true"), "cpu heads", nll=0.2),
    Case("cpu describing", DESCRIBING, cpu=True),
    Case("describing", DESCRIBING, "cpu describing"),
    Case("describing, ieee", DESCRIBING, "cpu describing", nll=1e-4, more=IEEE),
    Case("layer 3", LAYER, "cpu describing"),
    Case("linear and scores, ddp", (*HEADS, "--ablation", "zero,mean,linear", "--score-heads", *DDP)),
)
QUICK = ("cpu heads", "heads", "heads, ddp with one rank")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cases and compare them; return 1 if one fails or differs by too much."""
    parser = parser_of("commands", __doc__)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="names of cases")
    options = parser.parse_args(arguments)
    named = options.cases or (QUICK if options.tiny else [case.name for case in CASES])
    chosen = [case for case in CASES if case.name in named]
    cores = os.cpu_count() or 1
    at_once = max(1, min(len(chosen), cores - 1))

    def run(case: Case) -> dict[str, Any]:
        threads = {"OMP_NUM_THREADS": "2" if cores > 4 else "1"}
        words = (*case.words, *on(ON_CPU if case.cpu else options.device), "--data.num_workers", "0")
        return ran(
            words,
            options.folder / case.name.replace(" ", "_"),
            limit=300 if options.tiny else 100,
            **threads,
            **case.more,
        )

    found: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(at_once) as pool:
        for case, one in zip(chosen, pool.map(run, chosen), strict=True):
            found[case.name] = one
            publish(found, options.json)
    for case in chosen:
        found[case.name]["right"] = judge(case, found, options)
    wrong = [name for name, one in found.items() if not one["right"]]
    publish({"not right": wrong, **found}, options.json)
    return int(bool(wrong))


def judge(case: Case, found: dict[str, dict[str, Any]], options: Any) -> bool:
    """Compare a case with another one, note how they differ, and return whether it is right."""
    own = found[case.name]
    if own["code"] != 0:
        return False
    if not case.against:
        return True
    if found[case.against]["code"] != 0:
        own["differs"] = f"{case.against} failed"
        return False
    folders = [run_in(options.folder / name.replace(" ", "_")) for name in (case.name, case.against)]
    try:
        own["differs"] = apart = difference.runs(*folders)
    except (OSError, SystemExit, ValueError, KeyError) as error:
        own["differs"] = f"{type(error).__name__}: {error}"
        return False
    # a search that ends before it has converged may end elsewhere
    nll = max(value for kind, value in apart["largest_nll_difference"].items() if kind != "optimal")
    return bool(apart["same_bytes"] or (not case.same and nll <= case.nll))


if __name__ == "__main__":
    sys.exit(main())
