"""
Why believe hub.py and published.py? Golden weights by way of a server that breaks off, and every layout by
its path.
"""

import hashlib
import http.server
import json
import re
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import slow
from exact import agree, rounded
from safetensors.torch import save_file
from test_checkpoint import squeeze

import diffusion
import eval as evaluation
import fast
import methods
from diffusion import Masked
from eval import likelihood
from generate import NOTHING, generate
from hub import download as hub
from lab import quality
from model import ModelConfig, Transformer
from rng import Noise
from run import checkpoint
from run.restore import begin_from, dataset_for, rebuild
from samplers import SAMPLERS
from train import TrainConfig, train

GOLDEN = Path(__file__).parent / "golden"
MIXTURE = "blockgen/multi_block_size/16/owt/0.05_0.95/absorb"


class Hub(http.server.BaseHTTPRequestHandler):
    """
    A little hub: /OWNER/REPO/resolve/main/PATH leads on to /storage/..., which holds the file, as the real
    one does. What it does wrong stands in server.tricks, a list that is used up: 429 or 503: that error;
    another number: so many bytes and no more; None: nothing; a text: what it is called. server.no_head: an
    error for every HEAD; server.tag: the ETag; server.leads: where a (method, path) is sent on to.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, head):
        server, path = self.server, self.path.split("?")[0]
        server.seen.append((self.command, path, self.headers.get("Range")))
        if (self.command, path) in server.leads:
            return self.reply(302, b"", Location=server.leads[self.command, path])
        if path in server.api:
            return self.reply(200, json.dumps(server.api[path]).encode())
        file = server.root / re.sub("^/storage/|/resolve/main", "", unquote(path)).lstrip("/")
        if not file.is_file():
            return self.reply(404, b"")
        data = file.read_bytes()
        sha = hashlib.sha256(data).hexdigest()
        if not path.startswith("/storage/") and server.redirects:
            promised = {"X-Linked-Etag": f'"{server.lie or sha}"', "X-Linked-Size": str(len(data))}
            return self.reply(302, b"", Location="/storage" + path, **promised)
        tags = {} if server.silent else {"ETag": server.tag or f'"{server.lie or sha}"'}
        if head and server.no_head:
            return self.reply(
                server.no_head.pop(0) if isinstance(server.no_head, list) else server.no_head, b""
            )
        if head:
            return self.reply(200, data, head=True, **tags)
        if server.tricks and server.tricks[0] in (429, 503):
            return self.reply(server.tricks.pop(0), b"")
        start, end, status = 0, len(data), 200
        if server.ranges and (m := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")):
            start, status = int(m[1]), 206
            end = int(m[2]) + 1 if m[2] else end
            tags["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        cut = server.tricks.pop(0) if server.tricks and end == len(data) else None
        if cut == "garbage":
            self.close_connection = True
            return self.wfile.write(b"this is no HTTP\r\n\r\n")
        if cut == "shifted":
            return self.reply(
                206, data[start:], **{**tags, "Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}"}
            )
        if cut == "endless":
            return self.pour(50 << 20)
        if cut == "gzip":
            return self.reply(200, data, **{**tags, "Content-Encoding": "gzip"})
        data = data[:end]
        self.reply(status, data[start:], cut=cut, **tags)

    def pour(self, n):
        """So many bytes, without a word of how many; fewer if nobody takes them."""
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(n >> 16):
                self.wfile.write(bytes(1 << 16))
                self.server.poured += 1 << 16
        except OSError:
            pass

    def reply(self, status, data, head=False, cut=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True


@pytest.fixture
def server(tmp_path, monkeypatch):
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    s.root, s.tricks, s.seen, s.api, s.lie, s.silent, s.ranges, s.redirects = (
        tmp_path / "hub",
        [],
        [],
        {},
        "",
        False,
        True,
        True,
    )
    s.no_head, s.tag, s.leads, s.poured = 0, "", {}, 0
    s.root.mkdir()
    threading.Thread(target=s.serve_forever, daemon=True).start()
    s.url = f"http://127.0.0.1:{s.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", s.url)
    monkeypatch.setenv("NANOBLOCK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.time, "sleep", lambda _: None)
    yield s
    s.shutdown()


def golden(name):
    z = np.load(GOLDEN / f"{name}.npz")
    weights = {k.removeprefix("w."): torch.from_numpy(z[k]) for k in z.files if k.startswith("w.")}
    config = {k.removeprefix("cfg."): z[k].item() for k in z.files if k.startswith("cfg.")}
    return weights, config, {k: torch.from_numpy(z[k]) for k in z.files if z[k].ndim}


def put(folder, weights, config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def close(logits, golden):
    """Ours are in float64. The reference's are in float32, and off by up to 5 eps of the largest."""
    rounded(golden, logits, 10)


# ----- downloads


def test_golden_weights_by_way_of_a_hub_that_breaks_off(server):
    weights, config, a = golden("blockdit_adaln_x0causal")
    folder = put(server.root / "o/r" / MIXTURE, weights, config)
    half = (folder / "model.safetensors").stat().st_size // 2
    server.tricks = [None, half]  # config.json, and then the weights, half of them
    run, meta, step, model, process = rebuild(f"hf:o/r/{MIXTURE}", "cpu")
    gets = [
        (path.rsplit("/", 1)[1], r)
        for method, path, r in server.seen
        if method == "GET" and path.startswith("/storage/")
    ]
    assert gets == [
        ("config.json", None),
        ("model.safetensors", None),
        ("model.safetensors", f"bytes={half}-"),
    ], "it went on where it broke"
    model.double()
    with torch.no_grad():
        for b in a["train.block_sizes"].tolist():
            close(model(a["x0"], a["xt"], b, sigma=a["sigma"]), a[f"train.logits.bs{b}"])
    assert (
        run.block_sizes == {1: 0.05, 16: 0.95}
        and isinstance(process, Masked)
        and process.mask_id == 60
        and model.timeless
    )

    n = len(server.seen)
    rebuild(f"hf:o/r/{MIXTURE}", "cpu")
    assert all(method == "HEAD" for method, *_ in server.seen[n:]), "it is here already"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_ends_well_however_often_it_breaks(server, ranges, tmp_path):
    data = np.random.default_rng(0).bytes(300_000)
    (server.root / "big.bin").write_bytes(data)
    server.ranges = ranges
    server.tricks = [1000, 503, 5000, 0, 0, 503, 429, 100_000, 70_000]
    path = hub.fetch(f"{server.url}/big.bin")
    assert path.read_bytes() == data and not list(path.parent.glob("*.part"))


