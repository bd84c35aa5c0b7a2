"""The model card (README.md) of an exported folder: what it is, on what and how it was trained, its scores, its use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from coconut.evaluation.collect import Evaluation
from coconut.types import StageSpec

_PATHS = (
    "train_data_path",
    "val_data_path",
    "test_data_path",
    "model_id",
    "load_model_path",
    "image_root",
    "deepspeed",
)
_PRIVATE = ("save_path", "project", "wandb_project", "log_level", "resume")


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration without the names of this machine's folders: of a path its last two parts are kept."""
    return {name: _public(name, value) for name, value in config.items() if name not in _PRIVATE}


def _public(name: str, value: Any) -> Any:
    if name == "stages" and value:
        return {stage: {key: _public(key, own) for key, own in table.items()} for stage, table in value.items()}
    if name not in _PATHS or not value:
        return value
    if isinstance(value, Mapping):  # a mixture, path -> weight
        return {_public(name, path): weight for path, weight in value.items()}
    return "/".join(PurePath(value).parts[-2:]) if PurePath(value).is_absolute() else value


def model_card(
    name: str, spec: StageSpec, metadata: dict[str, Any], evaluations: Sequence[Evaluation], has_images: bool
) -> str:
    """The card as Markdown with its YAML head.

    Args:
        name: of the model.
        spec: stage of the weights.
        metadata: of the checkpoint, its configuration made public; "base_model" is a hub id.
        evaluations: folders of `launch/evaluate.py` for the table of scores.
        has_images: whether the model takes pictures.
    """
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if has_images else "text-generation",
        "tags": ["coconut", "continuous-thought", "latent-reasoning"],
    }
    if metadata.get("base_model"):
        head["base_model"] = metadata["base_model"]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        _what(spec, has_images),
        "## Scores\n\n" + _scores(evaluations),
        "## Training\n\n" + _training(spec, metadata),
        "## Use\n\n" + _use(spec, has_images),
    ]
    return "\n\n".join(parts) + "\n"


def _what(spec: StageSpec, has_images: bool) -> str:
    kind = "A vision-language model" if has_images else "A language model"
    if not spec.n_latents:
        return f"{kind} trained with Multimodal CoCoNuT, without latent thoughts (stage {spec.stage})."
    if spec.method.startswith("pause"):
        return f"{kind} trained with Multimodal CoCoNuT to answer after {spec.n_latents} pause tokens, for comparison."
    steps = "all written steps" if spec.n_skip_steps is None else f"the first {spec.n_skip_steps} written steps"
    return (
        f"{kind} that reasons in continuous latent space ([arXiv 2412.06769](https://arxiv.org/abs/2412.06769)): at "
        f"stage {spec.stage}, {spec.n_latents} latent thoughts take the place of {steps}. A thought is the model's own "
        "last hidden state, fed back as the next input embedding."
    )


def _scores(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return "None were given to the export."
    head = ["data", "asked", "accuracy, 95 % interval", "questions", "thoughts", "tokens written"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for evaluation in evaluations:
        s = evaluation.summary
        low, high = s["accuracy_interval_95"]
        changes = ", ".join(evaluation.changes) or "as it is"
        lines.append(
            f"| {_cell(evaluation.data.name)} | {changes} | {s['accuracy']:.2%} ({low:.2%} to {high:.2%}) | "
            f"{s['n_samples']:,} | {s['mean_latents']:.3g} | {s['mean_generated_tokens']:.3g} |"
        )
    metrics = sorted({e.summary["options"].get("metric", "exact") for e in evaluations})
    return "\n".join(lines) + f"\n\nMetric: {', '.join(metrics)}; greedy answers, a failure counts as wrong."


def _training(spec: StageSpec, metadata: dict[str, Any]) -> str:
    config, state = metadata.get("config") or {}, metadata.get("state") or {}
    facts: dict[str, Any] = {
        "imported from": metadata.get("imported_from"),
        "started from": config.get("model_id"),
        "training data": config.get("train_data_path"),
        "validation data": config.get("val_data_path"),
        "method": config.get("method"),
        "thoughts a step": spec.c_thought,
        "stage of these weights": spec.stage,
        "last stage of the curriculum": config.get("max_latent_stage"),
        "stage mixing": config.get("uniform_prob"),
        "learning rate": config.get("learning_rate"),
        "samples": state.get("samples"),
        "optimizer steps": state.get("step"),
        "seed": config.get("seed"),
    }
    return "\n".join(f"- {name}: {_cell(str(value))}" for name, value in facts.items() if value is not None)


def _use(spec: StageSpec, has_images: bool) -> str:
    kind = "AutoModelForImageTextToText" if has_images else "AutoModelForCausalLM"
    loader = "AutoProcessor" if has_images else "AutoTokenizer"
    name = "processor" if has_images else "tokenizer"
    plain = (
        "Plain transformers loads this folder and answers without latent thoughts:\n\n"
        f"```python\nfrom transformers import {kind}, {loader}\n\n"
        f'model = {kind}.from_pretrained("THIS_FOLDER")\n{name} = {loader}.from_pretrained("THIS_FOLDER")\n```'
    )
    with_thoughts = (
        "With its thoughts, by Multimodal CoCoNuT:\n\n```python\nfrom coconut import MultimodalCoconut\n\n"
        'model = MultimodalCoconut.from_pretrained("THIS_FOLDER")\n```\n\n'
        'or `python launch/generate.py --checkpoint THIS_FOLDER --question "..."'
        + (" --image picture.png" if has_images else "")
        + "`."
    )
    return f"{with_thoughts}\n\n{plain}" if spec.markers else plain


def _cell(text: str) -> str:
    """Text from data in a table's cell or a list: nothing in it may end the cell or become markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
