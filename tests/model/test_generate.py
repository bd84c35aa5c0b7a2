"""Generation equals a naive greedy loop token by token, batched and ragged; without latents, transformers' own."""

from __future__ import annotations

import pytest
import torch

from coconut.model import MultimodalCoconut
from coconut.types import ConfigError, DataError, PromptTemplate, StageSpec
from tests.model.reference import (
    END,
    EOS,
    IMAGE,
    LATENT,
    START,
    TILE,
    TOKENS_PER_PATCH,
    batch_rows,
    make_row,
    tiny_internvl,
    tiny_qwen2_5_vl,
    tiny_text,
    wrap,
)

STEPS = 8


@pytest.fixture(scope="module")
def model() -> MultimodalCoconut:
    torch.manual_seed(3)
    return wrap(tiny_internvl()).eval()


def prompts(seed: int, images: bool = True) -> list[dict]:
    """Rows that end with their latent span, of unequal length, thoughts and images."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for latents, pictures, words in ((3, 1, 4), (1, 2, 9), (0, 0, 6), (2, 0, 3)):
        row = make_row(generator, latents, pictures if images else 0, words)
        keep = row["labels"].index(next(label for label in row["labels"] if label != -100))
        rows.append({"ids": row["ids"][:keep], "labels": row["labels"][:keep], "tiles": row["tiles"]})
    return rows


@torch.no_grad()
def naive_greedy(model: MultimodalCoconut, row: dict) -> list[int]:
    """One sample, no cache, the whole prefix again for every latent and every token."""
    base, decoder = model.base_model, model.backbone.decoder
    ids = torch.tensor([row["ids"]])
    embeds = base.get_input_embeddings()(ids)
    if len(row["tiles"]):
        features = base.model.get_image_features(pixel_values=row["tiles"].float(), return_dict=True).pooler_output
        embeds = embeds.masked_scatter((ids == IMAGE)[..., None], features)
    for column in [i for i, token in enumerate(row["ids"]) if token == LATENT]:
        hidden = decoder(inputs_embeds=embeds[:, :column], use_cache=False).last_hidden_state
        embeds = torch.cat([embeds[:, :column], hidden[:, -1:], embeds[:, column + 1 :]], dim=1)
    said: list[int] = []
    while len(said) < STEPS and EOS not in said:
        hidden = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
        said.append(int(base.get_output_embeddings()(hidden[:, -1]).argmax()))
        embeds = torch.cat([embeds, base.get_input_embeddings()(torch.tensor([[said[-1]]]))], dim=1)
    return said


def until_eos(ids: torch.Tensor) -> list[int]:
    row = ids.tolist()
    return row[: row.index(EOS) + 1] if EOS in row else row


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_equals_the_naive_loop(model: MultimodalCoconut, seed: int) -> None:
    rows = prompts(seed)
    batch = batch_rows(rows, dtype=torch.float32)
    del batch["labels"]
    said = model.generate(**batch, do_sample=False, max_new_tokens=STEPS)
    assert [until_eos(row) for row in said] == [naive_greedy(model, row) for row in rows]


@pytest.mark.parametrize(
    ("kind", "window"),
    [("gpt2", None), ("llama", None), ("qwen2", None), ("qwen3", None), ("mistral", None), ("mistral", 6)],
)
def test_text_backbones(kind: str, window: int | None) -> None:
    torch.manual_seed(4)
    text = wrap(tiny_text(kind, sliding_window=window)).eval()
    rows = prompts(5, images=False)
    batch = batch_rows(rows, dtype=torch.float32)
    said = text.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, max_new_tokens=STEPS
    )
    assert [until_eos(row) for row in said] == [naive_greedy(text, row) for row in rows]


def test_without_feedback_the_answer_differs(model: MultimodalCoconut) -> None:
    """The comparison above can fail: thoughts of zero say something else."""
    differs = 0
    for seed in range(3):
        batch = batch_rows(prompts(seed), dtype=torch.float32)
        del batch["labels"]
        own, zero = (
            model.generate(**batch, do_sample=False, max_new_tokens=STEPS, thought_transform=transform)
            for transform in (None, lambda h, k: 0 * h)
        )
        differs += own.shape != zero.shape or bool((own != zero).any())
    assert differs


def test_without_latents_equals_transformers(model: MultimodalCoconut) -> None:
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(2, 90, (3, 7), generator=generator)
    for settings in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        ours = model.generate(input_ids=ids, wrap_prompt=False, max_new_tokens=STEPS, **settings)
        theirs = model.base_model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, eos_token_id=EOS,
            pad_token_id=EOS, **settings,
        )[:, 7:]  # fmt: skip
        assert ours.tolist() == theirs.tolist()


def test_raw_questions_are_wrapped(model: MultimodalCoconut) -> None:
    """Five-dimensional pixels and ids without special tokens: image tokens and thoughts are placed."""
    model.prompt_template = PromptTemplate((), (7,), (8,), IMAGE, (9,))
    model.stage_spec = StageSpec(stage=2, n_skip_steps=2, n_latents=2, c_thought=1)
    generator = torch.Generator().manual_seed(1)
    tile = torch.randint(0, 256, (1, 2, 3, TILE, TILE), generator=generator, dtype=torch.uint8)
    question = torch.randint(10, 90, (1, 4), generator=generator)
    said = model.generate(pixel_values=tile, input_ids=question, do_sample=False, max_new_tokens=STEPS)
    whole = [8, *[IMAGE] * (2 * TOKENS_PER_PATCH), 9, *question[0].tolist(), 7, START, LATENT, LATENT, END]
    expected = model.generate(
        pixel_values=tile[0], input_ids=torch.tensor([whole]), do_sample=False, max_new_tokens=STEPS
    )
    assert said.tolist() == expected.tolist()
    features = model.encode_images(tile)
    again = model.generate(visual_features=features, input_ids=question, do_sample=False, max_new_tokens=STEPS)
    assert said.tolist() == again.tolist()
    model.prompt_template = model.stage_spec = None


def test_rows_flagged_as_without_image_lose_their_tiles(model: MultimodalCoconut) -> None:
    """Five-dimensional pixels give every row tiles; a flag of 0 says that a row's are placeholders."""
    model.prompt_template = PromptTemplate((), (7,), (8,), IMAGE, (9,))
    generator = torch.Generator().manual_seed(1)
    tiles = torch.randint(0, 256, (2, 2, 3, TILE, TILE), generator=generator, dtype=torch.uint8)
    questions = torch.randint(10, 90, (2, 4), generator=generator)
    flags, real = torch.tensor([[0], [1]]), torch.tensor([2, 1])
    settings = {"do_sample": False, "max_new_tokens": STEPS}
    both = model.generate(pixel_values=tiles, input_ids=questions, image_flags=flags, num_patches=real, **settings)
    text = model.generate(input_ids=questions[:1], wrap_prompt=True, **settings)
    image = model.generate(pixel_values=tiles[1:, :1], input_ids=questions[1:], **settings)
    assert [until_eos(row) for row in both] == [until_eos(text[0]), until_eos(image[0])]
    model.prompt_template = None


