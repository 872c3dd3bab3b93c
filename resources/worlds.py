"""Worlds opened for a run; their models live in the process-wide pool and outlive it."""

from typing import TYPE_CHECKING

import dagster as dg
from pydantic import PrivateAttr

if TYPE_CHECKING:
    from wg_core.assembly.pool import ModelPool
    from wg_core.levels.world import World


class WorldPool(dg.ConfigurableResource):
    """Opens world files, once per run; equal models are the same objects for every run of this process."""

    _open: dict[str, "World"] = PrivateAttr(default_factory=dict)

    def world(self, path: str) -> "World":
        """The world of the file `path`. Raises: ConfigError, with file and line."""
        from wg_core.levels.world import World

        if path not in self._open:
            self._open[path] = World.from_yaml(path)
        return self._open[path]

    @property
    def models(self) -> "ModelPool":
        """The process-wide model pool that every world of this process builds from."""
        from wg_core.assembly.pool import default_pool

        return default_pool()
