"""Checks that no single key can answer for: contradictions between keys, and what has to exist on disk."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from coconut.config.data_paths import data_mixture
from coconut.config.faults import Fault, Note
from coconut.types import STAGED_METHODS

SPLITS = ("val", "test")  # that converters write only when they are asked for them
#: Folder that a command makes -> the command.
RECIPES = {
    "data/arrow_maze": "python launch/prepare_data.py arrow-maze",
    "data/aokvqa": "python launch/prepare_data.py aokvqa",
    "data/prosqa": "python launch/prepare_data.py prosqa",
    "data/prosqa_small": "python launch/demo.py --task prosqa",
}

_OWN_DATA = f"give your own (README: your own data), or make the demo's with `{RECIPES['data/arrow_maze']}`"
#: Keys that look at validation, and what a stage calls them.
_NEED_VALIDATION = {"advance_at": "advance_at", "early_stopping_patience": "patience", "save_only_improve": None}
_BATCH_KEYS = ("global_batch_size", "batch_size_training", "gradient_accumulation_steps")


def contradictions(values: Mapping[str, Any], faulty: Collection[str]) -> list[Fault]:
    """Faults between keys that are each sound; keys in ``faulty`` are left out of the judgement."""
    found = (fault for keys, fault in _contradictions(values) if not set(keys) & set(faulty))
    return list(found)


def _contradictions(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Fault]]:
    if values["fp16"] and values["bf16"]:
        text = "fp16 = True with bf16 = True: choose one, bf16 where the GPU has it (no loss scaling needed)"
        yield ("fp16", "bf16"), Fault("fp16", text)
    if values["attn_implementation"] == "flash_attention_2" and not (values["fp16"] or values["bf16"]):
        text = "attn_implementation = 'flash_attention_2': computes in half precision only; set bf16: true, or use sdpa"
        yield ("attn_implementation", "fp16", "bf16"), Fault("attn_implementation", text)
    method = values["method"]
    for name, default in (("latent_feedback", "hidden"), ("latent_passes", "sequential")):
        if method.startswith("pause") and values[name] != default:
            text = f"{name} = {values[name]!r} with method = {method!r}: pauses are not computed; leave it out"
            yield ("method", name), Fault(name, text)
    for name in ("lora_alpha", "lora_dropout", "lora_target_modules"):
        if values["lora_rank"] is None and values[name]:
            text = f"{name} = {values[name]!r}: without lora_rank there is no LoRA; set lora_rank, or leave it out"
            yield ("lora_rank", name), Fault(name, text)
    yield from _batch_faults(values, "", ())
    for stage, own in values["stages"].items():
        if own.keys() & {*_BATCH_KEYS}:
            yield from _batch_faults({**values, **own}, f"stages.{stage}.", ("stages",))
        if own.get("epochs") is not None and own.get("steps") is not None:
            text = f"stages.{stage}.steps = {own['steps']} with epochs = {own['epochs']}: keep one of them"
            yield ("stages",), Fault(f"stages.{stage}.steps", text)


def _batch_faults(
    values: Mapping[str, Any], where: str, also: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Fault]]:
    whole, micro, accumulation = (values[key] for key in _BATCH_KEYS)
    if whole is not None and micro > whole:
        text = f"{where}batch_size_training = {micro}: is more than global_batch_size = {whole}, of which it is a part"
        yield (*also, "batch_size_training", "global_batch_size"), Fault(f"{where}batch_size_training", text)
    if whole is not None and accumulation != 1:
        text = (
            f"{where}gradient_accumulation_steps = {accumulation} with global_batch_size = {whole}: keep one of them; "
            "accumulation follows from global_batch_size, batch_size_training and the number of ranks"
        )
        keys = (*also, "gradient_accumulation_steps", "global_batch_size")
        yield keys, Fault(f"{where}gradient_accumulation_steps", text)


def observations(values: Mapping[str, Any]) -> list[Note]:
    """What is allowed, but perhaps not what was meant."""
    notes = []
    last, method = values["max_latent_stage"], values["method"]
    if method in STAGED_METHODS:
        unused = [stage for stage in values["stages"] if stage > last]
        reason = f"max_latent_stage = {last}"
    else:  # cot is trained as stage 0 is
        unused = [stage for stage in values["stages"] if stage != 0 or method != "cot"]
        reason = f"method = {method!r} has a single stage"
        if method != "cot":
            reason += ", with the run's own learning_rate, warmup_steps, advance_at and train_data_path"
    if unused:
        names = ", ".join(map(str, sorted(unused)))
        notes.append(Note(f"settings of stages {names} are not used: {reason}"))
    if values["start_stage"] and values["load_model_path"] is None:
        text = (
            f"start_stage = {values['start_stage']} without load_model_path: stage 0 is left out, so model_id must be"
        )
        notes.append(Note(f"{text} a model that writes its steps already"))
    by_steps = values["steps_per_stage"] or any(table.get("steps") for table in values["stages"].values())
    if by_steps and values["num_epochs"] is not None:
        text = (
            f"stages are counted in steps, and num_epochs = {values['num_epochs']} may end the run before the last does"
        )
        notes.append(Note(f"{text}; null = no limit"))
    if values["method"] == "coconut" and values["num_epochs"] is not None and not by_steps:
        epochs = [values["stages"].get(k, {}).get("epochs", values["epochs_per_stage"]) for k in range(last)]
        if sum(epochs) >= values["num_epochs"]:
            notes.append(
                Note(
                    f"num_epochs = {values['num_epochs']} may end before stage {last} begins: "
                    f"the stages before it take up to {sum(epochs)} epochs"
                )
            )
    return notes


def missing_paths(values: Mapping[str, Any]) -> list[Fault]:
    """Faults of paths that are not set or not there, each with the way to get it."""
    faults = []
    needed = "test_data_path" if values["only_eval"] else "train_data_path"
    if values[needed] is None:
        faults.append(Fault(needed, f"{needed}: not set; {_OWN_DATA}"))
    for key, path in _data_paths(values):
        if looks_remote(path):
            faults += _unusable_url(key, path, values)
        elif not Path(path).exists():
            faults.append(Fault(key, f"{key} = {path!r}: does not exist; {_recipe(path) or _OWN_DATA}"))
    if values["val_data_path"] is None and not values["only_eval"]:
        for key, name in _NEED_VALIDATION.items():
            if values[key] or (name is not None and any(table.get(name) for table in values["stages"].values())):
                faults.append(Fault(key, f"{key}: looks at validation, but val_data_path is not set"))
    return faults + _missing_model(values) + _missing_others(values)


def _data_paths(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Key and path of all data that a run reads."""
    if not values["only_eval"]:
        tables = {f"stages.{stage}.train_data_path": own for stage, own in values["stages"].items()}
        for key, table in {"train_data_path": values, **tables}.items():
            yield from ((key, path) for path in data_mixture(table.get("train_data_path")))
        yield from (("val_data_path", path) for path in data_mixture(values["val_data_path"]))
    yield from (("test_data_path", path) for path in data_mixture(values["test_data_path"]))


