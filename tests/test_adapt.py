"""
A language model with a diffusion mode: methods/adapt.py and samplers/lossless.py, on tiny random networks.
"""

import copy

import pytest
import torch
from conftest import ROOT, TINY

import train
from diffusion import Masked
from generate import NOTHING, SAMPLERS, generate
from methods import adapt, llama
from methods.adapt import Adapted, Settings
from model import ModelConfig
from samplers.lossless import DRAFTS, KEYS, Lossless, look_up

V, T = 13, 96


def pair(seed=0, dtype=torch.float64, **settings):
    """A random base, and the same with random adapters, masks and head."""
    torch.manual_seed(seed)
    s = Settings(n_kv_heads=2, rank=3, masks=3, draft_vocab=9, **settings)
    cfg = ModelConfig(V, T, n_layers=2, n_heads=4, d_model=24, next_token=True)
    base = llama.Llama(cfg, s).double().eval()
    for p in base.parameters():
        torch.nn.init.normal_(p, std=0.4)
    model = adapt.network(cfg, s).double().eval()
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.3)
    model.draft_ids.copy_(torch.tensor([0, 1, 2, 3, 5, 7, 8, 9, 11]))
    return base.to(dtype), model.to(dtype)


def written(model, prompts, sampler, **how):
    size = 1 if sampler == "ar" else 8
    process = Masked(V, V - 1)
    for state in generate(model, process, prompts, block_size=size, sampler=SAMPLERS[sampler], **how):
        pass
    return state


PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3], [3], [5, 5, 1, 5, 5], [7, 1, 7, 2, 7, 1, 7, 2]]
