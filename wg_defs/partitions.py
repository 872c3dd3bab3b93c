"""A step is a partition: keys are the step's number in six digits."""

import re
from collections.abc import Sequence

import dagster as dg

from wg_core.errors import ConfigError

_KEY = re.compile(r"[0-9]{6}")


def partitions_name(world_id: str) -> str:
    """The name of a world's dynamic partitions."""
    return f"{world_id}__steps"


def steps_of(world_id: str) -> dg.DynamicPartitionsDefinition:
    """The partitions of a world: its steps."""
    return dg.DynamicPartitionsDefinition(name=partitions_name(world_id))


def key_of(step: int) -> str:
    """The partition key of `step`."""
    return f"{step:06d}"


def step_of(key: str) -> int:
    """The step of a partition key. Raises: ConfigError, since Dagster lets a person add any text as a key."""
    if not _KEY.fullmatch(key):
        raise ConfigError(f"{key!r} is not a step: steps are six digits, such as 000042; delete this partition")
    return int(key)


def add_steps(instance: dg.DagsterInstance, world_id: str, published: int, count: int) -> list[str]:
    """Add the keys of the `count` steps after `published` that are not there yet, in order (-1: nothing published)."""
    known = set(instance.get_dynamic_partitions(partitions_name(world_id)))
    wanted = [key_of(step) for step in range(published + 1, published + 1 + count)]
    new = [key for key in wanted if key not in known]
    if new:
        instance.add_dynamic_partitions(partitions_name(world_id), new)
    return new


def valid_steps(keys: Sequence[str]) -> list[int]:
    """The steps among `keys`, ascending; other texts are left out."""
    return sorted(int(key) for key in keys if _KEY.fullmatch(key))
