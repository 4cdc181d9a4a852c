"""
How is a folder of hub/export.py read back, where it holds the network of model.py? Its other layouts are read
by hub/llama.py. The code in the folder is for others: none of it is run.
"""

from pathlib import Path

from hub.llama import read_json
from run import checkpoint
from run.cli import die, said


def is_own(path):
    """Is this a folder in our own layout?"""
    try:
        return read_json(Path(path) / "config.json").get("model_type") == "nanoblock"
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def read_own(path, flag="--init_from"):
    """A dict as checkpoint.load gives it. Two lines for a folder that is damaged."""
    from safetensors import safe_open

    path = Path(path)
    try:
        config = read_json(path / "config.json")
        facts, network = config["nanoblock"], config["network"]
        with safe_open(path / "model.safetensors", "pt") as file:
            weights = {key.removeprefix("network."): file.get_tensor(key).float() for key in file.keys()}
        run = facts["config"] | {"block_sizes": {int(b): w for b, w in facts["config"]["block_sizes"]}}
        if network["n_layers"] > len(weights):
            raise ValueError(f"{network['n_layers']} layers, and {len(weights)} tensors")
        state = {
            "model": weights,
            "ema": weights,
            "config": run,
            "meta": facts["meta"],
            "step": facts["step"],
        }
        state |= {"network": network, "process": facts["process"], "version": checkpoint.VERSION}
        checkpoint.check_sizes(state)
        return state
    except MemoryError:
        raise
    except Exception as e:  # a damaged file fails in many ways
        die(f"{path} is damaged, or no folder of hub/export.py: {said(e)}", f"{flag} FOLDER, another copy")


checkpoint.READERS.insert(0, (is_own, read_own))
