"""The torch floor: modules in blocks, walking over parameters, checkpoints."""
