"""ProsQA's own question: after k thoughts, which nodes does the model hold possible? (arXiv 2412.06769, section 5.)

The model is made to write after k of its thoughts. The next written step begins with the node that the first k steps
led to, so the probability of each name in the place after "Every" is what the thoughts say of it:

    question, k thoughts, "Every"  ->  p(name of each node)  ->  on the path | reached otherwise | not reached

Where statements are terse ("Alex bompus."), a step begins with the name itself.

Shapes: N questions, K thoughts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coconut.evaluation.probe import Study
from coconut.evaluation.thoughts import collate_questions, likelihood, think
from coconut.types import Sample

_FACT = re.compile(r"(?:Every )?(\w+) (?:is a )?(\w+)\.")
_QUESTION = re.compile(r"(?:Is )?(\w+) (?:a )?(\w+) or (\w+)\?$")


@dataclass(frozen=True)
class Graph:
    """A question's graph, by the names of its nodes."""

    kinds: dict[str, tuple[str, ...]]  # of each node, those that it is said to be
    root: str
    options: tuple[str, str]
    path: tuple[str, ...]  # root first, as the sample's steps go
    answer: str
    beginning: str  # of a step, before the name of its node

    def layers(self) -> list[set[str]]:
        """Nodes by the number of edges that a way from the root may have; a node can stand in several."""
        layers = [{self.root}]
        while after := {kind for node in layers[-1] for kind in self.kinds.get(node, ())}:
            layers.append(after)
        return layers

    @property
    def names(self) -> list[str]:
        """Nodes that a step can begin with "Every" for, or lead to: all that are somebody's kind."""
        return sorted({kind for kinds in self.kinds.values() for kind in kinds})


def read_graph(sample: Sample) -> Graph | None:
    """The graph that a question tells in ProsQA's words; None where it is none, or its steps do not follow edges."""
    asked = _QUESTION.search(sample.question)
    facts = _FACT.findall(sample.question)
    steps = [_FACT.fullmatch(step) for step in sample.steps]
    if asked is None or not facts or not steps or not all(steps):
        return None
    kinds: dict[str, tuple[str, ...]] = {}
    for node, kind in facts:
        kinds[node] = (*kinds.get(node, ()), kind)
    root, *options = asked.groups()
    path = [root]
    for step in steps:
        assert step is not None
        if step[1] != path[-1] or step[2] not in kinds.get(step[1], ()):
            return None
        path.append(step[2])
    if _has_cycle(kinds):
        return None
    beginning = "Every " if any(step.startswith("Every ") for step in sample.steps) else ""
    return Graph(kinds, root, (options[0], options[1]), tuple(path), path[-1], beginning)


def _has_cycle(kinds: dict[str, tuple[str, ...]]) -> bool:
    left = {node: set(after) for node, after in kinds.items()}
    while ends := [node for node, after in left.items() if not after & left.keys()]:
        for node in ends:
            del left[node]
    return bool(left)


