"""Everything that the page shows of this project."""

from wg_defs.build import build

defs = build()
