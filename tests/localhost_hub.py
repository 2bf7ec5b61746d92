"""A small Hugging Face Hub on localhost, so that tests push and pull with the real clients and without a network.

It speaks the part of the Hub's HTTP protocol with which `huggingface_hub` (and so transformers, diffusers and datasets)
creates repos, commits regular and LFS files, lists them and downloads them. Everything is kept in memory.

    with LocalhostHub() as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        api.create_repo("lab/model")
        api.upload_folder(repo_id="lab/model", folder_path=folder)
        assert hub.files("lab/model")["config.json"] == ...

Left out: Xet, pull requests, multi-part LFS uploads, pages of listings, `.gitignore`, gating, search, running Spaces.
"""

import base64
import hashlib
import json
import re
import secrets
import socket
import socketserver
import sys
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "tester"
LFS_SUFFIXES = (".arrow", ".bin", ".ckpt", ".gz", ".h5", ".npy", ".npz", ".parquet", ".pt", ".safetensors", ".zip")
LFS_SIZE = 10_000_000
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()

REPO = r"([^/]+(?:/[^/]+)?)"  # canonical repos of the Hub have no namespace: asking for one must be a clean 404
API_ROUTE = re.compile(rf"/api/(model|dataset|space)s/{REPO}(?:/([a-z-]+)(?:/(.+))?)?")
RESOLVE_ROUTE = re.compile(rf"/(?:(dataset|space)s/)?{REPO}/resolve/([^/]+)/(.+)")
LFS_ROUTE = re.compile(rf"/(?:(dataset|space)s/)?{REPO}\.git/info/lfs/objects/(batch|verify)")
STORAGE_ROUTE = re.compile(r"/lfs-storage/([0-9a-f]+)")
FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)


class HubError(Exception):
    """An answer other than success; `code` is what the client turns into its own classes of errors."""

    def __init__(self, status, message, code=None, headers=None, **body):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class Blob:
    """The content of a file, named as git names it: an LFS file by its pointer, with the SHA-256 as its ETag."""

    def __init__(self, data, lfs=False):
        self.data, self.size, self.sha256 = data, len(data), hashlib.sha256(data).hexdigest() if lfs else None
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        stored = pointer if lfs else data
        self.pointer_size = len(pointer)
        self.oid = hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
        self.etag = self.sha256 or self.oid

    def lfs(self, name):
        return {name: self.sha256, "size": self.size, "pointerSize": self.pointer_size} if self.sha256 else None


@dataclass(frozen=True, eq=False)
class Commit:
    parent: "Commit | None"
    title: str
    message: str
    files: dict[str, Blob]
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))

    @cached_property
    def id(self):
        content = [(path, blob.oid) for path, blob in sorted(self.files.items())]
        parent = self.parent and self.parent.id
        return hashlib.sha1(repr((parent, self.title, self.message, self.date, content)).encode()).hexdigest()

    def entry(self, path, expand=False):
        """One line of a listing: a file or a folder, or `None` where there is neither."""
        if path in self.files:
            blob = self.files[path]
            entry = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
            if blob.sha256:
                entry["lfs"] = blob.lfs("oid")
        elif self._below(path):
            oid = hashlib.sha1(repr(sorted(self._below(path).items())).encode()).hexdigest()
            entry = {"type": "directory", "oid": oid, "size": 0, "path": path}
        else:
            return None
        if expand:
            commit = self
            while commit.parent and commit.parent._below(path) == self._below(path):
                commit = commit.parent
            entry["lastCommit"] = {"id": commit.id, "title": commit.title, "date": commit.date}
        return entry

    def _below(self, path):
        return {name: blob.oid for name, blob in self.files.items() if name == path or name.startswith(f"{path}/")}

    def tree(self, folder, recursive, expand):
        prefix, paths = f"{folder}/" if folder else "", set()
        for name in self.files:
            if name.startswith(prefix):
                parts = name[len(prefix) :].split("/")
                paths |= {prefix + "/".join(parts[: i + 1]) for i in range(len(parts) if recursive else 1)}
        if folder and not paths:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound", {"X-Repo-Commit": self.id})
        return [self.entry(path, expand) for path in sorted(paths)]

    def card(self):
        """The front matter of the README: what the Hub answers as a repo's metadata."""
        readme = self.files.get("README.md")
        return front_matter(readme.data.decode("utf-8", "replace"))[0] if readme else {}


