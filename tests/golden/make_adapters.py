"""What adapters 1.3.0 (on transformers 4.57.6) computes and saves: `adapters.safetensors`, `adapters_head/`, and for
its adapters `bottlenecks.safetensors`, `adapter_seq_bn/`, `adapter_double_seq_bn/` and `adapter_lora/`.

    python tests/golden/make_adapters.py        # in an environment of its own that holds adapters==1.3.0

A tiny model with every kind of flexible head, its outputs, losses and gradients on one batch, and a head saved by it.
"""

import json
from pathlib import Path

import torch
from adapters import BnConfig, DistilBertAdapterModel, LoRAConfig
from adapters.composition import Stack
from safetensors.torch import save_file
from transformers import DistilBertConfig

HERE = Path(__file__).resolve().parent


def main():
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=60, dim=24, n_heads=2, hidden_dim=32, n_layers=2, max_position_embeddings=20, initializer_range=0.1
    )
    model = DistilBertAdapterModel(config)
    model.add_classification_head("sentiment", num_labels=3)
    model.add_classification_head("topics", num_labels=4, multilabel=True, id2label=dict(enumerate("abcd")))
    model.add_classification_head("score", num_labels=1, layers=1)
    model.add_tagging_head("tags", num_labels=5, layers=2, activation_function="relu")
    model.add_qa_head("answer")
    model.add_multiple_choice_head("choice", num_choices=2)
    model.add_masked_lm_head("words")
    with torch.no_grad():  # biases are 0 at first
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.eval()
    ids = torch.randint(1, 60, (4, 9))
    mask = torch.ones_like(ids)
    padded = torch.arange(9) < torch.tensor([9, 4, 1, 7])[:, None]
    labels = {
        "sentiment": {"labels": torch.tensor([0, 2, 1, 1])},
        "topics": {"labels": torch.randint(0, 2, (4, 4))},
        "score": {"labels": torch.randn(4)},
        "tags": {"labels": torch.randint(0, 5, (4, 9))},
        "answer": {"start_positions": torch.tensor([0, 3, 2, 9]), "end_positions": torch.tensor([1, 30, 2, -1])},
        "choice": {"labels": torch.tensor([1, 0])},
        "words": {"labels": torch.randint(0, 60, (4, 9)).masked_fill(torch.rand(4, 9) < 0.5, -100)},
    }
    out = {f"model.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    out |= {"ids": ids, "padded": padded.long()}
    for name, given in labels.items():
        out |= {f"{name}.{key}": value.clone() for key, value in given.items()}
        model.zero_grad()
        result = model(ids, mask, head=name, **{key: value.clone() for key, value in given.items()})
        result.loss.backward()
        out[f"{name}.gradient"] = model.distilbert.transformer.layer[0].ffn.lin1.weight.grad.clone()
        for key, value in result.items():
            out[f"{name}.out.{key}"] = value.detach().clone()
    tags = model(ids, padded.long(), head="tags", **labels["tags"])
    out |= {"padded.logits": tags.logits.detach().clone(), "padded.loss": tags.loss.detach().clone()}
    metadata = {"prediction_heads": json.dumps(config.prediction_heads), "config": config.to_json_string()}
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, HERE / "adapters.safetensors", metadata)
    model.save_head(str(HERE / "adapters_head"), "sentiment")


KINDS = {
    "seq_bn": "seq_bn",
    "double_seq_bn": "double_seq_bn",
    "lora": "lora",
    "narrow": BnConfig(mh_adapter=True, output_adapter=False, reduction_factor=5, non_linearity="gelu", scaling=0.7),
    "wide": LoRAConfig(r=3, alpha=16, attn_matrices=["q", "k", "v"], leave_out=[0]),
}


def adapters():
    torch.manual_seed(1)
    config = DistilBertConfig(
        vocab_size=60, dim=24, n_heads=2, hidden_dim=32, n_layers=2, max_position_embeddings=20, initializer_range=0.1
    )
    model = DistilBertAdapterModel(config)
    model.add_classification_head("labels", num_labels=3)
    for name, kind in KINDS.items():
        model.add_adapter(name, config=kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval()
    ids, labels = torch.randint(1, 60, (4, 9)), torch.tensor([0, 2, 1, 1])
    out = {f"model.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    out |= {"ids": ids, "labels": labels}
    for name in [*KINDS, "seq_bn,narrow", "double_seq_bn,lora"]:
        model.zero_grad()
        model.set_active_adapters(Stack(*name.split(",")) if "," in name else name)
        model.active_head = "labels"
        result = model(ids, torch.ones_like(ids), labels=labels)
        result.loss.backward()
        out[f"{name}.logits"], out[f"{name}.loss"] = result.logits.detach().clone(), result.loss.detach().clone()
        for n, parameter in model.named_parameters():
            if f".{name.split(',')[0]}." in n and ".layer.1." in n and parameter.grad is not None:
                out[f"{name}.gradient.{n}"] = parameter.grad.clone()
    model.set_active_adapters(None)
    model.active_head = "labels"
    out["none.logits"] = model(ids, torch.ones_like(ids)).logits.detach().clone()
    metadata = {"config": config.to_json_string(), "adapters": json.dumps(model.adapters_config.to_dict(), default=str)}
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, HERE / "bottlenecks.safetensors", metadata)
    for name in ("seq_bn", "double_seq_bn", "lora"):
        model.save_adapter(str(HERE / f"adapter_{name}"), name)


if __name__ == "__main__":
    main()
    adapters()
