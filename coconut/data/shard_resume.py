"""What a folder for shards holds before a run: a whole set of the same input, unfinished work of it, or something else.

    manifest.json           `source`: the data file's checksum and the options; the same wherever the set is made
    images.stamp            digest over path, size and times of every image file (`shard_survey`)
    .partial/manifest.json  the note of an unfinished run: whose work this is

The stamp has a file of its own, which the manifest does not name: it says when and where the images were looked at,
so it is another one on another machine, where the same input still has to give the same tars, index and manifest.
Without one, or with another, a set is made anew from the images that are there now.
"""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from coconut.data.shard_index import MANIFEST, read_manifest
from coconut.data.shard_writer import IMAGES_STAMP, PARTIAL, write_manifest
from coconut.types import DataError


def complete_manifest(out: Path, source: dict[str, Any], image_stamps: str) -> dict[str, Any] | None:
    """The manifest of what is there, when it is a whole set of just this input; else None.

    Raises:
        DataError: it is a set of something else, or tars whose origin is not known.
    """
    if not (out / MANIFEST).is_file():
        # Not those of an unfinished run, whose last act may have been to move some of them here.
        if any(out.glob("*.tar")) and not (out / PARTIAL / MANIFEST).is_file():
            raise DataError(
                f"{out} holds tars but no {MANIFEST}: index them with --index-only, choose another --out, "
                "or replace them with --force"
            )
        return None
    manifest = read_manifest(out)
    made_of = manifest.get("source")
    if made_of != source:
        what = "other input or options" if made_of is not None else "input that is not known"
        raise DataError(f"{out} holds shards made from {what}; choose another --out, or replace them with --force")
    files = {shard["name"]: shard["bytes"] for shard in manifest["shards"]}
    files |= {name: entry["bytes"] for name, entry in manifest["index"].items()}
    is_there = all((out / name).is_file() and (out / name).stat().st_size == size for name, size in files.items())
    try:
        are_the_images = (out / IMAGES_STAMP).read_text(encoding="utf-8").strip() == image_stamps
    except (FileNotFoundError, UnicodeDecodeError):
        are_the_images = False
    return manifest if is_there and are_the_images else None


def prepare_partial(out: Path, source: dict[str, Any], *, force: bool) -> None:
    """Begin, or go on with, the folder of unfinished work; with `force`, instead of another run's.

    Whether a shard in it is of this input is told by its part, one by one: so a forced run that was killed goes on too.
    """
    try:
        is_ours = _is_ours(out, source)
    except DataError:
        if not force:
            raise
        is_ours = False
    if not is_ours:
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        _begin_partial(out, source)


def join_partial(out: Path, source: dict[str, Any]) -> None:
    """The same for one of several processes: of those that begin it at once, one wins."""
    if not _is_ours(out, source):
        _begin_partial(out, source)
        if not _is_ours(out, source):
            raise DataError(f"{out / PARTIAL} holds something else; choose another --out, or remove it")


def refuse_unfinished(out: Path) -> None:
    """Raises: DataError: an unfinished run's work lies here, of which some tars may be in place and others not."""
    if (out / PARTIAL / MANIFEST).is_file():
        raise DataError(
            f"{out / PARTIAL} holds the work of a make_shards.py that was cut short, and some of its tars; give "
            f"its command again (DATA --out {out} and its options) to finish tars and index; --index-only cannot"
        )


def _is_ours(out: Path, source: dict[str, Any]) -> bool:
    """Whether unfinished work of this input is there; DataError when it is of another."""
    try:
        found = json.loads((out / PARTIAL / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:
        found = None
    if found != _identity(source):
        raise DataError(
            f"{out / PARTIAL} holds an unfinished run of other input or options; give its command again to finish it, "
            "choose another --out, or give it up with --force"
        )
    return True


def _begin_partial(out: Path, source: dict[str, Any]) -> None:
    """A new folder with its note in it, at once; nothing where there is a folder already."""
    try:
        fresh = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}-", dir=out))
        fresh.chmod(0o755)
        write_manifest(fresh, json.dumps(_identity(source)))
        try:
            fresh.rename(out / PARTIAL)
        except OSError as error:
            shutil.rmtree(fresh)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    except OSError as error:
        raise DataError(f"{out / PARTIAL} cannot be written: {error.strerror}") from None


def _identity(source: dict[str, Any]) -> dict[str, Any]:
    return {name: source[name] for name in ("data_sha256", "options")}
