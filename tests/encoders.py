"""Small encoders of every family, inputs for them, and transformers' own eager model with the same weights."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from conftest import tiny_model
from kd.forward import Needs
from kd.forward.taps import FAMILIES
from kd.models import Encoder

LAYERS, WIDTH, HEADS, TOKENS = 3, 24, 3, 9
ALL = Needs(hidden=range(LAYERS + 1), cls=range(LAYERS + 1), attention=range(1, LAYERS + 1), value=range(1, LAYERS + 1))

CONTEXT = {
    "bert": "attention.output.dense",
    "roberta": "attention.output.dense",
    "distilbert": "attention.out_lin",
    "mpnet": "attention.attn.o",
}
"""Family -> path of the projection that takes attention times values."""

families = pytest.mark.parametrize("family", FAMILIES)


def inputs(padded: bool = True) -> dict[str, Tensor]:
    """Three sentences, two of them shorter; of two segments."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 30, (3, TOKENS), generator=generator)
    lengths = torch.tensor([TOKENS, 6, 4] if padded else [TOKENS] * 3)
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    segments = (torch.arange(TOKENS) >= 3).long().expand(3, TOKENS)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": segments * mask}


def encoder(family: str = "bert", seed: int = 0, **more: object) -> Encoder:
    """In float64, with weights large enough that attention is far from uniform."""
    model = tiny_model(seed, model_type=family, layers=LAYERS, width=WIDTH, heads=HEADS, **more).double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Encoder(model)


def eager(tapped: Encoder, batch: dict[str, Tensor]) -> object:
    """Return the outputs of Transformers' own eager attention with the same weights."""
    config = copy.deepcopy(tapped.config)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").double().eval()
    model.load_state_dict(tapped.model.state_dict())
    segments = {} if config.model_type == "bert" else {"token_type_ids"}  # the other families have none
    taken = {name: value for name, value in batch.items() if name not in segments}
    return model(**taken, output_hidden_states=True, output_attentions=True)


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
