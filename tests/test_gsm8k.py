"""
Why believe the sandbox, and the score? Programs that do harm, each layer alone against them; and an
evaluation, killed and resumed.
"""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from fast import FastTransformer
from lab import gsm8k, sandbox
from lab.sandbox import LAYERS, correct, extract, gold_of, isolation, number, run
from run.restore import restore
from train import TrainConfig, train

ROOT = Path(__file__).parents[1]
needs_boundary = pytest.mark.skipif(not isolation()[0], reason=isolation()[1])
HELD = set(run("def simple_math_problem():\n    return 1", 10.0)["layers"])  # where no layer is missing, both
ALONE = [
    pytest.param(layers, marks=pytest.mark.skipif(not set(layers) <= HELD, reason=isolation()[1]))
    for layers in zip(LAYERS)
]
BOTH = pytest.param(LAYERS, marks=[pytest.mark.slow, needs_boundary])

# Restricted builtins are no boundary: every attack begins by walking around them, to the real os, sys and
# ctypes
REACH = """
import math
W = [c for c in math.__class__.__base__.__subclasses__() if c.__name__ == "_wrap_close"][0].__init__.__globals__
sys, B = W["sys"], W["__builtins__"]
os, ctypes, resource, signal, time = [sys.modules[name] for name in ("os", "ctypes", "resource", "signal", "time")]
open, bytes, bytearray, C = B["open"], B["bytes"], B["bytearray"], ctypes.CDLL(None, use_errno=True)
def must(result):
    return result if result >= 0 else 1 / 0
def network(family, kind, address):
    must(C.connect(must(C.socket(family, kind, 0)), address, len(address)))
for fd in range(3):
    try: os.close(fd)  # it may have four files open, and has: make room for others
    except: pass
def simple_math_problem():
"""

# Each returns 666 where its harm was possible; {places} are filled in, see `places`
HARM = {
    "fork": "if os.fork() == 0: os._exit(0)",
    "fork bomb": "for i in range(20): os.fork()",
    "survivor": """if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1)
        os.mkdir("{open}/survivor")
    os._exit(0)""",
    "thread": "B['__import__']('_thread').start_new_thread(print, ())",
    "new program": "os.execv('/bin/true', ['true'])",
    "write in /tmp": "open('{open}/marker', 'w').write('x')",
    "write in its folder": "open('marker', 'w').write('x')",
    "write beside its folder": "open('../marker', 'w').write('x')",
    "write at home": "open('{home}/.nanoblock_marker', 'w').write('x')",
    "write in the project": "open('{root}/nanoblock_marker', 'w').write('x')",
    "make a folder": "os.mkdir('{open}/folder')",
    "make a folder of its own": "os.mkdir('folder')",
    "make a link": "os.symlink('/', 'link')",
    "delete": "os.unlink('{open}/victim')",
    "rename": "os.rename('{open}/victim', '{open}/gone')",
    "truncate": "os.truncate('{open}/victim', 0)",
    "change permissions": "os.chmod('{open}/victim', 0)",
    "read what all may read": "open('/etc/passwd').read()",
    "read the project": "open('{root}/README.md').read()",
    "look around": "if not os.listdir('/'): 1 / 0",
    "own environment": "if 'hunter2' not in str(os.environ): 1 / 0",
    "evaluator's environment": "if b'hunter2' not in open('/proc/{pid}/environ', 'rb').read(): 1 / 0",
    "evaluator's memory": "open('/proc/{pid}/mem', 'rb')",
    "anyone's environment": "for pid in os.listdir('/proc'): open('/proc/' + pid + '/environ', 'rb').read()",
    "trace": "must(C.ptrace(16, {pid}, 0, 0))",
    "see the evaluator": "os.kill({pid}, 0)",
    "kill the evaluator": "os.kill({pid}, 9)",
    "kill its parent": "must(os.getppid() - 1); os.kill(os.getppid(), 9)",
    "limit the evaluator": "resource.prlimit({pid}, resource.RLIMIT_CPU, (1, 1))",
    "kill all": "os.kill(-1, 9)",
    "connect": "network(2, 1, {address})",
    "connect by a path": "network(1, 1, bytes([1, 0]) + b'{open}/socket')",
    "connect by an abstract name": "network(1, 1, bytes([1, 0, 0]) + b'nanoblock{pid}')",
    "name lookup": "network(2, 2, bytes([2, 0, 0, 53, 9, 9, 9, 9]) + bytes(8))",
    "more processes": "resource.setrlimit(resource.RLIMIT_NPROC, (99, 99))",
    "more memory": "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "become root": "os.setuid(0)",
    "new namespaces": "must(C.unshare(0x10000000))",
    "mount": "must(C.mount(b'none', b'/', b'tmpfs', 0, None))",
    "leave the root": "os.chroot('..')",
    "rename the machine": "must(C.sethostname(b'x', 1))",
    "much memory": "x = bytearray(1 << 30)",
    "much memory in a list": "x = [0] * (1 << 28)",
    "a file in memory": "fd = must(C.memfd_create(b'x', 0)); os.write(fd, b'x')",
}

