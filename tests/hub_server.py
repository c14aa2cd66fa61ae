"""A hub on loopback: what pushing a model and loading it again ask of the real one, and no more."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

from huggingface_hub import ModelCard

WRITER, READER = "hf_maywriteandread", "hf_mayonlyread"  # tokens
LICENSES = ("apache-2.0", "mit", "other")


class Repository:
    """Its visibility, and (id, files) of every commit."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: list[tuple[str, dict[str, bytes]]] = [("0" * 40, {})]

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        commits = dict([*self.commits, ("main", self.commits[-1][1])])
        return commits.get(revision)

    def commit(self, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits.append((name, files))
        return name


class Hub(ThreadingHTTPServer):
    """Serves `repos` at `url` until it is closed; a context manager."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repository] = {}
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *args) -> None:
        self.shutdown()
        super().__exit__(*args)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlparse(self.path).path)
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if self._token() not in (WRITER, READER):
            return self._json({"error": "Invalid username or password."}, 401)
        if self._token() == READER:
            return self._json({"error": "You do not have write access."}, 403)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        repo, action, revision = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/(.+)", path).groups()
        files = dict(self.server.repos[repo].files(revision))
        if action == "preupload":
            return self._json({"files": [self._mode(file["path"], files) for file in json.loads(body)["files"]]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] != "header":
                return self._json({"error": f"no {line['key']} here"}, 400)
        name = self.server.repos[repo].commit(files)
        return self._json({"commitUrl": f"{self.server.url}/{repo}/commit/{name}", "commitOid": name})

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(tree|revision)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo = self.server.repos.get((api or file)[1]) if api or file else None
        if repo is None or (repo.private and self._token() not in (WRITER, READER)):
            return self._json({"error": "Repository not found"}, 404 if self._token() else 401, "RepoNotFound")
        revision = ((api[3] if api else file[2]) or "main") if api or file else "main"
        files = repo.files(revision)
        if files is None:
            return self._json({"error": "no such revision"}, 404, "RevisionNotFound")
        commit = repo.commits[-1][0] if revision == "main" else revision
        if api and api[2] == "tree":
            tree = [{"type": "file", "path": p, "size": len(data), "oid": _oid(data)} for p, data in files.items()]
            return self._json(tree)
        if api:
            return self._json({"id": api[1], "sha": commit, "private": repo.private})
        if file[3] not in files:
            return self._json({"error": "no such file"}, 404, "EntryNotFound")
        return self._send(files[file[3]], headers={"ETag": f'"{_oid(files[file[3]])}"', "X-Repo-Commit": commit})

    do_HEAD = do_GET

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _validate(self, content: str) -> None:
        license = ModelCard(content).data.license
        wrong = license is not None and license not in LICENSES
        message = f'"license" must be one of {list(LICENSES)}'
        if wrong and self.headers["Accept"] == "text/plain":
            self._send(message.encode(), 400)
        else:
            self._json({"errors": [{"message": message}] * wrong, "warnings": []}, 400 if wrong else 200)

    def _create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.server.repos
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repos.setdefault(name, Repository(bool(private)))
        answer = {"url": f"{self.server.url}/{name}"}
        self._json(answer | ({"error": "You already created this model repo"} if there else {}), 409 if there else 200)

    def _mode(self, path: str, files: dict[str, bytes]) -> dict:
        mode = {"path": path, "uploadMode": "regular", "shouldIgnore": False}
        return mode | ({"oid": _oid(files[path])} if path in files else {})

    def _json(self, value: object, status: int = 200, code: str | None = None) -> None:
        headers = {"Content-Type": "application/json"} | ({"X-Error-Code": code} if code else {})
        self._send(json.dumps(value).encode(), status, headers)

    def _send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
