"""`wg models`: the model store."""

from typing import Annotated

import typer
from rich.table import Table

from wg_defs.verbs import FAILED, OK, Json, err, out, print_json, verb

models_app = typer.Typer(no_args_is_help=True, help="The model store: list, pull, verify.")


@models_app.command("list")
@verb
def models_list(*, as_json: Json = False) -> int:
    """List the known models and which of them are here."""
    from wg_blocks.store import ModelStore

    rows = ModelStore().list()
    if as_json:
        print_json(rows)
        return OK
    table = Table(box=None, pad_edge=False)
    for name in ("name", "use", "licence", "size", "here"):
        table.add_column(name)
    for row in rows:
        size = f"{row['bytes'] / 1e6:.0f} MB"
        table.add_row(row["name"], row["use"], row["licence"] or "", size, "yes" if row["installed"] else "no")
    out.print(table)
    return OK


@models_app.command("pull")
@verb
def models_pull(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names or refs; without any, what the shipped worlds use.")
    ] = None,
    *,
    all_: Annotated[bool, typer.Option("--all", help="Every model of the catalogue.")] = False,
    as_json: Json = False,
) -> int:
    """Fetch models once, checked; afterwards they work offline."""
    from wg_blocks.store import ModelStore, progress_bar

    store = ModelStore()
    wanted = names or [row["name"] for row in store.list() if all_ or row["default"]]
    here = {row["name"] for row in store.list() if row["installed"]}
    paths: dict[str, str] = {}
    for name in wanted:
        with progress_bar() as report:
            paths[name] = str(store.pull(name, report))
        if not as_json:
            out.print(f"{name}: {'was here already' if name in here else 'fetched'}, {paths[name]}", markup=False)
    if as_json:
        print_json(paths)
    return OK


@models_app.command("verify")
@verb
def models_verify(
    name: Annotated[str | None, typer.Argument(help="A model; without it, all that are here.")] = None,
    *,
    as_json: Json = False,
) -> int:
    """Read stored models again and check every hash."""
    from wg_blocks.store import ModelStore

    problems = ModelStore().verify(name)
    if as_json:
        print_json({"problems": problems})
    else:
        for problem in problems:
            err.print(problem, style="bold red", markup=False)
        if not problems:
            out.print("every hash holds")
    return FAILED if problems else OK
