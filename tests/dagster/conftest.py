"""A project with a stub world, on an instance in memory."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from stub_project import Project, stub_config, write_world


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """A project with the stub world `tide` and no step yet."""
    write_world(tmp_path / "worlds", stub_config("tide", tmp_path / "snapshots"))
    with dg.DagsterInstance.ephemeral() as instance:
        yield Project(tmp_path, instance)
