"""
What would a GPU refuse, and what would the host wait for? A device in name only, for machines that have none:

    with Pretended() as gpu:
        x = x.to(gpu.device)  # its numbers stay here
    gpu.waits  # Counter of ("nonzero", "diffusion.py: line 330")

An operation on tensors of both devices is an error, as on CUDA (numbers of no dimension and indices may come
from the host), and what makes the host wait is noted: a value or a shape that depends on values (item,
nonzero, a mask as an index), a copy to the host, and a copy to the device that is not non_blocking. No
kernels, streams or autocast. torch calls the way to have such a device experimental.
"""

import collections
import functools
import os
import sys

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CODE = {
    ROOT,
    *(os.path.join(ROOT, folder) for folder in ("data", "fast", "lab", "methods", "run", "samplers")),
}
ASKS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::_unique2",
}
INDEXES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Far(torch.Tensor):
    """A tensor that says it is on the device."""

    @staticmethod
    def __new__(cls, here):
        x = torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device="gpu:0",
        )
        x.here = here
        return x

    def __repr__(self):
        return f"Far({self.here})"

    def tolist(self):  # a wrapped tensor has none
        Pretended.now.wait("tolist")
        return self.here.tolist()

    def data_ptr(self):
        return self.here.data_ptr()

    def __reduce_ex__(self, protocol):
        return self.here.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None):
        raise RuntimeError(f"{f} on the device, outside of Pretended")

    __torch_function__ = torch._C._disabled_torch_function_impl


def near(x):
    """A tensor's numbers; of lists and dicts of tensors too."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(near, x))
    return x.here if isinstance(x, Far) else {k: near(y) for k, y in x.items()} if isinstance(x, dict) else x


def leaves(x):
    return (
        [z for y in x for z in leaves(y)]
        if isinstance(x, (list, tuple))
        else [x]
        if torch.is_tensor(x)
        else []
    )


def away(x):
    return Far(x) if torch.is_tensor(x) else type(x)(map(away, x)) if isinstance(x, (list, tuple)) else x


@functools.cache
def aliases(f):
    """Whether what f returns may be, or be a view of, what it was given."""
    return any(a.alias_info is not None for a in f._schema.arguments)


class Pretended(TorchDispatchMode):
    now = None

    def __init__(self):
        super().__init__()
        self.device, self.waits = torch.device("gpu", 0), collections.Counter()

    def __enter__(self):
        Pretended.now = self
        super().__enter__()
        return self

    def __exit__(self, *error):
        Pretended.now = None
        return super().__exit__(*error)

    def wait(self, why):
        """Note a wait, with the line of this project that caused it."""
        frame = sys._getframe()
        while frame and os.path.dirname(frame.f_code.co_filename) not in CODE:
            frame = frame.f_back
        self.waits[
            why, f"{os.path.basename(frame.f_code.co_filename)}: line {frame.f_lineno}" if frame else ""
        ] += 1

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, f._schema.name
        tensors = leaves([*args, *kwargs.values()])
        far = [x for x in tensors if isinstance(x, Far)]
        device = kwargs.get("device")
        to = ("gpu" if far else "cpu") if device is None else torch.device(device).type
        if name == "aten::copy_":
            to = "gpu" if isinstance(args[0], Far) else "cpu"
            if (
                to == "gpu"
                and not isinstance(args[1], Far)
                and not (args[2:] or [kwargs.get("non_blocking")])[0]
            ):
                self.wait("copy")
            if to == "cpu" and far:
                self.wait("copy")
        elif name == "aten::_to_copy":
            if to == "gpu" and not far and not kwargs.get("non_blocking") or to == "cpu" and far:
                self.wait("copy")
        elif far and len(far) < len(tensors):
            numbers = all(x.dim() == 0 for x in tensors if not isinstance(x, Far))
            if name in INDEXES and isinstance(args[0], Far):
                self.wait("an index from the host")
            elif not numbers or torch.Tag.pointwise not in f.tags:
                raise RuntimeError(
                    f"{f} of tensors on two devices: "
                    + ", ".join(f"{x.device} {tuple(x.shape)}" for x in tensors)
                )
        if far and (
            name in ASKS or name in INDEXES and any(i is not None and i.dtype == torch.bool for i in args[1])
        ):
            self.wait(name.removeprefix("aten::"))

        out = f(*near(args), **near(kwargs | ({"device": torch.device("cpu")} if device is not None else {})))
        if to != "gpu" or name in ASKS - {"aten::nonzero", "aten::masked_select", "aten::_unique2"}:
            return out
        return return_and_correct_aliasing(f, args, kwargs, away(out)) if aliases(f) else away(out)


def copy_from(source, target, non_blocking=False):
    if not non_blocking and Pretended.now:
        Pretended.now.wait("copy")
    near(target).copy_(near(source))
    return target


# torch hears of the device now, before the first backward of the process, and of what it runs beneath every
# mode (torch.tensor does)
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
if AVAILABLE:
    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    backend_registration._setup_privateuseone_for_python_backend("gpu", module)
    library = torch.library.Library("aten", "IMPL")
    library.impl(
        "empty_strided",
        lambda size, stride, dtype=None, **_: Far(torch.empty_strided(size, stride, dtype=dtype)),
        "PrivateUse1",
    )
    library.impl(
        "empty.memory_format",
        lambda size, dtype=None, **_: Far(torch.empty(size, dtype=dtype)),
        "PrivateUse1",
    )
    library.impl("_copy_from", copy_from, "PrivateUse1")
