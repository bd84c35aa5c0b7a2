"""Process groups without a group, logging, seeds, the tokenizer."""

from __future__ import annotations

import logging
import os
import random
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coconut.config import Config
from coconut.types import SPECIAL_TOKENS, ConfigError, DataError
from coconut.utils import distributed
from coconut.utils.logging import get_logger, log_to_wandb, setup_logging
from coconut.utils.seed import set_seed
from coconut.utils.tokenizer import load_tokenizer, special_token_ids


class TestAlone:
    def test_collectives_are_the_identity(self) -> None:
        distributed.init_distributed_training()
        assert not torch.distributed.is_initialized()
        assert (distributed.get_rank(), distributed.get_world_size(), distributed.get_local_rank()) == (0, 1, 0)
        assert distributed.is_main_process()
        assert distributed.all_reduce_sum([1, 2.5]) == [1.0, 2.5]
        assert distributed.all_reduce_max([3]) == [3.0]
        assert distributed.all_gather_object({"a": 1}) == [{"a": 1}]
        distributed.barrier()
        distributed.shutdown_distributed()

    def test_half_an_environment_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="sets RANK, WORLD_SIZE but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
            distributed.init_distributed_training()

    def test_native_builds_stay_in_the_project(self, monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.setenv("PATH", "/usr/bin")
        distributed.prepare_native_builds()
        assert os.environ["TORCH_EXTENSIONS_DIR"] == str(project / ".cache" / "torch_extensions")
        assert os.environ["PATH"] == f"{sysconfig.get_path('scripts')}:/usr/bin"
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/elsewhere")
        distributed.prepare_native_builds()
        assert os.environ["TORCH_EXTENSIONS_DIR"] == "/elsewhere"


WORKER = """
import os
import torch.distributed as dist
from coconut.utils.distributed import *
from coconut.utils.distributed import shutdown_distributed
os.environ["LOCAL_SIZE"] = "{world}"  # as DeepSpeed's launcher sets it; torchrun does not
init_distributed_training({force})
init_distributed_training()
rank, world = get_rank(), get_world_size()
assert dist.is_initialized() and dist.get_backend() in ("gloo", "nccl") and world == {world}
assert is_main_process() == (rank == 0)
assert all_reduce_sum([1, rank, 2.0**-40]) == [world, world * (world - 1) / 2, world * 2.0**-40]
assert all_reduce_max([rank, -rank]) == [world - 1, 0]
assert all_gather_object("r" * rank) == ["r" * r for r in range(world)]
if dist.get_backend() == "gloo":
    mapped = [line for line in open("/proc/self/maps") if "deepspeed_allreduce_buffer" in line]
    assert len(mapped) == world and all("(deleted)" in line for line in mapped), mapped
barrier()
shutdown_distributed()
assert get_rank() == rank
"""


AGAIN = """
import deepspeed, torch
from coconut.utils.distributed import *
from coconut.utils.distributed import shutdown_distributed
for _ in range(2):
    init_distributed_training(force=True)
    model = torch.nn.Linear(4, 1)
    settings = {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    shutdown_distributed()
"""


def run_python(*arguments: str, project: Path) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.distributed
def test_a_group_may_follow_another(project: Path) -> None:
    run_python("-c", AGAIN, project=project)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2])
def test_groups_leave_nothing_in_shared_memory(tmp_path: Path, project: Path, world: int) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(force="force=True" if world == 1 else "", world=world))
    launcher = [] if world == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    run_python(*launcher, str(script), project=project)


