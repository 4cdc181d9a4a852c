"""
How does a file arrive? By plain HTTPS, going on where the connection broke off, in this run or a later one,
and checked when it is here.

Files are kept in $NANOBLOCK_CACHE (~/.cache/nanoblock). $HF_ENDPOINT names another hub than
https://huggingface.co.
"""

import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote, urljoin, urlsplit

from tqdm import tqdm

from run.cli import die, said

PATIENCE = 5  # attempts in a row that bring nothing, before a download gives up
UNPROMISED = 16 << 30  # bytes taken from a server that does not say how many will come
LISTING = 64 << 20  # bytes of a folder's listing
PROBLEMS = (OSError, http.client.HTTPException)  # urllib's errors are OSErrors, http.client's are not


def endpoint():
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def url(repo, path, revision="main", kind=""):
    """Where the hub keeps a file of a model's repository, or with kind "datasets" of a dataset's."""
    return "/".join(filter(None, (endpoint(), kind, repo, "resolve", quote(revision, safe=""), quote(path))))


def cache():
    return Path(
        os.environ.get("NANOBLOCK_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoblock"
    )


# ----- downloads


def web(address):
    """The address, if it is one of http or https: ftp://, and file:// with its pipes, raise ValueError."""
    if urlsplit(address).scheme not in ("http", "https"):
        raise ValueError(f"{address[:100]} is no address of http:// or https://")
    return address


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


class WebRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, response, code, reason, headers, address):
        return super().redirect_request(request, response, code, reason, headers, web(address))


def opened(request):
    """The answer to a Request, along redirects that stay with http and https."""
    return urllib.request.build_opener(WebRedirect).open(request, timeout=30)


def head(address, hops=5):
    """
    The headers of `address` along its redirects, the first answer's word first: the hub's own says more than
    its storage's. "size": of the file. Servers that have no HEAD are asked for one byte.
    """
    found, method, patience = {}, "HEAD", PATIENCE
    while hops:
        request = urllib.request.Request(web(address), method=method, headers={"Accept-Encoding": "identity"})
        if method == "GET":
            request.add_header("Range", "bytes=0-0")
        try:
            response = urllib.request.build_opener(NoRedirect).open(request, timeout=30)
        except urllib.error.HTTPError as e:
            if e.code in (403, 405, 501) and method == "HEAD":
                method = "GET"
                continue
            if (e.code == 429 or e.code >= 500) and patience:
                patience -= 1
                time.sleep(2 ** (PATIENCE - patience) / 4)
                continue
            if e.code not in (301, 302, 303, 307, 308):
                raise
            response = e
        with response:
            own = {k.lower(): v for k, v in response.headers.items()}
            ranged = re.fullmatch(r"bytes 0-0/(\d+)", own.get("content-range", ""))
            if ranged or response.status == 200 and own.get("content-length", "").isdecimal():
                own["size"] = ranged[1] if ranged else own["content-length"]
            found = {**own, **found}
            if "location" not in own or {"x-linked-size", "x-linked-etag"} <= set(found):
                return found
            address, hops = urljoin(address, quote(own["location"], safe="%/:=&?~#+!$,;'@()*[]")), hops - 1
    raise OSError("too many redirects")


def promised_by(headers, address):
    """
    {"size": bytes or None, "checksum": a sha256 of large files, git's sha1 of small ones, or None,
    "identity": what changes with the file}. Elsewhere than on the hub an ETag is an identity and need not be
    a checksum.
    """
    size, linked, tag = (headers.get(k, "") for k in ("x-linked-size", "x-linked-etag", "etag"))
    ours = (
        "x-repo-commit" in headers
        or urlsplit(address).netloc == urlsplit(endpoint()).netloc
        and not tag.startswith("W/")
    )
    known = (linked or (tag if ours else "")).strip('"')
    return {
        "size": int(size) if size.isdecimal() else int(headers["size"]) if "size" in headers else None,
        "checksum": known if re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", known) else None,
        "identity": linked or tag or headers.get("last-modified"),
    }


