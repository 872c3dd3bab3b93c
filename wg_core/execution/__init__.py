"""How a structure runs: blocks, context, plan, walk, drivers, validation, events."""
