"""A small host, modules saved from it, and a stand-in for the Hugging Face Hub's server."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import torch

import modgraft as mg


def small_host() -> mg.Host:
    torch.manual_seed(0)
    return mg.Host(torch.nn.Sequential(torch.nn.Linear(4, 4)))


def saved(folder: Path, fill: float = 1.0, name: str = "qa", **about: Any) -> Path:
    """Save a LoRA whose numbers are all ``fill``."""
    host = small_host()
    host.implant(name, mg.LoRA(rank=2), at="0")
    with torch.no_grad():
        for parameter in host[name].parameters():
            parameter.fill_(fill)
    return host.save(name, folder, **about)


def fill_of(host: mg.Host, name: str) -> float:
    return next(host[name].parameters()).flatten()[0].item()


class Server(ThreadingHTTPServer):
    """Repositories by name: a list of commits, each a hash and its files; refs are commits too.

    What is asked is listed in ``asked``; a repository in ``closed`` is not for everyone.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.closed: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        commits = self.repos.setdefault(repo, [])
        commits.append((hashlib.sha1(f"{repo}{len(commits)}".encode()).hexdigest(), files))
        return commits[-1][0]

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repos.get(repo, [])
        if revision == "main":
            return commits[-1] if commits else None
        return next((each for each in commits if each[0] == revision), None)


class Answers(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        match = re.fullmatch(
            r"/(?:api/models/)?([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)/?(.*)", path
        )
        if match is None:
            return self.answer(404, {"error": "no such page"})
        repo, what, revision, file = match.groups()
        if repo in self.server.closed:
            return self.answer(403, {}, X_Error_Code="GatedRepo")
        if repo not in self.server.repos:
            return self.answer(404, {}, X_Error_Code="RepoNotFound")
        found = self.server.files(repo, revision)
        if found is None:
            return self.answer(404, {}, X_Error_Code="RevisionNotFound")
        commit, files = found
        if what == "revision":
            return self.answer(200, {"id": repo, "sha": commit, "siblings": []})
        if what == "tree":
            rows = [
                {"type": "file", "path": name, "size": len(content), "oid": tag(content)}
                for name, content in files.items()
            ]
            return self.answer(200, rows)
        if file not in files:
            return self.answer(404, {}, X_Error_Code="EntryNotFound")
        headers = {"ETag": f'"{tag(files[file])}"', "X_Repo_Commit": commit}
        return self.answer(200, files[file], **headers)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.server.large[self.path.rpartition("/")[2]] = content
        self.answer(200, {})

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") is None:
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            said = json.loads(body)
            repo = f"{said['organization']}/{said['name']}" if said.get("organization") else "me/x"
            if repo in self.server.repos:
                return self.answer(409, {"url": f"{self.server.url}/{repo}"})
            self.server.commit(repo, {})
            return self.answer(200, {"url": f"{self.server.url}/{repo}", "id": repo})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.answer(
                200, {"transfer": "basic", "objects": objects},
                Content_Type="application/vnd.git-lfs+json",
            )  # fmt: skip
        repo, what = re.match(r"/api/models/([^/]+/[^/]+)/(\w+)", path).groups()  # type: ignore[union-attr]
        if what == "preupload":
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        files = dict(self.server.repos[repo][-1][1])
        for line in map(json.loads, body.decode().splitlines()):
            match line:
                case {"key": "file", "value": {"path": name, "content": content}}:
                    files[name] = base64.b64decode(content)
                case {"key": "lfsFile", "value": {"path": name, "oid": oid}}:
                    files[name] = self.server.large[oid]
        commit = self.server.commit(repo, files)
        url = f"{self.server.url}/{repo}/commit/{commit}"
        return self.answer(
            200, {"commitUrl": url, "commitOid": commit, "commitMessage": "", "success": True}
        )


def tag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