def checksum(path, like):
    """
    The checksum of a file, of the kind that `like` is: a sha256 (64 letters), or what git calls a blob's sha1
    (40).
    """
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(f"blob {os.path.getsize(path)}\0".encode())
    with open(path, "rb") as f:
        while part := f.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def locked(path):
    """One process at a time, of those on this machine that want the same file."""
    with open(path, "a", encoding="utf-8") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        except (ImportError, OSError):  # a system, or a disk, without such locks
            pass
        yield


def fetch(address, instead="--input FILE", optional=False):
    """
    The local copy (a Path) of the file at `address`, downloaded if need be: a connection that breaks is taken
    up again where it broke, in this run or a later one, and what has arrived must have the size and the
    checksum that the server promises, if it does. Without a network the copy that is there will do. Exits
    with two lines if there is none to be had; instead: the flag for a file of one's own. optional: None,
    and no exit, if the server says that there is no such file.
    """
    try:
        parts = urlsplit(web(address))
        names = [parts.netloc.replace(":", "_"), *unquote(parts.path).strip("/").split("/")]
        if {"", ".", ".."} & set(names):
            raise ValueError(f"{'/'.join(names)} is no name of a file")  # it would lie outside of the cache
        path = cache().joinpath(*names)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(f"{path}.lock"):
            return up_to_date(parts._replace(path=quote(unquote(parts.path))).geturl(), path)
    except (*PROBLEMS, ValueError) as e:
        if optional and getattr(e, "code", None) == 404:
            return None
        fix = f"the network, or {instead}, of what is here already"
        if isinstance(e, urllib.error.HTTPError):
            fix = "another name" if e.code == 404 else f"later, or {instead}"
        elif getattr(e, "errno", None) in (
            errno.ENOSPC,
            errno.EFBIG,
            errno.EDQUOT,
            errno.EROFS,
            errno.EACCES,
        ):
            fix = f"NANOBLOCK_CACHE=FOLDER, with room: now {cache()}"
        die(f"could not download {address}: {said(e)}", fix)
    except KeyboardInterrupt:
        die(f"stopped while downloading {address}", "the same command, which goes on from here")


