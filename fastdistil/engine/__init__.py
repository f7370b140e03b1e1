"""Batch inference: token-budget scheduling and the Embedder."""

from fastdistil.engine.embedder import Embedder

__all__ = ["Embedder"]
