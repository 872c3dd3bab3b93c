"""The model store: refs to models, resolved to checked local files."""

from wg_blocks.store.ref import Ref
from wg_blocks.store.store import ModelStore, progress_bar

__all__ = ["ModelStore", "Ref", "progress_bar"]
