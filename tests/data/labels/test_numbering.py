import json
from pathlib import Path

import pytest
from datasets import Value
from timm.data.imagenet_info import ImageNetInfo

from headprobe.data.labels.class_map import ClassMap
from headprobe.data.labels.numbering import LabelError, check_texts, number_labels
from headprobe.data.labels.read_class_map import read_class_map
from headprobe.data.sources.source import LabelColumn, Request
from headprobe.data.sources.streamed import label_column
from headprobe.errors import UsageError

PETS = LabelColumn("class", ("cat", "dog", "eel"))
NUMBERS = LabelColumn("number")
TEXTS = LabelColumn("text")


def class_map(path: Path, content: str, name: str = "map.json") -> ClassMap:
    (path / name).write_text(content)
    return read_class_map(str(path / name))


def test_as_many_named_classes_as_the_model_has_are_taken_as_they_are() -> None:
    numbering = number_labels(PETS, 3, None)
    assert [numbering(label) for label in range(3)] == [0, 1, 2]
    assert numbering.names == ["cat", "dog", "eel"]
    assert numbering.valid_classes is None


def test_another_number_of_classes_is_refused_with_both_counts_and_the_remedy() -> None:
    with pytest.raises(UsageError, match=r"3 classes and the model 1000: give --data\.class_map .*, got cat, dog, eel"):
        number_labels(PETS, 1000, None)


def test_wordnet_ids_are_looked_up_for_an_imagenet_model() -> None:
    # n02123045 is "tabby" and n07734744 "mushroom": 281 and 947 in every published list
    numbering = number_labels(LabelColumn("class", ("n07734744", "n02123045")), 1000, None)
    assert [numbering(0), numbering(1)] == [947, 281]
    assert numbering.valid_classes == [281, 947]
    assert numbering.names is not None
    assert (numbering.names[281], numbering.names[0]) == ("n02123045", "")


def test_all_wordnet_ids_of_imagenet_are_the_identity() -> None:
    names = tuple(ImageNetInfo().label_names())
    numbering = number_labels(LabelColumn("class", names), 1000, None)
    assert numbering.to_model == tuple(range(1000))
    assert numbering.valid_classes is None


def test_a_wordnet_id_outside_imagenet_is_refused() -> None:
    with pytest.raises(UsageError, match=r"not among ImageNet-1k's classes.*got n00000001"):
        number_labels(LabelColumn("class", ("n07734744", "n00000001")), 1000, None)


def test_wordnet_ids_do_not_matter_to_a_model_of_other_classes() -> None:
    assert number_labels(LabelColumn("class", ("n07734744", "n02123045")), 2, None).to_model == (0, 1)


def test_bare_numbers_need_the_users_word() -> None:
    with pytest.raises(UsageError, match=r"plain numbers .*or the word identity"):
        number_labels(NUMBERS, 3, None)
    numbering = number_labels(NUMBERS, 3, read_class_map("identity"))
    assert numbering(2) == 2
    assert numbering.names is None


def test_classes_named_by_numbers_in_text_order_are_never_guessed() -> None:
    column = LabelColumn("class", tuple(sorted(map(str, range(1000)))))
    with pytest.raises(UsageError, match=r"order of texts \(0, 1, 10 and 997 more\).*identity"):
        number_labels(column, 1000, None)
    numbering = number_labels(column, 1000, read_class_map("identity"))
    assert [numbering(place) for place in range(4)] == [0, 1, 10, 100]


def test_classes_named_by_numbers_beyond_the_models_are_refused() -> None:
    with pytest.raises(UsageError, match=r"the model's classes are 0\.\.11, got 12"):
        number_labels(LabelColumn("class", ("0", "12")), 12, read_class_map("identity"))


def test_texts_need_a_map_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="labels are texts"):
        number_labels(TEXTS, 3, None)
    numbering = number_labels(TEXTS, 3, class_map(tmp_path, '{"cat": 2, "dog": 0}'))
    assert numbering("cat") == 2
    assert numbering.valid_classes == [0, 2]
    with pytest.raises(LabelError, match="'eel' is not in the class map"):
        numbering("eel")


def test_texts_refuse_a_list(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"need a file with \{class name.* got a list of numbers"):
        number_labels(TEXTS, 3, class_map(tmp_path, "[0, 1]"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("map.json", "[5, 0, 3]"),
        ("map.json", '{"dog": 0, "eel": 3, "cat": 5}'),
        ("map.json", '{"0": 5, "1": 0, "eel": 3}'),
        ("map.yaml", "dog: 0\ncat: 5\neel: 3\n"),
        ("map.yml", "{0: 5, 1: 0, 2: 3}"),
        ("map.yaml", "- 5\n- 0\n- 3\n"),
        ("map.txt", "# cat, dog, eel\n5\n\n0  # dog\n3\n"),
    ],
)
def test_every_form_of_a_class_map_says_the_same(tmp_path: Path, name: str, content: str) -> None:
    numbering = number_labels(PETS, 6, class_map(tmp_path, content, name))
    assert [numbering(label) for label in range(3)] == [5, 0, 3]
    assert numbering.valid_classes == [0, 3, 5]
    assert numbering.names == ["dog", "", "", "eel", "", "cat"]


