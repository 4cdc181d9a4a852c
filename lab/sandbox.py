"""
What may a stranger's program do? Compute for a few seconds, and say one number. Language models write
programs that nobody has read.

    run(code)           {"answer": a number or None, "why": "ok", "timeout", ...}; threads may call it,
                        several at a time
    isolation()         what holds on this machine: print it
    extract, correct    from a model's text to a program; from its answer to right or wrong

Each program gets a process of its own, and that is the boundary: whatever Python a program gets hold of, the
kernel refuses. Two layers, for root and for ordinary users. Linux (x86-64, aarch64) has both unless its owner
forbids it:

    seccomp      16 system calls: memory, clocks, writing to an open pipe, the end. Neither files nor sockets,
                 nor signals
    namespaces   no network, no other process in sight, and for a file system one empty, read-only folder

seccomp suffices, and no program runs without it unless no layer was asked for. Namespaces are a second wall
behind it. They do not suffice: system calls that need neither files nor sockets remain, shared memory among
them.

Root becomes nobody, and rlimits bound time, memory, files and processes: it may start none, so it leaves none
behind. A program has a session and a session keyring of its own: its signals reach no other process, and it
finds no keys. Python's builtins are restricted too, but only so that programs mean what they meant to others
who measured: that is no boundary, and the tests go around it.

evaluator --stdin: program--> launcher, this file as a script, trusted --fork--> the program, which writes one
line. The launcher ends it when it has answered, when its time is up, and when the evaluator is gone.
"""

import builtins
import math
import os
import re
import signal
import sys
import time
from functools import cache

LAYERS = ("namespaces", "seccomp")
SUFFICES = ("seccomp",)
ENDS = ("answered", "killed", "timeout", "no boundary")  # what the launcher decides
LONGEST = 1 << 20  # bytes of a program
REPLY = 4096  # bytes of what it may say
NOBODY = 65534
KEYCTL = {"x86_64": 250, "aarch64": 219}  # the number of the system call
# linux/sched.h, CLONE_NEW*
USER, PID, NET, MOUNT, IPC, UTS = 0x10000000, 0x20000000, 0x40000000, 0x00020000, 0x08000000, 0x04000000
SYSCALLS = {  # machine: its AUDIT_ARCH, mmap, and what else a program needs
    #          write mprotect munmap brk sigprocmask sigreturn sched_yield mremap madvise futex clocks
    # gettimeofday getrandom exit(s)
    "x86_64": (0xC000003E, 9, (1, 10, 11, 12, 14, 15, 24, 25, 28, 202, 228, 96, 318, 60, 231)),
    "aarch64": (0xC00000B7, 222, (64, 226, 215, 214, 135, 139, 124, 216, 233, 98, 113, 169, 278, 93, 94)),
}


# ----- from text to a program, and from its answer to right or wrong


def extract(text):
    """
    The program in a model's text: its first fenced block, else from the first `def ` on, up to a special
    token; "" without any.
    """
    _, _, block = text.partition("```")[2].partition("\n")  # behind the fence and what it says, "python"
    code = (
        block.partition("```")[0] if block else "def " + text.partition("def ")[2] if "def " in text else ""
    )
    return re.split(r"<\|[^|\n]{1,40}\|>|</s>|\[(?:EOS|SEP|PAD|MASK)\]", code, maxsplit=1)[0]


NUMBER = r"-?\$?\.?[0-9][0-9,]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,3})?"


def number(text):
    """'1,234' or '$12' -> 1234, 12; '2.50' -> 2.5; None for what is no number."""
    text = text.strip()
    if len(text) > 500 or not re.fullmatch(NUMBER, text):
        return None
    text = text.replace("$", "").replace(",", "")
    try:
        return settled(int(text) if re.fullmatch("-?[0-9]+", text) else float(text))
    except ValueError:  # "1,.,"
        return None


def settled(value):
    """
    An int, or a float that is none within 1e-6; None for anything else, and for ints too large to mean an
    answer.
    """
    if type(value) is float and math.isfinite(value):
        return round(value) if abs(value - round(value)) <= 1e-6 else value
    return value if type(value) is int and value.bit_length() < 1500 else None


