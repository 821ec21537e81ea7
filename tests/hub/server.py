"""A stand-in for huggingface.co on localhost: the part of its HTTP API that `push` and `pull` use.

It keeps repositories in memory and speaks what huggingface_hub speaks: creating a repository and a
branch, model info with file sizes, validation of a card's YAML, preupload, the LFS batch and its
PUT, commits as NDJSON, and resolve with ETag and X-Repo-Commit. It knows one token. It is stricter
than a mock: a commit of an LFS file that was never uploaded is refused, as is one on an old parent.
What it is not: no xet, no redirects to a CDN, no multipart uploads, no gated repositories.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_stand_in"
LFS = (".safetensors", ".npz")
START = "0" * 40


@dataclasses.dataclass
class Repo:
    """`branches` are heads, `commits` the files at each: `{name: bytes}`."""

    private: bool
    branches: dict[str, str] = dataclasses.field(default_factory=lambda: {"main": START})
    commits: dict[str, dict[str, bytes]] = dataclasses.field(
        default_factory=lambda: {START: {".gitattributes": b""}}
    )

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


class Hub:
    """The repositories, what was asked for, and faults by request.

    `faults["POST /api/repos/create"] = 500` answers with that status; "close" closes the connection
    in the middle. Keys are regular expressions of "METHOD path", tried in order.
    """

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: dict[str, int | str] = {}
        # A file's bytes on the way out, by its name: a server that lies.
        self.lies: dict[str, bytes] = {}

    def fault(self, request: str) -> int | str | None:
        return next((f for key, f in self.faults.items() if re.search(key, request)), None)


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        if path == "/api/agent-harnesses":  # which huggingface_hub asks for where an agent runs it
            return self.reply(404)
        self.hub.requests.append(request)
        fault = self.hub.fault(request)
        if fault == "close":
            self.rfile.read(min(100, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            return None
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if isinstance(fault, int):
            return self.reply(fault, {"error": f"told to say {fault}"})
        if token not in ("", TOKEN):
            return self.reply(401, said="Invalid credentials in Authorization header")
        return self.route(path, body, logged_in=token == TOKEN)

    def route(self, path: str, body: bytes, *, logged_in: bool):
        name = r"(?P<repo>[^/]+/[^/]+)"
        routes = {
            r"POST /api/validate-yaml": self.validate,
            r"POST /api/repos/create": self.create,
            rf"GET /api/models/{name}(/revision/(?P<rev>.+))?": self.info,
            rf"POST /api/models/{name}/branch/(?P<rev>.+)": self.branch,
            rf"POST /api/models/{name}/preupload/(?P<rev>.+)": self.preupload,
            rf"POST /{name}\.git/info/lfs/objects/batch": self.batch,
            r"PUT /lfs/(?P<oid>\w+)": self.store,
            rf"POST /api/models/{name}/commit/(?P<rev>.+)": self.commit,
            rf"(HEAD|GET) /{name}/resolve/(?P<rev>[^/]+)/(?P<file>.+)": self.resolve,
        }
        request = f"{self.command} {path}"
        matches = ((re.fullmatch(pattern, request), own) for pattern, own in routes.items())
        found, method = next(((match, own) for match, own in matches if match), (None, None))
        if found is None:
            return self.reply(501, {"error": f"not stood in for: {request}"})
        groups = {k: v for k, v in found.groupdict().items() if v is not None}
        if self.command in ("POST", "PUT") and not logged_in and "oid" not in groups:
            return self.reply(401, {"error": "Invalid username or password."})
        if "repo" in groups:
            repo = self.hub.repos.get(groups["repo"])
            if repo is None or (repo.private and not logged_in):
                return self.reply(404 if logged_in else 401, code="RepoNotFound")
            groups["repo"] = repo
        return method(body, **groups)

    def validate(self, body):
        text = json.loads(body)["content"]
        data = yaml.safe_load(text.split("---")[1])
        known = data.get("license") in ("apache-2.0", "mit")
        errors = [] if known else [{"message": f'"license" must be one of [{data.get("license")}]'}]
        self.reply(200 if known else 400, {"errors": errors, "warnings": []})

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return self.reply(409, {"error": "You already created this model repo"})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[name] = Repo(private)
        return self.reply(200, {"url": f"{self.hub.endpoint}/{name}"})

    def info(self, body, repo, rev="main"):
        files = repo.files(rev)
        if files is None:
            return self.reply(404, code="RevisionNotFound")
        siblings = [
            {
                "rfilename": name, "size": len(data),
                "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
                **({"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 134}}
                   if name.endswith(LFS) else {}),
            }
            for name, data in files.items()
        ]  # fmt: skip
        sha = repo.branches.get(rev, rev)
        return self.reply(
            200, {"id": "me/x", "sha": sha, "private": repo.private, "siblings": siblings}
        )

    def branch(self, body, repo, rev):
        if rev in repo.branches:
            return self.reply(409, {"error": "reference exists"})
        repo.branches[rev] = repo.branches["main"]
        return self.reply(200, {})

    def preupload(self, body, repo, rev):
        if repo.files(rev) is None:
            return self.reply(404, code="RevisionNotFound")
        modes = [
            {
                "path": file["path"], "shouldIgnore": False, "oid": None,
                "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
            }
            for file in json.loads(body)["files"]
        ]  # fmt: skip
        return self.reply(200, {"files": modes})

    def batch(self, body, repo):
        objects = [
            {
                **wanted,
                "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}},
            }
            for wanted in json.loads(body)["objects"]
        ]
        self.reply(200, {"transfer": "basic", "objects": objects})

    def store(self, body, oid):
        if sha256(body) != oid:
            return self.reply(400, {"error": "not what it should hash to"})
        self.hub.objects[oid] = body
        return self.reply(200, {})

    def commit(self, body, repo, rev):
        lines = [json.loads(line) for line in body.splitlines()]
        head = next(line["value"] for line in lines if line["key"] == "header")
        if head.get("parentCommit", repo.branches[rev]) != repo.branches[rev]:
            return self.reply(412, {"error": "A commit has happened since"})
        files = dict(repo.files(rev))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.reply(400, {"error": "LFS pointer pointed to a missing file"})
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(rev, files)
        return self.reply(
            200, {"commitUrl": f"{self.hub.endpoint}/me/x/commit/{sha}", "commitOid": sha}
        )

    def resolve(self, body, repo, rev, file):
        files = repo.files(rev)
        if files is None or file not in files:
            return self.reply(404, code="EntryNotFound")
        data = files[file]
        headers = {"X-Repo-Commit": repo.branches.get(rev, rev), "ETag": f'"{sha256(data)}"'}
        return self.send(200, self.hub.lies.get(file, data), headers)

    def reply(self, status: int, value: object = None, *, code: str = "", said: str = ""):
        headers = {"Content-Type": "application/json"}
        headers |= {"X-Error-Code": code} if code else {}
        headers |= {"X-Error-Message": said} if said else {}
        self.send(status, json.dumps(value or {}).encode(), headers)

    def send(self, status: int, data: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