def test_a_map_overrules_equal_counts(tmp_path: Path) -> None:
    assert number_labels(PETS, 3, class_map(tmp_path, "[2, 1, 0]"))(0) == 2


def test_several_dataset_classes_may_be_one_model_class(tmp_path: Path) -> None:
    numbering = number_labels(PETS, 2, class_map(tmp_path, "[1, 1, 0]"))
    assert numbering.names == ["eel", "cat / dog"]


def test_a_name_that_is_a_number_is_a_name_first(tmp_path: Path) -> None:
    numbering = number_labels(LabelColumn("class", ("1", "0")), 2, class_map(tmp_path, '{"0": 0, "1": 1}'))
    assert numbering.to_model == (1, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[0, 1]", "one line for each of the dataset's 3 classes, got 2"),
        ("[0, 1, 6]", r"must be in 0\.\.5, got 6"),
        ("[0, 1, -1]", r"must be in 0\.\.5, got -1"),
        ("[0, 1, true]", r"whole numbers, without quotes \(.*\), got True"),
        ("[0, 1, 2.0]", r"whole numbers.*, got 2\.0"),
        ('{"cat": 0, "dog": 1}', r"every class of the dataset, got none for \['eel'\]"),
        ('{"cat": 0, "dog": 1, "fox": 3}', r"it names fox, which the dataset does not have.*none for \['eel'\]"),
        ('{"cat": 0, "dog": 1, "eel": 2, "3": 3}', "no such class, got 3"),
        ('{"cat": 0, "0": 1, "dog": 1, "eel": 2}', "got 0 again"),
        ('{"cat": 0, "cat": 1}', "stands twice"),
        ("[]", "a JSON or YAML list"),
        ("7", "a JSON or YAML list"),
        ("[0, 1", "a JSON or YAML list"),
    ],
)
def test_a_wrong_class_map_is_refused_with_the_culprit(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        number_labels(PETS, 6, class_map(tmp_path, content))


def test_a_yaml_word_that_became_a_boolean_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"quote it.*got False"):
        class_map(tmp_path, "no: 1\ncat: 2", "map.yaml")


def test_a_missing_class_map_is_refused() -> None:
    with pytest.raises(UsageError, match=r"No such file.*got nowhere\.json"):
        read_class_map("nowhere.json")


def test_the_digest_knows_the_content_and_not_its_layout(tmp_path: Path) -> None:
    digests = {
        class_map(tmp_path, "[1,2]").digest,
        class_map(tmp_path, "[ 1, 2 ]\n").digest,
        class_map(tmp_path, "1\n2", "m.txt").digest,
    }
    assert len(digests) == 1
    assert class_map(tmp_path, json.dumps([2, 1])).digest not in digests


@pytest.mark.parametrize("label", [True, 1.5, float("inf"), "cat", [1]])
def test_a_label_that_is_no_class_number_is_refused(label: object) -> None:
    with pytest.raises(LabelError):
        number_labels(PETS, 3, None)(label)


@pytest.mark.parametrize("content", ["cat: 0\ndog: 1\neel: 2\ncat: 2\n", "{1: 0, '1': 2}", "{'1': 0, 0x1: 2}"])
def test_a_class_that_stands_twice_in_yaml_is_refused_as_in_json(tmp_path: Path, content: str) -> None:
    with pytest.raises(UsageError, match=r"stands twice, (cat|1)|may stand once, got 1 again"):
        class_map(tmp_path, content, "map.yaml")


def test_identity_refuses_two_classes_with_one_number() -> None:
    with pytest.raises(UsageError, match=r"two of .* have one number: .*, got 01, 1$"):
        number_labels(LabelColumn("class", ("01", "1", "2")), 10, read_class_map("identity"))


def test_two_classes_with_one_number_are_not_counted_by_position() -> None:
    with pytest.raises(UsageError, match=r"two of .* have one number: .*, got 01, 1$"):
        number_labels(LabelColumn("class", ("01", "1")), 2, None)


def test_plain_numbers_that_a_map_does_not_name_are_no_classes(tmp_path: Path) -> None:
    numbering = number_labels(NUMBERS, 10, class_map(tmp_path, '{"3": 0, "8": 1, "9": 7}'))
    assert [numbering(label) for label in (3, 8, 9)] == [0, 1, 7]
    assert numbering.valid_classes == [0, 1, 7]
    for label in (-1, 0, 4, 10):
        with pytest.raises(LabelError, match=f"label {label} is not in the class map"):
            numbering(label)