# Each does its worst, and answers nothing right; what it may be found to be
WORST = {
    "endless": ("while True: pass", "timeout"),
    "endless, deaf": (
        "for s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except: pass\nwhile True: pass",
        "timeout",
    ),
    "asleep": ("time.sleep(99)", "timeout|error"),
    "giant int": ("return 10**10**8", "timeout|error|killed|no answer"),
    "prints for ever": ("while True: print('7' * 10**5)", "timeout"),
    "floods stdout": ("while True: os.write(1, b'7' * 10**5)", "timeout"),
    "floods the answer": ("while True: os.write(3, b'7' * 10**5)", "timeout|killed"),
    "shouts at stderr": ("while True: os.write(2, b'7' * 10**5)", "timeout"),
    "closes all files": (
        "for fd in range(64):\n    try: os.close(fd)\n    except: pass\nwhile True: pass",
        "killed|timeout",
    ),
    "recursion": ("return simple_math_problem()", "error|killed"),
    "deep recursion": ("sys.setrecursionlimit(10**9)\nreturn simple_math_problem()", "error|killed|timeout"),
    "memory": ("x = []\nwhile True: x.append(bytearray(10**7))", "error|killed|timeout"),
    "memory, caught": (
        "x = []\nwhile True:\n    try: x.append(bytearray(10**7))\n    except: pass",
        "timeout",
    ),
    "exit": ("os._exit(0)", "killed"),
    "polite exit": ("sys.exit(0)", "error: SystemExit"),
    "suicide": ("os.kill(os.getpid(), 9)", "killed|error|no answer"),
    "abort": ("os.abort()", "killed|timeout"),
    "crash": ("ctypes.string_at(0)", "killed"),
    "nan": ("return float('nan')", "no answer"),
    "inf": ("return float('-inf')", "no answer"),
    "bool": ("return True", "no answer"),
    "nothing": ("return None", "no answer"),
    "generator": ("yield 7", "no answer"),
    "long int": ("return 1 << 10**6", "no answer"),
    "list": ("return [7]", "no answer"),
    "a str of its own": ("return B['type']('S', (str,), {'strip': lambda s: os._exit(0)})('7')", "no answer"),
    "an int of its own": (
        "def bad(*x): raise B['BaseException']()\nreturn B['type']('I', (int,), {k: bad for k in ('__eq__', '__repr__', '__float__')})(7)",
        "no answer",
    ),
    "hostile name": (
        "E = B['type']('E\\n int 7 ' * 9, (B['BaseException'],), {})\nraise E()",
        "killed|error",
    ),
    "breaks the answer": (
        "for m in sys.modules.values(): m.__dict__.clear()",
        "killed|error|no answer|timeout",
    ),
    "prints in a hostile way": (
        "print(B['type']('P', (), {'__str__': lambda s: 1 / 0})())",
        "error: ZeroDivisionError",
    ),
    "imports": ("import os", "error: ImportError"),
}
SOURCES = {
    "deep source": (
        "def simple_math_problem():\n    return " + "(" * 50_000 + "7" + ")" * 50_000,
        "no code|error|killed",
    ),
    "deep minus": (
        "def simple_math_problem():\n    return " + "-" * 200_000 + "8",
        "no code|error|killed|ok",
    ),
    "deep attributes": ("x = 7" + ".a" * 200_000, "no code|error|killed"),
    "null bytes": ("def simple_math_problem():\n    return 8\0", "error|no code|ok"),
    "surrogates": ("def simple_math_problem():\n    return 8 # \udc80\ud800", "ok"),
    "10 MB": ("def simple_math_problem():\n    return 8\n" + "#" * 10**7, "too long"),
    "many bad lines": ("x = (\n" * 20_000, "no code|timeout|error"),
    "no function": ("def other():\n    return 7", "no function"),
    "not a function": ("simple_math_problem = 7", "error: TypeError"),
    "hides print": ("print = 7\ndef simple_math_problem():\n    print('7')", "error: TypeError"),
    "hides builtins": ("__builtins__ = {}\ndef simple_math_problem():\n    print('8')", "ok|error"),
    "no text": ("", "no code"),
    "exit at once": ("raise SystemExit(7)", "error: NameError"),
}