def gold_of(text):
    """The number behind the #### of a GSM8K answer, or None."""
    return number(text.rpartition("####")[2]) if "####" in text else None


def correct(answer, gold):
    """Equal as ints, or within 1e-3 if either is a float."""
    if type(answer) not in (int, float) or type(gold) not in (int, float):
        return False
    if type(answer) is type(gold) is int:
        return answer == gold
    try:
        return abs(answer - gold) <= 1e-3  # not so for nan and inf
    except OverflowError:  # an int that no float reaches
        return False


# ----- the evaluator's side


def run(code, timeout=5.0, memory_mb=256, layers=LAYERS):
    """
    Call simple_math_problem() of the program `code`, within `timeout` seconds and memory_mb 2^20 bytes.
    Returns
        answer   its value as an int or float (settled), else the last number it printed, else None
        why      ok | no code | no function | no answer | too long | error: KIND | timeout | killed | no
                 boundary | no sandbox. KIND: an exception of Python's own, or "other"
        layers   those that were in force
    Where layers are asked for, nothing runs unless one that suffices holds. Without asking for any, a program
    runs with limits alone.
    """
    import select
    import subprocess

    if not code.strip():
        return {"answer": None, "why": "no code", "layers": ()}
    code = code.encode("utf-8", "replace")  # a lone surrogate becomes "?"
    if len(code) > LONGEST:
        return {"answer": None, "why": "too long", "layers": ()}
    if os.name != "posix":
        return {"answer": None, "why": "no sandbox", "layers": ()}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", os.path.join(HERE, "sandbox.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,
    )
    reply, deadline = b"", time.monotonic() + timeout + 10  # the launcher is trusted, not infallible
    try:
        process.stdin.write(f"{timeout} {memory_mb} {len(code)} {' '.join(layers)}\n".encode() + code)
        process.stdin.flush()  # and open: its end would tell the launcher that we are gone
        out = select.poll()
        out.register(process.stdout, select.POLLIN)
        while len(reply) < 2 * REPLY and out.poll(max(0.0, deadline - time.monotonic()) * 1000):
            if not (some := os.read(process.stdout.fileno(), REPLY)):
                break
            reply += some
    except BrokenPipeError:
        pass
    finally:
        process.kill()
        process.stdout.close()
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass
        process.wait()
    end, held, said, *_ = (reply.decode("ascii", "replace").split("\n") + [""] * 3)[:3]
    if end not in ENDS:
        return {"answer": None, "why": "no sandbox", "layers": ()}  # not even Python began
    answer, why = understood(said) if end == "answered" else (None, end)
    return {"answer": answer, "why": why, "layers": tuple(held.split()[1:])}


def understood(said):
    """(answer, why) of a program's line. It may write what it likes, so only what `answer` says counts."""
    kind, _, value = said.partition(" ")
    if kind in ("int", "float"):
        found = number(value)
        return found, "no answer" if found is None else "ok"
    if kind == "error:":
        error = getattr(builtins, value, None)
        known = isinstance(error, type) and issubclass(error, BaseException)
        return None, said if known else "error: other"
    return None, said if said in ("no code", "no function", "no answer") else "killed"


HERE = os.path.dirname(os.path.abspath(__file__))


@cache
def isolation(layers=LAYERS):
    """(whether there is a boundary, what it is made of)"""
    got = run("def simple_math_problem():\n    return 1", 10.0, layers=layers)
    limits = "limits on time, memory, files and processes"
    if got["why"] == "ok" and got["layers"]:
        what = {
            "namespaces": "namespaces (no network, an empty file system)",
            "seccomp": "seccomp (16 system calls: no files, sockets, processes or signals)",
        }
        return True, ", ".join([*(what[layer] for layer in got["layers"]), limits])
    reason = f"{os.uname().sysname} {os.uname().machine}" if os.name == "posix" else os.name
    return (
        False,
        f"no boundary on this machine ({reason}: {got['why']}), "
        f"at most {limits}: a program can read your files and use the network",
    )


# ----- the launcher's side: a process of its own


