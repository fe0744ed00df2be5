"""Builds the page from the files of one run or several: one HTML file that fetches nothing."""

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from headprobe import __version__
from headprobe.files import write_text
from headprobe.report.page.encode import to_json
from headprobe.report.page.first import first_screen, names_of
from headprobe.report.page.section import Section
from headprobe.report.page.sections.compare import compare
from headprobe.report.page.sections.curves import curves, ladder
from headprobe.report.page.sections.described import attention, spectra
from headprobe.report.page.sections.heads import section as heads
from headprobe.report.page.sections.importance import importance
from headprobe.report.page.sections.masks import ablations, indices, layers
from headprobe.report.page.sections.pruned import pruned
from headprobe.report.page.sections.similarity import similarity
from headprobe.report.page.sections.worth import worth
from headprobe.run.load import RunFiles

SECTIONS: tuple[Callable[[Sequence[RunFiles]], Section | None], ...] = (
    heads,
    pruned,
    compare,
    curves,
    ladder,
    layers,
    indices,
    similarity,
    attention,
    spectra,
    importance,
    worth,
    ablations,
)
"""Every section, in the order of the page; each returns None where its tables are not there."""

DOCS = f"https://github.com/headprobe/headprobe/blob/v{__version__}/docs/"
"""Where the docs of this version are read."""

ASSETS = files("headprobe.report.page") / "assets"


def write_page(runs: Sequence[RunFiles], file: Path) -> Path:
    """Write the page of these runs in one step, and return its path.

    Raises:
        RunError: The file cannot be written.
    """
    write_text(file, build(runs))
    return file


def build(runs: Sequence[RunFiles]) -> str:
    """Return the page of one run, or of several side by side, as HTML.

    Args:
        runs: The files of the runs, in the order in which the page shows them.
    """
    sections = [found for section in SECTIONS if (found := section(runs)) is not None]
    first = first_screen(runs)
    # What a script reads stands here once; what is text for readers the template writes too.
    data = {
        "version": __version__,
        "runs": names_of(runs),
        "sections": [_for_scripts(section) for section in sections],
    }
    page: str = _template().render(
        first=first,
        fact_names=list(dict.fromkeys(name for run in first for name in run["facts"])),
        runs=names_of(runs),
        sections=sections,
        docs=DOCS,
        version=__version__,
        data=Markup(to_json(data)),  # noqa: S704 - escaped by to_json, for JSON inside of HTML
        style=_asset("page.css") + _asset("figures.css"),
        scripts=[_asset(f"{name}.js") for name in _scripts(sections)],
    )
    return page


def _for_scripts(section: Section) -> dict[str, Any]:
    """Return what a drawing needs of its section."""
    return {"key": section.key, "title": section.title, "data": section.data, "table": dict(section.table)}


def _scripts(sections: Sequence[Section]) -> list[str]:
    """Return the names of the scripts that these sections need, each once, the common one first."""
    return list(dict.fromkeys(["core", *(name for section in sections for name in (*section.scripts, section.key))]))


def _asset(name: str) -> Markup:
    """Return a file of `assets/` as it is."""
    return Markup((ASSETS / name).read_text(encoding="utf-8"))  # noqa: S704 - our own file, no data in it


def _template() -> Template:
    # Every text that is not marked as HTML is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((ASSETS / "page.html.j2").read_text(encoding="utf-8"))
