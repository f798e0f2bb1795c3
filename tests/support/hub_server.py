"""A model hub on this machine, for what `huggingface_hub` asks of it over HTTP: repositories, cards, commits, files.

with hub_server.running() as hub:      # hub.url is the endpoint, hub.token lets one write
    ...
    hub.files("owner/name")            # {path: bytes} of the last commit

What the true one refuses, this one refuses: no token, no such repository or revision, a card whose metadata it cannot
read. Files that are no text, or are large, go through LFS, and come back from another address than the page's.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "standin" * 5
LARGE = 100_000
"""Bytes from which a text goes through LFS too."""


class Hub(ThreadingHTTPServer):
    """The server and what it keeps: for each repository its commits, each a whole tree."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.token = TOKEN
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.private: dict[str, bool] = {}
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.asked: list[tuple[str, str]] = []
        self.broken: set[str] = set()  # beginnings of paths: a request to one ends in a fault of the server's

    def files(self, repo: str) -> dict[str, bytes]:
        """What the last commit holds, LFS files as their bytes."""
        return dict(self.commits[repo][-1][1])


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_large(sample: bytes, size: int) -> bool:
    return size > LARGE or b"\0" in sample


class _Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _say(self, status: int, data: Any = b"", **headers: str) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _no(self, status: int, code: str, message: str) -> None:
        self._say(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def _answer(self) -> None:
        target = urlsplit(self.path)
        path, query = unquote(target.path).strip("/"), parse_qs(target.query)
        body = self._body()
        self.server.asked.append((self.command, path))
        if any(path.startswith(part) for part in self.server.broken):
            return self._say(503, {"error": "out of order"})
        if path.startswith("lfs/"):
            return self._lfs(path.removeprefix("lfs/"), body)
        if path == "api/validate-yaml":
            return self._card(json.loads(body)["content"])
        if self.command == "POST" and not self._is_known():
            return self._no(401, "", "Invalid username or password.")
        if path == "api/repos/create":
            return self._create(json.loads(body))
        match path.split("/"):
            case ["api", "models", owner, name, *rest]:
                return self._api(f"{owner}/{name}", rest, body, query)
            case [owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                return self._batch(json.loads(body))
            case [owner, name, "resolve", revision, *rest]:
                return self._resolve(f"{owner}/{name}", revision, "/".join(rest))
        return self._say(404)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization'] or 'me'}/{asked['name']}"
        if repo in self.server.commits:
            return self._say(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"})
        self.server.private[repo] = asked.get("private") or asked.get("visibility") == "private"
        self.server.commits[repo] = [(hashlib.sha1(repo.encode()).hexdigest(), {})]
        return self._say(200, {"url": f"{self.server.url}/{repo}", "name": repo})

    def _card(self, text: str) -> None:
        """The hub's own rules in short: the front matter is a mapping, `model-index` has its shape, names are ids."""
        faults = []
        try:
            front = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
            for index in front.get("model-index", []):
                for result in index["results"]:
                    if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                        faults.append('"model-index" lacks a task or a data set')
                    if not all(one["type"] and isinstance(one["value"], int | float) for one in result["metrics"]):
                        faults.append('"model-index" has a metric without type or value')
            if not isinstance(front.get("base_model", ""), str | list):
                faults.append('"base_model" must be a string')
            if not isinstance(front.get("datasets", []), list):
                faults.append('"datasets" must be an array')
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            faults.append(f"bad metadata: {error!r}")
        said = {"errors": [{"message": fault} for fault in faults], "warnings": []}
        return self._say(400 if faults else 200, said)

    def _tree(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if repo not in self.server.commits or (self.server.private[repo] and not self._is_known()):
            self._no(401, "RepoNotFound", "Repository not found")
            return None
        for sha, tree in reversed(self.server.commits[repo]):
            if revision in ("main", sha):
                return sha, tree
        self._no(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _api(self, repo: str, rest: list[str], body: bytes, query: dict[str, list[str]]) -> None:
        found = self._tree(repo, rest[1] if len(rest) > 1 else "main")
        if found is None:
            return None
        sha, tree = found
        match rest:
            case [] | ["revision", _]:
                siblings = [{"rfilename": name} for name in tree]
                return self._say(200, {"id": repo, "sha": sha, "siblings": siblings, "tags": [], "private": False})
            case ["tree", _, *folder]:
                return self._say(200, self._listing(tree, "/".join(folder), "recursive" in query))
            case ["preupload", _]:
                asked = json.loads(body)["files"]
                modes = [_is_large(base64.b64decode(one["sample"]), one["size"]) for one in asked]
                return self._say(
                    200,
                    {
                        "files": [
                            {
                                "path": one["path"],
                                "uploadMode": "lfs" if large else "regular",
                                "shouldIgnore": False,
                                "oid": self._oid(tree[one["path"]]) if one["path"] in tree else None,
                            }
                            for one, large in zip(asked, modes, strict=True)
                        ]
                    },
                )
            case ["commit", _]:
                return self._commit(repo, tree, [json.loads(line) for line in body.splitlines()])
        return self._say(404)

    def _oid(self, data: bytes) -> str:
        return hashlib.sha256(data).hexdigest() if _is_large(data[:512], len(data)) else _blob(data)

    def _listing(self, tree: dict[str, bytes], folder: str, deep: bool) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        listed: dict[str, dict[str, Any]] = {}
        for name, data in tree.items():
            if not name.startswith(prefix):
                continue
            inner = name.removeprefix(prefix)
            if "/" in inner and not deep:
                top = prefix + inner.partition("/")[0]
                listed[top] = {"type": "directory", "path": top, "oid": _blob(top.encode()), "size": 0}
                continue
            listed[name] = {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
            if _is_large(data[:512], len(data)):
                sha = hashlib.sha256(data).hexdigest()
                listed[name]["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 130}
        return list(listed.values())

    def _commit(self, repo: str, tree: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        tree = dict(tree)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        sha = hashlib.sha1(f"{repo}{len(self.server.commits[repo])}".encode()).hexdigest()
        self.server.commits[repo].append((sha, tree))
        return self._say(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha})

    def _batch(self, asked: dict[str, Any]) -> None:
        told = []
        for one in asked["objects"]:
            actions = {
                "upload": {"href": f"{self.server.url}/lfs/{one['oid']}"},
                "verify": {"href": f"{self.server.url}/lfs/verify/{one['oid']}"},
            }
            known = one["oid"] in self.server.large
            told.append({"oid": one["oid"], "size": one["size"]} | ({} if known else {"actions": actions}))
        return self._say(200, {"transfer": "basic", "objects": told})

    def _lfs(self, name: str, body: bytes) -> None:
        sha = name.removeprefix("verify/")
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != sha:
                return self._say(400, {"error": "other bytes than announced"})
            self.server.large[sha] = body
            return self._say(200)
        if sha not in self.server.large:
            return self._say(404)
        return self._say(200, b"" if name.startswith("verify/") else self.server.large[sha])

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._tree(repo, revision)
        if found is None:
            return None
        sha, tree = found
        if path not in tree:
            return self._no(404, "EntryNotFound", "Entry not found")
        data = tree[path]
        if not _is_large(data[:512], len(data)):
            return self._say(200, data, X_Repo_Commit=sha, ETag=f'"{_blob(data)}"')
        content = hashlib.sha256(data).hexdigest()
        self.server.large[content] = data
        return self._say(
            302,
            X_Repo_Commit=sha,
            X_Linked_ETag=f'"{content}"',
            X_Linked_Size=str(len(data)),
            Location=f"http://localhost:{self.server.server_port}/lfs/{content}",
        )
