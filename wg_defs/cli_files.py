"""`wg validate`, `plan`, `schema` and `serve`: what is done with a file of any level."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from wg_core.errors import ConfigError, CorruptSnapshotError, did_you_mean
from wg_defs.printed import plan_lines, print_forecast
from wg_defs.verbs import OK, Json, err, out, print_json, verb

files_app = typer.Typer()


@files_app.command()
@verb
def validate(file: Annotated[Path, typer.Argument(help="A file of any level.")], *, as_json: Json = False) -> int:
    """Check a world, stage, pipeline or graph file."""
    from wg_core.assembly.build import open_document

    kind, _ = open_document(file)
    level = levels()[kind].from_yaml(file)
    warnings: list[str] = []
    if kind == "world":
        level.dry_run()
    if kind != "end_world":
        warnings = [str(w) for w in level.validate(deep=True).warnings]
    elif problems := level.verify():
        raise CorruptSnapshotError(f"{file} is not whole: {problems[0]}")
    lines = level.adapter_report() if hasattr(level, "adapter_report") else []
    if as_json:
        told = {"adapters": [asdict(line) for line in lines]} if lines else {}
        print_json({"valid": True, "kind": kind, "warnings": warnings, **told})
    else:
        for warning in warnings:
            err.print(f"warning: {warning}", style="yellow", markup=False)
        out.print(f"{file}: a valid {kind}", markup=False)
        for line in lines:
            out.print(f"  {line.path}: {', '.join(line.adapters) or line.reason}", markup=False)
    return OK


def levels() -> dict[str, Any]:
    from wg_core import EndWorld, Graph, Pipeline, Stage, World
    from wg_core.levels.remote import Remote

    return {level.kind: level for level in (Graph, Pipeline, Stage, Remote, World, EndWorld)}


@files_app.command()
@verb
def plan(
    file: Annotated[Path, typer.Argument(help="A file of any level.")],
    form: Annotated[
        Literal["text", "mermaid", "dot"],
        typer.Option("--format", help="Text, or a picture in Mermaid or Graphviz DOT."),
    ] = "text",
    *,
    as_json: Json = False,
) -> int:
    """Show what a run would do, without doing it: order, loops, models, and the calls and tokens to expect."""
    from wg_blocks.forecast import forecast, totals
    from wg_core.assembly.build import open_document

    kind, _ = open_document(file)
    if kind == "end_world":
        raise ConfigError(f"{file}: an end world is read, never run; there is nothing to plan")
    level = levels()[kind].from_yaml(file)
    if form != "text":
        picture = level.to_mermaid() if form == "mermaid" else level.to_dot()
        if as_json:
            print_json({"kind": kind, "format": form, "picture": picture})
        else:
            print(picture, end="")
        return OK
    stages = level.stages if kind == "world" else {level.id: level}
    texts = {role: "\n".join(plan_lines(stage)) for role, stage in stages.items()}
    models = ["/".join(block.model_ref()[:3]) for block in level.iter_blocks() if block.model_ref()]
    due = level.due() if kind == "world" else {}
    rows = [
        {**row, "due": due.get(role, True)}
        for role, stage in stages.items()
        if hasattr(stage, "nodes")
        for row in forecast(stage, role if kind == "world" else "")
    ]
    expected = {"full_step": totals(rows), "next_step": totals([row for row in rows if row["due"]])}
    if as_json:
        steps = {role: stage.plan_data() for role, stage in stages.items()}
        print_json(
            {"kind": kind, "plan": texts, "steps": steps, "models": models, "forecast": {"nodes": rows, **expected}}
        )
    else:
        for text in texts.values():
            out.print(text, markup=False)
        out.print(f"models: {', '.join(models) or 'none'}", markup=False)
        if rows:
            print_forecast(rows, expected, "a full step" if kind == "world" else "a run")
    return OK


@files_app.command()
@verb
def schema(level: Annotated[str, typer.Argument(help="graph, pipeline, stage, world or end_world.")] = "world") -> int:
    """Print the JSON Schema of a kind of file."""
    from wg_core.assembly.models import KINDS, schema_of

    if level not in KINDS:
        raise ConfigError(f"no level {level!r}; {did_you_mean(level, KINDS)}")
    print_json(schema_of(level))
    return OK


@files_app.command()
@verb
def serve(
    file: Annotated[Path, typer.Argument(help="A file of a graph, pipeline or stage; of a world with --stage.")],
    *,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8321,
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback needs a token.")] = "127.0.0.1",
    token_env: Annotated[
        str | None, typer.Option("--token-env", help="Environment variable with the bearer token that callers give.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Which stage of a world.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 4,
    contract: Annotated[
        bool, typer.Option("--contract", help="Print the contract that callers store, and serve nothing.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Run a graph, pipeline or stage for others, over HTTP."""
    import yaml

    from wg_blocks.serve import Limits, served_contract
    from wg_blocks.serve import serve as start
    from wg_core.assembly.build import open_document
    from wg_core.assembly.contract import contract_words
    from wg_core.assembly.loader import Dumper
    from wg_core.state.blobs import FileBlobs
    from wg_core.state.home import home

    kind, _ = open_document(file)
    if kind == "end_world":
        raise ConfigError(f"{file}: an end world is read, never run; there is nothing to serve")
    if (kind == "world") != (stage is not None):
        raise ConfigError(f"{file} is a {kind}; --stage ROLE names a stage of a world, and a world is served by stages")
    level = levels()[kind].from_yaml(file)
    if stage is not None:
        if stage not in level.stages:
            raise ConfigError(
                f"world {level.world_id!r} has no stage {stage!r} to serve; {did_you_mean(stage, level.stages)}"
            )
        level = level.stages[stage]
    if contract:
        words = {"contract": contract_words(served_contract(level))}
        if as_json:
            print_json(words)
        else:
            print(yaml.dump(words, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120), end="")
        return OK

    def ready(url: str) -> None:
        if as_json:
            print(json.dumps({"url": url, "level": level.level, "id": level.id}), flush=True)
        else:
            out.print(f"{level.level} {level.id} at {url}", markup=False)

    blobs = FileBlobs(home() / "served" / "blobs")
    limits = Limits(concurrency=concurrency)
    start(level, host=host, port=port, token_env=token_env, blobs=blobs, limits=limits, on_ready=ready)
    return OK
