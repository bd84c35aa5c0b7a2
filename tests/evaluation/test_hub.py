"""Pushing an export: refused in a line before any work, uploaded whole to a server that speaks the hub's protocol."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from .conftest import Maze

PROJECT = Path(__file__).resolve().parents[2]
TOKEN = "hf_made_up_for_this_test"


@dataclass
class Hub:
    """The few replies of the hub that an upload of small files takes, and what was uploaded."""

    url: str = ""
    created: dict[str, bool] = field(default_factory=dict)  # private, by name
    files: dict[str, bytes] = field(default_factory=dict)
    refuse_commits: bool = False

    def reply(self, path: str, body: bytes, token: str) -> tuple[int, object]:
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        path = path.split("?")[0]
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "orgs": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.created[name] = asked.get("private") is True or asked.get("visibility") == "private"
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if path.endswith("/commit/main"):
            if self.refuse_commits:
                return 403, {"error": "This token may only read"}
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            name = path.split("/models/")[1].rsplit("/commit", 1)[0]
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        return 404, {"error": f"{path} is not of this test"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(length)
            status, value = state.reply(self.path, body, self.headers.get("Authorization", ""))
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


def export(maze: Maze, out: Path, repo: str, **environment: str) -> subprocess.CompletedProcess[str]:
    words = ["--checkpoint", str(maze.checkpoints[4]), "--out", str(out), "--push-to-hub", repo]
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    own |= {"HF_HOME": str(out.parent / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    command = [sys.executable, str(PROJECT / "launch" / "export.py"), *words]
    return subprocess.run(command, env=own, capture_output=True, text=True, timeout=600, cwd=out.parent)


@pytest.mark.slow
def test_the_whole_folder_is_uploaded(maze: Maze, hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = export(maze, out, "me/maze", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr[-3000:]
    assert hub.created == {"me/maze": True}
    assert f"pushed: {hub.url}/me/maze" in done.stdout
    written = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert hub.files == written
    assert {"README.md", "model.safetensors", "coconut.json"} <= written.keys()


@pytest.mark.slow
def test_a_refused_upload_leaves_the_export_and_says_so(maze: Maze, hub: Hub, tmp_path: Path) -> None:
    hub.refuse_commits = True
    out = tmp_path / "out"
    done = export(maze, out, "me/maze", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert done.returncode == 2
    assert (out / "model.safetensors").is_file()
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert f"{out} is exported, but not pushed to me/maze" in error
    assert "403" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("repo", "environment", "message"),
    [
        ("me/maze", {"HF_HUB_OFFLINE": "1", "HF_TOKEN": TOKEN}, "HF_HUB_OFFLINE is set"),
        ("me/maze", {}, "needs a token"),
        ("me/maze", {"HF_TOKEN": "hf_wrong", "HF_ENDPOINT": "{hub}"}, "does not take the token"),
        ("me/maze", {"HF_TOKEN": TOKEN, "HF_ENDPOINT": "{nobody}"}, "cannot be reached"),
        ("maze", {"HF_TOKEN": TOKEN}, "has no owner; write OWNER/NAME"),
        ("me/my maze", {"HF_TOKEN": TOKEN}, "is no name of a repository"),
    ],
)
def test_it_is_refused_before_any_work(
    repo: str, environment: dict[str, str], message: str, maze: Maze, hub: Hub, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    given = {name: value.format(hub=hub.url, nobody=nobody) for name, value in environment.items()}
    done = export(maze, tmp_path / "out", repo, **given)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()
