"""Figures come from a run's files: the same pixels as on the day of the run, without torch or the model."""

import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from PIL import Image
from scipy.stats import spearmanr
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from headprobe.report.agreement_figures import rises_against
from headprobe.report.run_figures import run_figures
from headprobe.run.load import load_files
from headprobe.run.results import write_arrays
from tests.cli_runs import QUICK, Ended, command
from tests.report.drawn import RUN_DPI, drawn, texts
from tests.run.small_runs import HEADS, write_heads, write_run

CALLBACKS = ("HeadAttention", "HeadSimilarity", "HeadSpectrum")
READ = ("*.csv", "*.json", "*.npz")
"""The files that figures are made of."""


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("described")
    callbacks = "".join(f"\n    - class_path: {name}" for name in CALLBACKS)
    (folder / "describe.yaml").write_text(f"trainer:\n  callbacks:{callbacks}\n")
    ended = command(folder, "test", "--config", "describe.yaml", "--mask-spec", "layer:3", *QUICK)
    assert ended.code == 0, ended.err
    return ended


@pytest.fixture(scope="module")
def moved(described: Ended, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's tables and arrays alone, somewhere else."""
    folder = tmp_path_factory.mktemp("moved")
    for pattern in READ:
        for file in described.directory().glob(pattern):
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def figures(moved: Path) -> dict[str, Figure]:
    return dict(run_figures(load_files(moved)))


def png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, dpi=RUN_DPI)
    return content.getvalue()


def names(folder: Path) -> list[str]:
    return [name for name, _ in run_figures(load_files(folder))]


def test_every_picture_of_a_run_is_made_again_from_its_files(described: Ended, figures: dict[str, Figure]) -> None:
    saved = {file.name: file.read_bytes() for file in (described.directory() / "figures").iterdir()}
    again = {f"{name.replace('/', '_')}.png": png(figure) for name, figure in figures.items()}
    assert again.keys() == saved.keys()
    assert [name for name in saved if again[name] != saved[name]] == []


def test_tensorboard_shows_the_pixels_of_the_files(described: Ended) -> None:
    events = EventAccumulator(str(described.directory()), size_guidance={"images": 0}).Reload()
    for name in ("entropy_nats/by_layer", "svcca/clustered_masked", "offset_maps/baseline"):
        file = described.directory() / "figures" / f"{name.replace('/', '_')}.png"
        (shown,) = events.Images(name)
        board = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)).convert("RGB"))
        assert np.array_equal(board, np.asarray(Image.open(file).convert("RGB")))


def test_a_run_is_read_and_drawn_without_torch_lightning_or_timm(moved: Path) -> None:
    code = (
        "import sys, headprobe\n"
        "names = [name for name, _ in headprobe.load_run(sys.argv[1]).figures()]\n"
        "heavy = {'torch', 'torchvision', 'torchmetrics', 'lightning', 'timm', 'datasets'} & sys.modules.keys()\n"
        "sys.stdout.write(f'{len(names)} {sorted(heavy)}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(moved)], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout == f"{len(names(moved))} []"


def test_titles_name_the_model_the_images_the_mask_and_the_samples(figures: dict[str, Figure]) -> None:
    def title(name: str) -> str:
        return figures[name].get_suptitle().replace("\n", " ")

    assert title("svcca/change") == (
        "SVCCA of heads: layer:3 minus baseline digits_vit, 40 images, 2,600 samples (all tokens of 40 images)"
    )
    assert title("offset_maps/masked") == "Where each head looks, by offset: layer:3 digits_vit, 40 images"
    assert title("spectrum/stream_baseline") == "Spectra of the residual stream: baseline digits_vit, 40 images"


def test_statistics_show_uniform_attention_and_the_masked_model(figures: dict[str, Figure]) -> None:
    said = texts(figures["entropy_nats/by_layer"])
    assert {"uniform attention", "baseline", "masked: layer:3"} <= set(said)
    assert "uniform attention" not in texts(figures["confidence/by_layer"])


def title_of(figure: Figure) -> str:
    return figure.get_suptitle().replace("\n", " ")


def test_the_baseline_alone_has_no_figures(tmp_path: Path) -> None:
    assert names(write_run(tmp_path, ["none"])) == []


def test_masks_that_are_points_of_a_curve_and_single_heads_have_figures(tmp_path: Path) -> None:
    specs = ["each:layer", "each:index", "each:head", "random:3"]
    maps = ["nll_rise/heads", "drop_pp/heads", "feature_distance/heads"]
    # in two layers of two heads a layer is the pair of its heads
    assert names(write_run(tmp_path, specs)) == [*maps, "drop_pp/by_layer", "drop_pp/by_index", "interactions/heads"]


def test_figures_of_a_run_without_labels_are_of_features(tmp_path: Path) -> None:
    specs = ["each:layer", "each:index", "each:head", "grow:random:0-9", "one-per-layer:0-4"]
    write_run(tmp_path, specs, ablations=["zero", "mean"], labelled=False)
    found = dict(run_figures(load_files(tmp_path)))
    assert {"feature_distance/heads", "feature_distance/by_layer", "curves/heads_removed"} <= found.keys()
    assert {"index_null/by_index", "shapley/feature_distance_heads", "interactions/heads"} <= found.keys()
    assert not [name for name in found if name.startswith(("nll_rise", "drop_pp"))]
    for name, figure in found.items():
        assert drawn(figure).misplaced == [], name
        assert "NLL" not in title_of(figure), name
        assert not [axes for axes in figure.axes if "nats" in axes.get_ylabel() + axes.get_xlabel()], name


def test_each_ablation_has_figures_of_its_own(tmp_path: Path) -> None:
    write_run(tmp_path, ["each:layer"], ablations=["zero", "resample:2"])
    found = dict(run_figures(load_files(tmp_path)))
    assert sorted(found) == ["ablations/each-layer_zero_resample", "drop_pp/by_layer", "drop_pp/by_layer_resample"]
    assert title_of(found["drop_pp/by_layer_resample"]).endswith("40 images, resample ablation, draw 0")
    assert title_of(found["drop_pp/by_layer"]).endswith("40 images, zero ablation")


def test_all_draws_stand_in_one_figure(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["each:layer"], ablations=["resample:3"]))
    ((name, figure),) = run_figures(run)
    assert name == "drop_pp/by_layer_resample"
    (dots,) = [line for line in figure.axes[0].lines if line.get_label() == "other draws"]
    others = [row["drop_pp"] for row in run.masks[1:] if row["draw"]]
    assert list(np.asarray(dots.get_ydata())) == others


