import pytest

from headprobe.classifiers.choice import ClassifierChoice
from headprobe.errors import UsageError


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("class-mean", "class-mean:0.07"),
        ("class-mean:0.01", "class-mean:0.01"),
        ("knn", "knn:20:0.07"),
        ("knn:5", "knn:5:0.07"),
        ("knn:5:0.1", "knn:5:0.1"),
        ("none", "none"),
        ("some folder/head.safetensors", "some folder/head.safetensors"),
        ("C:\\heads\\head.safetensors", "C:\\heads\\head.safetensors"),
    ],
)
def test_a_text_is_read_and_said_again(text: str, canonical: str) -> None:
    choice = ClassifierChoice.read(text)
    assert choice.text == canonical
    assert ClassifierChoice.read(choice.text) == choice


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("classmean", "did you mean class-mean?"),
        ("linear-probe", "must be class-mean, knn, FILE.safetensors or none"),
        ("head.pt", "must be class-mean, knn, FILE.safetensors or none"),
        ("class-mean:20:0.07", "takes a temperature"),
        ("class-mean:0", "temperature of 0.003 to 100"),
        ("class-mean:nan", "temperature of 0.003 to 100"),
        ("class-mean:hot", "temperature of 0.003 to 100"),
        ("knn:0", "1 to 1000 neighbours"),
        ("knn:20.5", "1 to 1000 neighbours"),
        ("knn:20:0.001", "temperature of 0.003 to 100"),
        ("knn:20:0.07:1", "takes neighbours and a temperature"),
        ("none:1", "takes no number"),
        ("", "must be class-mean"),
    ],
)
def test_another_text_is_refused_with_the_choices(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as refused:
        ClassifierChoice.read(text)
    assert reason in str(refused.value)
    assert str(refused.value).endswith(f"got {text!r}")
