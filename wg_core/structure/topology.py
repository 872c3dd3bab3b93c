"""Edges, strongly connected components, orders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush


@dataclass(frozen=True, slots=True)
class Edge:
    """One output joined to one input; identity is the end points and `carry`.

    A `carry` edge brings the value of the previous loop iteration. `origin` is "manual" or "auto".
    """

    source_node: str
    source_port: str
    target_node: str
    target_port: str
    carry: bool = False
    origin: str = field(default="manual", compare=False)

    def __str__(self) -> str:
        arrow = "~>" if self.carry else "->"
        return f"{self.source_node}.{self.source_port} {arrow} {self.target_node}.{self.target_port}"


def components(nodes: Sequence[str], successors: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Strongly connected components in topological order of the condensation (Tarjan 1972, without recursion).

    Members keep the order of `nodes`, and among components that could come next the one with the earliest node comes first.
    """
    position = {node: i for i, node in enumerate(nodes)}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    on_stack: set[str] = set()
    stack: list[str] = []
    member_of: dict[str, int] = {}
    found: list[list[str]] = []
    for root in nodes:
        if root in index:
            continue
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        work = [(root, iter(successors.get(root, ())))]
        while work:
            node, following = work[-1]
            for succ in following:
                if succ not in index:
                    index[succ] = low[succ] = len(index)
                    stack.append(succ)
                    on_stack.add(succ)
                    work.append((succ, iter(successors.get(succ, ()))))
                    break
                if succ in on_stack and index[succ] < low[node]:
                    low[node] = index[succ]
            else:
                work.pop()
                if work and low[node] < low[work[-1][0]]:
                    low[work[-1][0]] = low[node]
                if low[node] == index[node]:
                    members: list[str] = []
                    while True:
                        member = stack.pop()
                        on_stack.discard(member)
                        member_of[member] = len(found)
                        members.append(member)
                        if member == node:
                            break
                    found.append(sorted(members, key=position.__getitem__))
    following_components: list[set[int]] = [set() for _ in found]
    waiting = [0] * len(found)
    for node in nodes:
        mine = member_of[node]
        for succ in successors.get(node, ()):
            other = member_of[succ]
            if other != mine and other not in following_components[mine]:
                following_components[mine].add(other)
                waiting[other] += 1
    ready = [(position[found[i][0]], i) for i in range(len(found)) if not waiting[i]]
    heapify(ready)
    ordered: list[list[str]] = []
    while ready:
        _, i = heappop(ready)
        ordered.append(found[i])
        for other in following_components[i]:
            waiting[other] -= 1
            if not waiting[other]:
                heappush(ready, (position[found[other][0]], other))
    return ordered


def find_cycle(nodes: Sequence[str], successors: Mapping[str, Iterable[str]]) -> list[str] | None:
    """One cycle as a path that ends where it began, or None."""
    done: set[str] = set()
    for root in nodes:
        if root in done:
            continue
        path = [root]
        on_path = {root}
        work = [iter(successors.get(root, ()))]
        while work:
            for succ in work[-1]:
                if succ in on_path:
                    return [*path[path.index(succ) :], succ]
                if succ not in done:
                    path.append(succ)
                    on_path.add(succ)
                    work.append(iter(successors.get(succ, ())))
                    break
            else:
                work.pop()
                node = path.pop()
                on_path.discard(node)
                done.add(node)
    return None
