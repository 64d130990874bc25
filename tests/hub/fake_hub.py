"""A Hub on localhost: repositories in memory, with the requests that huggingface_hub sends to upload and to read."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(?P<type>models|datasets)/(?P<repo>[^/]+/[^/]+)(?P<rest>/.*)?")
RESOLVE = re.compile(r"/(?:datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


def sha_of(value: Any) -> str:
    return hashlib.sha1(repr(value).encode()).hexdigest()


@dataclass
class Repo:
    """Branches with their files."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: list[dict[str, Any]] = field(default_factory=list)

    def branch_of(self, revision: str) -> str | None:
        """The branch that a name or a digest means."""
        shas = {sha_of(sorted(files.items())): name for name, files in self.branches.items()}
        return revision if revision in self.branches else shas.get(revision)

    def sha(self, branch: str) -> str:
        return sha_of(sorted(self.branches[branch].items()))


class FakeHub:
    """The state of the server.

    Attributes:
        repos: Repositories by type and id.
        token: The token that is accepted.
        read_only: Repositories that the token may not write to.
        before_commit: Called before a commit is applied, as another user's commit would come.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.token = "hf_valid"
        self.read_only: set[str] = set()
        self.before_commit: Any = lambda repo: None
        self.requests: list[str] = []

    def files(self, repo: str, branch: str = "main", type: str = "models") -> dict[str, bytes]:
        return self.repos[type, repo].branches[branch]

    def commits(self, repo: str, type: str = "models") -> list[dict[str, Any]]:
        return self.repos[type, repo].commits


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def reply(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status: int, message: str, code: str = "") -> None:
        self.reply(status, {"error": message}, {"X-Error-Message": message, "X-Error-Code": code})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        body, path = self.body(), unquote(url.path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.fail(401, "Invalid username or password.")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        match = API.fullmatch(path)
        if match and match["rest"] != "" and (match["type"], match["repo"]) in self.hub.repos:
            repo = self.hub.repos[match["type"], match["repo"]]
            return self.api(match["repo"], repo, match["rest"] or "", body, parse_qs(url.query))
        match = RESOLVE.fullmatch(path)
        if match:
            type = "datasets" if path.startswith("/datasets/") else "models"
            return self.resolve(self.hub.repos.get((type, match["repo"])), match["revision"], match["name"])
        return self.fail(404, "Repository Not Found", "RepoNotFound")

    do_GET = do_POST = do_HEAD = do_PUT = handle_request

    def create(self, request: dict[str, Any]) -> None:
        repo = f"{request['organization'] or 'me'}/{request['name']}"
        key = (f"{request.get('type', 'model')}s", repo)
        if repo.split("/")[0] == "other" and key not in self.hub.repos:
            return self.fail(403, "You don't have the rights to create a model under the namespace other")
        status = 409 if key in self.hub.repos else 200
        self.hub.repos.setdefault(key, Repo(request.get("visibility") == "private" or bool(request.get("private"))))
        return self.reply(
            status, {"url": f"http://{self.headers['Host']}/{repo}", "error": "exists" if status == 409 else ""}
        )

    def validate(self, content: str) -> None:
        import yaml

        block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(block[1]) if block else {}
        except yaml.YAMLError as error:
            return self.reply(400, {"errors": [{"message": str(error)}], "warnings": []})
        warnings = [] if isinstance(metadata, dict) else [{"message": "empty"}]
        return self.reply(200, {"errors": [], "warnings": warnings})

    def api(self, name: str, repo: Repo, rest: str, body: bytes, query: dict[str, list[str]]) -> None:
        action, _, argument = rest.removeprefix("/").partition("/")
        if action in ("", "revision"):
            branch = repo.branch_of(argument or "main")
            if branch is None:
                return self.fail(404, "Invalid rev id", "RevisionNotFound")
            siblings = [{"rfilename": file} for file in repo.branches[branch]]
            return self.reply(200, {"id": name, "sha": repo.sha(branch), "siblings": siblings, "private": repo.private})
        if action == "tree":
            files = repo.branches[repo.branch_of(argument) or "main"].items()
            return self.reply(200, [
                {"type": "file", "path": file, "oid": sha_of(content), "size": len(content)} for file, content in files
            ])  # fmt: skip
        if name in self.hub.read_only and "create_pr" not in query:
            return self.fail(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        if action == "branch":
            status = 409 if argument in repo.branches else 200
            repo.branches.setdefault(argument, dict(repo.branches["main"]))
            return self.reply(status, {"error": "exists"} if status == 409 else {})
        if action == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self.reply(200, {"files": files})
        if action == "commit":
            return self.commit(name, repo, argument, body, "create_pr" in query)
        return self.fail(404, "Not Found")

    def commit(self, name: str, repo: Repo, branch: str, body: bytes, create_pr: bool) -> None:
        self.hub.before_commit(repo)
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.sha(branch)) and not create_pr:
            return self.fail(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.branches[branch])
        for line in lines[1:]:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        target = f"refs/pr/{len(repo.commits) + 1}" if create_pr else branch
        repo.branches[target] = files
        repo.commits.append({"summary": header["summary"], "branch": target})
        url = f"http://{self.headers['Host']}/{name}"
        answer = {"commitUrl": f"{url}/commit/{repo.sha(target)}", "commitOid": repo.sha(target)}
        pull = f"{url}/discussions/{len(repo.commits)}"
        return self.reply(200, answer | {"pullRequestUrl": pull if create_pr else None})

    def resolve(self, repo: Repo | None, revision: str, name: str) -> None:
        branch = repo.branch_of(revision) if repo else None
        if repo is None or branch is None or name not in repo.branches[branch]:
            return self.fail(404, "Entry not found", "EntryNotFound")
        content = repo.branches[branch][name]
        headers = {"ETag": f'"{sha_of(content)}"', "X-Repo-Commit": repo.sha(branch)}
        if self.command == "HEAD":
            return self.reply(200, b"", headers | {"Content-Length": str(len(content))})
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
            part = content[start:stop]
            headers |= {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"}
            return self.reply(206, part, headers)
        return self.reply(200, content, headers)


@contextmanager
def serving() -> Iterator[tuple[FakeHub, str]]:
    """A hub that listens, and its address."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
