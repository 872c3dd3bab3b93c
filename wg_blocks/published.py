"""Published: a block whose weights come from the model store, a ref or a folder, each made with its weights in it."""

from __future__ import annotations

from pathlib import Path

from wg_blocks.store import ModelStore
from wg_core.errors import MissingModelError
from wg_core.weights.module import ModuleBlock


class Published(ModuleBlock):
    """Base of blocks with a published model: `checkpoint_ref` is a name of the model store, a ref or a folder.

    `build_modules` makes the modules, with the published weights where `_read_weights` says so.
    """

    checkpoint_ref: str
    _read_weights: bool = True
    _sha256: str | None = None

    def folder(self) -> Path:
        """Where the weights lie. Raises: MissingModelError with the command that fetches them."""
        path = Path(self.checkpoint_ref)
        return path if path.is_dir() else ModelStore().path(self.checkpoint_ref)

    def weight_hash(self) -> str | None:
        """Sha256 of the weight file as it was published, or of the weights as they are once they were changed.

        None while the model is not there.
        """
        if self.weights_changed():
            return super().weight_hash()
        if self._sha256 is None:
            path = Path(self.checkpoint_ref)
            store, ref = (ModelStore(path.parent), f"file:{path.name}") if path.is_dir() else (ModelStore(), None)
            try:
                self._sha256 = str(store.info(ref or self.checkpoint_ref)["sha256"])
            except MissingModelError:
                return None
        return self._sha256

    def build(self, *, read_reference: bool = True) -> None:
        with self._lock:
            self._read_weights = read_reference
            super().build(read_reference=False)  # a model is read as it is made
