"""Sample -> EncodedText -> StagedText: what is read and what is asked at each stage of the curriculum.

    Sample --encode_text--> EncodedText --stage_text(StageSpec)--> StagedText

    coconut  prompt  start latent*n end  step[k] step[k+1] ...  answer eos
    cot      prompt                      step[0] step[1]   ...  answer eos
    icot     prompt           (the chain from its n-th token on)  answer eos
    no_cot   prompt                                             answer eos
    labels   ------------ ignored ----- |------------ asked ------------|

Everything here is pure: the same arguments give the same ids on every rank, worker and machine.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from typing import Any

from coconut.types import (
    IGNORE_INDEX,
    SPECIAL_TOKENS,
    STAGED_METHODS,
    DataError,
    EncodedText,
    PromptTemplate,
    Sample,
    StagedText,
    StageSpec,
)

# A sample is a handful of short texts: handing them to threads costs ten times what tokenising them does, and
# a tokenizer that ran threads before data workers are forked warns in each of them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

METHODS = (*STAGED_METHODS, "cot", "no_cot", "pause", "no_curriculum")
#: Spellings of open, context and close: InternVL's, Qwen-VL's. InternVL's tokenizers know both, so the order counts.
IMAGE_TOKENS = (("<img>", "<IMG_CONTEXT>", "</img>"), ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"))

#: Anything spelled like a control token. Text that holds one is tokenised with special tokens split
#: into ordinary pieces, so that a question cannot place latents, images or chat turns of its own.
_CONTROL_LIKE = re.compile(r"<[^<>\s]{1,64}>|\[[A-Z_]{2,16}\]")
#: Where the question goes while a chat template is being cut in two; no template contains it.
_QUESTION_MARK = "\u241fQUESTION\u241f"


def build_prompt_template(
    tokenizer: Any, prompt_format: str = "auto", image_tokens: tuple[str, str, str] | None = None
) -> PromptTemplate:
    """Find the token ids that surround images and question.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt_format: ``chat`` cuts the tokenizer's chat template at the question (InternVL puts a line
            break after each image); ``plain`` is the question and a line break; ``auto`` is ``chat`` where
            the tokenizer has a template, else ``plain``.
        image_tokens: spelling of the open, context and close tokens; by default the first of `IMAGE_TOKENS` that
            the tokenizer knows. Without the context token the template is text-only; an empty open or close is left
            out.

    Raises:
        DataError: an unknown format, ``chat`` without a chat template, or a template that drops the question.
    """
    if prompt_format not in ("auto", "chat", "plain"):
        raise DataError(f"prompt_format is {prompt_format!r}; choose auto, chat or plain")
    if prompt_format == "auto":
        prompt_format = "chat" if getattr(tokenizer, "chat_template", None) else "plain"

    if image_tokens is None:
        known = [spelling for spelling in IMAGE_TOKENS if _token_id(tokenizer, spelling[1]) is not None]
        image_tokens = known[0] if known else IMAGE_TOKENS[0]
    open_, context, close = image_tokens
    image_context = _token_id(tokenizer, context)
    image_open: tuple[int, ...] = ()
    image_close: tuple[int, ...] = ()
    if image_context is not None:
        image_open, image_close = (_marker_ids(tokenizer, token) for token in (open_, close))

    if prompt_format == "plain":
        prefix = _automatic_prefix(tokenizer)
        suffix = _ids(tokenizer, "\n")
        return PromptTemplate(prefix, suffix, image_open, image_context, image_close)

    before, after = _split_chat_template(tokenizer)
    if image_context is not None:
        image_close += _ids(tokenizer, "\n")
    return PromptTemplate(_ids(tokenizer, before), _ids(tokenizer, after), image_open, image_context, image_close)


def encode_text(
    sample: Sample, tokenizer: Any, template: PromptTemplate, image_tokens: list[int] | None = None
) -> EncodedText:
    """Tokenise a sample's prompt, each of its steps, and its answer, separately.

    Args:
        sample: the problem.
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token.
        template: from `build_prompt_template`.
        image_tokens: number of image tokens of each of the sample's images, in order.

    Raises:
        DataError: the tokenizer has no end-of-sequence or no image token, or the text smuggles in a
            control token that this tokenizer does not let us split.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token, so no answer could ever end")
    # One call for all the pieces: a tokenizer's fixed cost is larger than that of a short step.
    pieces = [sample.question, *(f"{step}\n" for step in sample.steps), f"### {sample.answer}"]
    suspicious = any(_CONTROL_LIKE.search(piece) for piece in pieces)
    options = {"split_special_tokens": True} if suspicious else {}
    ids = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, **options)["input_ids"]
    if suspicious:
        _refuse_control_ids(sample, tokenizer, template, ids)
    try:
        prompt = template.prompt(ids[0], image_tokens or [])
    except DataError as error:
        raise DataError(f"{sample.source or sample.key} (key {sample.key}): {error}") from None
    return EncodedText(
        key=sample.key,
        prompt=tuple(prompt),
        steps=tuple(tuple(step) for step in ids[1:-1]),
        answer=(*ids[-1], tokenizer.eos_token_id),
    )