def launch():
    """
    Read limits and a program from stdin, run it in a fork, write how it ended and what it said. Ends early if
    stdin does.
    """
    import ctypes
    import resource  # noqa: F401  for `inside`, which may not be able to read files
    import select

    timeout, memory_mb, size, *asked = sys.stdin.buffer.readline().decode().split()
    code = sys.stdin.buffer.read(int(size)).decode()
    libc = ctypes.CDLL(None, use_errno=True)
    layers = [layer for layer in asked if sys.platform == "linux"]
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        if sys.platform == "linux":
            libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, else /proc/self stays root's
    if "namespaces" in layers and not unshared(libc):
        layers.remove("namespaces")
    hear, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(hear)
            inside(libc, code, say, math.ceil(float(timeout)) + 1, int(memory_mb) << 20, asked, layers)
        finally:
            os._exit(1)
    os.close(say)
    ears, said, end, deadline = select.poll(), b"", "killed", time.monotonic() + float(timeout)
    ears.register(hear, select.POLLIN)
    ears.register(0, 0)  # hangs up when the evaluator is gone
    while said.count(b"\n") < 2 and len(said) < REPLY:
        heard = dict(ears.poll(max(0.0, deadline - time.monotonic()) * 1000))
        if not heard or 0 in heard:
            end = "timeout"
            break
        if not (some := os.read(hear, REPLY)):
            break
        said += some
    os.kill(pid, signal.SIGKILL)  # the first process of its namespace: all others there end with it
    os.waitpid(pid, 0)
    held, *lines = said.split(b"\n")  # the first line was there before the program
    held = held if lines else b"held"
    if lines and not enough(asked, held.decode().split()[1:]):
        end = "no boundary"
    elif len(lines) > 1:
        end = "answered"
    os.write(1, end.encode() + b"\n" + held + b"\n" + (lines[0] if end == "answered" else b""))


def enough(asked, held):
    """May a program run, if of the layers `asked` those in `held` are in force?"""
    return not asked or bool(set(held) & set(SUFFICES))


def unshared(libc):
    """
    Leave this process's namespaces; whether the kernel lets us. Its next child is the first process of a new
    world.
    """
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(USER | PID | NET | MOUNT | IPC | UTS) != 0:
        return False
    try:
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {uid} 1"),
            ("gid_map", f"{NOBODY} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w", encoding="utf-8") as f:
                f.write(line)
    except OSError:
        return False
    return True


def nowhere(libc):
    """
    Make an empty read-only folder the whole file system, for this process and its namespace; whether that
    worked.
    """
    bind_flags, empty = 1 | 2 | 4 | 8, b"size=4k,nr_inodes=4,mode=555"  # MS_RDONLY | NOSUID | NODEV | NOEXEC
    return (
        # MS_REC | MS_PRIVATE: what follows is seen here alone
        libc.mount(b"none", b"/", None, 0x44000, None) == 0
        and libc.mount(b"none", b"/proc", b"tmpfs", bind_flags - 1, empty)
        == 0  # any folder that is sure to be there
        and os.chdir("/proc") is None
        and os.mkdir("empty", 0o555) is None
        and libc.mount(b"none", b"/proc", None, 32 | bind_flags, None) == 0  # MS_REMOUNT
        and libc.pivot_root(b".", b".") == 0
        and libc.umount2(b".", 2) == 0  # MNT_DETACH the old one, which lies on top
        and os.chroot("/empty") is None  # who is in a chroot may make no namespaces
        and os.chdir("/") is None
    )


def filtered(libc, ctypes):
    """Allow SYSCALLS, refuse all others with EPERM, for good; whether the kernel does that."""
    if os.uname().machine not in SYSCALLS or sys.maxsize < 1 << 32:
        return False
    arch, mmap, others = SYSCALLS[os.uname().machine]
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x00050001
    # (operation, so many to skip if true, if false, operand), linux/filter.h
    load, equal, any_bit, end = 0x20, 0x15, 0x45, 0x06
    lines = [(load, 0, 0, 4), (equal, 1, 0, arch), (end, 0, 0, kill), (load, 0, 0, 0), (equal, 0, 4, mmap)]
    # shared memory outlives its unmapping in part: it would not count as ours
    lines += [(load, 0, 0, 40), (any_bit, 0, 1, 1), (end, 0, 0, refuse), (end, 0, 0, allow)]
    for syscall in others:
        lines += [(equal, 0, 1, syscall), (end, 0, 0, allow)]
    lines += [(end, 0, 0, refuse)]

    class Line(ctypes.Structure):
        _fields_ = [
            ("code", ctypes.c_ushort),
            ("yes", ctypes.c_ubyte),
            ("no", ctypes.c_ubyte),
            ("k", ctypes.c_uint),
        ]

    class Program(ctypes.Structure):
        _fields_ = [("n", ctypes.c_ushort), ("lines", ctypes.POINTER(Line))]

    program = Program(len(lines), (Line * len(lines))(*lines))
    return libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


