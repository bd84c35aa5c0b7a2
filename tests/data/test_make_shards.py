"""make_shards: the same bytes whoever makes them and wherever they were killed, and one clear line for bad input."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coconut.data.image import ImageProcessor
from coconut.data.shards import ShardReader
from coconut.data.token_counts import sample_lengths, tokens_name
from coconut.types import DataError

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "make_shards.py"
GOOD = {"question": "q", "steps": ["s"], "answer": "a"}


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("make_shards", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def data(tmp_path, picture) -> Path:
    """60 records, half of them with a picture, as JSONL; some 9 shards at 0.01 MB."""
    (tmp_path / "images").mkdir()
    records = []
    for i in range(60):
        record = {"id": f"k{i}", "question": f"start {i} ?", "steps": ["red"] * (i % 4), "answer": "blue"}
        if i % 2:
            (tmp_path / "images" / f"{i}.jpg").write_bytes(picture(20 + i, 24, seed=i, fmt="JPEG"))
            record["image"] = f"images/{i}.jpg"
        records.append(record)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path / "data.jsonl"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def contents_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(main, data: Path, out: Path, *options: str) -> int:
    return main([str(data), "--out", str(out), "--shard-size", "0.01", "--workers", "1", *options])


def test_shards_are_written_and_verified(main, tmp_path, picture, capsys) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture(8, 8))
    data = tmp_path / "data.json"
    data.write_text(json.dumps([GOOD | {"image": "a.png"}, GOOD]))
    arguments = [str(data), "--out", str(tmp_path / "out"), "--image-root", str(tmp_path / "pictures"), "--verify"]
    assert main(arguments) == 0
    assert "2 samples in 1 shards" in capsys.readouterr().out
    assert ShardReader(tmp_path / "out").read(0).images == (picture(8, 8),)
    assert main(["--out", str(tmp_path / "out"), "--verify"]) == 0
    assert "verified" in capsys.readouterr().out


def test_a_long_set_is_cut_by_size(main, tmp_path, capsys) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(GOOD) for _ in range(50)))
    assert main([str(data), "--out", str(tmp_path / "out"), "--shard-size", "0.02"]) == 0
    assert "50 samples in 3 shards" in capsys.readouterr().out


def test_neither_workers_nor_json_nor_jsonl_change_a_byte(main, data, tmp_path) -> None:
    assert make(main, data, tmp_path / "one") == 0
    assert main([str(data), "--out", str(tmp_path / "three"), "--shard-size", "0.01", "--workers", "3"]) == 0
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "three")
    assert len([name for name in one if name.endswith(".tar")]) > 4
    as_list = tmp_path / "data.json"
    as_list.write_text(json.dumps([json.loads(line) for line in data.read_text().splitlines()]))
    assert make(main, as_list, tmp_path / "list") == 0
    listed = contents(tmp_path / "list")
    del one["manifest.json"], listed["manifest.json"]  # it holds the data file's checksum
    assert one == listed


def test_what_is_complete_is_not_made_again_but_a_changed_image_is(main, data, tmp_path, picture, capsys) -> None:
    assert make(main, data, tmp_path / "out") == 0
    before = (tmp_path / "out" / "shard-000000.tar").stat()
    assert make(main, data, tmp_path / "out") == 0
    assert "is complete already" in capsys.readouterr().out
    assert (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns == before.st_mtime_ns
    image = tmp_path / "images" / "1.jpg"
    changed = bytearray(image.read_bytes())
    changed[-3] ^= 1  # of the same size
    image.write_bytes(changed)
    assert make(main, data, tmp_path / "out") == 0
    assert ShardReader(tmp_path / "out").read(1).images == (bytes(changed),)
    (tmp_path / "out" / "shard-000001.tar").unlink()
    assert make(main, data, tmp_path / "out", "--verify") == 0  # and a missing shard is mended


def alike(data: Path, first: str = "1.jpg", second: str = "3.jpg") -> tuple[Path, Path]:
    """Two images of equal size, written at the same instant."""
    one, other = data.parent / "images" / first, data.parent / "images" / second
    size = max(one.stat().st_size, other.stat().st_size)
    for path in (one, other):
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        os.utime(path, ns=(10**18, 10**18))
    return one, other


def test_images_of_equal_size_and_time_that_changed_places_are_noticed(main, data, tmp_path, capsys) -> None:
    one, other = alike(data)
    assert make(main, data, tmp_path / "out") == 0
    before = ShardReader(tmp_path / "out").read(1).images, ShardReader(tmp_path / "out").read(3).images
    one.rename(tmp_path / "elsewhere")
    other.rename(one)
    (tmp_path / "elsewhere").rename(other)
    capsys.readouterr()
    assert make(main, data, tmp_path / "out") == 0
    assert "complete already" not in capsys.readouterr().out
    reader = ShardReader(tmp_path / "out")
    assert (reader.read(3).images, reader.read(1).images) == before and before[0] != before[1]
    assert make(main, data, tmp_path / "out") == 0
    assert "complete already" in capsys.readouterr().out


def test_a_killed_run_notices_them_too(main, data, tmp_path) -> None:
    one, other = alike(data)
    assert killed_at_sync(main, 12, (data, tmp_path / "out"))
    one.rename(tmp_path / "elsewhere")
    other.rename(one)
    (tmp_path / "elsewhere").rename(other)
    assert make(main, data, tmp_path / "out") == 0
    assert ShardReader(tmp_path / "out").read(1).images == (one.read_bytes(),)


def test_another_folder_of_images_is_noticed(main, data, tmp_path, capsys) -> None:
    for name in ("a", "b"):
        shutil.copytree(data.parent / "images", tmp_path / name / "images")  # with their times
    changed = tmp_path / "b" / "images" / "1.jpg"
    times, content = changed.stat(), bytearray(changed.read_bytes())
    content[-3] ^= 1
    changed.write_bytes(content)
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert make(main, data, tmp_path / "out", "--image-root", str(tmp_path / "a")) == 0
    capsys.readouterr()
    assert make(main, data, tmp_path / "out", "--image-root", str(tmp_path / "b")) == 0
    assert "complete already" not in capsys.readouterr().out
    assert ShardReader(tmp_path / "out").read(1).images == (bytes(content),)


def test_when_and_where_images_lie_changes_only_their_stamp(main, data, tmp_path) -> None:
    assert make(main, data, tmp_path / "here") == 0
    shutil.copytree(data.parent / "images", tmp_path / "there" / "images", copy_function=shutil.copyfile)
    assert make(main, data, tmp_path / "copied", "--image-root", str(tmp_path / "there")) == 0
    here, copied = contents(tmp_path / "here"), contents(tmp_path / "copied")
    assert here.pop("images.stamp") != copied.pop("images.stamp")
    assert here == copied


def test_a_set_of_other_input_is_kept_unless_forced(main, data, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert make(main, data, out) == 0
    before = contents(out)
    other = tmp_path / "other.json"
    other.write_text(json.dumps([GOOD]))
    for arguments in ((other,), (data, "--max-side", "10")):
        assert make(main, arguments[0], out, *arguments[1:]) == 2
        assert "made from other input or options; choose another --out, or replace" in capsys.readouterr().err
    assert contents(out) == before
    assert make(main, other, out, "--force") == 0
    assert len(ShardReader(out)) == 1
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    shutil.copy(out / "shard-000000.tar", foreign / "shard-000000.tar")
    (foreign / ".partial").mkdir()  # as an --index-only that failed leaves it
    assert make(main, data, foreign) == 2
    assert "holds tars but no manifest.json" in capsys.readouterr().err
    assert (foreign / "shard-000000.tar").is_file()


def killed_at_sync(main, n: int, arguments: tuple) -> bool:
    """Run in a process of its own that is killed (SIGKILL) at the n-th flush to disk; False if it ended before."""
    child = os.fork()
    if child == 0:
        fsync, count = os.fsync, 0

        def deadly(descriptor: int) -> None:
            nonlocal count
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        os.fsync = deadly
        os._exit(make(main, *arguments))
    status = os.waitpid(child, 0)[1]
    assert status == signal.SIGKILL or status == 0
    return status != 0


@pytest.mark.parametrize("over_old", [False, True])
@pytest.mark.slow
def test_killed_anywhere_it_leaves_no_half_set_and_goes_on(main, data, tmp_path, capfd, over_old: bool) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(data.read_text().splitlines(keepends=True)[:16]))
    assert make(main, few, tmp_path / "whole") == 0
    whole = contents(tmp_path / "whole")
    old = tmp_path / "old.json"
    old.write_text(json.dumps([GOOD] * 30))
    options = ("--force",) if over_old else ()
    n, went_on, out = 0, 0, tmp_path / "out"
    while True:
        n += 1
        if over_old:
            assert make(main, old, out) == 0
        if not killed_at_sync(main, n, (few, out, *options)):
            break
        if (out / "manifest.json").exists():  # the old set, or the new one
            assert len(ShardReader(out)) == (16 if n > 15 else 30)
            assert main(["--out", str(out), "--verify", "--workers", "1"]) == 0
        else:
            with pytest.raises(DataError, match=r"no manifest\.json"):
                ShardReader(out)
        capfd.readouterr()
        assert make(main, few, out, *options) == 0
        went_on += "shards were whole already" in capfd.readouterr().out
        assert contents(out) == whole
        shutil.rmtree(out)
    assert n > 15
    assert went_on > 8


@pytest.mark.parametrize("at_once", [False, True])
def test_parts_made_anywhere_are_the_same_set(main, data, tmp_path, capfd, at_once: bool) -> None:
    assert make(main, data, tmp_path / "whole") == 0
    out = tmp_path / "out"
    if at_once:
        children = []
        for part in ("1/3", "2/3", "3/3"):
            if (child := os.fork()) == 0:
                os._exit(make(main, data, out, "--part", part))
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    else:
        for n in (3, 4, 5):  # begun; before, and in, its first shards
            assert killed_at_sync(main, n, (data, out, "--part", "2/3"))
        for part in ("2/3", "3/3"):
            assert make(main, data, out, "--part", part) == 0
            assert f"part {part} is made" in capfd.readouterr().out
            assert not (out / "manifest.json").exists()
        assert make(main, data, out, "--part", "1/3") == 0
        assert "60 samples in" in capfd.readouterr().out
    assert contents(out) == contents(tmp_path / "whole")
    assert make(main, data, out, "--part", "2/3") == 0
    assert "complete already" in capfd.readouterr().out


def test_a_part_of_other_input_or_that_is_none_is_refused(main, data, tmp_path, capsys) -> None:
    assert make(main, data, tmp_path / "out", "--part", "1/2") == 0
    (tmp_path / "other.json").write_text(json.dumps([GOOD]))
    assert make(main, tmp_path / "other.json", tmp_path / "out", "--part", "2/2") == 2
    assert "unfinished run of other input" in capsys.readouterr().err
    for part in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(SystemExit):
            make(main, data, tmp_path / "out", "--part", part)
        assert f"--part is {part}; write I/N" in capsys.readouterr().err


def test_a_forced_run_goes_on_beside_the_old_set_and_other_unfinished_work_gives_way(
    main, data, tmp_path, capfd
) -> None:
    out, other = tmp_path / "out", tmp_path / "other.json"
    assert make(main, data, tmp_path / "whole") == 0
    other.write_text(json.dumps([GOOD] * 30))
    assert make(main, other, out) == 0
    assert killed_at_sync(main, 12, (data, out, "--force"))
    assert len(ShardReader(out)) == 30
    assert main(["--out", str(out), "--verify", "--workers", "1"]) == 0
    capfd.readouterr()
    assert make(main, data, out, "--force") == 0
    assert re.search(r"went on; [3-9] shards were whole already", capfd.readouterr().out)
    assert contents(out) == contents(tmp_path / "whole")

    assert killed_at_sync(main, 12, (data, out, "--force", "--max-side", "10"))
    assert make(main, data, out, "--force") == 0
    assert "went on" not in capfd.readouterr().out
    assert contents(out) == contents(tmp_path / "whole")


def test_a_commit_that_was_killed_is_not_indexed_by_halves(main, data, tmp_path, capfd) -> None:
    out = tmp_path / "out"
    assert make(main, data, tmp_path / "whole") == 0
    if (child := os.fork()) == 0:
        replace = os.replace

        def deadly(source: Path, target: Path) -> None:
            if Path(target) == out / "shard-000003.tar":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = deadly
        os._exit(make(main, data, out))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list(out.glob("*.tar"))) == 3
    left = contents_below(out)
    capfd.readouterr()
    for options in ((), ("--skip-bad",)):
        assert main(["--out", str(out), "--index-only", "--workers", "1", *options]) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and f"give its command again (DATA --out {out}" in error
    assert contents_below(out) == left
    assert make(main, data, out) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_shard_damaged_after_the_kill_is_made_again(main, data, tmp_path) -> None:
    assert make(main, data, tmp_path / "whole") == 0
    assert killed_at_sync(main, 12, (data, tmp_path / "out"))
    tar = tmp_path / "out" / ".partial" / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    assert make(main, data, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_unfinished_work_of_other_input_is_not_thrown_away(main, data, tmp_path, capsys) -> None:
    assert killed_at_sync(main, 12, (data, tmp_path / "out"))
    before = contents(tmp_path / "out" / ".partial")
    (tmp_path / "other.json").write_text(json.dumps([GOOD]))
    assert make(main, tmp_path / "other.json", tmp_path / "out") == 2
    assert "unfinished run of other input" in capsys.readouterr().err
    assert contents(tmp_path / "out" / ".partial") == before


def members_of_group(group: int) -> list[str]:
    """Living processes of a group; one that is dead but not waited for is none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(its_group) == group and state != "Z":
            found.append(path.parent.name)
    return found


