"""Hugging Face and ModelScope on 127.0.0.1, as their own client libraries see them; repositories and faults are data.

    with hub_server([Repo("org/name", {"model.safetensors": path})], Faults(drop_every=10)) as server:
        subprocess.run(command, env={**os.environ, **environment(server, tmp_path)})
        assert server.sent < 2 << 20

Three listeners, since a real hub's redirects lead to another host: the API of either hub, and the CDN behind both. The
hubs are called 127.0.0.1 and the CDN localhost, so that a token or cookie that follows a redirect is noticed (400).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlencode, urlsplit

# Both hubs keep weights outside git (LFS) and redirect to a CDN for them; other files they serve themselves.
_LFS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
# Hashing the 6.67 GB of a sparse checkpoint would take longer than any test that reads 200 MB of it.
_LARGEST_HASHED = 2 << 30


class Content:
    """The bytes of one file, and its metadata on the hubs."""

    def __init__(self, name: str, source: Path | bytes, sha256: str | None = None) -> None:
        self.name, self.source, self._sha256 = name, source, sha256
        self.size = len(source) if isinstance(source, bytes) else source.stat().st_size
        self.lfs = name.endswith(_LFS)

    def open(self) -> BinaryIO:
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open("rb")

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        if self._sha256 is None and self.size > _LARGEST_HASHED:
            digest.update(f"generated for {self.name} of {self.size} bytes".encode())
        elif self._sha256 is None:
            with self.open() as file:
                while segment := file.read(1 << 20):
                    digest.update(segment)
        return self._sha256 or digest.hexdigest()

    @cached_property
    def blob(self) -> str:
        """The git blob ID of the file; of an LFS file, that of its pointer file."""
        if self.lfs:
            return hashlib.sha1(self.sha256.encode()).hexdigest()
        with self.open() as file:
            return hashlib.sha1(b"blob %d\0" % self.size + file.read()).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob


@dataclass
class Repo:
    """A repository on `hubs`, at one commit, to which its branch and `tags` point.

    Attributes:
        files: File name -> path or content.
        private: Only `token` can see it.
        gated: Everybody can list it, only `token` can read files (None: nobody).
        sha256: Digests that need not be computed. A file over 2 GiB without one gets a generated digest.
    """

    id: str
    files: Mapping[str, Path | bytes]
    commit: str = ""
    tags: tuple[str, ...] = ()
    private: bool = False
    gated: bool = False
    token: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    hubs: tuple[str, ...] = ("hf", "ms")

    def __post_init__(self) -> None:
        self.commit = self.commit or hashlib.sha1(repr((self.id, sorted(self.files))).encode()).hexdigest()
        self.contents = {name: Content(name, self.files[name], self.sha256.get(name)) for name in sorted(self.files)}

    def replace(self, name: str, source: Path | bytes) -> None:
        """Replace the file `name` in a new commit; the old commit is no longer served."""
        self.commit = hashlib.sha1(self.commit.encode()).hexdigest()
        self.contents[name] = Content(name, source)

    def admits(self, token: str | None) -> bool:
        return token is not None and token == self.token


@dataclass
class Faults:
    """Faults of the server; 0 means never.

    Attributes:
        where: Only requests whose URL matches this expression are affected.
        answer: Status, body and headers of every response.
        silent: No response for `stall` seconds.
        drop_every: Each Nth file body: half of it is sent, then the connection is closed.
        truncate_every: Each Nth file body: half of it is sent as if it were complete.
        stall_every: Each Nth file body: half of it is sent, then nothing for `stall` seconds.
        busy: The first requests get 503.
        limited: The next requests get 429 with Retry-After.
        ignore_range: Whole files are sent.
        no_head: HEAD gets 405.
        url_uses: Requests that a signed URL of the CDN serves before 403.
        replace_after: File bodies after which `replacement` replaces files, behind old URLs too.
    """

    where: str = ""
    answer: tuple[int, bytes, Mapping[str, str]] | None = None
    silent: bool = False
    drop_every: int = 0
    truncate_every: int = 0
    stall_every: int = 0
    stall: float = 60.0
    busy: int = 0
    limited: int = 0
    retry_after: int = 1
    ignore_range: bool = False
    no_head: bool = False
    url_uses: int = 0
    replace_after: int = 0
    replacement: Mapping[str, Path | bytes] = field(default_factory=dict)


@dataclass
class Request:
    """A request and the bytes of its response body; `host` is hf, ms or cdn."""

    host: str
    method: str
    path: str
    range: str | None
    token: str | None
    status: int = 0
    sent: int = 0


class HubServer:
    """The running server: its addresses, its requests and the bytes sent.

    `faults` may be replaced while it runs. Counters go on: `drop_every=10` is each tenth body since the start.
    """

    def __init__(self, repos: Sequence[Repo], faults: Faults) -> None:
        self.repos, self.faults = list(repos), faults
        self.hf_endpoint = self.ms_endpoint = self.cdn = ""
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self.changed = threading.Condition()
        self.answering = 0
        self._counts: dict[str, int] = {}

    @property
    def sent(self) -> int:
        """Bytes of response bodies sent; waits for responses in progress, since a client can be ahead of the count."""
        with self.changed:
            self.changed.wait_for(lambda: not self.answering, timeout=2)
        return sum(request.sent for request in self.requests)

    def count(self, what: str) -> int:
        """Increment the counter `what` and return it."""
        with self.changed:
            self._counts[what] = self._counts.get(what, 0) + 1
            return self._counts[what]

    @contextmanager
    def answer(self, request: Request) -> Iterator[None]:
        with self.changed:
            self.requests.append(request)
            self.answering += 1
        try:
            yield
        finally:
            with self.changed:
                self.answering -= 1
                self.changed.notify_all()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # Or a body waits for the acknowledgement of its headers: 40 ms each.
    host: str
    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = dict(parse_qsl(url.query))
        self.form = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        cookie = re.search(r"m_session_id=([^;]+)", self.headers.get("Cookie", ""))
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.token = bearer or (cookie[1] if cookie else None)
        self.request_log = Request(self.host, self.command, self.path, self.headers.get("Range"), self.token)
        self.faults = faults = self.hub.faults if re.search(self.hub.faults.where, self.path) else Faults()
        try:
            with self.hub.answer(self.request_log):
                if faults.silent:
                    self.hub.closing.wait(faults.stall)
                    self.close_connection = True
                elif faults.answer:
                    self.reply(*faults.answer)
                elif faults.busy and self.hub.count("busy") <= faults.busy:
                    self.reply(503, b"busy")
                elif faults.limited and self.hub.count("limited") <= faults.limited:
                    self.reply(429, b"slow down", {"Retry-After": str(faults.retry_after)})
                elif faults.no_head and self.command == "HEAD":
                    self.reply(405, b"")
                else:
                    self.route(url.path)
        except ConnectionError:  # The client has left.
            self.close_connection = True

    do_HEAD = do_POST = do_GET  # noqa: N815

    def route(self, path: str) -> None:
        raise NotImplementedError

    def start(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.request_log.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def reply(self, status: int, body: Any, headers: Mapping[str, str] = {}) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "text/plain" if isinstance(body, bytes) else "application/json"
        self.start(status, len(data), {"Content-Type": kind, **headers})
        if self.command != "HEAD":
            self.wfile.write(data)
            self.request_log.sent += len(data)

    def to_cdn(self, repo: Repo, content: Content, headers: Mapping[str, str] = {}) -> None:
        # The digest is a part of the URL, as on the real CDNs: a URL never leads to other bytes than it was made for.
        query = {"Expires": "2000000000", "Signature": content.sha256[::-1], "Use": str(self.hub.count("urls"))}
        location = f"{self.hub.cdn}/{repo.id}/{content.sha256}/{quote(content.name)}?{urlencode(query)}"
        self.reply(302, b"", {"Location": location, **headers})

    def asked(self, content: Content) -> tuple[int, int, int]:
        """Return status, start and end for `Range`; several ranges get the whole file, as on S3."""
        match = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", self.headers.get("Range", ""))
        if not match or self.faults.ignore_range:
            return 200, 0, content.size
        if self.headers.get("If-Range", f'"{content.etag}"').strip('"') != content.etag:
            return 200, 0, content.size
        first = max(0, content.size - int(match[3])) if match[3] else int(match[1])
        end = min(content.size, int(match[2] or content.size) + 1)
        return 206 if first < end else 416, first, end

    def send_content(self, content: Content, headers: Mapping[str, str] = {}) -> None:
        """Send the file or a range of it, with the faults."""
        status, first, end = self.asked(content)
        if status == 416:
            return self.reply(416, b"", {"Content-Range": f"bytes */{content.size}"})
        headers = {"ETag": f'"{content.etag}"', "Accept-Ranges": "bytes", **headers}
        if status == 206:
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{content.size}"
        if self.command == "HEAD":
            return self.start(status, end - first, headers)
        number, faults = self.hub.count("bodies"), self.faults
        if number == faults.replace_after:
            for repo in self.hub.repos:
                for name in repo.contents.keys() & faults.replacement.keys():
                    repo.replace(name, faults.replacement[name])
        short, broken, stalled = (
            every > 0 and number % every == 0
            for every in (faults.truncate_every, faults.drop_every, faults.stall_every)
        )
        # The larger half: one byte that is left comes, however often.
        middle = (first + end + 1) // 2 if short or broken or stalled else end
        self.close_connection |= broken or stalled
        self.start(status, (middle if short else end) - first, headers)
        self.send_bytes(content, first, middle)
        if stalled:
            self.hub.closing.wait(faults.stall)
        return None

    def send_bytes(self, content: Content, first: int, end: int) -> None:
        if first < end:
            with content.open() as file:
                file.seek(first)
                try:
                    self.connection.sendfile(file, first, end - first)
                finally:  # It leaves the file where it came to, also when the client has left.
                    self.request_log.sent += file.tell() - first


def described(content: Content, name: str = "path", blob: str = "oid", sha256: str = "oid") -> dict[str, Any]:
    """Return a file as in Hugging Face's tree listing, or with the keys of a model's info."""
    lfs = {sha256: content.sha256, "size": content.size, "pointerSize": 135}
    file = {"type": "file", name: content.name, "size": content.size, blob: content.blob}
    return {**file, "lfs": lfs} if content.lfs else file


class _HuggingFace(_Handler):
    host = "hf"

    def refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] = {}) -> None:
        self.reply(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message, **headers})

    def route(self, path: str) -> None:
        match = (
            re.fullmatch(r"/api/(?P<what>resolve-cache)/models/(?P<id>[^/]+/[^/]+)/(?P<rev>[^/]+)/(?P<name>.+)", path)
            or re.fullmatch(r"/api/models/(?P<id>[^/]+/[^/]+)(/(?P<what>[^/]+)/(?P<rev>[^/]+)/?(?P<name>.*))?", path)
            or re.fullmatch(r"/(?P<id>[^/]+/[^/]+)/(?P<what>resolve|raw)/(?P<rev>[^/]+)/(?P<name>.+)", path)
        )
        repo = next((repo for repo in self.hub.repos if match and repo.id == match["id"] and "hf" in repo.hubs), None)
        if match is None or repo is None or (repo.private and not repo.admits(self.token)):
            # Without a token the hub does not tell which it is. Its own 401 may come without the code: of a hub by
            # https the client takes any 401 for this one, but ours is reached by http.
            message = "Repository not found" if self.token else "Invalid username or password."
            return self.refuse(404 if self.token else 401, "RepoNotFound", message)
        what, revision, name = match["what"], unquote(match["rev"] or "main"), unquote(match["name"] or "")
        if revision not in ("main", repo.commit, *repo.tags):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if what in ("resolve", "raw", "resolve-cache"):
            return self.file(repo, what, name)
        if what == "tree":
            return self.reply(200, [described(content) for content in repo.contents.values()])
        if what == "paths-info":
            wanted = parse_qs(self.form)["paths"]
            return self.reply(200, [described(content) for name, content in repo.contents.items() if name in wanted])
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in repo.contents]
        if self.query.get("blobs", "").lower() == "true":  # huggingface_hub before 1.0 says True.
            siblings = [described(content, "rfilename", "blobId", "sha256") for content in repo.contents.values()]
        gated = "manual" if repo.gated else False
        info = {"id": repo.id, "sha": repo.commit, "private": repo.private, "gated": gated, "siblings": siblings}
        return self.reply(200, info)

    def file(self, repo: Repo, what: str, name: str) -> None:
        commit = {"X-Repo-Commit": repo.commit}
        if repo.gated and not repo.admits(self.token):
            why = "you are not in the authorized list" if self.token else "you must be authenticated to access it"
            message = f"Access to model {repo.id} is restricted and {why}."
            return self.refuse(403 if self.token else 401, "GatedRepo", message, commit)
        content = repo.contents.get(name)
        if content is None:
            return self.refuse(404, "EntryNotFound", "Entry not found", commit)
        linked = {"X-Linked-Size": str(content.size), "X-Linked-Etag": f'"{content.etag}"', **commit}
        if what == "resolve" and content.lfs:
            return self.to_cdn(repo, content, linked)
        if what == "resolve":
            location = f"/api/resolve-cache/models/{repo.id}/{repo.commit}/{quote(name)}"
            return self.reply(307, b"", {"Location": location, **linked})
        return self.send_content(content, commit)


class _ModelScope(_Handler):
    host = "ms"

    def refuse(self, status: int, code: int, message: str) -> None:
        self.reply(status, {"Code": code, "Data": None, "Message": message, "RequestId": "0", "Success": False})

    def data(self, data: Any) -> None:
        self.reply(200, {"Code": 200, "Data": data, "Message": "success", "RequestId": "0", "Success": True})

    def route(self, path: str) -> None:
        match = re.fullmatch(r"/(openapi|api)/v1/models/([^/]+/[^/]+)(/revisions|/repo/files|/repo|)", path)
        repo = next((repo for repo in self.hub.repos if match and repo.id == match[2] and "ms" in repo.hubs), None)
        if match is None or repo is None or (repo.private and not repo.admits(self.token)):
            return self.refuse(404, 10010205001, "record not found")
        known = self.query.get("Revision", "master") in ("master", repo.commit, *repo.tags)
        if match[3] == "/repo":
            return self.file(repo, self.query.get("FilePath", "") if known else "")
        if match[3] == "/repo/files":
            # An unknown revision is no error there: it has no files.
            return self.data(self.listing(repo) if known else {"Files": None, "LatestCommitter": None})
        if match[3] == "/revisions":
            tags = [{"Revision": tag} for tag in repo.tags]
            return self.data({"RevisionMap": {"Branches": [{"Revision": "master"}], "Tags": tags}})
        owner, _, name = repo.id.partition("/")
        if match[1] == "api":
            return self.data({"Path": owner, "Name": name, "Revision": "master"})
        return self.reply(200, {"success": True, "data": {"id": repo.id, "owner": owner, "name": name}})

    def listing(self, repo: Repo) -> dict[str, Any]:
        """Return the response of `repo/files`: the commit is abbreviated, and in full that of the newest files."""
        files = []
        for content in repo.contents.values():
            file = {"Path": content.name, "Name": content.name.rpartition("/")[2], "Type": "blob", "Size": content.size}
            file |= {"Sha256": content.sha256, "IsLFS": content.lfs, "Revision": repo.commit}
            files.append({**file, "CommittedDate": 1700000000})
        return {"Files": files, "IsVisual": 0, "LatestCommitter": {"Id": "", "ShortId": repo.commit[:8]}}

    def file(self, repo: Repo, name: str) -> None:
        # The real response is unknown; the client handles 401, 403 and 404.
        if repo.gated and not repo.admits(self.token):
            return self.refuse(403, 10010205002, "access denied: apply for access on the model's page")
        content = repo.contents.get(name)
        if content is None:
            return self.refuse(404, 10990101007, "file not found")
        if content.lfs:
            return self.to_cdn(repo, content)
        del self.headers["Range"]  # ModelScope serves small files itself, and whole.
        return self.send_content(content)


class _Cdn(_Handler):
    host = "cdn"

    def route(self, path: str) -> None:
        _, owner, name, digest, file = path.split("/", 4)
        repo = next((repo for repo in self.hub.repos if repo.id == f"{owner}/{name}"), None)
        content = repo and repo.contents.get(unquote(file))
        if self.token:
            return self.reply(400, b"the hub's token was sent to the CDN")
        uses = self.hub.count(self.path)
        if self.query.get("Signature") != digest[::-1] or 0 < self.faults.url_uses < uses:
            return self.reply(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        if not content or (content.sha256 != digest and content.name not in self.hub.faults.replacement):
            return self.reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
        return self.send_content(content, {"X-Linked-ETag": f'"{content.sha256}"'})


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # With the usual 5 a burst of connections has some wait for a second.

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def hub_server(repos: Sequence[Repo], faults: Faults | None = None) -> Iterator[HubServer]:
    """Serve `repos` until the block ends."""
    hub = HubServer(repos, faults or Faults())
    with ExitStack() as stack:
        ports = []
        for kind in (_HuggingFace, _ModelScope, _Cdn):
            handler = type(kind.__name__, (kind,), {"hub": hub})
            listener = stack.enter_context(_Listener(("127.0.0.1", 0), handler))
            threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
            stack.callback(listener.shutdown)
            ports.append(listener.server_port)
        hub.hf_endpoint, hub.ms_endpoint = (f"http://127.0.0.1:{port}" for port in ports[:2])
        hub.cdn = f"http://localhost:{ports[2]}"
        stack.callback(hub.closing.set)
        yield hub


def environment(server: HubServer, folder: Path) -> dict[str, str]:
    """The variables that lead the hubs' libraries to `server`, with caches in `folder`, no tokens and no proxies.

    The libraries read most of them when imported: set them for a process, not within it. "" is as good as unset.
    """
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    return {
        "HF_ENDPOINT": server.hf_endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_CACHE": str(folder / "hf" / "hub"),
        "HF_TOKEN_PATH": str(folder / "hf" / "token"),
        "HF_TOKEN": "",
        "HUGGING_FACE_HUB_TOKEN": "",
        "HF_HUB_OFFLINE": "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "MODELSCOPE_ENDPOINT": server.ms_endpoint,
        "MODELSCOPE_CACHE": str(folder / "ms"),
        "MODELSCOPE_HOME": str(folder / "ms-home"),
        "MODELSCOPE_API_TOKEN": "",
        # Or a download first asks where in Alibaba's cloud it runs.
        "MODELSCOPE_DOWNLOAD_INTRA_CLOUD": "false",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        **{name: "" for proxy in proxies for name in (proxy, proxy.upper())},
    }
