"""The Hub's part of HTTP that huggingface_hub uses, on this machine: real requests, no network."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars

Handler = http.server.BaseHTTPRequestHandler


class FakeHub:
    """One repository, served at 127.0.0.1.

    Attributes:
        repo: its name; any other is not found.
        files: contents by path, of every commit.
        branches: commits by the names of branches and tags; a commit names itself.
        answer: answers instead, unless it returns False.
        requests: paths asked for, in order.
    """

    repo = "Qwen/Qwen2.5-0.5B-Instruct-GGUF"

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.branches = {"main": "a" * 40}
        self.answer: Callable[[Handler], bool | None] | None = None
        self.requests: list[str] = []

    def names(self, *names: str) -> None:
        """Files whose contents are their names."""
        self.files = {name: name.encode() for name in names}

    @property
    def downloaded(self) -> list[str]:
        return [
            p.split("/", 5)[5] for p in self.requests if p.startswith("GET ") and "/resolve/" in p
        ]

    def handle(self, request: Handler) -> None:
        path = unquote(request.path.partition("?")[0])
        self.requests.append(f"{request.command} {path}")
        if self.answer and self.answer(request) is not False:
            return
        api, page = f"/api/models/{self.repo}", f"/{self.repo}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            self._list(request, path.removeprefix(api).removeprefix("/revision/") or "main")
        elif path.startswith(page):
            revision, _, file = path.removeprefix(page).partition("/")
            commit = self._commit(revision)
            if commit is None or file not in self.files:
                reply(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hash((commit, file)) & 0xFFFFFFFF:x}"'}
            reply(request, 200, self.files[file], headers)
        else:
            reply(request, 404, b"", {"X-Error-Code": "RepoNotFound"})

    def _commit(self, revision: str) -> str | None:
        known = {commit: commit for commit in self.branches.values()} | self.branches
        return known.get(revision)

    def _list(self, request: Handler, revision: str) -> None:
        commit = self._commit(revision)
        if commit is None:
            reply(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": file} for file in self.files]
        content = json.dumps({"id": self.repo, "sha": commit, "siblings": siblings}).encode()
        reply(request, 200, content, {"Content-Type": "application/json"})


def reply(request: Handler, status: int, content: bytes, headers: dict[str, str]) -> None:
    request.send_response(status)
    for name, value in ({"Content-Length": str(len(content))} | headers).items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)


@pytest.fixture
def hub_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub that huggingface_hub asks, with an empty cache in `tmp_path / "cache"`."""
    fake = FakeHub()

    class Server(Handler):
        def do_GET(self) -> None:
            fake.handle(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    disable_progress_bars()
    yield fake
    server.shutdown()
    server.server_close()
