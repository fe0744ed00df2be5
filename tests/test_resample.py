"""`--ablation resample` end to end, against two plain passes over a whole data set, without a growing pass.

The first pass keeps the donors' heads, the second writes them over; the donors are found here anew, from the rule in
words.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.data.datamodule import ImageNetDataModule
from headprobe.errors import RunError, UsageError
from headprobe.module import HeadProbe
from headprobe.trainer import ProbeTrainer
from tests.callbacks.test_resume import broken_off
from tests.cli_runs import Ended, command, only_message
from tests.forked import digits, run

pytestmark = pytest.mark.usefixtures("no_pictures")

CPU = ("--trainer.accelerator", "cpu", "--data.num_workers", "0")
SPECS = ["each:layer", "head:0.1+head:3.2", "head:5.3"]
MASKS: list[dict[int, list[int]]] = [
    *[{layer: [0, 1, 2, 3]} for layer in range(6)],
    {0: [1], 3: [2]},
    {5: [3]},
]
SIZES = [13, 8, 2, 23, 7]  # with 13 % 4 = 1: a row that joins another group


def write_set(folder: Path, sizes: Sequence[int] = SIZES) -> Path:
    """The first bundled digits, in files of these sizes."""
    digits(folder / "all", sum(sizes), 1)
    whole = pq.read_table(next((folder / "all").iterdir()))
    (folder / "set").mkdir()
    first = 0
    for number, size in enumerate(sizes):
        pq.write_table(whole.slice(first, size), folder / "set" / f"validation-{number:05}-of-{len(sizes):05}.parquet")
        first += size
    return folder


def donor_of(rows: Sequence[int], unit: int, seed: int, draw: int) -> dict[int, int]:
    """Each row's donor among all rows that a unit gives."""
    groups = [list(rows[first : first + 4]) for first in range(0, len(rows), 4)]
    if len(rows) % 4 == 1:
        groups[-2:] = [groups[-2] + groups[-1]]
    found: dict[int, int] = {}
    for group in groups:
        group.sort(key=lambda row: hashlib.sha256(f"resample:{seed}:{draw}:{unit}:{row}".encode()).digest())
        found |= dict(zip(group, group[1:] + group[:1], strict=True))
    return found


