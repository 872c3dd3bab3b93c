"""World files that the command line writes: a new one from a template, and that of a fork."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wg_core.errors import ConfigError, TemplateParameterError
from wg_core.structure.ids import check_id

if TYPE_CHECKING:
    from wg_core import World

SCHEMA = "schema/world.json"
"""Where the JSON Schema of world files lies, seen from a world file."""

_HEAD = """\
# yaml-language-server: $schema={schema}
# {title}, made from the template {template!r}.
#
#   wg validate {file}
#   wg run {name} --steps 3
#   wg run {name} --action "a storm lands"
"""
_CONTENT = """
# What is in the world: tell it in your own words. It is read before the first step; from then on the world's own
# history holds, and a change here needs a fork (wg fork) or a new world.
"""
_EXECUTION = """
# How it runs: the stages of the cycle, each a graph of blocks. A block_type may be changed for another one with the same
# ports, and all stages that name a model share it.
"""


def taken(name: str) -> Path | None:
    """The file that holds the world `name` already, None if there is none."""
    from wg_defs.worlds import read_worlds

    return next((Path(w.path) for w in read_worlds()[0] if w.world_id == name), None)


def target_file(name: str, folder: Path) -> Path:
    """The file for a new world. Raises: ConfigError for a bad id, or where the file or the world is there already."""
    target = folder / f"{check_id(name, 'world id')}.yaml"
    there = target if target.exists() else taken(name)
    if there is not None:
        raise ConfigError(f"there is a world {name!r} already: {there}; choose another name")
    return target


def parameters(given: list[str]) -> dict[str, Any]:
    """`key=value` of each, the value read as in a world file. Raises: TemplateParameterError."""
    from wg_core.assembly.loader import parse

    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier() or key in found:
            raise TemplateParameterError(f"--param {text!r}: write each parameter once, as name=value")
        found[key] = parse(value, f"--param {key}").data if value else ""
    return found


def new_world(name: str, template: str, given: Mapping[str, Any], folder: Path = Path("worlds")) -> Path:
    """Write a small commented world file, and the JSON Schema that it names so that an editor completes and checks it.

    Raises: ConfigError, UnknownTemplateError, TemplateParameterError.
    """
    from wg_core import World
    from wg_core.assembly.models import schema_of
    from wg_core.assembly.template import default_templates

    target = target_file(name, folder)
    config = default_templates().build("world", template, {**given, "world_id": name})
    execution, content = config.pop("execution"), config.pop("content", {})
    title = given.get("title") or name.replace("_", " ").capitalize()
    head = {"$schema": SCHEMA, "kind": "world", "schema_version": config["schema_version"], "world_id": name}
    text = _HEAD.format(schema=SCHEMA, title=title, template=template, file=target, name=name)
    text += _yaml({**head, "title": title, "tags": config.get("tags", [])})
    text += _CONTENT + _yaml({"content": content}) + _EXECUTION + _yaml({"execution": execution})
    World.from_yaml_text(text)
    schema = json.dumps(schema_of("world"), indent=1, ensure_ascii=False) + "\n"
    path = folder / SCHEMA
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != schema:
        path.write_text(schema, encoding="utf-8")
    _write_new(target, text)
    return target


def fork_file(origin: Path, world: "World", new_id: str, folder: Path = Path("worlds")) -> Path:
    """Write the file of a fork: that of the origin under the new id, with its comments and references where these hold.

    Raises: ConfigError.
    """
    target = target_file(new_id, folder)
    text = origin.read_text(encoding="utf-8")
    renamed, found = re.subn(
        rf"^(\"?world_id\"?\s*:\s*)([\"']?){re.escape(world.world_id)}\2(?=\s*(#|,|$))",
        rf"\g<1>{new_id}",
        text,
        flags=re.MULTILINE,
    )
    if found != 1 or origin.resolve().parent != target.resolve().parent or origin.suffix == ".json":
        renamed = _yaml({**world.to_config(), "world_id": new_id})
    _write_new(target, renamed)
    return target


def _write_new(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
        except BaseException:
            target.unlink()
            raise


def _yaml(value: Mapping[str, Any]) -> str:
    import yaml

    from wg_core.assembly.loader import Dumper

    text: str = yaml.dump(
        dict(value), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=116, default_flow_style=None
    )
    return text
