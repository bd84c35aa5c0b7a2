"""ProsQA, generated as the paper describes (arXiv 2412.06769, appendix A.2), in the layout of its public files.

    seed --grow_graph--> edges, labels --draw_problem--> the public record (question, steps, answer, graph)
                                                            --recital--> a record that asks to read the question out

A directed graph grows from two roots: node 0, an entity, and node 1. Every node is labelled with the roots it descends
from. The right answer descends from node 0 alone, the wrong one from node 1 alone, so that only following edges
tells them apart. What the appendix leaves open is settled here: all nodes without an incoming edge get names of
entities, the others of concepts; a depth is the longest way from a root; graphs without an answer at least MIN_STEPS
edges away are drawn again, and the answer is one of the nodes at least that far, uniformly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from coconut.types import DataError

N_NODES = 23  # the paper's average
MIN_STEPS = 3
MEAN_PARENTS = 1.5
SPLIT_SIZES = {"train": 17_886, "val": 300, "test": 500}  # the public files'
ENTITIES = (
    "Alex",
    "Bob",
    "Carol",
    "Davis",
    "Eva",
    "Fae",
    "Jack",
    "Max",
    "Oliver",
    "Polly",
    "Rex",
    "Sally",
    "Sam",
    "Stella",
    "Tom",
    "Wren",
)
# None begins with a vowel, so that "a" is always right.
CONCEPTS = (
    "bompus",
    "boompus",
    "brimpus",
    "chorpus",
    "dalpus",
    "dumpus",
    "felpus",
    "fompus",
    "gerpus",
    "gimpus",
    "gorpus",
    "grimpus",
    "gwompus",
    "hilpus",
    "jelpus",
    "jompus",
    "kerpus",
    "lempus",
    "lorpus",
    "lumpus",
    "numpus",
    "quimpus",
    "rempus",
    "rompus",
    "rorpus",
    "scrompus",
    "shumpus",
    "sterpus",
    "storpus",
    "terpus",
    "timpus",
    "tumpus",
    "vumpus",
    "wumpus",
    "worpus",
    "yerpus",
    "yimpus",
    "yumpus",
    "zhorpus",
    "zumpus",
)

Edge = tuple[int, int]  # from a node to one of its kinds


def generate(
    split: str,
    size: int,
    seed: int,
    n_nodes: int = N_NODES,
    n_names: int | None = None,
    even: bool = False,
    terse: bool = False,
    recite: bool = False,
) -> Iterator[dict[str, Any]]:
    """The records of a split, each a function of (seed, split, its number) alone.

    Args:
        split: its name.
        size: records.
        seed: of all.
        n_nodes: nodes of a graph.
        n_names: only so many concepts, and half as many entities, are ever named; None is all. A model that is trained
            from scratch learns sooner to tell few names apart.
        even: the wrong answer is as far below node 1 as the right one may be below node 0. As the paper draws it, it
            is mostly nearer, and the nodes and names right above the two answers tell them apart without a step:
            in 97 % of graphs of 8 nodes, 76 % of 23.
        terse: say an edge with its two names alone, "Alex bompus.": half as many tokens, and what is looked up stands
            right beside where it is found.
        recite: make of each problem one of reading it out, by `recital`.

    Raises:
        DataError: a size or number of nodes that cannot be met.
    """
    if size < 1:
        raise DataError(f"{size} problems in {split}; ask for at least 1")
    n_names = len(CONCEPTS) if n_names is None else n_names
    if not 8 <= n_nodes <= n_names <= len(CONCEPTS):
        most = f"a problem has 8 to {len(CONCEPTS)} nodes, and no fewer names"
        raise DataError(f"{n_nodes} nodes and {n_names} names; {most}")
    if even and n_nodes < 10:
        raise DataError(f"{n_nodes} nodes, and both answers far below a root: such graphs have at least 10")
    names = ENTITIES[: (n_names + 1) // 2], CONCEPTS[:n_names]
    for number in range(size):
        digest = hashlib.sha256(f"prosqa\0{seed}\0{split}\0{number}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:16], "big"))
        problem = draw_problem(rng, n_nodes, *names, even, terse)
        yield recital(rng, problem) if recite else problem


def grow_graph(rng: np.random.Generator, n_nodes: int) -> tuple[list[Edge], list[int]]:
    """Algorithm 1 of the appendix.

    Returns:
        the edges, and each node's label: bit 1 descends from node 0, bit 2 from node 1.
    """
    edges: list[Edge] = []
    labels, depths = [1, 2], [0, 0]
    # All at once: a draw by itself takes numpy longer than everything else that a node needs.
    n_parents, draws = rng.poisson(MEAN_PARENTS, n_nodes).tolist(), rng.random(n_nodes).tolist()
    waits = rng.standard_exponential((n_nodes, n_nodes)).tolist()
    for node in range(2, n_nodes):
        # A third of the nodes must stay off node 1's side, a third off node 0's; the rest may mix both.
        allowed = {0, 1} if draws[node] <= 0.35 else {0, 2} if draws[node] <= 0.7 else {0, 1, 2, 3}
        # Whoever waits shortest, at a rate of its weight (Efraimidis and Spirakis 2006): a weighted choice without
        # replacement. Deep nodes first: longer chains.
        wait = {
            other: waits[node][other] / (depths[other] * 1.5 + 1) for other in range(node) if labels[other] in allowed
        }
        parents = sorted(wait, key=wait.__getitem__)[: n_parents[node]]
        edges += [(parent, node) for parent in parents]
        label = 0
        for parent in parents:
            label |= labels[parent]
        labels.append(label)
        depths.append(1 + max(depths[parent] for parent in parents) if parents else 0)
    return edges, labels


def draw_problem(
    rng: np.random.Generator,
    n_nodes: int,
    entities: tuple[str, ...] = ENTITIES,
    concepts: tuple[str, ...] = CONCEPTS,
    even: bool = False,
    terse: bool = False,
) -> dict[str, Any]:
    """One problem with the fields of the public files: question, steps, answer, idx_to_symbol, edges, root, target,
    neg_target."""
    while True:
        edges, labels = grow_graph(rng, n_nodes)
        paths = shortest_paths(edges, 0)
        far = [node for node, path in paths.items() if labels[node] == 1 and len(path) > MIN_STEPS]
        wrong = [node for node in range(2, n_nodes) if labels[node] == 2]
        if even and far:
            below = shortest_paths(edges, 1)
            wrong = [node for node in wrong if len(below[node]) > MIN_STEPS]
        n_roots = n_nodes - len({end for _, end in edges})
        if far and wrong and n_roots <= len(entities):
            break
    target, neg_target = int(rng.choice(far)), int(rng.choice(wrong))
    kinds = {end for _, end in edges}
    drawn = iter(rng.permutation(entities)), iter(rng.permutation(concepts))
    names = [str(next(drawn[node in kinds])) for node in range(n_nodes)]
    said = [_statement(names, edge, kinds, terse) for edge in edges]
    either = [names[target], names[neg_target]]
    rng.shuffle(said)
    rng.shuffle(either)
    path = paths[target]
    asked = f"{names[0]} {either[0]} or {either[1]}?" if terse else f"Is {names[0]} a {either[0]} or {either[1]}?"
    return {
        "question": f"{' '.join(said)} {asked}",
        "steps": [_statement(names, edge, kinds, terse) for edge in pairwise(path)],
        "answer": _statement(names, (0, target), kinds, terse),
        "idx_to_symbol": names,
        "edges": [list(edge) for edge in edges],
        "root": 0,
        "target": target,
        "neg_target": neg_target,
    }


def shortest_paths(edges: list[Edge], root: int) -> dict[int, list[int]]:
    """A shortest path from the root to each node that can be reached, both ends included."""
    children: dict[int, list[int]] = {}
    for start, end in edges:
        children.setdefault(start, []).append(end)
    paths, queue = {root: [root]}, [root]
    for node in queue:
        for child in children.get(node, []):
            if child not in paths:
                paths[child] = [*paths[node], child]
                queue.append(child)
    return paths


def closing_question(question: str) -> str:
    """``Is Tom a lempus or scrompus?`` of a whole question: all that is asked where a picture shows the graph."""
    return question.rpartition(". ")[2]


def recital(rng: np.random.Generator, problem: dict[str, Any]) -> dict[str, Any]:
    """A problem's statements as a question, and once more in another order as its steps and, the last, its answer.

    A decoder with random weights learns from it to find in its context what follows a name, which a pretrained one
    comes with. Nothing is asked of the graph.
    """
    question = problem["question"].removesuffix(closing_question(problem["question"])).rstrip()
    said = [f"{words}." for words in question.removesuffix(".").split(". ")]
    rng.shuffle(said)
    return {"question": question, "steps": said[:-1], "answer": said[-1]}


def _statement(names: list[str], edge: Edge, kinds: set[int], terse: bool) -> str:
    start, end = edge
    if terse:
        return f"{names[start]} {names[end]}."
    return f"{'Every ' if start in kinds else ''}{names[start]} is a {names[end]}."