class Repo:
    def __init__(self, kind, name, private=False, sdk=None):
        self.kind, self.name, self.private, self.sdk = kind, name, private, sdk
        self.branches, self.tags, self.commits = {}, {}, {}
        # The Hub's repos are never empty either: code that lists or copies a whole repo meets this file.
        self.add("main", Commit(None, "initial commit", "", {".gitattributes": Blob(GIT_ATTRIBUTES)}))

    def add(self, branch, commit):
        self.commits[commit.id] = self.branches[branch] = commit
        return commit

    def find(self, revision):
        for names in (self.branches, self.tags, self.commits):
            if revision in names:
                return names[revision]
        short = [commit for sha, commit in self.commits.items() if len(revision) >= 7 and sha.startswith(revision)]
        if len(short) == 1:
            return short[0]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def front_matter(text):
    """`(metadata, errors)` of a card.

    No stand-in for the Hub's own check, which knows the licences, tasks, languages and the schema of evaluation
    results: a card that passes here may still be refused there.
    """
    match = FRONT_MATTER.match(text)
    try:
        metadata = yaml.safe_load(match[1]) or {} if match else {}
    except yaml.YAMLError as error:
        return {}, [f"the front matter is not YAML: {error}"]
    if not isinstance(metadata, dict):
        return {}, ["the front matter is not a mapping"]
    texts = [key for key in ("license", "library_name", "pipeline_tag") if key in metadata]
    return metadata, [f'"{key}" must be a string' for key in texts if not isinstance(metadata[key], str)]


