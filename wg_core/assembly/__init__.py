"""From words to objects: one loader, the registry of blocks, the pool of models, builders, templates."""
