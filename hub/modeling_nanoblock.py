"""
A network of nanoblock as `transformers` loads it. hub/export.py puts this file into a folder of weights,
beside model.py, which is named nanoblock_model.py there and computes everything.

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    logits = model(noisy_ids, clean_ids=text, block_size=16, start=text.size(1)).logits
"""

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from model import ModelConfig, Transformer


class NanoblockConfig(PretrainedConfig):
    """network: the fields of ModelConfig. mask_token_id: None for noise without a mask."""

    model_type = "nanoblock"

    def __init__(self, network=None, mask_token_id=None, block_sizes=None, **how):
        super().__init__(**how)
        self.network, self.mask_token_id, self.block_sizes = network, mask_token_id, block_sizes


class NanoblockModel(PreTrainedModel):
    config_class = NanoblockConfig

    def __init__(self, config):
        super().__init__(config)
        self.network = Transformer(ModelConfig(**config.network))
        self.post_init()

    def forward(self, input_ids, clean_ids=None, block_size=None, start=None, sigma=None, **_):
        """
        input_ids (B, N): the noisy tokens, at positions start, start + 1, ...
        start: behind clean_ids, if left out
        clean_ids (B, C): finished text, or None
        block_size: tokens denoised together; N, if left out
        sigma (B,): the noise level -log(alpha_t), for networks that see it
        """
        n_clean = 0 if clean_ids is None else clean_ids.size(1)
        start = n_clean if start is None else start
        block_size = input_ids.size(1) if block_size is None else block_size
        logits = self.network(clean_ids, input_ids, block_size, start, sigma)
        return MaskedLMOutput(logits=logits)

    @torch.no_grad()
    def _init_weights(self, module):
        pass  # all weights are in the file
