"""Any level behind HTTP: `GET /spec`, `POST /run`, `GET /health`, and blobs by hash. The other side is `remote`."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import socket
import sys
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic import ValidationError as PydanticError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from wg_blocks.wire import JSON_TYPE, PARTS_TYPE, Packed, decode, encode, read_token, unpack
from wg_core.assembly.contract import contract_hash, contract_of, contract_words
from wg_core.assembly.models import ContractEntry
from wg_core.errors import (
    AbortRun,
    ConfigError,
    MissingInputError,
    PortValueError,
    RunTimeoutError,
    UnexpectedInputError,
    WGError,
    did_you_mean,
)
from wg_core.execution.blobs import BlobStore, MemoryBlobs
from wg_core.execution.block import check_kinds
from wg_core.execution.context import FRAME, Frame, RunOptions
from wg_core.execution.executable_graph import ExecutableGraph
from wg_core.state.canonical import is_sha256
from wg_core.structure.ids import ID_PATTERN

PROTOCOL = 1
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_POLL_S = 0.25
_GRACE_S = 2.0
_log = logging.getLogger("wg.serve")

Id = Annotated[str, Field(pattern=rf"^{ID_PATTERN}$")]
Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes on: bytes of one body, runs at a time and waiting, answers kept by request id, stored bytes."""

    body: int = 256 * 2**20
    concurrency: int = 4
    waiting: int = 256
    answers: int = 1024
    answer_bytes: int = 256 * 2**20
    store_bytes: int = 8 * 2**30


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Place(Strict):
    """One running level of the caller, so that paths, ids and seeds are those of a local run."""

    level: Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]
    id: Id
    node: Id | None = None
    iteration: int | None = None
    turn: int = 0


class Options(Strict):
    """The options of a run that mean something elsewhere."""

    seed: int | None = None
    num_loop_steps: int | dict[str, int] | None = None
    max_agent_steps: int | None = None
    tool_errors: str | None = None
    per_node: dict[str, dict[str, Any]] | None = None
    extra: dict[str, Any] | None = None
    timeout_s: float | None = Field(default=None, gt=0)
    trace_context: Any = None


class RunRequest(Strict):
    """The body of `POST /run`."""

    inputs: dict[str, Any] = {}
    options: Options = Options()
    contract_hash: Sha | None = None
    config_hash: Sha | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{8,64}$")] | None = None
    place: list[Place] = Field(default=[], max_length=64)
    blobs: list[Sha] = Field(default=[], max_length=1_000_000)


@dataclass(slots=True)
class Answer:
    """A finished answer; `keep` where the same request id is answered by it again."""

    status: int
    media_type: str
    body: bytes
    keep: bool = True

    def response(self) -> Response:
        return Response(self.body, self.status, media_type=self.media_type)


@dataclass(slots=True)
class _Job:
    digest: str
    future: Future[Answer] = field(default_factory=Future)
    cancel: threading.Event = field(default_factory=threading.Event)
    watchers: int = 0

    def cancel_if_alone(self) -> None:
        if not self.watchers and not self.future.done():
            self.cancel.set()


class Refused(Exception):
    """An answer other than a result."""

    def __init__(self, status: int, code: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"code": code, "message": message, **more}

    def response(self) -> Response:
        headers = {"Retry-After": "1"} if self.status == 503 else {}
        headers |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return JSONResponse({"error": self.error}, self.status, headers=headers)


def served_contract(level: Any) -> ContractEntry:
    """What callers store about `level`: ports, the hash of its configuration, and of its models' weights."""
    contract = contract_of(level)
    try:
        config = level.config_hash
    except ConfigError:
        config = None  # made in code of blocks that no file can name; there is nothing to pin
    models = {"/".join(key[:3]): b.weight_hash() for b in level.iter_blocks() if (key := b.model_ref()) is not None}
    return contract.model_copy(update={"config_hash": config, "models": dict(sorted(models.items()))})


