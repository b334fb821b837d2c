"""A hub on this machine: what huggingface_hub asks of one to create, commit, list and fetch.

Commits are whole: what a commit says of its files is applied at once, or not at all.
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_of_the_tests"
MAIN = "main"


@dataclass
class Repo:
    """Its branches, and the files of every commit."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], message: str, branch: str | None = MAIN) -> str:
        """Put files on a branch."""
        digest = hashlib.sha1(message.encode() + bytes(len(self.commits)))
        for name in sorted(files):
            digest.update(name.encode() + files[name])
        sha = digest.hexdigest()
        self.commits[sha] = files
        self.messages.append(message)
        if branch is not None:
            self.branches[branch] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    @property
    def files(self) -> dict[str, bytes]:
        """Of the newest commit."""
        return self.commits[self.branches[MAIN]]


class Hub(ThreadingHTTPServer):
    """Repositories by name, every request that came, and which are to fail."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.broken = ""  # requests whose line contains it fail

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, files: dict[str, bytes], **settings: Any) -> Repo:
        """A repository with one commit, "made by the test"."""
        repo = self.repos[name] = Repo(**settings)
        repo.commit(files, "made by the test")
        return repo


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        url = urlsplit(self.path)
        line = f"{self.command} {unquote(url.path)}"
        self.server.requests.append(line)
        if self.server.broken and self.server.broken in line:
            # No error that the client would try again.
            self._answer(400, {"error": "the hub of the tests broke down"})
            return
        parts = [unquote(part) for part in url.path.split("/")[1:]]
        if parts[0] == "api":
            self._api(parts[1:], body, parse_qs(url.query))
        else:
            self._resolve(parts)

    do_GET = do_HEAD = do_POST = do_DELETE = _handle  # noqa: N815 - as http.server calls them

    def _api(self, parts: list[str], body: bytes, query: dict[str, list[str]]) -> None:
        if parts == ["validate-yaml"]:
            self._answer(200, {"errors": [], "warnings": []})
        elif parts == ["repos", "create"]:
            self._create(json.loads(body))
        elif parts[0] == "models" and (repo := self._repo("/".join(parts[1:3]))) is not None:
            self._of_repo(repo, "/".join(parts[1:3]), parts[3:], body, query)

    def _create(self, values: dict[str, Any]) -> None:
        if not self._is_known():
            self._answer(401, {"error": "Invalid username or password."})
            return
        name = f"{values.get('organization')}/{values['name']}"
        url = {"url": f"{self.server.address}/{name}"}
        # As one version of the client says it or another.
        is_private = bool(values.get("private")) or values.get("visibility") == "private"
        if name in self.server.repos:
            self._answer(409, {"error": "You already created this model repo", **url})
            return
        self.server.add(name, {".gitattributes": b""}, private=is_private)
        self._answer(200, url)

    def _of_repo(
        self, repo: Repo, name: str, rest: list[str], body: bytes, query: dict[str, list[str]]
    ) -> None:
        action, revision = (rest or [""])[0], rest[1] if len(rest) > 1 else MAIN
        if action in ("preupload", "commit", "branch") and not self._is_known():
            self._answer(401, {"error": "Unauthorized"})
            return
        if action == "branch":
            repo.branches[revision] = repo.branches[MAIN]
            self._answer(200, {})
            return
        sha = repo.sha(revision)
        if sha is None:
            self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif action in ("", "revision"):
            siblings = [{"rfilename": path} for path in repo.commits[sha]]
            info = {"id": name, "modelId": name, "sha": sha, "siblings": siblings}
            self._answer(200, {**info, "private": repo.private, "tags": [], "downloads": 0})
        elif action == "tree":
            self._answer(200, [_entry(*item) for item in repo.commits[sha].items()])
        elif action == "preupload":
            listed = json.loads(body)["files"]
            modes = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in listed
            ]
            self._answer(200, {"files": modes})
        elif action == "commit":
            self._commit(repo, name, revision, sha, body, "create_pr" in query)

    def _commit(
        self, repo: Repo, name: str, branch: str, sha: str, body: bytes, create_pr: bool
    ) -> None:
        files, message = dict(repo.commits[sha]), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
        pr = f"refs/pr/{number}"
        new = repo.commit(files, message, pr if create_pr else branch)
        answer = {"success": True, "commitOid": new}
        answer["commitUrl"] = f"{self.server.address}/{name}/commit/{new}"
        if create_pr:
            answer["pullRequestUrl"] = f"{self.server.address}/{name}/discussions/{number}"
        self._answer(200, answer)

    def _resolve(self, parts: list[str]) -> None:
        name, revision, path = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if (repo := self._repo(name)) is None:
            return
        sha = repo.sha(revision)
        content = None if sha is None else repo.commits[sha].get(path)
        if sha is None or content is None:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        entry = _entry(path, content)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry["oid"]}"'}
        self._send(200, content, {**headers, "Accept-Ranges": "bytes"})

    def _repo(self, name: str) -> Repo | None:
        """One that the caller may see; else the answer is sent."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self._is_known()):
            self._answer(
                401 if not self._is_known() else 404,
                {"error": "Repository not found"},
                {"X-Error-Code": "RepoNotFound"},
            )
            return None
        if repo.gated:
            self._answer(403, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})
            return None
        return repo

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _answer(self, code: int, value: Any, headers: dict[str, str] | None = None) -> None:
        message = {"X-Error-Message": value["error"]} if "error" in value else {}
        self._send(code, json.dumps(value).encode(), {**message, **(headers or {})})

    def _send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _entry(path: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": oid}


@contextlib.contextmanager
def serving(cache: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of this machine, and caches of its own, for this process while the context lasts."""
    import huggingface_hub.constants as constants
    import huggingface_hub.hf_api as hf_api
    from huggingface_hub.utils import _cache_assets

    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        # They were read from the environment when the client was imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(hf_api.api, "endpoint", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(cache / "assets"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