def indented(body):
    return REACH + "".join(f"    {line}\n" for line in body.split("\n"))


@pytest.fixture
def places(monkeypatch):
    """
    What attacks aim at: an open folder with a victim, sockets that listen, a secret in the environment, this
    process.
    """
    monkeypatch.setenv("NANOBLOCK_SECRET", "hunter2")
    folder = tempfile.mkdtemp(prefix="nanoblock_open")
    os.chmod(folder, 0o777)  # nobody may write here
    Path(folder, "victim").write_text("alive")
    os.chmod(f"{folder}/victim", 0o666)
    listeners = [socket.socket(family) for family in (socket.AF_INET, socket.AF_UNIX, socket.AF_UNIX)]
    for listener, address in zip(
        listeners, [("127.0.0.1", 0), f"{folder}/socket", f"\0nanoblock{os.getpid()}"], strict=True
    ):
        listener.bind(address)
        listener.listen()
    os.chmod(f"{folder}/socket", 0o777)
    port = listeners[0].getsockname()[1]
    address = bytes([2, 0]) + port.to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8)
    yield {
        "open": folder,
        "home": os.path.expanduser("~"),
        "root": str(ROOT),
        "pid": os.getpid(),
        "address": address,
    }
    for listener in listeners:
        listener.close()
    shutil.rmtree(folder)


def attack(places, body, layers, **how):
    for name, place in places.items():
        body = body.replace("{" + name + "}", str(place))
    return run(indented(body + "\nreturn 666"), layers=layers, **how)


