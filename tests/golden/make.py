"""Freezes transformers' outputs on tiny random models, so that tests compare with them without transformers.

python tests/golden/make.py     writes distilbert.safetensors and bert.safetensors beside itself
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent
SIZE = dict(vocab_size=61, max_position_embeddings=20)


def freeze(name: str, model: torch.nn.Module, config: dict) -> None:
    model.eval().set_attn_implementation("eager")
    for p in model.parameters():  # norms and biases must not be ones and zeros
        p.data.add_(0.1 * torch.randn_like(p))
    ids = torch.randint(1, 61, (4, 13))
    keep = torch.arange(13) < torch.tensor([13, 1, 7, 12])[:, None]
    keep[3, 2:5] = False
    out = model(ids, attention_mask=keep.long(), output_hidden_states=True, output_attentions=True)
    loss = (out.last_hidden_state * keep[..., None]).pow(2).sum()
    loss.backward()
    tensors = {f"weights.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"gradients.{k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    tensors |= {f"hidden_states.{i}": h for i, h in enumerate(out.hidden_states)}
    tensors |= {f"attentions.{i}": a for i, a in enumerate(out.attentions)}
    tensors |= {"input_ids": ids, "attention_mask": keep.long()}
    metadata = {"config": json.dumps(config), "transformers": transformers.__version__, "torch": torch.__version__}
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, HERE / f"{name}.safetensors", metadata)


if __name__ == "__main__":
    torch.manual_seed(0)
    config = {"model_type": "distilbert", "dim": 24, "n_heads": 2, "hidden_dim": 40, "n_layers": 2} | SIZE
    freeze("distilbert", transformers.DistilBertModel(transformers.DistilBertConfig(**config)), config)
    config = {"model_type": "bert", "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40} | SIZE
    config |= {"num_hidden_layers": 2, "hidden_act": "gelu_new", "layer_norm_eps": 1e-6}
    freeze("bert", transformers.BertModel(transformers.BertConfig(**config), add_pooling_layer=False), config)
