"""
What does it run on? A device and a dtype; one process, or as many as torchrun started, on one machine or
several.

    pick_device, pick_dtype     with the reason, which the first line of a run prints
    join, total                 the processes find each other, and add up numbers
    shard, gather_full_state, share         one network on all of them, each with a share of every tensor:
                                            FSDP2
    guard, Signals              what a machine does to a run: no memory, no disk; "stop now"
"""

import ctypes
import os
import signal
import socket
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

import kernels
from run import cli
from run.cli import die, said


def pick_device(name):
    """(device, why)"""
    if name not in ("auto", "cpu", "cuda", "mps") and not name.startswith("cuda:"):
        die(f"device {name!r} is none of auto, cpu, cuda, mps", "--device=auto")
    if (
        name.startswith("cuda")
        and not torch.cuda.is_available()
        or name == "mps"
        and not torch.backends.mps.is_available()
    ):
        die(f"no {name} device on this machine", "--device=cpu")
    if torch.cuda.is_available() and name in ("auto", "cuda"):
        if (mine := int(os.environ.get("LOCAL_RANK", 0))) >= torch.cuda.device_count():
            die(
                f"process {mine} of this machine has no GPU, there are {torch.cuda.device_count()}",
                "torchrun --nproc_per_node=gpu",
            )
        return torch.device("cuda", mine), "one a process"
    if name.startswith("cuda:") and (
        not name[5:].isdecimal() or int(name[5:]) >= torch.cuda.device_count() or "LOCAL_RANK" in os.environ
    ):
        die(
            f"{name}: there are {torch.cuda.device_count()} GPUs, "
            "and under torchrun each process takes its own",
            "--device=cuda",
        )
    if name != "auto":
        return torch.device(name), "as asked"
    return (
        (torch.device("mps"), "found one")
        if torch.backends.mps.is_available()
        else (torch.device("cpu"), "no GPU found")
    )


def runs_on(device):
    """What the losses and draws of kernels.py and draws.py run on, and why, for the first line of a run."""
    return "losses and draws: {} ({})".format(*kernels.path(device))


def pick_dtype(name, device, n_params):
    """(dtype of the forward, why)"""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "cuda":
        return (
            (torch.bfloat16, "the GPU has it")
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else (torch.float32, "no bfloat16 on this GPU")
        )
    if device.type == "cpu" and n_params > 2e6 and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, "the CPU has it, and the model is large enough to gain"
    return torch.float32, "small model or no fast bfloat16"


@contextmanager
def mixed(device, dtype):
    """
    A forward in dtype by autocast; in float32 as it is. What stays float32 (model.py: the head, soft tokens)
    then reads TF32 on a GPU, 10 bits of every factor where all other products read bfloat16's 8, and adds up
    float32. Of a training step the head would otherwise take longer than all layers. The price, emulated at V
    = 5000: a term of the uniform bound is off by up to 3e-3 nats at alpha = 0.5, 0.06 at 0.99, their mean by
    less than 1e-4. Validation and likelihoods do not come this way, texts only if asked to (--dtype).
    """
    if dtype == torch.float32:
        yield
        return
    fast = device.type == "cuda" and torch.get_float32_matmul_precision() == "highest"
    if fast:
        torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast(device.type, dtype):
            yield
    finally:
        if fast:
            torch.set_float32_matmul_precision("highest")


# ----- memory


def peak_mb(device):
    """The most memory so far, in 2^20 bytes: of tensors on a CUDA device, of the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "linux":  # not getrusage, which begins with what the parent process once held
        return (
            int(
                next(
                    line.split()[1]
                    for line in open("/proc/self/status", encoding="utf-8", errors="replace")
                    if line.startswith("VmHWM")
                )
            )
            / 2**10
        )
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def has_memory(device):
    """Bytes the device has in all; of a CPU, what the system or the container gives this process."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="utf-8") as f:
            return min(here, int(f.read()))
    except (OSError, ValueError):  # another system, or "max"
        return here


@contextmanager
def guard(fix):
    """
    Around a command: what the machine refuses, memory or a file, ends in two lines; Ctrl-C, or a reader who
    has gone (`| head`), ends it without a word. fix: the flags that need less memory. Without a GPU the
    process may not ask for more memory than there is: Linux promises it, and then kills without a word.
    """
    limit = None
    if sys.platform == "linux" and not torch.cuda.is_available():
        import resource

        limit = resource.getrlimit(resource.RLIMIT_DATA)
        here = has_memory(torch.device("cpu"))
        resource.setrlimit(resource.RLIMIT_DATA, (here if limit[0] < 0 else min(here, limit[0]), limit[1]))
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:
        cli.unheard(sys.stdout), cli.unheard(sys.stderr)
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OverflowError as e:
        die(f"a number is too large: {said(e)}", "a smaller one")
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        # of many kinds, cuBLAS and the CPU's among them
        says = ("out of memory", "allocate memory", "bad_alloc", "alloc_failed")
        if (
            isinstance(e, RuntimeError)
            and not isinstance(e, torch.OutOfMemoryError)
            and not any(s in str(e).lower() for s in says)
        ):
            raise
        die(f"out of memory: {said(e)}", fix)
    except OSError as e:
        die(said(e), "another path, or room on the disk")
    finally:
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, limit)


