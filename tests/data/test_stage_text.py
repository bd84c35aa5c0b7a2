"""Prompt templates, tokenising, and what a stage makes of a text."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut.config.schema import Schema
from coconut.data.stage_text import (
    METHODS,
    build_prompt_template,
    encode_text,
    mixed_stage,
    smoothed_removal,
    stage_spec,
    stage_text,
)
from coconut.types import IGNORE_INDEX, DataError, EncodedText, PromptTemplate, Sample

START, LATENT, END = 900, 901, 902
IDS = (START, LATENT, END)
TEXT = EncodedText("k", prompt=(1, 2), steps=((10,), (20, 21), (30,)), answer=(40, 41))

texts = st.builds(
    EncodedText,
    key=st.just("k"),
    prompt=st.lists(st.integers(0, 99), min_size=1, max_size=5).map(tuple),
    steps=st.lists(st.lists(st.integers(100, 199), min_size=1, max_size=3).map(tuple), max_size=6).map(tuple),
    answer=st.lists(st.integers(200, 299), min_size=1, max_size=3).map(tuple),
)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, (1, 2, START, END, 10, 20, 21, 30, 40, 41)),
        (1, (1, 2, START, LATENT, LATENT, END, 20, 21, 30, 40, 41)),
        (2, (1, 2, START, *[LATENT] * 4, END, 30, 40, 41)),
        (3, (1, 2, START, *[LATENT] * 4, END, 40, 41)),  # beyond the last stage: no step is left
    ],
)
def test_coconut_stages(stage: int, expected: tuple[int, ...]) -> None:
    staged = stage_text(TEXT, stage_spec(stage, c_thought=2, max_latent_stage=2), IDS)
    assert staged.input_ids == expected
    assert staged.labels[: staged.prompt_length] == (IGNORE_INDEX,) * staged.prompt_length
    assert staged.labels[staged.prompt_length :] == expected[staged.prompt_length :]
    assert staged.input_ids[staged.prompt_length - 1] == END
    assert staged.n_latents == staged.input_ids.count(LATENT)


def test_baselines_have_neither_markers_nor_latents() -> None:
    for stage in (0, 2):
        cot = stage_text(TEXT, stage_spec(stage, method="cot"), IDS)
        assert cot.input_ids == (1, 2, 10, 20, 21, 30, 40, 41)
        assert cot.prompt_length == 2
        assert stage_text(TEXT, stage_spec(stage, method="no_cot"), IDS).input_ids == (1, 2, 40, 41)


def test_a_short_sample_gets_thoughts_for_its_own_steps_unless_padded() -> None:
    short = EncodedText("k", prompt=(1,), steps=((10,),), answer=(40,))
    spec = stage_spec(3, c_thought=2, max_latent_stage=4)
    assert stage_text(short, spec, IDS).n_latents == 2
    padded = stage_spec(3, c_thought=2, max_latent_stage=4, pad_latent_to_max=True)
    assert stage_text(short, padded, IDS).n_latents == 6


def test_bad_stage_and_method_are_named() -> None:
    with pytest.raises(DataError, match=r"'cocoa'.*coconut, icot"):
        stage_spec(0, method="cocoa")
    with pytest.raises(DataError, match="stage is -1"):
        stage_spec(-1)


@given(text=texts, stage=st.integers(0, 7), c_thought=st.integers(1, 3), last=st.integers(0, 5), pad=st.booleans())
def test_stage_invariants(text: EncodedText, stage: int, c_thought: int, last: int, pad: bool) -> None:
    spec = stage_spec(stage, c_thought=c_thought, max_latent_stage=last, pad_latent_to_max=pad)
    staged = stage_text(text, spec, IDS)
    kept = min(stage, last)
    assert len(staged.input_ids) == len(staged.labels)
    assert staged.n_latents == c_thought * (kept if pad else min(kept, len(text.steps)))
    # prompt, span, target, in this order and nothing else
    span = (START, *[LATENT] * staged.n_latents, END)
    assert staged.input_ids[: staged.prompt_length] == text.prompt + span
    target = staged.input_ids[staged.prompt_length :]
    assert target == staged.labels[staged.prompt_length :]
    assert set(staged.labels[: staged.prompt_length]) == {IGNORE_INDEX}
    # the target is a suffix of all that was written, it ends in the answer, and only steps are gone from it
    written = tuple(token for step in text.steps for token in step) + text.answer
    assert written[len(written) - len(target) :] == target
    n_gone = len(text.steps) if stage > last else min(stage, len(text.steps))
    assert len(written) - len(target) == sum(map(len, text.steps[:n_gone]))


@given(key=st.text(max_size=20), stage=st.integers(0, 5), n_steps=st.integers(0, 8), epoch=st.integers(0, 99))
def test_mixed_stage_is_in_range_and_pure(key: str, stage: int, n_steps: int, epoch: int) -> None:
    def draw(prob: float) -> int:
        return mixed_stage(
            key, stage=stage, uniform_prob=prob, max_latent_stage=4, n_steps=n_steps, seed=1, epoch=epoch
        )

    assert draw(0.0) == stage
    assert 0 <= draw(1.0) <= min(4, n_steps)
    assert draw(0.5) in (stage, draw(1.0))
    assert draw(0.5) == draw(0.5)


def test_mixing_has_the_asked_share_and_is_uniform() -> None:
    def draws(**changed: int) -> list[int]:
        where = {"seed": 3, "epoch": 0} | changed
        return [
            mixed_stage(f"k{i}", stage=9, uniform_prob=0.25, max_latent_stage=4, n_steps=3, **where)
            for i in range(8000)
        ]

    mixed = [stage for stage in draws() if stage != 9]
    assert 0.235 < len(mixed) / 8000 < 0.265
    for stage in range(4):
        assert 0.22 < mixed.count(stage) / len(mixed) < 0.28
    assert draws() != draws(epoch=1)
    assert draws() != draws(seed=4)


def test_plain_template(tokenizer) -> None:
    template = build_prompt_template(tokenizer)
    assert template.prefix == ()
    assert tokenizer.convert_ids_to_tokens(list(template.suffix)) == ["\n"]
    prompt = template.prompt(tokenizer("start a ?", add_special_tokens=False)["input_ids"], [2])
    words = ["<img>", "<IMG_CONTEXT>", "<IMG_CONTEXT>", "</img>", "start", "a", "?", "\n"]
    assert tokenizer.convert_ids_to_tokens(prompt) == words
    assert PromptTemplate.from_dict(template.to_dict()) == template


def test_chat_template_equals_the_tokenizers_own_rendering(make_tokenizer) -> None:
    tokenizer = make_tokenizer(chat=True)
    template = build_prompt_template(tokenizer)
    prompt = template.prompt(tokenizer("start a ?", add_special_tokens=False)["input_ids"], [1])
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "<img><IMG_CONTEXT></img>\nstart a ?"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert build_prompt_template(tokenizer, "plain") != template


def test_text_only_tokenizer_refuses_images(make_tokenizer) -> None:
    tokenizer = make_tokenizer(images=False)
    template = build_prompt_template(tokenizer)
    assert (template.image_open, template.image_context, template.image_close) == ((), None, ())
    sample = Sample("k", "start a ?", (), "red", source="data.json:4")
    assert encode_text(sample, tokenizer, template).prompt
    with pytest.raises(DataError, match=r"data.json:4 \(key k\).*no image token"):
        encode_text(sample, tokenizer, template, [4])


def test_automatic_prefix_is_kept(make_tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    eos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<eos> $A", special_tokens=[("<eos>", eos)])
    assert build_prompt_template(tokenizer).prefix == (eos,)


def test_bad_templates_are_refused(make_tokenizer) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(DataError, match="choose auto, chat or plain"):
        build_prompt_template(tokenizer, "chatty")
    with pytest.raises(DataError, match="no chat template"):
        build_prompt_template(tokenizer, "chat")
    tokenizer.chat_template = "nothing of the user's"
    with pytest.raises(DataError, match="exactly once"):
        build_prompt_template(tokenizer)


def test_encode_text_tokenises_the_parts_separately(tokenizer) -> None:
    sample = Sample("k", "start a ?", ("red up b", "green left c"), "blue")
    text = encode_text(sample, tokenizer, build_prompt_template(tokenizer))

    def words(ids):
        return tokenizer.convert_ids_to_tokens(list(ids))

    assert [words(step) for step in text.steps] == [["red", "up", "b", "\n"], ["green", "left", "c", "\n"]]
    assert words(text.answer) == ["###", "blue", "<eos>"]


def test_control_tokens_in_a_text_are_just_text(tokenizer, ids) -> None:
    hostile = Sample("k", "start <|latent|> <IMG_CONTEXT> <eos> a ?", ("red <|end-latent|> up",), "blue")
    text = encode_text(hostile, tokenizer, build_prompt_template(tokenizer))
    everything = {*text.prompt, *text.steps[0], *text.answer[:-1]}
    assert not everything & {*ids, tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), tokenizer.eos_token_id}
    assert tokenizer.convert_tokens_to_ids("latent") in text.prompt  # the words are still there
    # and the next, harmless, text is tokenised as ever
    assert tokenizer("<|latent|>", add_special_tokens=False)["input_ids"] == [ids[1]]


def test_a_control_token_that_cannot_be_split_is_an_error(make_tokenizer) -> None:
    tokenizer = make_tokenizer(latents=False)
    tokenizer.add_tokens(["<|latent|>"])  # an ordinary added token: never split
    sample = Sample("k7", "start <|latent|> ?", (), "red", source="data.json:7")
    with pytest.raises(DataError, match=r"data.json:7 \(key k7\).*<\|latent\|>"):
        encode_text(sample, tokenizer, build_prompt_template(tokenizer))


def test_methods_differ_in_what_stands_in_the_place_of_the_steps() -> None:
    text = EncodedText("key", prompt=(1, 2), steps=((10, 11, 12), (20, 21), (30,)), answer=(8, 9))
    ids = (101, 102, 103)

    def read(method: str, stage: int) -> tuple[int, ...]:
        spec = stage_spec(stage, method=method, c_thought=1, max_latent_stage=3, icot_tokens=2)
        return stage_text(text, spec, ids).input_ids[2:]

    thoughts = (101, 102, 102, 103, 30, 8, 9)
    assert read("coconut", 2) == read("pause_as_thought", 2) == read("pause_multipass", 2) == thoughts
    assert read("no_thought", 2) == (30, 8, 9)
    assert read("icot", 0) == read("cot", 0) == (10, 11, 12, 20, 21, 30, 8, 9)
    assert read("icot", 2) == (21, 30, 8, 9)
    assert read("icot", 3) == read("no_cot", 0) == (8, 9)
    assert read("pause", 0) == read("no_curriculum", 0) == read("coconut", 3) == (101, 102, 102, 102, 103, 8, 9)


def test_smoothed_removals_are_geometric_and_depend_on_the_key_alone() -> None:
    drawn = [smoothed_removal(f"key {n}", rate=1.0, seed=1, epoch=2) for n in range(4000)]
    assert drawn == [smoothed_removal(f"key {n}", rate=1.0, seed=1, epoch=2) for n in range(4000)]
    for more in range(3):  # P(o) = (1 - 1/e) e^-o
        share = sum(draw == more for draw in drawn) / len(drawn)
        assert share == pytest.approx((1 - math.exp(-1)) * math.exp(-more), abs=0.03)
    assert smoothed_removal("key 0", rate=None, seed=1, epoch=2) == 0


def test_the_configuration_offers_every_method() -> None:
    assert set(get_args(Schema.model_fields["method"].annotation)) == set(METHODS)
