"""Where Triton cannot run, the ops run eager torch, say why once, and `fastdistil doctor` says it too."""

import warnings

import pytest
import torch

from fastdistil import cli, ops
from fastdistil._register import FORMS
from fastdistil.kernels import _target

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """machine(capability): a CUDA device of that capability, as far as questions about it go."""
    caches = (_target.why_not, _target.missing_compiler, ops._can_run)

    def pretend(capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Pretend GPU")
        for cache in caches:
            cache.cache_clear()

    yield pretend
    for cache in caches:
        cache.cache_clear()


def no_compiler(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(_target.shutil, "which", lambda name: None)


def no_headers(monkeypatch):
    monkeypatch.setattr(_target.sysconfig, "get_paths", lambda *scheme: {"include": "/nowhere"})


def no_triton(monkeypatch):
    monkeypatch.setattr(_target.importlib.util, "find_spec", lambda name: None)


def old(monkeypatch):
    pass


CASES = {
    "Pretend GPU is sm_75; kernels need sm_80": ((7, 5), old),
    "no C compiler found; install gcc or clang, or set CC": ((9, 0), no_compiler),
    "/nowhere/Python.h is missing": ((9, 0), no_headers),
    "triton is not installed": ((9, 0), no_triton),
}


@pytest.mark.parametrize(("reason", "case"), CASES.items(), ids=list(CASES))
def test_one_warning_and_doctor(reason, case, machine, monkeypatch, capsys):
    capability, prepare = case
    machine(capability)
    prepare(monkeypatch)
    with pytest.warns(UserWarning, match="fastdistil runs eager torch on cuda:0: " + reason):
        assert not ops._can_run(GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ops._can_run(GPU)
    assert reason in ops.why_eager(GPU)
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert reason in printed and "(Triton)" not in printed.split("cuda\n")[-1].replace("kernels", "")


def test_doctor_names_the_kernels_where_they_run(machine, capsys):
    machine()
    cli.main(["doctor"])
    printed = capsys.readouterr().out
    assert "Triton kernels: can run" in printed and "kernels.attention (Triton)" in printed


def test_the_definition_runs_instead(monkeypatch):
    """A CUDA form that cannot launch computes the definition; so does one that is asked for another dtype."""
    monkeypatch.setattr(ops, "_can_run", lambda device: False)
    x, w, b = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6)
    torch.testing.assert_close(FORMS["linear"]["cuda"](x, w, b), torch.nn.functional.linear(x, w, b))
    monkeypatch.setattr(ops, "_can_run", lambda device: True)
    x, w, b = x.double(), w.double(), b.double()
    torch.testing.assert_close(FORMS["linear"]["cuda"](x, w, b), torch.nn.functional.linear(x, w, b))
    wide = torch.randn(2, ops.WIDEST_ROW + 1)
    result = FORMS["add_layer_norm"]["cuda"](wide, wide, wide[0], wide[0], 1e-12)
    torch.testing.assert_close(result, ops.reference.add_layer_norm(wide, wide, wide[0], wide[0], 1e-12))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current():
    x, w, b = (torch.randn(*s, device="cuda:1") for s in ((5, 8), (6, 8), (6,)))
    torch.testing.assert_close(ops.linear(x, w, b), torch.nn.functional.linear(x, w, b))
    assert torch.cuda.current_device() == 0


def test_where_compiled_kernels_lie(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", "/somewhere")
    cli.main(["doctor"])
    assert "/somewhere/.triton/cache" in capsys.readouterr().out
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert str(_target.cache_directory()) == "/elsewhere"