def test_a_later_run_goes_on_where_this_one_gave_up(server, slip):
    data = np.random.default_rng(0).bytes(200_000)
    (server.root / "big.bin").write_bytes(data)
    server.tricks = [60_000] + [0] * 20
    assert "broke off" in slip(hub.fetch, f"{server.url}/big.bin")
    server.tricks, n = [], len(server.seen)
    assert hub.fetch(f"{server.url}/big.bin").read_bytes() == data
    assert ("GET", "/storage/big.bin", "bytes=60000-") in server.seen[n:]


def test_halves_of_two_versions_are_not_put_together(server, slip):
    old, new = np.random.default_rng(0).bytes(200_000), np.random.default_rng(1).bytes(200_000)
    (server.root / "big.bin").write_bytes(old)
    server.tricks = [60_000] + [0] * 20
    slip(hub.fetch, f"{server.url}/big.bin")
    (server.root / "big.bin").write_bytes(new)
    server.tricks = []
    assert hub.fetch(f"{server.url}/big.bin").read_bytes() == new
    (server.root / "big.bin").write_bytes(old)
    assert hub.fetch(f"{server.url}/big.bin").read_bytes() == old, "what the hub holds now, not what was here"


@pytest.mark.parametrize("letters", [64, 40])
def test_what_arrives_is_checked(server, slip, letters):
    (server.root / "a.bin").write_bytes(b"abc")
    server.lie = "0" * letters
    assert "checksum" in slip(hub.fetch, f"{server.url}/a.bin")
    assert not (hub.cache() / server.url[7:].replace(":", "_") / "a.bin").exists()
    server.lie = hashlib.sha1(b"blob 3\0abc").hexdigest() if letters == 40 else ""
    path = hub.fetch(f"{server.url}/a.bin")
    path.write_bytes(b"abd")  # the disk forgets
    assert hub.fetch(f"{server.url}/a.bin").read_bytes() == b"abc"


def test_without_a_network_what_is_here_will_do(server, slip, capsys):
    (server.root / "a.bin").write_bytes(b"abc")
    path = hub.fetch(f"{server.url}/a.bin")
    server.shutdown(), server.server_close()
    assert hub.fetch(f"{server.url}/a.bin") == path and "WARNING" in capsys.readouterr().err
    assert "could not download" in slip(hub.fetch, f"{server.url}/b.bin")
    path.write_bytes(b"abd")
    assert "could not download" in slip(hub.fetch, f"{server.url}/a.bin"), "a damaged copy will not do"


def test_a_server_that_promises_nothing(server):
    """
    No checksum, no ranges, no redirect: a plain web server. A part of unknown origin is not gone on with.
    """
    (server.root / "a.bin").write_bytes(b"abcdef" * 1000)
    server.silent, server.ranges, server.redirects, server.tricks = True, False, False, [50, None]
    assert hub.fetch(f"{server.url}/a.bin").read_bytes() == b"abcdef" * 1000
    assert hub.fetch(f"{server.url}/a.bin").read_bytes() == b"abcdef" * 1000


def test_names_that_lead_out_of_the_cache_are_refused(server, tmp_path, slip):
    (server.root / "a.bin").write_bytes(b"abc")
    for path in ("../a.bin", "x/../../a.bin", "%2e%2e/a.bin", "./a.bin", ""):
        assert "no name of a file" in slip(hub.fetch, f"{server.url}/{path}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub"], "nothing was written"
    (server.root / "a b.bin").write_bytes(b"abc")
    assert hub.fetch(f"{server.url}/a b.bin").read_bytes() == b"abc", "a space is no reason"


@pytest.mark.parametrize("trick", ["garbage", "shifted", "gzip"])
def test_answers_that_make_no_sense(server, slip, trick):
    """Once they are tried again; for ever they end, and nothing of them is kept as the file."""
    data = np.random.default_rng(0).bytes(5000)
    (server.root / "a.bin").write_bytes(data)
    server.tricks = [1000, trick]
    assert hub.fetch(f"{server.url}/a.bin").read_bytes() == data
    (server.root / "b.bin").write_bytes(data)
    server.tricks = [1000] + [trick] * 50
    assert "could not download" in slip(hub.fetch, f"{server.url}/b.bin")
    assert len(server.tricks) > 40, "it did not go on for ever"


def test_a_server_that_begins_anew_and_breaks_off_earlier(server, slip):
    (server.root / "a.bin").write_bytes(bytes(5000))
    server.ranges, server.tricks = False, [1000, 500] * 20
    assert "broke off" in slip(hub.fetch, f"{server.url}/a.bin")
    assert len(server.tricks) > 25


