"""What thoughts say when they are read as words, and how they lie to each other.

    thought [H] --language head--> top tokens                     the logit lens, as Figure 4 of arXiv 2412.06769
    thought [H] --linear classifier--> last word of a written step   on samples the classifier has not seen
    thoughts    --norms, cosines--> geometry

Shapes: N samples, T thoughts, H hidden size, W words, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coconut.evaluation.loaded import Loaded
from coconut.evaluation.probe import Study
from coconut.evaluation.score import wilson_interval

TOP = 5
#: A step whose last word takes more values than this over the samples is free text, not a state to be read off.
MAX_WORDS = 64
_MIN_SAMPLES = 100  # fewer leave a classifier nothing to learn from


@torch.no_grad()
def lens(asked: Study | Loaded, thoughts_TH: Tensor, top: int = TOP) -> list[list[dict[str, Any]]]:
    """For each thought the likeliest next tokens, with their probabilities."""
    head = asked.model.backbone.logits
    weight = next(asked.model.backbone.head.parameters())
    shares_TV = head(thoughts_TH.to(weight)).float().softmax(-1).cpu()
    values, ids = shares_TV.topk(min(top, shares_TV.shape[-1]))
    return [
        [{"token": show(asked.tokenizer, int(i)), "share": float(v)} for i, v in zip(row_ids, row, strict=True)]
        for row_ids, row in zip(ids, values, strict=True)
    ]


def show(tokenizer: Any, token_id: int) -> str:
    """A token as it is to be shown: a line break as an arrow, a blank as a dot."""
    text = str(tokenizer.decode([token_id]))
    return text.replace("\n", "⏎").replace(" ", "·") or str(tokenizer.convert_ids_to_tokens(token_id))


@torch.no_grad()
def lens_against_steps(study: Study) -> dict[str, Any]:
    """How often a thought's likeliest token is a word of each written step, and of the same step of another sample.

    Returns:
        "share" and "chance", rows for thoughts and columns for steps and last the answer.
    """
    head = study.model.backbone.logits
    weight = next(study.model.backbone.head.parameters())
    texts = [feature["text"] for feature in study.features]
    n_columns = max(len(text.steps) for text in texts) + 1
    blank = set(study.tokenizer("\n", add_special_tokens=False)["input_ids"])
    hits = torch.zeros(2, study.n_thoughts, n_columns)
    counts = torch.zeros(study.n_thoughts, n_columns)
    for row, thoughts_TH in enumerate(study.thoughts):
        tops = head(thoughts_TH.to(weight)).argmax(-1).tolist()
        for own, text in enumerate((texts[row], texts[row - 1])):
            pieces = [*text.steps, *([()] * (n_columns - 1 - len(text.steps))), _answer_words(study, text.answer)]
            for column, piece in enumerate(pieces):
                for thought, token in enumerate(tops):
                    hits[own, thought, column] += token in set(piece) - blank
                    counts[thought, column] += own == 0
    share, chance = (hits / counts.clamp(min=1)).tolist()
    columns = [*(f"step {i + 1}" for i in range(n_columns - 1)), "answer"]
    return {"columns": columns, "share": share, "chance": chance}


def _answer_words(study: Study, answer: Sequence[int]) -> tuple[int, ...]:
    """Ids of an answer without its mark and its end."""
    return tuple(answer[len(study.tokenizer("###", add_special_tokens=False)["input_ids"]) : -1])


def linear_probe(study: Study) -> dict[str, Any] | None:
    """Can a linear classifier read the last word of step j from thought t? In the maze, that is the cell after hop j.

    Half of the samples train it and the other half test it. Two guesses stand beside it that see no thought: the
    commonest word, and the commonest word after this very question (in the maze: from this start cell).

    Returns:
        None where steps end in free text, or samples are few.
    """
    n_steps = min(len(sample.steps) for sample in study.samples)
    rows = [i for i, t in enumerate(study.thoughts) if len(t) == study.n_thoughts]
    if len(rows) < _MIN_SAMPLES or not n_steps:
        return None
    words = [[_last_word(study.samples[i].steps[j]) for i in rows] for j in range(n_steps)]
    if max(len(set(column)) for column in words) > MAX_WORDS or max(len(set(column)) for column in words) < 2:
        return None
    questions = [study.samples[i].question for i in rows]
    thoughts_NTH = torch.stack([study.thoughts[i] for i in rows])
    half = len(rows) // 2
    accuracy = [[_read_off(thoughts_NTH[:, t], column, half) for column in words] for t in range(study.n_thoughts)]
    baselines = {
        "commonest word": [_commonest(column, ["" for _ in column], half) for column in words],
        "commonest word after this question": [_commonest(column, questions, half) for column in words],
    }
    return {
        "columns": [f"step {j + 1}" for j in range(n_steps)],
        "accuracy": accuracy,
        "intervals": [
            [wilson_interval(round(a * (len(rows) - half)), len(rows) - half) for a in row] for row in accuracy
        ],
        "baselines": baselines,
        "n_train": half,
        "n_test": len(rows) - half,
        "words": [len(set(column)) for column in words],
    }


def _last_word(step: str) -> str:
    return step.split()[-1] if step.split() else ""


def _commonest(words: Sequence[str], given: Sequence[str], half: int) -> float:
    """Share of the second half that is the commonest word of the first half with the same `given`."""
    seen: dict[str, Counter[str]] = {}
    for word, key in zip(words[:half], given[:half], strict=True):
        seen.setdefault(key, Counter())[word] += 1
    overall = Counter(words[:half])
    guesses = [seen.get(key, overall).most_common(1)[0][0] for key in given[half:]]
    return sum(g == w for g, w in zip(guesses, words[half:], strict=True)) / (len(words) - half)


def _read_off(inputs_NH: Tensor, words: Sequence[str], half: int) -> float:
    """Accuracy on the second half of a logistic regression that is fitted to the first."""
    names = {word: i for i, word in enumerate(sorted(set(words)))}
    targets_N = torch.tensor([names[word] for word in words])
    mean_H, std_H = inputs_NH[:half].mean(0), inputs_NH[:half].std(0).clamp(min=1e-6)
    scaled_NH = (inputs_NH - mean_H) / std_H
    with torch.enable_grad():
        layer = nn.Linear(inputs_NH.shape[1], len(names))
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            fit = nn.functional.cross_entropy(layer(scaled_NH[:half]), targets_N[:half])
            loss = fit + 1e-3 * layer.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    with torch.no_grad():
        right: Tensor = layer(scaled_NH[half:]).argmax(-1) == targets_N[half:]
    return float(right.double().mean())


def geometry(study: Study) -> dict[str, Any]:
    """Norms of the thoughts, beside those of word embeddings, and cosines inside a sample and between samples.

    Returns:
        "norm_mean" and "norm_std" by thought; "embedding_norm", the mean of the vocabulary; "cosine" between thoughts
        of one sample, [T][T], averaged; "across", by thought, the mean cosine to the same thought of another sample.
    """
    rows = [t for t in study.thoughts if len(t) == study.n_thoughts]
    thoughts_NTH = torch.stack(rows).double()
    norms_NT = thoughts_NTH.norm(dim=-1)
    unit_NTH = thoughts_NTH / norms_NT[..., None].clamp(min=1e-12)
    cosines_TT = (unit_NTH @ unit_NTH.transpose(1, 2)).mean(0)
    across_T = (unit_NTH * unit_NTH.roll(1, 0)).sum(-1).mean(0) if len(rows) > 1 else None
    embeddings_VH = study.model.base_model.get_input_embeddings().weight.detach()
    return {
        "norm_mean": norms_NT.mean(0).tolist(),
        "norm_std": norms_NT.std(0).tolist() if len(rows) > 1 else [0.0] * study.n_thoughts,
        "embedding_norm": float(embeddings_VH.double().norm(dim=-1).mean()),
        "cosine": cosines_TT.tolist(),
        "across": across_T.tolist() if across_T is not None else None,
        "n": len(rows),
    }
