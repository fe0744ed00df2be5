"""Compares the numbers of a page, section by section, with the files of its runs, read by csv, json and numpy alone."""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from statsmodels.stats.proportion import proportion_confint

from headprobe.report.page.build import build
from headprobe.run.comparison.names import names_of_runs
from headprobe.run.load import load_files

Cells = list[dict[str, str]]
Data = Mapping[str, Any]


def lines(folder: Path, name: str) -> Cells:
    if not (folder / name).is_file():
        return []
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def number(cell: str) -> float:
    return float(cell) if cell else math.nan


def masks_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "masks.json").read_text(encoding="utf-8"))
    found.pop("schema", None)
    return found


def heads_of(mask: Data) -> list[str]:
    return [f"{layer}.{head}" for layer, heads in mask["masked_heads"].items() for head in heads]


def decoded(columns: Data) -> list[dict[str, Any]]:
    """The rows of a table of the page, by the rule that figures.js follows."""
    lists = [own if isinstance(own, list) else [own["of"][place] for place in own["at"]] for own in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def assert_same(shown: Any, cell: str | float, digits: int = 5, about: object = "") -> None:
    """A text wholly, a number to its digits, nothing for an empty cell or what is not finite."""
    if isinstance(shown, str) and isinstance(cell, str):
        assert shown == cell, about
        return
    value = number(cell) if isinstance(cell, str) else cell
    if not math.isfinite(value):
        assert shown in (None, ""), (shown, cell, about)
        return
    assert shown is not None, (cell, about)
    assert math.isclose(shown, value, rel_tol=0.6 * 10.0 ** (1 - digits), abs_tol=1e-9), (shown, cell, about)


def assert_rows(shown: Sequence[Data], cells: Cells, digits: int = 5) -> None:
    assert len(shown) == len(cells)
    for row, own in zip(shown, cells, strict=True):
        for name, value in row.items():
            assert_same(value, own[name], digits, (name, own))


# -- sections --


def curves(own: Data, folder: Path) -> None:
    cells = lines(folder, "curves.csv")
    means = {row["order"] for row in cells if int(row["orders"]) > 1}
    single = [row for row in cells if re.sub(r"_seed_\d+$", "", row["order"]) in means - {row["order"]}]
    assert_rows(decoded(own["rows"]), [row for row in cells if row not in single])
    assert_rows(decoded(own["single"]), single)
    assert_rows(decoded(own["areas"]), lines(folder, "orders.csv"))
    baseline(own["baseline"], folder)


def baseline(own: Data, folder: Path) -> None:
    for name, value in own.items():
        assert_same(value, number(lines(folder, "masks.csv")[0][name]), about=name)


def ladder(own: Data, folder: Path) -> None:
    masks = masks_of(folder)
    for order, steps in own["orders"].items():
        sets = {
            len(heads): set(heads)
            for name in masks
            if masks[name]["curve"] == order and (heads := heads_of(masks[name]))
        }
        gone: set[str] = set()
        for step, size in zip(steps, sorted(sets), strict=True):
            assert not gone & set(step)
            gone |= set(step)
            assert gone == sets[size], (order, size)
    cells = lines(folder, "curves.csv")
    assert_rows(decoded(own["rows"]), [row for row in cells if row["order"] in own["orders"] or int(row["orders"]) > 1])
    baseline(own["baseline"], folder)


def layers(own: Data, folder: Path) -> None:
    masks = masks_of(folder)
    cells = [row for row in lines(folder, "masks.csv")[1:] if masks[row["mask"]]["curve"] == "by_layer"]
    shown = decoded(own["rows"])
    for row, cell in zip(shown, cells, strict=True):
        assert {row.pop("layer")} == {int(layer) for layer in masks[cell["mask"]]["masked_heads"]}
    assert_rows(shown, cells)


def indices(own: Data, folder: Path) -> None:
    cells = lines(folder, "index_null.csv")
    assert_rows(decoded(own["rows"]), cells)
    draws = {(one["ablation"], one["layers"]): one for one in own["draws"]}
    for row in cells:
        values = draws[row["ablation"], row["layers"]][row["quantity"]]
        assert len(values) == int(row["draws"])
        if values:
            assert_same(float(np.mean(values)), row["draws_mean"], 4)


def similarity(own: Data, folder: Path) -> None:
    with np.load(folder / "similarity.npz") as arrays:
        layer = arrays["layer"]
        pairs = [(a, b) for a in range(len(layer)) for b in range(a + 1, len(layer))]
        pairs = [(a, b) for a, b in pairs if str(arrays["scope"]) == "all" or layer[a] == layer[b]]
        assert str(arrays["scope"]) != "pairs"
        for measure in own["measures"]:
            for model, prefix in (("baseline", ""), ("masked", "masked_"), ("change", "change_")):
                for name, end in (("value", ""), ("floor", "_floor"), ("low", "_low"), ("high", "_high")):
                    values = measure["models"].get(model, {}).get(name)
                    for shown, pair in zip(values or [], pairs if values else [], strict=True):
                        expected = float(arrays[prefix + measure["name"] + end][pair])
                        assert shown is None if math.isnan(expected) else abs(shown - 1000 * expected) <= 0.51


def attention(own: Data, folder: Path) -> None:
    cells = {"change": lines(folder, "heads_change.csv")}
    for row in lines(folder, "heads.csv"):
        cells.setdefault("baseline" if row["mask"] == "none" else "masked", []).append(row)
    for name, model in own["models"].items():
        places = [f"{row['layer']}.{row['head']}" for row in cells[name]]
        assert places == [f"{layer}.{head}" for layer, head in zip(model["layer"], model["head"], strict=True)]
        for end, columns in (("", model["values"]), ("_se", model["errors"])):
            for column, values in columns.items():
                for shown, row in zip(values, cells[name], strict=True):
                    assert_same(shown, row[column + end], about=(name, column))


def spectra(own: Data, folder: Path) -> None:
    shown = {
        (one["series"], one["profile"], one["layer"], head, round(frequency, 4)): one["delta"][row][place]
        for one in own["models"]["baseline"]
        for row, head in enumerate(one["heads"])
        for place, frequency in enumerate(one["frequency"])
    }
    for row in lines(folder, "spectrum.csv"):
        key = row["series"], row["profile"], int(row["layer"]), int(row["head"]), round(float(row["frequency"]), 4)
        if row["mask"] == "none" and key in shown:
            value = shown.pop(key)
            assert abs((math.nan if value is None else value) - number(row["delta_log_amplitude"])) <= 6e-5
    assert set(shown.values()) <= {None}


def alone(folder: Path) -> dict[str, str]:
    """By head the mask of it alone, the first where several are."""
    found: dict[str, str] = {}
    for name, mask in masks_of(folder).items():
        if len(heads := heads_of(mask)) == 1:
            found.setdefault(heads[0], name)
    return found


def cost(folder: Path, mask: str, kind: str, column: str) -> float:
    """What a mask costs under an ablation, of several draws the mean; limits only of a single one."""
    own = [row for row in lines(folder, "masks.csv") if (row["mask"], row["ablation"]) == (mask, kind)]
    if not own or (("_low" in column or "_high" in column) and len(own) > 1):
        return math.nan
    return float(np.mean([number(row[column]) for row in own]))


def importance(own: Data, folder: Path) -> None:
    assert_rows(decoded(own["rows"]), lines(folder, "importance.csv"))
    names = [f"{layer}.{head}" for layer, head in zip(own["layer"], own["head"], strict=True)]
    masks, files = alone(folder), {"calibration": "scores.csv", "judged": "heads.csv"}
    assert set(names) == set(masks)
    for kind, columns in own["costs"].items():
        for column, values in columns.items():
            for shown, head in zip(values, names, strict=True):
                assert_same(shown, cost(folder, masks[head], kind, column), about=(kind, column, head))
    for score in own["scores"]:
        rows = lines(folder, files.get(score["rows"], ""))
        known = {f"{row['layer']}.{row['head']}": row for row in rows if row.get("mask", "none") == "none"}
        for shown, head in zip(score["values"], names, strict=True):
            assert_same(shown, known[head][score["score"]] if score["rows"] else float(head.split(".")[0]), about=score)


def worth(own: Data, folder: Path) -> None:
    if own["values"]:
        assert_rows(decoded(own["values"]), lines(folder, "shapley.csv"))
    cells = lines(folder, "interactions.csv")
    for row, cell in zip(decoded(own["together"]) if own["together"] else [], cells, strict=True):
        for end in "ab":
            layer, head = cell[f"layer_{end}"], cell[f"head_{end}"]
            place = ".".join(str(int(float(part))) for part in (layer, head) if part)
            assert row.pop(end) == (place or cell[f"mask_{end}"])
        assert_rows([row], [cell], 4)


def ablations(own: Data, folder: Path) -> None:
    assert_rows(decoded(own["rows"]), lines(folder, "ablations.csv"))
    for family in own["families"]:
        for kind, columns in family["kinds"].items():
            for column, values in columns.items():
                for shown, mask in zip(values, family["masks"], strict=True):
                    assert_same(shown, cost(folder, mask, kind, column), 4, (mask, kind, column))


ENDS = {
    "nll_rise": {"low": "nll_rise_low", "high": "nll_rise_high"},
    "drop_pp": {"low": "drop_low_pp", "high": "drop_high_pp", "p": "mcnemar_p", "q": "bh_q"},
}
"""What stands beside a cost, and its column of `masks.csv`."""


def heads(own: Data, folder: Path) -> None:
    names = [f"{layer}.{head}" for layer, count in enumerate(own["heads_per_layer"]) for head in range(count)]
    masks = alone(folder)
    variants: dict[tuple[str, str], dict[str, str]] = {}
    for row in lines(folder, "masks.csv")[1:]:
        variants.setdefault((row["mask"], row["ablation"]), row)  # of several draws the first, which is tested
    tables = [lines(folder, "scores.csv"), [row for row in lines(folder, "heads.csv") if row["mask"] == "none"]]
    known = [{f"{row['layer']}.{row['head']}": row for row in table} for table in tables]
    for column in own["columns"]:
        quantity, _, kind = column["key"].rpartition("_")
        for place, head in enumerate(names):
            about = (column["key"], head)
            shown = {name: values[place] for name, values in column.items() if isinstance(values, list)}
            if quantity in ENDS:
                value = cost(folder, masks[head], kind, quantity) if head in masks else math.nan
                assert_same(shown["values"], value, about=about)
                row = variants.get((masks.get(head, ""), kind), {})
                for name in ENDS[quantity].keys() & shown.keys():
                    assert_same(shown[name], row.get(ENDS[quantity][name], ""), about=(*about, name))
            elif quantity.startswith("shapley_"):
                shapley(shown, head, kind, quantity.removeprefix("shapley_"), folder)
            for table in known:
                if head in table and column["key"] in table[head]:
                    assert_same(shown["values"], table[head][column["key"]], about=about)
                    if "se" in shown:
                        assert_same(shown["se"], table[head][f"{column['key']}_se"], about=(*about, "se"))


def shapley(shown: Data, head: str, kind: str, quantity: str, folder: Path) -> None:
    layer, number_in_layer = map(float, head.split("."))
    (row,) = (
        row
        for row in lines(folder, "shapley.csv")
        if (row["players"], row["ablation"], row["quantity"]) == ("heads", kind, quantity)
        and (float(row["layer"]), float(row["head"])) == (layer, number_in_layer)
    )
    for name, column in (("values", "value"), ("low", "value_low"), ("high", "value_high")):
        assert_same(shown[name], row[column], about=(head, kind, quantity, name))


FOLDED = {"zero": "nothing folded", "mean": "bias", "optimal": "bias", "linear": "weight and bias"}
"""What stands for some heads of a layer that are gone."""


def pruned(own: Data, folder: Path) -> None:
    made = json.loads((folder / "pruned.json").read_text(encoding="utf-8"))
    per_layer, gone = made["mask"]["heads_per_layer"], made["mask"]["masked_heads"]
    assert own["gone"] == [f"{layer}.{head}" for layer, heads in gone.items() for head in heads]
    assert (own["heads"], own["count"]) == (sum(per_layer), sum(len(heads) for heads in gone.values()))
    for layer, text in enumerate(own["folded"]):
        heads = gone.get(str(layer), [])
        some = FOLDED[made["ablation"]] if heads else ""
        assert text.partition(",")[0] == ("the layer is a bias" if len(heads) == per_layer[layer] else some)
    for name in ("parameters", "multiply_adds", "device"):
        assert own[name] == made["cost"][name]
    assert own["most_pp"] == made.get("chosen_by", {}).get("keep_top1_pp")
    assert own["wanted"]["speed"] == made.get("chosen_by", {}).get("speed")
    judged_sets(own, made, folder)
    latencies(own, made)


def judged_sets(own: Data, made: Data, folder: Path) -> None:
    masks = masks_of(folder)
    cells = sorted(lines(folder, "masks.csv")[1:], key=lambda row: len(heads_of(masks[row["mask"]])))
    limits = dict(zip(made["curve"].get("heads", []), made["curve"].get("limit_pp", []), strict=False))
    for row, cell in zip(decoded(own["sets"]), cells, strict=True):
        heads = len(heads_of(masks[cell["mask"]]))
        assert (row.pop("heads"), row.pop("chosen")) == (heads, heads == own["count"])
        assert_same(row.pop("limit_pp"), limits.get(heads, math.nan))
        tested = row.pop("tested")
        assert (tested is None) == (heads not in limits)
        assert_rows([row], [cell])


def latencies(own: Data, made: Data) -> None:
    rows = decoded(own["speeds"])
    tried = made["curve"].get("speed_batch_64", [])
    for row, heads, speed in zip(rows, made["curve"].get("heads", []) if tried else [], tried, strict=False):
        assert (row["heads"], row["batch"], row["chosen"]) == (heads, 64, 0)
        assert_same(row["speed"], speed)
    for row, one in zip(rows[len(tried) :], made["cost"]["latencies"], strict=True):
        ratios = np.array(one["before"]) / np.array(one["after"])
        assert (row["heads"], row["batch"], row["pairs"], row["chosen"]) == (own["count"], one["batch"], len(ratios), 1)
        for name, value in (
            ("speed", np.median(ratios)),
            ("speed_least", ratios.min()),
            ("speed_most", ratios.max()),
            ("ms_before", 1000 * np.median(one["before"])),
            ("ms_after", 1000 * np.median(one["after"])),
            ("passes", one.get("passes", 1)),
        ):
            assert_same(row[name], float(value), about=name)


CHECKS: dict[str, Callable[[Data, Path], None]] = {
    check.__name__: check
    for check in (
        *(heads, curves, ladder, layers, indices, similarity, attention, spectra, importance, worth, ablations, pruned),
    )
}
"""By the section's key."""


# -- two runs --

LIMITS = {
    "nll_rise": ("nll_rise_low", "nll_rise_high"),
    "drop_pp": ("drop_low_pp", "drop_high_pp"),
    "feature_distance": ("feature_distance_low", "feature_distance_high"),
    "feature_cosine": ("feature_cosine_low", "feature_cosine_high"),
}


def compare(own: Data, folders: Sequence[Path]) -> None:
    """What masks cost in each run is in its `masks.csv`; tests of the differences are held by test_comparison.py."""
    by_name = dict(zip(names_of_runs([load_files(folder) for folder in folders]), folders, strict=True))
    for pair in own["pairs"]:
        shown = decoded(pair["rows"])
        assert shown
        for side in "ab":
            cells = {
                (row["mask"], row["ablation"]): row
                for row in lines(by_name[pair[side]], "masks.csv")
                if row["draw"] == "0"
            }
            for row in shown:
                cell = cells[row["mask"], row["ablation"]]
                low, high = LIMITS[row["quantity"]]
                for name, end in {row["quantity"]: "", low: "_low", high: "_high"}.items():
                    assert_same(row[f"value_{side}{end}"], cell[name], 4, (pair[side], name, row))
        for row in shown:
            assert math.isclose(row["b_minus_a"], row["value_b"] - row["value_a"], rel_tol=1e-3, abs_tol=1e-3)


# -- the first screen --


def first_screen(html: str, folders: Sequence[Path]) -> None:
    """Compare the table of facts of each run."""
    body = html[html.index('<table class="facts">') : html.index("</table>")]
    rows = re.findall(r"<tr>(.*?)</tr>", body[body.index("<tbody>") :], re.DOTALL)
    for row, folder in zip(rows, folders, strict=True):
        cells = dict(re.findall(r'data-name="(.*?)">(.*?)</td>', row, re.DOTALL))
        facts = {name: re.sub(r"<.*?>", "", text).replace("\N{MINUS SIGN}", "-") for name, text in cells.items()}
        for name, expected in expected_facts(folder):
            assert facts.pop(name) == expected, folder
        assert set(facts.values()) <= {"\N{EN DASH}"}  # what only another run has


def expected_facts(folder: Path) -> Iterator[tuple[str, str]]:
    whole, *rows = lines(folder, "masks.csv")
    right, images = int(whole["top1_count"]), int(whole["images"])
    per_layer = json.loads((folder / "run.json").read_text(encoding="utf-8"))["model"]["heads_per_layer"]
    low, high = proportion_confint(right, images, method="wilson")
    kinds = list(dict.fromkeys(row["ablation"] for row in rows))
    yield "Baseline top-1", f"{100 * right / images:.1f}% 95% interval {100 * low:.1f} to {100 * high:.1f}"
    yield "Images judged", f"{images:,} "
    yield "Heads", f"{sum(per_layer)} in {len(per_layer)} layer{'s' * (len(per_layer) > 1)}"
    yield "Masks scored", f"{len({row['mask'] for row in rows})} {', '.join(kinds)}"
    kind = "zero" if "zero" in kinds else (kinds or [""])[0]
    main = [row for row in rows if row["ablation"] == kind and row["draw"] == "0"]
    masks, single = masks_of(folder), set(alone(folder).values())
    for name in ("layer", "index", "head"):
        own = [
            row
            for row in main
            if (row["mask"] in single if name == "head" else masks[row["mask"]]["curve"] == f"by_{name}")
        ]
        if len(own) > 1:
            most = max(own, key=lambda row: int(row["right_to_wrong"]) - int(row["wrong_to_right"]))
            drop = 100 * (int(most["right_to_wrong"]) - int(most["wrong_to_right"])) / images
            ends = [f"{number(most[f'drop_{end}_pp']) + 0.0:.1f}" for end in ("low", "high")]
            also = f", {kind}" if len(kinds) > 1 else ""
            yield f"Largest drop, one {name}", f"{drop:.1f} points {most['mask']}: {ends[0]} to {ends[1]}{also}"


def check_page(*folders: Path) -> set[str]:
    """Compare every number of a page with the files of its runs, and return the keys of its sections."""
    html = build([load_files(folder) for folder in folders])
    start = html.index('id="data">') + len('id="data">')
    sections = json.loads(html[start : html.index("</script>", start)])["sections"]
    for section in sections:
        if section["key"] == compare.__name__:
            compare(section["data"], folders)
            continue
        for own, folder in zip(section["data"]["runs"], folders, strict=True):
            if own is not None:
                CHECKS[section["key"]](own, folder)
    first_screen(html, folders)
    return {section["key"] for section in sections}
