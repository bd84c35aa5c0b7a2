"""Tars that others wrote, indexed and read where they are."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset

from coconut.data.shards import ShardReader, write_shards
from coconut.types import DataError
from launch.make_shards import main

RECORD = {"question": "q", "steps": ["s", "t"], "answer": "a"}


def pack(path: Path, members: list[tuple[str, bytes]], *, format_: int = tarfile.PAX_FORMAT, **info: object) -> None:
    with tarfile.open(path, "w", format=format_) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in info.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content))


def record(**changes: object) -> bytes:
    return json.dumps(RECORD | changes).encode()


def index(folder: Path, *options: str) -> int:
    return main(["--out", str(folder), "--index-only", "--workers", "1", *options])


@pytest.fixture
def tars(tmp_path) -> Path:
    (tmp_path / "tars").mkdir()
    return tmp_path / "tars"


def test_members_of_all_kinds_are_read(tars, picture, capsys) -> None:
    png, jpg = picture(30, 20), picture(9, 8, fmt="JPEG")
    long = "a/" + "long" * 40 + "/c"  # its name needs a header of its own
    pack(
        tars / "x-0.tar",
        [
            ("a/1.json", record(image="some/where.png")),
            ("a/1.left.png", png),
            ("a/1.RIGHT.JPG", jpg),
            ("a/1.cls", b"7"),
            ("README", b"no sample"),
            ("a/2.jpg", jpg),
            ("a/2.txt", b"how many ?\n"),
            ("a/2.steps.txt", b"one\n\ntwo\n"),
            ("a/2.answer.txt", b"3"),
            ("ü.json", record(id="own id")),
            (f"{long}.json", record(image=["b.png", "a.png"])),
            (f"{long}.a.png", png),
            (f"{long}.b.png", picture(7, 7)),
        ],
        mtime=1.5,  # as webdataset's own writer has it: a header of its own for each member
    )
    pack(tars / "x-1.tar", [("a/1.json", record()), ("a/1.pyd", b"never unpickled")])
    before = (tars / "x-0.tar").read_bytes()
    assert index(tars, "--verify") == 0
    said = capsys.readouterr().out
    assert "5 samples in 2 shards" in said and "not read: cls (1), pyd (1)" in said
    assert (tars / "x-0.tar").read_bytes() == before
    reader = ShardReader(tars)
    samples = [reader.read(i) for i in range(5)]
    assert [sample.key for sample in samples] == ["x-0/a/1", "x-0/a/2", "own id", f"x-0/{long}", "x-1/a/1"]
    assert samples[0].images == (png, jpg) and reader.image_sizes(0) == [(30, 20), (9, 8)]
    assert (samples[1].question, samples[1].steps, samples[1].answer) == ("how many ?", ("one", "two"), "3")
    assert samples[3].images == (picture(7, 7), png)
    assert samples[4].steps == ("s", "t") and samples[4].images == ()


def test_what_webdataset_writes(tars, picture) -> None:
    with webdataset.ShardWriter(str(tars / "w-%06d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(7):
            writer.write({"__key__": f"{i:04d}", "png": picture(12, 10 + i), "json": RECORD | {"answer": str(i)}})
    assert index(tars, "--verify") == 0
    reader = ShardReader(tars)
    assert [(reader.read(i).answer, reader.image_sizes(i)) for i in range(7)] == [
        (str(i), [(12, 10 + i)]) for i in range(7)
    ]


def test_a_lost_index_of_our_own_comes_back_as_it_was(tmp_path, make_samples) -> None:
    write_shards(make_samples(11), tmp_path / "s", shard_size_mb=0.012)
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    for path in (tmp_path / "s").iterdir():
        if path.suffix != ".tar":
            path.unlink()
    with pytest.raises(DataError, match="holds no shards"):
        ShardReader(tmp_path / "s")
    assert main(["--out", str(tmp_path / "s"), "--index-only", "--workers", "2"]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before


@pytest.mark.parametrize(
    "members",
    [
        [("1.json", record(id="k", question=None)), ("1.question.txt", b"q")],
        [("1.json", record(id="k", weight=float("nan")))],
        [("1.json", b'{"id": "k"}'), ("1.txt", b"q"), ("1.steps.txt", b"s\nt"), ("1.answer.txt", b"a")],
        [("a/1.json", record(id="k")), ("a/1.question.txt", b"another")],
        [("1.json", record(id="k")), ("1.json.gz", b"x")],
        [("1.json", record(id=""))],
    ],
)
def test_whatever_is_indexed_can_be_read(tars, members) -> None:
    """Members that nearly are as we write them: our own reader is used only where it makes the same sample."""
    pack(tars / "x.tar", members)
    assert index(tars, "--verify") == 0
    sample = ShardReader(tars).read(0)
    assert (sample.key, sample.question) == (json.loads(members[0][1])["id"] or "x/1", "q")
    assert (sample.steps, sample.answer, sample.source) == (("s", "t"), "a", "x.tar")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.json", record()), ("2.json", record()), ("1.png", b"x")], "key 1): its members stand in 2 places"),
        ([("1.json", b"{")], "key 1): its json or txt member cannot be read"),
        ([("1.json", b"[" * 100_000)], "key 1): its json or txt member cannot be read"),
        ([("1.json", b"[]")], "key 1): its json member is no object"),
        ([("1.json", b'{"question": "q"}')], "key 1): field 'steps', 'answer' is missing"),
        ([("1.png", b"x")], "key 1): it has neither a json nor a txt member, only png"),
        ([("1.json", record()), ("1.png", b"x")], "key 1), image 1: "),
        ([("1.json", record()), ("1.png", b"")], "key 1), image 1: image is empty"),
        ([("1.json", record()), ("1.json", record())], "key 1): it has two members of the kind json"),
        ([("../1.json", record())], "member name '../1.json' holds '..'"),
    ],
)
def test_a_bad_sample_is_named_or_skipped(tars, capsys, members, message: str) -> None:
    pack(tars / "x.tar", [*members, ("9.json", record())])
    assert index(tars) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: x.tar (key") and error.count("\n") == 1 and message in error
    assert index(tars, "--skip-bad", "--verify") == 0
    assert "bad samples were skipped" in capsys.readouterr().out
    entries = [json.loads(line) for line in (tars / "bad_samples.jsonl").read_text().splitlines()]
    assert any(message in entry["reason"] for entry in entries)
    assert ShardReader(tars).read(len(ShardReader(tars)) - 1).key == "x/9"


def test_links_and_devices_are_no_members(tars, capsys) -> None:
    with tarfile.open(tars / "x.tar", "w") as tar:
        member = tarfile.TarInfo("1.json")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    assert index(tars) == 2
    assert "is a link or a device" in capsys.readouterr().err


@pytest.mark.parametrize("cut", ["in data", "in a header", "the end"])
def test_a_cut_tar_is_named(tars, capsys, cut: str) -> None:
    pack(tars / "x.tar", [(f"{i}.json", record(question="q" * 2000)) for i in range(4)])
    with tarfile.open(tars / "x.tar") as tar:
        last = tar.getmembers()[-1]
    content = (tars / "x.tar").read_bytes()
    end = {"in data": last.offset_data + 100, "in a header": last.offset + 100, "the end": last.offset_data + 2560}
    (tars / "x.tar").write_bytes(content[: end[cut]])
    assert index(tars) == 2
    assert "cut off" in capsys.readouterr().err
    assert index(tars, "--skip-bad") == 0
    assert len(ShardReader(tars)) == (4 if cut == "the end" else 3)


def test_what_is_no_tar_or_none_at_all(tars, capsys) -> None:
    assert index(tars) == 2
    assert "holds no .tar files" in capsys.readouterr().err
    (tars / "x.tar").write_bytes(b"no tar" * 200)
    assert index(tars) == 2
    assert "is no tar" in capsys.readouterr().err
    (tars / "x.tar").write_bytes(b"")
    assert index(tars) == 2
    assert "is empty (0 bytes)" in capsys.readouterr().err
    (tars / "x.tar").unlink()
    (tars / "y.tar.gz").write_bytes(b"")
    assert index(tars) == 2
    assert "y.tar.gz is compressed" in capsys.readouterr().err


def test_an_id_that_occurs_in_two_tars(tars, capsys) -> None:
    for name in ("x.tar", "y.tar"):
        pack(tars / name, [("1.json", record(id="same"))])
    assert index(tars) == 2
    assert "y.tar (key same): x.tar holds this id too" in capsys.readouterr().err
