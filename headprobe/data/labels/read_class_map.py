"""Reads a class-map file: JSON, YAML or text; numbers or names."""

import json
from pathlib import Path
from typing import Any

import yaml

from headprobe.data.labels.class_map import BY_NAME, WORDS, ClassMap
from headprobe.errors import UsageError

CLASS_MAP_FORMS = (
    "a JSON or YAML list of model classes or of the model's class names in its order, an object {dataset class: model "
    f"class}}, or a text file with one per line, or one of the words {', '.join(WORDS)}"
)


def read_class_map(path: str) -> ClassMap:
    """Read a class-map file by its suffix: `.json`, `.yaml`, `.yml`, anything else is text; or one of `WORDS`.

    Raises:
        UsageError: The file is not there or does not hold a class map.
    """
    if path in WORDS:
        return ClassMap(None, path)
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")  # editors on Windows put a mark before the text
        content = _parse(text, Path(path).suffix.lower())
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--data.class_map must be {CLASS_MAP_FORMS}: {reason}, got {path}") from None
    origin = Path(path).name
    if isinstance(content, _Lines):
        return _of_lines(content, path)
    if not isinstance(content, (list, dict)) or not content:
        raise UsageError(f"--data.class_map must be {CLASS_MAP_FORMS}, got {path}")
    if isinstance(content, dict):
        content = _names_of_config(content)
    if isinstance(content, list):
        if all(isinstance(name, str) for name in content):
            return _names(content, origin)
        return ClassMap([_number(value, origin) for value in content], origin)
    if _is_names_by_number(content):
        names = {str(name): int(number) for number, name in content.items()}
        if len(names) < len(content):
            raise UsageError(f"{origin}: two of the model's classes have one name, got {_repeated(content.values())}")
        return ClassMap(names, origin, lists_model=True)
    return ClassMap(_object(content, origin), origin)


def _names_of_config(content: dict[Any, Any]) -> Any:
    """Return the names of the model's classes where an object is a `config.json` of timm or transformers, else it."""
    inner = content.get("pretrained_cfg")
    for config in (content, inner if isinstance(inner, dict) else {}):
        for key in ("label_names", "id2label"):
            if isinstance(config.get(key), (list, dict)) and config[key]:
                return config[key]
    return content


class _Lines(list[str]):
    """Lines of a text file."""


def _parse(text: str, suffix: str) -> object:
    if suffix == ".json":
        return json.loads(text, object_pairs_hook=_without_repeats)
    if suffix in (".yaml", ".yml"):
        return _parse_yaml(text)
    return _Lines(text.splitlines())


def _parse_yaml(text: str) -> object:
    """Refuse a key that stands twice, as `_without_repeats` does for JSON: YAML too would keep the last value."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if isinstance(root, yaml.MappingNode):
        keys = [str(key.value) for key, _ in root.value]
        if len(set(keys)) < len(keys):
            raise ValueError(f"a class stands twice, {_repeated(keys)}")
    return yaml.safe_load(text)


def _of_lines(lines: list[str], path: str) -> ClassMap:
    """Return the map of a text file: numbers, with comments behind `#`, or else names, as timm's `--class-map`."""
    origin = Path(path).name
    without_comments = (line.split("#", 1)[0].strip() for line in lines)
    numbers = [line for line in without_comments if line]
    if not numbers:
        raise UsageError(f"--data.class_map must be {CLASS_MAP_FORMS}, got {path}")
    if all(line.removeprefix("-").isdecimal() for line in numbers):
        as_names = {name: place for place, name in enumerate(numbers)} if len(set(numbers)) == len(numbers) else None
        return ClassMap([int(line) for line in numbers], origin, as_names=as_names)

    # A name may hold a `#`. timm counts an empty line as a class, so one between names is never left out in silence.
    names = [line.strip() for line in "\n".join(lines).rstrip().split("\n") if not line.startswith("#")]
    if "" in names:
        raise UsageError(f"{origin}: a list of class names must have one on each line, got an empty line")
    return _names(names, origin)


def _names(names: list[str], origin: str) -> ClassMap:
    places = {name.strip(): place for place, name in enumerate(names)}
    if len(places) < len(names):
        raise UsageError(f"{origin}: two of the model's classes have one name, got {_repeated(names)}")
    return ClassMap(places, origin, lists_model=True, length=len(names))


def _repeated(names: Any) -> str:
    seen = [str(name).strip() for name in names]
    return next(name for name in seen if seen.count(name) > 1)


def _is_names_by_number(content: dict[Any, Any]) -> bool:
    """Return whether an object says the name of each model class, as `id2label` and a timm config's `label_names`."""
    numbers = all(str(key).isdecimal() and not isinstance(key, bool) for key in content)
    return numbers and all(isinstance(value, str) for value in content.values())


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that stands twice; JSON would keep the last value and silently drop the others."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"a class stands twice, {_repeated(key for key, _ in pairs)}")
    return content


def _object(content: dict[Any, Any], origin: str) -> dict[str, int]:
    """Return an object of whole numbers with texts as keys."""
    entries: dict[str, int] = {}
    for key, value in content.items():
        number = _number(value, origin)
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise UsageError(f"{origin}: classes must be names or numbers (quote it), got {key!r}")
        if str(key) in entries:  # "1" and 0x1 in YAML
            raise UsageError(f"{origin}: each class may stand once, got {key} again")
        entries[str(key)] = number
    return entries


def _number(value: object, origin: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):  # a bool is an int
        raise UsageError(
            f"{origin}: model classes must be whole numbers, without quotes (or the file holds {BY_NAME}), got "
            f"{shown if len(shown := repr(value)) < 60 else type(value).__name__}"
        )
    return value