def edit_launcher(monkeypatch, folder, old, new):
    """From here on programs are started by a copy of sandbox.py in which `old` reads `new`."""
    text = Path(sandbox.__file__).read_text(encoding="utf-8")
    assert text.count(old) == 1
    Path(folder, "sandbox.py").write_text(text.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(sandbox, "HERE", str(folder))


@pytest.mark.parametrize("layers", [BOTH, *ALONE])
def test_no_attack_harms_past_any_one_layer(places, layers, monkeypatch, tmp_path):
    """Namespaces too, though they do not suffice: they are the wall that stands if seccomp falls."""
    if layers == ("namespaces",):
        edit_launcher(monkeypatch, tmp_path, 'SUFFICES = ("seccomp",)', 'SUFFICES = ("namespaces",)')
    got = {name: attack(places, body, layers, timeout=3) for name, body in HARM.items()}
    harm = {name: result for name, result in got.items() if not result["why"].startswith(("error", "killed"))}
    assert not harm
    unsound = {
        name: result
        for name, result in got.items()
        if result["why"].endswith(("NameError", "TypeError", "SyntaxError"))
    }
    assert not unsound, "these attacks do not attack"
    assert all(result["layers"] == layers for result in got.values())
    time.sleep(1.2)  # when a survivor would act
    assert (
        sorted(os.listdir(places["open"])) == ["socket", "victim"]
        and Path(places["open"], "victim").read_text() == "alive"
    )
    assert not list(Path(places["home"]).glob(".nanoblock_marker")) and not list(
        ROOT.glob("nanoblock_marker")
    )


@pytest.mark.skipif(sys.platform != "linux", reason="written for Linux")
def test_the_attacks_are_real(places):
    """Without a layer some of them do harm, so that none does with one is no accident of theirs."""
    real = ["write in /tmp", "make a folder", "delete", "read what all may read", "look around", "connect"]
    real += ["connect by a path", "connect by an abstract name", "new namespaces", "read the project"]
    fresh = Path(places["open"], "victim").write_text
    found = [name for name in real if fresh("alive") and attack(places, HARM[name], ())["answer"] == 666]
    assert found == real, f"harmless even with limits alone: {set(real) - set(found)}"


MISSING = {  # what is asked for, and the function of a layer that this machine is said to lack
    "namespaces": (("namespaces",), "unshared(libc)"),
    "seccomp": (("seccomp",), "filtered(libc, ctypes)"),
    "seccomp, but not namespaces": (LAYERS, "filtered(libc, ctypes)"),
}


@pytest.mark.skipif(os.name != "posix", reason="starts no program")
@pytest.mark.parametrize("name", MISSING)
def test_nothing_runs_unless_a_layer_that_suffices_holds(places, monkeypatch, tmp_path, name):
    layers, function = MISSING[name]
    edit_launcher(monkeypatch, tmp_path, f"def {function}:\n", f"def {function}:\n    return False\n")
    got = attack(places, HARM["write in /tmp"], layers)
    assert (got["why"], got["answer"]) == ("no boundary", None) and isolation.__wrapped__(layers)[0] is False
    assert sorted(os.listdir(places["open"])) == ["socket", "victim"], "it ran"


@pytest.mark.skipif(os.name != "posix", reason="starts no program")
def test_namespaces_alone_are_refused(places):
    for layers in (("namespaces",), ("secomp",)):
        assert attack(places, HARM["write in /tmp"], layers)["why"] == "no boundary"
    assert sorted(os.listdir(places["open"])) == ["socket", "victim"], "it ran"


@pytest.mark.skipif(sys.platform != "linux", reason="written for Linux")
@pytest.mark.parametrize("name, end", [("SIGKILL", "killed"), ("SIGSTOP", "timeout")])
def test_signals_of_a_program_reach_itself_alone(name, end):
    """Even with limits alone. Its launcher, stopped, would leave the evaluator waiting for ten seconds more."""
    start = time.monotonic()
    got = run(indented(f"os.kill(0, signal.{name})\nreturn 666"), timeout=1.0, layers=())
    assert got["why"] == end and time.monotonic() - start < 8


@pytest.mark.skipif(sys.platform != "linux", reason="written for Linux")
def test_programs_have_no_keyring_in_common():
    """Even with limits alone: what one leaves in the session keyring of the evaluator, the next does not find."""
    numbers = {"x86_64": (248, 250), "aarch64": (217, 219)}  # add_key, keyctl
    if os.uname().machine not in numbers:
        pytest.skip(os.uname().machine)
    add, keyctl = numbers[os.uname().machine]
    seek = f"return 8 if C.syscall({keyctl}, 10, -3, b'user', b'nanoblock', 0) > 0 else 7"  # KEYCTL_SEARCH
    leave = f"must(C.syscall({add}, b'user', b'nanoblock', b'x', 1, -3))\n{seek}"
    both = [indented(body) for body in (leave, seek)]
    ask = f"import ctypes; ctypes.CDLL(None).syscall({keyctl}, 1, None); from lab import sandbox; "
    ask += f"print(*(sandbox.run(code, layers=())['answer'] for code in {both}))"
    found = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True).stdout
    if found.startswith("None"):
        pytest.skip("this system keeps no keys")
    assert found.split() == ["8", "7"]