def test_the_map_of_heads_shows_the_mean_of_draws(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["each:head"], ablations=["resample:3"]))
    figure = dict(run_figures(run))["nll_rise/heads_resample"]
    values = np.asarray(figure.axes[0].images[0].get_array().filled(np.nan))  # type: ignore[union-attr]
    rises = [float(row["nll_rise"]) for row in run.masks if row["mask"] == "head:2.1"]
    assert values[2, 1] == pytest.approx(np.mean(rises))
    assert "mean of 3 draws" in title_of(figure)


def test_maps_of_all_ablations_share_their_colours(tmp_path: Path) -> None:
    found = dict(run_figures(load_files(write_run(tmp_path, ["each:head"], ablations=["zero", "mean"]))))
    limits = [found[f"nll_rise/heads{end}"].axes[0].images[0].get_clim() for end in ("", "_mean")]
    assert limits[0] == limits[1]


def test_rings_of_the_nll_are_around_intervals_that_leave_out_0(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["each:head"]))
    (rings,) = dict(run_figures(run))["nll_rise/heads"].axes[0].collections
    wanted = [
        run.heads[str(row["mask"])][0]
        for row in run.masks[1:]
        if float(row["nll_rise_low"]) > 0 or float(row["nll_rise_high"]) < 0
    ]
    assert sorted((int(y), int(x)) for x, y in np.asarray(rings.get_offsets())) == wanted


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("same", "judged on the images that fitted the constants"),
        ("half", "fitted on 1,234 others (half)"),
        ("split:train", "fitted on 1,234 others (split:train)"),
        ("", "fitted on 1,234 of other data"),
    ],
)
def test_titles_say_which_images_fitted_what_they_show(tmp_path: Path, rule: str, said: str) -> None:
    data = {"path": "digits", "rows": {"rule": rule, "calibrates": False} if rule else None}
    fitted: dict[str, Any] = {"calibration": "0" * 64, "calibration_images": 1234, "data": data}
    write_run(tmp_path, ["each:head", "each:layer"], ablations=["zero", "mean"], **fitted)
    names = []
    for name, figure in run_figures(load_files(tmp_path)):
        names.append(name)
        assert (said in title_of(figure)) == ("mean" in name), name
        assert drawn(figure).misplaced == []
    assert len([name for name in names if "mean" in name]) == 7


def test_titles_of_what_was_not_fitted_name_no_calibration(tmp_path: Path) -> None:
    data = {"path": "digits", "rows": {"rule": "same", "calibrates": False}}
    write_run(tmp_path, ["each:head"], data=data, calibration=None)
    run = load_files(tmp_path)
    assert run.calibration == ""
    for name, figure in run_figures(run):
        assert "fitted" not in title_of(figure), name


def test_figures_of_a_described_mask_name_its_ablation_and_what_fitted_it(tmp_path: Path) -> None:
    data = {"path": "digits", "rows": {"rule": "same", "calibrates": False}}
    write_run(tmp_path, ["layer:0"], ["mean"], data=data, calibration="0" * 64, calibration_images=40)
    write_heads(tmp_path, {"confidence": np.arange(7.0)}, mask="layer:0")
    (title,) = [title_of(figure) for name, figure in run_figures(load_files(tmp_path)) if name == "confidence/by_layer"]
    assert "mean ablation, judged on the images that fitted the constants" in " ".join(title.split())


