"""Class folders whose names torchvision and timm number differently, and the ways to say what is meant."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key
from torchvision.datasets.folder import find_classes

from headprobe.data.labels.class_order import in_order, order_in_doubt
from headprobe.data.labels.numbering import Numbering, check_texts, number_labels
from headprobe.data.labels.read_class_map import read_class_map
from headprobe.data.sources.source import LabelColumn
from headprobe.errors import UsageError
from tests.data.parquet_sets import bound, png

DIGITS = tuple(sorted(f"digit_{number}" for number in range(1, 11)))  # digit_1, digit_10, digit_2, ...
NAMES = st.lists(st.text("ab12Z_ ", min_size=1, max_size=5), min_size=1, max_size=8, unique=True)


def folders(*names: str) -> LabelColumn:
    return LabelColumn("class", tuple(sorted(names)))


def numbered(*names: str) -> LabelColumn:
    return LabelColumn("class", names, numbered=True)


def mapped(column: LabelColumn, classes: int, class_map: str) -> dict[str, int]:
    """The model class of each of the dataset's class names."""
    numbering = number_labels(column, classes, read_class_map(class_map))
    return dict(zip(column.names or (), numbering.to_model, strict=True))


def written(folder: Path, content: object, name: str = "map.json") -> str:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


# -- the two orders ----------------------------------------------------------------------------------------------------


@given(NAMES)
def test_the_orders_are_those_of_python_and_of_timm(names: list[str]) -> None:
    assert in_order(names, "sorted") == sorted(names)
    keys = [natural_key(name) for name in names]
    if len(set(map(str, keys))) == len(keys):
        assert in_order(names, "natural") == sorted(names, key=natural_key)
        assert (order_in_doubt(names) == "") == (sorted(names) == sorted(names, key=natural_key))
    else:  # timm sorts a set, whose order changes by process
        assert "leaves open" in order_in_doubt(names)


@pytest.mark.parametrize(
    "names",
    [
        DIGITS,
        ("apple", "Banana", "cherry"),
        ("class1", "class2", "class10"),
        ("10", "9", "1"),
        ("0.5 mm", "0.25 mm", "1 mm"),
        ("AM General", "Acura RL"),
        ("x²", "x10", "x9"),
    ],
)
def test_class_folders_are_refused_exactly_where_timm_and_torchvision_number_them_differently(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png(number))
    _, torchvisions = find_classes(tmp_path)
    _, timms = find_images_and_targets(str(tmp_path))
    assert torchvisions != timms
    with pytest.raises(UsageError, match=r"--data\.class_map .*sorted"):
        bound(tmp_path, len(names))
    for word, expected in (("sorted", torchvisions), ("natural", timms)):
        batches = list(bound(tmp_path, len(names), class_map=word).stream())
        sources = [source.split("/")[0] for batch in batches for source in batch.sources]
        labels = [label for batch in batches for label in batch.labels.tolist()]
        assert dict(zip(sources, labels, strict=True)) == expected


def test_the_refusal_names_the_first_class_that_differs_and_the_remedies() -> None:
    with pytest.raises(
        UsageError,
        match=r"class 1 is 'digit_10' in .*characters .*'digit_2' in timm's .*class_map sorted .*natural .*got none",
    ):
        number_labels(folders(*DIGITS), 10, None)


@pytest.mark.parametrize("names", [("cat", "dog", "eel"), ("Cat", "Dog"), ("c_01", "c_02", "c_10"), ("0", "1", "2")])
def test_nothing_changes_where_both_orders_agree(names: tuple[str, ...]) -> None:
    numbering = number_labels(folders(*names), len(names), None)
    assert numbering.to_model == tuple(range(len(names)))
    assert not numbering.doubtful
    assert "by position" in numbering.matched


def test_order_does_not_matter_to_imagenets_own_names() -> None:
    assert number_labels(folders("n02123045", "n07734744"), 1000, None).matched == "by WordNet id"
    # "English springer" and "tench" stand in two orders, and are found by name
    assert number_labels(folders("English springer", "chain saw", "tench"), 1000, None).to_model == (217, 491, 0)


def test_the_datas_own_numbers_are_taken_and_said_where_they_are_only_the_sorted_names() -> None:
    sorted_names = number_labels(numbered(*DIGITS), 10, None)
    assert sorted_names.to_model == tuple(range(10))
    assert sorted_names.doubtful
    assert "'digit_10'" in sorted_names.matched
    assert "--data.class_map natural" in sorted_names.matched
    own = number_labels(numbered("digit_2", "digit_10", "digit_1"), 3, None)
    assert (own.to_model, own.doubtful) == ((0, 1, 2), False)


def test_a_model_made_from_these_data_has_their_order() -> None:
    assert number_labels(folders(*DIGITS), 10, None, trains=True).to_model == tuple(range(10))


def test_names_that_timm_does_not_tell_apart_have_no_natural_order() -> None:
    for class_map in (None, read_class_map("natural")):
        with pytest.raises(UsageError, match="leaves open which of 'Cat' and 'cat' comes first"):
            number_labels(folders("Cat", "cat"), 2, class_map)
    assert mapped(folders("Cat", "cat"), 2, "sorted") == {"Cat": 0, "cat": 1}