def test_plain_numbers_may_count_from_one(tmp_path: Path) -> None:
    one_based = json.dumps({str(number + 1): number for number in range(10)})
    numbering = number_labels(NUMBERS, 10, class_map(tmp_path, one_based))
    assert [numbering(label) for label in range(1, 11)] == list(range(10))
    assert numbering.valid_classes is None


def test_a_whole_number_that_pandas_wrote_as_a_float_is_a_class_number() -> None:
    numbering = number_labels(NUMBERS, 3, read_class_map("identity"))
    assert numbering(2.0) == 2
    with pytest.raises(LabelError, match="no label in this row"):
        numbering(float("nan"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_column_of_floats_may_hold_class_numbers(dtype: str) -> None:
    assert label_column(Value(dtype), Request("images")).kind == "number"


@pytest.mark.parametrize(
    ("dtype", "remedy"), [("bool", "True and False the numbers"), ("decimal128(5, 0)", "decimals")]
)
def test_a_column_of_another_kind_is_refused_with_the_way_to_convert_it(dtype: str, remedy: str) -> None:
    with pytest.raises(UsageError, match=rf"{remedy}.*astype\(int\).*got label"):
        label_column(Value(dtype), Request("images"))


def test_texts_match_the_models_names_but_for_case_as_folders_do() -> None:
    numbering = number_labels(TEXTS, 3, None, ["Cat", "sea_eel", "Dog"])
    assert [numbering(label) for label in ("cat", "Sea eel", "Dog", "DOG")] == [0, 1, 2, 2]
    check_texts(["cat"], numbering)


def test_texts_match_as_written_where_case_alone_tells_two_names_apart() -> None:
    numbering = number_labels(TEXTS, 3, None, ["Cat", "cat", "Dog"])
    assert [numbering("Cat"), numbering("cat")] == [0, 1]
    with pytest.raises(LabelError, match="'dog' is not among the model's class names"):
        numbering("dog")


@pytest.mark.parametrize(("content", "name"), [('["Eel", "CAT", "dog"]', "map.json"), ("Eel\nCAT\ndog\n", "map.txt")])
def test_a_list_of_the_models_names_matches_but_for_case(tmp_path: Path, content: str, name: str) -> None:
    given = class_map(tmp_path, content, name)
    assert number_labels(PETS, 3, given).to_model == (1, 2, 0)
    assert [number_labels(TEXTS, 3, given)(label) for label in ("eel", "Cat", "dog")] == [0, 1, 2]


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "vit", "num_classes": 3, "label_names": ["eel", "cat", "dog"]},
        {"architecture": "vit", "pretrained_cfg": {"num_classes": 3, "label_names": ["eel", "cat", "dog"]}},
        {"model_type": "vit", "id2label": {"0": "eel", "1": "cat", "2": "dog"}, "label2id": {"eel": 0}},
    ],
)
def test_the_names_of_a_models_configuration_are_read(tmp_path: Path, config: object) -> None:
    numbering = number_labels(PETS, 3, class_map(tmp_path, json.dumps(config), "config.json"))
    assert numbering.to_model == (1, 2, 0)


@pytest.mark.parametrize("line", ["cat 0", "0 cat", "cat,0", "cat\t0", "0: cat"])
def test_lines_of_a_name_and_a_number_are_refused_with_the_form_to_give(tmp_path: Path, line: str) -> None:
    others = [line.replace("cat", "dog").replace("0", "1"), line.replace("cat", "eel").replace("0", "2")]
    lines = class_map(tmp_path, "\n".join([line, *others]), "map.txt")
    with pytest.raises(UsageError, match=r"write \{class name: model class\} as JSON, got none for"):
        number_labels(PETS, 3, lines)
    named = LabelColumn("class", (line, *others))  # so the classes themselves may be called
    assert number_labels(named, 3, lines).to_model == (0, 1, 2)


def test_numbers_in_quotes_are_refused_with_the_form_to_give(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"whole numbers, without quotes .*class name: model class.*got '0'"):
        class_map(tmp_path, '{"cat": "0", "dog": "1"}')


def test_identity_is_offered_only_where_it_is_taken() -> None:
    folders = ("000_n01440764", "001_n01443537")
    with pytest.raises(UsageError, match="2 classes and the model 1000") as refused:
        number_labels(LabelColumn("class", folders), 1000, None)
    assert "identity" not in str(refused.value)
    with pytest.raises(UsageError, match="or the word identity"):
        number_labels(LabelColumn("class", folders, numbered=True), 1000, None)
    with pytest.raises(UsageError, match="the model names its classes") as refused:
        number_labels(LabelColumn("class", folders), 3, None, ["cat", "dog", "eel"])
    assert "identity" not in str(refused.value)


def test_one_class_is_in_the_singular() -> None:
    with pytest.raises(UsageError, match=r"has 1 class and the model 3: .* a model of 1 class,"):
        number_labels(LabelColumn("class", ("cat",)), 3, None)