def stage_spec(
    stage: int,
    *,
    method: str = "coconut",
    c_thought: int = 2,
    max_latent_stage: int = 4,
    pad_latent_to_max: bool = False,
    icot_tokens: int = 8,
) -> StageSpec:
    """What stage ``stage`` does to a text, by method (arXiv 2412.06769, table 1).

    coconut           stage k <= max_latent_stage replaces the first k steps by thoughts; a later stage drops all steps
    no_curriculum     the last of these stages from the start
    no_thought        the same stages, nothing in the steps' place
    pause_as_thought  the same stages; the latent tokens are ordinary ones (pauses), read in one pass
    pause_multipass   the same, read in as many passes as thoughts would take
    pause             pauses in the place of all steps, from the start
    icot              stage k drops the first k * icot_tokens tokens of the steps, the last stage all (arXiv 2405.14838)
    cot, no_cot       every step; none

    Markers stand where latent tokens may: not with cot, no_cot, no_thought and icot. That pauses are no thoughts is the
    model's affair (`MultimodalCoconut.set_latent_feedback`), not the text's.
    """
    if method not in METHODS:
        raise DataError(f"method is {method!r}; choose one of {', '.join(METHODS)}")
    if stage < 0:
        raise DataError(f"stage is {stage}; the first one is 0")
    step_by_step = stage if stage <= max_latent_stage else None
    n_skip_steps = {"cot": 0, "no_cot": None, "pause": None, "no_curriculum": None}.get(method, step_by_step)
    n_latents = c_thought * (min(stage, max_latent_stage) if method in STAGED_METHODS else max_latent_stage)
    n_skip_tokens = 0
    if method == "icot":
        n_skip_steps = 0 if stage < max_latent_stage else None
        n_skip_tokens = icot_tokens * stage
    has_latents = method not in ("cot", "no_cot", "no_thought", "icot")
    return StageSpec(
        stage=stage,
        n_skip_steps=n_skip_steps,
        n_latents=n_latents if has_latents else 0,
        c_thought=c_thought,
        pad_latent_to_max=pad_latent_to_max and has_latents,
        markers=has_latents,
        n_skip_tokens=n_skip_tokens,
        method=method,
    )


def stage_text(text: EncodedText, spec: StageSpec, ids: tuple[int, int, int]) -> StagedText:
    """Apply a stage to an encoded text.

    Args:
        text: prompt, steps and answer as ids.
        spec: from `stage_spec`.
        ids: the start, latent and end token ids.

    Returns:
        ids and labels of equal length; labels are IGNORE_INDEX on the prompt and the whole latent span,
        and equal the ids everywhere after it.
    """
    start_id, latent_id, end_id = ids
    n_latents = spec.n_latents
    if not spec.pad_latent_to_max:
        # A sample gets thoughts for the steps it has: nothing is there to think about beyond them.
        n_latents = min(n_latents, spec.c_thought * len(text.steps))
    span = (start_id, *([latent_id] * n_latents), end_id) if spec.markers else (latent_id,) * n_latents
    n_skip = len(text.steps) if spec.n_skip_steps is None else spec.n_skip_steps
    chain = tuple(token for step in text.steps[n_skip:] for token in step)
    target = chain[spec.n_skip_tokens :] + text.answer
    prompt_length = len(text.prompt) + len(span)
    return StagedText(
        input_ids=(*text.prompt, *span, *target),
        labels=(IGNORE_INDEX,) * prompt_length + target,
        prompt_length=prompt_length,
        n_latents=n_latents,
    )