def test_a_words_order_needs_names_and_as_many_as_the_model_has() -> None:
    with pytest.raises(UsageError, match=r"sorted needs as many dataset classes as the model has, 12: .*got 10"):
        mapped(folders(*DIGITS), 12, "sorted")
    for kind in ("text", "number"):
        with pytest.raises(UsageError, match="natural"):
            number_labels(LabelColumn(kind), 3, read_class_map("natural"))


# -- identity ----------------------------------------------------------------------------------------------------------


def test_identity_is_refused_where_the_numbers_of_folders_are_only_their_order() -> None:
    with pytest.raises(UsageError, match=r"identity: nothing says in which order .*'digit_10'.*got identity"):
        mapped(folders(*DIGITS), 10, "identity")
    with pytest.raises(UsageError, match=r"folders have numbers only where their names are.*3 of the model's 10"):
        mapped(folders("digit_3", "digit_8", "digit_9"), 10, "identity")
    assert mapped(numbered("digit_3", "digit_8"), 10, "identity") == {"digit_3": 0, "digit_8": 1}
    assert mapped(folders("3", "10", "8"), 11, "identity") == {"3": 3, "8": 8, "10": 10}


def test_identity_on_texts_says_what_it_got() -> None:
    with pytest.raises(UsageError, match=r"labels that are texts need a file .*got the word identity"):
        number_labels(LabelColumn("text"), 3, read_class_map("identity"))


# -- lists of the model's class names ----------------------------------------------------------------------------------

IN_MODELS_ORDER = [f"digit_{number}" for number in (3, 1, 4, 10, 5, 9, 2, 6, 8, 7)]


def test_a_text_file_of_names_is_read_as_timm_reads_its_class_map(tmp_path: Path) -> None:
    path = written(tmp_path, "\n".join(IN_MODELS_ORDER) + "\n", "map.txt")
    assert mapped(folders(*DIGITS), 10, path) == load_class_map(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("map.json", json.dumps(IN_MODELS_ORDER)),
        ("map.yaml", "".join(f"- {name}\n" for name in IN_MODELS_ORDER)),
        ("map.json", json.dumps(dict(enumerate(IN_MODELS_ORDER)))),  # id2label
        ("map.json", json.dumps({name: number for number, name in enumerate(IN_MODELS_ORDER)})),  # class_to_idx
        ("map.txt", "# the model's classes\n" + "\r\n".join(IN_MODELS_ORDER) + "\n\n"),
        ("map.txt", "\ufeff" + "\n".join(IN_MODELS_ORDER)),
    ],
)
def test_every_form_of_the_models_names_says_the_same(tmp_path: Path, name: str, content: str) -> None:
    expected = {name: number for number, name in enumerate(IN_MODELS_ORDER)}
    path = written(tmp_path, content, name)
    assert mapped(folders(*DIGITS), 10, path) == expected
    assert mapped(folders("digit_10", "digit_2"), 10, path) == {"digit_10": 3, "digit_2": 6}  # a part of the data
    texts = number_labels(LabelColumn("text"), 10, read_class_map(path))
    assert {label: texts(label) for label in DIGITS} == expected


def test_names_that_are_not_found_are_listed_with_those_that_are_left_over(tmp_path: Path) -> None:
    path = written(tmp_path, ["cat", "dog", "eel"])
    with pytest.raises(UsageError, match=r"it names dog, which the dataset does not have\), got none for \['dgo'\]"):
        mapped(folders("cat", "dgo", "eel"), 3, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["cat", "dog", "eel", "fox"], r"each of the model's 3 classes .*got 4 names"),
        (["cat", "dog"], r"each of the model's 3 classes .*got 2 names"),
        (["cat", "dog", "cat"], "two of the model's classes have one name, got cat"),
        ({"0": "cat", "1": "cat", "2": "dog"}, "two of the model's classes have one name, got cat"),
        ({"0": "cat", "1": "dog", "3": "eel"}, r"model classes must be in 0\.\.2, got 3"),
        (["cat", 1, 2], "whole numbers.*got 'cat'"),
    ],
)
def test_a_wrong_list_of_names_is_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mapped(folders("cat", "dog", "eel"), 3, written(tmp_path, content))


def test_an_empty_line_among_names_is_refused_because_timm_counts_it(tmp_path: Path) -> None:
    path = written(tmp_path, "cat\n\ndog\n", "map.txt")
    assert load_class_map(path)["dog"] == 2
    with pytest.raises(UsageError, match="empty line"):
        mapped(folders("cat", "dog"), 2, path)


def test_names_say_nothing_about_plain_numbers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"class names say nothing about labels that are plain.*identity"):
        number_labels(LabelColumn("number"), 2, read_class_map(written(tmp_path, ["cat", "dog"])))


