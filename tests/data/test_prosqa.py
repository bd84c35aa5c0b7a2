"""Generated ProsQA: each answer follows from the graph, the wrong one does not, and the same seed gives the same."""

from __future__ import annotations

import io
import itertools

import pytest
from PIL import Image

from coconut.data.prosqa import CONCEPTS, ENTITIES, MIN_STEPS, closing_question, generate, shortest_paths
from coconut.data.prosqa_picture import draw_graph
from coconut.types import DataError


@pytest.fixture(scope="module")
def records():
    return list(generate("train", 200, seed=0))


def test_the_answer_follows_and_the_other_does_not(records) -> None:
    for record in records:
        paths = shortest_paths([tuple(edge) for edge in record["edges"]], record["root"])
        names = record["idx_to_symbol"]
        assert record["neg_target"] not in paths
        assert len(record["steps"]) == len(paths[record["target"]]) - 1 >= MIN_STEPS
        assert record["answer"] == f"{names[0]} is a {names[record['target']]}."
        statements = record["question"].split(". ")
        assert all(step.rstrip(".") in statements for step in record["steps"])
        assert len(statements) == len(record["edges"]) + 1
        assert len(set(names)) == len(names) == 23


def test_steps_are_a_chain_from_the_entity_to_the_answer(records) -> None:
    for record in records:
        words = [step.rstrip(".").removeprefix("Every ").split(" is a ") for step in record["steps"]]
        assert words[0][0] == record["idx_to_symbol"][0]
        assert all(before[1] == after[0] for before, after in itertools.pairwise(words))
        assert words[-1][1] == record["idx_to_symbol"][record["target"]]


def test_the_order_of_the_choices_tells_nothing(records) -> None:
    first = [
        record["idx_to_symbol"][record["target"]] in closing_question(record["question"]).split(" or ")[0]
        for record in records
    ]
    assert 70 < sum(first) < 130


def test_the_same_seed_gives_the_same_and_a_longer_split_only_adds(records) -> None:
    assert list(generate("train", 5, seed=0)) == records[:5]
    assert next(generate("train", 1, seed=1)) != records[0]
    assert next(generate("test", 1, seed=0)) != records[0]


def test_pictures_are_the_same_bytes_and_show_every_node(records) -> None:
    content = draw_graph(records[0])
    assert content == draw_graph(records[0])
    image = Image.open(io.BytesIO(content))
    assert image.width == 1120
    assert len(image.convert("RGB").getcolors(2**20)) > 20


@pytest.mark.parametrize(("size", "nodes"), [(0, 23), (1, 7), (1, 99)])
def test_what_cannot_be_made_is_said(size: int, nodes: int) -> None:
    with pytest.raises(DataError, match=r"ask for at least 1|a problem has 8 to 40 nodes"):
        list(generate("train", size, 0, nodes))


def test_few_names_are_used_where_few_are_asked_for() -> None:
    few = list(generate("train", 40, seed=0, n_nodes=8, n_names=12))
    used = {name for record in few for name in record["idx_to_symbol"]}
    assert used <= set(CONCEPTS[:12]) | set(ENTITIES[:6])
    assert len(used) > 12
    with pytest.raises(DataError, match="12 nodes and 10 names"):
        next(generate("train", 1, seed=0, n_nodes=12, n_names=10))


def test_an_even_problem_is_not_told_by_what_stands_right_above_the_answers() -> None:
    def depth_of_wrong(record) -> int:
        return len(shortest_paths([tuple(edge) for edge in record["edges"]], 1)[record["neg_target"]]) - 1

    def below_names(record, node: int) -> int:
        return sum(end == node and record["idx_to_symbol"][start] in ENTITIES for start, end in record["edges"])

    def told(records) -> float:  # how often the answer is the one below fewer names
        gaps = [below_names(r, r["neg_target"]) - below_names(r, r["target"]) for r in records]
        return sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / len(gaps)

    even = list(generate("train", 100, seed=0, n_nodes=12, n_names=12, even=True))
    assert min(map(depth_of_wrong, even)) == MIN_STEPS
    assert 0.4 < told(even) < 0.6
    assert told(list(generate("train", 100, seed=0, n_nodes=12, n_names=12))) > 0.75
    with pytest.raises(DataError, match="at least 10"):
        next(generate("train", 1, seed=0, n_nodes=9, even=True))


def test_terse_problems_are_the_same_problems() -> None:
    def shorten(text: str) -> str:
        return text.replace("Every ", "").replace("Is ", "").replace(" is a ", " ").replace(" a ", " ")

    both = (generate("val", 20, 0, 12, even=True, terse=terse) for terse in (False, True))
    for long, short in zip(*both, strict=True):
        assert short != long
        assert short == {
            **long,
            "question": shorten(long["question"]),
            "steps": [shorten(step) for step in long["steps"]],
            "answer": shorten(long["answer"]),
        }


@pytest.mark.parametrize("terse", [False, True])
def test_a_recital_says_every_statement_once_more_in_another_order(terse: bool) -> None:
    orders = 0
    for record in generate("train", 20, 0, 12, terse=terse, recite=True):
        told = [f"{words}." for words in record["question"].rstrip(".").split(". ")]
        said = [*record["steps"], record["answer"]]
        assert sorted(told) == sorted(said)
        assert "?" not in record["question"]
        orders += told != said
    assert orders == 20