def mixed_stage(
    key: str, *, stage: int, uniform_prob: float, max_latent_stage: int, n_steps: int, seed: int, epoch: int
) -> int:
    """Stage of one sample under stage mixing: with ``uniform_prob`` another stage, else ``stage``.

    The other stage is uniform over 0 .. min(max_latent_stage, n_steps). Both draws are a function of
    (seed, epoch, key) alone, so they are the same on any rank, in any worker, and after a resume.
    """
    if uniform_prob <= 0.0:
        return stage
    digest = hashlib.sha256(f"stage-mixing\0{seed}\0{epoch}\0{key}".encode()).digest()
    if int.from_bytes(digest[:8], "big") / 2**64 >= uniform_prob:
        return stage
    return int.from_bytes(digest[8:16], "big") % (min(max_latent_stage, n_steps) + 1)


def smoothed_removal(key: str, *, rate: float | None, seed: int, epoch: int) -> int:
    """Tokens that icot removes beyond a stage's own: o with probability in proportion to exp(-rate * o).

    Removal smoothing (arXiv 2405.14838, section 3.2): the model meets the next removals before their time. None
    removes no more. A function of (seed, epoch, key) alone, as `mixed_stage`.
    """
    if rate is None:
        return 0
    digest = hashlib.sha256(f"removal-smoothing\0{seed}\0{epoch}\0{key}".encode()).digest()
    return int(-math.log((int.from_bytes(digest[:8], "big") + 1) / 2**64) / rate)


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


def _token_id(tokenizer: Any, token: str) -> int | None:
    """Id of a token that the vocabulary holds whole, else None."""
    index = tokenizer.convert_tokens_to_ids(token) if token else None
    # An unknown token answers with the id of <unk> (GPT-2: of <|endoftext|>), so ask the way back too.
    return index if index is not None and tokenizer.convert_ids_to_tokens(index) == token else None


def _marker_ids(tokenizer: Any, token: str) -> tuple[int, ...]:
    if not token:
        return ()
    index = _token_id(tokenizer, token)
    if index is None:
        raise DataError(f"the tokenizer has an image context token but not {token!r}, which goes around it")
    return (index,)


def _automatic_prefix(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer itself puts before any text (Llama: its begin-of-sequence id)."""
    bare, dressed = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    for n_before in range(len(dressed) - len(bare) + 1):
        if dressed[n_before : n_before + len(bare)] == bare:
            return tuple(dressed[:n_before])
    return ()


def _split_chat_template(tokenizer: Any) -> tuple[str, str]:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("prompt_format is 'chat', but the tokenizer has no chat template; use plain")
    contents: tuple[Any, ...] = (_QUESTION_MARK, [{"type": "text", "text": _QUESTION_MARK}])
    for content in contents:
        # Some templates take only a list of parts and print nothing, or the list itself, for a plain string.
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        if text.count(_QUESTION_MARK) == 1 and "'type'" not in text:
            before, _, after = text.partition(_QUESTION_MARK)
            return before, after
    raise DataError("the tokenizer's chat template does not show the user's question exactly once; use plain")


def _refuse_control_ids(sample: Sample, tokenizer: Any, template: PromptTemplate, ids: list[list[int]]) -> None:
    reserved = {_token_id(tokenizer, token) for token in SPECIAL_TOKENS} | {template.image_context}
    found = reserved.intersection(token for piece in ids for token in piece)
    if found:
        names = ", ".join(sorted(str(tokenizer.convert_ids_to_tokens(token)) for token in found))
        raise DataError(f"{sample.source or sample.key} (key {sample.key}): the text contains the token {names}")