def frontier(study: Study, limit: int) -> dict[str, Any] | None:
    """Probabilities of the nodes after each number of thoughts.

    Args:
        study: of a model whose checkpoint has one number of thoughts a step.
        limit: questions; each takes a pass for every node and number of thoughts.

    Returns:
        "rows", one for each number of thoughts: mean probability of the path's node, of the other nodes as many edges
        from the root, and of all others, and how often the path's node, or any node so far, is the likeliest;
        "examples": two questions whole. None where the data is not ProsQA.
    """
    graphs = [read_graph(sample) for sample in study.samples[:limit]]
    if any(graph is None for graph in graphs):
        return None
    known = [graph for graph in graphs if graph is not None]
    c_thought = study.loaded.spec.c_thought
    most = min(study.n_thoughts // c_thought, max(len(graph.path) for graph in known) - 2)
    rows, seen = [], {}
    for k in range(1, most + 1):
        # A question of k steps has no written step left after k thoughts.
        chosen = [i for i, graph in enumerate(known) if len(graph.path) - 1 > k]
        found = dict(zip(chosen, _probabilities(study, [known[i] for i in chosen], chosen, k * c_thought), strict=True))
        row = _row(k, [known[i] for i in chosen], [found[i] for i in chosen])
        rows.append({"thoughts": k * c_thought, **row})
        seen[k * c_thought] = found
    if not rows:
        return None
    # Wide graphs have something to choose from: those with the most nodes in reach.
    widest = sorted(seen[c_thought], key=lambda i: (-len(set().union(*known[i].layers())), i))[:2]
    examples = [
        _example(study.samples[i], known[i], {k: found[i] for k, found in seen.items() if i in found}) for i in widest
    ]
    return {"n": len(known), "rows": rows, "examples": examples}


def _probabilities(study: Study, graphs: Sequence[Graph], rows: Sequence[int], n: int) -> list[dict[str, float]]:
    """Of each graph's names, p(name | question, n thoughts, "Every")."""
    spec = dataclasses.replace(study.loaded.spec, n_latents=n, pad_latent_to_max=True)
    encoder, model = study.loaded.encoder, study.model
    found: list[dict[str, float]] = []
    size = max(len(batch.rows) for batch in study.batches)
    for first in range(0, len(rows), size):
        part, known = rows[first : first + size], graphs[first : first + size]
        features = [encoder.with_stage(study.features[row], spec, model.latent_ids) for row in part]
        prompts = collate_questions(features, part, study.loaded.collator, model.latent_token_id)
        memory = think(model, prompts)
        names = [graph.names for graph in known]
        nats: list[list[float]] = [[] for _ in part]
        for number in range(max(map(len, names))):
            # A row with fewer nodes reads its first again, and forgets it.
            told = [own[number] if number < len(own) else own[0] for own in names]
            begun = [len(_ids(study, graph.beginning.rstrip())) for graph in known]
            targets = tuple(tuple(_ids(study, graph.beginning + name)) for graph, name in zip(known, told, strict=True))
            lengths = tuple(len(target) - n for target, n in zip(targets, begun, strict=True))
            values = likelihood(model, memory, dataclasses.replace(prompts, targets=targets, answer_lengths=lengths))
            for row, value in enumerate(values):
                if number < len(names[row]):
                    nats[row].append(value)
        found += [dict(zip(own, map(math.exp, values), strict=True)) for own, values in zip(names, nats, strict=True)]
    return found


def _ids(study: Study, text: str) -> list[int]:
    ids: list[int] = study.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _row(k: int, graphs: Sequence[Graph], found: Sequence[dict[str, float]]) -> dict[str, Any]:
    path = level = other = 0.0
    best_on_path = best_on_level = 0
    sizes = []
    for graph, shares in zip(graphs, found, strict=True):
        right, reached = graph.path[k], graph.layers()[k]
        path += shares[right]
        level += sum(share for name, share in shares.items() if name in reached and name != right)
        other += sum(share for name, share in shares.items() if name not in reached)
        best = max(shares, key=shares.__getitem__)
        best_on_path += best == right
        best_on_level += best in reached
        sizes.append(len(reached))
    n = len(graphs)
    return {
        "n": n,
        "reached": sum(sizes) / n,
        "path": path / n,
        "level": level / n,
        "other": other / n,
        "best_on_path": best_on_path / n,
        "best_on_level": best_on_level / n,
    }


def _example(sample: Sample, graph: Graph, shares: dict[int, dict[str, float]]) -> dict[str, Any]:
    return {
        "key": sample.key,
        "asked": _QUESTION.search(sample.question)[0],  # type: ignore[index]
        "root": graph.root,
        "answer": graph.answer,
        "options": list(graph.options),
        "path": list(graph.path),
        "layers": [sorted(layer) for layer in graph.layers()],
        "kinds": {node: list(kinds) for node, kinds in graph.kinds.items()},
        "shares": {str(k): {name: round(share, 4) for name, share in found.items()} for k, found in shares.items()},
    }
