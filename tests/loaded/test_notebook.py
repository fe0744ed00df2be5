"""The notebook of the docs runs on the bundled data, and is stored without outputs."""

import ast
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

pytestmark = pytest.mark.usefixtures("no_pictures")

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "read_a_run.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def run_cell(source: str, names: dict[str, Any]) -> object:
    """Run a cell as a kernel does, and return what it would show: the value of a last expression."""
    tree = ast.parse(source)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        exec(compile(tree, str(NOTEBOOK), "exec"), names)
        return None
    tree.body.pop()
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    return eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """What each code cell shows, run one after the other in one namespace and an empty working directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("notebook")))
        patch.setattr("tempfile.tempdir", None)  # read TMPDIR again
        patch.chdir(tmp_path_factory.mktemp("empty"))
        patch.setattr("sys.argv", ["notebook"])
        names: dict[str, Any] = {"__name__": "__main__"}
        found = [run_cell("".join(cell["source"]), names) for cell in cells("code")]
        assert list(Path.cwd().iterdir()) == []
    plt.close("all")
    return found


def test_every_cell_of_the_notebook_runs_and_shows_what_its_text_says(shown: list[object]) -> None:
    html = [value._repr_html_() for value in shown if hasattr(value, "_repr_html_")]
    assert "digits_vit" in html[0]
    assert any("digits_swin" in text and "layer:0" in text for text in html)
    assert any(isinstance(value, str) and value.startswith("there is no classes.csv: a test") for value in shown)
    similar, floor = next(value for value in shown if isinstance(value, tuple) and isinstance(value[0], float))
    assert 0 < floor < similar < 1


def test_the_notebook_is_stored_without_outputs() -> None:
    assert [cell for cell in cells("code") if cell["outputs"] or cell["execution_count"]] == []
