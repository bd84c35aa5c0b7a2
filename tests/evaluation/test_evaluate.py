"""The evaluation loop with scripted models: what is counted, what is scored, and that all ranks stay in step."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coconut.data import MultimodalCollator, SampleEncoder
from coconut.data.stage_text import build_prompt_template
from coconut.evaluation import evaluate as module
from coconut.evaluation.evaluate import evaluate
from coconut.evaluation.result import EvaluationOptions, EvaluationResult
from coconut.model.tiny import build_word_tokenizer
from coconut.types import ConfigError, DataError, Sample, StageSpec
from coconut.utils.tokenizer import special_token_ids

from .conftest import COCONUT, COT, NO_COT, ListSource

STEPS = ("red up a1", "blue left b2", "red down a2", "blue right b1")  # three words and a line break: four tokens each
TOKENIZER = build_word_tokenizer(
    ["\n", "###", "?", "start", "up", "down", "left", "right", "red", "blue", "a1", "a2", "b1", "b2"]
)
ENCODER = SampleEncoder(TOKENIZER, None, build_prompt_template(TOKENIZER, "plain"), 0)
COLLATOR = MultimodalCollator(TOKENIZER, None, special_token_ids(TOKENIZER)[1])


def puzzles(n: int) -> ListSource:
    return ListSource(
        [Sample(f"k{i}", f"start {'a1' if i % 2 else 'b2'} ?", STEPS, "red" if i % 3 else "blue") for i in range(n)]
    )


class Scripted:
    """Says `answers[call][row]`, or what `speak` makes of a row's prompt; pads with the end-of-sequence id."""

    device = torch.device("cpu")
    latent_ids = special_token_ids(TOKENIZER)
    eos_token_id = TOKENIZER.eos_token_id
    backbone = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=1024))

    def __init__(self, speak: Any) -> None:
        self.speak = speak
        self.calls: list[dict[str, Any]] = []

    def calls_of_thoughts(self, n_latents: int) -> int:
        return n_latents

    def generate(self, **arguments: Any) -> torch.Tensor:
        self.calls.append(arguments)
        rows = [TOKENIZER.encode(self.speak(TOKENIZER.decode(ids))) for ids in arguments["input_ids"]]
        length = max(len(row) for row in rows)
        return torch.tensor([row + [self.eos_token_id] * (length - len(row)) for row in rows])


def ask(model: Scripted, source: ListSource, spec: StageSpec, **options: Any) -> EvaluationResult:
    return evaluate(
        model,  # type: ignore[arg-type]
        source,
        encoder=ENCODER,
        collator=COLLATOR,
        tokenizer=TOKENIZER,
        spec=spec,
        options=EvaluationOptions(**options),
    )


def test_chain_of_thought_takes_19_passes_and_four_thoughts_7() -> None:
    text = "\n".join([*STEPS, "### red<eos>"])
    written = ask(Scripted(lambda prompt: text), puzzles(1), COT).predictions[0]
    assert (written.n_generated, written.n_latents, written.passes) == (19, 0, 19)
    thought = ask(Scripted(lambda prompt: "### red<eos>"), puzzles(1), COCONUT).predictions[0]
    assert (thought.n_generated, thought.n_latents, thought.passes) == (3, 4, 7)


def test_answers_and_whole_texts_are_scored_apart() -> None:
    good, bad_steps = "\n".join([*STEPS, "### blue<eos>"]), "red up a1\n### blue<eos>"
    source = ListSource([dataclasses.replace(s, answer="blue") for s in puzzles(2).samples])
    result = ask(Scripted(lambda prompt: good if "b2" in prompt else bad_steps), source, COT)
    assert [p.correct for p in result.predictions] == [True, True]
    assert [p.full_match for p in result.predictions] == [True, False]
    assert (result.accuracy, result.full_match) == (1.0, 0.5)


@pytest.mark.parametrize(
    "text",
    ["blue<eos>", "### red<eos>", "<eos>", "### blue <|latent|> <eos>", "### red ### red<eos>", "### blue blue blue"],
)
def test_what_is_wrong_is_wrong(text: str) -> None:
    prediction = ask(Scripted(lambda prompt: text), puzzles(1), NO_COT).predictions[0]
    assert not prediction.correct
    assert not prediction.full_match


