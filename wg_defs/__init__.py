"""What Dagster shows: worlds as asset groups, steps as partitions, stages and snapshots as assets."""
