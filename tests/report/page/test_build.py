"""The page as one file: what it holds, what it never does, and that its numbers are those of the files."""

import base64
import csv
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from headprobe.report.page.answer import answer
from headprobe.report.page.build import ASSETS, build, write_page
from headprobe.report.page.first import facts_of, short_answer
from headprobe.run.load import load_files
from headprobe.run.results import write_rows
from tests.report.page.made_runs import write_examples, write_whole_run
from tests.run.small_runs import write_run
from tests.test_imports import PACKAGE, SOURCES, at_import, imported, tree_of

HOSTILE = "</script><script>alert(1)</script>\"'&amp; <b>x</b> \u2028 🐱 שלום"
LIMIT = 1_500_000


class Parsed(HTMLParser):
    """An HTML file as a browser reads it: its elements in order, and the text of each kind."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "link"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def text(self, tag: str) -> list[str]:
        return [data for own, data in self.texts if own == tag]

    def data(self) -> dict[str, Any]:
        place = [
            number for number, (tag, own) in enumerate(self.elements) if tag == "script" and own.get("id") == "data"
        ]
        assert len(place) == 1
        found: dict[str, Any] = json.loads(next(text for text in self.text("script") if text.startswith('{"version"')))
        return found

    def heads(self, run: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = next(one for one in self.data()["sections"] if one["key"] == "heads")["data"]["runs"][
            run
        ]
        return found


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_whole_run(tmp_path, monkeypatch)


def parsed(*folders: Path) -> Parsed:
    return Parsed(build([load_files(folder) for folder in folders]))


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def near(found: float | None, text: str) -> bool:
    """Whether a number of the page is that of a file, to the five digits that the page has."""
    if text == "":
        return found is None
    return found is not None and math.isclose(found, float(text), rel_tol=6e-5, abs_tol=1e-12)


# -- one file --


def addresses(page: Parsed) -> Iterator[str]:
    """What a browser would load by itself: every address but that of a link to click."""
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            if tag != "a" and attributes.get(name) is not None:
                yield str(attributes[name])


def test_the_page_loads_nothing(run: Path) -> None:
    page = parsed(run)
    assert [address for address in addresses(page) if not address.startswith("data:")] == []
    assert not re.search(r"url\(|@import", "".join(page.text("style")))


def test_the_page_forbids_to_load_anything(run: Path) -> None:
    policies = [
        own["content"] for tag, own in parsed(run).elements if own.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == [
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
    ]


@pytest.mark.parametrize("script", sorted(file.name for file in ASSETS.iterdir() if file.name.endswith(".js")))
def test_scripts_write_data_as_text_and_fetch_nothing(script: str) -> None:
    code = (ASSETS / script).read_text(encoding="utf-8")
    statements = re.sub(r"/\*.*?\*/|//[^\n]*", "", code, flags=re.DOTALL)
    banned = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|fetch\(|XMLHttpRequest|import\("
    )
    assert re.findall(banned, statements) == []
    assert '"use strict";' in statements


def test_write_page_writes_what_build_gives(run: Path) -> None:
    file = write_page([load_files(run)], run / "report.html")
    assert file.read_text(encoding="utf-8") == build([load_files(run)])


def test_nothing_outside_of_the_page_imports_it_before_it_is_wanted() -> None:
    ours = (PACKAGE / "report/page", PACKAGE / "commands/report.py")  # the command does nothing else
    others = [file for file in SOURCES if not any(file.is_relative_to(own) for own in ours)]
    early = {
        str(file.relative_to(PACKAGE))
        for file in others
        for name in imported(at_import(tree_of(file)))
        if name.startswith(("headprobe.report.page", "jinja2", "markupsafe"))
    }
    assert early == set()


def test_a_page_of_144_heads_has_at_most_one_and_a_half_megabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_whole_run(tmp_path, monkeypatch, heads=(12,) * 12, specs=("each:head", "each:layer"))
    assert len(build([load_files(folder)]).encode()) <= LIMIT


# -- hostile text --


def test_hostile_text_is_shown_as_text(run: Path) -> None:
    harmless = parsed(run)
    record = json.loads((run / "run.json").read_text())
    record["model"]["title"] = record["data"]["path"] = record["command"] = HOSTILE
    record["decisions"] = {HOSTILE: HOSTILE}
    (run / "run.json").write_text(json.dumps(record))
    write_examples(run, (2, 2, 3), name=HOSTILE)

    page = parsed(run)
    for tag in ("script", "b", "style", "img"):
        assert len([1 for own, _ in page.elements if own == tag]) == len(
            [1 for own, _ in harmless.elements if own == tag]
        )
    assert page.text("bdi").count(HOSTILE) >= 2
    assert page.text("code") == [HOSTILE]
    assert page.data()["runs"] == [HOSTILE]
    assert page.heads()["examples"]["images"][0]["label"] == f"{HOSTILE} 0"


def test_bytes_of_a_path_that_are_no_text_do_not_stop_the_page(run: Path) -> None:
    write_examples(run, (2, 2, 3), name="caf\\udce9")
    record = json.loads((run / "run.json").read_text())
    record["command"] = "headprobe test --data.path caf\udce9"
    (run / "run.json").write_text(json.dumps(record))
    assert write_page([load_files(run)], run / "report.html").is_file()


# -- numbers --


def test_the_costs_of_heads_are_those_of_masks_csv(run: Path) -> None:
    masks = json.loads((run / "masks.json").read_text())
    columns = {column["key"]: column for column in parsed(run).heads()["columns"]}
    places = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    checked = 0
    for row in rows(run / "masks.csv"):
        if not re.fullmatch(r"head:\d\.\d", row["mask"]):
            continue
        ((layer, heads),) = masks[row["mask"]]["masked_heads"].items()
        place = places.index((int(layer), heads[0]))
        names = {
            f"nll_rise_{row['ablation']}": ("nll_rise", {"low": "nll_rise_low", "high": "nll_rise_high"}),
            f"drop_pp_{row['ablation']}": (
                "drop_pp",
                {"low": "drop_low_pp", "high": "drop_high_pp", "p": "mcnemar_p", "q": "bh_q"},
            ),
        }
        for key, (value, extra) in names.items():
            assert near(columns[key]["values"][place], row[value])
            for part, column in extra.items():
                assert near(columns[key][part][place], row[column])
        checked += 1
    assert checked == 7 * 2


@pytest.mark.parametrize("file", ["heads.csv", "scores.csv"])
def test_what_heads_are_like_and_their_scores_are_those_of_the_files(run: Path, file: str) -> None:
    columns = {column["key"]: column for column in parsed(run).heads()["columns"]}
    for place, row in enumerate(rows(run / file)):
        for name, text in row.items():
            if name in {"mask", "layer", "head", "images"}:
                continue
            own, part = (name.removesuffix("_se"), "se") if name.endswith("_se") else (name, "values")
            assert near(columns[own][part][place], text), name


def test_a_head_without_a_number_has_none_on_the_page(run: Path) -> None:
    lines = (run / "scores.csv").read_text().splitlines()
    cells = lines[3].split(",")
    lines[3] = ",".join([*cells[:3], "", *cells[4:]])
    (run / "scores.csv").write_text("\n".join(lines) + "\n")
    name = lines[0].split(",")[3]
    column = next(column for column in parsed(run).heads()["columns"] if column["key"] == name)
    assert [number for number, value in enumerate(column["values"]) if value is None] == [2]


def test_several_masks_of_the_same_head_are_no_draws(tmp_path: Path) -> None:
    folder = write_run(tmp_path, ["each:head", "grow:random:0-4"])  # an order's first mask is one head too
    column = next(column for column in parsed(folder).heads()["columns"] if column["key"] == "drop_pp_zero")
    assert "least" not in column
    assert "note" not in column


def test_of_several_draws_the_map_has_the_mean_and_the_card_their_range(tmp_path: Path) -> None:
    folder = write_run(tmp_path, ["head:0.1"], ["resample:3"])
    rises = [float(row["nll_rise"]) for row in rows(folder / "masks.csv")[1:]]
    column = next(one for one in parsed(folder).heads()["columns"] if one["key"] == "nll_rise_resample")
    assert column["values"][1] == pytest.approx(sum(rises) / 3, rel=1e-4)
    assert column["least"][1] == pytest.approx(min(rises), rel=1e-4)
    assert column["most"][1] == pytest.approx(max(rises), rel=1e-4)
    assert "low" not in column  # the interval is of one draw, the number of all


def test_the_nearest_heads_are_the_largest_similarities(run: Path) -> None:
    page = parsed(run).heads()
    found = np.load(run / "similarity.npz")
    names = ["svcca", "cca", "pwcca", "cka", "cka_unbiased", "procrustes"]
    for name, listed in zip(names, page["nearest"], strict=True):
        column = next(column for column in page["columns"] if column["key"] == f"nearest_{name}")
        for head, nearest in enumerate(listed["of"]):
            others = [(value, one) for one, value in enumerate(found[name][head]) if one != head and value == value]
            wanted = [one for _, one in sorted(others, reverse=True)[:4]]
            assert [one[0] for one in nearest] == wanted
            assert [one[1] for one in nearest] == pytest.approx([found[name][head, one] for one in wanted], rel=1e-4)
            assert [one[2] for one in nearest] == pytest.approx(
                [found[f"{name}_floor"][head, one] for one in wanted], rel=1e-4
            )
            assert column["values"][head] == pytest.approx(max(value for value, _ in others), rel=1e-4)


def test_offset_maps_travel_in_255_steps(run: Path) -> None:
    maps = np.load(run / "offset_maps.npz")
    for layer, found in parsed(run).heads()["offsets"].items():
        own = maps[f"layer_{int(layer):03d}"]
        steps = np.frombuffer(base64.b64decode(found["maps"]["u8"]), np.uint8).reshape(found["maps"]["shape"])
        back = steps / 255 * np.array(found["most"])[:, None, None]
        assert np.abs(back - own).max() <= own.max() / 255 / 2 * 1.01  # `most` has five digits


def test_spectra_are_those_of_the_outputs_by_the_diagonal(run: Path) -> None:
    spectra = {layer["layer"]: layer for layer in parsed(run).heads()["spectra"]}
    checked = 0
    for row in rows(run / "spectrum.csv"):
        if row["series"] != "head":
            continue
        layer = spectra[int(row["layer"])]
        bin_of = layer["frequency"].index(float(row["frequency"]))
        assert near(layer["values"][layer["heads"].index(int(row["head"]))][bin_of], row["delta_log_amplitude"])
        checked += 1
    assert checked == 7 * 8


def test_examples_are_the_images_and_maps_of_the_file(run: Path) -> None:
    examples = parsed(run).heads()["examples"]
    found = np.load(run / "examples.npz")
    assert len(examples["images"]) == 4
    for layer, packed in examples["maps"].items():
        own = found[f"layer_{int(layer):03d}"]
        assert base64.b64decode(packed["u8"]) == own.tobytes()
        assert packed["shape"] == list(own.shape)
    assert [image["right"] for image in examples["images"]] == [True, False, False, False]


def test_the_summary_has_the_baseline_with_wilsons_interval(run: Path) -> None:
    row = rows(run / "masks.csv")[0]
    fact = facts_of(load_files(run))[0]
    low, high = proportion_confint(int(row["top1_count"]), int(row["images"]), method="wilson")
    assert fact.value == f"{100 * float(row['top1']):.1f}%"
    assert fact.detail == f"95% interval {100 * low:.1f} to {100 * high:.1f}"


def test_the_summary_names_the_largest_measured_drops(run: Path) -> None:
    first = [row for row in rows(run / "masks.csv")[1:] if row["ablation"] == "zero"]
    facts = {fact.name: fact for fact in facts_of(load_files(run))}
    for name, form in (("layer", r"layer:\d"), ("index", r"index:\d"), ("head", r"head:\d\.\d")):
        drops = {row["mask"]: float(row["drop_pp"]) for row in first if re.fullmatch(form, row["mask"])}
        fact = facts[f"Largest drop, one {name}"]
        assert fact.value == f"{max(drops.values()):.1f} points"
        assert drops[fact.detail.rpartition(": ")[0]] == max(drops.values())


def test_the_summary_is_of_the_ablation_that_the_sentences_are_about(tmp_path: Path) -> None:
    folder = write_run(tmp_path, ["each:layer", "each:head"], ["mean", "zero"])
    largest = {}
    for kind in ("zero", "mean"):
        own = [row for row in rows(folder / "masks.csv")[1:] if row["ablation"] == kind and "layer" in row["mask"]]
        largest[kind] = max(float(row["drop_pp"]) for row in own)
    assert largest["zero"] != largest["mean"]
    fact = {fact.name: fact for fact in facts_of(load_files(folder))}["Largest drop, one layer"]
    assert fact.value == f"{largest['zero']:.1f} points"
    assert fact.detail.endswith(", zero")
    said = {sentence.key: sentence for sentence in answer(load_files(folder))}
    assert said["layers"].numbers["1_drop_pp"] == largest["zero"]


def test_the_summary_writes_the_minus_of_prose_and_no_sign_before_a_zero(run: Path) -> None:
    masks = rows(run / "masks.csv")
    limits = {"drop_pp": "-0.04", "drop_low_pp": "-12.34", "drop_high_pp": "0.04"}
    write_rows(run / "masks.csv", [row | limits if row["mask"].startswith("layer:") else row for row in masks])
    fact = {fact.name: fact for fact in facts_of(load_files(run))}["Largest drop, one layer"]
    assert (fact.value, fact.detail) == ("0.0 points", "layer:0: \N{MINUS SIGN}12.3 to 0.0, zero")


def test_a_run_without_images_has_no_largest_drop(run: Path) -> None:
    masks = rows(run / "masks.csv")
    none = {"images": "0", "top1_count": "0", "top1": "", "drop_pp": "", "drop_low_pp": "", "drop_high_pp": ""}
    write_rows(run / "masks.csv", [row | none for row in masks])
    assert [fact.name for fact in facts_of(load_files(run))][-1] == "Masks scored"
    assert facts_of(load_files(run))[0].value == "none"


def test_the_short_answer_is_the_beginning_of_the_whole(run: Path) -> None:
    sentences = answer(load_files(run))
    whole = {sentence.key: sentence.text for sentence in sentences}
    short = short_answer(sentences)
    assert len(short) >= 3
    for said in short:
        assert whole[said.key].startswith(f"{said.lead} {said.text}".strip())


def test_every_sentence_stands_on_the_page(run: Path) -> None:
    page = parsed(run)
    said = " ".join(" ".join(data for tag, data in page.texts if tag in {"bdi", "strong"}).split())
    for sentence in answer(load_files(run)):
        assert " ".join(sentence.text.split()) in said


# -- what is not there is left out --


def test_a_run_that_says_nothing_of_single_heads_has_no_map(tmp_path: Path) -> None:
    page = parsed(write_run(tmp_path, ["layer:1"]))
    assert "heads" not in [section["key"] for section in page.data()["sections"]]
    assert page.text("h1") == ["What does the multi-head do?"]


@pytest.mark.parametrize(
    "file", ["heads.csv", "scores.csv", "similarity.npz", "spectrum.csv", "offset_maps.npz", "examples.npz"]
)
def test_a_file_that_is_missing_leaves_the_rest(run: Path, file: str) -> None:
    (run / file).unlink()
    columns = [column["key"] for column in parsed(run).heads()["columns"]]
    assert "nll_rise_zero" in columns
    assert ("entropy_nats" in columns) == (file != "heads.csv")
    assert ("gradient_abs" in columns) == (file != "scores.csv")
    assert ("nearest_svcca" in columns) == (file != "similarity.npz")


# -- several runs --


def test_runs_of_one_model_are_told_apart_by_their_directories(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, ["each:head"]) for name in ("version_0", "version_1")]
    page = parsed(*folders)
    assert page.data()["runs"] == ["tiny (version_0)", "tiny (version_1)"]
    assert [page.heads(run)["heads_per_layer"] for run in (0, 1)] == [[2, 2, 3], [2, 2, 3]]


def test_each_section_links_to_a_heading_of_the_docs(run: Path) -> None:
    links = [
        own["href"] or "" for tag, own in parsed(run).elements if tag == "a" and "/docs/" in (own.get("href") or "")
    ]
    assert links
    for link in links:
        file, _, anchor = link.rpartition("/docs/")[2].partition("#")
        text = (PACKAGE.parent / "docs" / file).read_text(encoding="utf-8")
        headings = [
            re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", text, re.M)
        ]
        assert not anchor or anchor in headings, link