def test_defaults_and_their_order(model: MultimodalCoconut, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def record(**kwargs):
        seen.update(kwargs)
        return kwargs["input_ids"]

    monkeypatch.setattr(model.base_model, "generate", record)
    ids = torch.tensor([[5, 6, 7]])
    model.generate(input_ids=ids)
    settings = seen["generation_config"]
    assert (settings.max_new_tokens, settings.do_sample, settings.temperature) == (100, True, 0.7)
    assert (settings.top_p, settings.top_k) == (0.9, 50)
    model.generate(input_ids=ids, generation_config={"temperature": 0.3, "top_k": 5}, top_k=9)
    settings = seen["generation_config"]
    assert (settings.temperature, settings.top_k, settings.top_p) == (0.3, 9, 0.9)


def test_a_whole_vocabulary_is_sampled(model: MultimodalCoconut) -> None:
    """Sampling is on by default: two seeds say different things."""
    ids = torch.tensor([[5, 6, 7]])
    said = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        said.append(model.generate(input_ids=ids, temperature=3.0, max_new_tokens=STEPS).tolist())
    assert said[0] != said[1]


def test_faults_are_named(model: MultimodalCoconut) -> None:
    ids = torch.tensor([[5, IMAGE, IMAGE, IMAGE, IMAGE, 6]])
    tile = torch.zeros(1, 3, TILE, TILE, dtype=torch.uint8)
    with pytest.raises(DataError, match="not both"):
        model.generate(pixel_values=tile, visual_features=torch.zeros(1, 4, 32), input_ids=ids)
    with pytest.raises(DataError, match="needs input_ids"):
        model.generate(pixel_values=tile)
    with pytest.raises(DataError, match="4 image tokens"):
        model.generate(input_ids=ids)
    with pytest.raises(DataError, match="4 image tokens, but 2 tiles give 8"):
        model(input_ids=ids, pixel_values=tile.repeat(2, 1, 1, 1))
    with pytest.raises(DataError, match="begins with a latent"):
        model(input_ids=torch.tensor([[LATENT, 5]]))
    with pytest.raises(DataError, match="ends with a latent"):
        model.generate(input_ids=torch.tensor([[5, START, LATENT]]))
    with pytest.raises(DataError, match="past_key_values"):
        model(input_ids=torch.tensor([[5, LATENT, 6]]), past_key_values=object())
    with pytest.raises(DataError, match="ends with an image token"):
        model.generate(input_ids=torch.tensor([[5, IMAGE]]))
    with pytest.raises(DataError, match="either pixel_values or visual_features"):
        model(input_ids=ids, pixel_values=tile, visual_features=torch.zeros(1, 4, 32))
    with pytest.raises(DataError, match=r"attention_mask is \[1, 1\]"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1))
    with pytest.raises(DataError, match=r"labels is \[2, 6\]"):
        model(input_ids=ids, labels=torch.full((2, 6), -100))
    with pytest.raises(DataError, match="n_latents = 2 is for questions"):
        model.generate(input_ids=torch.tensor([[5, START, LATENT, END]]), n_latents=2)
    with pytest.raises(ConfigError, match="return_dict_in_generate"):
        model.generate(input_ids=torch.tensor([[5]]), return_dict_in_generate=True)
    with pytest.raises(ConfigError, match="three different tokens"):
        MultimodalCoconut(model.base_model, LATENT, START, LATENT, EOS)


