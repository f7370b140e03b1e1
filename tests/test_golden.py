"""transformers' outputs, frozen by tests/golden/make.py; needs no transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fastdistil import DistilBertConfig, DistilBertModel


@pytest.fixture(params=["distilbert", "bert"])
def golden(request):
    with safe_open(Path(__file__).parent / "golden" / f"{request.param}.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["config"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def group(tensors, name):
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}


def test_states_attentions_and_gradients(golden):
    config, tensors = golden
    model = DistilBertModel.from_pretrained(
        None, config=DistilBertConfig.from_dict(config), state_dict=group(tensors, "weights")
    )
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    keep = mask.bool()
    states, attentions = group(tensors, "hidden_states"), group(tensors, "attentions")
    with torch.inference_mode():
        packed = model(ids, mask, output_hidden_states=True)
    dense = model(ids, mask, output_hidden_states=True, output_attentions=True)
    for out in (packed, dense):
        for i, state in enumerate(out.hidden_states):
            torch.testing.assert_close(state[keep], states[str(i)][keep], rtol=0, atol=1e-5)
            assert (state[~keep] == 0).all()
    for i, attention in enumerate(dense.attentions):
        rows = keep[:, None].expand(attention.shape[:3])
        torch.testing.assert_close(attention[rows], attentions[str(i)][rows], rtol=0, atol=1e-5)
    dense.last_hidden_state.pow(2).sum().backward()
    gradients = group(tensors, "gradients")
    if config["model_type"] == "distilbert":
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-5, atol=1e-5)