def by_hooks(probe: HeadProbe, images: Tensor, donors: list[int], masked: dict[int, list[int]]) -> Tensor:
    """Run the donors and keep what enters every projection; run the images and write the masked heads' columns over."""
    model: Any = probe.backbone
    width = model.embed_dim // 4
    given: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda _, args: given.__setitem__(layer, args[0].clone())

    def write(layer: int) -> Any:
        def hook(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            mine = args[0].clone()
            for head in masked.get(layer, []):
                mine[..., head * width : (head + 1) * width] = given[layer][..., head * width : (head + 1) * width]
            return (mine,)

        return hook

    logits = torch.empty(0)
    for make, pictures in ((keep, images[donors]), (write, images)):
        handles = [block.attn.proj.register_forward_pre_hook(make(layer)) for layer, block in enumerate(model.blocks)]
        logits = probe.backbone(probe.normalised(pictures))
        for handle in handles:
            handle.remove()
    return logits


@torch.inference_mode()
def expected(folder: Path, seed: int, draws: int, rows_of: Any = None) -> dict[tuple[int, int], tuple[int, float]]:
    """Right answers and mean NLL of each mask and draw, over all rows or those that `rows_of(unit)` names."""
    probe = HeadProbe().eval()
    data = ImageNetDataModule(path=str(folder / "set"), batch_size=100, num_workers=0)
    data.bind(probe.data_config, 10)
    found = {}
    for number, masked in enumerate(MASKS):
        for draw in range(draws):
            right, nll = 0, []
            for batch in data.stream():
                rows = list(range(len(batch.images))) if rows_of is None else rows_of(batch.unit)
                images, labels = batch.images[rows], batch.labels[rows]
                donor = donor_of(rows, batch.unit, seed, draw)
                logits = by_hooks(probe, images, [rows.index(donor[row]) for row in rows], masked).double()
                right += int((logits.argmax(dim=1) == labels).sum())
                nll.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
            found[number, draw] = (right, float(torch.cat(nll).mean()))
    return found


def config(folder: Path, ablation: str) -> tuple[str, ...]:
    (folder / "run.yaml").write_text(f"mask_spec: {json.dumps(SPECS)}\nablation: {ablation}\ndata: {{path: set}}\n")
    return ("test", "--config", "run.yaml", *CPU)


def resampled(ended: Ended, version: int = 0) -> dict[tuple[int, int], tuple[int, float]]:
    """Right answers and mean NLL by mask, in the order of the specs, and draw."""
    assert ended.code == 0, ended.err
    rows = [row for row in ended.rows(version) if row["ablation"] == "resample"]
    names = list(dict.fromkeys(row["mask"] for row in rows))
    return {(names.index(row["mask"]), int(row["draw"])): (int(row["top1_count"]), float(row["nll"])) for row in rows}


def same(found: dict[Any, tuple[int, float]], wanted: dict[Any, tuple[int, float]], tolerance: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for key, (right, nll) in wanted.items():
        assert found[key][0] == right, key
        assert found[key][1] == pytest.approx(nll, abs=tolerance), key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("resample"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Ended:
    return command(folder, *config(folder, "zero,resample:2:5"))


def test_a_run_equals_two_plain_passes_over_the_whole_data_set(folder: Path, alone: Ended) -> None:
    wanted = expected(folder, seed=5, draws=2)
    same(resampled(alone), wanted)
    assert len({nll for _, nll in wanted.values()}) == 2 * len(MASKS)  # draws differ


@pytest.mark.parametrize(
    "options",
    [
        ("--data.batch_size", "4"),
        ("--data.batch_size", "16"),
        ("--model.row_budget", "10"),
        ("--model.row_budget", "300"),
    ],
    ids=" ".join,
)
def test_other_batch_sizes_and_row_budgets_have_the_same_donors(
    tmp_path: Path, alone: Ended, options: tuple[str, ...]
) -> None:
    ended = command(write_set(tmp_path), *config(tmp_path, "zero,resample:2:5"), *options)
    same(resampled(ended), resampled(alone))


def test_another_seed_has_other_donors(tmp_path: Path, alone: Ended) -> None:
    ended = command(write_set(tmp_path), *config(tmp_path, "resample:2:6"))
    other = resampled(ended)
    assert all(other[key][1] != nll for key, (_, nll) in resampled(alone).items())
    same(other, expected(tmp_path, seed=6, draws=2))


def test_half_of_the_rows_have_donors_among_themselves(tmp_path: Path) -> None:
    write_set(tmp_path)
    ended = command(tmp_path, *config(tmp_path, "mean,resample:1:5"))
    wanted = expected(
        tmp_path,
        seed=5,
        draws=1,
        rows_of=lambda unit: [
            row
            for row in range(SIZES[unit])
            if hashlib.sha256(f"half:{unit}:{row}".encode()).digest()[0] >= 128  # the half that is judged
        ],
    )
    same(resampled(ended), wanted)


def test_out_of_memory_goes_on_with_the_same_donors(
    tmp_path: Path, alone: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = GrowingPass._forward

    def small_memory(self: GrowingPass, images: Tensor, wave: tuple[int, ...], whole: bool) -> Tensor:
        if len(wave) > 3 and self.keep.shape[0] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images, wave, whole)

    monkeypatch.setattr(GrowingPass, "_forward", small_memory)
    ended = command(write_set(tmp_path), *config(tmp_path, "zero,resample:2:5"))
    same(resampled(ended), resampled(alone))
    assert json.loads((ended.directory() / "run.json").read_text())["row_plan"]["budget"] < 48


def test_when_not_even_one_group_fits_the_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = GrowingPass._forward

    def no_memory(self: GrowingPass, images: Tensor, wave: tuple[int, ...], whole: bool) -> Tensor:
        if self.keep.shape[0] == len(MASKS):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images, wave, whole)

    monkeypatch.setattr(GrowingPass, "_forward", no_memory)
    ended = command(write_set(tmp_path), *config(tmp_path, "resample"))
    assert ended.code == 1
    assert "not even 5 images fit into memory" in ended.err


def test_a_run_that_broke_off_is_resumed_to_the_bit(tmp_path: Path, alone: Ended) -> None:
    words = config(write_set(tmp_path), "zero,resample:2:5")
    broken_off(tmp_path, 3, *words)
    ended = command(tmp_path, *words)
    record = json.loads((ended.directory(1) / "run.json").read_text())
    assert record["units_resumed"] == 3
    assert (ended.directory(1) / "masks.csv").read_bytes() == (alone.directory() / "masks.csv").read_bytes()
    assert "an earlier run proved" in record["decisions"].pop("proofs")
    assert record["decisions"] == json.loads((alone.directory() / "run.json").read_text())["decisions"]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one_to_the_bit(tmp_path: Path) -> None:
    runs = []
    for processes in (1, 2):
        folder = write_set(tmp_path / str(processes))
        runs.append(run(folder, *config(folder, "zero,resample:2:5"), processes=processes))
        assert runs[-1].code == 0, runs[-1].err
    one, two = (ended.directory() for ended in runs)
    assert (one / "masks.csv").read_bytes() == (two / "masks.csv").read_bytes()
    decisions = [json.loads((folder / "run.json").read_text())["decisions"]["resample"] for folder in (one, two)]
    assert decisions[0] == decisions[1]
    assert "own class in" in decisions[0]


def table_of(folder: Path) -> pa.Table:
    return pq.read_table(next((folder / "all").iterdir()))


def test_the_share_of_donors_of_the_own_class_is_counted(folder: Path, alone: Ended) -> None:
    labels = table_of(folder)["label"].to_pylist()
    hits, first = [], 0
    for unit, size in enumerate(SIZES):
        for draw in range(2):
            for row, donor in donor_of(range(size), unit, 5, draw).items():
                hits.append(labels[first + row] == labels[first + donor])
        first += size
    record = json.loads((alone.directory() / "run.json").read_text())
    assert record["decisions"]["resample"].endswith(
        f"donors are of the image's own class in {np.mean(hits):.0%} of rows"
    )
    assert "resample: " not in alone.out  # few enough


def test_data_sorted_by_class_are_said_to_understate(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "sorted").mkdir()
    pq.write_table(table_of(tmp_path).sort_by("label"), tmp_path / "sorted" / "validation.parquet")
    ended = command(tmp_path, "test", "--ablation", "resample", "--mask-spec", "layer:2", "--data.path", "sorted", *CPU)
    assert ended.code == 0, ended.err
    share = int(ended.out.split("own class in ")[1].split("%")[0])
    assert share > 50
    assert "as in data sorted by class: drops are understated" in ended.out


def spoilt(folder: Path, rows: Sequence[int]) -> Path:
    """One file of 12 images, some of which are no images."""
    digits(folder / "all", 12, 1)
    cells = table_of(folder).to_pylist()
    for row in rows:
        cells[row]["image"] = {"bytes": b"no image", "path": None}
    (folder / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(cells, table_of(folder).schema), folder / "set" / "validation.parquet")
    return folder


def test_images_that_cannot_be_read_give_nothing_and_take_nothing(tmp_path: Path) -> None:
    words = ("test", "--ablation", "resample", "--mask-spec", "layer:2", "--data.path", "set", *CPU)
    ended = command(spoilt(tmp_path, [1, 4, 5, 6, 7, 10]), *words, "--data.on_bad_image", "skip")
    assert ended.code == 0, ended.err
    assert ended.rows()[1]["images"] == "6"


def test_an_image_without_a_donor_is_an_error_with_the_row(tmp_path: Path) -> None:
    words = ("test", "--ablation", "resample", "--mask-spec", "layer:2", "--data.path", "set", *CPU)
    ended = command(spoilt(tmp_path, [4, 5, 6]), *words, "--data.on_bad_image", "skip")
    assert ended.code == 1
    assert "no donor for row 7" in only_message(ended)
    assert "row 4: " in only_message(ended)


def test_a_unit_of_one_row_is_refused_before_anything_is_scored(tmp_path: Path) -> None:
    write_set(tmp_path, [8, 1])
    for more in ((), ("--dry-run",)):
        words = ("test", "--ablation", "resample", "--mask-spec", "layer:2", "--data.path", "set", *CPU, *more)
        ended = command(tmp_path, *words)
        assert ended.code == 1
        assert "gives one row only: take more images" in only_message(ended)
    assert not ended.directory().exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--data.batch_size", "6"), "choose a --data.batch_size that is a multiple of 4, got 6"),
        (("--model.row_budget", "9"), "choose --model.row_budget 10 or more, got 9"),
    ],
)
def test_options_under_which_no_group_fits_are_refused_with_the_remedy(
    tmp_path: Path, option: tuple[str, ...], message: str
) -> None:
    words = ("test", "--ablation", "resample", "--mask-spec", "layer:2", "--data.max_images", "20", *CPU, *option)
    ended = command(tmp_path, *words, "--dry-run")
    assert ended.code == 2
    assert message in only_message(ended)


