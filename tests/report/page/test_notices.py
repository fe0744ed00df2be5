"""What a page says was left out or flatters, and what the run was made of."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from headprobe.report.page.build import build
from headprobe.report.page.notices import TOLD, notices
from headprobe.report.page.provenance import provenance
from headprobe.run.load import load_files
from headprobe.run.results import write_rows
from tests.callbacks.test_resume import broken_off
from tests.cli_runs import QUICK, Ended, command
from tests.report.page.answer_oracle import lines
from tests.report.page.page_oracle import check_page
from tests.report.page.test_answer import change, check
from tests.run.small_runs import write_run

ROOT = Path(__file__).resolve().parents[3]
TRAINED = {"weights": "digits_vit.safetensors"}


def said(folder: Path, **record: Any) -> str:
    return "\n".join(notices(load_files(write_run(folder, ["each:head"], ("mean",), **record))))


def rows_of(rule: str) -> dict[str, Any]:
    return {"calibration": "0f", "calibration_images": 31, "data": {"path": "digits", "rows": {"rule": rule}}}


NOTICES: dict[str, tuple[dict[str, Any], str]] = {
    "interrupted": ({"status": "failed"}, "The run ended as failed"),
    "skipped": ({"bad_images": 3, "on_bad_image": "skip"}, "3 images could not be used and count nowhere"),
    "one": ({"bad_images": 1, "on_bad_image": "error"}, "1 image could not be used and counts nowhere"),
    "wrong": ({"bad_images": 2, "on_bad_image": "wrong"}, "2 images could not be used and count as wrong"),
    "fewer images": ({"data": {"path": "digits", "max_images": 40}}, "Not all images were scored"),
    "random weights": ({"decisions": {"weights": "random, never trained"}}, "its weights are random, never trained"),
    "same": (rows_of("same"), "What is fitted or chosen (mean) is judged on the images that fitted the constants"),
    "other data": ({"calibration": "0f", "calibration_images": 31}, "comes from an earlier run on other data"),
    "undefined": (
        {"undefined": {"register_mass": {"the layer has no registers": [0, 1, 2]}, "rank": {"a norm follows": [1]}}},
        "register_mass is not defined in layers 0-2: the layer has no registers.\n"
        "rank is not defined in layer 1: a norm follows.",
    ),
    "memory": ({"units_by_row_budget": {"48": 3, "24": 2}}, "Memory ended during the run"),
    "decided": ({"decisions": {"order of heads": "by a judged column"}}, "order of heads: by a judged column"),
    "few images": ({}, "40 images judged: below 200"),
    "few groups": ({}, "are put into 64 groups; "),
}


@pytest.mark.parametrize("name", NOTICES)
def test_a_notice_says_what_was_left_out_or_flatters(name: str, tmp_path: Path) -> None:
    record, wanted = NOTICES[name]
    assert wanted in said(tmp_path, **record)


def test_notices_that_do_not_hold_are_not_given(tmp_path: Path) -> None:
    plain = said(tmp_path, decisions=TRAINED, **rows_of("half"))
    assert len(plain.splitlines()) == 2  # 40 images, in fewer than 64 groups
    for name, (_, wanted) in NOTICES.items():
        assert name.startswith("few ") or wanted not in plain


def test_masks_that_broke_the_model_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, ["each:head"], decisions=TRAINED)
    change(tmp_path, "head:1.0", nonfinite="7", nll="", nll_rise="")
    change(tmp_path, "head:2.1", nonfinite="1")
    text = "\n".join(notices(load_files(tmp_path)))
    assert "NaN or infinite logits, which count as wrong, in 2 rows of masks.csv (at most 7 images): " in text
    assert "head:1.0, head:2.1" in text
    assert "1 row of masks.csv has no finite NLL rise" in text
    assert "Features without" not in text


def test_scores_of_the_judged_images_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, ["each:head"])
    row = {"target": "nll_rise", "rows": "judged"}
    rows = [row | {"score": f"column_{number}"} for number in range(7)]
    write_rows(tmp_path / "importance.csv", [*rows, {"target": "nll_rise", "rows": "calibration", "score": "gradient"}])
    text = "\n".join(notices(load_files(tmp_path)))
    assert "7 scores of importance.csv were measured on the judged images themselves" in text
    assert "column_0, column_1, column_2, column_3, column_4 and 2 others" in text


def test_what_is_told_are_decisions_of_the_documents() -> None:
    document = (ROOT / "docs/decisions.md").read_text(encoding="utf-8")
    assert [key for key in TOLD if f"`{key}`" not in document] == []


def test_provenance_leaves_out_what_a_run_of_an_earlier_release_did_not_write(tmp_path: Path) -> None:
    known = dict(provenance(load_files(write_run(tmp_path, ["each:head", "random:2:0-3"]))))
    assert known["seeds (at the end of each; 0 where none is written)"] == "random:2:0-3"
    assert known["heads"] == "7 heads in 3 layers: 2 x 2, 1 x 3"
    assert known["images judged"] == "40"
    assert not {"command", "versions", "began", "SHA-256 of the weights"} & known.keys()


# -- from commands --


@pytest.fixture(scope="module")
def skipped(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A folder of digits, two of which are no images."""
    folder = tmp_path_factory.mktemp("skipped")
    write_folder(folder / "set", lambda label, number: (label, number) in {(3, 1), (7, 0)})
    (folder / "run.yaml").write_text("mask_spec: ['each:layer', 'each:head']\n")
    words = ("--config", "run.yaml", "--data.path", "set", "--data.on_bad_image", "skip")
    return command(folder, "test", *words, "--trainer.accelerator", "cpu", "--data.num_workers", "0")


