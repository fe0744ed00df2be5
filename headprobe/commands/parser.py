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
    text = re.sub(r"^\s*Not of type MaskSpecs: ", "", message, flags=re.MULTILINE)
    found = re.match(r'Parser key "(?P<key>[\w.]+)":\s*(?P<reason>.*)', text, flags=re.DOTALL)
    if found is None:
        return text
    # jsonargparse indents all lines but the first; the caret must stay under its letter of the mask spec.
    first, *others = found["reason"].split("\n")
    lines = [first, *(line.removeprefix("  ") for line in others)]
    return f"{_option(found['key'])}: " + "\n".join(lines)


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


def _option(key: str) -> str:
    """Return a key of a config file as an option of the command line."""
    return "--" + {"mask_spec": "mask-spec", "dry_run": "dry-run"}.get(key, key)
