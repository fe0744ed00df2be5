"""`models`: lists timm's architectures with attention heads, and what can be measured of each."""

import difflib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from fnmatch import fnmatchcase
from importlib import metadata

from headprobe.catalog.families import FamilyTable, shipped_families
from headprobe.catalog.page import markdown_page
from headprobe.catalog.text import family_text, record_text, table_text
from headprobe.commands.parser import Parser
from headprobe.errors import UsageError


def run(words: list[str]) -> None:
    """Run the command with the words after its name.

    Raises:
        UsageError: Nothing fits the pattern, or the options do not go together.
    """
    parser = Parser(prog="headprobe models", description="List timm's architectures with attention heads.")
    parser.add_argument("pattern", type=str, nargs="?", help="A timm family or model: swin_transformer, 'deit*'.")
    parser.add_argument("--survey", action="store_true", help="Walk the installed timm now; all of it takes minutes.")
    parser.add_argument("--workers", type=int, default=1, help="Processes that walk.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.add_argument("--markdown", action="store_true", help="Print the page docs/models.md.")
    options = parser.parse_args(words)
    if options.workers < 1:
        raise UsageError(f"--workers must be at least 1, got {options.workers}")
    if options.markdown and (options.json or options.pattern):
        other = "--json" if options.json else options.pattern
        raise UsageError(f"--markdown prints the whole table as a page and goes with no pattern or --json, got {other}")
    # A survey does not read the table that ships: its output may go to that very file.
    table = _walk(options.pattern, options.workers) if options.survey else shipped_families()
    if options.pattern and not options.survey and _is_model(options.pattern, table):
        sys.stdout.write(_model(options.pattern, as_json=options.json))
        return
    sys.stdout.write(_table(table, options.pattern, as_json=options.json, as_page=options.markdown))


def _is_model(word: str, table: FamilyTable) -> bool:
    """Return whether a word is the name of a model; a word that is not in the table is looked up in timm."""
    if word in table.families or set(word) & set("*?["):
        return False
    if any(word in family.names for family in table.families.values()):
        return True
    from headprobe.catalog.survey import is_name

    return is_name(word)


def _model(name: str, *, as_json: bool) -> str:
    """Walk one model now and return what was found."""
    from headprobe.catalog.survey import walk

    record = walk(name)
    return json.dumps(asdict(record), indent=1) + "\n" if as_json else record_text(record)


def _walk(pattern: str | None, workers: int) -> FamilyTable:
    """Walk the installed timm, or the models of it that fit the pattern."""
    from headprobe.catalog.survey import family_of_names, survey

    families = family_of_names()
    names = [name for name, family in families.items() if pattern is None or _fits(pattern, family, name)]
    if not names:
        raise UsageError(_nothing_fits(str(pattern), [*families.values(), *families]))
    table = survey(names, workers, _progress)
    sys.stderr.write("\n")
    return table


def _progress(walked: int, of: int) -> None:
    sys.stderr.write(f"\rwalked {walked:,} of {of:,} models")
    sys.stderr.flush()


def _table(table: FamilyTable, pattern: str | None, *, as_json: bool, as_page: bool) -> str:
    """Return the rows of the table that fit the pattern, in the chosen form."""
    if as_page:
        return markdown_page(table)
    chosen = table if pattern is None else _chosen(table, pattern)
    if as_json:
        return chosen.to_json()
    heading = _heading(table.timm)
    if pattern is None:
        return heading + table_text(chosen)
    if len(chosen.families) == 1 and pattern in chosen.families:
        return heading + family_text(chosen.families[pattern])
    names = [name for family in chosen.families.values() for name in family.names]
    return heading + table_text(chosen, names=[name for name in names if fnmatchcase(name, pattern)])


def _heading(made_with: str) -> str:
    """Return the line that names the timm of a table, with the remedy where another one is installed."""
    installed = metadata.version("timm")
    line = f"made with timm {made_with}; installed is timm {installed}"
    if made_with != installed:
        line += ", which may differ: headprobe models --survey --workers 2 walks it, in some minutes"
    return line + "\n\n"


def _chosen(table: FamilyTable, pattern: str) -> FamilyTable:
    """Keep the timm families that fit, or that have a name that fits."""
    families = {
        name: family
        for name, family in table.families.items()
        if any(_fits(pattern, name, one) for one in family.names)
    }
    if not families:
        everything = [name for family in table.families.values() for name in (family.name, *family.names)]
        raise UsageError(_nothing_fits(pattern, everything))
    return FamilyTable(table.timm, families)


def _fits(pattern: str, family: str, name: str) -> bool:
    return fnmatchcase(family, pattern) or fnmatchcase(name, pattern)


def _nothing_fits(pattern: str, known: Iterable[str]) -> str:
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(pattern, names, n=3)
    if any(pattern in name for name in names):
        near = [f"'*{pattern}*'"]
    hint = f"did you mean {' or '.join(near)}?" if near else "headprobe models lists the timm families"
    return f"a pattern must fit a timm family or a model; {hint}, got {pattern!r}"