def up_to_date(address, path):
    """The file `path`, which is what `address` holds now; raises OSError."""
    # what was promised of the file that is here, and what it was when it had arrived
    record = Path(f"{path}.json")
    try:
        kept = json.loads(record.read_text(encoding="utf-8"))
        good = os.path.getsize(path) == kept["size"] and checksum(path, kept["sha256"]) == kept["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        kept, good = None, False
    try:
        promised = promised_by(head(address), address)
    except PROBLEMS as e:
        if not good or isinstance(e, urllib.error.HTTPError) and e.code in (401, 403, 404):
            raise
        print(f"WARNING: {said(e)}; using the copy in {path.parent}", file=sys.stderr, flush=True)
        return path
    if kept and kept["promised"] == promised:
        if good:
            return path
        print(f"WARNING: {path} is damaged, and downloaded again", file=sys.stderr, flush=True)
    version = hashlib.sha256(str(promised).encode()).hexdigest()[:12]
    part = Path(f"{path}.{version}.part")  # of this very version: halves of two would not fit
    if promised["identity"] is None:
        part.unlink(missing_ok=True)  # nothing says that it is a part of the same
    receive(address, part, promised["size"])
    if (want := promised["checksum"]) and (found := checksum(part, want)) != want:
        part.unlink()
        raise OSError(f"its checksum is {found}, the hub promised {want}")
    os.replace(part, path)
    about = {
        "url": address,
        "promised": promised,
        "size": os.path.getsize(path),
        "sha256": checksum(path, "0" * 64),
    }
    record.write_text(json.dumps(about) + "\n", encoding="utf-8")
    return path


def receive(address, part, size):
    """
    Append to the file `part` until it is `size` bytes long (None: until the connection ends well). What the
    disk has no room for is not begun.
    """
    failures, most = 0, 0
    have, room = part.stat().st_size if part.exists() else 0, shutil.disk_usage(part.parent).free
    if size is not None and size - have > room:
        raise OSError(errno.ENOSPC, f"{size - have:,} bytes would come, and there is room for {room:,}")
    with tqdm(
        total=size,
        unit="B",
        unit_scale=True,
        desc=f"downloading {address.rsplit('/', 1)[1]}",
        leave=False,
        disable=None,
    ) as bar:
        while True:
            have = part.stat().st_size if part.exists() else 0
            bar.n, problem = have, OSError("the connection broke off")
            if size is not None and have == size and part.exists():
                return
            try:
                if size is not None and have > size:
                    part.unlink()
                    raise OSError(f"{have:,} bytes came, {size:,} were promised")
                if request_rest(address, part, have, bar, size) and size is None:
                    return
            except PROBLEMS as e:
                code = getattr(e, "code", 0)
                if code == 416:
                    part.unlink(missing_ok=True)
                elif (
                    400 <= code < 500
                    and code != 429
                    or getattr(e, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
                ):
                    raise
                problem = e
            now = part.stat().st_size if part.exists() else 0
            gained, most = now > most, max(now, most)  # more than ever: some servers begin anew each time
            failures = 0 if gained else failures + 1
            if failures >= PATIENCE:
                raise problem
            time.sleep(0.0 if gained else min(30, 2**failures / 4))


def request_rest(address, part, have, bar, size):
    """
    One request for what is lacking; True if the server sent all it announced. What is more than `size` bytes
    (None: UNPROMISED) is not kept.
    """
    request = urllib.request.Request(
        address, headers={"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    )
    with opened(request) as response:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise OSError(f"it came as {response.headers['Content-Encoding']}, which was not asked for")
        if response.status == 206 and not (response.headers.get("Content-Range") or "").startswith(
            f"bytes {have}-"
        ):
            raise OSError(
                f"bytes from {have} on were asked for, {response.headers.get('Content-Range')} came"
            )
        if response.status != 206:
            bar.n = 0  # a server that knows no ranges begins again
        left, got = response.headers.get("Content-Length", ""), 0
        most = (UNPROMISED if size is None else size) - (have if response.status == 206 else 0)
        with open(part, "ab" if response.status == 206 else "wb") as f:
            while True:
                try:
                    piece = response.read(min(1 << 20, most - got + 1))
                except PROBLEMS as e:  # not those of writing
                    f.write(getattr(e, "partial", b""))
                    return False
                if not piece:
                    return not left.isdecimal() or got == int(left)
                got += len(piece)
                if got > most:
                    f.truncate(0)  # of another file: nothing of it will do
                    if size is None:
                        raise ValueError(f"more than {most:,} bytes came, and no number was promised")
                    raise OSError(f"more bytes came than the {size:,} that were promised")
                f.write(piece)
                bar.update(len(piece))


def listing(repo, folder, revision="main", kind="datasets"):
    """The addresses of the files in a folder of a repository on the hub, sorted."""
    address = f"{endpoint()}/api/{kind}/{repo}/tree/{quote(revision, safe='')}/{quote(folder)}"
    try:
        with opened(web(address)) as response:
            answer = response.read(LISTING + 1)
        if len(answer) > LISTING:
            raise ValueError(f"more than {LISTING:,} bytes came")
        files = [entry["path"] for entry in json.loads(answer) if entry.get("type", "file") == "file"]
    except (*PROBLEMS, ValueError, KeyError, TypeError) as e:
        die(
            f"could not list {folder} of {repo}: {said(e)}",
            "the network, or --input FILE with files that are there already",
        )
    return [url(repo, path, revision, kind) for path in sorted(files)]
