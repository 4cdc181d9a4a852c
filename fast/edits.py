"""
Was the lesson edited? In its files, in memory (`model.rotate = mine`), or on one network (`net.norm = mine`).

    fingerprint    of the code that a part of the lesson runs, as its files have it
    edited         why a part is not what a fast form was written for
    unusual        what a network has that model.py did not give it
    guard          the same later on: an edit made after fast.accelerate is an error

The lesson is four files: model.py, diffusion.py, generate.py and rng.py. A part of it is some functions and
classes, and everything that these mention.
"""

import ast
import builtins
import functools
import hashlib
import inspect
import io
import tokenize
import types

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import diffusion
import generate
import model
import rng

PARTS = {  # part -> where its code begins: (module, name)
    "model.py": [("model", "Transformer")],
    "diffusion.py": [("diffusion", name) for name in ("NoiseProcess", "Masked", "Uniform", "token_loss")],
    "generate.Block": [("generate", "Block")],
}
LESSON = {"model": model, "diffusion": diffusion, "generate": generate, "rng": rng}
ABSENT = object()


# ----- the files


class Sources:
    """The lesson as its files have it: their text, and a second copy of each module, for comparison."""

    def __init__(self, text):
        self.text, self.modules, self.code, self.nodes = text, {}, {}, {}
        for name in LESSON:
            self.load(name)

    def load(self, name):
        """The second copy of a module. What it imports of the lesson are second copies too."""
        if name in self.modules:
            return self.modules[name]
        source, file = self.text[name], inspect.getsourcefile(LESSON[name])
        fresh = self.modules[name] = types.ModuleType(name)
        importing = lambda other, *how: self.load(other) if other in LESSON else __import__(other, *how)
        vars(fresh)["__builtins__"] = vars(builtins) | {"__import__": importing}
        exec(compile(source, file, "exec", dont_inherit=True), vars(fresh))
        self.code[name], tree = code_of(source)
        for node in tree.body:
            for target in getattr(node, "targets", [getattr(node, "target", node)]):
                named = getattr(target, "id", getattr(target, "name", None))
                self.nodes[name, named] = node
        return fresh

    def reach(self, part):
        """The places (module, name) of all that a part's code mentions, and of what that mentions in turn."""
        places, todo = [], list(PARTS[part])
        while todo:
            place = module, name = todo.pop()
            if module not in LESSON or name not in vars(self.modules[module]) or place in places:
                continue
            places.append(place)
            value = vars(self.modules[module])[name]
            home = getattr(value, "__module__", None)
            if home not in LESSON or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            todo.append((home, value.__name__))
            todo += [(base.__module__, base.__name__) for base in getattr(value, "__bases__", ())]
            mentioned = set().union(*(names(f.__code__) for f in functions(value)))
            imported = {other for other in mentioned & LESSON.keys() if other in vars(self.modules[home])}
            todo += [(other, k) for other in {home} | imported for k in mentioned]
        return sorted(places)

    def fingerprint(self, part):
        digest = hashlib.sha256()
        for module, name in self.reach(part):
            node = self.nodes.get((module, name))
            if node is None or isinstance(node, (ast.Import, ast.ImportFrom)):
                continue  # from another file: if that is the lesson's, it is among these places too
            first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", ())])
            digest.update("".join([name, ":", *self.code[module][first - 1 : node.end_lineno]]).encode())
        return digest.hexdigest()[:12]