@needs_boundary
def test_the_worst_programs_end_in_time_and_are_wrong():
    """Eight at a time: none hangs, crashes or is right (7), and each is said to be what it is."""
    programs = {name: (indented(body), why) for name, (body, why) in WORST.items()} | SOURCES
    start = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda program: run(program[0], timeout=1.0), programs.values()))
    for (name, (_, why)), result in zip(programs.items(), results, strict=True):
        assert result["why"].startswith(tuple(why.split("|"))), f"{name}: {result}, expected {why}"
        assert not correct(result["answer"], 7), f"{name}: {result}"
    assert time.monotonic() - start < 20


@pytest.mark.skipif(not isolation(("seccomp",))[0], reason="needs seccomp")
def test_shared_memory_is_refused():
    """Unmapped but for a page it would stay, and count as nobody's."""
    flags = {"shared": 0x21, "its own": 0x22}
    source = "C.mmap.restype = ctypes.c_long\nreturn 1 if C.mmap(0, 4096, 3, {}, -1, 0) == -1 else 2"
    assert [run(indented(source.format(flag)))["answer"] for flag in flags.values()] == [1, 2]


@needs_boundary
def test_the_limit_is_on_the_clock():
    start = time.monotonic()
    assert run(indented("time.sleep(99)"), timeout=0.5, layers=())["why"] == "timeout"
    assert time.monotonic() - start < 5


@needs_boundary
def test_a_forged_answer_is_the_programs_own():
    """
    What looks like an answer may be one, never more: one number, of this program, read as strictly as any.
    """
    assert (
        run("def simple_math_problem():\n    print('int 7')\n    print('#### 7')\n    return 8")["answer"]
        == 8
    )
    forged = {
        r"int 8\n": 8,
        r"int 8\nint 9\n": 8,
        r"float nan\n": None,
        r"int 0x8\n": None,
        r"ok\n": None,
        r"\xff\x00\n": None,
    }
    forged |= {"int " + "9" * 600 + r"\n": None}
    for text, expected in forged.items():
        result = run(indented(f"os.write(3, b'{text}')\nos._exit(0)"))
        assert result["answer"] == expected and (result["why"] == "ok") == (expected is not None), (
            f"{text}: {result}"
        )


@needs_boundary
def test_a_forged_reason_is_none():
    """What the launcher decides cannot be written by a program, nor can words of its own."""
    for text in ("timeout", "no sandbox", "no boundary", "too long", "prompt too long", "ok", "all is well"):
        assert run(indented(f"os.write(3, b'{text}\\n')\nos._exit(0)"))["why"] == "killed", text
    for text in ("error: Well done", "error: print", "error: __name__", "error: "):
        assert run(indented(f"os.write(3, b'{text}\\n')\nos._exit(0)"))["why"] == "error: other", text
    named = run(indented("raise B['type']('Prompt_too_long', (B['Exception'],), {})"))
    assert named["why"] == "error: other" and run(indented("1 / 0"))["why"] == "error: ZeroDivisionError"
    half = run(indented("os.write(3, b'int 8')\nwhile True: pass"), timeout=1.0)
    assert (half["why"], half["answer"]) == ("timeout", None), "an answer ends with its line"