def test_an_etag_elsewhere_is_an_identity_and_no_checksum(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://elsewhere.invalid")
    server.redirects, server.tag = False, '"' + "0" * 64 + '"'
    (server.root / "a.bin").write_bytes(b"abc")
    assert hub.fetch(f"{server.url}/a.bin").read_bytes() == b"abc"
    (server.root / "a.bin").write_bytes(b"abd")
    server.tag = '"' + "1" * 64 + '"'
    assert hub.fetch(f"{server.url}/a.bin").read_bytes() == b"abd", (
        "a file of the same length, and another tag"
    )


@pytest.mark.parametrize("codes", [405, 403, [503, 429]])
def test_a_server_that_has_no_head_or_is_busy(server, codes):
    server.redirects, server.no_head = False, codes
    (server.root / "a.bin").write_bytes(b"abc" * 1000)
    assert hub.fetch(f"{server.url}/a.bin").read_bytes() == b"abc" * 1000


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_no_room(server):
    (server.root / "big.bin").write_bytes(bytes(200_000))
    ask = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50000,) * 2)"
    ask += f"; from hub import download; download.fetch('{server.url}/big.bin')"
    p = subprocess.run(
        [sys.executable, "-c", ask], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert p.returncode == 2 and "NANOBLOCK_CACHE" in p.stderr and len(p.stderr.strip().splitlines()) == 2, (
        p.stderr
    )


def test_several_processes_want_the_same_file(server, tmp_path):
    data = np.random.default_rng(0).bytes(2_000_000)
    (server.root / "big.bin").write_bytes(data)
    ask = f"from hub import download; print(download.fetch('{server.url}/big.bin'))"
    root = Path(__file__).parents[1]
    ps = [
        subprocess.Popen([sys.executable, "-c", ask], cwd=root, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    paths = {p.communicate()[0].strip() for p in ps}
    assert len(paths) == 1 and Path(paths.pop()).read_bytes() == data
    assert sum(method == "GET" and path.startswith("/storage") for method, path, _ in server.seen) == 1


def test_no_more_is_taken_than_was_promised(server, slip, monkeypatch):
    """A stream without an end fills no disk, whether it was promised to be short or not at all."""
    (server.root / "a.bin").write_bytes(b"abcdefghij")
    server.tricks = ["endless"] * 20
    assert "10 that were promised" in slip(hub.fetch, f"{server.url}/a.bin")
    assert 0 < server.poured < 100 << 20, "five attempts, of what lies in buffers"
    server.redirects, server.ranges, server.no_head, server.poured = False, False, 405, 0
    monkeypatch.setattr(hub, "UNPROMISED", 1000)
    assert "more than 1,000 bytes came" in slip(hub.fetch, f"{server.url}/a.bin")
    assert 0 < server.poured < 40 << 20
    server.tricks = []
    assert hub.fetch(f"{server.url}/a.bin").read_bytes() == b"abcdefghij", "as long as it should be"


def test_what_the_disk_has_no_room_for_is_not_begun(server, slip, monkeypatch):
    (server.root / "a.bin").write_bytes(bytes(1000))
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    err = slip(hub.fetch, f"{server.url}/a.bin")
    assert "room for 999" in err and "NANOBLOCK_CACHE" in err
    assert not [seen for seen in server.seen if seen[0] == "GET"]


@pytest.mark.parametrize("scheme", ["ftp", "file", "data"])
def test_only_the_web_is_asked(server, slip, tmp_path, scheme):
    """Not a server of another kind, nor a local file or pipe: at once, and where a redirect leads."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.2)
        (tmp_path / "local").write_bytes(b"abc")
        host = f"127.0.0.1:{other.getsockname()[1]}/a.bin"
        address = {"ftp": f"ftp://{host}", "file": f"file://{tmp_path}/local", "data": "data://x/,abc"}[
            scheme
        ]
        for path in ("a.bin", "b.bin"):
            (server.root / path).write_bytes(b"abc")
        server.redirects = False
        server.leads = {("HEAD", "/a.bin"): address, ("GET", "/b.bin"): address}
        for asked in (address, f"{server.url}/a.bin", f"{server.url}/b.bin"):
            err = slip(hub.fetch, asked)
            assert "no address of http" in err or "not allowed" in err  # urllib knows some of them itself
        server.leads["GET", "/api/datasets/o/d/tree/main/data"] = address
        err = slip(hub.listing, "o/d", "data")
        assert "no address of http" in err or "not allowed" in err
        with pytest.raises(TimeoutError):
            other.accept()


def test_listing(server, slip, monkeypatch):
    server.api["/api/datasets/o/d/tree/refs%2Fconvert/data"] = [
        {"type": "file", "path": "data/b.parquet"},
        {"type": "directory", "path": "data/x"},
        {"type": "file", "path": "data/a.parquet"},
    ]
    found = hub.listing("o/d", "data", revision="refs/convert")
    assert found == [f"{server.url}/datasets/o/d/resolve/refs%2Fconvert/data/{x}.parquet" for x in "ab"]
    assert "could not list" in slip(hub.listing, "o/d", "other")
    monkeypatch.setattr(hub, "LISTING", 100)
    assert "more than 100 bytes" in slip(hub.listing, "o/d", "data", "refs/convert")


# ----- layouts

TINY = {"hidden_size": 16, "n_heads": 2, "n_blocks": 2, "cond_dim": 8, "length": 32, "dropout": 0.1}


def theirs(vocab_size, kind, config=TINY, seed=0, **shape):
    """Random weights in the public layout: kind block-dit, dit or ar."""
    D, C, V, g = config["hidden_size"], config["cond_dim"], vocab_size, torch.Generator().manual_seed(seed)
    w = {"vocab_embed.embedding": (V, D), "rotary_emb.inv_freq": (D // config["n_heads"] // 2,)}
    if kind != "ar":
        w |= {
            "sigma_map.mlp.0.weight": (C, 256),
            "sigma_map.mlp.0.bias": (C,),
            "sigma_map.mlp.2.weight": (C, C),
            "sigma_map.mlp.2.bias": (C,),
        }
    for i in range(config["n_blocks"]):
        b = {
            "norm1.weight": (D,),
            "attn_qkv.weight": (3 * D, D),
            "attn_out.weight": (D, D),
            "norm2.weight": (D,),
        }
        b |= {
            "mlp.0.weight": (4 * D, D),
            "mlp.0.bias": (4 * D,),
            "mlp.2.weight": (D, 4 * D),
            "mlp.2.bias": (D,),
        }
        if kind != "ar":
            b |= {"adaLN_modulation.weight": (6 * D, C), "adaLN_modulation.bias": (6 * D,)}
        w |= {f"blocks.{i}.{k}": v for k, v in b.items()}
    w |= {
        "output_layer.norm_final.weight": (D,),
        "output_layer.linear.weight": (V, D),
        "output_layer.linear.bias": (V,),
    }
    if kind != "ar":
        w |= {
            "output_layer.adaLN_modulation.weight": (2 * D, C),
            "output_layer.adaLN_modulation.bias": (2 * D,),
        }
    normal = lambda shape: torch.randn(shape, generator=g)
    return {
        k: 1 + 0.05 * normal(v) if "norm" in k and k.endswith("weight") else 0.2 * normal(v)
        for k, v in w.items()
    }


# path, config besides TINY, layout, vocabulary -> process, block sizes, mask id, tokenizer, sees time
COLLECTION = [
    ("baselines/owt/ar", {"type": "dit"}, "ar", 50258, "masked", {1: 1}, 50257, "gpt2", False),
    ("baselines/owt/mdlm", {"type": "dit"}, "dit", 50258, "masked", {32: 1}, 50257, "gpt2", False),
    ("baselines/owt/duo", {"type": "ddit"}, "dit", 50258, "uniform", {32: 1}, None, "gpt2", True),
    ("baselines/tinygsm/ar", {}, "ar", 49153, "masked", {1: 1}, 49152, "smollm", False),
    ("baselines/tinygsm/duo", {}, "dit", 49153, "uniform", {32: 1}, None, "smollm", True),
    ("blockgen/single_block_size/16/owt/absorb", {"type": "block-dit", "x0_causal": False}, "block-dit", 50258,
     "masked", {16: 1}, 50257, "gpt2", False),
    ("blockgen/single_block_size/32/tinygsm/uniform", {"type": "block-dit"}, "block-dit", 49153, "uniform", {32: 1}, None, "smollm", False),
    ("blockgen/multi_block_size/16/owt/uniform/absorb", {"x0_causal": True}, "block-dit", 50258,
     "masked", {1: 0.2, 2: 0.2, 4: 0.2, 8: 0.2, 16: 0.2}, 50257, "gpt2", False),
    ("blockgen/multi_block_size/16/owt/uniform/uniform", {"x0_causal": True}, "block-dit", 50257,
     "uniform", {1: 0.2, 2: 0.2, 4: 0.2, 8: 0.2, 16: 0.2}, None, "gpt2", False),
    ("blockgen/multi_block_size/32/tinygsm/0.01_0.99/uniform", {"x0_causal": True}, "block-dit", 49153,
     "uniform", {1: 0.01, 32: 0.99}, None, "smollm", False),
    ("somewhere/lm1b", {"process": "mdlm"}, "dit", 30522, "masked", {32: 1}, 103, "bert", False),
    ("somewhere/else", {"process": "blockgen-absorb", "block_sizes": {"1": 0.5, "8": 0.5}, "x0_causal": True, "mask_index": 7},
     "block-dit", 12, "masked", {1: 0.5, 8: 0.5}, 7, "none", False),
]  # fmt: skip


@pytest.mark.parametrize(
    "path, more, kind, V, process, sizes, mask_id, tokenizer, sees",
    slow(COLLECTION, COLLECTION[::3]),
    ids=[c[0] for c in COLLECTION],
)
def test_the_collection(tmp_path, path, more, kind, V, process, sizes, mask_id, tokenizer, sees):
    """
    What path and config say arrives, every layout generates in the tokens it knows, and its likelihood is
    finite.
    """
    put(tmp_path / path, theirs(V, kind), {**TINY, **more})
    run, meta, _, model, noise = rebuild(tmp_path / path, "cpu")
    assert (run.process, run.block_sizes, noise.mask_id, meta["tokenizer"]) == (
        process,
        sizes,
        mask_id,
        tokenizer,
    )
    assert noise.vocab_size == V and model.cfg.vocab_size == V and run.seq_len == 32
    assert (not model.timeless) == sees == (run.time_conditioning == "true")
    assert model.cfg.clean_causal == (kind != "block-dit" or bool(more.get("x0_causal")))
    assert model.cfg.next_token == (kind == "ar") and (
        process == "masked" or (noise.predicts, noise.ar_token) == ("loo", None)
    )
    prompt = [meta["bos_id"]] if "bos_id" in meta else [1]
    b = max(sizes)
    for state in generate(
        model, noise, [prompt] * 2, block_size=b, steps=2 if b > 1 else None, seed=1, trained=sorted(sizes)
    ):
        pass
    x = state.x
    assert x.shape[1] == 32 and (x >= 0).all() and (mask_id is None or (x[:, 1:] != mask_id).all())
    given, t = torch.arange(32).expand(2, 32) == 0, torch.full((2,), 0.5, dtype=torch.float64)
    *_, lesson, process = rebuild(tmp_path / path, "cpu", plain=True)
    assert isinstance(model, fast.FastTransformer) and type(lesson) is Transformer
    for b in sizes:
        start = int(b == 1)
        how = lambda start=start: {
            "start": start,
            "noise": Noise(0, torch.arange(2), torch.arange(start, 32)),
        }
        loss, _ = fast.token_loss(model, noise, x, b, t, "elbo", given, **how())
        want, _ = diffusion.token_loss(lesson, process, x, b, t, "elbo", given, **how())
        assert loss.isfinite() and loss > 0 and abs(loss / want - 1) < 1e-4, (
            "the lesson's loss of the same weights"
        )


BD3 = {"model_type": "bd3lm", "hidden_dim": 16, "n_heads": 2, "n_blocks": 2, "cond_dim": 8, "model_length": 16,
       "block_size": 4, "vocab_size": 12, "cross_attn": True, "adaln": True, "causal": False,
       "time_conditioning": False, "attn_backend": "flex", "var_min": True, "dropout": 0.1}  # fmt: skip


def bd3_lm(w, noisy, clean, b, config):
    """The logits (B, n, V) of BD3-LM's public forward: noisy and clean tokens side by side, sigma 0."""
    D, H, n = config["hidden_dim"], config["n_heads"], noisy.size(1)
    x = w["vocab_embed.embedding"][torch.cat((noisy, clean), dim=1)]
    t = torch.cat((torch.ones(128), torch.zeros(128))).double()  # cos and sin of 0
    c = w["sigma_map.mlp.0.weight"] @ t + w["sigma_map.mlp.0.bias"]
    c = w["sigma_map.mlp.2.weight"] @ F.silu(c) + w["sigma_map.mlp.2.bias"]
    linear = lambda y, name: y @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)
    modulation = lambda name, parts: linear(F.silu(c), f"{name}.adaLN_modulation").chunk(parts)
    norm = lambda y, name, shift, scale: F.layer_norm(y, (D,)) * w[f"{name}.weight"] * (1 + scale) + shift
    block, is_clean = torch.arange(n).repeat(2) // b, torch.arange(2 * n) >= n
    q, k = block[:, None], block
    sees = (q == k) & (is_clean[:, None] == is_clean)
    sees |= (q > k) & is_clean & ~is_clean[:, None]
    sees |= (q >= k) & is_clean & is_clean[:, None]
    half = D // H // 2
    angle = torch.arange(n).repeat(2)[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    cos, sin = (f(angle).repeat(1, 2)[:, None] for f in (torch.cos, torch.sin))
    turn = lambda y: y * cos + torch.cat((-y[..., half:], y[..., :half]), dim=-1) * sin
    for i in range(config["n_blocks"]):
        s1, m1, g1, s2, m2, g2 = modulation(f"blocks.{i}", 6)
        y = linear(norm(x, f"blocks.{i}.norm1", s1, m1), f"blocks.{i}.attn_qkv")
        q, k, v = y.unflatten(-1, (3, H, D // H)).unbind(2)
        score = torch.einsum("bqhd,bkhd->bhqk", turn(q), turn(k)) / (D // H) ** 0.5
        p = score.masked_fill(~sees, -torch.inf).softmax(-1)
        x = x + g1 * linear(torch.einsum("bhqk,bkhd->bqhd", p, v).flatten(2), f"blocks.{i}.attn_out")
        y = linear(norm(x, f"blocks.{i}.norm2", s2, m2), f"blocks.{i}.mlp.0")
        x = x + g2 * linear(F.gelu(y, approximate="tanh"), f"blocks.{i}.mlp.2")
    shift, scale = modulation("output_layer", 2)
    return linear(norm(x, "output_layer.norm_final", shift, scale), "output_layer.linear")[:, :n]


def test_bd3_lm(tmp_path, slip):
    """Its logits are those of its own forward, written out; block by block with a cache too."""
    weights = theirs(12, "block-dit", {**TINY, "length": 16})
    buffers = {"sampling_eps_min": torch.tensor(1e-3), "sampling_eps_max": torch.tensor(1.0)}
    put(tmp_path / "m", {f"backbone.{k}": v for k, v in weights.items()} | buffers, BD3)
    run, meta, _, model, process = rebuild(tmp_path / "m", "cpu", plain=True)
    assert run.block_sizes == {4: 1.0} and process.mask_id == 11 and not model.cfg.clean_causal
    model, w = model.double(), {k: v.double() for k, v in weights.items()}
    g = torch.Generator().manual_seed(1)
    clean = torch.randint(11, (2, 16), generator=g)
    noisy = torch.where(torch.rand(2, 16, generator=g) < 0.5, 11, clean)
    with torch.no_grad():
        want = bd3_lm(w, noisy, clean, 4, BD3)
        assert (model(clean, noisy, 4) - want).abs().max() < 1e-10
        cache = model.new_cache(2, 16)
        for at in range(0, 16, 4):
            before = clean[:, at - 4 : at] if at else None
            found = model(before, noisy[:, at : at + 4], 4, start=at, cache=cache)
            assert (found - want[:, at : at + 4]).abs().max() < 1e-10
    put(tmp_path / "full", weights, {**BD3, "cross_attn": False})
    assert rebuild(tmp_path / "full", "cpu")[0].block_sizes == {16: 1.0}, "its pretraining, full diffusion"
    put(tmp_path / "mdlm", weights, {**BD3, "model_type": "mdlm"})
    assert rebuild(tmp_path / "mdlm", "cpu")[0].block_sizes == {16: 1.0}
    put(tmp_path / "timed", weights, {**BD3, "time_conditioning": True})
    assert "time_conditioning" in slip(checkpoint.load, tmp_path / "timed")


def test_unknown_layouts_are_named(tmp_path, slip):
    good, config = theirs(50258, "block-dit"), {**TINY, "x0_causal": True}
    load = lambda weights, config, path=MIXTURE: slip(
        checkpoint.load, put(tmp_path / path, weights, config), "--init_from"
    )
    assert "blocks.1.attn_qkv.weight" in load(
        {**good, "blocks.1.attn_qkv.weight": torch.zeros(3, 3)}, config
    ).replace("layers", "blocks").replace("qkv.weight", "attn_qkv.weight")
    assert "left over, surprise" in load({**good, "surprise": torch.zeros(3)}, config)
    assert "missing" in load({k: v for k, v in good.items() if "mlp.2" not in k}, config)
    assert "hidden_size" in load(good, {k: v for k, v in config.items() if k != "hidden_size"})
    assert "type 'unet'" in load(good, {**config, "type": "unet"})
    err = load(good, config, "somewhere")
    assert "which noise" in err and "multi_block_size" in err
    assert "which block sizes" in load(good, config, "somewhere/absorb")
    (tmp_path / MIXTURE / "config.json").write_text("{")
    assert "config.json" in slip(checkpoint.load, tmp_path / MIXTURE, "--init_from")
    (tmp_path / "bare").mkdir()
    save_file(good, tmp_path / "bare/model.safetensors")
    assert "no config.json" in slip(checkpoint.load, tmp_path / "bare/model.safetensors", "--init_from")
    put(tmp_path / MIXTURE, good, config)
    data = (tmp_path / MIXTURE / "model.safetensors").read_bytes()
    (tmp_path / MIXTURE / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "damaged" in slip(checkpoint.load, tmp_path / MIXTURE, "--init_from")
    assert "no repository" in slip(checkpoint.load, "hf:nobody", "--init_from")
    for key, value, says in (
        ("n_heads", 0, "n_heads"), ("n_heads", "2", "n_heads"), ("n_heads", 1, "inv_freq"), ("n_blocks", 10**30, "n_blocks"),
        ("n_blocks", 3, "n_blocks"), ("length", -1, "length"), ("length", 1e400, "length"), ("length", 24, "block size 16"),
        ("x0_causal", "false", "x0_causal"), ("mask_index", -1, "mask_index"), ("mask_index", None, "mask_index"),
        ("mask_index", 10**30, "mask_index"), ("block_sizes", "x", "block sizes"), ("block_sizes", {"5": 1}, "block size 5"),
        ("mlp_ratio", 3, "mlp.0"), ("rope_base", "x", "unknown layout"),
    ):  # fmt: skip
        assert says in load(good, {**config, key: value}), (key, value)
    for k, v in (
        ("blocks.0.norm1.weight", torch.full((16,), torch.nan)),
        ("blocks.0.norm1.weight", torch.ones(16, dtype=torch.int8)),
    ):
        assert "not finite" in load({**good, k: v}, config)
    assert "absorb" in load(good, {k: v for k, v in config.items() if k != "x0_causal"}), (
        "a DiT of this shape would be another network"
    )
    for kind, path in (("dit", "baselines/owt/ar"), ("ar", "baselines/owt/mdlm"), ("ar", MIXTURE)):
        assert "the weights say" in load(theirs(50258, kind), TINY, path)
    assert "without room for a mask" in load(theirs(50257, "block-dit"), config)
    assert "block size 24" in load(good, config, MIXTURE.replace("16/owt/0.05_0.95", "24/owt/uniform"))


class Stranger:
    """What a Lightning checkpoint drags along: settings and a tokenizer, of modules that are not here."""

    def __init__(self, x):
        self.x = x

    def __reduce__(self):
        return (touch, (str(self.x),))


class Dictionary(dict):
    """A stranger that is a dict: weights_only does not fill it, and says so."""


def touch(path):
    Path(path).touch()


@pytest.mark.parametrize("averaged", [True, False])
def test_a_lightning_checkpoint(tmp_path, slip, averaged):
    """Prefixes, the averaged weights by their order, and objects of strangers, none of whose code runs."""
    weights = theirs(50258, "block-dit")
    other = {k: v + 1 for k, v in weights.items()}
    state = {
        "state_dict": {f"backbone._orig_mod.{k}": v for k, v in (other if averaged else weights).items()},
        "global_step": 3,
    }
    state["state_dict"]["teacher.vocab_embed.embedding"] = torch.zeros(3)
    state["hyper_parameters"] = {
        "config": Stranger(tmp_path / "ran"),
        "tokenizer": Stranger(tmp_path / "ran"),
    }
    if averaged:
        state["ema"] = {
            "decay": 0.9999,
            "shadow_params": [v for k, v in weights.items() if "inv_freq" not in k],
        }
    folder = tmp_path / MIXTURE
    folder.mkdir(parents=True)
    torch.save(state, folder / "last.ckpt")
    (folder / "config.json").write_text(
        json.dumps(
            {"model": {**TINY, "type": "block-dit", "x0_causal": True}, "algo": {"name": "blockgen-absorb"}}
        )
    )
    want = rebuild(put(tmp_path / "b" / MIXTURE, weights, {**TINY, "x0_causal": True}), "cpu")[3]
    for path in (folder, folder / "last.ckpt"):
        got = rebuild(path, "cpu")[3]
        assert all(torch.equal(p, q) for p, q in zip(got.parameters(), want.parameters(), strict=True))
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": {}, "x": Dictionary(a=1)}, folder / "last.ckpt")
    assert "dict" in slip(checkpoint.load, folder, "--init_from").lower()


def test_a_small_file_does_not_become_large(tmp_path, slip, monkeypatch):
    """Compressed zeros, and one number read as a gigabyte, are refused before the memory is asked for."""
    folder = put(tmp_path / MIXTURE, {}, {**TINY, "x0_causal": True})
    (folder / "model.safetensors").unlink()
    refused = lambda: slip(checkpoint.load, folder, "--init_from")
    weights = theirs(50258, "block-dit")
    torch.save({"state_dict": weights}, folder / "last.ckpt")
    squeeze(folder / "last.ckpt")
    assert "is compressed" in refused()
    flat = {k: torch.zeros(1).expand(10**6, 10**3) for k in weights}
    torch.save({"state_dict": flat}, folder / "last.ckpt")
    assert "its tensors are of" in refused()
    torch.save({"state_dict": {}, "ema": {"shadow_params": list(flat.values())}}, folder / "last.ckpt")
    assert "its tensors are of" in refused()
    torch.save({"state_dict": weights, "x": bytearray(5)}, folder / "last.ckpt")
    assert "bytearray" in refused()
    torch.save({"state_dict": weights}, folder / "last.ckpt")
    checkpoint.load(folder)
    monkeypatch.setattr("hub.published.LARGEST", 10)
    assert "bytes of settings" in refused()


def test_the_shadow_list_must_fit(tmp_path, slip):
    weights = theirs(50258, "block-dit")
    folder = tmp_path / MIXTURE
    put(folder, weights, {**TINY, "x0_causal": True})
    (folder / "model.safetensors").unlink()
    shadows = [v for k, v in weights.items() if "inv_freq" not in k][1:]
    torch.save(
        {"state_dict": {f"backbone.{k}": v for k, v in weights.items()}, "ema": {"shadow_params": shadows}},
        folder / "last.ckpt",
    )
    assert "do not fit" in slip(checkpoint.load, folder, "--init_from")


# ----- the AR baseline


def ar_net(**more):
    torch.manual_seed(0)
    net = Transformer(
        ModelConfig(vocab_size=11, seq_len=24, n_layers=3, n_heads=2, d_model=32, next_token=True, **more)
    ).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    return net


def plain_gpt(net, x):
    """
    The same weights as anyone would write a causal transformer: logits (B, T, V), of the token behind each
    position.
    """
    h, D, H = net.embed.weight[x], net.cfg.d_model, net.cfg.n_heads
    T, d = x.size(1), D // H
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, d, 2).to(h) / d)
    cos, sin = (torch.cat((f, f), 1) for f in (angle.cos(), angle.sin()))
    turn = lambda v: v * cos + torch.cat((-v[..., d // 2 :], v[..., : d // 2]), -1) * sin
    norm = lambda v, w: (
        (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * w
    )
    for layer in net.layers:
        q, k, v = (
            (norm(h, layer.norm1.weight) @ layer.qkv.weight.T).view(-1, T, 3, H, d).permute(2, 0, 3, 1, 4)
        )
        scores = turn(q) @ turn(k).mT / d**0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        h = h + (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, T, D) @ layer.out.weight.T
        h = h + layer.mlp(norm(h, layer.norm2.weight))
    return norm(h, net.norm.weight) @ net.head.weight.T + net.head.bias


@pytest.mark.parametrize("quick", [False, True])
@torch.no_grad()
def test_a_next_token_network_is_a_plain_gpt(quick):
    net, x = ar_net().double(), torch.randint(11, (3, 24))
    if quick:
        net = accelerated(net, Masked(11, 10))[0]
    want = plain_gpt(net, x)[:, :-1]
    agree(net(x, x[:, 1:], 1, start=1), want)
    agree(net(x, torch.zeros_like(x[:, 5:]), 1, start=5), want[:, 4:])
    cache = net.new_cache(3, 24)
    # the fast cache knows the last committed token's prediction too
    net(x[:, : 4 if quick else 3], None, 1, cache=cache)
    for i in range(4, 24):  # each call commits the token before it, as generation does
        clean = x[:, i - 1 : i] if cache.length < i else None
        agree(net(clean, x[:, i : i + 1], 1, start=i, cache=cache)[:, 0], want[:, i - 1])
    cache.length = 10
    agree(net(x[:, 10:15], x[:, 11:16], 1, start=11, cache=cache), want[:, 10:15])  # a guess, verified
    for wrong in ({"block_size": 4, "start": 4}, {"block_size": 1, "start": 0}):
        with pytest.raises(ValueError, match="next-token"):
            net(x, x[:, 4:8], **wrong)
    with pytest.raises(ValueError, match="seq_len 24"):
        net(x, x[:, :2], 1, start=23)


def accelerated(net, process):
    """fast.accelerate, which must not step aside."""
    net, process, notes = fast.accelerate(net, process)
    assert isinstance(net, fast.FastTransformer) and not notes
    return net, process


@pytest.mark.parametrize("quick", [False, True])
def test_a_next_token_network_samples_with_a_cache_as_without(quick):
    net, process, runs = ar_net().double(), Masked(11, 10), []
    if quick:
        net, process = accelerated(net, process)
    for cached in (True, False):
        for state in generate(
            net, process, [(1,), (1, 2, 3)], block_size=1, use_cache=cached, eos_id=4, seed=3
        ):
            pass
        runs.append(state.x)
    assert torch.equal(*runs) and (runs[0] == 4).any()
    for state in generate(net, process, [(1,)] * 3, block_size=1, max_new_tokens=5):
        pass
    assert state.token_forwards == 3 * 5, "each token but the last is read once, and noise never"
    with pytest.raises(ValueError, match="bos_id"):
        list(generate(net, process, [()], block_size=1))


@pytest.fixture
def rows(project):
    """A dataset of rows that begin with BOS (3) and end padded (4), in made-up tokens."""
    from data.dataset import write_dataset

    rng = np.random.default_rng(0)
    x = np.full((200, 16), 4)
    x[:, 0] = 3
    for row in x:
        n = rng.integers(4, 15)
        row[1 : 1 + n] = (np.arange(n) + rng.integers(3)) % 3
    Path("data/rows").mkdir()
    meta = {"vocab_size": 5, "tokenizer": "none", "row_len": 16, "bos_id": 3, "pad_id": 4}
    write_dataset("data/rows", x[:150].ravel(), x[150:].ravel(), meta)
    return project


SMALL = {
    "n_layers": 2,
    "n_heads": 2,
    "d_model": 16,
    "batch_size": 8,
    "n_eval": 16,
    "n_samples": 1,
    "log_every": 10,
    "device": "cpu",
    "dtype": "float32",
}


def test_next_token_training_is_cross_entropy_and_samples_begin_with_bos(rows, slip):
    cfg = TrainConfig(
        dataset="rows",
        out_dir="out/ar",
        block_sizes={1: 1.0},
        next_token=True,
        max_steps=60,
        eval_every=60,
        **SMALL,
    )
    train(cfg)
    run, meta, _, model, process = rebuild("out/ar", "cpu")
    model.double()
    data = dataset_for("out/ar", run, meta, model)
    found = likelihood(model, process, data, [1], 0)
    x0, given, real = data.windows("val", found.index)
    answer = real & ~given
    with torch.no_grad():
        logits = plain_gpt(model, x0)[:, :-1]
        logits[..., process.mask_id] = -torch.inf
        want = -logits.log_softmax(-1).gather(-1, x0[:, 1:, None])[..., 0]
    agree(found.nats[1][0], (want * answer[:, 1:]).sum(1))
    letters = (x0 != 4)[:, 1:] & answer[:, 1:]  # without the padding that ends a text
    assert want[letters].mean() < 1.0, "and it has learned"
    assert (answer == ((x0.roll(1, 1) != 4) & (torch.arange(16) > 0))).all(), "the first padding ends a text"
    assert "nothing stands before" in slip(
        train, TrainConfig(dataset="toy", seq_len=8, block_sizes={1: 1.0}, next_token=True, **SMALL)
    )


# ----- going on from weights


def test_fine_tuning_begins_with_the_published_weights_and_resumes(rows, slip):
    """
    One step at lr 0 changes nothing; a resumed run is the uninterrupted one; what the network is comes from
    the checkpoint.
    """
    weights, config = theirs(6, "block-dit", TINY | {"length": 16}), {**TINY, "length": 16, "x0_causal": True}
    folder = put(rows / "blockgen/multi_block_size/16/rows/0.25_0.75/absorb", weights, config)

    def settings(**more):
        cfg = TrainConfig(init_from=str(folder), **{**SMALL, "eval_every": 2, "dataset": "rows", **more})
        return cfg, {"dataset", *more}

    def run(ask):
        cfg, asked = ask
        begun, facts = begin_from(cfg, asked=asked)
        train(cfg, weights=begun, facts=facts)

    run(settings(out_dir="out/same", max_steps=1, lr=0.0, weight_decay=0.0))
    a, b = rebuild("out/same", "cpu"), rebuild(folder, "cpu")
    assert all(torch.equal(p, q) for p, q in zip(a[3].parameters(), b[3].parameters(), strict=True))
    assert a[0].block_sizes == {1: 0.25, 16: 0.75} and a[4].mask_id == 5 and a[3].cfg.condition_clean

    run(settings(out_dir="out/c4", max_steps=4, dropout=0.1, lr_schedule="constant"))
    run(settings(out_dir="out/c2", max_steps=2, dropout=0.1, lr_schedule="constant"))
    run(settings(out_dir="out/c2", max_steps=4, dropout=0.1, lr_schedule="constant", resume=True))
    one, two = (torch.load(f"out/{name}/ckpt.pt", weights_only=True) for name in ("c4", "c2"))
    assert all(torch.equal(one[part][k], two[part][k]) for part in ("model", "ema") for k in one[part])
    noise = {"class": "Masked", "arguments": {"vocab_size": 6, "mask_id": 5}}
    assert one["process"] == two["process"] == noise and one["network"]["dropout"] == 0.1
    run(settings(out_dir="out/dry", max_steps=4, lr_schedule="constant"))
    dry = torch.load("out/dry/ckpt.pt", weights_only=True)
    assert any((dry["model"][k] != one["model"][k]).any() for k in dry["model"]), "dropout does something"
    assert any((one["model"][k] != b[3].state_dict()[k]).any() for k in one["model"])

    refused = lambda **more: (lambda cfg, asked: slip(partial(begin_from, cfg, asked=asked)))(
        *settings(**more)
    )
    assert "n_layers 2, not 3" in refused(n_layers=3)
    assert "not in the tokens" in refused(dataset="toy", seq_len=16)
    assert "no checkpoint" in slip(begin_from, TrainConfig(init_from="out/nothing", **SMALL))


def test_an_ar_transformer_learns_to_denoise(rows):
    """The same layers with a noisy stream: only the mask's vector is new to them. And back is not offered."""
    train(
        TrainConfig(
            dataset="rows",
            out_dir="out/ar",
            block_sizes={1: 1.0},
            next_token=True,
            max_steps=2,
            eval_every=2,
            **SMALL,
        )
    )
    cfg = TrainConfig(
        init_from="out/ar",
        out_dir="out/mix",
        max_steps=1,
        lr=0.0,
        weight_decay=0.0,
        block_sizes={1: 0.5, 16: 0.5},
        **SMALL,
    )
    begun, facts = begin_from(cfg, asked={"next_token", "block_sizes"})
    train(cfg, weights=begun, facts=facts)
    a, b = rebuild("out/ar", "cpu")[3], rebuild("out/mix", "cpu")[3]
    assert a.cfg.next_token and not b.cfg.next_token
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_our_own_runs_can_be_begun_from(rows):
    train(
        TrainConfig(
            dataset="rows",
            out_dir="out/a",
            block_sizes={16: 1.0},
            process="uniform",
            max_steps=2,
            eval_every=2,
            **SMALL,
        )
    )
    cfg = TrainConfig(init_from="out/a", out_dir="out/b", max_steps=1, lr=0.0, weight_decay=0.0, **SMALL)
    begun, facts = begin_from(cfg)
    train(cfg, weights=begun, facts=facts)
    a, b = rebuild("out/a", "cpu"), rebuild("out/b", "cpu")
    assert all(torch.equal(p, q) for p, q in zip(a[3].parameters(), b[3].parameters(), strict=True))
    assert b[0].process == "uniform" and b[0].time_conditioning == "true" and b[0].block_sizes == {16: 1.0}


def test_rows_shorter_than_the_context(rows, monkeypatch, capsys):
    """
    Full diffusion of 32 tokens, and its mixture, on rows of 16: one block of 16, and texts that end where the
    rows do.
    """
    for name, kind, config in (
        ("baselines/rows/mdlm", "dit", TINY),
        (MIXTURE.replace("owt", "rows"), "block-dit", {**TINY, "x0_causal": True}),
    ):
        folder = put(rows / name, theirs(6, kind, config), config)
        for command, flags in (
            (evaluation, ()),
            (quality, ("--steps=2", "--sampler=ancestral", "--judge=none")),
        ):
            argv = ["", f"--init_from={folder}", "--dataset=rows", "--n_eval=8", "--json=out/e.json", *flags]
            monkeypatch.setattr(sys, "argv", argv)
            command.main()
        lines = json.loads(Path("out/e.json").read_text())["lines"]
        assert lines[1]["block_size"] == 16 and lines[1]["tokens_per_s"] > 0
    cfg = TrainConfig(init_from=str(folder), dataset="rows", out_dir="out/short", max_steps=1, **SMALL)
    begun, facts = begin_from(cfg, asked={"dataset"})
    train(cfg, weights=begun, facts=facts)
    run, _, _, model, _ = rebuild("out/short", "cpu")
    assert run.seq_len == model.cfg.seq_len == 16


# ----- size


@pytest.mark.slow
def test_a_wide_network_loads_and_every_sampler_writes(tmp_path):
    """
    One layer of the released twelve, to be quick, at the released width and vocabulary; the whole:
    docs/log.md.
    """
    config = {
        "hidden_size": 768,
        "n_heads": 12,
        "n_blocks": 1,
        "cond_dim": 128,
        "length": 1024,
        "x0_causal": True,
        "type": "block-dit",
    }
    for noise in ("absorb", "uniform"):
        put(tmp_path / MIXTURE.replace("absorb", noise), theirs(50258, "block-dit", config), config)
    for name in methods.names():  # some bring a sampler
        methods.load(name)
    start = time.process_time()
    loaded = [rebuild(tmp_path / MIXTURE.replace("absorb", noise), "cpu") for noise in ("absorb", "uniform")]
    assert time.process_time() - start < 10
    refused = set()
    for run, meta, _, model, process in loaded:
        for name, sampler in SAMPLERS.items():
            how = {
                "block_size": 1 if name == "ar" else 16,
                "trained": sorted(run.block_sizes),
                "max_new_tokens": 16,
            }
            if ("absorbing" if not process.absorbing else "redraws") in sampler.needs:
                continue
            if name != "ar" and "own pace" not in sampler.needs:
                how["steps"] = 2
            try:
                for state in generate(model, process, [[meta["bos_id"]]], sampler=sampler, **how):
                    pass
            except ValueError as e:  # it wants the network or the noise of its method
                refused.add(name)
                assert sampler.__module__.startswith("methods.") and re.search(
                    "one of --method|not def", str(e)
                ), e
            else:
                assert int((state.x != NOTHING).sum()) == 17, name
    own = {name for name, f in SAMPLERS.items() if hasattr(sys.modules[f.__module__], "network")}
    assert refused == own | {"reaudm"}