@pytest.mark.slow
def test_workers_end_with_their_killed_parent(main, data, tmp_path) -> None:
    records = [json.loads(line) for line in data.read_text().splitlines()]
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps(record | {"id": f"{i}"}) + "\n" for i, record in enumerate(records * 12)))
    command = [sys.executable, str(SCRIPT), str(long), "--out", str(tmp_path / "out"), "--shard-size", "0.01"]
    process = subprocess.Popen([*command, "--workers", "2"], start_new_session=True)
    partial, give_up = tmp_path / "out" / ".partial", time.monotonic() + 60
    while not (partial.is_dir() and len(list(partial.glob("*.npz"))) > 3):
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.005)
    process.kill()
    process.wait()
    give_up = time.monotonic() + 20
    while members_of_group(process.pid):
        assert time.monotonic() < give_up, "workers live on"
        time.sleep(0.01)
    with pytest.raises(DataError, match=r"no manifest\.json"):
        ShardReader(tmp_path / "out")
    assert make(main, long, tmp_path / "out") == 0
    assert make(main, long, tmp_path / "whole") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_disk_that_takes_no_more(data, tmp_path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    command = [sys.executable, str(SCRIPT), str(data), "--out", str(tmp_path / "out"), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "shard-000000.tar cannot be written: File too large" in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_output_that_cannot_be(main, data, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert make(main, data, tmp_path / "file") == 2
    assert "file cannot be made" in capsys.readouterr().err


def test_larger_images_are_encoded_anew(main, data, tmp_path) -> None:
    assert make(main, data, tmp_path / "out", "--max-side", "40", "--verify") == 0
    assert make(main, data, tmp_path / "all") == 0
    shrunk, kept = ShardReader(tmp_path / "out"), ShardReader(tmp_path / "all")
    assert shrunk.image_sizes(59) == [(40, round(24 * 40 / 79))]
    assert shrunk.read(1) == kept.read(1)
    assert kept.image_sizes(59) == [(79, 24)]


def test_a_rotated_picture_is_indexed_as_it_is_seen(main, tmp_path, picture) -> None:
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "r.jpg").write_bytes(picture(30, 20, fmt="JPEG", exif=exif.tobytes()))
    (tmp_path / "d.json").write_text(json.dumps([GOOD | {"image": "r.jpg"}]))
    assert make(main, tmp_path / "d.json", tmp_path / "out", "--verify") == 0
    assert ShardReader(tmp_path / "out").image_sizes(0) == [(20, 30)]
    assert make(main, tmp_path / "d.json", tmp_path / "small", "--max-side", "15") == 0
    assert ShardReader(tmp_path / "small").image_sizes(0) == [(10, 15)]  # upright by its pixels now


BAD = {
    "field": (json.dumps({"id": "x", "question": "q", "steps": []}), "x", "field 'answer' is missing"),
    "image": (json.dumps(GOOD | {"id": "x", "image": "gone.png"}), "x", "gone.png does not exist (is image_root"),
    "empty": (json.dumps(GOOD | {"id": "x", "image": "empty.png"}), "x", "empty.png is empty (0 bytes)"),
    "no image": (json.dumps(GOOD | {"id": "x", "image": "data.jsonl"}), "x", "not an image"),
    "parent": (json.dumps(GOOD | {"id": "x", "image": "../a.png"}), "x", "holds '..': set --image-root"),
    "json": ('{"question": ', "1", "line 2: not JSON"),
    "utf-8": (b'{"question": "\xff"}', "1", "line 2: not UTF-8"),
    "repeated": (json.dumps(GOOD | {"id": "k0"}), "k0", "id 'k0' is that of"),
    "no object": ("[1]", "1", "a record is a JSON object"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_is_named_or_skipped(main, tmp_path, capsys, kind: str) -> None:
    line, key, message = BAD[kind]
    (tmp_path / "empty.png").write_bytes(b"")
    good = [json.dumps(GOOD | {"id": f"k{i}"}).encode() for i in range(3)]
    bad = line if isinstance(line, bytes) else line.encode()
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"\n".join([good[0], bad, *good[1:]]))
    assert make(main, data, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error and "data.jsonl" in error and "line 2" in error
    if kind not in ("json", "utf-8", "no object"):
        assert key in error
    assert not (tmp_path / "out" / "manifest.json").exists()
    shutil.rmtree(tmp_path / "out")

    assert make(main, data, tmp_path / "out", "--skip-bad") == 0
    assert "1 bad samples were skipped" in capsys.readouterr().out
    (entry,) = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert entry["key"] == key and message in entry["reason"]
    reader = ShardReader(tmp_path / "out")
    assert [reader.read(i).key for i in range(len(reader))] == ["k0", "k1", "k2"]
    assert main(["--out", str(tmp_path / "out"), "--verify", "--workers", "1"]) == 0


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (None, "data.json does not exist"),
        ([], "zero samples"),
        ({"a": 1}, "a data file is a JSON list of records"),
        ([GOOD, {"question": "q", "steps": []}], "data.json:1: field 'answer' is missing"),
        ([GOOD | {"image": "gone.png"}], "gone.png does not exist"),
        ([GOOD | {"image": "data.json"}], "not an image"),
        ([GOOD | {"image": "gone.png"}] * 12, "has 12 faults"),
    ],
)
def test_bad_input_is_one_line_and_code_2(main, tmp_path, capsys, records, message: str) -> None:
    data = tmp_path / "data.json"
    if records is not None:
        data.write_text(json.dumps(records))
    assert main([str(data), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_nothing_but_bad_records(main, tmp_path, capsys) -> None:
    (tmp_path / "d.jsonl").write_text("{}\n{}\n")
    assert make(main, tmp_path / "d.jsonl", tmp_path / "out", "--skip-bad") == 2
    assert "zero samples" in capsys.readouterr().err


def test_bad_options(main, tmp_path, capsys) -> None:
    (tmp_path / "d.json").write_text(json.dumps([GOOD]))
    assert main([str(tmp_path / "d.json"), "--out", str(tmp_path / "o"), "--shard-size", "0"]) == 2
    assert "must be above 0" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--verify"]) == 2
    assert "holds no shards" in capsys.readouterr().err
    for arguments in (
        ["--out", "x"],
        ["d.json"],
        ["--out", "x", "--verify", "--image-root", "y"],
        ["d.json", "--out", "x", "--index-only"],
        ["d.json", "--out", "x", "--workers", "0"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2


def test_samples_are_shown_with_their_tiles(main, data, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert make(main, data, out, "--inspect", "2", "--image-size", "14") == 0
    said = capsys.readouterr().out
    assert "key k0" in said and "key k59" in said and "79 x 24" in said and "start 59 ?" in said
    with Image.open(out / "inspect.png") as drawn:
        assert drawn.width > 4 * 112 and len(drawn.getcolors(1 << 20) or ()) > 50


def test_token_counts_are_those_of_the_tokenizer(main, data, tmp_path, tokenizer, capsys) -> None:
    out = tmp_path / "out"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert make(main, data, out, "--tokenizer", str(tmp_path / "tokenizer"), "--verify") == 0
    reader, processor = ShardReader(out), ImageProcessor(14, 4)
    costs_N, tails_N = sample_lengths(reader, tokenizer, processor.num_patches, tokens_per_patch=10)
    for i in (0, 1, 7, 59):
        sample = reader.read(i)
        texts = [f"{step}\n" for step in sample.steps] + [f"### {sample.answer}"]
        tail = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]) + 1
        question = len(tokenizer(sample.question, add_special_tokens=False)["input_ids"])
        assert tails_N[i] == tail
        assert costs_N[i] == question + tail + 10 * sum(processor.num_patches(*s) for s in reader.image_sizes(i))
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<eos>")
    other.add_tokens(["another"])
    assert tokens_name(other) not in reader.index.token_files
    estimated = sample_lengths(reader, other, processor.num_patches, tokens_per_patch=10)
    assert np.array_equal(estimated[0], reader.costs(processor.num_patches, 10))
    # New shards forget the counts of the old ones.
    assert make(main, data, out, "--max-side", "30", "--force") == 0
    assert not list(out.glob("tokens.*"))


def test_help_comes_at_once_from_anywhere(tmp_path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - started < 2
    assert "--shard-size" in done.stdout


def test_the_script_finds_the_project_from_a_clone(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import runpy; runpy.run_path({str(SCRIPT)!r}); import coconut.types"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
