"""What headprobe costs beside what users would do instead: ``python -m benchmarks``.

Every contestant runs in a process of its own, all take turns in every round, and ratios are printed only where all
counted the same images right.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.comparisons import COMPARISONS, Session
from benchmarks.contestant import ContestantError
from benchmarks.report import refuse_below_one
from benchmarks.rounds import Comparison, as_json, compete, nameless, text
from headprobe.errors import RunError, UsageError

PATHS = ("data", "weights", "swin_weights", "json")
"""Options whose folders say nothing on another machine."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparisons, print their tables, write the numbers, and return 1 if any ratio was refused."""
    options = parse(arguments)
    about = machine.describe()
    print(machine.line(about, options.threads), flush=True)
    numbers: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as scratch:
            session = Session(options, Path(scratch))
            for name in options.comparisons:
                for comparison in COMPARISONS[name](session):
                    numbers.append({"comparison": name, **run(comparison, options)})
                    save(options, about, numbers)
    except (UsageError, RunError, ContestantError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 1
    return int(any(one["refused"] for one in numbers))


def run(comparison: Comparison, options: argparse.Namespace) -> dict[str, Any]:
    """Run one comparison, print its table and return its numbers."""
    rounds = options.repeats if comparison.same_work else max(1, (options.repeats + 1) // 2)
    chosen = chosen_contestants(comparison, options.only)
    outcome = compete(chosen, rounds, lambda said: print(f"benchmarks: {said}", file=sys.stderr, flush=True))
    print(f"\n{text(chosen, outcome)}", flush=True)
    return as_json(chosen, outcome)


def chosen_contestants(comparison: Comparison, only: str | None) -> Comparison:
    """Leave out contestants whose names hold none of the texts that `--only` lists; the first always stays."""
    if only is None:
        return comparison
    texts = [text.strip() for text in only.split(",")]
    first, *others = comparison.contestants
    kept = (first, *(one for one in others if any(text in one.name for text in texts)))
    return Comparison(comparison.title, comparison.setting, kept, comparison.same_work, comparison.notes)


def save(options: argparse.Namespace, about: dict[str, Any], numbers: list[dict[str, Any]]) -> None:
    """Write all that was measured so far, so that a broken run keeps what it has."""
    if options.json is not None:
        asked = {
            name: nameless(str(value)) if name in PATHS and value else value for name, value in vars(options).items()
        }
        options.json.write_text(json.dumps({**about, "options": asked, "comparisons": numbers}, indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("comparisons", nargs="*", metavar="COMPARISON", help=f"of {', '.join(COMPARISONS)}; else all")
    parser.add_argument("--data", help="as --data.path of headprobe; by default ../shared/imagenet_sample, or digits")
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="as --model.name of headprobe")
    parser.add_argument("--weights", type=Path, help="its weights (safetensors); by default DeiT-Ti's in ../shared")
    parser.add_argument("--swin", default="swin_tiny_patch4_window7_224", help="the model of the Swin comparison")
    parser.add_argument("--swin-weights", type=Path, help="its weights; else bundled or random ones")
    parser.add_argument("--images", type=int, default=16, help="images of the sweep; the others take a multiple of it")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; growth, which compares nobody, takes half")
    parser.add_argument("--threads", type=int, default=2, help="of torch, in each contestant")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode; headprobe's own choice is 0")
    parser.add_argument("--only", help="contestants whose names hold one of these texts, joined by commas")
    parser.add_argument("--json", type=Path, help="also write all single times to this file")
    options = parser.parse_args(arguments)
    refuse_below_one(parser, options, "images", "repeats", "threads")
    if options.workers < 0:
        parser.error(f"--workers must be at least 0, got {options.workers}")
    unknown = [name for name in options.comparisons if name not in COMPARISONS]
    if unknown:
        parser.error(f"comparisons are {', '.join(COMPARISONS)}, got {unknown[0]}")
    options.comparisons = options.comparisons or list(COMPARISONS)
    return options


if __name__ == "__main__":
    sys.exit(main())
