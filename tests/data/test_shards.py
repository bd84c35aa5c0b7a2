"""Shards: what is written is read again, byte for byte, always whole, and damage is named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from coconut.data import shard_writer
from coconut.data.bad_samples import bad_samples_of
from coconut.data.image import ImageProcessor
from coconut.data.plan import make_plan
from coconut.data.shard_index import MANIFEST, ROW
from coconut.data.shard_verify import verify_shards
from coconut.data.shards import ShardReader, open_dataset, write_shards
from coconut.data.stream import StreamLoader
from coconut.types import Batch, DataError, Sample


@pytest.fixture(scope="module")
def samples(make_samples, picture):
    several = Sample("größer/x.y", "wie ?", ("a", "bb"), "c", (picture(30, 20, fmt="JPEG"), picture(9, 9)), ("c", "d"))
    return [*make_samples(11), several, Sample("text only", "start ?", (), "red")]


@pytest.fixture
def shards(tmp_path, samples) -> Path:
    write_shards(samples, tmp_path / "shards", shard_size_mb=0.012)
    return tmp_path / "shards"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_samples_come_back_as_they_went(shards, samples) -> None:
    reader = ShardReader(shards)
    assert len(reader) == len(samples)
    assert len(reader.index.shards) > 2
    for i, sample in enumerate(samples):
        again = reader.read(i)
        assert again.source.startswith("shard-0000")
        assert replace(again, source=sample.source) == sample
        assert reader.key(i) == sample.key
    assert reader.n_steps.tolist() == [len(sample.steps) for sample in samples]
    assert reader.image_sizes(11) == [(30, 20), (9, 9)]
    assert reader.image_sizes(12) == []
    assert verify_shards(shards) == []


def test_shards_keep_their_size_and_leave_nothing_else(shards) -> None:
    names = {path.name for path in shards.iterdir()}
    assert {name for name in names if not name.startswith("shard-")} == {
        "index.rows.npy", "index.images.npy", "index.steps.npy", "index.keys.npy", "index.checksums.npy", MANIFEST,
    }  # fmt: skip
    reader = ShardReader(shards)
    assert sum(shard.samples for shard in reader.index.shards) == len(reader)
    for shard in reader.index.shards[:-1]:
        assert shard.bytes <= 24_000


def test_any_webdataset_reader_reads_the_tars(shards, samples) -> None:
    urls = sorted(map(str, shards.glob("*.tar")))
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [item["__key__"] for item in read] == [f"{i:09d}" for i in range(len(samples))]
    assert json.loads(read[11]["json"])["question"] == "wie ?"
    assert read[11]["0.jpg"] == samples[11].images[0]


def test_the_same_samples_give_the_same_bytes(shards, samples, tmp_path) -> None:
    write_shards(iter(samples), tmp_path / "again", shard_size_mb=0.012)
    assert contents(shards) == contents(tmp_path / "again")


def test_paths_and_bytes_give_the_same_shards(shards, samples, tmp_path) -> None:
    (tmp_path / "images").mkdir()
    from_files = []
    for sample in samples:
        paths = []
        for number, content in enumerate(sample.images):
            path = tmp_path / "images" / f"{len(from_files)}-{number}"
            path.write_bytes(content)
            paths.append(str(path))
        from_files.append(replace(sample, images=tuple(paths)))
    write_shards(from_files, tmp_path / "again", shard_size_mb=0.012)
    assert contents(shards) == contents(tmp_path / "again")


def test_costs_come_from_the_index(shards, samples) -> None:
    reader = ShardReader(shards)
    processor = ImageProcessor(14, 4)
    costs = reader.costs(processor.num_patches, tokens_per_patch=10)
    for i, sample in enumerate(samples):
        patches = sum(processor.num_patches(*size) for size in reader.image_sizes(i))
        chars = len(sample.question) + len(sample.answer) + sum(map(len, sample.steps))
        assert costs[i] == pytest.approx(1 + chars / 4 + 10 * patches)


def test_index_rows_have_a_fixed_size_and_are_mapped(shards) -> None:
    reader = ShardReader(shards)
    assert ROW.itemsize == 58
    assert isinstance(reader.index.rows.base, np.memmap)


def test_a_reader_travels_to_other_processes(shards) -> None:
    reader = ShardReader(shards)
    reader.read(0)
    assert pickle.loads(pickle.dumps(reader)).read(3) == reader.read(3)
    child = os.fork()
    if child == 0:
        os._exit(0 if [reader.read(i).key for i in range(13)] == [reader.key(i) for i in range(13)] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_more_shards_than_open_files(shards, monkeypatch) -> None:
    monkeypatch.setattr("coconut.data.shards._MAX_OPEN_SHARDS", 2)
    reader = ShardReader(shards)
    for i in [0, 12, 5, 0, 9, 3]:
        assert reader.read(i).key == reader.key(i)
        assert len(reader._open) <= 2


class Killed(BaseException):
    """Stands in for a signal: no handler of the code under test catches it."""


@pytest.mark.parametrize("kill_at", ["first rename", "manifest"])
def test_a_killed_writer_leaves_nothing_that_looks_whole(shards, samples, monkeypatch, kill_at: str) -> None:
    replace_path = Path.replace

    def dying_replace(self: Path, target: Path) -> Path:
        if kill_at == "first rename" or Path(target).name == MANIFEST:
            raise Killed
        return replace_path(self, target)

    monkeypatch.setattr(Path, "replace", dying_replace)
    with pytest.raises(Killed):
        write_shards(samples[:5], shards)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"no manifest\.json.*make_shards\.py"):
        ShardReader(shards)
    write_shards(samples[:5], shards)  # and can be run again
    assert len(ShardReader(shards)) == 5 and verify_shards(shards) == []


def test_failed_input_leaves_the_old_set_as_it_was(shards, samples) -> None:
    before = contents(shards)
    with pytest.raises(DataError, match="used by an earlier sample"):
        write_shards([samples[0], samples[0]], shards)
    with pytest.raises(DataError, match="zero samples"):
        write_shards([], shards)
    assert contents(shards) == before


def test_a_smaller_set_replaces_a_larger_one_entirely(shards, samples) -> None:
    write_shards(samples[:2], shards)
    assert len(list(shards.glob("*.tar"))) == 1
    assert len(ShardReader(shards)) == 2 and verify_shards(shards) == []


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.png", r"d\.json:4 \(key k\): image 'nowhere\.png' cannot be read"),
        (b"x", r"key k\), image 1: .*not an"),
    ],
)
def test_unreadable_images_are_named(tmp_path, image, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_shards([Sample("k", "q", (), "a", (image,), source="d.json:4")], tmp_path)


def test_one_writer_at_a_time(tmp_path, samples) -> None:
    with shard_writer.locked(tmp_path, wait=False), pytest.raises(DataError, match="another process is writing"):
        write_shards(samples, tmp_path)


def test_missing_and_truncated_files_are_found_at_once(shards) -> None:
    tar = shards / "shard-000001.tar"
    os.truncate(tar, tar.stat().st_size - 512)
    with pytest.raises(DataError, match=r"shard-000001\.tar is \d+ bytes long instead of \d+"):
        ShardReader(shards)
    tar.unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar is missing"):
        ShardReader(shards)


def test_verify_finds_a_flipped_bit(shards) -> None:
    tar = shards / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as opened:
        member = next(m for m in opened if m.name.endswith("png"))
    content[member.offset_data + member.size // 2] ^= 1
    tar.write_bytes(content)
    ShardReader(shards)  # not looked at: opening must be quick
    assert "shard-000001.tar: its SHA-256 is not that of the manifest" in verify_shards(shards)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_flipped_bit_in_a_picture_that_still_decodes_is_a_bad_sample(
    tmp_path, make_samples, picture, num_workers: int
) -> None:
    samples = [replace(sample, images=(picture(8, 8, fmt="BMP"),)) for sample in make_samples(4)]
    write_shards(samples, tmp_path)
    tar = tmp_path / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[content.find(samples[0].images[0]) + 60] ^= 1  # of the first sample's first pixel
    tar.write_bytes(content)
    reader = ShardReader(tmp_path)
    with pytest.raises(DataError, match=r"shard-000000\.tar \(key sample-0\): checksum: its bytes are not those"):
        reader.read(0)
    assert [reader.read(i).key for i in range(1, 4)] == ["sample-1", "sample-2", "sample-3"]

    loader = StreamLoader(
        reader,
        make_plan(np.ones(4), seed=0, epoch=0, slots=1, samples_per_step=4, balance="none"),
        encode=lambda sample, _: {"key": sample.key, "num_patches": 0},
        stage=lambda features: features,
        collate=lambda features: Batch({}, tuple(one["key"] for one in features), 0),
        num_workers=num_workers,
    )
    (batch,) = loader
    assert sorted(batch.keys) == ["sample-1", "sample-2", "sample-3"]
    (bad,) = bad_samples_of([batch])
    assert (bad.shard, bad.key) == ("shard-000000.tar", "sample-0") and bad.reason.startswith("checksum: ")


def test_a_set_without_checksums_of_samples_is_read_as_before(shards, samples) -> None:
    manifest = json.loads((shards / MANIFEST).read_text())
    del manifest["index"]["index.checksums.npy"]
    (shards / MANIFEST).write_text(json.dumps(manifest))
    (shards / "index.checksums.npy").unlink()
    assert [ShardReader(shards).read(i).key for i in range(13)] == [sample.key for sample in samples]


def test_index_of_other_shards_is_noticed(shards, samples, tmp_path) -> None:
    other = tmp_path / "other"
    write_shards([replace(s, key=s.key[::-1]) for s in samples], other, shard_size_mb=0.012)
    shutil.copy(other / "shard-000000.tar", shards / "shard-000000.tar")
    with pytest.raises(DataError, match=r"shard-000000\.tar \(key sample-0\)"):
        ShardReader(shards).read(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 99}, "not of format"), ({"shards": [{"name": "x"}]}, "is damaged"), ({"index": {}}, "is damaged")],
)
def test_a_manifest_of_another_kind_is_refused(shards, change, message: str) -> None:
    path = shards / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        ShardReader(shards)


def test_json_is_sharded_into_the_cache_once(tmp_path, make_samples, picture, monkeypatch) -> None:
    (tmp_path / "a.png").write_bytes(picture(8, 8))
    record = {"question": "q", "steps": [], "answer": "a", "image": "a.png"}
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps(record))
    cache = tmp_path / "cache"
    first = open_dataset(data, cache_dir=cache)
    assert first.read(0).images == (picture(8, 8),)
    monkeypatch.setattr("coconut.data.shards.write_shards", lambda *_: pytest.fail("sharded twice"))
    assert open_dataset(data, cache_dir=cache).directory == first.directory
    assert open_dataset(first.directory).key(0) == "0"
    monkeypatch.undo()
    image = tmp_path / "a.png"
    times = image.stat()
    image.write_bytes(picture(9, 9))
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))  # its size alone tells
    changed = open_dataset(data, cache_dir=cache)
    assert changed.directory != first.directory
    assert changed.image_sizes(0) == [(9, 9)]
    os.utime(image, ns=(0, 0))  # its time alone
    assert open_dataset(data, cache_dir=cache).directory != changed.directory
    data.write_text(json.dumps(record | {"answer": "b"}))
    assert open_dataset(data, cache_dir=cache).read(0).answer == "b"
    with pytest.raises(DataError, match=r"gone\.json does not exist"):
        open_dataset(tmp_path / "gone.json", cache_dir=cache)
