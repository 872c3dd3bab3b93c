"""Components, orders, cycles."""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st

from wg_core.structure.topology import Edge, components, find_cycle

NODES = [f"n{i}" for i in range(9)]
graphs = st.lists(st.tuples(st.sampled_from(NODES), st.sampled_from(NODES)), max_size=24, unique=True)


def successors(pairs: list[tuple[str, str]]) -> dict[str, list[str]]:
    following: dict[str, list[str]] = {n: [] for n in NODES}
    for a, b in pairs:
        following[a].append(b)
    return following


@given(graphs)
def test_components_equal_those_of_networkx_in_topological_order(pairs: list[tuple[str, str]]) -> None:
    """02 G-29: strongly connected components, then a topological order of the condensation."""
    found = components(NODES, successors(pairs))
    reference = nx.DiGraph(pairs)
    reference.add_nodes_from(NODES)
    assert {frozenset(c) for c in found} == {frozenset(c) for c in nx.strongly_connected_components(reference)}
    place = {n: i for i, members in enumerate(found) for n in members}
    assert all(place[a] <= place[b] for a, b in pairs)


@given(graphs, st.randoms(use_true_random=False))
def test_the_order_of_edges_does_not_matter(pairs: list[tuple[str, str]], random: object) -> None:
    """02 G-29: ties are broken by node order alone."""
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert components(NODES, successors(pairs)) == components(NODES, successors(shuffled))


@given(graphs)
def test_a_cycle_is_found_where_there_is_one(pairs: list[tuple[str, str]]) -> None:
    """02 G-26 CYCLE_FORBIDDEN: the path printed is a real cycle."""
    cycle = find_cycle(NODES, successors(pairs))
    reference = nx.DiGraph(pairs)
    assert (cycle is None) == nx.is_directed_acyclic_graph(reference)
    if cycle is not None:
        assert cycle[0] == cycle[-1]
        assert all(step in pairs for step in pairwise(cycle))


def test_earliest_node_first() -> None:
    """02 G-29: ties broken by node insertion order."""
    assert components(["c", "a", "b"], {"a": ["b"]}) == [["c"], ["a"], ["b"]]


def test_long_chains_need_no_recursion() -> None:
    """02 G-29: iterative algorithms only."""
    nodes = [f"n{i}" for i in range(20_000)]
    following = {a: [b] for a, b in pairwise(nodes)}
    assert len(components(nodes, following)) == 20_000
    following[nodes[-1]] = [nodes[0]]
    assert len(components(nodes, following)) == 1
    assert find_cycle(nodes, following) == [*nodes, nodes[0]]


def test_identity_of_an_edge() -> None:
    """01 F-50: end points and carry; where it came from does not count."""
    assert Edge("a", "y", "b", "x") == Edge("a", "y", "b", "x", origin="auto")
    assert Edge("a", "y", "b", "x") != Edge("a", "y", "b", "x", carry=True)
    assert str(Edge("a", "y", "b", "x", carry=True)) == "a.y ~> b.x"