RIGHT = [
    ("return 18", 18),
    ("return 18.0", 18),
    ("return 0.1 + 0.2", 0.1 + 0.2),
    ("return 3 * 5.9999999999", 18),
    ("return '1,234'", 1234),
    ("return '$12'", 12),
    ("return '-2.50'", -2.5),
    ("return -7", -7),
    ("print(5)\n    print('so', 18, 'in all')", 18),
    ("print('$1,234.50.')", 1234.5),
    ("print(4)\n    return 'four'", 4),
    ("import math\n    return math.floor(math.pi)", 3),
    ("return math.ceil(2.5)", 3),
    (
        "return sum(range(5)) + len(str(abs(-10))) + max(1, 2) + min(1, 2) + int('3') + round(float('2.2'))",
        20,
    ),
    ("a = [x for i, x in enumerate([1, 2])]\n    return a[1] if bool(a) else 0", 2),
    ("return 5\nprint(simple_math_problem())\nresult = (", 5),
    ("return 5\n\nSo the answer is five.", 5),
    ("return 5\r\n", 5),
    ("'''10 of \"them\"'''\n    return 5", 5),
]


@needs_boundary
def test_honest_programs_are_understood():
    for body, answer in RIGHT:
        result = run("def simple_math_problem():\n    " + body)
        assert (result["answer"], type(result["answer"]), result["why"]) == (answer, type(answer), "ok"), (
            f"{body}: {result}"
        )


def test_a_program_is_found_in_a_text():
    program = "def simple_math_problem():\n    return 7\n"
    assert extract(f"Sure:\n```python\n{program}```\nor\n```\nother\n```") == program
    assert extract(f"```\n{program}") == program, "a fence that nobody closed"
    assert (
        extract(f"Here. {program}<|endoftext|>def more") == program
        and extract(program + "</s>def more") == program
    )
    assert extract(f"<|endoftext|> {program}") == program, "what stands before it does not end it"
    assert extract("It is 7.") == extract("") == ""
    start = time.process_time()
    for long in ("```" * 10**5, "def " * 10**5, "def <|" * 10**5, "```\n" * 10**5):
        extract(long)
    assert time.process_time() - start < 2


def test_equal_means_equal():
    right = [(18, 18), (18.0005, 18), (18, 18.0009), (0.3333, 1 / 3), (-0.0, 0), (10**30, 10**30)]
    wrong = [
        (18, 19),
        (18.0011, 18),
        (None, 18),
        (True, 1),
        ("18", 18),
        (math.nan, 18),
        (math.nan, math.nan),
        (math.inf, math.inf),
    ]
    wrong += [(10**30, 10**30 + 1), (10**400, 1.5), (18, None), (7 + 0j, 7)]
    assert [pair for pair in right if not correct(*pair)] == [] and [
        pair for pair in wrong if correct(*pair)
    ] == []


def test_numbers_are_read():
    golds = {
        "a\n#### 18": 18,
        "#### 1,234": 1234,
        "####-5": -5,
        "#### 2.50": 2.5,
        "#### $3": 3,
        "18": None,
        "#### x": None,
        "#### 1 #### 2": 2,
    }
    assert {text: gold_of(text) for text in golds} == golds
    odd = [
        "",
        "-",
        "$",
        ",",
        ".",
        "1 2",
        "1e999",
        "nan",
        "inf",
        "0x10",
        "1_0",
        "9" * 501,
        "٣",
        "1.2.3",
        "five",
    ]
    assert [text for text in odd if number(text) is not None] == []


@pytest.mark.parametrize("right, n", [(13, 100), (700, 1319), (5, 10)])
def test_the_bootstrap_interval_is_near_the_exact_one(right, n):
    """Clopper and Pearson's: at its ends the chance of so many or more, or so few or fewer, is 2.5 %."""

    def end(fits):
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    choose = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)]
    at_most = lambda k, p: sum(
        math.exp(choose[j] + j * math.log(p) + (n - j) * math.log1p(-p)) for j in range(k + 1)
    )
    low, high = gsm8k.interval([1] * right + [0] * (n - right))
    assert abs(low - end(lambda p: 1 - at_most(right - 1, p) < 0.025)) < 1.5 / n
    assert abs(high - end(lambda p: at_most(right, p) > 0.025)) < 1.5 / n
    assert gsm8k.interval([0] * 5) == (0, 0) and gsm8k.interval([1] * 5) == (1, 1)