class Server:
    """One level, its jobs and its blobs."""

    def __init__(
        self,
        level: ExecutableGraph[Any],
        *,
        token: str | None = None,
        blobs: BlobStore | None = None,
        limits: Limits | None = None,
        hosts: tuple[str, ...] = LOOPBACK,
    ) -> None:
        level.validate(deep=True)
        for block in level.iter_blocks():
            if block.training:
                block.eval()
        self.level = level
        self.limits = limits or Limits()
        self.blobs = blobs if blobs is not None else MemoryBlobs()
        self.contract = served_contract(level)
        self.hash = contract_hash(self.contract)
        self.hosts = hosts
        self._token = token.encode() if token is not None else None
        self._jobs: OrderedDict[str, _Job] = OrderedDict()
        self._active = 0
        self._stored = 0
        self._threads = ThreadPoolExecutor(self.limits.concurrency, thread_name_prefix="wg-run")

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/health", self._guarded(self.health, open_=True), methods=["GET"]),
            Route("/spec", self._guarded(self.spec), methods=["GET"]),
            Route("/run", self._guarded(self.run), methods=["POST"]),
            Route("/run/{request_id}", self._guarded(self.cancel), methods=["DELETE"]),
            Route("/blobs/{sha}", self._guarded(self.get_blob), methods=["GET"]),
            Route("/blobs/{sha}", self._guarded(self.put_blob), methods=["PUT"]),
        ]
        return Starlette(routes=routes)

    def _guarded(
        self, handler: Callable[[Request], Awaitable[Response]], open_: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        """`handler` behind the token; without a token only for callers that mean this machine by its own name."""

        async def guarded(request: Request) -> Response:
            try:
                if self._token is None:
                    if request.url.hostname not in self.hosts:
                        raise Refused(
                            403, "unknown_host", f"this server is {' or '.join(self.hosts)}, not what Host says"
                        )
                elif not open_:
                    scheme, _, given = request.headers.get("authorization", "").partition(" ")
                    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), self._token):
                        raise Refused(401, "unauthorized", "give the bearer token of this server")
                return await handler(request)
            except Refused as refused:
                return refused.response()
            except ClientDisconnect:
                return Response(status_code=499)

        return guarded

    # ---- what is asked -----------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "protocol": PROTOCOL})

    async def spec(self, request: Request) -> Response:
        return JSONResponse(
            {
                "id": self.level.id,
                "level": self.level.level,
                "contract": contract_words(self.contract),
                "contract_hash": self.hash,
                "protocol": PROTOCOL,
            }
        )

    async def run(self, request: Request) -> Response:
        body = await self._body(request)
        media_type = request.headers.get("content-type", "")
        if media_type.split(";")[0].strip().lower() not in (JSON_TYPE, PARTS_TYPE):
            raise Refused(415, "media_type", f"send {JSON_TYPE} or {PARTS_TYPE}")
        try:
            tree, parts = unpack(media_type, body)
        except ValueError as error:
            raise Refused(400, "bad_json", f"the body is not readable: {error}") from None
        try:
            asked = RunRequest.model_validate(tree)
        except PydanticError as error:
            said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:8])
            raise Refused(400, "bad_request", said) from None
        self._check_contract(asked)
        missing = [sha for sha in asked.blobs if not self.blobs.has(sha)]
        if missing:
            raise Refused(424, "missing_blobs", f"{len(missing)} blobs are not here; put them first", blobs=missing)
        job = self._job(asked, parts, sha256(body).hexdigest())
        return await self._wait(request, job)

    def _check_contract(self, asked: RunRequest) -> None:
        if asked.contract_hash is not None and asked.contract_hash != self.hash:
            raise Refused(
                409, "contract_mismatch",
                f"the caller's contract is {asked.contract_hash[:12]}, {self.level.level} {self.level.id!r} has {self.hash[:12]}",
                contract_hash=self.hash,
            )  # fmt: skip
        if asked.config_hash is not None and asked.config_hash != self.contract.config_hash:
            raise Refused(
                409, "config_mismatch",
                f"the caller pins configuration {asked.config_hash[:12]}, this server runs {str(self.contract.config_hash)[:12]}",
            )  # fmt: skip

    def _job(self, asked: RunRequest, parts: memoryview, digest: str) -> _Job:
        """The job of this request id, else a new one. Only the event loop's thread comes here."""
        known = self._jobs.get(asked.request_id) if asked.request_id else None
        if known is not None:
            if known.digest != digest:
                raise Refused(409, "request_id_reused", "this request id was used for another request")
            return known
        if self._active >= self.limits.concurrency + self.limits.waiting:
            raise Refused(503, "busy", f"{self._active} runs are under way or waiting; come back later")
        job = _Job(digest)
        self._active += 1
        if asked.request_id:
            self._jobs[asked.request_id] = job
        loop = asyncio.get_running_loop()
        job.future = self._threads.submit(self._work, asked, parts, job.cancel)
        job.future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._finished, asked.request_id, job))
        return job

    def _finished(self, request_id: str | None, job: _Job) -> None:
        self._active -= 1
        if request_id and not job.future.result().keep:
            self._jobs.pop(request_id, None)
        done = [(i, len(j.future.result().body)) for i, j in self._jobs.items() if j.future.done()]
        size = sum(n for _, n in done)
        for at, (old, n) in enumerate(done):
            if len(done) - at <= self.limits.answers and size <= self.limits.answer_bytes:
                break
            del self._jobs[old]
            size -= n

    async def _wait(self, request: Request, job: _Job) -> Response:
        """The job's answer; a job that nobody waits for any longer is cancelled after a short grace for a retry."""
        job.watchers += 1
        try:
            waiter = asyncio.wrap_future(job.future)
            while not (await asyncio.wait({waiter}, timeout=_POLL_S))[0]:
                if await request.is_disconnected():
                    return Response(status_code=499)
            return waiter.result().response()
        finally:
            job.watchers -= 1
            if not job.watchers and not job.future.done():
                asyncio.get_running_loop().call_later(_GRACE_S, job.cancel_if_alone)

    async def cancel(self, request: Request) -> Response:
        job = self._jobs.get(request.path_params["request_id"])
        if job is None:
            raise Refused(404, "unknown_request", "no run has this request id")
        job.cancel.set()
        return JSONResponse({"cancelled": not job.future.done()})

    # ---- blobs -------------------------------------------------------------------------------------------------------

    async def get_blob(self, request: Request) -> Response:
        sha = request.path_params["sha"]
        if not is_sha256(sha) or not self.blobs.has(sha):
            raise Refused(404, "unknown_blob", "there is no such blob here")
        return Response(await run_in_threadpool(self.blobs.get, sha), media_type="application/octet-stream")

    async def put_blob(self, request: Request) -> Response:
        data = await self._body(request)
        if sha256(data).hexdigest() != request.path_params["sha"]:
            raise Refused(422, "bad_blob", "the bytes do not have this hash")
        if self._stored + len(data) > self.limits.store_bytes:
            raise Refused(
                507, "store_full", f"callers have stored {self._stored} bytes; the limit is {self.limits.store_bytes}"
            )
        self._stored += len(data)
        await run_in_threadpool(self.blobs.put, data)
        return Response(status_code=204)

    async def _body(self, request: Request) -> bytes:
        limit = self.limits.body
        declared = request.headers.get("content-length", "")
        pieces: list[bytes] = []
        size = int(declared) if declared.isdigit() else 0
        if size <= limit:
            size = 0
            async for piece in request.stream():
                size += len(piece)
                if size > limit:
                    break
                pieces.append(piece)
        if size > limit:
            raise Refused(413, "too_large", f"the body is larger than the limit of {limit} bytes")
        return b"".join(pieces)

    # ---- running -----------------------------------------------------------------------------------------------------

    def _work(self, asked: RunRequest, parts: memoryview, cancel: threading.Event) -> Answer:
        """Run the level in a worker thread; whatever happens becomes an answer."""
        path = "/".join([*(p.node or p.id for p in asked.place), self.level.id])
        refuse = partial(_refusal, path=path)
        try:
            try:
                inputs = self._inputs(asked, parts)
                options, frame = self._around(asked.options, asked.place, cancel)
            except (PortValueError, MissingInputError, UnexpectedInputError, ConfigError, RecursionError) as error:
                return refuse(422, "bad_inputs", error)
            if cancel.is_set():
                raise AbortRun(f"{path}: the run was cancelled before it began")
            torch = sys.modules.get("torch")
            token = FRAME.set(frame)
            try:
                with torch.no_grad() if torch is not None else nullcontext():
                    outputs = self.level.run(inputs) if frame is not None else self.level.run(inputs, **options)
            finally:
                FRAME.reset(token)
            packed = Packed()
            tree = {"outputs": {k: encode(v, packed, f"outputs.{k}") for k, v in outputs.items()}}
            tree["usage"] = dict(frame.usage) if frame is not None else {}
            media_type, pieces = packed.body(tree)
            body = b"".join(pieces)
            if len(body) > self.limits.body:
                return refuse(
                    500, "answer_too_large", f"the answer has {len(body)} bytes; the limit is {self.limits.body}"
                )
            return Answer(200, media_type, body)
        except (PortValueError, MissingInputError, UnexpectedInputError) as error:
            return refuse(422, "bad_inputs", error)
        except AbortRun as error:
            return refuse(500, "cancelled", error, keep=False)
        except RunTimeoutError as error:
            return refuse(500, "run_timeout", error, keep=False)
        except WGError as error:
            return refuse(500, "execution_failed", error)
        except Exception as error:
            _log.exception("%s failed", path)
            return refuse(500, "internal", f"{type(error).__name__}: {error}")

    def _inputs(self, asked: RunRequest, parts: memoryview) -> dict[str, Any]:
        ports = self.level.port_index.inputs
        values: dict[str, Any] = {}
        for key, value in asked.inputs.items():
            if key not in ports:
                raise UnexpectedInputError(f"{self.level.id} has no input {key!r}; {did_you_mean(key, ports)}")
            values[key] = decode(value, parts, f"inputs.{key}", self.blobs)
        missing = [k for k, p in ports.items() if p.required and k not in values]
        if missing:
            given = ", ".join(map(repr, values)) or "nothing"
            raise MissingInputError(f"{self.level.id} needs {', '.join(map(repr, missing))}; given: {given}")
        check_kinds(self.level.id, ports, values)
        return values

    def _around(
        self, asked: Options, place: list[Place], cancel: threading.Event
    ) -> tuple[dict[str, Any], Frame | None]:
        """The run options, and the caller's frames built again."""
        options: dict[str, Any] = {
            **asked.model_dump(exclude={"timeout_s"}, exclude_none=True),
            "timeout": asked.timeout_s,
            "cancel": cancel,
            "blobs": self.blobs,
        }
        chosen = RunOptions(**options)
        frame: Frame | None = None
        for at in place:
            frame = Frame(at.level, at.id, chosen, frame)
            frame.node_id, frame.iteration, frame.turn = at.node, at.iteration, at.turn
        return options, frame


