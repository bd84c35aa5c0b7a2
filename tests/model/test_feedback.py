"""What is fed back, and thoughts computed together: each held against a naive loop in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coconut.model import MultimodalCoconut
from coconut.model.feedback import ProjectorFeedback
from coconut.model.spans import count_calls, cut_into_passes
from coconut.model.tiny import build_tiny_causal, build_word_tokenizer, save_tiny
from coconut.types import ConfigError
from tests.model.reference import (
    END,
    IMAGE,
    LATENT,
    START,
    TILE,
    batch_rows,
    float64_everywhere,
    gradients,
    largest_difference,
    make_row,
    tiny_internvl,
    wrap,
)

TOLERANCE = 1e-9


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A text model and tokenizer that know the latent tokens: start 6, latent 7, end 8."""
    tokenizer = build_word_tokenizer(("\n", "red", "blue", "###"))
    save_tiny(build_tiny_causal("qwen2", tokenizer, seed=1), tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def double_precision():
    with float64_everywhere():
        yield


def build(feedback: str, iterations: int | None = None, checkpointed: bool = False) -> MultimodalCoconut:
    torch.manual_seed(0)
    model = wrap(tiny_internvl().double())
    model.set_latent_feedback(feedback)
    model.set_latent_passes(iterations)
    if isinstance(model.loop.feedback, ProjectorFeedback):
        torch.nn.init.normal_(model.loop.feedback.down.weight, std=0.1)  # else its inner weights have no gradient
    if checkpointed:
        model.gradient_checkpointing_enable()
    return model


def ragged_rows(seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((0, 1, 5), (4, 0, 3), (1, 2, 9), (3, 1, 4))
    return [make_row(generator, k, n, w, 3 + k) for k, n, w in shapes]


def naive(model: MultimodalCoconut, rows: list[dict], iterations: int | None) -> Tensor:
    """One sample at a time, no cache; with iterations, thoughts but the first start as the latent token's embedding."""
    base, decoder, feedback = model.base_model, model.backbone.decoder, model.loop.feedback or torch.nn.Identity()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids = torch.tensor([row["ids"]])
        embeds = base.get_input_embeddings()(ids)
        if len(row["tiles"]):
            features = base.model.get_image_features(pixel_values=row["tiles"], return_dict=True).pooler_output
            embeds = embeds.masked_scatter((ids == IMAGE)[..., None], features)
        columns = [i for i, token in enumerate(row["ids"]) if token == LATENT]
        for number in range(len(columns) if iterations is None else iterations):
            hidden = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
            # The first round knows only what stands before the span; each later one renews all thoughts of it.
            renewed = columns[:1] if number == 0 and iterations is not None else columns
            thoughts = {column: feedback(hidden[:, column - 1 : column]) for column in renewed}
            pieces = [thoughts.get(i, embeds[:, i : i + 1]) for i in range(len(row["ids"]))]
            embeds = torch.cat(pieces, dim=1)
        logits = base.get_output_embeddings()(decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state)
        targets = torch.tensor(row["labels"][1:])
        total = total + F.cross_entropy(logits[0, :-1], targets, ignore_index=-100, reduction="sum")
    return total


def compare(model: MultimodalCoconut, rows: list[dict], iterations: int | None, align: bool = True) -> float:
    expected = naive(model, rows, iterations)
    expected.backward()
    theirs = gradients(model)
    loss = model(**batch_rows(rows, align), loss_only=True, num_items_in_batch=1).loss
    loss.backward()
    return max(float((loss - expected).detach().abs()), largest_difference(gradients(model), theirs))


@pytest.mark.parametrize("feedback", ["normed", "projector"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_feedback_equals_the_naive_loop(feedback: str, checkpointed: bool) -> None:
    assert compare(build(feedback, checkpointed=checkpointed), ragged_rows(1), None) < TOLERANCE


def test_every_weight_of_the_projector_learns() -> None:
    model = build("projector")
    model(**batch_rows(ragged_rows(1)), loss_only=True).loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for p in model.loop.feedback.parameters())


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("feedback", ["hidden", "projector"])
@pytest.mark.parametrize("align", [True, False])
def test_jacobi_equals_the_naive_iteration(iterations: int, feedback: str, align: bool) -> None:
    assert compare(build(feedback, iterations), ragged_rows(2), iterations, align) < TOLERANCE


@pytest.mark.parametrize("checkpointed", [False, True])
def test_enough_jacobi_iterations_equal_sequential(checkpointed: bool) -> None:
    assert compare(build("hidden", 4, checkpointed), ragged_rows(3), None) < TOLERANCE
    assert compare(build("hidden", 9, checkpointed), ragged_rows(3), None) < TOLERANCE


def test_too_few_iterations_are_another_model() -> None:
    assert compare(build("hidden", 2), ragged_rows(3), None) > 1e-4


def test_two_spans_of_jacobi() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = make_row(generator, 2, 1), make_row(generator, 3)
    row = {"ids": a["ids"] + b["ids"], "labels": a["labels"] + b["labels"], "tiles": a["tiles"]}
    assert compare(build("hidden", 5), [row, *ragged_rows(4)], None) < TOLERANCE


def overlapping_rows() -> list[dict]:
    """Spans that begin and end in different columns, without a column between them that is free in all rows."""
    generator = torch.Generator().manual_seed(5)

    def row(*pieces: int) -> dict:
        """So many tokens of text, of thoughts, of text, ..."""
        ids = [9]
        for number, length in enumerate(pieces):
            inside = [LATENT] * length if number % 2 else torch.randint(10, 40, (length,), generator=generator).tolist()
            ids += inside
        n_labels = pieces[-1]
        labels = [-100] * (len(ids) - n_labels) + ids[-n_labels:]
        return {"ids": ids, "labels": labels, "tiles": torch.zeros(0, 3, TILE, TILE)}

    return [row(2, 3, 6), row(4, 3, 4), row(3, 1, 2, 2, 3), row(1, 2, 1, 4, 3), row(7, 0, 4)]


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_row_of_jacobi_does_not_depend_on_the_others(iterations: int, checkpointed: bool) -> None:
    rows, model = overlapping_rows(), build("projector", iterations, checkpointed)
    alone = sum(model(**batch_rows([row]), loss_only=True, num_items_in_batch=1).loss for row in rows)
    alone.backward()
    theirs = gradients(model)
    together = model(**batch_rows(rows, False), loss_only=True, num_items_in_batch=1).loss
    together.backward()
    assert float((together - alone).detach().abs()) < TOLERANCE
    assert largest_difference(gradients(model), theirs) < TOLERANCE


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_overlapping_spans_of_jacobi_equal_the_naive_iteration(iterations: int) -> None:
    assert compare(build("hidden", iterations), overlapping_rows()[:2], iterations, False) < TOLERANCE


def test_enough_iterations_equal_sequential_for_overlapping_spans() -> None:
    assert compare(build("hidden", 4), overlapping_rows(), None, False) < TOLERANCE
    assert compare(build("hidden", 2), overlapping_rows(), None, False) > 1e-4


def test_ragged_prompts_of_jacobi_are_answered_as_alone() -> None:
    model = build("hidden", 2).eval()
    ids = torch.tensor([[5, 6, START, LATENT, LATENT, LATENT, END], [5, 6, 12, 11, START, LATENT, END]])
    options = {"wrap_prompt": False, "do_sample": False, "max_new_tokens": 6, "eos_token_id": 99}
    alone = [model.generate(input_ids=row[None], **options)[0] for row in ids]
    assert torch.equal(model.generate(input_ids=ids, **options), torch.stack(alone))


def test_cuts_fill_up_to_the_calls_that_all_ranks_make() -> None:
    columns = [5, 6, 7]
    is_latent = torch.zeros(2, 12, dtype=torch.bool)
    is_latent[0, 5:8] = is_latent[1, 5:6] = True
    for iterations, calls in ((None, 4), (1, 2), (2, 3), (3, 4), (8, 4)):
        assert count_calls(columns, is_latent, iterations) == calls
        for wanted in range(calls, calls + 4):
            segments = cut_into_passes(columns, is_latent, wanted, iterations)
            assert sum(segment.calls for segment in segments) == wanted
            assert [s.start for s in segments[1:]] == [s.end for s in segments[:-1]] and segments[-1].end == 12
            assert sum(segment.n_latents for segment in segments) == 3


def test_a_thought_has_the_length_of_an_embedding() -> None:
    model = build("normed")
    out = model(**batch_rows(ragged_rows(1)), output_thoughts=True)
    table = model.base_model.get_input_embeddings().weight
    norms = out.thoughts[1].norm(dim=-1)  # the row with four thoughts
    assert torch.allclose(norms, table.norm(dim=1).mean().expand(4), rtol=1e-6)


@pytest.mark.parametrize("feedback", ["hidden", "normed", "projector"])
def test_a_saved_model_thinks_the_same(feedback: str, tmp_path: Path, tiny_folder: Path) -> None:
    model = MultimodalCoconut.from_pretrained(tiny_folder)
    model.set_latent_feedback(feedback)
    model.set_latent_passes(2)
    if isinstance(model.loop.feedback, ProjectorFeedback):
        torch.nn.init.normal_(model.loop.feedback.down.weight, std=0.1)
    model.save_pretrained(tmp_path)
    for file in tiny_folder.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    again = MultimodalCoconut.from_pretrained(tmp_path)
    assert (again.latent_feedback, again.loop.iterations) == (feedback, 2)
    ids = torch.tensor([[9, 10, 6, 7, 7, 7, 8, 11, 12]])
    ours, theirs = model(ids, output_thoughts=True), again(ids, output_thoughts=True)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.thoughts, theirs.thoughts)


def test_an_unknown_feedback_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose from hidden, normed, projector"):
        build("teleport")


def test_an_auxiliary_loss_is_added_to_the_sum_in_training() -> None:
    model, rows = build("hidden"), ragged_rows(1)
    batch = batch_rows(rows)
    plain = model(**batch, num_items_in_batch=1).loss
    seen = []

    def mean_square(context):
        seen.append(context)
        return context.thoughts_BKH[context.is_thought_BK].square().sum()

    model.add_auxiliary_loss("square", mean_square, 0.5)
    out = model(**batch, num_items_in_batch=1, output_thoughts=True)
    context = seen[0]
    assert context.is_thought_BK.sum() == sum(row["ids"].count(LATENT) for row in rows)
    expected = plain + 0.5 * out.thoughts[context.is_thought_BK].square().sum()
    assert float((out.loss - expected).detach().abs()) < 1e-9
    model.eval()
    assert float((model(**batch, num_items_in_batch=1).loss - plain).detach().abs()) < 1e-12


def test_the_example_of_an_auxiliary_loss_draws_thoughts_to_the_picture() -> None:
    from docs.examples.visual_latent_loss import visual_latent_loss

    model, batch = build("hidden"), batch_rows(ragged_rows(1))
    model.add_auxiliary_loss("visual", visual_latent_loss, 1.0)
    (without, _), (with_it, _) = (
        (model.eval()(**batch).loss, None),
        (model.train()(**batch).loss, None),
    )
    assert 0 < float((with_it - without).detach()) < 2
    text_only = batch_rows([make_row(torch.Generator().manual_seed(0), 2, 0)])
    assert torch.isfinite(model(**text_only).loss)


def test_pauses_are_ordinary_tokens_in_one_pass_or_in_several() -> None:
    """The loss of pauses is that of a plain forward over the same ids, however many passes read them."""
    model, batch = build("none"), batch_rows(ragged_rows(1))
    in_passes = model(**batch, num_items_in_batch=1).loss
    model.set_latent_passes(0)
    calls: list[int] = []
    model.backbone.decoder.register_forward_hook(lambda *_: calls.append(1))
    at_once = model(**batch, num_items_in_batch=1).loss
    assert len(calls) == 1 and model.calls_of_thoughts(3) == 0
    plain = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "pixel_values")}
    plain["position_ids"] = model.backbone.position_ids(batch["input_ids"], batch["attention_mask"])
    logits = model.base_model(**plain).logits.double()[:, :-1]
    expected = F.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    for loss in (in_passes, at_once):
        assert float((loss - expected).detach().abs()) < 1e-9
    with pytest.raises(ConfigError, match="needs passes"):
        build("hidden").set_latent_passes(0)