def write_folder(folder: Path, broken: Callable[[int, int], bool]) -> None:
    """Write four digits of each class as PNG files; some are no images."""
    (file,) = (ROOT / "headprobe/data/digits").glob("**/test*.parquet")
    written: dict[int, int] = {}
    for row in pq.read_table(file).to_pylist():
        label, content = int(row["label"]), bytes(row["image"]["bytes"])
        number = written.setdefault(label, 0)
        if number < 4:
            path = folder / "test" / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no image" if broken(label, number) else content)
            written[label] += 1


def test_images_that_were_skipped_are_in_no_number_and_in_a_notice(skipped: Ended) -> None:
    assert skipped.code == 0, skipped.err
    sentences = check(skipped.directory())
    assert check_page(skipped.directory()) == {"heads", "layers"}
    assert sentences["baseline"].numbers["images"] == 38
    assert len(lines(skipped.directory(), "bad_images.csv")) == 2
    text = "\n".join(notices(load_files(skipped.directory())))
    assert "2 images could not be used and count nowhere (bad_images.csv)." in text


def test_a_resumed_run_gives_the_same_answer_and_says_that_it_was_resumed(tmp_path: Path) -> None:
    words = ("test", "--mask-spec", "each:layer", *QUICK)
    for folder in (tmp_path / "broken", tmp_path / "whole"):
        folder.mkdir()
    broken_off(tmp_path / "broken", 3, *words)
    ended, alone = command(tmp_path / "broken", *words), command(tmp_path / "whole", *words)
    assert (ended.code, alone.code) == (0, 0), ended.err
    resumed, whole = check(ended.directory(1)), check(alone.directory())
    assert resumed == whole
    assert check_page(ended.directory(1), alone.directory()) == {"layers", "compare"}
    record = json.loads((ended.directory(1) / "run.json").read_text())
    known = dict(provenance(load_files(ended.directory(1))))
    assert record["units_resumed"] == 3
    assert known["units finished by earlier sessions"] == "3 of 5"
    assert known["SHA-256 of the weights"] == record["model"]["weights_sha256"]
    assert known["command"].startswith("headprobe test --mask-spec each:layer")
    assert known["status"] == "done"
    assert known["heads"] == "24 heads in 6 layers: 6 x 4"


def test_a_run_from_before_masks_named_their_calibration_has_a_page(tmp_path: Path) -> None:
    file = write_run(tmp_path, ["each:head"], ("mean",)) / "masks.csv"
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    with file.open("w", newline="") as opened:
        table = csv.DictWriter(opened, [name for name in rows[0] if name != "calibration"], extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    assert "What does the multi-head do?" in build([load_files(tmp_path)])