def _missing_model(values: Mapping[str, Any]) -> list[Fault]:
    start, model = values["load_model_path"], values["model_id"]
    if start is not None:
        if Path(start).is_dir():
            return []
        return [Fault("load_model_path", f"load_model_path = {start!r}: is not a folder; give a checkpoint's, or null")]
    if not looks_local(model) or Path(model).is_dir():
        return []
    fix = _recipe(model) or "give a folder with config.json, or a hub id such as OpenGVLab/InternVL3-1B-hf"
    return [Fault("model_id", f"model_id = {model!r}: is not a folder; {fix}")]


def _missing_others(values: Mapping[str, Any]) -> list[Fault]:
    faults = []
    root, resume, engine = values["image_root"], values["resume"], values["deepspeed"]
    run_dir = Path(values["save_path"]) / values["name"]
    nearest = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not nearest.is_dir():
        text = f"save_path = {values['save_path']!r}: {nearest} is a file, where {run_dir} has to be a folder"
        faults.append(Fault("save_path", f"{text}; choose another save_path or name"))
    if root is not None and not Path(root).is_dir():
        fix = "give the folder that image paths of the data start from, or null for the data file's own"
        faults.append(Fault("image_root", f"image_root = {root!r}: is not a folder; {fix}"))
    if resume not in ("auto", "none") and not values["only_eval"] and not Path(resume).exists():
        faults.append(Fault("resume", f"resume = {resume!r}: must be auto, none, or a checkpoint that exists"))
    if engine is not None and not values["only_eval"] and not Path(engine).is_file():
        known = ", ".join(str(path) for path in sorted(Path("ds_configs").glob("*.json")))
        choices = f"; known here: {known}" if known else "; run from the project's folder, which holds ds_configs/"
        faults.append(Fault("deepspeed", f"deepspeed = {engine!r}: no such file{choices}"))
    return faults


def _unusable_url(key: str, url: str, values: Mapping[str, Any]) -> list[Fault]:
    if values["only_eval"]:
        return [Fault(key, f"{key} = {url!r}: only_eval reads local data; fetch them, or score at the end of a run")]
    if url.startswith("pipe:") and not values["allow_pipe_urls"]:
        return [Fault(key, f"{key} = {url!r}: would run a command; set allow_pipe_urls: true if you trust it")]
    return []


def looks_remote(path: str) -> bool:
    """Whether a data path is a URL, or a command in the place of one."""
    return "://" in path or path.startswith("pipe:")


def looks_local(model_id: str) -> bool:
    """Whether a model's name can only be a path: a hub id is ``name`` or ``owner/name``."""
    return model_id.startswith((".", "/", "~")) or model_id.count("/") > 1 or model_id.endswith("/")


def _recipe(path: str) -> str | None:
    for folder, command in RECIPES.items():
        if Path(path).is_relative_to(folder):
            stem = Path(path).stem
            split = f" --split {stem}" if command.startswith("python launch/prepare_data.py") and stem in SPLITS else ""
            return f"make it with `{command}{split}`"
    return None
