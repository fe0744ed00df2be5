"""The numbers of every section are those of the run's files, read by csv and numpy alone."""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headprobe.callbacks.derived import write_derived
from headprobe.report.page.build import SECTIONS, build
from headprobe.report.page.encode import plain
from headprobe.report.page.section import Section
from headprobe.report.page.sections.curves import curves, ladder
from headprobe.report.page.sections.described import attention, spectra
from headprobe.report.page.sections.importance import importance
from headprobe.report.page.sections.masks import ablations, indices, layers
from headprobe.report.page.sections.similarity import similarity
from headprobe.report.page.sections.worth import worth
from headprobe.run.load import RunFiles, load_files, read_files
from headprobe.run.results import write_arrays, write_rows
from tests.report.page.made_runs import write_whole_run
from tests.run.small_runs import write_run

SPECS = ("each:head", "each:layer", "each:index", "each:pair", "grow:random:0-9", "one-per-layer:0-98")
OTHER = (4, 2, 6)
"""Heads by layer of a second model, as ragged as a Swin."""

FIGURES = (curves, ladder, layers, indices, similarity, attention, spectra, importance, worth, ablations)

Found = dict[tuple[Any, ...], float]


def whole_run(folder: Path, heads: Sequence[int] = (2, 2, 3), **options: Any) -> RunFiles:
    """A run with every file, and the order of one of its scores; its tables follow from its scores too."""
    with pytest.MonkeyPatch.context() as patch:
        (folder / "before").mkdir(parents=True)
        before = write_whole_run(folder / "before", patch, heads, ("each:head",), ("zero",))
        (folder / "run").mkdir()
        specs = (*options.pop("specs", SPECS), f"grow:{before}:entropy_nats")
        write_whole_run(folder / "run", patch, heads, specs, **options)
    list(write_derived(read_files(folder / "run")))
    return load_files(folder / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    return whole_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    return whole_run(tmp_path_factory.mktemp("ragged"), OTHER)


def rows_of(run: RunFiles, name: str) -> list[dict[str, str]]:
    with (run.path / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def number(text: str) -> float:
    return float(text) if text else math.nan


def data_of(section: Callable[[Sequence[RunFiles]], Section | None], *runs: RunFiles) -> list[Any]:
    """What the page holds of each run, as a browser reads it."""
    found = section(runs)
    assert found is not None
    return list(json.loads(json.dumps(plain(found.data)))["runs"])


def decoded(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table of the page, by the rule that figures.js follows."""
    lists = {
        name: column if isinstance(column, list) else [column["of"][place] for place in column["at"]]
        for name, column in columns.items()
    }
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def same(shown: object, text: str, digits: int = 5) -> bool:
    """Whether the page shows what a cell says: texts wholly, numbers to their digits, nothing for an empty cell."""
    if not text:
        return shown in (None, "")
    if isinstance(shown, str):
        return shown == text
    assert isinstance(shown, int | float), (shown, text)
    return bool(math.isclose(shown, float(text), rel_tol=0.6 * 10.0 ** (1 - digits), abs_tol=1e-12))


def assert_rows(shown: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, str]], digits: int = 5) -> None:
    assert len(shown) == len(cells) > 0
    for row, own in zip(shown, cells, strict=True):
        wrong = {name: (value, own[name]) for name, value in row.items() if not same(value, own[name], digits)}
        assert wrong == {}, own


def test_curves_hold_all_points_and_random_orders_only_their_heights(run: RunFiles) -> None:
    (own,) = data_of(curves, run)
    cells = rows_of(run, "curves.csv")
    seeds = [row for row in cells if row["order"].startswith("random_seed")]
    assert_rows(decoded(own["rows"]), [row for row in cells if row not in seeds])
    assert_rows(decoded(own["single"]), seeds)
    assert set(own["rows"]) >= {"drop_low_pp", "drop_high_pp", "nll_rise_low", "nll_rise_high", "interval"}
    assert "grow_entropy_nats_least" in own["rows"]["order"]["of"]
    assert own["baseline"]["top1"] == pytest.approx(number(rows_of(run, "masks.csv")[0]["top1"]), rel=1e-4)
    assert_rows(decoded(own["areas"]), rows_of(run, "orders.csv"))


def test_the_steps_of_the_ladder_are_nested_and_add_up_to_the_masks_file(run: RunFiles) -> None:
    (own,) = data_of(ladder, run)
    assert list(own["orders"]) == ["grow_entropy_nats_least"]  # random orders only where there are no others
    masks = json.loads((run.path / "masks.json").read_text())
    del masks["schema"]
    in_order = sorted((mask for mask in masks.values() if mask["curve"] == "grow_entropy_nats_least"), key=size)
    gone: set[str] = set()
    for step, mask in zip(own["orders"]["grow_entropy_nats_least"], in_order, strict=True):
        assert not gone & set(step)
        gone |= set(step)
        assert gone == {f"{layer}.{head}" for layer, heads in mask["masked_heads"].items() for head in heads}
    shown = [row for row in decoded(own["rows"]) if row["order"] == "grow_entropy_nats_least"]
    assert [row["heads_removed"] for row in shown if row["ablation"] == "zero"] == [size(mask) for mask in in_order]
    cells = [row for row in rows_of(run, "curves.csv") if row["order"] == "grow_entropy_nats_least"]
    assert_rows(shown, cells)


def size(mask: Mapping[str, Any]) -> int:
    return sum(len(heads) for heads in mask["masked_heads"].values())


def test_without_other_orders_the_ladder_climbs_random_ones(tmp_path: Path) -> None:
    (own,) = data_of(ladder, load_files(write_run(tmp_path, ["grow:random:0-2"])))
    assert list(own["orders"]) == [f"random_seed_{seed}" for seed in range(3)]
    assert {row["order"] for row in decoded(own["rows"])} == {*own["orders"], "random"}


def test_layers_are_the_rows_of_masks_that_hit_a_layer(run: RunFiles) -> None:
    (own,) = data_of(layers, run)
    cells = [row for row in rows_of(run, "masks.csv") if row["mask"].startswith("layer:")]
    shown = decoded(own["rows"])
    assert [f"layer:{row.pop('layer')}" for row in shown] == [row["mask"] for row in cells]
    assert_rows(shown, cells)
    assert own["heads_per_layer"] == [2, 2, 3]


def test_indices_are_those_of_the_table_and_their_draws_those_of_the_masks(run: RunFiles) -> None:
    (own,) = data_of(indices, run)
    assert_rows(decoded(own["rows"]), rows_of(run, "index_null.csv"))
    masks = json.loads((run.path / "masks.json").read_text())
    heads = {name: mask["masked_heads"] for name, mask in masks.items() if name != "schema"}
    cells = rows_of(run, "masks.csv")[1:]
    every = [draws for draws in own["draws"] if draws["layers"] == "0-2"]  # the layers of index:0 and index:1
    for draws, quantity in product(every, ("nll_rise", "drop_pp")):
        of_kind = [row for row in cells if row["ablation"] == draws["ablation"]]
        expected = []
        for row in of_kind:
            if row["mask"].startswith("one-per-layer:"):  # the first mask of the same heads counts for all of them
                first = next(other for other in of_kind if heads[other["mask"]] == heads[row["mask"]])
                expected.append(number(first[quantity]))
        assert len(expected) == 99
        np.testing.assert_allclose(draws[quantity], expected, rtol=1e-4, atol=1e-6)
    assert {draws["ablation"] for draws in own["draws"]} == {"zero", "mean"}


def test_similarities_are_the_files_to_three_decimals_in_the_order_that_the_drawing_counts(run: RunFiles) -> None:
    (own,) = data_of(similarity, run)
    with np.load(run.path / "similarity.npz") as arrays:
        layer = arrays["layer"].tolist()
        pairs = [(a, b) for a in range(7) for b in range(a + 1, 7) if layer[a] == layer[b]]
        assert own["within"]
        assert own["pairs"] is None
        assert {measure["name"] for measure in own["measures"]} >= {"svcca", "cka", "cka_unbiased", "pwcca"}
        for measure in own["measures"]:
            model = measure["models"]["baseline"]
            for name, end in (("value", ""), ("floor", "_floor"), ("low", "_low"), ("high", "_high")):
                expected = [arrays[measure["name"] + end][pair] for pair in pairs]
                np.testing.assert_allclose(np.array(model[name]) / 1000, expected, atol=0.00051)
            if measure["name"] == "pwcca":
                expected = [arrays["pwcca"][b, a] for a, b in pairs]
                np.testing.assert_allclose(np.array(model["mirrored"]) / 1000, expected, atol=0.00051)
            assert sorted(model["order"]) == list(range(7))
            assert [layer[row] for row in model["order"]] == layer  # clustered within layers


def test_clustering_puts_the_two_most_similar_heads_side_by_side(run: RunFiles) -> None:
    (own,) = data_of(similarity, run)
    with np.load(run.path / "similarity.npz") as arrays:
        values = (arrays["svcca"] + arrays["svcca"].T)[4:, 4:]  # of the layer with three heads
    np.fill_diagonal(values, -1)
    nearest = set((np.array(np.unravel_index(values.argmax(), values.shape)) + 4).tolist())
    (order,) = (one["models"]["baseline"]["order"] for one in own["measures"] if one["name"] == "svcca")
    places = [order.index(row) for row in nearest]
    assert abs(places[0] - places[1]) == 1


def test_of_many_pairs_two_measures_are_shown_and_the_others_are_named(tmp_path: Path) -> None:
    heads = (40, 40)
    random = np.random.default_rng(0)
    layer, head = np.repeat([0, 1], 40), np.tile(np.arange(40), 2)
    arrays: dict[str, Any] = {"layer": layer, "head": head, "scope": np.array("all"), "images": np.array(9)}
    arrays |= {"sampling": np.array("mean"), "mask": np.array(""), "samples": np.full(80, 9)}
    for name in ("procrustes", "svcca", "cka", "cka_unbiased"):
        arrays[name] = random.uniform(size=(80, 80))
    write_run(tmp_path, ["each:layer"])
    write_arrays(tmp_path / "similarity.npz", arrays)
    (own,) = data_of(similarity, load_files(tmp_path))
    assert [one["name"] for one in own["measures"]] == ["svcca", "cka_unbiased"]
    assert own["left_out"] == ["Procrustes similarity", "linear CKA"]
    first, second = np.triu_indices(sum(heads), 1)
    shown = np.array(own["measures"][0]["models"]["baseline"]["value"]) / 1000
    np.testing.assert_allclose(shown, arrays["svcca"][first, second], atol=0.00051)
    assert not own["within"]


def test_pairs_that_were_listed_are_listed(tmp_path: Path) -> None:
    write_run(tmp_path, ["each:layer"])
    values = np.full((4, 4), np.nan)
    values[1, 2] = values[2, 1] = 0.25
    layer, head = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    arrays: dict[str, Any] = {"layer": layer, "head": head, "scope": np.array("pairs"), "images": np.array(9)}
    arrays |= {"sampling": np.array("tokens"), "mask": np.array(""), "samples": np.full(4, 9), "svcca": values}
    write_arrays(tmp_path / "similarity.npz", arrays)
    (own,) = data_of(similarity, load_files(tmp_path))
    assert own["pairs"] == [[1], [2]]
    assert own["measures"][0]["models"]["baseline"]["value"] == [250]


def test_statistics_of_heads_are_the_columns_of_the_file(run: RunFiles) -> None:
    (own,) = data_of(attention, run)
    cells = rows_of(run, "heads.csv")
    model = own["models"]["baseline"]
    assert list(zip(model["layer"], model["head"], strict=True)) == [(int(r["layer"]), int(r["head"])) for r in cells]
    assert {"attention_distance_px", "entropy_nats", "rank", "svcca_mean"} <= set(model["values"])
    for name, values in model["values"].items():
        np.testing.assert_allclose(values, [number(row[name]) for row in cells], rtol=1e-4)
    for name, values in model["errors"].items():
        np.testing.assert_allclose(values, [number(row[f"{name}_se"]) for row in cells], rtol=1e-4)
    even = [number(row["entropy_nats"]) / number(row["entropy_ratio"]) for row in cells]
    np.testing.assert_allclose(model["uniform"]["entropy_nats"], even, rtol=1e-4)


def test_columns_without_a_value_are_not_offered(tmp_path: Path) -> None:
    write_run(tmp_path, ["each:layer"])
    rows: list[dict[str, Any]] = [
        {"mask": "none", "layer": 0, "head": head, "images": 9, "entropy_nats": 1.5, "class_mass": math.nan}
        for head in range(2)
    ]
    write_rows(tmp_path / "heads.csv", rows)
    (own,) = data_of(attention, load_files(tmp_path))
    assert list(own["models"]["baseline"]["values"]) == ["entropy_nats"]


def test_a_masked_model_stands_beside_the_whole_one_with_its_paired_change(tmp_path: Path) -> None:
    write_run(tmp_path, ["layer:1"])
    place: dict[str, Any] = {"layer": 0, "head": 0, "images": 9, "entropy_nats_se": 0.1}
    rows = [{"mask": mask, **place, "entropy_nats": value} for mask, value in (("none", 1.5), ("layer:1", 2.0))]
    write_rows(tmp_path / "heads.csv", rows)
    write_rows(tmp_path / "heads_change.csv", [rows[1] | {"entropy_nats": 0.5, "entropy_nats_se": 0.02}])
    (own,) = data_of(attention, load_files(tmp_path))
    assert own["mask"] == "layer:1"
    values = {name: model["values"]["entropy_nats"] for name, model in own["models"].items()}
    assert values == {"baseline": [1.5], "masked": [2], "change": [0.5]}
    assert own["models"]["change"]["errors"]["entropy_nats"] == [0.02]


def test_every_spectrum_is_the_files(run: RunFiles) -> None:
    (own,) = data_of(spectra, run)
    shown: Found = {}
    for line in own["models"]["baseline"]:
        for row, head in enumerate(line["heads"]):
            for place, frequency in enumerate(line["frequency"]):
                key = (line["series"], line["profile"], line["layer"], head, frequency)
                shown[key] = line["delta"][row][place]
                assert line["error"][row][place] == pytest.approx(0.01)
    expected = {
        (row["series"], row["profile"], int(row["layer"]), int(row["head"]), float(row["frequency"])): number(
            row["delta_log_amplitude"]
        )
        for row in rows_of(run, "spectrum.csv")
    }
    assert shown == pytest.approx(expected, abs=6e-5)


def test_importance_is_the_table_the_scores_and_the_costs_of_single_heads(run: RunFiles) -> None:
    (own,) = data_of(importance, run)
    assert_rows(decoded(own["rows"]), rows_of(run, "importance.csv"))
    heads = list(zip(own["layer"], own["head"], strict=True))
    assert heads == [(layer, head) for layer, count in enumerate((2, 2, 3)) for head in range(count)]
    files = {"calibration": rows_of(run, "scores.csv"), "judged": rows_of(run, "heads.csv")}
    for score in own["scores"]:
        if score["rows"]:
            by_head = {(int(row["layer"]), int(row["head"])): row[score["score"]] for row in files[score["rows"]]}
            np.testing.assert_allclose(score["values"], [number(by_head[head]) for head in heads], rtol=1e-4)
    assert {score["score"] for score in own["scores"]} >= {"gradient_abs", "entropy_nats", "depth"}
    masks = {(row["mask"], row["ablation"]): row for row in rows_of(run, "masks.csv")}
    for kind, costs in own["costs"].items():
        for column, values in costs.items():
            cells = [number(masks[f"head:{layer}.{head}", kind][column]) for layer, head in heads]
            np.testing.assert_allclose(values, cells, rtol=1e-4, atol=1e-6)


def test_worth_is_shapley_values_and_interactions_by_their_parts(run: RunFiles) -> None:
    (own,) = data_of(worth, run)
    assert_rows(decoded(own["values"]), rows_of(run, "shapley.csv"))
    cells = rows_of(run, "interactions.csv")
    shown = decoded(own["together"])
    parts = [(row.pop("a"), row.pop("b")) for row in shown]
    assert parts == [(part(row, "a"), part(row, "b")) for row in cells]
    assert {"0.0", "2.1"} <= set(sum(parts, ()))
    assert_rows(shown, cells, digits=4)


def part(row: Mapping[str, str], end: str) -> str:
    """What the page calls a part of an interaction."""
    layer, head = row[f"layer_{end}"], row[f"head_{end}"]
    return f"{layer}.{head}" if head else layer or row[f"mask_{end}"]


def test_parts_that_are_neither_heads_nor_layers_are_called_by_their_masks(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["head:0.0+head:1.0", "head:2.0,1", "head:0.0+head:1.0+head:2.0,1"]))
    (own,) = data_of(worth, run)
    assert own["values"] is None
    names = {own["together"][end]["of"][0] for end in ("a", "b")}
    assert names == {row["mask"] for row in rows_of(run, "masks.csv")[1:3]}


def test_ablations_hold_the_table_and_the_costs_of_every_mask_of_a_family(run: RunFiles) -> None:
    (own,) = data_of(ablations, run)
    assert_rows(decoded(own["rows"]), rows_of(run, "ablations.csv"))
    masks = {(row["mask"], row["ablation"]): row for row in rows_of(run, "masks.csv")}
    families = {family["family"]: family for family in own["families"]}
    assert {"each:head", "each:layer", "each:pair"} <= set(families)
    for family in families.values():
        for kind, costs in family["kinds"].items():
            for column, values in costs.items():
                cells = [number(masks[mask, kind][column]) for mask in family["masks"]]
                np.testing.assert_allclose(values, cells, rtol=6e-4, atol=1e-9)
    assert families["each:head"]["heads"][:3] == ["0.0", "0.1", "1.0"]
    assert families["each:pair"]["heads"][0] == "0.0 0.1"
    assert families["each:layer"]["layers"] == [0, 1, 2]


def test_draws_of_an_ablation_count_with_their_mean_and_have_no_limits_of_one(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["each:head"], ["zero", "resample:2"]))
    (own,) = data_of(ablations, run)
    costs = own["families"][0]["kinds"]["resample"]
    cells = [row for row in rows_of(run, "masks.csv") if (row["mask"], row["ablation"]) == ("head:0.0", "resample")]
    assert len(cells) == 2
    assert costs["nll_rise"][0] == pytest.approx(np.mean([number(row["nll_rise"]) for row in cells]), rel=6e-4)
    assert costs["nll_rise_low"][0] is None


def test_families_of_very_many_masks_leave_their_intervals_to_the_file(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        write_whole_run(tmp_path, patch, (21,), ("each:pair",), ("zero", "mean"))
    (own,) = data_of(ablations, load_files(tmp_path))
    families = {family["family"]: family for family in own["families"]}
    assert len(families["each:pair"]["masks"]) == 210
    assert set(families["each:pair"]["kinds"]["zero"]) == {"nll_rise", "drop_pp"}


@pytest.mark.parametrize(
    ("section", "files"),
    [
        (curves, ["curves.csv"]),
        (ladder, ["curves.csv"]),
        (indices, ["index_null.csv"]),
        (similarity, ["similarity.npz"]),
        (attention, ["heads.csv"]),
        (spectra, ["spectrum.csv"]),
        (importance, ["importance.csv"]),
        (worth, ["shapley.csv", "interactions.csv"]),
        (ablations, ["ablations.csv"]),
    ],
)
def test_a_section_is_left_out_without_its_table(
    section: Callable[[Sequence[RunFiles]], Section | None], files: list[str], run: RunFiles, tmp_path: Path
) -> None:
    assert section([run]) is not None
    bare = copied(run, tmp_path, files)
    assert section([bare]) is None
    found = section([bare, run])  # beside a run that has it there is nothing of the other one
    assert found is not None
    assert found.data["runs"][0] is None
    assert set(found.sources) & set(files)


def copied(run: RunFiles, folder: Path, without: Sequence[str]) -> RunFiles:
    for file in run.path.iterdir():
        if file.name not in without:
            (folder / file.name).write_bytes(file.read_bytes())
    return read_files(folder)


def test_one_mask_has_no_section_of_figures(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["layer:1"]))
    assert [section([run]) for section in FIGURES] == [None] * len(FIGURES)


def test_two_models_of_different_sizes_stand_side_by_side(run: RunFiles, ragged: RunFiles) -> None:
    for section in FIGURES:
        both, alone = data_of(section, run, ragged), data_of(section, ragged)
        assert both[1] == alone[0], section.__name__
    assert data_of(curves, run, ragged)[1]["heads"] == sum(OTHER)
    assert data_of(ladder, run, ragged)[1]["heads_per_layer"] == list(OTHER)
    assert "head:2.5" in data_of(ablations, run, ragged)[1]["families"][0]["masks"]


def test_every_section_has_a_place_in_the_page_and_its_texts(run: RunFiles) -> None:
    html = build([run])
    for section in FIGURES:
        assert section in SECTIONS
        found = section([run])
        assert found is not None
        assert f'id="{found.key}"' in html
        assert f'headprobe.section("{found.key}"' in html
        assert found.look_at.endswith(".")
        assert found.definition.endswith(".")


def test_links_lead_to_headings_of_the_docs(run: RunFiles) -> None:
    docs = Path(__file__).parents[3] / "docs"
    for section in FIGURES:
        found = section([run])
        assert found is not None
        document, _, anchor = found.link.partition("#")
        assert anchor in set(anchors(docs / document)), found.link


def anchors(file: Path) -> Iterator[str]:
    """The anchors that GitHub gives to the headings of a document."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            words = line.lstrip("#").strip().lower()
            yield "".join(sign for sign in words if sign.isalnum() or sign in " -_").replace(" ", "-")


HOSTILE = "</script><script>alert(1)</script> \u202e\U0001f600 \"'&"


def test_hostile_names_stay_data(tmp_path: Path) -> None:
    write_run(tmp_path, ["each:layer", "each:head"], ["zero", "mean"])
    point: dict[str, Any] = {"order": HOSTILE, "ablation": "zero", "orders": 1, "images": 9, "interval": "images"}
    point |= dict.fromkeys(("top1", "nll", "drop_pp", "drop_low_pp", "drop_high_pp"), 0.5)
    point |= dict.fromkeys(("nll_rise", "nll_rise_low", "nll_rise_high"), 0.5)
    write_rows(tmp_path / "curves.csv", [point | {"heads_removed": count} for count in (1, 2)])
    run = load_files(tmp_path)
    html = build([run])
    assert "<script>alert" not in html
    start = html.index('id="data">') + len('id="data">')
    data = json.loads(html[start : html.index("</script>", start)])
    (shown,) = (section["data"] for section in data["sections"] if section["key"] == "curves")
    assert shown["runs"][0]["rows"]["order"]["of"] == [HOSTILE]


def test_no_script_makes_html_of_text() -> None:
    assets = Path(__file__).parents[3] / "headprobe/report/page/assets"
    scripts = {file.name: file.read_text(encoding="utf-8") for file in assets.glob("*.js")}
    assert len(scripts) > len(FIGURES)
    for word in (".innerHTML", ".outerHTML", ".insertAdjacentHTML", "document.write", "eval(", "DOMParser"):
        assert [name for name, text in scripts.items() if word in text] == [], word


def test_a_page_of_144_heads_with_every_table_is_small(tmp_path: Path) -> None:
    specs = ("each:head", "each:layer", "each:index", "one-per-layer:0-98", "random:12-144/12:0-9")
    with pytest.MonkeyPatch.context() as patch:
        write_whole_run(tmp_path, patch, (12,) * 12, specs, ("zero", "mean", "linear"))
    list(write_derived(read_files(tmp_path)))
    assert len(build([load_files(tmp_path)]).encode("utf-8")) < 1_500_000


def test_a_head_that_one_ablation_masked_alone_has_no_cost_under_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_whole_run(tmp_path, monkeypatch, specs=("zero:each:head", "each:layer"))
    for _ in write_derived(read_files(folder)):
        pass
    assert (folder / "importance.csv").is_file()
    (own,) = data_of(importance, load_files(folder))
    assert None not in own["costs"]["zero"]["nll_rise"]
    assert set(own["costs"]["mean"]["nll_rise"]) == {None}
