"""What TensorBoard shows: a point per mask at its own step, never all at step 0."""

from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from headprobe.callbacks.derived import write_derived
from headprobe.callbacks.tensorboard import write_tensorboard
from headprobe.run.load import read_files
from tests.cli_runs import QUICK, Ended, command
from tests.run.small_runs import write_run

SPECS = "[each:layer, each:index, each:head, 'random:0-24/12:0-1', layer:1+head:3.1]"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("curves")
    (folder / "run.yaml").write_text(f"mask_spec: {SPECS}\n")
    return command(folder, "test", "--config", "run.yaml", *QUICK)


@pytest.fixture(scope="module")
def events(run: Ended) -> EventAccumulator:
    accumulator = EventAccumulator(str(run.directory()), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def points(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events.Scalars(tag)}


@pytest.mark.parametrize(
    ("curve", "steps"),
    [
        ("by_layer", [0, 1, 2, 3, 4, 5]),
        ("by_index", [0, 1, 2, 3]),
        *((f"head_{index:02}", [0, 1, 2, 3, 4, 5]) for index in range(4)),
        ("random_seed_0", [0, 12, 24]),
        ("random_seed_1", [0, 12, 24]),
        ("heads_masked", [5]),
    ],
)
def test_every_curve_has_its_points_at_its_own_steps(events: EventAccumulator, curve: str, steps: list[int]) -> None:
    for column in ("top1", "drop_pp", "nll", "nll_rise"):
        assert [event.step for event in events.Scalars(f"{column}/{curve}")] == steps


def test_a_point_is_the_number_of_masks_csv(events: EventAccumulator, run: Ended) -> None:
    drops = {row["mask"]: float(row["drop_pp"]) for row in run.rows()[1:]}
    for layer, value in points(events, "drop_pp/by_layer").items():
        assert value == pytest.approx(drops[f"layer:{layer}"], abs=1e-5)


def test_the_baseline_is_a_constant_line_under_every_curve(events: EventAccumulator, run: Ended) -> None:
    baseline = points(events, "top1/baseline")
    assert set(baseline) == {0, 1, 2, 3, 4, 5, 12, 24}
    assert list(baseline.values()) == pytest.approx([float(run.rows()[0]["top1"])] * 8)


def test_single_heads_make_a_heat_map(events: EventAccumulator, run: Ended) -> None:
    maps = {f"{name}/heads" for name in ("drop_pp", "nll_rise", "feature_distance")}
    figures = {*maps, "drop_pp/by_layer", "drop_pp/by_index", "curves/heads_removed"}
    assert set(events.Tags()["images"]) == figures
    names = {path.name for path in (run.directory() / "figures").iterdir()}
    assert names == {f"{name.replace('/', '_')}.png" for name in figures}


def test_runs_can_be_compared_by_their_hyperparameters(events: EventAccumulator) -> None:
    found = {
        tag: data.plugin_data.content
        for tag, data in events.summary_metadata.items()
        if data.plugin_data.plugin_name == "hparams"
    }
    assert set(found) == {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"}
    assert b"digits_vit" in found["_hparams_/session_start_info"]
    assert "hp_metric" not in events.Tags()["scalars"]


def test_the_baseline_alone_has_no_figures(tmp_path: Path) -> None:
    ended = command(tmp_path, "test", *QUICK)
    assert not (ended.directory() / "figures").exists()


def test_curves_of_another_ablation_than_zero_end_in_its_name(tmp_path: Path) -> None:
    write_run(tmp_path, ["each:layer"], ablations=["zero", "mean"])
    logger = TensorBoardLogger(str(tmp_path / "events"), name="", version="")
    write_tensorboard([logger], tmp_path)
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()
    assert {tag for tag in tags["scalars"] if tag.startswith("drop_pp")} == {
        "drop_pp/by_layer",
        "drop_pp/by_layer_mean",
    }
    assert [event.step for event in events.Scalars("drop_pp/by_layer_mean")] == [0, 1, 2]
    assert set(tags["images"]) == {"drop_pp/by_layer", "drop_pp/by_layer_mean", "ablations/each-layer_zero_mean"}
    assert [event.step for event in events.Scalars("top1/baseline")] == [0, 1, 2]


def test_every_order_of_heads_has_a_curve_of_its_own_over_the_heads_removed(tmp_path: Path) -> None:
    for name in ("one", "other", "run"):
        (tmp_path / name).mkdir()
    one, other = (write_run(tmp_path / name, ["each:head"]) for name in ("one", "other"))
    specs = [f"grow:{one}:nll_rise", f"grow:{other}:nll_rise", f"grow:{one}:nll_rise:most:1-7/3"]
    write_run(tmp_path / "run", [*specs, "grow:random:0", "keep:grow:random:0"])
    logger = TensorBoardLogger(str(tmp_path / "events"), name="", version="")
    write_tensorboard([logger], tmp_path / "run")
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0}).Reload()
    found = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    curves = {tag.removeprefix("top1/"): steps for tag, steps in found.items() if tag.startswith("top1/")}
    least = [steps for name, steps in curves.items() if name.startswith("grow_nll_rise_least_")]
    assert least == [list(range(1, 8))] * 2
    assert curves["grow_nll_rise_most"] == [1, 4, 7]
    assert curves["random_seed_0"] == list(range(1, 8))
    assert curves["keep_random_seed_0"] == list(range(7))


@pytest.mark.parametrize(("seeds", "ablations"), [(10, ["zero", "mean"]), (3, ["zero"])])
def test_random_orders_have_their_mean_and_limits_beside_the_single_orders(
    tmp_path: Path, seeds: int, ablations: list[str]
) -> None:
    """The mean, and where one more order would lie with 95% (Student), or the smallest and the largest of few."""
    write_run(tmp_path, [f"random:1-5/2:0-{seeds - 1}"], ablations=ablations)
    logger = TensorBoardLogger(str(tmp_path / "events"), name="", version="")
    write_tensorboard([logger], write_curves(tmp_path))
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0}).Reload()
    run = read_files(tmp_path)
    for ablation in ablations:
        suffix = "" if ablation == "zero" else f"_{ablation}"
        for column in ("drop_pp", "nll_rise"):
            for count in (1, 3, 5):
                values = np.array(
                    [
                        float(row[column])
                        for row in run.masks[1:]
                        if row["ablation"] == ablation and row["heads_masked"] == count
                    ]
                )
                assert len(values) == seeds
                reach = stats.t.ppf(0.975, seeds - 1) * values.std(ddof=1) * (1 + 1 / seeds) ** 0.5
                low, high = (
                    (values.mean() - reach, values.mean() + reach) if seeds >= 10 else (values.min(), values.max())
                )
                base = float(run.masks[0]["top1" if column == "drop_pp" else "nll"])
                least, most = (100 * (base - 1), 100 * base) if column == "drop_pp" else (-base, np.inf)
                found = [points(events, f"{column}/random_orders{suffix}{end}")[count] for end in ("", "_low", "_high")]
                assert found == pytest.approx([values.mean(), max(low, least), min(high, most)], abs=1e-4)
                other = "top1" if column == "drop_pp" else "nll"
                back = [points(events, f"{other}/random_orders{suffix}{end}")[count] for end in ("", "_low", "_high")]
                expected = [base - one / 100 for one in (found[0], found[2], found[1])]
                expected = expected if column == "drop_pp" else [base + one for one in found]
                assert back == pytest.approx(expected, abs=1e-4)


def write_curves(folder: Path) -> Path:
    list(write_derived(read_files(folder)))
    return folder