def _refusal(status: int, code: str, error: Exception | str, *, path: str, keep: bool = True) -> Answer:
    kind = {} if isinstance(error, str) else {"kind": type(error).__name__}
    text = json.dumps({"error": {"code": code, "message": str(error), "path": path, **kind}})
    return Answer(status, JSON_TYPE, text.encode("utf-8"), keep)


def serve(
    level: ExecutableGraph[Any],
    *,
    host: str = "127.0.0.1",
    port: int = 8321,
    token_env: str | None = None,
    blobs: BlobStore | None = None,
    limits: Limits | None = None,
    wrap: Callable[[Any], Any] | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve `level` until the process is told to stop; port 0 takes a free one, `on_ready` is told the address.

    The token is read from the environment variable `token_env`; an address that others can reach needs one.

    Raises: ConfigError, MissingCredentialError, OSError for a port that is taken.
    """
    import uvicorn

    token = read_token(token_env, os.environ) if token_env else None
    if token is None and host not in LOOPBACK:
        raise ConfigError(f"{host} can be reached from elsewhere; name the variable with a token: --token-env NAME")
    app: Any = Server(level, token=token, blobs=blobs, limits=limits).app()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=1024) as listener:
        shown = f"[{host}]" if ":" in host else host
        if on_ready is not None:
            on_ready(f"http://{shown}:{listener.getsockname()[1]}")
        config = uvicorn.Config(
            wrap(app) if wrap is not None else app,
            log_level="warning",
            access_log=False,
            ws="none",
            lifespan="off",
            proxy_headers=False,
            server_header=False,
        )
        uvicorn.Server(config).run(sockets=[listener])
