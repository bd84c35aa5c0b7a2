"""The search of a ProsQA graph, read from a real (random) text model's thoughts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coconut.data.converters.textual import prosqa as to_samples
from coconut.data.prosqa import generate
from coconut.data.stage_text import build_prompt_template, stage_spec
from coconut.evaluation.figures import LIGHT_WIDE
from coconut.evaluation.figures_probe import draw_frontier
from coconut.evaluation.loaded import load
from coconut.evaluation.probe import Study
from coconut.evaluation.probe_graph import frontier, read_graph
from coconut.evaluation.probe_run import probe_checkpoint
from coconut.evaluation.result import EvaluationOptions
from coconut.evaluation.run import plan_jobs
from coconut.model import MultimodalCoconut
from coconut.model.tiny import build_bpe_tokenizer, build_tiny_causal, save_tiny
from coconut.types import Sample
from coconut.utils.tokenizer import load_tokenizer, special_token_ids

from .conftest import ListSource


@pytest.fixture(scope="module", params=[False, True], ids=["in the paper's words", "terse"])
def samples(request: pytest.FixtureRequest) -> list[Sample]:
    rows = ((f"row {i}", row) for i, row in enumerate(generate("test", 12, seed=0, n_nodes=12, terse=request.param)))
    return list(to_samples(rows, "test", picture=False))


@pytest.fixture(scope="module")
def checkpoint(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("prosqa")
    texts = [text for s in samples for text in (s.question, *s.steps, f"### {s.answer}\n")]
    base_tokenizer = build_bpe_tokenizer(texts)
    save_tiny(build_tiny_causal("qwen2", base_tokenizer, seed=0), base_tokenizer, folder / "base")
    model, tokenizer = MultimodalCoconut.from_pretrained(folder / "base"), load_tokenizer(folder / "base")
    model.prompt_template = build_prompt_template(tokenizer, "plain")
    model.stage_spec = stage_spec(3, c_thought=1, pad_latent_to_max=True)
    model.save_pretrained(folder / "stage_3")
    tokenizer.save_pretrained(folder / "stage_3")
    return folder / "stage_3"


def test_a_graph_is_read_from_its_words(samples: list[Sample]) -> None:
    for sample in samples:
        graph = read_graph(sample)
        assert graph is not None
        assert graph.answer in graph.options
        assert all(node in layer for node, layer in zip(graph.path, graph.layers(), strict=False))
        assert len(graph.path) == len(sample.steps) + 1
    assert read_graph(replace(samples[0], steps=("Tom is a cat.",))) is None
    assert read_graph(replace(samples[0], question="What is it?")) is None
    circle = "Tom is a cat. Every cat is a dog. Every dog is a cat. Is Tom a dog or cow?"
    assert read_graph(Sample("c", circle, ("Tom is a cat.", "Every cat is a dog."), "Tom is a dog.")) is None


def test_the_search_is_what_a_plain_forward_pass_gives(samples: list[Sample], checkpoint: Path) -> None:
    """p(name) after k thoughts, batched and from the cache, against one question alone with the text written out."""
    study = Study(load(checkpoint), ListSource(samples), limit=None, batch_size=5, max_new_tokens=4, seed=0)
    found = frontier(study, limit=12)
    assert found is not None
    example = found["examples"][0]
    sample = next(s for s in samples if s.key == example["key"])
    _, latent, _ = special_token_ids(study.tokenizer)
    for k, shares in example["shares"].items():
        spec = stage_spec(int(k), c_thought=1, pad_latent_to_max=True)
        features = study.loaded.encoder.with_stage(study._encode(sample), spec, study.model.latent_ids)
        prompt = features["input_ids"][: features["prompt_length"]].tolist()
        assert prompt.count(latent) == int(k)
        for name, share in shares.items():
            begins = ("Every", f" {name}") if sample.steps[1].startswith("Every") else ("", name)
            begin, name_ids = (study.tokenizer(words).input_ids for words in begins)
            ids = torch.tensor([[*prompt, *begin, *name_ids]])
            with torch.no_grad():
                logits = study.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            own = range(ids.shape[1] - len(name_ids) - 1, ids.shape[1] - 1)
            expected = sum(float(logits[i].log_softmax(-1)[ids[0, i + 1]]) for i in own)
            assert share == pytest.approx(float(torch.tensor(expected).exp()), abs=2e-4)


def test_several_thoughts_a_step_are_counted_one_by_one(samples: list[Sample], checkpoint: Path) -> None:
    loaded = load(checkpoint)
    loaded.spec = stage_spec(3, c_thought=2, pad_latent_to_max=True)
    study = Study(loaded, ListSource(samples), limit=None, batch_size=5, max_new_tokens=4, seed=0)
    found = frontier(study, limit=12)
    assert found is not None
    assert [row["thoughts"] for row in found["rows"]][:2] == [2, 4]
    assert list(found["examples"][0]["shares"])[:2] == ["2", "4"]


def test_each_node_is_counted_once(samples: list[Sample], checkpoint: Path) -> None:
    study = Study(load(checkpoint), ListSource(samples), limit=None, batch_size=5, max_new_tokens=4, seed=0)
    found = frontier(study, limit=12)
    assert found is not None
    for row in found["rows"]:
        assert row["n"] == sum(len(s.steps) > row["thoughts"] for s in samples)
        assert 0 < row["path"] + row["level"] + row["other"] < 1
        assert row["best_on_path"] <= row["best_on_level"]
    assert len(found["examples"]) == 2
    for example in found["examples"]:
        assert draw_frontier(example, LIGHT_WIDE)[:4] == b"\x89PNG"


def test_the_page_shows_the_search(samples: list[Sample], checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "test.json"
    rows = [{"id": s.key, "question": s.question, "steps": list(s.steps), "answer": s.answer} for s in samples]
    data.write_text(json.dumps(rows))
    probe_checkpoint(checkpoint, data, tmp_path / "out", limit=None, batch_size=6, max_new_tokens=4, seed=0)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "The search, thought by thought" in page and (tmp_path / "out" / "frontier_1.png").exists()


def test_a_text_model_has_no_images_to_shuffle(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text("[]")
    jobs = plan_jobs(checkpoint, [tmp_path / "test.json"], tmp_path / "out", EvaluationOptions(), controls=True)
    assert [job.out.name for job in jobs] == ["test", "test-noise"]
