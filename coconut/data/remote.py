"""Shards on a server, brought whole to a local folder before they are read.

    https://HOST/SET | s3://BUCKET/SET | pipe:COMMAND {name}
        manifest.json, index.*.npy  --when the set is opened-->            CACHE/SET-0123456789abcdef/
        shard-000007.tar            --when the first of its samples is read-->   the same folder

A file is there whole, with the size and SHA-256 of the manifest, or not at all. Processes of one machine that want the
same file wait for the one that fetches it. Bytes come through curl, aws (s3) or the command, in webdataset's `Pipe`.

A server that refuses, answers with an error, is not reached in CONNECT_S or stands still for STALL_S is asked again, so
one that stays away ends the run after about ATTEMPTS times as long. How long aws or a command waits is theirs to say.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from coconut.data.shard_index import MANIFEST, fsync_path
from coconut.data.shard_writer import locked
from coconut.types import DataError, SourceError

SCHEMES = ("https", "http", "s3")
#: Times that a file is asked for, and seconds before the second time; twice as long before each following one.
ATTEMPTS = 5
FIRST_DELAY_S = 1.0
CONNECT_S = 20  # until a server is reached, name and encryption included
STALL_S = 60  # with less than _SLOWEST bytes a second, the wait for the answer included
_SLOWEST = 1000
_CURL_EXITS = {
    6: "the server's name is not known",
    7: "the server cannot be reached",
    22: "the server answered that it cannot give the file",
    28: "the server cannot be reached in time, or stood still",
}
_CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class RemoteShards:
    """A folder of shards elsewhere, and the local folder that its files come to.

    Attributes:
        url: as its user wrote it.
        folder: where the files of this version of the set are; another manifest has another folder.
        sums: bytes and SHA-256 of every file.
    """

    url: str
    folder: Path
    sums: dict[str, tuple[int, str]]

    def fetch(self, name: str) -> Path:
        """The local copy of a file of the set.

        Raises:
            SourceError: it could not be had after several attempts, or is another one than the manifest says.
        """
        target = self.folder / name
        if target.exists():
            return target
        lock = self.folder / ".locks" / name
        lock.parent.mkdir(exist_ok=True)
        lock.touch()
        with locked(lock, wait=True):
            if not target.exists():
                for stale in self.folder.glob(f".{name}.*.partial"):  # of processes that were killed
                    stale.unlink(missing_ok=True)
                partial = _partial(target)
                _retried(file_url(self.url, name), lambda url: _download(url, partial, *self.sums[name]))
                partial.replace(target)
                fsync_path(self.folder)
        return target


def open_remote(url: str, cache: str | Path, *, allow_pipe: bool = False) -> RemoteShards:
    """Fetch manifest and index of a set, where they are not in the cache yet.

    Raises:
        DataError: the URL is of no kind that is read, or names no set of shards.
        SourceError: the server does not answer.
    """
    check_url(url, allow_pipe=allow_pipe)
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    partial = cache / f".{MANIFEST}.{socket.gethostname()}-{os.getpid()}.partial"
    try:
        _retried(file_url(url, MANIFEST), lambda source: _download(source, partial, None, None))
        content = partial.read_bytes()
        sums = _sums_of(content, url)
        name = urlsplit(url).path.rstrip("/").rpartition("/")[2] if not url.startswith("pipe:") else "pipe"
        folder = cache / f"{name or 'set'}-{hashlib.sha256(url.encode() + content).hexdigest()[:16]}"
        folder.mkdir(exist_ok=True)
        partial.replace(folder / MANIFEST)
    finally:
        partial.unlink(missing_ok=True)
    remote = RemoteShards(url, folder, sums)
    for file in sums:
        if not file.endswith(".tar"):
            remote.fetch(file)
    return remote


def check_url(url: str, *, allow_pipe: bool) -> None:
    """Raises: DataError: a scheme that is not read, or a command where these are not allowed or no file's name fits."""
    if url.startswith("pipe:"):
        if not allow_pipe:
            raise DataError(f"{url!r} would run a command; set allow_pipe_urls: true if you trust it")
        if "{name}" not in url:
            raise DataError(f"{url!r} does not say where the file's name goes; write {{name}} there")
    elif urlsplit(url).scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise DataError(f"{url!r} is of no kind that is read; give {known}, or a local folder")


def file_url(url: str, name: str) -> str:
    """Where a file of a set is: a path below the URL, or the command with the file's name in its place."""
    if url.startswith("pipe:"):
        return url.replace("{name}", shlex.quote(name))
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def _sums_of(manifest: bytes, url: str) -> dict[str, tuple[int, str]]:
    try:
        content = json.loads(manifest)
        sums = {entry["name"]: (int(entry["bytes"]), str(entry["sha256"])) for entry in content["shards"]}
        for name, entry in (content["index"] | content.get("tokens", {})).items():
            sums[name] = (int(entry["bytes"]), str(entry["sha256"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file_url(url, MANIFEST)} is not the manifest of a set of shards: {error!r}") from None
    for name in sums:
        if Path(name).name != name or name.startswith("."):
            raise DataError(f"{file_url(url, MANIFEST)} names {name!r}, which is no file of its own folder")
    return sums


def _retried(url: str, download: Callable[[str], None]) -> None:
    delay = FIRST_DELAY_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return download(url)
        except FileNotFoundError as error:  # the program that fetches, not the file
            raise SourceError(f"{url} cannot be fetched: the program {error.filename} is not installed") from None
        except OSError as error:
            if attempt == ATTEMPTS:
                raise SourceError(f"{url} could not be fetched in {ATTEMPTS} attempts: {error}") from None
            time.sleep(delay)
            delay *= 2


def _download(url: str, partial: Path, n_bytes: int | None, sha256: str | None) -> None:
    """Raises: OSError: the transfer failed, or brought other bytes than expected."""
    digest, received = hashlib.sha256(), 0
    with partial.open("wb") as file:
        stream = _open(url)
        try:
            try:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
                    received += len(chunk)
                    file.write(chunk)
            finally:
                stream.close()
        except OSError:
            if urlsplit(url).scheme in ("https", "http") and stream.status in _CURL_EXITS:
                raise OSError(f"{_CURL_EXITS[stream.status]} (curl: exit {stream.status})") from None
            raise
        file.flush()
        os.fsync(file.fileno())
    if n_bytes is not None and received != n_bytes:
        raise OSError(f"{received} bytes came instead of {n_bytes}")
    if sha256 is not None and digest.hexdigest() != sha256:
        raise OSError("the bytes that came are not those of the manifest (SHA-256)")


def _open(url: str) -> Any:
    from webdataset.gopen import Pipe, gopen  # here, since it imports torch

    # webdataset leaves s3 to a shell, which a list of arguments does without; its curl waits for a server that stands
    # still without end, and asks one that answers 503 for a minute before it says so.
    if url.startswith("s3://"):
        return Pipe(["aws", "s3", "cp", "--only-show-errors", url, "-"], mode="rb")
    if url.startswith("pipe:"):
        return gopen(url)
    bounds = {"--connect-timeout": CONNECT_S, "--speed-limit": _SLOWEST, "--speed-time": STALL_S}
    options = [text for name, value in bounds.items() for text in (name, str(value))]
    return Pipe(["curl", "--fail", "--silent", "--location", *options, url], mode="rb")


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}.partial")
