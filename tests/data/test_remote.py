"""Shards from a server that fails and cuts off at times, from a command, and what is refused."""

from __future__ import annotations

import json
import os
import shlex
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from coconut.config import Config, validate_config
from coconut.data import remote
from coconut.data.shards import ShardReader, open_dataset, write_shards
from coconut.types import ConfigError, DataError, SourceError


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_samples) -> Path:
    folder = tmp_path_factory.mktemp("served") / "set"
    write_shards(make_samples(23), folder, shard_size_mb=0.02)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.01)


class Server:
    """Serves a folder; `faults` says what the next requests of a file get: an error, a part, other bytes.

    "cut off" ends after a half, "stalls" goes on no more after it, "silent" does not even answer.
    """

    def __init__(self, folder: Path) -> None:
        self.asked: Counter[str] = Counter()
        self.faults: dict[str, list[str]] = {}
        self.folder = folder
        self.leave = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.split("?")[0].rpartition("/")[2]
                server.asked[name] += 1
                faults = server.faults.get(name, [])
                fault = faults.pop(0) if faults else ""
                path = server.folder / name
                if fault == "silent":
                    server.leave.wait(60)
                    return
                content = path.read_bytes() if fault not in ("404", "503") and path.exists() else None
                self.send_response(200 if content is not None else int(fault or 404))
                if content is None:
                    self.end_headers()
                    return
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if fault in ("cut off", "stalls"):
                    content = content[: len(content) // 2]
                elif fault == "other bytes":
                    content = bytes(len(content))
                self.wfile.write(content)
                if fault == "stalls":
                    server.leave.wait(60)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/data/set"


@pytest.fixture
def server(shards):
    server = Server(shards)
    yield server
    server.leave.set()
    server.http.shutdown()
    server.http.server_close()


def all_samples(reader: ShardReader) -> list[tuple[str, tuple]]:
    return [(sample.key, sample.images) for sample in map(reader.read, range(len(reader)))]


def test_samples_come_through_failures_and_each_shard_comes_once(server, shards, tmp_path) -> None:
    server.faults = {
        "manifest.json": ["404"],
        "index.rows.npy": ["cut off"],
        "shard-000001.tar": ["cut off", "other bytes", "404"],
    }
    reader = open_dataset(server.url, cache_dir=tmp_path)
    assert not any(name.endswith(".tar") for name in server.asked), "shards come when they are needed"
    local = ShardReader(shards)
    assert reader.read(0) == local.read(0)
    assert [name for name in server.asked if name.endswith(".tar")] == ["shard-000000.tar"]
    assert all_samples(reader) == all_samples(local)
    assert server.asked["shard-000001.tar"] == 4
    # A second reader finds all of them, and a worker's copy of a reader too.
    before = Counter(server.asked)
    assert all_samples(open_dataset(server.url, cache_dir=tmp_path)) == all_samples(local)
    assert server.asked - before == Counter({"manifest.json": 1})
    assert not list(tmp_path.rglob("*.partial"))


def test_several_processes_fetch_a_shard_once(server, tmp_path) -> None:
    reader = open_dataset(server.url, cache_dir=tmp_path)
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            os._exit(0 if reader.read(0).key == reader.key(0) else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert server.asked["shard-000000.tar"] == 1


def test_what_a_killed_process_left_is_not_taken_for_a_shard(server, shards, tmp_path) -> None:
    reader = open_dataset(server.url, cache_dir=tmp_path)
    left = reader.directory / ".shard-000000.tar.elsewhere-1.partial"
    left.write_bytes(b"half")
    assert reader.read(0) == ShardReader(shards).read(0)
    assert not left.exists()


def test_a_server_that_stays_away_is_no_bad_sample(server, tmp_path) -> None:
    reader = open_dataset(server.url, cache_dir=tmp_path)
    server.faults = {"shard-000000.tar": ["404"] * 9}
    with pytest.raises(SourceError, match=r"shard-000000\.tar could not be fetched in 5 attempts.*exit 22"):
        reader.read(0)
    server.faults = {"shard-000000.tar": ["other bytes"] * 9}
    with pytest.raises(SourceError, match="not those of the manifest"):
        reader.read(0)
    assert not list(reader.directory.glob("*.tar"))
    server.faults = {"manifest.json": ["404"] * 9}
    with pytest.raises(SourceError, match=r"/data/set/manifest\.json\?a=b could not be fetched"):
        open_dataset(f"{server.url}?a=b", cache_dir=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stalls", "silent", "503"])
def test_a_server_that_stands_still_or_is_busy_is_left_and_asked_again(
    server, shards, tmp_path, monkeypatch, fault: str
) -> None:
    monkeypatch.setattr(remote, "STALL_S", 1)
    reader = open_dataset(server.url, cache_dir=tmp_path)
    begin = time.monotonic()
    server.faults = {"shard-000000.tar": [fault]}
    assert reader.read(0) == ShardReader(shards).read(0)
    assert server.asked["shard-000000.tar"] == 2
    assert time.monotonic() - begin < 30


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "reason"), [("stalls", "stood still"), ("503", "cannot give the file")])
def test_the_wait_for_such_a_server_ends(server, tmp_path, monkeypatch, fault: str, reason: str) -> None:
    reader = open_dataset(server.url, cache_dir=tmp_path)
    monkeypatch.setattr(remote, "STALL_S", 1)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    server.faults = {"shard-000000.tar": [fault] * 9}
    begin = time.monotonic()
    with pytest.raises(SourceError, match=rf"shard-000000\.tar could not be fetched in 2 attempts: .*{reason}"):
        reader.read(0)
    assert server.asked["shard-000000.tar"] == 2
    assert time.monotonic() - begin < 60


def test_a_server_that_takes_no_connection_is_given_up(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(remote, "CONNECT_S", 1)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    with socket.socket() as full:  # listens, with no room for one that is waiting to be taken
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.create_connection(full.getsockname()):
            begin = time.monotonic()
            url = f"http://127.0.0.1:{full.getsockname()[1]}/set"
            with pytest.raises(SourceError, match="cannot be reached in time"):
                open_dataset(url, cache_dir=tmp_path)
    assert time.monotonic() - begin < 60


def test_a_set_that_was_written_anew_is_another_one(server, tmp_path, make_samples) -> None:
    before = open_dataset(server.url, cache_dir=tmp_path)
    server.folder = tmp_path / "written anew"
    write_shards(make_samples(5), server.folder)
    after = open_dataset(server.url, cache_dir=tmp_path)
    assert len(after) == 5 and after.directory != before.directory
    with pytest.raises(SourceError, match="could not be fetched"):
        before.read(22)  # of the old set, which is gone: never of the new one


def test_commands_only_where_they_are_allowed(shards, tmp_path) -> None:
    url = f"pipe:cat {shlex.quote(str(shards))}/{{name}}"
    with pytest.raises(DataError, match="would run a command; set allow_pipe_urls: true"):
        open_dataset(url, cache_dir=tmp_path)
    reader = open_dataset(url, cache_dir=tmp_path, allow_pipe=True)
    assert all_samples(reader) == all_samples(ShardReader(shards))
    with pytest.raises(DataError, match=r"write \{name\} there"):
        open_dataset("pipe:cat set", cache_dir=tmp_path, allow_pipe=True)
    with pytest.raises(DataError, match="of no kind that is read"):
        open_dataset("ftp://host/set", cache_dir=tmp_path)


def test_a_manifest_cannot_name_a_file_elsewhere_or_a_command(tmp_path) -> None:
    for name in ("../shard.tar", "/etc/passwd", ".hidden.tar"):
        manifest = {"shards": [{"name": name, "bytes": 1, "sha256": "0"}], "index": {}}
        with pytest.raises(DataError, match="no file of its own folder"):
            remote._sums_of(json.dumps(manifest).encode(), "https://host/set")
    assert remote.file_url("pipe:cat {name}", "a'; touch b;.tar") == """pipe:cat 'a'"'"'; touch b;.tar'"""
    assert remote.file_url("https://host/set/?token=x", "a b.tar") == "https://host/set/a%20b.tar?token=x"
    assert remote.file_url("s3://bucket/set", "shard-000000.tar") == "s3://bucket/set/shard-000000.tar"


def test_s3_goes_through_aws_without_a_shell(shards, tmp_path, monkeypatch) -> None:
    """A program of that name stands in for it: buckets are folders."""
    program = tmp_path / "bin" / "aws"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n[ "$1 $2 $3 $5" = "s3 cp --only-show-errors -" ] || exit 9\ncat "{shards.parent}/${{4#s3://bucket/}}"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    assert all_samples(open_dataset("s3://bucket/set", cache_dir=tmp_path / "cache")) == all_samples(
        ShardReader(shards)
    )
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SourceError, match="the program aws is not installed"):
        open_dataset("s3://bucket/set", cache_dir=tmp_path / "cache")


def test_configurations_say_so_before_a_run(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    base = {"model_id": str(tmp_path / "model")}
    validate_config(Config(base | {"train_data_path": "https://host/set"}))
    validate_config(Config(base | {"train_data_path": "pipe:cat {name}", "allow_pipe_urls": True}))
    with pytest.raises(ConfigError, match="would run a command"):
        validate_config(Config(base | {"train_data_path": "pipe:cat {name}"}))
    with pytest.raises(ConfigError, match="only_eval reads local data"):
        validate_config(Config(base | {"test_data_path": "s3://bucket/set", "only_eval": True}))
