"""The words of the hierarchy: graph, pipeline, stage, world, end world."""