class TestLogging:
    @pytest.fixture
    def config(self, tmp_path: Path) -> Config:
        return Config({"save_path": str(tmp_path), "name": "run", "use_fsdp": True})

    def test_console_and_file(self, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
        setup_logging(config)
        get_logger("coconut.training").info("one line")
        get_logger("coconut.training").debug("not this one")
        text = (config.run_dir / "log.txt").read_text()
        assert text == capsys.readouterr().err
        assert "coconut.training: one line\n" in text
        assert "not this one" not in text
        assert text.count("use_fsdp: true means ZeRO stage 3") == 1

    def test_setting_up_again_replaces(self, config: Config) -> None:
        setup_logging(config)
        config.log_level = "DEBUG"
        setup_logging(config)
        get_logger("coconut").debug("once")
        assert (config.run_dir / "log.txt").read_text().count("once") == 1

    def test_other_ranks_only_warn(
        self, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("RANK", "3")
        setup_logging(config)
        get_logger("coconut.data").info("silent")
        get_logger("coconut.data").warning("heard")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].endswith("WARNING [rank 3] coconut.data: heard")
        assert not config.run_dir.exists()

    def test_names(self) -> None:
        assert get_logger("coconut.data.shards").name == "coconut.data.shards"
        assert get_logger("__main__").name == "coconut.main"
        assert get_logger("coconutty").parent is logging.getLogger("coconut")

    @pytest.mark.slow
    def test_wandb_offline(self, config: Config) -> None:
        wandb = pytest.importorskip("wandb")
        config.use_wandb = True
        try:
            setup_logging(config)
            log_to_wandb({"loss": 1.0}, step=3)
            assert wandb.run.project == "multimodal-coconut"
            assert wandb.run.config["learning_rate"] == config.learning_rate
        finally:
            wandb.finish()
        assert list((config.run_dir / "wandb").glob("offline-run-*"))
        log_to_wandb({"loss": 1.0})  # the run is over: nothing happens

    def test_wandb_is_missing(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        config.use_wandb = True
        with pytest.raises(ConfigError, match="wandb is not installed"):
            setup_logging(config)


def test_a_seed_fixes_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        set_seed(7)
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    assert draw() == draw()
    set_seed(2**40)


@pytest.fixture
def word_tokenizer(tmp_path: Path) -> Path:
    """A folder with a tokenizer of a few words that has neither padding nor our tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, "a": 1, "b": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


class TestTokenizer:
    def test_the_three_tokens_are_added_once(self, word_tokenizer: Path, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(word_tokenizer)
        ids = special_token_ids(tokenizer)
        assert ids == (3, 4, 5)
        assert tokenizer.encode("a" + "".join(SPECIAL_TOKENS) + "b", add_special_tokens=False) == [1, *ids, 2]
        assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True).split() == ["a", "b"]
        tokenizer.save_pretrained(tmp_path / "saved")
        again = load_tokenizer(tmp_path / "saved")
        assert special_token_ids(again) == ids
        assert len(again) == len(tokenizer) == 6

    def test_padding_falls_back_on_the_end_token(self, word_tokenizer: Path) -> None:
        assert load_tokenizer(word_tokenizer).pad_token_id == 0

    def test_a_tokenizer_without_them(self, word_tokenizer: Path) -> None:
        from transformers import AutoTokenizer

        with pytest.raises(DataError, match=r"lacks <\|start-latent\|>.* load it with coconut.load_tokenizer"):
            special_token_ids(AutoTokenizer.from_pretrained(word_tokenizer))

    @pytest.mark.parametrize("kind", ["folder", "hub"])
    def test_nothing_usable(self, kind: str, tmp_path: Path) -> None:
        name: Any = tmp_path if kind == "folder" else "nobody/no-such-model"
        with pytest.raises(ConfigError) as error:
            load_tokenizer(name)
        assert repr(str(name)) in str(error.value)
        assert ("read as a folder" if kind == "folder" else "read as a hub id") in str(error.value)
        assert "Give (model_id, --checkpoint)" in str(error.value)

    def test_an_empty_name(self) -> None:
        with pytest.raises(ConfigError, match="set model_id"):
            load_tokenizer("")


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", TAKEN_PORT],
            env=os.environ | launched | {"MASTER_PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert f"port {port} is taken" in done.stdout and f"--master_port {port + 1}" in done.stdout, done.stderr[-2000:]


TAKEN_PORT = """
from coconut.types import ConfigError
from coconut.utils.distributed import init_distributed_training
try:
    init_distributed_training(force=True)
except ConfigError as error:
    print(error)
"""