def test_two_ablations_are_drawn_against_each_other_with_their_agreement(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["each:head"], ablations=["zero", "mean", "resample:2"]))
    found = {name: figure for name, figure in run_figures(run) if name.startswith("ablations/")}
    pairs = ["zero_mean", "zero_resample", "mean_resample"]
    assert list(found) == [f"ablations/each-head_{pair}" for pair in pairs]
    figure = found["ablations/each-head_zero_mean"]
    rises = {kind: [row["nll_rise"] for row in run.masks if row["ablation"] == kind] for kind in ("zero", "mean")}
    dots = np.asarray(figure.axes[0].collections[0].get_offsets())
    np.testing.assert_array_equal(dots, np.stack([rises["zero"], rises["mean"]], axis=1))
    agree = spearmanr(rises["zero"], rises["mean"]).statistic
    assert f"rank agreement (Spearman) of NLL rises {agree:+.2f}" in title_of(figure)
    assert drawn(figure).misplaced == []


def test_names_of_large_rises_cover_no_dot_and_no_other_name() -> None:
    generator = np.random.default_rng(3)
    first, second = generator.exponential(0.05, size=(2, 60))
    first[:9], second[:9] = 0.3, 0.3 - 0.002 * np.arange(9)  # a pile of large ones
    figure = rises_against(first, second, ("zero", "mean"), [f"head:{n}.0" for n in range(60)], "title")
    assert drawn(figure).misplaced == []
    (axes, _), renderer = figure.axes, FigureCanvasAgg(figure).get_renderer()
    written = [child for child in axes.get_children() if isinstance(child, Annotation)]
    assert 3 <= len(written) <= 8
    boxes = [name.get_window_extent(renderer) for name in written]
    dots = axes.transData.transform(np.stack([first, second], axis=1))
    for box in boxes:
        assert box.count_overlaps(boxes) == 1  # itself
        assert not any(box.contains(x, y) for x, y in dots)


def test_the_map_of_heads_holds_each_ablations_own_drops(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["each:head"], ablations=["zero", "mean"]))
    found = dict(run_figures(run))
    for name, ablation in (("drop_pp/heads", "zero"), ("drop_pp/heads_mean", "mean")):
        values = np.asarray(found[name].axes[0].images[0].get_array().filled(np.nan))  # type: ignore[union-attr]
        for row in run.masks[1:]:
            if row["ablation"] == ablation:
                assert values[run.heads[str(row["mask"])][0]] == row["drop_pp"]
        assert np.isnan(values).sum() == 3 * 3 - sum(HEADS)


def test_a_column_that_nobody_knows_is_drawn_under_its_name(tmp_path: Path) -> None:
    write_run(tmp_path, ["layer:1"])
    write_heads(
        tmp_path, {"novelty": np.arange(7.0), "novelty_se": np.ones(7), "nothing": np.full(7, np.nan)}, "layer:1"
    )
    write_heads(tmp_path, {"novelty": np.arange(7.0)}, name="heads_change.csv")
    found = dict(run_figures(load_files(tmp_path)))
    assert list(found) == ["novelty/by_layer", "novelty/change"]
    figure = found["novelty/by_layer"]
    assert figure.get_suptitle() == "novelty\ntiny, 40 images"
    assert "novelty" in texts(figure)
    assert "95% intervals" in figure.get_supxlabel()
    assert drawn(figure).misplaced == []


@pytest.mark.parametrize("undefined", [{}, {"offset_maps": {"no places": [0, 1, 2]}}])
def test_offset_maps_that_no_layer_has_are_drawn_only_where_they_were_wanted(
    tmp_path: Path, undefined: dict[str, object]
) -> None:
    write_run(tmp_path, ["layer:1"], undefined=undefined)
    write_heads(tmp_path, {"confidence": np.full(7, np.nan)}, "layer:1")
    assert names(tmp_path) == (["offset_maps/baseline", "offset_maps/masked"] if undefined else [])


def test_a_layer_without_an_offset_map_says_so_in_its_row(tmp_path: Path) -> None:
    write_run(tmp_path, ["none"])
    write_heads(tmp_path, {"confidence": np.full(7, np.nan)})
    write_arrays(tmp_path / "offset_maps.npz", {"layer_001": np.full((2, 3, 3), 1 / 9)})
    ((name, figure),) = run_figures(load_files(tmp_path))
    assert name == "offset_maps/baseline"
    assert sum(text.startswith("no map") for text in texts(figure)) == 2


def test_without_the_usual_measures_the_first_one_that_was_asked_for_is_drawn(tmp_path: Path) -> None:
    layer = np.repeat(np.arange(3), HEADS)
    arrays = {name: np.eye(7) for name in ("procrustes", "cka")}
    facts = {"sampling": np.asarray("mean"), "mask": np.asarray(""), "images": np.asarray(40)}
    heads = {"layer": layer, "head": np.array([0, 1, 0, 1, 0, 1, 2]), "samples": np.full(7, 40)}
    write_run(tmp_path, ["none"])
    write_arrays(tmp_path / "similarity.npz", {**heads, **arrays, **facts})
    assert names(tmp_path) == ["procrustes/by_layer_baseline", "procrustes/clustered_baseline"]
