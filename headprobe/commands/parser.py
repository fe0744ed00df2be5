"""A command-line parser whose errors are one message, without the sixty lines of usage."""

import difflib
import re
from typing import NoReturn

import jsonargparse

from headprobe.errors import UsageError


class Parser(jsonargparse.ArgumentParser):
    """A parser that raises `UsageError` where jsonargparse prints its usage and exits."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UsageError` that names the option, what is wrong with its value, and the nearest option's name."""
        parser = getattr(ex, "subcommand_parser", None) or self
        raise UsageError(_plainly(message) + _near(message, parser)) from ex


def _plainly(message: str) -> str:
    """Return jsonargparse's message with options as a user types them, and without the names of our types."""
    text = re.sub(r"^\s*Not of type (MaskSpecs|Ablations): ", "", message, flags=re.MULTILINE)
    found = re.match(r'Parser key "(?P<key>[\w.]+)":\s*(?P<reason>.*)', text, flags=re.DOTALL)
    if found is None:
        return text
    if no_type_fits(found["reason"]):
        return f"{_option(found['key'])}: {in_one_line(found['reason'])}"
    # jsonargparse indents all lines but the first; the caret must stay under its letter of the mask spec.
    first, *others = found["reason"].split("\n")
    lines = [first, *(line.removeprefix("  ") for line in others)]
    return f"{_option(found['key'])}: " + "\n".join(lines)


# -- values of an option with several types ----------------------------------------------------------------------------

_SEVERAL = re.compile(
    r"Does not validate against any of the Union subtypes\n\s*Subtypes: (?P<types>.*?)\n\s*Errors:\n(?P<errors>.*)"
    r"\n\s*Given value type: .*?\n\s*Given value: (?P<value>.*)",
    re.DOTALL,
)
"""What jsonargparse writes where a value fits none of an option's types: a reason per type, in many lines."""

_SAYS_NOTHING = ("Expected a ", "Not a valid subclass", "Does not validate", "Import path", "Given value")
"""Beginnings of reasons that only say that the value is of another type."""


def no_type_fits(message: str) -> bool:
    """Return whether a message of jsonargparse's lists the reasons why a value fits none of an option's types."""
    return _SEVERAL.search(message) is not None


def in_one_line(message: str) -> str:
    """Return such a message in one line: the reason that says something, or else what was expected."""
    found = _SEVERAL.search(message)
    if found is None:
        return " ".join(message.split())
    value = _value_in_words(found["value"])
    reasons = _reasons(found["errors"])
    for reason in reasons:
        if of_class := re.match(r"Problem with given class_path '(?:[^']*\.)?(\w+)': (.*)", reason):
            return f"{of_class[2]}, got {of_class[1]}"
    told = [reason for reason in reasons if not reason.startswith(_SAYS_NOTHING)]
    reason = told[0] if told else f"expected {_types_in_words(found['types'])}"
    return reason if ", got " in reason else f"{reason}, got {value}"


def _reasons(errors: str) -> list[str]:
    """Return the reasons of the outer list, each as one line; lists inside of them are deeper indented."""
    margin = len(errors) - len(errors.lstrip(" "))
    parts = re.split(rf"^ {{{margin}}}- ", errors, flags=re.MULTILINE)
    return [" ".join(part.split()) for part in parts if part.strip()]


_WORDS = {
    "NoneType": "null",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "dict": "options as {name: value}",
    "list": "a list",
}


def _types_in_words(types: str) -> str:
    """Return the types of an option as a user would write their values: choices, or the names of the types."""
    choices = [choice.strip(" '") for group in re.findall(r"Literal\[(.*?)\]", types) for choice in group.split(",")]
    plain = re.sub(r"[\w.]*Literal\[.*?\]", "", types)
    names = re.findall(r"<class '(?:[\w.]*\.)?(\w+)'>|\b(dict|list)\[", plain)
    words = [_WORDS.get(name := one or other, f"a {name} by its class's name or import path") for one, other in names]
    listed = list(dict.fromkeys([*choices, *words]))
    return ", ".join(listed[:-1]) + (" or " if listed[1:] else "") + "".join(listed[-1:])


def _value_in_words(value: str) -> str:
    """Return a value as jsonargparse prints it; of a class its name, of an option of a class the option."""
    nested = re.search(r"NestedArg\(key='([^']*)', val='([^']*)'\)", value)
    if nested is not None:
        return f"{nested[1]}={nested[2]}"
    named = re.search(r"class_path='(?:[^']*\.)?(\w+)'", value)
    return named[1] if named is not None else " ".join(value.split())


def _near(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """Return the hint to an unknown option: the nearest options, or where all are listed."""
    found = re.search(r"unrecognized arguments: (--[\w.-]+)|does not accept option '([\w.]+)'", message)
    if found is None:
        return ""
    known = [_option(key) for key in parser.get_defaults().keys()]  # noqa: SIM118 (a jsonargparse Namespace)
    given = found[1] or _option(found[2])
    near = difflib.get_close_matches(given, known, n=2)
    # --model.mask_spec is the right word in the wrong place, which is nearer than any typing error.
    near = [option for option in known if option == _option(given.lstrip("-").rsplit(".", 1)[-1])] or near
    if not near:
        return f"; {parser.prog.replace(' [options]', '')} --help lists all"
    return f"; did you mean {' or '.join(near)}?"


WITH_DASHES = {"mask_spec", "dry_run", "calibration_file", "score_heads", "keep_top1"}
"""Keys of config files whose options have dashes."""


def _option(key: str) -> str:
    """Return a key of a config file as an option of the command line."""
    return "--" + (key.replace("_", "-") if key in WITH_DASHES else key)
