"""
What is a method? A system of the literature in one file here, and everything about it is there: a noise
process, a loss, a network, a way to train, or several of these with their samplers.

A file methods/NAME.py is taken by `train.py --method NAME`. Its docstring says what changes, the equation and
the paper. It may define

    Settings      a dataclass: flags of its own, beside those of train.py
    DEFAULTS      {setting: value} of train.py, or a function of the Settings that returns it: where the user
                  says nothing
    INHERITS      settings that come from the run of --init_from too, where the user says nothing
    FIXED         settings that a resumed run cannot change
    check         (cfg, settings): refuses settings that cannot work (run.cli.die: what is wrong, what helps)
    begin         (settings, state): what the checkpoint of --init_from settles, before `check`
    network       (model_cfg, settings) -> a Transformer, or a subclass
    process       (cfg, settings, vocab_size) -> a NoiseProcess; vocab_size counts no mask
    Learner       a subclass of Learner below: the loss at a step, the batches, modules and state of its own
    bound         (model, process, x0, block_size, t, ...) -> (total, per_token) in nats: eval.py uses it in
                  place of diffusion.token_loss
    samplers      decorated with generate.sampler, as in samplers/
    ROWS          what lab/zoo.py trains and compares: the claim, and the control

The checkpoint remembers the name and the settings; sample.py and eval.py find them there.
"""

import difflib
import importlib
from pathlib import Path

from run.cli import die


def names():
    """The methods there are."""
    return sorted(f.stem for f in Path(__file__).parent.glob("[a-z]*.py"))


def load(name, flag="--method"):
    """The module of a method, or None for no name. Exits with two lines on a name that is none, of flag."""
    if not name:
        return None
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        die(
            f"no method named {name!r}, only {', '.join(names())}",
            f"{flag} {near[0] if near else names()[0]}",
        )
    return importlib.import_module(f"methods.{name}")


def settings_of(method, values):
    """A method's Settings from {name: value}, or None."""
    return method.Settings(**values) if hasattr(method, "Settings") else None


def folder_of(ckpt):
    """The folder of a run that --ckpt names, by folder or by a file in it."""
    folder = ckpt.rstrip("/")
    return folder.rpartition("/")[0] or "out/run" if folder.endswith(".pt") else folder


class Learner:
    """
    What a method may change of training. This one changes nothing: it is training without a method.
    cfg: a TrainConfig. settings: the method's own, or None. token_loss: diffusion.token_loss, or the fast
        one, which is called alike.
    data: the Dataset, from the first step on; its `checker` says what is right, or is None
    """

    data = None

    def __init__(self, cfg, settings, model, process, token_loss):
        self.cfg, self.settings, self.model, self.process, self.token_loss = (
            cfg,
            settings,
            model,
            process,
            token_loss,
        )

    def loss(self, step):
        """
        The loss of this step: a function with the arguments of diffusion.token_loss. It returns (total,
        per_token (B, L)) in nats.
        """
        return self.token_loss

    def batches(self, step, default):
        """
        The batches of this step, as default(step) has them (train.step_batches): (x0 (B, T) ids, given (B, T)
        bool, real (B, T) bool, block sizes (B,), times (B,), slots (B,)) each.
        """
        return default(step)

    def modules(self):
        """{name: module} beside the model: moved to its device, and trained where they require a gradient."""
        return {}

    def state_dict(self):
        """Tensors and numbers that a checkpoint keeps, for load_state_dict."""
        return {}

    def load_state_dict(self, state):
        pass

    def record(self):
        """{name: number} for a line of log.jsonl."""
        return {}

    def note(self):
        """A line to print before the first step, or nothing."""
        return ""