def test_what_follows_the_end_is_not_read() -> None:
    prediction = ask(Scripted(lambda prompt: "### blue<eos>### red"), puzzles(1), NO_COT).predictions[0]
    assert (prediction.prediction, prediction.correct, prediction.n_generated) == ("### blue", True, 3)


def test_a_text_that_never_ends_counts_all_its_tokens() -> None:
    prediction = ask(Scripted(lambda prompt: "red red red red"), puzzles(1), NO_COT).predictions[0]
    assert (prediction.n_generated, prediction.correct) == (4, False)


def test_generation_is_greedy_and_prompts_are_not_wrapped_again() -> None:
    model = Scripted(lambda prompt: "### red<eos>")
    ask(model, puzzles(1), NO_COT, max_new_tokens=5)
    assert {k: model.calls[0][k] for k in ("do_sample", "wrap_prompt", "max_new_tokens")} == {
        "do_sample": False,
        "wrap_prompt": False,
        "max_new_tokens": 5,
    }


class Broken(ListSource):
    """Every third sample cannot be read."""

    def read(self, index: int) -> Sample:
        if index % 3 == 0:
            raise DataError(f"shard.tar (key k{index}): cut short")
        return super().read(index)


def test_a_sample_that_cannot_be_read_is_wrong_named_and_counted(tmp_path: Path) -> None:
    result = ask(Scripted(lambda prompt: "### red<eos>"), Broken(puzzles(9).samples), NO_COT, batch_size=2)
    summary = result.summary()
    assert (summary["n_samples"], summary["n_failed"], summary["n_correct"]) == (9, 3, 6)
    assert result.accuracy == pytest.approx(6 / 9)
    assert result.predictions[3].error == "shard.tar (key k3): cut short"
    assert summary["mean_forward_passes"] == 3.0  # of those that were asked
    result.save(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(9))


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(DataError, match="empty"):
        ask(Scripted(lambda prompt: ""), puzzles(0), NO_COT)
    with pytest.raises(DataError, match="none of 1 samples"):
        ask(Scripted(lambda prompt: ""), Broken(puzzles(1).samples), NO_COT)


def test_limit_and_batch_size() -> None:
    model = Scripted(lambda prompt: "### red<eos>")
    result = ask(model, puzzles(20), NO_COT, limit=7, batch_size=3)
    assert result.n_samples == 7
    assert [len(call["input_ids"]) for call in model.calls] == [3, 3, 1]


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"limit": 0}, {"max_new_tokens": -1}, {"thoughts": "zero"}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        EvaluationOptions(**options)


class Ranks:
    """Ranks as threads: generate and gathering are barriers, so a rank out of step breaks the test, not only itself."""

    def __init__(self, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = world
        self.local = threading.local()
        self.barrier = threading.Barrier(world)
        self.slots: list[Any] = [None] * world
        for name, replacement in {
            "get_rank": lambda: self.local.rank,
            "get_world_size": lambda: world,
            "is_main_process": lambda: self.local.rank == 0,
            "all_gather_object": self.gather,
        }.items():
            monkeypatch.setattr(module, name, replacement)

    def gather(self, value: Any) -> list[Any]:
        self.slots[self.local.rank] = value
        self.barrier.wait(timeout=10)
        gathered = list(self.slots)
        self.barrier.wait(timeout=10)
        return gathered

    def run(self, n: int, **options: Any) -> list[EvaluationResult]:
        results: list[Any] = [None] * self.world

        def work(rank: int) -> None:
            self.local.rank = rank
            model = Scripted(lambda prompt: "### red<eos>" if "b2" in prompt else "### blue<eos>")
            alone = model.generate

            def generate(**arguments: Any) -> torch.Tensor:
                self.barrier.wait(timeout=10)
                return alone(**arguments)

            model.generate = generate  # type: ignore[method-assign]
            results[rank] = ask(model, puzzles(n), COCONUT, **options)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("n", [1, 7, 12])
def test_any_number_of_ranks_gives_the_same_and_stays_in_step(
    world: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Ranks(1, monkeypatch).run(n, batch_size=2)[0]
    together = Ranks(world, monkeypatch).run(n, batch_size=2)
    for result in together:
        assert result is not None, "a rank was left waiting"
        assert result.predictions == alone.predictions
    assert len({result.seconds for result in together}) == 1