# ----- inside: where the program runs


def inside(libc, code, say, seconds, memory, asked, layers):
    """
    Give up all that can be given up, say which layers hold, run the program if they are enough for those that
    were asked for, say its answer. Does not return.
    """
    import ctypes
    import resource

    os.setsid()  # a signal to its process group reaches itself alone
    if sys.platform == "linux":
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.uname().machine in KEYCTL:
            libc.syscall(KEYCTL[os.uname().machine], 1, None)  # KEYCTL_JOIN_SESSION_KEYRING, a new one
    null, held = os.open("/dev/null", os.O_RDWR), []
    say = os.dup2(say, 63)
    for fd in range(3):
        os.dup2(null, fd)
    os.closerange(3, 63)
    say = os.dup2(say, 3)
    os.close(63)
    try:
        held += ["namespaces"] * ("namespaces" in layers and nowhere(libc))
    except OSError:
        pass
    kinds = {
        "CPU": seconds,
        "AS": memory,
        "DATA": memory,
        "FSIZE": 0,
        "NOFILE": 4,
        "NPROC": 1,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    for kind, most in kinds.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, most))
        except (AttributeError, ValueError, OSError):  # macOS lacks some
            pass
    if sys.platform == "linux":
        head, none = (ctypes.c_uint * 2)(0x20080522, 0), (ctypes.c_uint * 6)()
        privileges = libc.capset(head, none) == 0 and libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
        held = held if privileges else []
        held += ["seccomp"] * (privileges and "seccomp" in layers and filtered(libc, ctypes))
    os.write(say, f"held {' '.join(held)}\n".encode())
    if enough(asked, held):
        try:
            said = answer(code)
        except BaseException as e:  # SystemExit, MemoryError, RecursionError, and whatever a program makes up
            said = f"error: {type(e).__name__}"
        os.write(say, said.encode("ascii", "replace")[:1000] + b"\n")
    os._exit(0)


class Tail:
    """The end of what was printed."""

    text = ""

    def write(self, text):
        self.text = (self.text + text)[-REPLY:]

    def flush(self):
        pass


def parsed(code):
    """The program compiled, or of one that does not parse the lines before the one that fails."""
    lines = code.replace("\r\n", "\n").split("\n")
    while lines:
        try:
            return compile("\n".join(lines), "program", "exec", dont_inherit=True)
        except SyntaxError as e:
            del lines[max(0, min(len(lines), e.lineno or 0) - 1) :]  # at least the last one


def answer(code):
    """
    'int 42', 'float 0.5', or why there is none. It runs beside the program, so it is as honest as that: a lie
    about its own answer.
    """
    printed = Tail()

    def load(name, *_):
        if name != "math":
            raise ImportError(name)
        return math

    names = (abs, min, max, sum, len, range, enumerate, int, float, str, bool, round)
    builtins = {f.__name__: f for f in names} | {
        "__import__": load,
        "print": lambda *values, **how: print(*values, **how | {"file": printed}),
    }
    program, scope = parsed(code), {"__builtins__": builtins, "__name__": "__main__", "math": math}
    if program is None:
        return "no code"
    exec(program, scope)
    if "simple_math_problem" not in scope:
        return "no function"
    value = scope["simple_math_problem"]()
    value = number(value) if type(value) is str else settled(value)
    if value is None and (found := re.findall(NUMBER, printed.text)):
        value = number(found[-1])
    return "no answer" if value is None else f"{type(value).__name__} {value!r}"


if __name__ == "__main__":
    print(__doc__) if sys.argv[1:] else launch()
