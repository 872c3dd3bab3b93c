"""The page: Dagster's webserver and daemon on this project."""

import logging
import os
import signal
import sys
from pathlib import Path

import dagster as dg

from wg_core.errors import WGError
from wg_defs.instance import dagster_home, open_instance, prepare, reap
from wg_defs.step import last_step
from wg_defs.worlds import read_worlds

log = logging.getLogger("wg_defs")

WORKSPACE = "load_from:\n  - python_module:\n      module_name: wg_defs.definitions\n      location_name: wg\n"


def main(port: int = 3000, host: str = "127.0.0.1") -> None:
    """Replace this process by `dagster dev` on the working folder's worlds; Ctrl-C or SIGTERM ends it and its children.

    Runs that were killed are closed first, and every world gets the key of its next step.
    """
    folder = dagster_home()
    os.environ["DAGSTER_HOME"] = str(folder)
    os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")
    with open_instance() as instance:
        make_ready(instance)
    for number in (signal.SIGINT, signal.SIGTERM):  # a background job of a script starts with these ignored
        signal.signal(number, signal.SIG_DFL)
    command = ["-m", "dagster", "dev", "-w", str(_workspace(folder)), "-h", host, "-p", str(port)]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *command])


def make_ready(instance: dg.DagsterInstance) -> None:
    """Close what killed runs left open, and give every world its limit and the key of its next step."""
    from wg_core.levels.world import World

    for run_id in reap(instance):
        log.warning("closed run %s, whose process was killed", run_id)
    for file in read_worlds()[0]:
        try:
            world = World.from_yaml(file.path)
        except WGError as error:
            log.warning("world %s cannot run yet: %s", file.world_id, error)
            continue
        prepare(instance, file.world_id, last_step(world))


def _workspace(folder: Path) -> Path:
    if Path("workspace.yaml").is_file():
        return Path("workspace.yaml").resolve()
    file = folder / "workspace.yaml"
    file.write_text(WORKSPACE, encoding="utf-8")
    return file


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:2]))
