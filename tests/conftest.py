"""What all tests share: property tests that are the same at every run, and the blocks of `blocks_for_tests`."""

import os
import shutil

import pytest
from blocks_for_tests import new_registry
from hypothesis import HealthCheck, settings

from wg_core import BlockRegistry, ModelPool

settings.register_profile(
    "wg", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)
settings.load_profile("wg")

_MEMORY = "/dev/shm"
if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > 4 << 30:
    # The tests' folders lie in memory where there is room: thousands of flushes need no disk.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", _MEMORY)


@pytest.fixture
def registry() -> BlockRegistry:
    """A registry of its own with the test blocks."""
    return new_registry()


@pytest.fixture
def pool() -> ModelPool:
    """A pool of its own."""
    return ModelPool()