class LocalhostHub:
    def __init__(self):
        self.token = f"hf_{secrets.token_hex(17)}"
        self.read_token = f"hf_{secrets.token_hex(17)}"  # reads what `token` reads, and may not write
        self.requests: list[tuple[str, str]] = []  # method and path with its query, in order of arrival
        self.ranges: list[str] = []  # the `Range` headers that came with downloads
        self.down: int | None = None  # a status, such as 503, that every request gets while it is set
        self._repos, self._cut = {}, None
        self._objects, self._uploads = {}, {}  # LFS content by SHA-256, shared by all repos; addresses given out for it
        self._lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def environment(self):
        """What points the clients of a process at this Hub and nowhere else; they read it when they are imported."""
        on = ["DISABLE_XET", "DISABLE_TELEMETRY", "DISABLE_PROGRESS_BARS", "DISABLE_UPDATE_CHECK"]
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            **{f"HF_HUB_{name}": "1" for name in on},
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HUGGINGFACE_CO_STAGING": "0",  # it would take precedence over `HF_ENDPOINT`
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets counts loads at an address outside the Hub
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def files(self, repo_id, repo_type="model", revision="main"):
        """All that a repo holds at a revision, `.gitattributes` included."""
        return {path: blob.data for path, blob in self._repos[repo_type, repo_id].find(revision).files.items()}

    def fail_after(self, n_bytes, then_down=None):
        """Break the next download or LFS upload of more than `n_bytes` off at that point, once.

        With `then_down`, a status, the Hub stays down after it: otherwise the clients try again by themselves.
        """
        self._cut = (n_bytes, then_down)

    def cut(self, size):
        """How much of a transfer of `size` bytes to let through."""
        with self._lock:
            if self._cut is None or size <= self._cut[0]:
                return size
            (n_bytes, self.down), self._cut = self._cut, None
            return n_bytes

    def answer(self, request, path):
        """`(status, headers, body)`, where the body is bytes or becomes JSON."""
        with self._lock:
            if (match := RESOLVE_ROUTE.fullmatch(path)) and request.command in ("GET", "HEAD"):
                repo = self._repo(request, match[1], match[2])
                return self._resolve(request, repo, unquote(match[3]), unquote(match[4]))
            if (match := STORAGE_ROUTE.fullmatch(path)) and request.command == "PUT":
                return self._store(match[1], request.body)
            if (match := LFS_ROUTE.fullmatch(path)) and request.command == "POST":
                self._authorise(request, write=True)
                self._repo(request, match[1], match[2])
                body = (self._lfs_batch if match[3] == "batch" else self._lfs_verify)(request, match[0])
            elif match := API_ROUTE.fullmatch(path):
                kind, name, action, rest = match.groups()
                body = self._repo_api(request, self._repo(request, kind, name), action or "revision", rest)
            else:
                body = self._site_api(request, path)
            if body is None:
                raise HubError(404, f"This Hub has no answer to {request.command} {path}")
            return 200, {}, body

    def _authorise(self, request, write=False):
        given = request.headers.get("Authorization")
        if given and given not in (f"Bearer {self.token}", f"Bearer {self.read_token}"):
            raise HubError(401, "Invalid credentials in Authorization header")
        if write and not given:
            raise HubError(401, "Invalid username or password.")
        if write and given == f"Bearer {self.read_token}":
            raise HubError(403, "This token has read access only")
        return bool(given)

    def _repo(self, request, kind, name):
        known, repo = self._authorise(request), self._repos.get((kind or "model", unquote(name)))
        if repo is None or (repo.private and not known):
            # To a stranger the Hub does not say which of the two it is.
            raise HubError(404 if known else 401, "Repository not found", "RepoNotFound")
        return repo

    def _site_api(self, request, path):
        match request.command, path:
            case "GET", "/api/whoami-v2":
                if not self._authorise(request):
                    raise HubError(401, "Invalid username or password.")
                role = "write" if request.headers["Authorization"].endswith(self.token) else "read"
                access = {"accessToken": {"displayName": "tests", "role": role}}
                return {"type": "user", "id": USER, "name": USER, "fullname": USER, "orgs": [], "auth": access}
            case "POST", "/api/validate-yaml":
                metadata, errors = front_matter(request.json()["content"])
                warnings = [] if metadata or errors else [{"message": "empty or missing yaml metadata in repo card"}]
                answer = {"errors": [{"message": error} for error in errors], "warnings": warnings}
                if errors:
                    raise HubError(400, "Invalid metadata", **answer)
                return answer
            case ("POST", "/api/repos/create") | ("DELETE", "/api/repos/delete"):
                self._authorise(request, write=True)
                asked = request.json()
                kind, name = asked.get("type") or "model", f"{asked.get('organization') or USER}/{asked['name']}"
                if request.command == "DELETE":
                    self._repo(request, kind, name)
                    del self._repos[kind, name]
                    return {}
                if kind not in ("model", "dataset", "space") or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
                    raise HubError(400, f"Invalid repo: {kind} {name}")
                repo = Repo(kind, name, asked.get("visibility") == "private", asked.get("sdk"))
                answer = {"url": self._page(repo), "name": name, "id": name}
                if (kind, name) in self._repos:
                    raise HubError(409, f"You already created this {kind} repo", **answer)
                self._repos[kind, name] = repo
                return answer

    def _repo_api(self, request, repo, action, rest):
        if request.command != "GET" and action != "paths-info":
            self._authorise(request, write=True)
        if "create_pr" in request.query:
            raise HubError(400, "This Hub has no pull requests")
        rest = [unquote(part) for part in rest.split("/", 1)] if rest else ["main"]
        name, flag = rest[0], lambda key: request.query.get(key, [""])[0].lower() in ("1", "true")
        match request.command, action:
            case "GET", "revision":
                return self._info(repo, repo.find(name), flag("blobs"), request.query)
            case "GET", "refs":
                refs = {"converts": [], "pullRequests": []}
                for key, folder, names in [("branches", "heads", repo.branches), ("tags", "tags", repo.tags)]:
                    named = [(name, f"refs/{folder}/{name}", commit.id) for name, commit in names.items()]
                    refs[key] = [{"name": name, "ref": ref, "targetCommit": sha} for name, ref, sha in named]
                return refs
            case "GET", "commits":
                commit, log = repo.find(name), []
                while commit:
                    entry = {"id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date}
                    log.append({**entry, "authors": [{"user": USER}]})
                    commit = commit.parent
                return log
            case "GET", "tree":
                return repo.find(name).tree("".join(rest[1:]).rstrip("/"), flag("recursive"), flag("expand"))
            case "POST", "paths-info":
                form = parse_qs(request.body.decode())
                expand, commit = form.get("expand", [""])[0].lower() == "true", repo.find(name)
                entries = [commit.entry(path.strip("/"), expand) for path in form.get("paths", [])]
                return [entry for entry in entries if entry]
            case "POST", "preupload":
                files = repo.find(name).files
                return {"files": [self._upload_mode(file, files) for file in request.json()["files"]]}
            case "POST", "commit":
                commit = self._commit(repo, name, [json.loads(line) for line in request.body.splitlines() if line])
                address = f"{self._page(repo)}/commit/{commit.id}"
                return {"success": True, "commitOid": commit.id, "commitUrl": address, "hookOutput": ""}
            case "POST", ("branch" | "tag"):
                asked, names = request.json(), repo.branches if action == "branch" else repo.tags
                target = repo.find(asked.get("startingPoint", "main") if action == "branch" else name)
                name = name if action == "branch" else asked["tag"]
                if name in names:
                    raise HubError(409, f"Reference already exists: {name}")
                names[name] = target
                return {}
            case "DELETE", ("branch" | "tag"):
                names = repo.branches if action == "branch" else repo.tags
                if name not in names:
                    raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
                if name == "main":
                    raise HubError(403, "The default branch cannot be deleted")
                del names[name]
                return {}

    def _page(self, repo):
        return f"{self.url}/{'' if repo.kind == 'model' else repo.kind + 's/'}{repo.name}"

    def _info(self, repo, commit, blobs, query):
        card, siblings = commit.card(), [{"rfilename": path} for path in sorted(commit.files)]
        for sibling in siblings if blobs else []:
            blob = commit.files[sibling["rfilename"]]
            sibling |= {"size": blob.size, "blobId": blob.oid}
            if blob.sha256:
                sibling["lfs"] = blob.lfs("sha256")
        info = {"id": repo.name, "author": repo.name.split("/")[0], "sha": commit.id, "lastModified": commit.date}
        info |= {"createdAt": min(c.date for c in repo.commits.values()), "private": repo.private, "gated": False}
        info |= {"disabled": False, "downloads": 0, "likes": 0, "siblings": siblings}
        info |= {"cardData": card, "tags": card.get("tags") or []}
        if repo.sdk:
            info["sdk"] = repo.sdk
        info |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
        wanted = query.get("expand", []) + query.get("expand[]", [])
        return {key: value for key, value in info.items() if not wanted or key in ["id", *wanted]}

    def _upload_mode(self, file, files):
        # A NUL byte is git's own sign of a binary file, which the Hub takes as LFS only.
        lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
        lfs = lfs or b"\0" in base64.b64decode(file.get("sample", ""))
        answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        return {**answer, "oid": files[file["path"]].etag} if file["path"] in files else answer

    def _commit(self, repo, branch, lines):
        if branch not in repo.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head, header = repo.branches[branch], lines[0]["value"]
        if header.get("parentCommit") and repo.find(header["parentCommit"]) is not head:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for key, value in ((line["key"], line["value"]) for line in lines[1:]):
            path = value["path"]
            if not path.strip("/") or any(part in ("", ".", "..", ".git") for part in path.rstrip("/").split("/")):
                raise HubError(400, f"Invalid path: {path}")
            if key == "file":
                files[path] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self._objects:
                    raise HubError(400, f"The LFS object of {path} has not been uploaded")
                files[path] = self._objects[value["oid"]]
            elif key in ("deletedFile", "deletedFolder"):
                inside = path.rstrip("/") + "/"
                gone = [f for f in files if (f == path if key == "deletedFile" else f.startswith(inside))]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in gone:
                    del files[name]
            else:
                raise HubError(400, f"Unknown operation: {key}")
        return repo.add(branch, Commit(head, header["summary"], header.get("description", ""), files))

    def _lfs_batch(self, request, path):
        objects = []
        for asked in request.json()["objects"]:
            oid, answer = asked["oid"], {"oid": asked["oid"], "size": asked["size"]}
            if oid not in self._objects:
                # The client sends no token along with the content: the address is the permission, as with the Hub's.
                ticket = secrets.token_hex(16)
                self._uploads[ticket] = oid
                verify = f"{self.url}{path.removesuffix('batch')}verify"
                upload = f"{self.url}/lfs-storage/{ticket}"
                answer["actions"] = {"upload": {"href": upload, "header": {}}, "verify": {"href": verify, "header": {}}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def _store(self, ticket, data):
        blob = Blob(data, lfs=True)
        if self._uploads.get(ticket) != blob.sha256:
            raise HubError(400, "The content is not what was announced")
        self._objects[blob.sha256] = blob
        return 200, {"ETag": f'"{blob.sha256}"'}, b""

    def _lfs_verify(self, request, path):
        asked = request.json()
        if asked["oid"] not in self._objects or self._objects[asked["oid"]].size != asked["size"]:
            raise HubError(404, "No such LFS object")
        return {}

    def _resolve(self, request, repo, revision, filename):
        commit = repo.find(revision)
        headers = {"X-Repo-Commit": commit.id}
        if filename not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        blob = commit.files[filename]
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if blob.sha256:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        asked = request.headers.get("Range")
        if not asked or request.command == "HEAD":
            return 200, headers, blob.data
        self.ranges.append(asked)
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked.replace(" ", ""))
        first, last = match.groups() if match else ("", "")
        start = int(first) if first else max(blob.size - int(last or 0), 0)
        stop = min(int(last) + 1, blob.size) if first and last else blob.size
        if start >= stop:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{blob.size}"})
        return 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{blob.size}"}, blob.data[start:stop]


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # `HTTPServer` would ask a name server who 127.0.0.1 is

    def handle_error(self, request, client_address):
        # A client that goes away half-way is what some tests are about; anything else is a mistake in this file.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_request(self):
        hub, address = self.server.hub, urlsplit(self.path)
        hub.requests.append((self.command, self.path))
        self.query = parse_qs(address.query)
        # One request per connection: nothing is left open when the Hub closes.
        self.close_connection = True
        size = int(self.headers.get("Content-Length") or 0)
        # Read before any answer, even a refusal: closing on unread data would lose the answer on its way.
        let_through = hub.cut(size) if STORAGE_ROUTE.fullmatch(address.path) else size
        self.body = self.rfile.read(let_through)
        if let_through < size or len(self.body) < size:
            return self.connection.shutdown(socket.SHUT_RDWR)
        try:
            if hub.down:
                raise HubError(hub.down, "The Hub is down", headers={"Retry-After": "0"})
            status, headers, body = hub.answer(self, address.path)
        except HubError as error:
            status, headers, body = error.status, error.headers, error.body
        except (KeyError, TypeError, ValueError) as error:
            status, headers, body = 400, {}, {"error": f"Malformed request: {error!r}"}
        if not isinstance(body, bytes):
            headers = {"Content-Type": "application/json; charset=utf-8", **headers}
            body = json.dumps(body, default=str).encode()  # YAML has dates
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), "Connection": "close"}.items():
            self.send_header(name, " ".join(value.encode("ascii", "replace").decode().split()))
        self.end_headers()
        if self.command != "HEAD":
            download = "Accept-Ranges" in headers
            self.wfile.write(memoryview(body)[: hub.cut(len(body)) if download else None])

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def json(self):
        return json.loads(self.body or b"{}")

    def log_message(self, *_):
        pass