def code_of(source):
    """
    (lines, syntax tree) of a source. The lines are without comments, docstrings and white space, but each
    statement begins with the column it stands in: where a line belongs is code.
    """
    lines, tree = source.splitlines(), ast.parse(source)
    starts, docstrings = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            starts[node.lineno] = f"\n{node.col_offset} "
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        text = first.value if isinstance(first, ast.Expr) else None
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            docstrings |= set(range(first.lineno, first.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    lines = ["".join(line.split()) for line in lines]
    return ["" if i in docstrings else starts.get(i, "") + line for i, line in enumerate(lines, 1)], tree


MADE = []


def sources():
    """The Sources now; made anew when a file has changed."""
    text = {name: inspect.getsource(module) for name, module in LESSON.items()}
    if not MADE or MADE[0].text != text:
        MADE[:] = [Sources(text)]
    return MADE[0]


def fingerprint(part):
    """Twelve letters for the code of a part. Comments, docstrings, spaces and line breaks do not count."""
    return sources().fingerprint(part)


def functions(value):
    """The functions that a function, a property or a class is made of."""
    if inspect.isclass(value):
        return [f for k, x in vars(value).items() if inherent(k, x) for f in functions(x)]
    if isinstance(value, property):
        return [f for x in (value.fget, value.fset, value.fdel) if x is not None for f in functions(x)]
    if isinstance(value, (staticmethod, classmethod)):
        return functions(value.__func__)
    value = inspect.unwrap(value) if callable(value) else value
    return [value] if inspect.isfunction(value) else []


def names(code):
    """Every name that code mentions, of globals and attributes alike."""
    inner = (names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


def inherent(name, value):
    """Is this entry of a class what it does? Python keeps notes there too, under names like __slotnames__."""
    special = name.startswith("__") and name.endswith("__")
    return not special or callable(value) and not inspect.isclass(value)


# ----- the memory


def same(live, fresh):
    """Is what is in memory what the second copy has?"""
    if inspect.ismodule(fresh):
        return live is LESSON.get(fresh.__name__, fresh)
    if inspect.isclass(fresh) and fresh.__module__ in LESSON:
        return inspect.isclass(live) and same_class(live, fresh)
    if type(live) is not type(fresh):
        return False
    if inspect.isfunction(fresh):
        return all(same(getattr(live, k, None), getattr(fresh, k, None)) for k in OF_FUNCTIONS)
    if isinstance(fresh, property):
        return all(same(getattr(live, k), getattr(fresh, k)) for k in ("fget", "fset", "fdel"))
    if isinstance(fresh, (staticmethod, classmethod)):
        return same(live.__func__, fresh.__func__)
    if isinstance(fresh, (tuple, list)):
        return len(live) == len(fresh) and all(map(same, live, fresh))
    if isinstance(fresh, dict):
        return live.keys() == fresh.keys() and all(same(live[k], fresh[k]) for k in fresh)
    return live is fresh or bool(live == fresh)


OF_FUNCTIONS = ("__code__", "__defaults__", "__kwdefaults__", "__wrapped__")


def same_class(live, fresh):
    if [cls.__qualname__ for cls in live.__mro__] != [cls.__qualname__ for cls in fresh.__mro__]:
        return False
    ours, want = ({k: x for k, x in vars(cls).items() if inherent(k, x)} for cls in (live, fresh))
    return ours.keys() == want.keys() and all(same(ours[k], want[k]) for k in want)


MODULES = nn.Module, nn.Embedding, nn.Linear, nn.LayerNorm, nn.GELU, nn.SiLU, nn.Dropout, nn.Sequential
CALLS = {"__call__", "_call_impl", "_wrapped_call_impl", "forward"}


def foreign(value):
    """Is this, in PyTorch, a function that is not PyTorch's?"""
    itself = inspect.isfunction(value) or inspect.isclass(value)
    home = (value if itself else type(value)).__module__ or ""
    ours = ("torch", "builtins", "typing", "functools", "pybind11_builtins", "enum")
    return callable(value) and home.partition(".")[0] not in ours


OURS = {"block_class", "token_loss", "graphs", "watch"}  # what fast/ and sample.py put on a network
SIDE = {"__slotnames__", *OURS}  # that, and what Python puts on a class whose objects were copied


def size(holder):
    return len(holder) - sum(k in holder for k in SIDE)


class Watch:
    """What something was when it was looked at. `changed` names the first thing that is not so any more."""

    def __init__(self):
        self.entries, self.codes, self.sizes, self.kinds, self.empty = [], [], [], [], []

    def note(self, holder, key, value, name):
        """holder, a dict, has this very value; and functions in it have their code."""
        self.entries.append((holder, key, value, name))
        self.codes += [(f, f.__code__, name) for f in functions(value) if not inspect.isclass(value)]

    def note_size(self, holder, name):
        self.sizes.append((holder, len(holder), size(holder), name))

    def changed(self):
        for holder, key, value, name in self.entries:
            if holder.get(key, ABSENT) is not value:
                return name
        for f, code, name in self.codes:
            if f.__code__ is not code:
                return name
        for holder, n, own, name in self.sizes:
            if len(holder) != n and size(holder) != own:
                return name
        for x, cls, name in self.kinds:
            if type(x) is not cls:
                return name
        return next((name for holder, name in self.empty if holder), "")

    def __deepcopy__(self, memo):
        """A copy of a network is another one, to be looked at anew."""
        return None

    def __reduce__(self):
        return type(None), ()


def watch_part(places):
    """A Watch of a part of the lesson, and of what it calls of PyTorch. places: of Sources.reach."""
    watch, mentioned = Watch(), set()
    for module, name in places:
        value, title = vars(LESSON[module])[name], f"{module}.{name}"
        watch.note(vars(LESSON[module]), name, value, title)
        if getattr(value, "__module__", None) not in LESSON:
            continue
        mentioned |= set().union(*(names(f.__code__) for f in functions(value)))
        if inspect.isclass(value):
            watch.note_size(vars(value), title)
            for k, x in vars(value).items():
                if inherent(k, x):
                    watch.note(vars(value), k, x, f"{title}.{k}")
    modules = MODULES if ("model", "nn") in places else ()
    for owner in (torch, F, torch.Tensor, *modules):
        for k in sorted((CALLS if owner in modules else mentioned) & vars(owner).keys()):
            watch.note(vars(owner), k, vars(owner)[k], f"PyTorch's {owner.__name__.split('.')[-1]}.{k}")
    return watch


WATCHES = {}  # part -> its Watch, once it was found to be as written


def edited(part, written_for):
    """
    Why a part is not what its fast form was written for, in a few words; '' if it is.
    written_for: its fingerprint then.
    """
    if part in WATCHES:
        return said(WATCHES[part].changed())
    try:
        files = sources()
        if files.fingerprint(part) != written_for:
            return f"{part} was edited"
        for module, name in files.reach(part):
            if not same(vars(LESSON[module]).get(name, ABSENT), vars(files.modules[module])[name]):
                return said(f"{module}.{name}")
    except (OSError, TypeError, SyntaxError):  # no source, as in a frozen program, or half a file
        return f"the source of {part} cannot be read"
    watch = watch_part(files.reach(part))
    for _, _, value, name in watch.entries:
        if name.startswith("PyTorch") and foreign(value):
            return said(name)
    WATCHES[part] = watch
    return ""


def said(name):
    return f"{name} was replaced" if name else ""


# ----- a network

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PRIVATE = vars(nn.Module()).keys()  # what every module has


def attributes(module):
    """What a module says of itself beside its parts: widths, eps, ..."""
    aside = {"training", "cfg", *OURS}
    return {k: x for k, x in vars(module).items() if not k.startswith("_") and k not in aside}


def shapes(module):
    return {k: None if p is None else tuple(p.shape) for k, p in module._parameters.items()}


def called(name):
    """Is this a module that the fast network calls as it finds it?"""
    return name.startswith("time.") or name.rpartition(".")[2] in ("time", "modulation", "dropout")


class Undrawn(TorchFunctionMode):
    """Weights keep what they are: drawing on the meta device would load the compiler."""

    def __torch_function__(self, f, types, args=(), kwargs=None):
        if getattr(f, "__module__", "") == "torch.nn.init":
            return (*args, *(kwargs or {}).values())[0]
        return f(*args, **(kwargs or {}))


@functools.cache
def reference(facts):
    """{name: (type, attributes, shapes)} of the modules that model.py makes of a config; facts: its items."""
    with torch.device("meta"), Undrawn():
        net = model.Transformer(model.ModelConfig(**dict(facts)))
    return {name: (type(x), attributes(x), shapes(x)) for name, x in net.named_modules()}


def kind(module):
    """A module's class; of a fast one the lesson's."""
    cls = type(module)
    return cls.__base__ if cls.__module__ == "fast.network" else cls


def unusual(net, running=False):
    """
    What a network has that model.py did not give it, in a few words; '' if nothing.
    running: it is fast already. What fast/ calls as it finds it may then be anything.
    """
    if any(getattr(nn.modules.module, f"_global{hooks}") for hooks in HOOKS):
        return "there is a hook for all modules"
    if type(net.cfg) is not model.ModelConfig:
        return f"its config is a {type(net.cfg).__name__}"
    want = reference(tuple((name, getattr(net.cfg, name)) for name in net.cfg.__dataclass_fields__))
    found = dict(net.named_modules())
    for name in found.keys() | want.keys():
        if running and called(name):
            continue
        if name not in found or name not in want:
            return f"{name} is {'gone' if name in want else 'new'}"
        if why := odd(found[name], *want[name], running):
            return f"{name or 'the network'} {why}"
    return ""


def odd(module, its_kind, its_attributes, its_shapes, running):
    """What is unusual about one module, in a few words; '' if nothing."""
    if kind(module) is not its_kind:
        return f"is a {type(module).__name__}"
    if any(getattr(module, hooks) for hooks in HOOKS):
        return "has hooks"
    mine = vars(module)
    for k, x in its_attributes.items():
        if mine.get(k, ABSENT) != x:
            return f"has another {k}"
    by_name = running and type(module).__module__ == "fast.network"  # it calls its own methods by their names
    for k in mine.keys() - PRIVATE - its_attributes.keys() - OURS:
        if hasattr(type(module), k) and not (by_name and k in vars(type(module))):
            return f"has its own {k}"
    if shapes(module) != its_shapes or module._buffers:
        return "has other weights"
    plain = all(type(p) in (nn.Parameter, type(None)) for p in module._parameters.values())
    return "" if plain or running else "has weights of another kind"


# ----- later on


def watch_net(net):
    """A Watch of a network, which keeps it itself."""
    watch = vars(net)["watch"] = Watch()
    for name, module in net.named_modules():
        if called(name):
            continue
        name = name or "the network"
        watch.note_size(vars(module), name)
        watch.kinds.append((module, type(module), name))
        watch.empty += [(getattr(module, hooks), name) for hooks in HOOKS]
        watch.entries += [(vars(module), k, x, name) for k, x in attributes(module).items()]
        parts, weights = module._modules, module._parameters
        watch.entries += [(parts, k, x, name) for k, x in parts.items() if not called(k)]
        watch.entries += [(weights, k, x, name) for k, x in weights.items() if x is None]
    watch.empty += [(getattr(nn.modules.module, f"_global{hooks}"), "any module") for hooks in HOOKS]


def guard(part, net=None):
    """Raise RuntimeError if a part, or a fast network, was edited after fast.accelerate looked at it."""
    if torch.compiler.is_compiling() or part not in WATCHES:  # made fast by hand, as a test does
        return
    why = said(WATCHES[part].changed())
    if not why and type(net).__module__ == "fast.network":  # FSDP's class is another, and has hooks
        watch = vars(net).get("watch")
        if watch is None or watch.changed():
            why = unusual(net, running=True)
            watch_net(net)
    if why:
        raise RuntimeError(
            f"{why} after fast.accelerate, which would not see it. "
            "Call fast.accelerate(model, process) again, "
            "or load the network with plain=True (--plain): then what you wrote is what runs"
        )
