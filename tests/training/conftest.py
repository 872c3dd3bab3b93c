"""One trained world for all tests that only look at what a training leaves: making it takes seconds."""

from collections.abc import Iterator

import pytest
from tiny_project import Tiny, tiny_project


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A world with ten steps of history and a tiny language model; tests train under names of their own."""
    return tiny_project(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def at_home(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tiny]:
    """The tests run in the project's folder, with its home."""
    monkeypatch.chdir(tiny.root)
    monkeypatch.setenv("WG_HOME", str(tiny.home))
    monkeypatch.delenv("WG_WORLDS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield tiny
    import mlflow

    mlflow.set_tracking_uri(None)
