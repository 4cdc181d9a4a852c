"""
How do older checkpoints still load? Their facts are brought to the format of today, in memory alone.

    version 1   no "version"; noise by a name in the settings ("duo" among them); a network begun elsewhere
                with its mask_id; a distillation with "teacher" and "distilled"; padding was shown clean
    version 2   "process": class and arguments; "method": name, settings and state
"""

DUO = ("curriculum", "tau", "tau_end", "soft_k")  # settings of Duo that stood among those of train.py


def migrate(state):
    """A checkpoint's dict in the format of version 2. Raises what a dict of odd shape raises."""
    if state.get("version", 1) >= 2:
        return state
    state, config = dict(state), dict(state["config"])
    own = {name: config.pop(name) for name in DUO if name in config}  # every checkpoint had them
    if config.get("process") == "duo":
        config["process"], config["method"] = "uniform", "duo"
        state["method"] = {"name": "duo", "settings": own, "state": {}}
    if "distilled" in state:
        settings, own = state.pop("distilled"), {"teacher": state.pop("teacher")}
        state["method"] = {"name": "distill", "settings": settings, "state": own}
        config["method"] = "distill"
    if "network" in state:
        state["network"] = dict(state["network"])
        mask_id, V = state["network"].pop("mask_id"), state["network"]["vocab_size"]
        kind, more = "Masked", {"mask_id": mask_id}
        if mask_id is None:
            kind, more = "Uniform", {"predicts": config["predicts"], "ar_token": None}
        state["process"] = {"class": kind, "arguments": {"vocab_size": V, **more}}
    config.setdefault("clean_padding", "pad_id" in state["meta"])
    state["config"], state["version"] = config, 2
    return state
