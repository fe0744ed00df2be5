"""Every number of the page is that of the files, by `page_oracle`, for runs of all kinds and for several at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from headprobe.callbacks.derived import write_derived
from headprobe.run.load import read_files
from tests.report.page.made_runs import write_made, write_whole_run
from tests.report.page.page_oracle import CHECKS, check_page
from tests.report.page.test_answer import EVERYTHING, HALF, KINDS
from tests.run.small_runs import write_run

SWIN = (2, 2, 4, 8)


def whole(
    folder: Path, heads: Sequence[int], specs: Sequence[str] = EVERYTHING, kinds: Sequence[str] = ("zero", "linear")
) -> Path:
    """A run of a model with these heads per layer, and with every file."""
    record: dict[str, Any] = {"model": {"name": folder.name, "heads_per_layer": list(heads)}, **HALF}
    with pytest.MonkeyPatch.context() as patch:
        write_whole_run(folder / "before", patch, heads, ("each:head",), ("zero",))
        order = f"grow:{folder}/before:entropy_nats:least:1-{sum(heads)}/2"
        write_whole_run(folder, patch, heads, (*specs, order), kinds, **record)
    write_made(folder, {"0": list(range(heads[0])), "1": [1]}, kinds[0] if kinds[0] in ("zero", "mean") else "zero")
    for _ in write_derived(read_files(folder)):  # now that scores are there
        pass
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_every_kind_of_run_are_those_of_its_files(kind: str, tmp_path: Path) -> None:
    specs, ablations, record = KINDS[kind]
    found = check_page(write_run(tmp_path, specs, ablations, **record))
    assert bool(found) == (kind not in ("no mask", "one mask", "some masks"))  # there the first screen says all


@pytest.mark.parametrize("kinds", [("zero", "linear"), ("resample:3",), ("mean",)], ids=",".join)
def test_the_numbers_of_a_run_with_every_file_are_those_of_the_files(kinds: Sequence[str], tmp_path: Path) -> None:
    assert check_page(whole(tmp_path / "swin", SWIN, kinds=kinds)) == set(CHECKS) - (
        {"ablations"} if len(kinds) < 2 else set()
    )


def test_the_numbers_of_several_runs_are_each_those_of_its_own_files(tmp_path: Path) -> None:
    runs = [whole(tmp_path / "swin", SWIN), whole(tmp_path / "vit", (3, 3), kinds=("mean", "zero"))]
    small = write_run(tmp_path / "one", ["layer:1"])
    assert check_page(*runs, small) == set(CHECKS)