def test_a_dry_run_plans_whole_groups(tmp_path: Path) -> None:
    words = ("test", "--ablation", "resample:3", "--mask-spec", "each:layer", "--data.max_images", "40", *CPU)
    ended = command(tmp_path, *words, "--dry-run")
    assert ended.code == 0, ended.err
    assert "18 beside the baseline" in ended.out
    assert "plan: 4 images a forward pass, growing to 7 rows each; 3 such passes hold all masks" in ended.out
    assert "resample: heads of another image among 4 neighbouring rows of a unit" in ended.out


def test_a_trainer_that_cuts_no_groups_is_refused(tmp_path: Path) -> None:
    probe = HeadProbe()
    probe.choose_masks("layer:2", "resample")
    trainer = lightning.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    with pytest.raises(UsageError, match=r"use headprobe\.ProbeTrainer .*, got Trainer and ImageNetDataModule$"):
        trainer.test(probe, ImageNetDataModule(max_images=20, num_workers=0))


def scored(folder: Path, name: str, ablation: str, dtype: torch.dtype, **options: Any) -> Any:
    probe = HeadProbe(name, **options).to(dtype)
    probe.choose_masks(["each:layer", "each:head"], ablation)
    trainer = ProbeTrainer(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.test(probe, datamodule=ImageNetDataModule(max_images=41, num_workers=0), verbose=False)
    return probe.scores


@pytest.mark.parametrize("name", ["digits_vit", "digits_swin"])
def test_windows_waves_and_shared_cores_change_no_donor(tmp_path: Path, name: str) -> None:
    wide = scored(tmp_path, name, "zero,resample:2", torch.float32, row_budget=1000)
    narrow = scored(tmp_path, name, "zero,resample:2", torch.float32, row_budget=12)
    assert wide.top1_count.tolist() == narrow.top1_count.tolist()
    np.testing.assert_allclose(wide.nll, narrow.nll, atol=1e-5)


def test_bf16_weights_resample_as_float32_do_within_their_rounding(tmp_path: Path) -> None:
    full = scored(tmp_path, "digits_vit", "resample", torch.float32)
    half = scored(tmp_path, "digits_vit", "resample", torch.bfloat16)
    np.testing.assert_allclose(half.nll, full.nll, atol=0.05, rtol=0.05)


def test_a_described_masked_model_has_the_donors_of_any_other(tmp_path: Path, alone: Ended) -> None:
    words = ("test", "--ablation", "resample:1:5", "--mask-spec", "layer:2", "--data.path", "set", *CPU)
    ended = command(write_set(tmp_path), *words, "--trainer.callbacks", "HeadSpectrum")
    (found,) = resampled(ended).values()
    right, nll = resampled(alone)[2, 0]
    assert found[0] == right
    assert found[1] == pytest.approx(nll, abs=1e-5)
    changed = (ended.directory() / "heads_change.csv").read_text().splitlines()
    assert len(changed) == 1 + 24


def test_images_alone_of_a_call_have_no_donor() -> None:
    probe = HeadProbe()
    probe.choose_masks("layer:2", "resample")
    probe.plan_passes(8)
    noise = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert probe.masked_logits(noise).shape == (2, 5, 10)
        with pytest.raises(RunError, match="gives one row only"):
            probe.masked_logits(noise[:1])
