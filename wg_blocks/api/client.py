"""One call to a provider: its deadline, attempts and pauses, a place in the queue, and the way out when a run stops."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from wg_blocks.api.providers import Fault, Provider, Tell
from wg_core.errors import ApiTimeoutError
from wg_core.execution.context import Frame, check_stop

T = TypeVar("T")

MAX_PAUSE_S = 60.0  # a longer wish of the server (Retry-After) is not waited for
FIRST_PAUSE_S = 0.5
LONGEST_BACKOFF_S = 8.0
PIECES_AHEAD = 4  # of a stream, that nobody has asked for yet
_LOOK_S = 0.05

max_response_bytes: ContextVar[int] = ContextVar("max_response_bytes", default=8 << 20)
"""How large an answer may be; providers read it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`timeout_s` is for one answer: all attempts and pauses together, once it is its turn."""

    timeout_s: float
    max_retries: int
    max_concurrent_requests: int
    max_response_bytes: int


class Client:
    """Calls of one endpoint. At most as many run at once as the caller allows; when the provider asks to wait, all do."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self._running = 0
        self._free: asyncio.Condition | None = None
        self._quiet_until = 0.0
        self._streams: set[Future[None]] = set()

    def call(
        self, what: str, attempt: Callable[[Provider], Awaitable[T]], limits: Limits, frame: Frame | None = None
    ) -> T:
        """What one good attempt gives; failed ones that may be tried again are.

        Raises: the error of the last attempt, ApiTimeoutError, and AbortRun or RunTimeoutError where the run stops.
        """
        return _wait(self._answer(what, attempt, limits), frame)

    def pieces(
        self, what: str, attempt: Callable[[Provider, Tell], Awaitable[T]], limits: Limits, frame: Frame | None = None
    ) -> Generator[str, None, T]:
        """What `call` gives, with the pieces that `attempt` tells on the way; closing it ends the request.

        Nothing is tried again once a piece was told. A reader that takes its time holds the request back, not its
        deadline. Raises: what `call` raises.
        """
        ahead: asyncio.Queue[_Told[T]] = asyncio.Queue(PIECES_AHEAD)

        async def work() -> None:
            try:
                end = _Told(value=await self._answer(what, attempt, limits, ahead))
            except Exception as error:
                end = _Told[T](error=error)
            await ahead.put(end)

        working = asyncio.run_coroutine_threadsafe(work(), _calls.get())
        self._streams.add(working)  # a loop holds its tasks weakly
        working.add_done_callback(self._streams.discard)
        try:
            while True:
                told = _wait(ahead.get(), frame)
                if told.error is not None:
                    raise told.error
                if told.piece is None:
                    return cast(T, told.value)
                yield told.piece
        finally:
            working.cancel()

    async def _answer(
        self,
        what: str,
        attempt: Callable[..., Awaitable[T]],
        limits: Limits,
        ahead: asyncio.Queue[_Told[T]] | None = None,
    ) -> T:
        max_response_bytes.set(limits.max_response_bytes)
        async with self._turn(limits.max_concurrent_requests):
            ends = time.monotonic() + limits.timeout_s
            failure: Exception = ApiTimeoutError(f"{what}: no attempt was made")
            said, told = "", None
            for left in range(limits.max_retries, -1, -1):
                try:
                    async with asyncio.timeout_at(asyncio.get_running_loop().time() + ends - time.monotonic()) as scope:
                        await asyncio.sleep(max(0.0, self._quiet_until - time.monotonic()))
                        told = None if ahead is None else _Teller(ahead, scope)
                        try:
                            return await (attempt(self.provider) if told is None else attempt(self.provider, told))
                        except BaseException as error:
                            _let_go(error)
                            raise
                except TimeoutError:
                    last = f" (before that: {said})" if said else ""
                    failure = ApiTimeoutError(
                        f"{what}: no whole answer within {limits.timeout_s:g} s{last}; raise timeout_s or ask for less"
                    )
                    break
                except Fault as fault:
                    failure, said = fault.error, str(fault.error)
                    back_off = min(LONGEST_BACKOFF_S, FIRST_PAUSE_S * 2 ** (limits.max_retries - left))
                    pause = fault.wait if fault.wait is not None else back_off * random.uniform(0.75, 1)
                    if fault.wait is not None and fault.wait <= MAX_PAUSE_S:
                        self._quiet_until = max(self._quiet_until, time.monotonic() + fault.wait)
                    if (
                        not fault.again
                        or not left
                        or (told is not None and told.began)
                        or pause > min(MAX_PAUSE_S, ends - time.monotonic())
                    ):
                        break
                await asyncio.sleep(pause)
        raise failure

    @asynccontextmanager
    async def _turn(self, at_most: int) -> AsyncGenerator[None]:
        if self._free is None:
            self._free = asyncio.Condition()
        async with self._free:
            await self._free.wait_for(lambda: self._running < at_most)
            self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            async with self._free:
                self._free.notify_all()

    def close(self) -> None:
        """Close connections."""
        _wait(self.provider.close(), None)


def _let_go(error: BaseException | None) -> None:
    """Let go of what a failed attempt held, here, in the thread of its loop.

    An error keeps the frames that it went through, and these the half-read streams of the client library. Left to the
    garbage collector of another thread, one such stream may be closed by both threads at once.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@dataclass(frozen=True)
class _Told(Generic[T]):
    """A piece, or the end: a value or an error."""

    piece: str | None = None
    value: T | None = None
    error: Exception | None = None


class _Teller:
    """Hands pieces on; while the reader is behind, the deadline of the attempt waits too."""

    def __init__(self, ahead: asyncio.Queue[Any], scope: asyncio.Timeout) -> None:
        self._ahead = ahead
        self._scope = scope
        self.began = False

    async def __call__(self, piece: str) -> None:
        self.began = True
        when = self._scope.when()
        if not self._ahead.full() or when is None:
            await self._ahead.put(_Told(piece))
            return
        loop = asyncio.get_running_loop()
        left = when - loop.time()
        self._scope.reschedule(None)
        await self._ahead.put(_Told(piece))
        self._scope.reschedule(loop.time() + left)


# ---- the thread that all calls run in: cancelling a task there ends its request at once


class _Loop:
    """An event loop in a thread of its own, made at the first call and anew in a forked process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="wg-api", daemon=True).start()
            return self._loop


_calls = _Loop()


def _after_fork() -> None:
    global _calls
    _calls = _Loop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _wait(work: Coroutine[Any, Any, T], frame: Frame | None) -> T:
    future = asyncio.run_coroutine_threadsafe(work, _calls.get())
    stoppable = frame is not None and (frame.options.cancel is not None or frame.deadline is not None)
    try:
        while True:
            try:
                return future.result(_LOOK_S if stoppable else None)
            except NotYet:
                if future.done():
                    raise
                if frame is not None:
                    check_stop(frame)
    except BaseException:
        future.cancel()
        raise