def launchers():
    """Process ids of our sandboxes: launchers, and the programs, their forks."""
    found, ours = [], os.path.join(sandbox.HERE, "sandbox.py").encode()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            found += [int(pid)] * (ours in Path(f"/proc/{pid}/cmdline").read_bytes())
        except OSError:  # it has just ended
            pass
    return found


def wait(claim):
    deadline = time.monotonic() + 10
    while not claim():
        assert time.monotonic() < deadline, launchers()
        time.sleep(0.02)


@needs_boundary
@pytest.mark.parametrize("who", ["evaluator", "launcher"])
def test_no_program_survives_its(who):
    """SIGKILL to the evaluator, or to the launcher, ends a program that would go on for a minute."""
    before = set(launchers())
    source = indented("while True: pass")
    evaluator = subprocess.Popen(
        [sys.executable, "-c", f"from lab import sandbox; sandbox.run({source!r}, timeout=60)"], cwd=ROOT
    )
    wait(lambda: len(set(launchers()) - before) == 2)
    os.kill(evaluator.pid if who == "evaluator" else min(set(launchers()) - before), signal.SIGKILL)
    evaluator.wait(10)
    wait(lambda: set(launchers()) <= before)


# ----- the command

# the fifth leaves no room
QUESTIONS = [("ab", 7), ("abc" * 9, 7), ("b", 7), ("ca", 8), ("a" * 32, 7), ("cc", 1), ("", 7)]
ARGV = ["--ckpt=out/toy", "--batch_size=2", "--steps=2", "--device=cpu", "--workers=2"]


