"""A writer for the process tests, run as a program: in a loop, in a race, holding a lease, dying at a chosen line."""

import os
import signal
import sys
from pathlib import Path

from wg_core.errors import SnapshotConflictError, StaleOwnerError
from wg_core.state.content import WorldContent, apply
from wg_core.state.state import State
from wg_core.state.store import Snapshot, SnapshotStore


def full_state(blobs, step: int, who: str = "") -> State:
    sha = blobs.put(f"picture {step} {who}".encode())
    return State.of(
        {
            1: {"text": f"go on to {step}"},
            2: {"requests": [{"id": "r", "slot": "images", "maker": "draw"}]},
            3: {"images": [{"id": sha, "media_type": "image/png"}]},
            4: {"items": [{"artifact_id": sha, "text": "a shore", "facts": {"land": 0.5}}]},
            5: {
                "narrative": f"step {step} happened {who}",
                "changes": [{"op": "add", "kind": "entity", "id": f"e{step}", "fields": {"n": step}}],
            },
        }
    )


def next_snapshot(store: SnapshotStore, world: str, who: str = "") -> Snapshot:
    """The step after the head, its blobs stored, not yet published."""
    head = store.head(world)
    step = head.step + 1 if head else 0
    seed = {"style": "plain", "characters": [{"id": "mara"}]}
    content = store.content(head) if head else WorldContent.from_seed(seed)
    state = full_state(store.blobs, step, who)
    root = apply(content, state, step=step, made_by=f"{world}/world_update").save(store.blobs)
    carried = State.of({b: state.get(b) for b in (1, 2, 3)})
    return Snapshot(
        world_id=world,
        step=step,
        parent=head.id if head else None,
        given=state,
        applied=state,
        carried=carried,
        content=root,
        seed=step,
        run={"who": who},
    )


def publish_next(store: SnapshotStore, world: str, who: str) -> int:
    epoch = store.acquire(world, who)
    step = store.publish(next_snapshot(store, world), epoch=epoch).step
    store.release(world, who, epoch)
    return step


def step_and_die(store: SnapshotStore, world: str, lines: int) -> None:
    """One step in a child process that kills itself at its `lines`-th executed line of file handling."""
    seen = 0
    watched = ("state/files.py", "state/lease.py", "state/blobs.py", "state/store.py")

    def trace(frame, event, arg):
        nonlocal seen
        if not frame.f_code.co_filename.endswith(watched) and frame.f_code.co_name != "write_bytes":
            return None
        seen += event == "line"
        if seen >= lines:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    publish_next(store, world, "mortal")
    os._exit(0)


def die_everywhere(store: SnapshotStore, stride: int) -> None:
    """Kill a writer at every `stride`-th line of a step, each in a world of its own, where the next goes on."""
    deaths = 0
    while True:
        world = f"w{deaths}"
        publish_next(store, world, "first")
        child = os.fork()
        if not child:
            step_and_die(store, world, 1 + deaths * stride)
        status = os.waitpid(child, 0)[1]
        faults, steps = store.verify(world), store.steps(world)
        heir = publish_next(store, world, "heir")
        if faults or steps not in ([0], [0, 1]) or heir != len(steps) or store.verify(world):
            print("broken", deaths, faults, steps, heir, store.verify(world), flush=True)
            return
        if not os.WIFSIGNALED(status):
            print("whole", deaths, os.waitstatus_to_exitcode(status), flush=True)
            return
        deaths += 1


def main(root: str, world: str, mode: str, who: str) -> None:
    store = SnapshotStore(Path(root))
    if mode == "loop":
        while True:
            print(publish_next(store, world, who), flush=True)
    if mode == "die":
        die_everywhere(store, int(who))
    if mode == "hold":
        print(store.acquire(world, who), flush=True)
        sys.stdin.readline()
    if mode == "race":  # the lease's epoch is in `who`: both racers hold it, the head decides
        name, _, epoch = who.partition(":")
        snapshot = next_snapshot(store, world, name)
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            print("won", store.publish(snapshot, epoch=int(epoch)).id, flush=True)
        except (SnapshotConflictError, StaleOwnerError) as error:
            print("lost", type(error).__name__, flush=True)
    if mode == "stale":  # takes the lease, is stopped, and publishes when it goes on
        epoch = store.acquire(world, who, ttl_s=0.05)
        snapshot = next_snapshot(store, world, who)
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            print("won", store.publish(snapshot, epoch=epoch).id, flush=True)
        except (SnapshotConflictError, StaleOwnerError) as error:
            print("lost", type(error).__name__, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
