"""Everything that the page shows of this project."""

import warnings

import dagster as dg

from wg_defs.build import build

with warnings.catch_warnings():
    warnings.simplefilter("ignore", dg.BetaWarning)
    defs = build()