@pytest.fixture
def home(project, monkeypatch):
    """
    A tiny random checkpoint and seven questions; whatever it writes is taken for a program that answers 7.
    """
    argv = {
        "n_layers": 1,
        "n_heads": 1,
        "d_model": 8,
        "batch_size": 4,
        "n_eval": 4,
        "max_steps": 1,
        "eval_every": 100,
        "device": "cpu",
    }
    train(TrainConfig(dataset="toy", out_dir="out/toy", seq_len=32, block_sizes={1: 0.5, 4: 0.5}, **argv))
    Path("data/gsm8k").mkdir()
    lines = [json.dumps({"question": q, "answer": f"so #### {gold}"}) for q, gold in QUESTIONS]
    Path("data/gsm8k/test.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(sandbox, "extract", lambda text: "def simple_math_problem():\n    return 7")
    return project


def ask(*flags):
    """python -m lab.gsm8k, in this process."""
    with patch.object(sys, "argv", ["gsm8k.py", *ARGV, *flags]):
        gsm8k.main()


@needs_boundary
def test_killed_and_resumed_it_is_as_if_it_had_not_been(home, capsys, slip):
    ask()
    out, path = capsys.readouterr().out, Path("out/toy/gsm8k.jsonl")
    assert "sandbox: " in out and "arpc, block size 4, 2 steps" in out and "correct 57.1 %" in out
    whole = path.read_text()
    settings, *lines = map(json.loads, whole.splitlines())
    assert [line["index"] for line in lines] == list(range(7)) and "weights" in settings["settings"]
    assert [line["correct"] for line in lines] == [True, True, True, False, False, False, True]
    assert [line["why"] for line in lines] == ["ok"] * 4 + ["prompt too long"] + ["ok"] * 2
    summary = json.loads(Path("out/toy/gsm8k.summary.json").read_text())
    assert summary["n"] == 7 and summary["accuracy"] == 4 / 7 and summary["low"] < 4 / 7 < summary["high"]
    for cut in (len(whole) - 10, len(whole) // 2, whole.index("\n") + 1, 20, 0):
        path.write_text(whole[:cut])
        ask()
        assert path.read_text() == whole, f"killed at byte {cut}"
    ask()
    assert path.read_text() == whole, "nothing is made twice"
    for other in ("--seed=2", "--dtype=bfloat16"):
        assert "--out" in slip(gsm8k.main, argv=[*ARGV, other]) and path.read_text() == whole


@needs_boundary
def test_texts_are_made_in_the_dtype_that_was_asked_for(home, monkeypatch):
    forward, seen = FastTransformer.forward, set()
    watched = lambda *args, **how: (seen.add(torch.is_autocast_enabled("cpu")), forward(*args, **how))[1]
    for flags in ([], ["--dtype=bfloat16", "--out=half.jsonl"]):
        seen.clear()
        watch = lambda *args, **how: (
            restore(*args, **how),
            monkeypatch.setattr(FastTransformer, "forward", watched),
        )[0]
        monkeypatch.setattr(gsm8k, "restore", watch)
        ask(*flags)
        monkeypatch.setattr(FastTransformer, "forward", forward)
        assert seen == {bool(flags)}
    assert json.loads(Path("half.jsonl").read_text().splitlines()[0])["settings"]["dtype"] == "bfloat16"


@needs_boundary
def test_a_signal_stops_it_after_a_batch_and_the_same_command_goes_on(home, capsys, monkeypatch):
    ask("--out=whole.jsonl")
    real = sandbox.run
    stop = lambda *args, **how: (os.kill(os.getpid(), signal.SIGTERM), real(*args, **how))[1]
    monkeypatch.setattr(sandbox, "run", stop)
    with pytest.raises(SystemExit):
        ask()
    assert "SIGTERM: stopped after 2 questions" in capsys.readouterr().out
    monkeypatch.setattr(sandbox, "run", real)
    ask()
    assert Path("out/toy/gsm8k.jsonl").read_text() == Path("whole.jsonl").read_text()


@needs_boundary
def test_a_boundary_that_is_lost_on_the_way_makes_no_answer_wrong(home, monkeypatch, slip):
    ask("--out=whole.jsonl")
    real, calls = sandbox.run, []

    def lost(*args, **how):
        calls.append(1)
        return real(*args, **how) if len(calls) <= 3 else {"answer": None, "why": "no boundary", "layers": ()}

    monkeypatch.setattr(sandbox, "run", lost)
    assert "no boundary any more; 2 questions are in" in slip(gsm8k.main, argv=ARGV)
    monkeypatch.setattr(sandbox, "run", real)
    ask()
    assert Path("out/toy/gsm8k.jsonl").read_text() == Path("whole.jsonl").read_text()


@needs_boundary
def test_slips_end_in_two_lines(home, slip, monkeypatch):
    for argv, says in (
        (["--input=none.jsonl"], "none.jsonl"),
        (["--n=99"], "7 questions"),
        (["--steps=0"], "steps"),
        (["--block_size=3"], "1, 4, not 3"),
        (["--temprature=1"], "temperature"),
        (["--timeout=nan"], "timeout"),
        (["--out=x.txt"], ".jsonl"),
        (["--sampler=arpx"], "arpc"),
        (["--dtype=half"], "dtype cannot be half"),
        (["--ckpt=out/none"], "no checkpoint"),
        (["--input=data/toy/meta.json"], "line 1"),
    ):
        assert says in slip(gsm8k.main, argv=[*ARGV, *argv]), argv
    Path("data/gsm8k/bad.jsonl").write_text('{"question": "a", "answer": "7"}\n')
    assert "####" in slip(gsm8k.main, argv=[*ARGV, "--input=data/gsm8k/bad.jsonl"])
    monkeypatch.setattr(sandbox, "isolation", lambda *_: (False, "no boundary on this machine"))
    assert "--weak_sandbox" in slip(gsm8k.main, argv=ARGV)


def test_where_the_lines_go():
    assert gsm8k.where_to("hf:org/some-model") == "out/org_some-model.gsm8k.jsonl"
    assert gsm8k.where_to("out/tinygsm") == "out/tinygsm/gsm8k.jsonl"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_is_left():
    """Last: after all the above, none of ours is."""
    wait(lambda: not launchers())
