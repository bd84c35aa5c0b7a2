"""A small arrow maze on disk, its tiny model, and one training run: what the API's examples are tried on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from coconut.utils.distributed import LAUNCHER_VARIABLES

SIZES = {"train": 8, "val": 4, "test": 4, "test_paths": 2}


@dataclass
class Maze:
    """Where the data and the model lie."""

    folder: Path  # shards/, examples/ and model/ as launch/prepare_data.py makes them

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def json(self) -> Path:
        return self.folder / "examples" / "train.json"

    @property
    def jsonl(self) -> Path:
        return self.folder / "examples" / "val.jsonl"

    @property
    def shards(self) -> Path:
        return self.folder / "shards" / "test"

    def records(self) -> list[dict[str, Any]]:
        return json.loads(self.json.read_text())


@dataclass
class Run:
    """A trainer that has trained, and what its methods returned."""

    trainer: Any
    dataset: Any
    returned: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="package")
def maze(tmp_path_factory: pytest.TempPathFactory) -> Maze:
    from launch.prepare_data import prepare_arrow_maze

    maze = Maze(tmp_path_factory.mktemp("api") / "maze")
    prepare_arrow_maze(maze.folder, sizes=SIZES)
    records = json.loads((maze.folder / "examples" / "examples.json").read_text())
    maze.json.write_text(json.dumps(records))
    maze.jsonl.write_text("".join(json.dumps(record) + "\n" for record in records[:4]))
    return maze


@pytest.fixture(scope="package")
def one_rank() -> Iterator[None]:
    """Leaves the process group of one that a trainer without a launcher makes, and takes back its environment."""
    before = {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}
    yield
    from coconut.utils.distributed import shutdown_distributed

    shutdown_distributed()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="package")
def run(maze: Maze, one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The trainer's methods in the order that a user of the API calls them, then the whole curriculum."""
    import torch
    from torch.utils.data import DataLoader

    from coconut import MultimodalCoconut, create_config_from_template, load_tokenizer
    from coconut.data import ImageProcessor, MultimodalCollator, MultimodalDataset
    from coconut.training import MultimodalCoTTrainer
    from coconut.types import ConfigError

    config = create_config_from_template(
        "coconut",
        model_id=str(maze.model),
        train_data_path=str(maze.json),
        val_data_path=str(maze.jsonl),
        test_data_path=str(maze.shards),
        save_path=str(tmp_path_factory.mktemp("runs")),
        image_size=112,
        dynamic_preprocess=False,
        max_num_patches=1,
        use_thumbnail=False,
        prompt_format="plain",
        c_thought=1,
        max_latent_stage=1,
        epochs_per_stage=1,
        num_epochs=2,
        learning_rate=1e-3,
        warmup_steps=0,
        batch_size_training=4,
        batch_size_eval=4,
        max_new_tokens=4,
        num_workers=0,
        log_every_n_steps=1,
    )
    model = MultimodalCoconut.from_pretrained(config.model_id, config)
    tokenizer, processor = load_tokenizer(config.model_id), ImageProcessor.from_config(config)
    dataset = MultimodalDataset(config.train_data_path, tokenizer, processor)
    trainer = MultimodalCoTTrainer(model, tokenizer, processor, config)
    collate = MultimodalCollator(tokenizer, processor, model.latent_token_id)
    loader: DataLoader[Any] = DataLoader(
        trainer.stages.prepare_stage_data(dataset, 1),  # type: ignore[arg-type]
        batch_size=4,
        collate_fn=collate,
    )
    run = Run(trainer, dataset)
    with pytest.raises(ConfigError, match="engine owns the optimizer") as foreign:
        trainer.train_epoch(0, loader, torch.optim.SGD(model.parameters(), lr=0.1))
    run.returned["foreign optimizer"] = str(foreign.value)
    run.returned["train_epoch"] = trainer.train_epoch(0, loader, trainer.engine.optimizer)
    run.returned["train_epoch again"] = trainer.train_epoch(epoch=1, dataloader=loader)
    run.returned["validate"] = trainer.validate(loader)
    run.returned["save_checkpoint"] = trainer.save_checkpoint(1, run.returned["validate"])
    run.returned["checkpoints"] = trainer.checkpoints.complete()
    run.returned["train"] = trainer.train()
    return run


@pytest.fixture
def aokvqa(maze: Maze, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: Path) -> Path:
    """The environment that args/multimodal_coconut.yaml reads, and a tiny InternVL of its tile size."""
    from coconut.data.arrow_maze import vocabulary
    from coconut.model.tiny import build_tiny_internvl, build_word_tokenizer, save_tiny

    folder = tmp_path / "aokvqa"
    folder.mkdir()
    shutil.copytree(maze.folder / "examples" / "images", folder / "images")
    for name in ("train", "val", "test"):
        (folder / f"{name}.json").write_text(json.dumps(maze.records()[:4]))
    tokenizer = build_word_tokenizer(vocabulary())
    save_tiny(build_tiny_internvl(tokenizer, image_size=448), tokenizer, tmp_path / "model")
    monkeypatch.setenv("AOKVQA_DIR", str(folder))
    monkeypatch.setenv("MODEL_ID", str(tmp_path / "model"))
    monkeypatch.chdir(project)
    return folder
