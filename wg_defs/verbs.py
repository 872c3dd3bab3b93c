"""What every verb of `wg` shares: one clear message and an exit code for each error, and the way from a name to a world."""

import json
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from wg_core.errors import (
    CheckpointError,
    ConfigError,
    MissingCredentialError,
    MissingExtraError,
    MissingModelError,
    NodeExecutionError,
    TemplateParameterError,
    UnknownTemplateError,
    WGError,
)

if TYPE_CHECKING:
    from wg_core import World

OK, USAGE, FAILED, MISSING = 0, 2, 3, 4

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
WorldName = Annotated[str, typer.Argument(metavar="WORLD", help="A world's name, or its file.")]


def _exit_code(error: BaseException) -> int:
    """2 for a wrong request or file, 4 for what is not installed, 3 for a run that failed."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, (MissingModelError, MissingExtraError)):
            return MISSING
        at = at.__cause__
    if isinstance(error, NodeExecutionError):
        return FAILED
    from wg_core.errors import ValidationError

    asked = (ConfigError, ValidationError, TemplateParameterError, UnknownTemplateError)
    given = (CheckpointError, MissingCredentialError)
    usage = (*asked, *given, FileNotFoundError, NotADirectoryError, IsADirectoryError)
    return USAGE if isinstance(error, usage) else FAILED


def verb(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose errors are one clear message and an exit code; with --json the answer is one document."""

    @wraps(command)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            code = command(*args, **kwargs)
        except (WGError, OSError, KeyboardInterrupt) as error:
            if debug:
                raise
            message = str(error)
            if isinstance(error, KeyboardInterrupt):
                message = message or "interrupted; the world goes on from its last snapshot"
            if kwargs.get("as_json"):
                print(json.dumps({"error": {"kind": type(error).__name__, "message": message}}, ensure_ascii=False))
            else:
                err.print(f"error: {message}", style="bold red", markup=False)
            raise typer.Exit(130 if isinstance(error, KeyboardInterrupt) else _exit_code(error)) from None
        raise typer.Exit(code or OK)

    import inspect

    signature = inspect.signature(command)
    parameters = [*signature.parameters.values()]
    parameters.append(inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug))
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


def find(world: str) -> Path:
    """The file of a world given by name or path. Raises: ConfigError, FileNotFoundError."""
    if world.endswith((".yaml", ".yml", ".json")) or os.sep in world:
        path = Path(world)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {world!r}")
        return path
    from wg_defs.worlds import world_file

    return Path(world_file(world).path)


def open_world(world: str) -> "World":
    from wg_core import World

    return World.from_yaml(find(world))