@pytest.mark.parametrize("kind", ["internvl", "qwen2_5_vl", "gpt2", "llama"])
def test_forward_goes_on_from_a_cache(kind: str) -> None:
    """With a mask and without one, one token or several: the logits of the whole sequence."""
    torch.manual_seed(0)
    base = {"internvl": tiny_internvl, "qwen2_5_vl": tiny_qwen2_5_vl}.get(kind, lambda: tiny_text(kind))()
    whole = wrap(base).eval()
    span = [START, LATENT, LATENT, END]
    ids = torch.tensor([[7, 8, 9, *span, 20, 21, 22], [0, 0, 9, *span, 5, 6, 7]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = whole(ids).logits
        for n in (1, 3):
            cache = whole(ids[:, :-n], use_cache=True).past_key_values
            assert torch.allclose(whole(ids[:, -n:], past_key_values=cache).logits, expected[:, -n:], atol=1e-5)
        mask[1, :2] = 0
        expected = whole(ids, attention_mask=mask).logits[:, -3:]
        first = whole(ids[:, :-3], attention_mask=mask[:, :-3], use_cache=True)
        positions = whole.backbone.position_ids(ids, mask)[..., -3:] if kind == "qwen2_5_vl" else None
        options = {"attention_mask": mask, "past_key_values": first.past_key_values, "position_ids": positions}
        assert torch.allclose(whole(ids[:, -3:], **options).logits, expected, atol=1e-5)
        with pytest.raises(DataError, match=r"covers the 10 cached tokens and the 1 new ones: \[2, 11\]"):
            whole(ids[:, -1:], attention_mask=mask[:, -1:], past_key_values=first.past_key_values)
        with pytest.raises(DataError, match="together with loss_only"):
            whole(ids[:, -1:], past_key_values=first.past_key_values, loss_only=True)


def test_a_pad_predicts_nothing(model: MultimodalCoconut) -> None:
    """A label on the first token of a padded row has nothing before it to come of, as in a row that is not padded."""
    ids = torch.tensor([[5, 6, 7, 8]])
    padded = torch.tensor([[0, 0, 5, 6, 7, 8]])
    mask, labels = torch.tensor([[0, 0, 1, 1, 1, 1]]), torch.tensor([[-100, -100, 5, 6, 7, 8]])
    expected = model(ids, labels=ids, num_items_in_batch=1).loss
    assert torch.allclose(model(padded, attention_mask=mask, labels=labels, num_items_in_batch=1).loss, expected)
