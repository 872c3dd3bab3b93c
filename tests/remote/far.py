"""Blocks of the endpoint tests, and real server processes on loopback that run graphs of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wg_core import Block, BlockRegistry, Graph, ModelPool, Pipeline, Port, Stage, current_context

ROOT = Path(__file__).parent.parent.parent


class Affine(Block):
    """`y = scale * x + offset`."""

    ports = (Port("x", "in", "number"), Port("y", "out", "number"))

    def __init__(self, *, scale: float = 1, offset: float = 0) -> None:
        super().__init__()
        self.scale, self.offset = scale, offset

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": self.scale * inputs["x"] + self.offset}


class Same(Block):
    """Hands on anything, and an optional second value."""

    ports = (Port("x", "in"), Port("more", "in", optional=True), Port("y", "out"), Port("also", "out", optional=True))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"], **({"also": inputs["more"]} if "more" in inputs else {})}


class Where(Block):
    """What a block knows of its call, and its seed; uses a model once."""

    ports = (Port("x", "in", "number"), Port("y", "out", "number"), Port("seen", "out", "dict"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        ctx = current_context()
        ctx.add_usage("far/model", calls=1, prompt_tokens=3)
        seen = {
            "path": ctx.path, "pipeline": ctx.pipeline_id, "graph": ctx.graph_id, "iteration": ctx.iteration,
            "seed": ctx.node_seed(), "extra": dict(ctx.extra), "training": ctx.training,
        }  # fmt: skip
        return {"y": inputs["x"] + ctx.node_seed() % 1000, "seen": seen}


class Slow(Block):
    """Notes in a file when it begins and ends, and between takes its time."""

    ports = (Port("x", "in", "number"), Port("y", "out", "number"))

    def __init__(self, *, seconds: float, log: str) -> None:
        super().__init__()
        self.seconds, self.log = seconds, log

    def note(self, word: str) -> None:
        with open(self.log, "a") as file:
            file.write(f"{word}\n")

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.note("begin")
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            time.sleep(0.01)
            current_context().emit("progress")
        self.note("end")
        return {"y": inputs["x"] * 2}


class Fails(Block):
    """Never works."""

    ports = (Port("x", "in"), Port("y", "out"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("the wheel is off")


class Picture(Block):
    """Stores bytes and gives a reference."""

    ports = (Port("text", "in", "text"), Port("ref", "out", "ref"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"ref": {"uri": f"blob:{current_context().blobs.put(inputs['text'].encode())}"}}


class Read(Block):
    """Reads what a reference names."""

    ports = (Port("ref", "in", "ref"), Port("text", "out", "text"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"text": current_context().blobs.get(inputs["ref"]["uri"][5:]).decode()}


BLOCKS = {
    "far/affine": Affine, "far/same": Same, "far/where": Where, "far/slow": Slow, "far/fails": Fails,
    "far/picture": Picture, "far/read": Read,
}  # fmt: skip


def far_registry() -> BlockRegistry:
    """The blocks of these tests, and how endpoints are reached."""
    registry = BlockRegistry()
    for name, block in BLOCKS.items():
        registry.register(name, block)
    registry.register_transport("http", "wg_blocks.remote:HttpTransport")
    return registry


def one(block_type: str, id: str = "g", **config: Any) -> dict[str, Any]:
    """A graph of one block."""
    return {"kind": "graph", "id": id, "nodes": [{"node_id": "n", "block_type": block_type, "config": config}]}


def build(config: Mapping[str, Any]) -> Any:
    """A graph, pipeline or stage of these blocks."""
    level = {"graph": Graph, "pipeline": Pipeline, "stage": Stage}[config["kind"]]
    return level.from_config(config, registry=far_registry(), pool=ModelPool())


def started(command: list[str], **environment: str) -> tuple[subprocess.Popen[str], str]:
    """A server process, and the address that its first line tells."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    if not line:
        process.wait(10)
        raise AssertionError(f"the server did not start: {process.stderr.read()[-3000:]}")
    return process, json.loads(line)["url"]


def stop(process: subprocess.Popen[str], how: int = signal.SIGTERM) -> str:
    """End a server process, wait for it, and give what it printed."""
    if process.poll() is None:
        process.send_signal(how)
    out, err = process.communicate(timeout=20)
    return out + err


class Far:
    """A server process for one graph, pipeline or stage."""

    def __init__(self, config: Mapping[str, Any], *, token_env: str | None = None, **more: Any) -> None:
        self.config = dict(config)
        arguments = {"config": self.config, "token_env": token_env, **more}
        self.process, self.url = started([__file__, json.dumps(arguments)])

    def kill(self) -> None:
        stop(self.process, signal.SIGKILL)

    def __enter__(self) -> Far:
        return self

    def __exit__(self, *error: object) -> None:
        stop(self.process)

    def entry(self, **endpoint: Any) -> dict[str, Any]:
        """How a caller's file names it."""
        from wg_blocks.serve import served_contract
        from wg_core.assembly.contract import contract_words

        words = contract_words(served_contract(build(self.config)))
        return {"endpoint": {"url": self.url, "backoff_s": 0.02, **endpoint}, "contract": words}


class Unwell:
    """An application that now and then hides the answer of the one inside behind a 503."""

    def __init__(self, app: Any, times: int, hide: bool) -> None:
        self.app, self.times, self.hide = app, times, hide

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != "/run" or self.times <= 0:
            return await self.app(scope, receive, send)
        self.times -= 1

        async def swallow(message: Any) -> None:
            pass

        if self.hide:  # the work is done, and its answer lost
            await self.app(scope, receive, swallow)
        await send({"type": "http.response.start", "status": 503, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"unwell"})


def main(arguments: Mapping[str, Any]) -> None:
    """Serve a configuration until told to stop."""
    from wg_blocks.serve import Limits, serve

    unwell = arguments.get("unwell")
    serve(
        build(arguments["config"]),
        port=0,
        token_env=arguments["token_env"],
        limits=Limits(**arguments.get("limits", {})),
        wrap=(lambda app: Unwell(app, **unwell)) if unwell else None,
        on_ready=lambda url: print(json.dumps({"url": url}), flush=True),
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
