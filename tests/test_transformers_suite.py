"""transformers' own DistilBERT tests, run against our classes. FASTDISTIL_HF_TESTS names a transformers checkout.

Of its file only the `test_for_*` bodies run; what it imports from its neighbours is a thin shim here.
"""

import importlib
import os
import sys
import types
from pathlib import Path

import pytest
import torch

import fastdistil

FILE = "tests/models/distilbert/test_modeling_distilbert.py"
CLASSES = (
    "DistilBertConfig",
    "DistilBertModel",
    "DistilBertForMaskedLM",
    "DistilBertForMultipleChoice",
    "DistilBertForQuestionAnswering",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
)
DECODERS = ("causal", "decoder")  # DistilBERT is an encoder here


def shim():
    """Modules by the names that the file imports."""

    def ids_tensor(shape, vocab_size, rng=None, name=None):
        return torch.randint(0, vocab_size, tuple(shape))

    def random_attention_mask(shape, rng=None, name=None):
        mask = ids_tensor(shape, 2)
        mask[:, 0] = 1  # no row without a real token
        return mask

    contents = {
        "test_modeling_common": {
            "ModelTesterMixin": type("ModelTesterMixin", (), {}),
            "ids_tensor": ids_tensor,
            "floats_tensor": lambda shape, scale=1.0: torch.rand(*shape) * scale,
            "random_attention_mask": random_attention_mask,
        },
        "test_configuration_common": {"ConfigTester": lambda *args, **kwargs: None},
        "test_pipeline_mixin": {"PipelineTesterMixin": type("PipelineTesterMixin", (), {})},
    }
    for name, members in contents.items():
        module = types.ModuleType(f"suite.{name}")
        module.__dict__.update(members)
        yield module


def bodies(checkout, monkeypatch):
    """name -> the test, bound to our classes."""
    for package, path in {
        "suite": checkout / "tests",
        "suite.models": checkout / "tests/models",
        "suite.models.distilbert": checkout / "tests/models/distilbert",
    }.items():
        module = types.ModuleType(package)
        module.__path__ = [str(path)]
        monkeypatch.setitem(sys.modules, package, module)
    for module in shim():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "suite.models.distilbert.test_modeling_distilbert", raising=False)
    file = importlib.import_module("suite.models.distilbert.test_modeling_distilbert")
    for name in CLASSES:
        setattr(file, name, getattr(fastdistil, name))
    case = file.DistilBertModelTest
    names = [n for n in dir(case) if n.startswith("test_for_") or n == "test_distilbert_model"]
    for name in names:
        if not any(word in name for word in DECODERS):
            test = case(name)
            test.model_tester = file.DistilBertModelTester(test)
            yield name, getattr(test, name)


def test_bodies(monkeypatch):
    checkout = os.environ.get("FASTDISTIL_HF_TESTS")
    if not checkout:
        pytest.skip("FASTDISTIL_HF_TESTS does not name a transformers checkout")
    if not (Path(checkout) / FILE).is_file():
        pytest.fail(f"FASTDISTIL_HF_TESTS is {checkout}, which holds no {FILE}")
    found = dict(bodies(Path(checkout), monkeypatch))
    assert len(found) >= 6, f"only {list(found)}"
    for test in found.values():
        test()


SAMPLE = """
import unittest
from transformers import DistilBertConfig, DistilBertForTokenClassification
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from ...test_pipeline_mixin import PipelineTesterMixin


class DistilBertModelTester:
    def __init__(self, parent):
        self.parent = parent

    def labels(self, n):
        config = DistilBertConfig(vocab_size=9, dim=8, n_heads=2, n_layers=1, hidden_dim=8)
        model = DistilBertForTokenClassification(config=config).eval()
        self.parent.assertTrue(type(model).__module__.startswith("fastdistil"))
        out = model(ids_tensor([2, 5], 9), attention_mask=random_attention_mask([2, 5]))
        self.parent.assertEqual(out.logits.shape, (2, 5, n))


class DistilBertModelTest(ModelTesterMixin, PipelineTesterMixin, unittest.TestCase):
    def setUp(self):
        self.config_tester = ConfigTester(self, config_class=DistilBertConfig, dim=37)

    def test_for_right(self):
        self.model_tester.labels(2)

    def test_for_wrong(self):
        self.model_tester.labels(3)

    def test_for_causal_lm(self):
        self.fail("must not run")
"""


def test_the_shim(tmp_path, monkeypatch):
    """A file of the same form: a right test passes, a wrong one fails, a decoder's is left out."""
    pytest.importorskip("transformers")
    (tmp_path / FILE).parent.mkdir(parents=True)
    (tmp_path / FILE).write_text(SAMPLE)
    found = dict(bodies(tmp_path, monkeypatch))
    assert sorted(found) == ["test_for_right", "test_for_wrong"]
    found["test_for_right"]()
    with pytest.raises(AssertionError):
        found["test_for_wrong"]()
