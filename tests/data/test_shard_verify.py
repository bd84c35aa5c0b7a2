"""--verify names shard and key of every difference and ends with code 1."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from coconut.data.shard_index import MANIFEST, ShardIndex
from coconut.data.shard_verify import verify_shards
from coconut.data.shards import write_shards
from coconut.types import DataError
from launch.make_shards import main


@pytest.fixture
def shards(tmp_path, make_samples) -> Path:
    write_shards(make_samples(11), tmp_path / "shards", shard_size_mb=0.012)
    return tmp_path / "shards"


def middle(shards: Path, sample: int) -> int:
    """A byte in the middle of the sample's picture."""
    with tarfile.open(shards / "shard-000001.tar") as tar:
        return [member.offset_data + member.size // 2 for member in tar if member.name.endswith("png")][sample]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def first_of(shards: Path, shard: int) -> str:
    index = ShardIndex(shards, check_shards=False)
    return index.key(sum(one.samples for one in index.shards[:shard]))


def flipped_bit(shards: Path) -> list[str]:
    key = first_of(shards, 1)
    flip(shards / "shard-000001.tar", middle(shards, 0))
    return ["shard-000001.tar: its SHA-256", f"shard-000001.tar (key {key}): its bytes are not those"]


def truncated(shards: Path) -> list[str]:
    key = first_of(shards, 1)
    os.truncate(shards / "shard-000001.tar", 1000)
    return ["shard-000001.tar is 1000 bytes long instead of", f"shard-000001.tar (key {key}): the shard ends"]


def emptied(shards: Path) -> list[str]:
    (shards / "shard-000001.tar").write_bytes(b"")
    return ["shard-000001.tar is 0 bytes long instead of"]


def missing(shards: Path) -> list[str]:
    key = first_of(shards, 1)
    (shards / "shard-000001.tar").unlink()
    return [f"shard-000001.tar is missing: the samples {key} to"]


def extra_member(shards: Path) -> list[str]:
    with tarfile.open(shards / "shard-000001.tar", "a") as tar:
        member = tarfile.TarInfo("999999999.json")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"{}"))
    return ["shard-000001.tar: a member that no sample of the index has, '999999999.json' at byte"]


def extra_shard(shards: Path) -> list[str]:
    (shards / "shard-000099.tar").write_bytes((shards / "shard-000000.tar").read_bytes())
    return ["shard-000099.tar: a tar that the manifest does not name"]


def changed_size_of_image(shards: Path) -> list[str]:
    flip(shards / "index.images.npy", 128)  # after the header: the first width
    key = first_of(shards, 0)
    return ["index.images.npy: its SHA-256", f"shard-000000.tar (key {key}): its image sizes is [(28, 28)]"]


def changed_key(shards: Path) -> list[str]:
    flip(shards / "index.keys.npy", 128)
    return [
        "index.keys.npy: its SHA-256",
        "shard-000000.tar (key rample-0): its key is sample-0, in the index rample-0",
    ]


def cut_index(shards: Path) -> list[str]:
    os.truncate(shards / "index.rows.npy", 300)
    return ["index.rows.npy is 300 bytes long instead of", "--index-only"]


def header_of_index(shards: Path) -> list[str]:
    flip(shards / "index.steps.npy", 0)
    return ["index.steps.npy is damaged", "--index-only"]


def manifest_of_another(shards: Path) -> list[str]:
    path = shards / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    return ["shard-000000.tar: its SHA-256 is not that of the manifest"]


DAMAGE = (
    flipped_bit, truncated, emptied, missing, extra_member, extra_shard, changed_size_of_image, changed_key, cut_index,
    header_of_index, manifest_of_another,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_difference_is_named(shards, capsys, damage: Callable[[Path], list[str]]) -> None:
    arguments = ["--out", str(shards), "--verify", "--workers", "1"]
    assert main(arguments) == 0
    expected = damage(shards)
    assert main(arguments) == 1
    said = capsys.readouterr().err
    for part in expected:
        assert part in said


def test_any_flipped_bit_of_any_file_is_found(shards) -> None:
    random = np.random.default_rng(0)
    for path in sorted(shards.iterdir()):
        if path.name == MANIFEST:
            continue
        before = path.read_bytes()
        for position in random.integers(0, len(before), 4).tolist():
            flip(path, position)
            lines = verify_shards(shards)
            assert lines and all(path.name in line or path.suffix == ".npy" for line in lines)
            path.write_bytes(before)
    assert verify_shards(shards) == []


def test_a_set_written_before_samples_had_checksums(shards) -> None:
    manifest = json.loads((shards / MANIFEST).read_text())
    del manifest["index"]["index.checksums.npy"], manifest["layout"], manifest["skipped"]
    (shards / MANIFEST).write_text(json.dumps(manifest))
    (shards / "index.checksums.npy").unlink()
    assert verify_shards(shards) == []


def test_nothing_to_verify(tmp_path) -> None:
    with pytest.raises(DataError, match="holds no shards"):
        verify_shards(tmp_path)
