"""How far a reader must go to follow the README's command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.entered import Entered

pytestmark = pytest.mark.slow


def test_a_function_is_counted_once_with_its_file_and_a_class_body_is_not(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text("class A:\n    x = 1\n\ndef used():\n    pass\n\ndef unused():\n    pass\n\nused()\nused()\n")
    entered = Entered(tmp_path)
    sys.setprofile(entered.profile)
    try:
        exec(compile(file.read_text(), str(file), "exec"), {})
    finally:
        sys.setprofile(None)
    assert entered.by_file == {"example.py": 1}


def test_the_command_of_the_readme_enters_at_most_62_files(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "benchmarks.entered", "test", "--mask-spec", "layer:3"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    counted = json.loads(run.stderr.splitlines()[-1])
    assert "module.py" in counted["by_file"]
    assert counted["files"] <= 62, counted["by_file"]
