"""Live models of other libraries, made fast in place."""

from typing import Any

from torch import nn


def accelerate(model: nn.Module) -> Any:
    """Replace the encoder of a live transformers DistilBERT or BERT model, of that instance only, and return the model.

    model: a transformers model with or without a head, a sentence-transformers `SentenceTransformer`, or anything that
    holds such an encoder (the whole of it: the loss of a head that is not in it would read zeros in the padding).
    Parameters, their names, the call and its result stay the same; at padded positions hidden states are 0, but for
    column 0 of a row padded on the left, where heads and poolers find its first real token.

    Inference without gradients takes the packed path. Training, gradients, attentions, 4-D masks, hooks, patched or
    replaced modules, a Dropout that is left on, tracing and compilation run transformers' own code as before. Query,
    key and value weights move to one buffer, unless someone else holds their memory. Copies and pickles are
    accelerated, too, and independent. Raises TypeError where there is no such encoder, ValueError for one that is not
    supported.
    """
    from fastdistil.integrations.live import accelerate

    return accelerate(model)


def restore(model: nn.Module) -> Any:
    """Undo `accelerate`; returns the model."""
    from fastdistil.integrations.live import restore

    return restore(model)


def register_attention() -> str:
    """Register the attention implementation "fastdistil" with transformers, and return its name.

    `AutoModel.from_pretrained(..., attn_implementation="fastdistil")` or `model.set_attn_implementation("fastdistil")`
    then works for any model, encoders from transformers 5 on. It is right for all of them, and drops padding in
    BERT-like encoders; for speed use `accelerate`.
    """
    from fastdistil.integrations.attention import register

    return register()


__all__ = ["accelerate", "register_attention", "restore"]
