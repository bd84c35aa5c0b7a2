"""Tiny models: the right sizes and initialisation, one seed one model, and nothing special about loading them."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, InternVLForConditionalGeneration, PreTrainedTokenizerFast

from coconut.model.tiny import (
    build_bpe_tokenizer,
    build_tiny_causal,
    build_tiny_internvl,
    build_word_tokenizer,
    save_tiny,
)
from coconut.types import SPECIAL_TOKENS, ConfigError

WORDS = ("\n", "###", "?", "start", "up", "a3", "a4", "blue", "red")


@pytest.fixture(scope="module")
def tokenizer():
    return build_word_tokenizer(WORDS)


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_tiny_internvl(tokenizer)


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_one_token_a_word_and_a_line_break_is_one(tokenizer):
    ids = tokenizer("start a4 ?\nblue  up a3\n### red").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("start", "a4", "?", "\n"), *("blue", "up", "a3", "\n"), *("###", "red"),
    ]  # fmt: skip
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\nred").input_ids) == ["\n", "\n", "red"]
    assert tokenizer("green").input_ids == [tokenizer.unk_token_id]


def test_special_tokens_have_fixed_ids_and_split_anywhere(tokenizer):
    text = "<img><IMG_CONTEXT></img>red<|start-latent|><|latent|><|end-latent|><eos><pad>"
    assert tokenizer(text).input_ids == [3, 4, 5, tokenizer.convert_tokens_to_ids("red"), 6, 7, 8, 1, 0]
    assert len(tokenizer) == 9 + len(WORDS)
    assert tokenizer.tokenize("".join(SPECIAL_TOKENS)) == list(SPECIAL_TOKENS)


def test_decoding_gives_readable_text_back(tokenizer):
    text = "start a4 ?\nblue up a3\n### red"
    ids = tokenizer(text + "<eos><pad>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("words", [("red", "red"), ("<pad>",), ("light blue",), ("",)])
def test_unusable_vocabularies_are_refused(words):
    with pytest.raises(ConfigError):
        build_word_tokenizer(words)


def test_sizes_and_initialisation(model, tokenizer):
    assert 190_000 < sum(parameter.numel() for parameter in model.parameters()) < 210_000
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    vision = model.model.vision_tower
    assert abs(vision.embeddings.position_embeddings.std().item() - 0.5) < 0.05
    assert torch.equal(vision.encoder.layer[0].lambda_1, torch.ones(32))
    for matrix in (
        vision.encoder.layer[0].attention.q_proj.weight,
        model.model.multi_modal_projector.linear_1.weight,
        model.model.language_model.layers[2].mlp.up_proj.weight,
        model.lm_head.weight,
    ):
        assert abs(matrix.std().item() - 0.08) < 0.01
    assert model.config.text_config.rope_parameters["rope_theta"] == 10000.0
    assert model.config.image_seq_length == 16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_one_image_token_a_cell(model):
    """What token t sees moves with cell t: redrawing a cell changes its own token most."""
    torch.manual_seed(0)
    before = torch.randn(1, 3, 112, 112)
    features = []
    for cell in (None, 0, 6, 15):
        pixels = before.clone()
        if cell is not None:
            row, column = divmod(cell, 4)
            pixels[:, :, row * 28 : row * 28 + 28, column * 28 : column * 28 + 28] *= -1
        with torch.no_grad():
            features.append(model.model.get_image_features(pixel_values=pixels).pooler_output[0])
    assert features[0].shape == (16, 64)
    for cell, changed in zip((0, 6, 15), features[1:], strict=True):
        assert (changed - features[0]).norm(dim=-1).argmax().item() == cell


def test_seed_decides_the_weights_and_leaves_the_global_state_alone(model, tokenizer):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    again, other = build_tiny_internvl(tokenizer, seed=0), build_tiny_internvl(tokenizer, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert same_weights(model, again)
    assert not same_weights(model, other)


def test_saved_folder_loads_as_any_checkpoint_does(model, tokenizer, tmp_path):
    folder = tmp_path / "model"
    save_tiny(build_tiny_internvl(tokenizer, seed=1), tokenizer, folder)
    save_tiny(model, tokenizer, folder)  # replaces the first
    loaded_tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = InternVLForConditionalGeneration.from_pretrained(folder)
    assert same_weights(model, loaded)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    text = "<img><IMG_CONTEXT></img>start a4 ?\n<|start-latent|>blue\n<eos>"
    assert loaded_tokenizer(text).input_ids == tokenizer(text).input_ids
    assert loaded_tokenizer.decode(tokenizer(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)
    assert (loaded_tokenizer.pad_token, loaded_tokenizer.eos_token) == ("<pad>", "<eos>")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing unfinished is left behind


def test_image_and_vocabulary_have_to_fit(tokenizer):
    with pytest.raises(ConfigError, match="not a multiple"):
        build_tiny_internvl(tokenizer, image_size=100)
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "red": 1}, unk_token="<unk>"))
    with pytest.raises(ConfigError, match="no token '<IMG_CONTEXT>'"):
        build_tiny_internvl(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen2"])
def test_text_only_models(model_type, tokenizer, tmp_path):
    model = build_tiny_causal(model_type, tokenizer, seed=2)
    save_tiny(model, tokenizer, tmp_path / model_type)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / model_type)
    assert loaded.config.model_type == model_type
    assert same_weights(model, loaded)
    assert loaded(torch.tensor([[9, 10, 1]])).logits.shape == (1, 3, len(tokenizer))


def test_unknown_text_only_model(tokenizer):
    with pytest.raises(ConfigError, match="gpt2, llama, qwen2"):
        build_tiny_causal("bert", tokenizer)


def test_a_tokenizer_is_learned_from_the_texts_and_spells_any_other():
    tokenizer = build_bpe_tokenizer(["Every wumpus is a lempus. Is Tom a wumpus?"] * 3, max_length=64)
    assert tokenizer.tokenize("Every wumpus is a lempus.") == ["Every", "Ġwumpus", "Ġis", "Ġa", "Ġlempus", "."]
    assert tokenizer.decode(tokenizer("Größe: 3\n<eos>").input_ids) == "Größe: 3\n<eos>"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    model = build_tiny_causal("gpt2", tokenizer, hidden=48, layers=3, heads=6)
    assert (model.config.n_positions, model.config.n_head, model.config.n_layer) == (64, 6, 3)


def test_sizes_that_cannot_be():
    with pytest.raises(ConfigError, match="vocab_size is 200; the bytes alone take 256"):
        build_bpe_tokenizer(["a"], vocab_size=200)
    with pytest.raises(ConfigError, match="hidden 32 must be a multiple of heads 5"):
        build_tiny_causal("qwen2", build_bpe_tokenizer(["a"]), hidden=32, heads=5)
