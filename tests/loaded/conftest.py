"""One run with every table, for all tests of what Python users load."""

from pathlib import Path

import pytest

from tests.loaded.whole_runs import write_whole_run


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with every table."""
    return write_whole_run(tmp_path_factory.mktemp("whole") / "version_0")
