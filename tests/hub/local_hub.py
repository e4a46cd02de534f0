"""A Hub on 127.0.0.1 that speaks enough of the protocol for huggingface_hub's own client, and can break on request.

Repositories are dictionaries in memory. Files from `LARGE` bytes on go through git-LFS, from `CHUNK` bytes on in several
parts. Tokens: `writer` may write, `reader` may not.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 4096
CHUNK = 64 * 1024
RIGHTS = {"writer": "write", "reader": "read"}


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # every state there was, by its hash
    messages: list[str] = field(default_factory=list)

    def head(self, revision: str) -> str:
        """The commit hash of a branch, or the hash itself."""
        files = self.branches.get(revision, {})
        state = json.dumps({path: blob_id(content) for path, content in sorted(files.items())})
        commit = hashlib.sha1(state.encode()).hexdigest() if revision in self.branches else revision
        if revision in self.branches:
            self.commits[commit] = dict(files)
        return commit


@dataclass
class Fault:
    """What goes wrong with the requests whose `METHOD /path` fits, `times` times, the first `spared` aside."""

    pattern: str
    status: int | None  # None: the connection is cut while the body is being sent
    times: int = 10**9
    spared: int = 0


class LocalHub:
    """The server: `url`, its `repositories`, the `requests` it got and the `faults` it is to make."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}  # LFS storage, by sha256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[repo_id].branches[revision]

    def fail(self, pattern: str, status: int | None, times: int = 10**9, spared: int = 0) -> None:
        self.faults.append(Fault(pattern, status, times, spared))

    def fault_of(self, request: str) -> Fault | None:
        for fault in self.faults:
            if re.search(fault.pattern, request) and fault.times > 0:
                if fault.spared > 0:
                    fault.spared -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(content: bytes | int) -> bool:
    return (content if isinstance(content, int) else len(content)) >= LARGE


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        fault = self.hub.fault_of(request)
        if fault is not None and fault.status is None:
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0)) // 2))
            self.close_connection = True
            self.connection.close()
            return
        self.body = self._read()
        if fault is not None:
            self._fail(fault.status, "this is a test")
            return
        for pattern, action in ROUTES:
            if match := re.fullmatch(pattern, request):
                action(self, *match.groups())
                return
        self._fail(404, f"no route for {request}")

    do_POST = do_PUT = do_HEAD = do_GET

    # ---- plumbing ----

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, answer: Any, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _fail(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    @property
    def rights(self) -> str | None:
        return RIGHTS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _may_write(self) -> bool:
        if self.rights == "write":
            return True
        if self.rights is None:
            self._fail(401, "Invalid username or password.")
        else:
            self._fail(403, "you don't have the rights to write")
        return False

    def _repository(self, repo_id: str, revision: str | None = None) -> Repository | None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.rights is None):
            self._fail(404 if self.rights else 401, "Repository not found", "RepoNotFound")
            return None
        if revision is not None and revision not in repository.branches:
            repository.head("main")
            if revision not in repository.commits:
                self._fail(404, f"Invalid rev id: {revision}", "RevisionNotFound")
                return None
        return repository

    def _files(self, repository: Repository, revision: str) -> dict[str, bytes]:
        return repository.branches.get(revision) or repository.commits[repository.head(revision)]

    # ---- endpoints ----

    def whoami(self) -> None:
        if self.rights is None:
            self._fail(401, "Invalid credentials in Authorization header")
        else:
            self._json({"name": "me", "type": "user", "orgs": []})

    def create(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if not self._may_write():
            return
        if repo_id in self.hub.repositories:
            self._send(409, json.dumps({"url": f"{self.hub.url}/{repo_id}"}).encode())
            return
        self.hub.repositories[repo_id] = Repository(private=wanted.get("visibility") == "private")
        self._json({"url": f"{self.hub.url}/{repo_id}"})

    def auth_check(self, repo_id: str, write: str | None) -> None:
        if self._repository(repo_id) and (not write or self._may_write()):
            self._json({})

    def validate_yaml(self) -> None:
        metadata = json.loads(self.body)["content"].split("---")[1]
        errors = [
            {"message": '"base_model" with value "/..." is not valid. Use a model id'}
            for line in metadata.splitlines()
            if re.match(r"base_model: *[./]", line)
        ]
        self._send(400 if errors else 200, json.dumps({"errors": errors, "warnings": []}).encode())

    def branch(self, repo_id: str, name: str) -> None:
        repository = self._repository(repo_id)
        if repository is None or not self._may_write():
            return
        if name in repository.branches:
            self._fail(409, "Reference already exists")
            return
        repository.branches[name] = dict(repository.branches["main"])
        self._json({})

    def preupload(self, repo_id: str, revision: str) -> None:
        repository = self._repository(repo_id, revision)
        if repository is None or not self._may_write():
            return
        present = self._files(repository, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["size"]) else "regular",
                "shouldIgnore": False,
                "oid": self._oid(present[file["path"]]) if file["path"] in present else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    @staticmethod
    def _oid(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest() if is_large(content) else blob_id(content)

    def batch(self, repo_id: str) -> None:
        if self._repository(repo_id) is None or not self._may_write():
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.large_files:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{oid}"}
                if size >= CHUNK:
                    numbers = range(1, -(-size // CHUNK) + 1)
                    upload["header"] = {"chunk_size": str(CHUNK)} | {
                        str(n): f"{self.hub.url}/lfs/{oid}/{n}" for n in numbers
                    }
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify/{repo_id}"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def put(self, oid: str, part: str | None) -> None:
        if part is not None:
            self.hub.parts.setdefault(oid, {})[int(part)] = self.body
        elif hashlib.sha256(self.body).hexdigest() != oid:
            self._fail(400, "checksum")
            return
        else:
            self.hub.large_files[oid] = self.body
        self._send(200, b"", {"ETag": f"part-{part}"})

    def complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        content = b"".join(self.hub.parts[oid][number] for number in numbers)
        if hashlib.sha256(content).hexdigest() != oid:
            self._fail(400, "checksum")
            return
        self.hub.large_files[oid] = content
        self._json({})

    def verify(self, repo_id: str) -> None:
        wanted = json.loads(self.body)
        found = self.hub.large_files.get(wanted["oid"], b"")
        self._json({}) if len(found) == wanted["size"] else self._fail(404, "object")

    def commit(self, repo_id: str, revision: str) -> None:
        repository = self._repository(repo_id, revision)
        if repository is None or not self._may_write():
            return
        files = dict(repository.branches[revision])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                repository.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"])
        repository.branches[revision] = files
        oid = repository.head(revision)
        self._json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    def info(self, repo_id: str, revision: str | None) -> None:
        revision = revision or "main"
        if repository := self._repository(repo_id, revision):
            siblings = [{"rfilename": path} for path in self._files(repository, revision)]
            self._json(
                {
                    "id": repo_id,
                    "sha": repository.head(revision),
                    "private": repository.private,
                    "siblings": siblings,
                }
            )

    def tree(self, repo_id: str, revision: str, _: str | None = None) -> None:
        if repository := self._repository(repo_id, revision):
            files = self._files(repository, revision).items()
            self._json([self._entry(path, content) for path, content in files])

    def paths_info(self, repo_id: str, revision: str) -> None:
        if repository := self._repository(repo_id, revision):
            wanted = json.loads(self.body)["paths"]
            files = self._files(repository, revision).items()
            self._json([self._entry(path, content) for path, content in files if path in wanted])

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": blob_id(content),
        }
        if is_large(content):
            entry["lfs"] = {"oid": self._oid(content), "size": len(content), "pointerSize": 134}
        return entry

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository = self._repository(repo_id, revision)
        if repository is None:
            return
        files = self._files(repository, revision)
        commit = {"X-Repo-Commit": repository.head(revision)}
        if path not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", **commit})
            return
        self._send(200, files[path], {"ETag": f'"{self._oid(files[path])}"', **commit})


REPO = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"GET /api/models/{REPO}/auth-check(/write)?", _Handler.auth_check),
    (rf"POST /api/models/{REPO}/branch/(.+)", _Handler.branch),
    (rf"POST /api/models/{REPO}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/models/{REPO}/commit/(.+)", _Handler.commit),
    (rf"POST /api/models/{REPO}/paths-info/(.+)", _Handler.paths_info),
    (rf"GET /api/models/{REPO}/tree/([^/]+)(/.*)?", _Handler.tree),
    (rf"GET /api/models/{REPO}(?:/revision/(.+))?", _Handler.info),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(\w+)(?:/(\d+))?", _Handler.put),
    (r"POST /lfs/(\w+)", _Handler.complete),
    (rf"POST /verify/{REPO}", _Handler.verify),
    (rf"(?:GET|HEAD) /{REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