def test_accents_are_the_same_composed_or_not(tmp_path: Path) -> None:
    apart = unicodedata.normalize("NFD", "café")  # as a Mac names the folder
    assert mapped(folders(apart, "bar"), 2, written(tmp_path, ["café", "bar"])) == {apart: 0, "bar": 1}


# -- numbers that may be names, and lists that count folders -----------------------------------------------------------


def test_a_text_file_of_numbers_is_refused_where_it_may_be_names_or_numbers(tmp_path: Path) -> None:
    digits = folders(*map(str, range(5)))
    turned = written(tmp_path, "1\n2\n3\n4\n0\n", "map.txt")
    with pytest.raises(UsageError, match="may be the model's class names in its order or the model class of each"):
        mapped(digits, 5, turned)
    assert mapped(digits, 5, written(tmp_path, [1, 2, 3, 4, 0]))["0"] == 1
    assert mapped(digits, 5, written(tmp_path, ["1", "2", "3", "4", "0"]))["0"] == 4
    same = written(tmp_path, "4\n3\n2\n1\n0\n", "map.txt")  # read either way it is the same
    assert mapped(digits, 5, same) == {"0": 4, "1": 3, "2": 2, "3": 1, "4": 0}


def test_a_text_file_of_numbers_is_names_where_it_can_be_nothing_else(tmp_path: Path) -> None:
    path = written(tmp_path, "".join(f"{number}\n" for number in range(1, 11)), "map.txt")
    names = folders(*map(str, range(1, 11)))
    assert mapped(names, 10, path) == load_class_map(path)
    assert mapped(folders("3", "8"), 10, path) == {"3": 2, "8": 7}
    assert number_labels(LabelColumn("text"), 10, read_class_map(path))("10") == 9


def test_a_list_that_counts_folders_is_refused_where_these_have_two_orders(tmp_path: Path) -> None:
    column = folders("c1", "c2", "c10")
    with pytest.raises(UsageError, match=r"map\.json: nothing says in which order .*got a list of numbers"):
        mapped(column, 3, written(tmp_path, [0, 1, 2]))
    with pytest.raises(UsageError, match=r"map\.json: nothing says in which order .*got an object by number"):
        mapped(column, 3, written(tmp_path, {"0": 0, "1": 1, "2": 2}))
    assert mapped(column, 3, written(tmp_path, [0, 1, 1])) == {"c1": 0, "c10": 1, "c2": 1}  # the same in both
    assert mapped(column, 3, written(tmp_path, {"c1": 0, "c2": 1, "c10": 2})) == {"c1": 0, "c10": 2, "c2": 1}
    assert mapped(numbered("c1", "c10", "c2"), 3, written(tmp_path, [0, 1, 2]))["c10"] == 1


def test_an_object_may_name_more_classes_than_the_data_have(tmp_path: Path) -> None:
    path = written(tmp_path, {str(number): number for number in range(10)})
    assert mapped(folders("3", "8", "9"), 10, path) == {"3": 3, "8": 8, "9": 9}


# -- a model that names its classes ------------------------------------------------------------------------------------


def by_model(column: LabelColumn, *names: str) -> Numbering:
    return number_labels(column, len(names), None, names)


def test_a_models_own_class_names_decide_before_any_order() -> None:
    numbering = by_model(folders(*DIGITS), *IN_MODELS_ORDER)
    assert numbering.matched == "by name, the model names its classes"
    assert [IN_MODELS_ORDER[number] for number in numbering.to_model] == list(DIGITS)
    part = by_model(folders("digit_10", "digit_2"), *IN_MODELS_ORDER)
    assert (part.to_model, part.valid_classes) == ((3, 6), [3, 6])
    assert by_model(numbered("golden_retriever", "Cat"), "cat", "Golden Retriever").to_model == (1, 0)


def test_a_models_names_that_do_not_have_all_of_the_datasets_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"names its classes \(cat, dog, eel\).*not among them.*sorted or natural.*got Katze"
    ):
        by_model(folders("Katze", "dog", "eel"), "cat", "dog", "eel")
    # two folders are never one class by leaving out what tells them apart
    with pytest.raises(UsageError, match=r"got A"):
        by_model(folders("A", "a"), "a", "b")


@pytest.mark.parametrize("form", ["LABEL_{}", "{}", "class {}"])
def test_names_that_only_count_are_no_names(form: str) -> None:
    counted = [form.format(number) for number in range(3)]
    assert by_model(folders("cat", "dog", "eel"), *counted).to_model == (0, 1, 2)
    with pytest.raises(UsageError, match="labels are texts"):
        by_model(LabelColumn("text"), *counted)
    digits = tuple(map(str, range(11)))
    assert by_model(folders(*digits), *digits).to_model == (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9)


def test_texts_are_looked_up_among_a_models_names_and_strangers_are_refused_at_once() -> None:
    numbering = by_model(LabelColumn("text"), "cat", "dog")
    assert (numbering("dog"), numbering.valid_classes) == (1, None)
    check_texts(["eel", "dog"], numbering)
    with pytest.raises(UsageError, match=r"none of the first 2 labels .*known: cat, dog.*got eel, fox"):
        check_texts(["eel", "fox"], numbering)
