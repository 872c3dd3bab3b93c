"""Where the time of a run goes: a profiler's file, and the seconds of its nodes."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from wg_core.errors import ConfigError, ProfilerBusyError
from wg_core.execution.context import Event
from wg_core.state.files import make_folder, write_file
from wg_core.state.home import home
from wg_core.structure.ids import safe_path

KINDS = ("cpu", "torch")
Asked = bool | str | Mapping[str, Any] | None
_at_work = threading.Lock()


@dataclass(slots=True)
class NodeTime:
    """How often a node, tool or stage was called, its seconds in all, and those that nothing below it took."""

    path: str
    calls: int = 0
    seconds: float = 0.0
    own: float = 0.0


@dataclass(slots=True)
class Profile:
    """Profiles what runs in this thread within `with`; as a hook of a run it adds up the seconds of its nodes.

    `cpu` is Python's own cProfile, `torch` PyTorch's profiler with the operators of the CPU and of a GPU that is there.
    What runs changes nothing but its time. Threads beside this one are not looked into: a call of a model behind an API
    shows as waiting.

    Raises: ConfigError for another kind; at `with` ProfilerBusyError where one is at work already.
    """

    kinds: ClassVar[tuple[str, ...]] = ("node_end", "tool_end", "stage_end")

    kind: str = "cpu"
    nodes: dict[str, NodeTime] = field(default_factory=dict[str, NodeTime])
    seconds: float = 0.0
    _profiler: Any = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"profile is one of {', '.join(KINDS)}, not {self.kind!r}")

    def __call__(self, event: Event) -> None:
        """Add the end of a node, tool or stage."""
        took, place = event.elapsed or 0.0, self._at(event.path)
        place.calls += 1
        place.seconds += took
        place.own += took
        above, _, _ = event.path.rpartition("/")
        around = f"{above}/{event.data['agent']}" if "agent" in event.data else above
        self._at(around).own -= took

    def _at(self, path: str) -> NodeTime:
        return self.nodes.setdefault(path, NodeTime(path))

    def table(self) -> list[NodeTime]:
        """All that ended, what took the most by itself first; own seconds add up to the seconds of the outermost."""
        ended = [node for node in self.nodes.values() if node.calls]
        return sorted(ended, key=lambda node: (-node.own, node.path))

    def __enter__(self) -> Self:
        if sys.getprofile() is not None or not _at_work.acquire(blocking=False):
            raise ProfilerBusyError("another profiler is at work in this process; end it first, they do not nest")
        try:
            if self.kind == "torch":
                from torch.profiler import profile

                self._profiler = profile()
                self._profiler.__enter__()
            else:
                from cProfile import Profile as CProfile

                self._profiler = CProfile()
                self._profiler.enable()
        except BaseException:
            _at_work.release()
            raise
        self.seconds = -time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter()
        try:
            if self.kind == "torch":
                self._profiler.__exit__(*error)
            else:
                self._profiler.disable()
        finally:
            _at_work.release()

    def write(self, folder: Path, name: str) -> Path:
        """Write the profiler's file: `name.prof` (for `pstats`), or `name.trace.json` (for Perfetto); gives its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}{'.trace.json' if self.kind == 'torch' else '.prof'}"
        if self.kind == "torch":
            self._profiler.export_chrome_trace(str(path))
        else:
            self._profiler.dump_stats(path)
        return path


@contextmanager
def profiled(asked: Asked, level_id: str, options: Mapping[str, Any]) -> Generator[dict[str, Any]]:
    """Profile a run as its option `profile` asks, and write the profiler's file `run` and the table `run.nodes.json`.

    Gives the options to run with. `asked` is a kind, True for `cpu`, or `{kind?, out?}`, where `out` is the folder, by
    default `profiles/` and the id of the level in the engine's home; files of an earlier run are written over, and a run
    that fails leaves none.

    Raises: ConfigError, ProfilerBusyError.
    """
    if not asked:
        yield dict(options)
        return
    given: dict[str, Any] = {"kind": asked} if isinstance(asked, str) else {} if asked is True else dict(cast(Any, asked))
    if not given.keys() <= {"kind", "out"}:
        raise ConfigError(f"profile is True, a kind, or {{kind, out}}, not {', '.join(map(repr, given))}")
    with Profile(given.get("kind", "cpu")) as found:
        yield {**options, "callbacks": (*options.get("callbacks", ()), found)}
    folder = Path(given["out"]) if "out" in given else safe_path(home(), "profiles", level_id)
    make_folder(folder)
    found.write(folder, "run")
    write_file(folder / "run.nodes.json", json.dumps([*map(asdict, found.table())], indent=1).encode())
