"""Datasets that name ImageNet's classes, by WordNet id or in words; the numbers are those of published lists."""

import random
from pathlib import Path

import pytest
from timm.data import ImageNetInfo

from headprobe.data.labels.numbering import Numbering, number_labels
from headprobe.data.labels.read_class_map import read_class_map
from headprobe.data.sources.source import LabelColumn
from headprobe.errors import UsageError
from tests.data.parquet_sets import bound, png

IMAGENETTE = {
    "n01440764": ("tench", 0),
    "n02102040": ("English springer", 217),
    "n02979186": ("cassette player", 482),
    "n03000684": ("chain saw", 491),
    "n03028079": ("church", 497),
    "n03394916": ("French horn", 566),
    "n03417042": ("garbage truck", 569),
    "n03425413": ("gas pump", 571),
    "n03445777": ("golf ball", 574),
    "n03888257": ("parachute", 701),
}
CLASSES = [number for _, number in IMAGENETTE.values()]
CRANE, MACHINE = "n02012849", "n03126707"  # both described as "crane"


def matched(*names: str, classes: int = 1000) -> Numbering:
    return number_labels(LabelColumn("class", names), classes, None)


def in_words() -> list[str]:
    """Every class of ImageNet in words; the two cranes by their ids, as class names must differ."""
    info = ImageNetInfo()
    return [
        id_ if id_ in (CRANE, MACHINE) else words
        for id_, words in zip(info.label_names(), info.label_descriptions(), strict=True)
    ]


@pytest.mark.parametrize("form", ["{id}", "{words}", "{id}-{words}", "{id}_{words}"])
def test_imagenette_keeps_the_right_classes_in_every_form_of_its_names(form: str) -> None:
    names = [form.format(id=id_, words=words) for id_, (words, _) in IMAGENETTE.items()]
    assert list(matched(*names).to_model) == CLASSES
    assert list(matched(*reversed(names)).to_model) == CLASSES[::-1]


def test_a_folder_with_names_in_words_gets_imagenets_numbers(tmp_path: Path) -> None:
    for number, name in enumerate(["parachute", "golf_ball", "English Springer"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png(number))
    assert sorted(label for batch in bound(tmp_path, 1000).stream() for label in batch.labels.tolist()) == [
        217,
        574,
        701,
    ]


def test_a_thousand_ids_in_another_order_are_mapped() -> None:
    ids = ImageNetInfo().label_names()
    order = random.Random(0).sample(range(1000), 1000)
    assert list(matched(*(ids[number] for number in order)).to_model) == order


def test_a_thousand_names_in_words_in_another_order_are_mapped() -> None:
    words = in_words()
    order = sorted(range(1000), key=words.__getitem__)
    assert list(matched(*(words[number] for number in order)).to_model) == order


def test_a_few_names_in_other_words_do_not_matter_where_all_the_others_are_in_place() -> None:
    names = in_words()
    names[134], names[517], names[7] = "crane", "crane2", "rooster"  # the hub's own list does so
    assert matched(*names).to_model == tuple(range(1000))


def test_two_names_in_each_others_place_are_never_taken_by_their_place() -> None:
    names = in_words()
    names[0], names[1] = names[1], names[0]
    assert matched(*names).to_model[:3] == (1, 0, 2)
    names[517] = "crane2"
    with pytest.raises(UsageError, match=r"class 517 of the dataset, 'crane2' names none .* the model is 'crane'"):
        matched(*names)


def test_a_thousand_names_that_are_not_imagenets_are_refused_and_the_user_may_say_identity() -> None:
    names = tuple(f"product {number}" for number in range(1000))
    with pytest.raises(
        UsageError, match=r"sorted or natural.*class 0 of the dataset, 'product 0' names none.*'tench, Tinca tinca'"
    ):
        matched(*names)
    column = LabelColumn("class", names, numbered=True)
    assert number_labels(column, 1000, read_class_map("identity")).to_model == tuple(range(1000))


def test_names_of_some_classes_in_place_are_not_enough() -> None:
    names = in_words()
    names[300:] = [f"product {number}" for number in range(700)]
    with pytest.raises(UsageError, match="class 300 of the dataset, 'product 0'"):
        matched(*names)


def test_numbers_from_one_on_are_refused_for_imagenet() -> None:
    with pytest.raises(UsageError, match="class 0 of the dataset, '1' names none"):
        matched(*map(str, range(1, 1001)))
    assert matched(*map(str, range(1000))).to_model == tuple(range(1000))


def test_a_word_of_two_classes_is_refused_unless_the_other_class_is_there_too() -> None:
    with pytest.raises(UsageError, match=r"'Cardigan' could be class 264 \(Cardigan, .*\) or class 474 \(cardigan\)"):
        matched("tench", "Cardigan")
    assert matched("cardigan", "Cardigan, Cardigan Welsh corgi").to_model == (474, 264)


def test_two_names_of_one_class_are_refused() -> None:
    with pytest.raises(UsageError, match=r"'tench' and 'Tinca tinca' both mean class 0"):
        matched("tench", "Tinca tinca")
    with pytest.raises(UsageError, match=r"one WordNet id.*got n01440764-a and n01440764_b"):
        matched("n01440764-a", "n01440764_b")


def test_a_name_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"class 1 of the dataset, 'dinosaur' names none of the model's"):
        matched("tench", "dinosaur")


# timm's lists: "benthos" is not in ImageNet-1k, "organism" only in the full ones; Microsoft's list begins with
# the 1000 of ImageNet-1k, sorted by id like them.
@pytest.mark.parametrize(
    ("classes", "expected"), [(11821, (0, None)), (11221, (0, None)), (21841, (1, 0)), (21843, (1, 0))]
)
def test_ids_of_the_larger_lists_are_looked_up_in_the_models_own(
    classes: int, expected: tuple[int, int | None]
) -> None:
    assert matched("n00005787", classes=classes).to_model == expected[:1]
    if expected[1] is None:
        with pytest.raises(UsageError, match=r"not among ImageNet-12k|not among ImageNet-21k-miil"):
            matched("n00005787", "n00004475", classes=classes)
    else:
        assert matched("n00005787", "n00004475", classes=classes).to_model == expected


def test_imagenet_1k_keeps_its_numbers_in_microsofts_list() -> None:
    assert matched(*ImageNetInfo().label_names(), classes=21842).to_model == tuple(range(1000))


def test_an_id_of_the_larger_lists_is_refused_for_a_model_of_1000_classes() -> None:
    with pytest.raises(UsageError, match=r"not among ImageNet-1k's classes.*got n00005787"):
        matched("n01440764", "n00005787")