# ----- processes


def join(device, backend, timeout):
    """
    Meet the other processes; (rank, world). Without torchrun (0, 1). backend: nccl, gloo, ..., or auto.
    timeout, in seconds: who waits longer for another process ends.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # PR_SET_PDEATHSIG: a launcher that is killed leaves no one behind
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:  # nor one that was killed before this line
            socket.create_connection(
                (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=30
            ).close()
        except OSError as e:
            die(f"rank {rank} of {world}: torchrun does not answer: {said(e)}", "start torchrun again")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        # numbers the host needs to know go by gloo: the host would wait for a GPU that it should keep busy
        name = (
            (backend if backend != "auto" else "gloo")
            if device.type != "cuda"
            else f"cpu:gloo,cuda:{backend.replace('auto', 'nccl')}"
        )
        try:
            dist.init_process_group(name, timeout=timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as e:
            die(
                f"rank {rank} of {world} met no others by {name}: {said(e)}",
                "--backend=gloo, or see torchrun --help",
            )
    return rank, world


def total(*numbers, op="SUM"):
    """
    Python numbers, added up (op SUM), or the largest (MAX), over all processes: a list, the same for all.
    """
    if not dist.is_initialized():
        return list(numbers)
    numbers = torch.tensor(numbers, dtype=torch.float64)  # counts are exact up to 2^53
    dist.all_reduce(numbers, getattr(dist.ReduceOp, op))
    return numbers.tolist()


def shard(device, *models):
    """
    FSDP2 (`fully_shard`; arXiv 2304.11277 is its forerunner), in place: every process holds a share of each
    tensor, a layer is whole only while it computes (under bfloat16, a copy of it until its backward), and
    gradients are means over the processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for model in models:
        trained = any(p.requires_grad for p in model.parameters())
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        # else no backward would come and reshard it
        fully_shard(model, mesh=mesh, reshard_after_forward=None if trained else True)
        model.requires_grad_(trained)


@contextmanager
def without_sync(forward):
    """Gradients stay where they are, to be added to: all but the last forward of a step."""
    if hasattr(forward, "no_sync"):  # DDP
        with forward.no_sync():
            yield
    elif hasattr(forward, "set_requires_gradient_sync"):  # FSDP2
        forward.set_requires_gradient_sync(False)
        yield
        forward.set_requires_gradient_sync(True)
    else:
        yield


def gather_full_state(tree, keep):
    """
    Nested dicts and lists with every sharded tensor whole, on the CPU: what a file holds. All must ask; who
    does not `keep` has none.
    """
    gather = lambda x: x.full_tensor().cpu() if keep else x.full_tensor().new_zeros(0)
    return tree_map(lambda x: gather(x) if hasattr(x, "full_tensor") else x, tree)


def share(tensor, like):
    """This process's share of a whole tensor, sharded as `like` is; the tensor itself if that is not."""
    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # no rank sends: all have read the file. clone: a share that is a view would keep the whole
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    ).clone()


def leave(code):
    """
    End this process now. The others may be dead or waiting, so nothing is taken down in order: that might
    never end.
    """
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


class Signals:
    """
    with Signals() as signals: SIGTERM, SIGINT and SIGHUP (unless ignored, as under nohup) do not end the
    process. signals.name is then the last one's name, and the training loop stops after its step and saves.
    While signals.at_once is set, they raise KeyboardInterrupt. Nor does it end when nobody reads what it
    prints any more.
    """

    name, at_once = None, False

    def __enter__(self):
        self.streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = map(cli.Unbroken, self.streams)
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            heard = [signal.SIGTERM, signal.SIGINT] + [signal.SIGHUP] * (
                signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
            )
            self.before = {s: signal.signal(s, self.hear) for s in heard}
        return self

    def hear(self, number, frame):
        self.name = signal.Signals(number).name
        if self.at_once:
            self.at_once = False  # once: a second one must not hit who cleans up
            raise KeyboardInterrupt

    def __exit__(self, *_):
        sys.stdout, sys.stderr = self.streams
        for number, handler in self.before.items():
            signal.signal(number, handler)
