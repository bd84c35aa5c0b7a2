"""Every family of docs/backbones.md: the latent loop equals the naive one, and positions are transformers' own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from coconut.model import MultimodalCoconut
from tests.model.reference import (
    EOS,
    IMAGE,
    LATENT,
    TILE,
    TOKENS_PER_PATCH,
    VOCAB,
    batch_rows,
    float64_everywhere,
    gradients,
    largest_difference,
    make_row,
    naive_loss,
    tiny_qwen2_5_vl,
    tiny_text,
    wrap,
)

TOLERANCE = 1e-9


def ragged_rows(seed: int, images: bool) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    latents, pictures, words = (0, 3, 1, 2, 3), (1, 0, 2, 1, 3), (5, 3, 9, 4, 2)
    return [
        make_row(generator, k, n if images else 0, w, 3 + k) for k, n, w in zip(latents, pictures, words, strict=True)
    ]


def transformers_positions(model: MultimodalCoconut, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    side = TILE // 4
    tiles = int((ids == IMAGE).sum()) // TOKENS_PER_PATCH
    if not tiles:
        return torch.arange(ids.shape[1]).expand(3, 1, -1)
    grid = torch.tensor([[1, side, side]] * tiles)
    kinds = (ids == IMAGE).int()
    return model.base_model.model.get_rope_index(ids, kinds, image_grid_thw=grid, attention_mask=mask)[0]


def transformers_features(model: MultimodalCoconut, tiles: Tensor) -> Tensor:
    """The vision tower, fed by the family's own image processor's order of patches."""
    from transformers import Qwen2VLImageProcessor

    side = TILE // 4
    processor = Qwen2VLImageProcessor(patch_size=4, merge_size=2, do_resize=False, do_rescale=False, do_normalize=False)
    flat = processor(images=list(tiles), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    visual = model.base_model.model.visual
    return visual(flat.to(tiles.dtype), grid_thw=torch.tensor([[1, side, side]] * len(tiles))).pooler_output


def embed(model: MultimodalCoconut, row: dict) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([row["ids"]])
    embeds = model.base_model.get_input_embeddings()(ids)
    if len(row["tiles"]):
        features = transformers_features(model, row["tiles"].to(embeds.dtype))
        embeds = embeds.masked_scatter((ids == IMAGE)[..., None], features)
    return embeds, transformers_positions(model, ids)


def think(model: MultimodalCoconut, row: dict, embeds: Tensor, positions: Tensor) -> Tensor:
    for column in [i for i, token in enumerate(row["ids"]) if token == LATENT]:
        hidden = model.backbone.decoder(
            inputs_embeds=embeds[:, :column], position_ids=positions[..., :column], use_cache=False
        ).last_hidden_state
        embeds = torch.cat([embeds[:, :column], hidden[:, -1:], embeds[:, column + 1 :]], dim=1)
    return embeds


def naive_qwen2_5_vl(model: MultimodalCoconut, rows: list[dict]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        embeds, positions = embed(model, row)
        embeds = think(model, row, embeds, positions)
        hidden = model.backbone.decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
        logits = model.backbone.head(hidden)[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="sum")
    return total


def differences(model: MultimodalCoconut, rows: list[dict], naive) -> tuple[float, float]:
    expected = naive(model, rows)
    expected.backward()
    theirs = gradients(model)
    out = model(**batch_rows(rows), loss_only=True, num_items_in_batch=1)
    out.loss.backward()
    return float((out.loss - expected).detach().abs()), largest_difference(gradients(model), theirs)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_text_families(kind: str, attn: str, checkpointed: bool) -> None:
    torch.manual_seed(0)
    with float64_everywhere():
        model = wrap(tiny_text(kind, attn).double())
        if checkpointed:
            model.gradient_checkpointing_enable()
        loss, gradient = differences(model, ragged_rows(2, images=False), naive_loss)
    assert loss < TOLERANCE and gradient < TOLERANCE, (loss, gradient)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_qwen2_5_vl_with_images(attn: str, checkpointed: bool) -> None:
    torch.manual_seed(0)
    with float64_everywhere():
        model = wrap(tiny_qwen2_5_vl(attn).double())
        if checkpointed:
            model.gradient_checkpointing_enable()
        loss, gradient = differences(model, ragged_rows(1, images=True), naive_qwen2_5_vl)
    assert loss < TOLERANCE and gradient < TOLERANCE, (loss, gradient)


def test_qwen2_5_vl_positions_of_padded_rows_are_transformers_own() -> None:
    model = wrap(tiny_qwen2_5_vl())
    batch = batch_rows(ragged_rows(3, images=True))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    ours = model.backbone.position_ids(ids, mask)
    theirs = transformers_positions(model, ids, mask)
    real = mask.bool()
    assert torch.equal(ours[:, real], theirs[:, real])
    assert not torch.equal(ours[0][real], ours[1][real])  # rows and columns do count


@torch.no_grad()
def naive_greedy(model: MultimodalCoconut, row: dict, steps: int) -> list[int]:
    embeds, positions = embed(model, row)
    embeds = think(model, row, embeds, positions)
    said: list[int] = []
    while len(said) < steps and EOS not in said:
        hidden = model.backbone.decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
        said.append(int(model.backbone.head(hidden[:, -1]).argmax()))
        embeds = torch.cat([embeds, model.base_model.get_input_embeddings()(torch.tensor([[said[-1]]]))], dim=1)
        positions = torch.cat(
            [positions, positions[..., -1:].max() + 1 + torch.zeros_like(positions[..., -1:])], dim=-1
        )
    return said


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_qwen2_5_vl_greedy_equals_the_naive_loop(seed: int) -> None:
    torch.manual_seed(3)
    model = wrap(tiny_qwen2_5_vl()).eval()
    rows = []
    for row in ragged_rows(seed, images=True):
        keep = sum(label == -100 for label in row["labels"])
        rows.append({"ids": row["ids"][:keep], "labels": row["labels"][:keep], "tiles": row["tiles"]})
    batch = batch_rows(rows, align=False, dtype=torch.float32)
    del batch["labels"]
    said = model.generate(**batch, do_sample=False, max_new_tokens=8).tolist()
    for ours, row in zip(said, rows, strict=True):
        theirs = naive_greedy(model, row, 8)
        assert ours[: len(theirs)] == theirs


def test_transformers_is_told_how_far_positions_lag() -> None:
    """Each tile takes 4 tokens but 2 positions; without being told, decoding would go on from the count of tokens."""
    model = wrap(tiny_qwen2_5_vl()).eval()
    ids = torch.tensor([[5, *[IMAGE] * (3 * TOKENS_PER_PATCH), 7]])
    model.generate(torch.zeros(3, 3, TILE, TILE), ids, do_sample=False, max_new_tokens=2)
    assert model.base_model.model.rope_deltas.tolist() == [[-3 * 2]]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_sliding_window_attention(attn: str) -> None:
    torch.manual_seed(0)
    with float64_everywhere():
        base = tiny_text("mistral", attn, sliding_window=4).double()
        loss, gradient = differences(wrap(base), ragged_rows(2, images=False), naive_loss)
    assert loss < TOLERANCE and gradient < TOLERANCE, (loss, gradient)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 4.0}),
    ],
)
def test_logits_are_scaled_and_capped_as_the_family_does(family: str, settings: dict) -> None:
    """Families that do something to their logits after the head: loss and logits are transformers' own."""
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=64, initializer_range=0.3, bos_token_id=None, eos_token_id=EOS,
                 pad_token_id=0)  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**sizes, **settings)
    base = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        ours, theirs = wrap(base)(ids, labels=ids), base(ids, labels=ids)
        loss_only = wrap(base)(ids, labels=ids, loss_only=True).loss
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-5)
    assert float(ours.loss) == pytest.approx(float(theirs.loss)) == pytest.approx(float(loss_only))
