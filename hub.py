"""
How does a file arrive? By plain HTTPS, going on where the connection broke off, in this run or a later one, and checked when it is here.

Files are kept in $NANOBLOCK_CACHE (~/.cache/nanoblock). $HF_ENDPOINT names another hub than https://huggingface.co.
"""

import hashlib
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

from tqdm import tqdm

from settings import die, said

PATIENCE = 5  # attempts in a row that bring nothing, before a download gives up
PROBLEMS = (OSError, http.client.HTTPException)  # urllib's errors are OSErrors, http.client's are not


def endpoint():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def url(repo, path, revision="main", kind=""):
    """Where the hub keeps a file of a model's repository, or with kind "datasets" of a dataset's."""
    return "/".join(filter(None, (endpoint(), kind, repo, "resolve", quote(revision, safe=""), quote(path))))


def cache():
    return Path(os.environ.get("NANOBLOCK_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoblock")


# ----- downloads


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def head(address, hops=5):
    """The headers of `address` along its redirects, the first answer's word first: the hub's own says more than its storage's."""
    found = {}
    for _ in range(hops):
        request = urllib.request.Request(address, method="HEAD", headers={"Accept-Encoding": "identity"})
        try:
            response = urllib.request.build_opener(NoRedirect).open(request, timeout=30)
        except urllib.error.HTTPError as e:
            if e.code not in (301, 302, 303, 307, 308):
                raise
            response = e
        with response:
            size = response.headers.get("Content-Length") if response.status == 200 else None
            found = {**({"size": size} if size else {}), **{k.lower(): v for k, v in response.headers.items()}, **found}
            if response.status == 200 or "Location" not in response.headers:
                return found
            address = urljoin(address, response.headers["Location"])
    raise OSError(f"more than {hops} redirects")


def promised_by(headers):
    """(size or None, checksum or None) that the hub promises: a sha256 of large files, git's sha1 of small ones."""
    size = headers.get("x-linked-size") or headers.get("size")
    tag = (headers.get("x-linked-etag") or headers.get("etag") or "").removeprefix("W/").strip('"')
    return int(size) if size else None, tag if re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", tag) else None


def checksum(path, like):
    """The checksum of a file, of the kind that `like` is: a sha256 (64 letters), or what git calls a blob's sha1 (40)."""
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(f"blob {os.path.getsize(path)}\0".encode())
    with open(path, "rb") as f:
        while part := f.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def locked(path):
    """One process at a time, of those on this machine that want the same file."""
    with open(path, "a") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        except (ImportError, OSError):  # a system, or a disk, without such locks
            pass
        yield


def fetch(address, instead="--input FILE"):
    """
    The local copy (a Path) of the file at `address`, downloaded if need be: a connection that breaks is taken up again where it broke, in
    this run or a later one, and what has arrived must have the size and the checksum that the server promises, if it does. Without a
    network the copy that is there will do. Exits with two lines if there is none to be had; instead: the flag for a file of one's own.
    """
    parts = urlsplit(address)
    path = cache() / parts.netloc.replace(":", "_") / parts.path.strip("/")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(f"{path}.lock"):
            return up_to_date(address, path)
    except (*PROBLEMS, ValueError) as e:
        fix = f"the network, or {instead}, of what is here already"
        if isinstance(e, urllib.error.HTTPError):
            fix = "another name" if e.code == 404 else f"later, or {instead}"
        die(f"could not download {address}: {said(e)}", fix)


def up_to_date(address, path):
    """The file `path`, which is what `address` holds now; raises OSError."""
    record = Path(f"{path}.json")  # what was promised of the file that is here, and what it was when it had arrived
    try:
        kept = json.loads(record.read_text())
        good = os.path.getsize(path) == kept["size"] and checksum(path, kept["sha256"]) == kept["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        kept, good = None, False
    try:
        promised = promised_by(head(address))
    except PROBLEMS as e:
        if not good or isinstance(e, urllib.error.HTTPError) and e.code in (401, 403, 404):
            raise
        print(f"WARNING: {said(e)}; using the copy in {path.parent}", file=sys.stderr, flush=True)
        return path
    if kept and kept["promised"] == list(promised):
        if good:
            return path
        print(f"WARNING: {path} is damaged, and downloaded again", file=sys.stderr, flush=True)
    size, tag = promised
    part = Path(f"{path}.{(tag or 'unknown')[:12]}.part")  # of this very version: halves of two would not fit
    if tag is None:
        part.unlink(missing_ok=True)  # nothing says that it is a part of the same
    receive(address, part, size)
    if tag and (found := checksum(part, tag)) != tag:
        part.unlink()
        raise OSError(f"its checksum is {found}, the hub promised {tag}")
    os.replace(part, path)
    about = {"url": address, "promised": promised, "size": os.path.getsize(path), "sha256": checksum(path, "0" * 64)}
    record.write_text(json.dumps(about) + "\n")
    return path


def receive(address, part, size):
    """Append to the file `part` until it is `size` bytes long (None: until the connection ends well)."""
    failures = 0
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"downloading {address.rsplit('/', 1)[1]}", leave=False, disable=None) as bar:
        while True:
            have = part.stat().st_size if part.exists() else 0
            bar.n = have
            if size is not None and have > size:
                part.unlink()
                continue
            if size is not None and have == size and (size or part.exists()):
                return
            try:
                whole = request_rest(address, part, have, bar)
                if size is None and whole:
                    return
            except PROBLEMS as e:
                if isinstance(e, urllib.error.HTTPError) and e.code == 416:
                    part.unlink(missing_ok=True)
                elif isinstance(e, urllib.error.HTTPError) and e.code < 500 and e.code != 429:
                    raise
                problem = e
            else:
                problem = OSError("the connection broke off")
            gained = (part.stat().st_size if part.exists() else 0) > have
            failures = 0 if gained else failures + 1
            if failures >= PATIENCE:
                raise problem
            time.sleep(0.0 if gained else min(30, 2**failures / 4))


def request_rest(address, part, have, bar):
    """One request for what is lacking; True if the server sent all it announced."""
    request = urllib.request.Request(address, headers={"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})})
    with urllib.request.urlopen(request, timeout=30) as response:
        goes_on = response.status == 206 and (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-")
        if not goes_on:
            bar.n = 0  # a server that knows no ranges begins again
        left = response.headers.get("Content-Length")
        with open(part, "ab" if goes_on else "wb") as f:
            got = 0
            try:
                while piece := response.read(1 << 20):
                    f.write(piece)
                    got += len(piece)
                    bar.update(len(piece))
            except PROBLEMS as e:
                if isinstance(e, http.client.IncompleteRead):
                    f.write(e.partial)
                return False
        return left is None or got == int(left)


def listing(repo, folder, revision="main", kind="datasets"):
    """The addresses of the files in a folder of a repository on the hub, sorted."""
    address = f"{endpoint()}/api/{kind}/{repo}/tree/{quote(revision, safe='')}/{quote(folder)}"
    try:
        with urllib.request.urlopen(address, timeout=30) as response:
            files = [entry["path"] for entry in json.load(response) if entry.get("type", "file") == "file"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        die(f"could not list {folder} of {repo}: {said(e)}", "the network, or --input FILE with files that are there already")
    return [url(repo, path, revision, kind) for path in sorted(files)]
