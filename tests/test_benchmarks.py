"""The benchmarks themselves: counts, records, equality before speed, and every stage of a GPU's run at toy size."""

import ast
import copy
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest.mock import patch
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import (
    compare,
    compile_gate,
    corpus,
    encoder,
    engine,
    figures,
    goals,
    gpu,
    kernels,
    record,
    report,
    roofline,
    shapes,
    timing,
    tune,
)
from benchmarks.roofline import BASE, CHIPS, Shape
from benchmarks.timing import Timing
from fastdistil import Embedder
from fastdistil.cli import main as cli
from fastdistil.kernels import _configs
from fastdistil.kernels._configs import Attention, Gemm, Rows

CPU = torch.device("cpu")
CARD = {"name": "An H200", "uuid": "GPU-1", "driver_version": "1.2"}
AROUND = {"date": "2026-01-01", "command": "x", "torch": "2", "triton": "3", "cpu": "a CPU", "threads": 2}
AROUND |= {"commit": {"id": "0123456789", "dirty": False}, "gpu": None}
ON_CARD = AROUND | {"gpu": CARD, "clocks": [{"clocks.sm": "1980 MHz", "power.draw": "600 W"}]}


# --- roofline -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "mega"), [(16, 85.23), (32, 85.52), (64, 86.11), (128, 87.29), (512, 94.37)])
def test_flops_of_a_token(length, mega):
    """Of DistilBERT-base, worked out by hand: 6 layers of 2 * 768 * (2304 + 768 + 3072 + 3072) + 4 * L * 768."""
    assert roofline.flops_per_token(length) / 1e6 == pytest.approx(mega, abs=0.005)


def test_bytes_of_a_layer():
    """bfloat16, a token: GEMMs 24,576, attention 6,144, two LayerNorms 9,216; weights and biases beside them."""
    rows = 1_000_000
    ops = roofline.forward([128] * (rows // 128), BASE, "bfloat16")[1:8]
    tokens = rows // 128 * 128
    found = {name: sum(op.bytes for op in ops if op.name == name) / tokens for name in {op.name for op in ops}}
    gemms = found["qkv_projection"] + found["linear_add_layer_norm"] + found["bias_gelu"]
    assert gemms == pytest.approx(24_576, rel=1e-3) and found["attention"] == 6_144
    assert found["add_layer_norm"] == pytest.approx(9_216, rel=1e-3)


def test_a_forward_has_44_launches():
    assert len(roofline.forward([128])) == 44  # embeddings, 6 layers of 7, pooling


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
@pytest.mark.parametrize("shape", [BASE, roofline.MINILM, roofline.LARGE], ids=lambda s: f"{s.dim}x{s.layers}")
def test_a_prediction_is_below_the_bound(chip, shape):
    """From the compile table's data, on every architecture and in every precision."""
    for dtype, lengths in [("bfloat16", [128] * 132), ("float32", [64] * 64), ("float16", [16])]:
        assert 0 < roofline.predict(chip, lengths, shape, dtype) < roofline.bound(chip, lengths, shape, dtype)


@pytest.mark.parametrize(
    ("chip", "binary", "programs"),
    [
        ("H200", (64, 4, 0), 8),  # 65,536 registers by 64 of 128 threads
        ("H200", (65, 4, 0), 7),  # which are given out in eights
        ("H200", (16, 4, 0), 16),  # 64 warps
        ("RTX 5090", (16, 4, 0), 12),  # 48 warps
        ("H200", (32, 4, 76_800), 3),  # 233,472 bytes, of which each program costs 1,024 more
        ("H200", (32, 4, 76_801), 2),
        ("A100", (32, 4, 76_800), 2),
        ("H200", (255, 16, 0), 1),
    ],
)
def test_programs_that_a_multiprocessor_holds(chip, binary, programs):
    assert CHIPS[chip].resident(*binary) == programs


def compiled_as(monkeypatch, **figures):
    """The roofline model as if every binary had these figures."""
    table = [row | figures for row in roofline._table()]
    monkeypatch.setattr(roofline, "_table", lambda: table)
    monkeypatch.setattr(roofline, "_resident", roofline._resident.__wrapped__)


OPS_OF_A_FORWARD = (*roofline.forward([128] * 132)[:6], roofline.pool([128] * 132, 768, 2))
PLACED = (roofline.pack(132, 128), roofline.unpack(8_448, 16_896, 768, 2), roofline.attention([512] * 33, 768, 12, 2))


@pytest.mark.parametrize("op", (*OPS_OF_A_FORWARD, *PLACED), ids=lambda op: f"{op.name}-{op.shape}")
@pytest.mark.parametrize("chip", ["A100", "L4", "H200", "B200"])
def test_predictions_go_by_the_binaries(op, chip, monkeypatch):
    """Every op's; what takes more of a multiprocessor leaves fewer programs to fill each other's waits."""
    chip, before = CHIPS[chip], {}
    for registers in ("24", "255"):
        with monkeypatch.context() as patch:
            compiled_as(patch, registers=registers, shared="100000" if registers == "255" else "0")
            before[registers] = roofline.launches(chip, op, "bfloat16")[0].resident, roofline.seconds(chip, op)
    (many, quick), (few, slow) = before.values()
    assert few <= 2 < many and quick <= slow
    with monkeypatch.context() as patch, pytest.raises(LookupError, match="the compile table has no"):
        compiled_as(patch, kernel="another")
        roofline.launches(chip, op, "bfloat16")


def test_launches_of_the_model_by_hand():
    """DistilBERT-base on an H200: 132 texts of 128 tokens by a program a text and head, shorter ones in shared tiles,
    longer ones in loops; rows of LayerNorm by fours; tiles of GEMMs."""

    def launched(op, dtype="bfloat16"):
        return roofline.launches(CHIPS["H200"], op, dtype)

    def attention(lengths):
        return launched(roofline.attention(lengths, 768, 12, 2))

    (single,) = attention([128] * 132)
    assert single.programs == 132 * 12 and single.scores == 128 * 128 and single.products == 4 * 64 * 128 * 128
    assert single.moved == 4 * 128 * 64 * 2 and single.waits == 2
    (short,) = attention([16] * 1_056)
    assert short.programs == 345 * 12 and short.scores == 64 * 64  # a tile begins every 49 rows
    long, less = attention([512, 130, 0, 512])  # 4 tiles of 8 blocks of keys, twice, and 2 of 3
    assert long.programs == 8 * 12 and long.scores == 128 * 512 and long.waits == 3 + 8 / 2
    assert less.programs == 2 * 12 and less.scores == 128 * 3 * 64 and less.waits == 3 + 3 / 2
    pooled = launched(roofline.pool([512, 16, 16], 768, 2))  # 8 rows at a time, 3 on their way
    assert [(part.programs, part.waits) for part in pooled] == [(1, 2 + 512 / 24), (2, 2 + 16 / 24)]
    assert launched(roofline.add_layer_norm(17, 768, 2))[0].programs == 5
    (gemm,) = launched(roofline.gemm("linear", 64, 768, 3_072, 2))  # 16 x 32, 128 deep, 5 stages
    assert gemm.programs == 4 * 24 and gemm.moved == 2 * (48 * 3_072 + 16 * 32) and gemm.waits == 24 / 4
    both = roofline.linear_add_layer_norm(64, 768, 3_072, 2)
    (shared,), (norm,) = map(launched, both.steps)  # four programs a tile, which they write in float32
    assert shared.programs == 4 * 24 and shared.moved == 2 * 96 * 768 + 4 * 64 * 32 and shared.waits == 6 / 2
    assert shared.products == 2 * 64 * 32 * 768 and norm.programs == 64
    assert norm.moved * 64 == both.steps[1].bytes + (4 * 4 - 2) * 64 * 768
    assert both.bytes == 2 * (64 * 3_072 + 768 * 3_072 + 768 + 2 * 64 * 768 + 2 * 768)
    chip = CHIPS["H200"]
    assert roofline.seconds(chip, both) == sum(roofline.seconds(chip, one) for one in both.steps) + roofline.GAP
    with patch.dict(_configs.RECORDED, {(90, "linear", "half/wide"): Gemm("tma", 128, 128, 64, 8, 3, halves=2)}):
        assert launched(roofline.product_and_norm(16_896, 768, 768, 2)[0])[0].programs == 132 * 6
    (many,), (norm,) = map(launched, roofline.product_and_norm(16_896, 768, 768, 2))
    assert many == launched(roofline.gemm("linear", 16_896, 768, 768, 2))[0] and norm.programs == 16_896 // 4
    (odd,) = launched(roofline.gemm("linear", 20_000, 100, 256, 2))
    assert odd.waits == 8 / 2
    (odd,) = launched(roofline.gemm("linear", 20_000, 256, 100, 2))  # no strides of 16 bytes: by pointers, 32 deep
    assert odd.products == 2 * 128 * 128 * 100 and odd.waits == 4 / 2
    assert launched(roofline.unpack(8, 6, 2_048, 2))[0].programs == 2 * 2  # 4 rows of 1,024 columns
    assert launched(roofline.gemm("linear", 64, 768, 768, 4), "float32") == []  # the library's


def test_more_is_never_predicted_to_be_quicker():
    """Short texts beside a long one leave it as long."""
    chip = CHIPS["H200"]
    for of in (lambda n: roofline.pool(n, 768, 2), lambda n: roofline.attention(n, 768, 12, 2)):
        for more in ([1], [1] * 131, [16] * 1_000, [128] * 132):
            assert roofline.seconds(chip, of([512, *more])) >= roofline.seconds(chip, of([512]))
        more = [roofline.seconds(chip, of([512] * 11 + [1] * n)) for n in (0, 1, 11, 100, 1_000)]
        assert more == sorted(more)

    def attention(*lengths):
        return roofline.seconds(chip, roofline.attention([*lengths], 768, 12, 2))

    # as many tiles and blocks of keys, counted together; and where each has many, one after the other
    assert attention(*[512] * 3, *[500] * 3) == pytest.approx(attention(*[512] * 6))
    long, short = [512] * 1_100, [130] * 1_100
    assert attention(*long, *short) == pytest.approx(attention(*long) + attention(*short), rel=1e-3)
    times = [roofline.seconds(chip, roofline.pool([n], 768, 2)) for n in (1, 64, 512, 4_096)]
    assert times == sorted(times)


def test_times_of_the_model_by_hand(monkeypatch):
    """Many rows of LayerNorm are bound by memory, few by what they wait for; attention in float32 by its products."""
    chip = CHIPS["H200"]
    rows = roofline.add_layer_norm(16_896, 768, 2)
    assert roofline.seconds(chip, rows) == pytest.approx(rows.bytes / (0.9 * 4.8e12))
    one = roofline.add_layer_norm(4, 768, 2)
    assert roofline.seconds(chip, one) == pytest.approx(2 * roofline.LATENCY + one.bytes / roofline.L2_FEED)
    texts = roofline.attention([128] * 132, 768, 12, 4)
    (used,), rate = roofline.launches(chip, texts, "float32"), roofline.IEEE_ATTENTION * 0.8 * 67e12 / 132
    assert roofline.seconds(chip, texts, "float32") >= math.ceil(used.programs / 132) * used.products / rate
    compiled_as(monkeypatch, registers="255", shared="200000")  # one program at a time
    texts = roofline.attention([128] * 132, 768, 12, 2)
    clock = 67e12 / (2 * 132 * 128)
    alone = 4 * 64 * 128 * 128 / (0.8 * 989e12 / 132) + 2 * roofline.LATENCY + 4 * 128 * 64 * 2 / roofline.L2_FEED
    alone += 128 * 128 / (16 * clock) + 6 * 128 * 128 / (128 * clock)
    assert roofline.seconds(chip, texts) == pytest.approx(12 * alone)


def test_predictions_of_what_was_not_compiled(monkeypatch):
    """A width that the table lacks goes by the others; a tile that it lacks has no prediction."""
    chip = CHIPS["H200"]
    assert roofline.microseconds(chip, roofline.add_layer_norm(64, 760, 2), "bfloat16") > 0
    assert roofline.predict(chip, [100] * 10, Shape(2_048, 8_192, 2, 16), "float32") > 0
    assert roofline.predict(chip, [1, 700], Shape(96, 200, 1, 3), "float16") > 0
    class_of = (90, "linear", "half/16")
    monkeypatch.setitem(_configs.RECORDED, class_of, Gemm("pointer", 16, 48, 80, warps=4, stages=3))
    op = roofline.gemm("linear", 16, 768, 768, 2)
    assert roofline.microseconds(chip, op, "bfloat16") is None and roofline.microseconds(None, op, "bfloat16") is None


def test_the_chip_at_hand(monkeypatch):
    found = types.SimpleNamespace(name="NVIDIA H200", multi_processor_count=132, total_memory=150_123_249_664)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert roofline.at_hand(torch.device("cuda", 0)) is CHIPS["H200"] and roofline.at_hand(CPU) is None
    assert roofline.named("NVIDIA A100-SXM4-80GB", 108, 85 * 10**9) is CHIPS["A100"]
    assert roofline.named("NVIDIA L4", 58, int(22.03 * 2**30)) is CHIPS["L4"]
    for other in (
        ("NVIDIA A10G", 80, 24 << 30),
        ("NVIDIA L4", 58, 40 << 30),
        ("NVIDIA H100 PCIe", 114, 80 << 30),
        ("NVIDIA A100-PCIE-80GB", 108, 80 << 30),
        ("NVIDIA A100-SXM4-40GB", 108, 40 << 30),
        ("NVIDIA H200 NVL", 132, 141 << 30),
    ):
        assert roofline.named(*other) is None


def test_heads_that_do_not_divide_have_no_prediction():
    for dim, heads in ((768, 5), (12, 16), (768, 0), (0, 1)):
        with pytest.raises(ValueError, match=f"{heads} heads do not divide a width of {dim}"):
            roofline.attention([128], dim, heads, 2)


def test_a_prediction_is_told_beside_the_measurement(quick, monkeypatch, tmp_path):
    """By the kernels' lines and table, where the model knows the chip."""
    monkeypatch.setattr(roofline, "at_hand", lambda device: CHIPS["H200"])
    rows = kernels.run(shapes.TOY, CPU, CEILINGS, names=("add_layer_norm",))
    mine = [row for row in rows if row["provider"] == "fastdistil"]
    op = roofline.add_layer_norm(int(mine[0]["shape"].split()[0]), shapes.TOY.shape.dim, 4)
    assert mine[0]["predicted_us"] == pytest.approx(1e6 * roofline.seconds(CHIPS["H200"], op, "float32"))
    said = [line for line in kernels.lines(rows) if not line.startswith("missing")]
    for row, line in zip(mine, said, strict=True):
        assert f", predicted {row['predicted_us']:.1f}" in line
    record.write(tmp_path / "h200" / "kernels.json", ON_CARD | {"rows": rows})
    real = goals.Results
    monkeypatch.setattr(goals, "Results", lambda: real(tmp_path))
    table = report.kernels_table()
    took, guess = mine[-1]["cold"]["median_us"], mine[-1]["predicted_us"]
    assert "| predicted |" in table and f"| {guess:,.0f}, {took / guess:.0%} |" in table


def test_tiles_that_fill_the_chip_are_quicker():
    chip = CHIPS["H200"]
    tokens = [roofline.predict(chip, [128] * (rows // 128)) for rows in (5_632, 5_760)]
    assert tokens[1] < tokens[0]  # one more row block begins a wave of its own


def test_the_table_of_predictions(capsys):
    assert roofline.main([]) == 0
    out = capsys.readouterr().out
    assert "H200" in out and len(out.splitlines()) == 2 + len(CHIPS)


# --- shapes, timings, records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", shapes.FORMS)
def test_lengths_fill_their_tokens(form):
    found = shapes.lengths(form, 64, 5_000)
    assert max(found) <= 64 and min(found) >= 1 and 5_000 - 64 < sum(found) <= 5_000
    assert found == shapes.lengths(form, 64, 5_000)
    with pytest.raises(ValueError, match="'gamma' is none of"):
        shapes.lengths("gamma", 64, 10)


def test_quartiles():
    timing_ = Timing([4.0, 1.0, 2.0, 3.0, 5.0])
    assert timing_.quartiles == (2.0, 3.0, 4.0) and timing_.median == 3.0
    assert timing_.figures() == {"median_us": 3e6, "iqr_us": 2e6, "samples_us": [4e6, 1e6, 2e6, 3e6, 5e6]}
    assert Timing([2.0]).quartiles == (2.0, 2.0, 2.0)


def test_wall_time_is_real_time():
    found = timing.wall(lambda: time.sleep(0.01), CPU, 0.1)
    assert 0.01 <= found.median < 0.05 and len(found.samples) >= 5


def test_an_edited_result_is_refused(tmp_path):
    path = tmp_path / "deep" / "x.json"
    record.write(path, record.environment() | {"rows": [{"lengths": (1, 2), "tokens_per_s": 5.25}]})
    found = record.read(path)
    assert found["rows"] == [{"lengths": [1, 2], "tokens_per_s": 5.25}]
    assert found["torch"] == torch.__version__ and found["commit"].keys() == {"id", "dirty"} and found["command"]
    path.write_text(path.read_text().replace("5.25", "9.25"))
    with pytest.raises(ValueError, match=r"x\.json is not as it was measured"):
        record.read(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="not as it was measured"):
        record.read(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        record.read(path)
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


# --- kernels and encoder ----------------------------------------------------------------------------------------------

CEILINGS = {"copy": {"bytes_per_s": 1e15}, "float32": {"flops_per_s": 1e15}}


def quicken(monkeypatch):
    """Timings of a round or two."""
    for name in ("cold", "in_graph", "wall"):
        monkeypatch.setattr(timing, name, lambda run, device, *a, **k: (run(), Timing([1e-3, 2e-3, 3e-3]))[1])


@pytest.fixture
def quick(monkeypatch):
    quicken(monkeypatch)


def test_every_op_by_every_provider(quick):
    kept = []
    rows = kernels.run(shapes.TOY, CPU, CEILINGS, keep=kept.append)
    assert not kernels.failed(rows) and {row["op"] for row in rows} == set(kernels.OPS)
    assert len(kept[-1]) == len(rows) > len(kept[-2]) - 1 and len(kept) >= len(rows)  # after each provider
    timed = [row for row in rows if "cold" in row]
    assert {row["provider"] for row in timed} >= {"fastdistil", "eager torch", "matrix product alone", "SDPA, flash"}
    one = next(row for row in timed if row["op"] == "linear" and row["shape"] == "40 x 32 x 64")
    assert one["of_matmul"] == pytest.approx(2 * 40 * 32 * 64 / 2e-3 / 1e15) and one["cold"]["median_us"] == 2_000
    missing = {row["provider"]: row["missing"] for row in rows if "missing" in row}
    assert missing["flash-attn"] == "flash-attn is not installed" and "CUDA" in missing["torch.compile"]
    assert any(line.startswith("attention        L=16, uniform") for line in kernels.lines(rows))


def test_wrong_embeddings_are_not_timed():
    """What `encode`, jobs and the engine on texts are held to before they are timed."""
    texts = [text for _, text in corpus.stdlib_docstrings()[:40]]
    model = encoder.model_of(shapes.TOY.shape, CPU, torch.float32)
    embedder = Embedder(model, corpus.tokenizer_for(texts, 300), pooling="mean", normalize=True, max_length=64)
    found = embedder.encode(texts)
    truth = engine.check_texts(embedder, found, texts, most=8)
    with pytest.raises(AssertionError, match="error"):
        engine.check_texts(embedder, found[::-1].copy(), texts)
    truth.near(found, found + 1e-8)
    other = found.copy()
    other[39] *= 1 + 2**-13  # one that is not among those held to float64; 1.2207e-04, give or take what rounding does
    with pytest.raises(AssertionError, match=r"text 39 is off by 1\.22\de-04, allowed"):
        truth.near(other, found)
    other[39] = float("nan")
    with pytest.raises(AssertionError, match="text 39 is off by nan"):
        truth.near(other, found)
    found[7] += 1e-5
    with pytest.raises(AssertionError, match="error"):
        engine.check_texts(embedder, found, texts)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is told by Linux")
def test_peak_memory_on_cpu_is_of_the_call(monkeypatch):
    def blocks():  # 64 MiB and one block more; from the second time on they come from the heap
        return [torch.ones(2**20) for _ in range(17)]

    blocks()
    last = blocks()[-1]  # above free ones, which the heap keeps
    peak = encoder.Peak(CPU)
    before = peak.bytes()
    blocks()
    assert before < 2**22 and 0.9 * 2**26 < peak.bytes() < 1.3 * 2**26
    assert encoder.Peak(CPU).bytes() < 2**22 and last is not None
    monkeypatch.setattr(Path, "write_text", lambda *a: (_ for _ in ()).throw(PermissionError("read-only /proc")))
    assert encoder.Peak(CPU).bytes() is None


def test_the_engine_is_checked_in_every_round(monkeypatch):
    """One text of the last timed round, another one's precision, and the encoder that it is measured by."""
    model = encoder.model_of(shapes.TOY.shape, CPU, torch.float32)
    tokenizer = corpus.tokenizer_for(["a few words", "to make a tokenizer of"], 60)
    embedder = Embedder(model, tokenizer, pooling="mean", normalize=True, max_length=64)
    drive, calls = engine.drive, []

    words = [f"{i} words to make a tokenizer of" for i in range(200)]

    def driven(spoil, run=lambda: engine.of_tokens(embedder, 16, "long-tailed", 4_000)):
        def driving(*args):
            found, row = drive(*args)
            calls.append(len(found))
            spoil(found, len(calls))
            return found, row

        calls.clear()
        monkeypatch.setattr(engine, "drive", driving)
        return run()

    row = driven(lambda found, call: None)
    assert calls == [calls[0]] * (1 + engine.ROUNDS) and calls[0] > 300 and len(row["samples_s"]) == engine.ROUNDS
    for text, value in ((201, float("nan")), (201, 0.2), (calls[0] - 1, 1e-3)):  # the last is held to float64
        for when in (1, 1 + engine.ROUNDS):

            def spoil(found, call, when=when, text=text, value=value):
                if call == when:
                    found[text] += value

            with pytest.raises(AssertionError, match=r"error|finite|text 201 is off"):
                driven(spoil)

    def of_texts():
        return engine.of_texts(embedder, words, 0)

    assert driven(lambda found, call: None, of_texts)["tokenizer_tokens_per_s"] > 0
    for when in (1, 1 + engine.ROUNDS):
        with pytest.raises(AssertionError, match=r"error|finite"):
            driven(lambda found, call, when=when: found.__imul__(1 if call != when else float("nan")), of_texts)
    compute = Embedder._compute  # by the encoder alone, of which no rows are asked

    def off_alone(self, ids, cu, longest, positions, rows, full):
        return compute(self, ids, cu, longest, positions, rows, full) * (1 if len(rows) else 1.001)

    monkeypatch.setattr(Embedder, "_compute", off_alone)
    with pytest.raises(AssertionError, match="error"):
        driven(lambda found, call: None)


def test_ceilings_are_of_this_run(monkeypatch, tmp_path):
    stage = gpu.Stage(tmp_path, 1, dry=True)
    monkeypatch.setattr(timing, "ceilings", lambda *args: "measured now")
    assert stage.ceilings() == "measured now"
    here = record.environment() | {"dry": True, "ceilings": "before"}
    record.write(tmp_path / "ceilings.json", here)
    assert stage.ceilings() == "before"
    commit = {"id": "a" * 40, "dirty": True}
    others = (
        {"date": "2020-01-01T00:00:00+00:00"},
        {"cpu": "another"},
        {"torch": "1.0"},
        {"commit": commit},
        {"dry": 0},
    )
    for other in others:
        record.write(tmp_path / "ceilings.json", here | other)
        assert stage.ceilings() == "measured now"


def test_on_cpu_providers_take_turns(quick, monkeypatch):
    order, times = [], iter([1e-3, 9e-3, 9e-3, 2e-3, 4e-3, 9e-3])

    def cold(run, device, seconds=0.0):
        run()
        return Timing([next(times, 9e-3)] * 3)

    def named(name):
        return name, lambda case, stack: order.append(name) or kernels.eager(case, stack)

    monkeypatch.setattr(timing, "cold", cold)
    monkeypatch.setitem(kernels.PROVIDERS, "pool", [named("a"), named("b")])
    rows = kernels.run(shapes.TOY, CPU, CEILINGS, names=("pool",))
    assert order[:6] == ["a", "b", "b", "a", "a", "b"]
    first = rows[0]["cold"]
    assert first["turns_us"] == [1e3, 2e3, 4e3] and first["median_us"] == 2e3 and first["drift"] == 3
    assert len(first["samples_us"]) == 9 and rows[0]["of_copy"] == pytest.approx(rows[0]["bytes"] / 2e-3 / 1e15)


def test_a_wrong_provider_has_no_speed_and_fails_the_run(quick, monkeypatch):
    def wrong(case, stack):
        return lambda: kernels.reference.linear(*case.args) * 1.001

    monkeypatch.setitem(kernels.PROVIDERS, "linear", [*kernels.PROVIDERS["linear"], ("wrong", wrong)])
    rows = kernels.run(shapes.TOY, CPU, CEILINGS, names=("linear",))
    bad = [row for row in rows if row["provider"] == "wrong"]
    assert kernels.failed(rows) and bad and all("max error" in row["wrong"] and "cold" not in row for row in bad)
    assert sum(line.startswith("WRONG linear") for line in kernels.lines(rows)) == len(bad)
    assert all("wrong" not in row for row in rows if row not in bad)


def test_what_is_above_a_ceiling_is_an_error(quick):
    rows = kernels.run(shapes.TOY, CPU, CEILINGS | {"float32": {"flops_per_s": 1e3}}, names=("linear",))
    assert kernels.failed(rows) and "of a ceiling" in rows[0]["wrong"]


def test_no_time_left_is_said(quick):
    rows = kernels.run(shapes.TOY, CPU, CEILINGS, names=("pool",), minutes=-1)
    assert rows and all(row["missing"] == "no time was left" for row in rows) and not kernels.failed(rows)


def test_the_encoder_by_every_provider(results):
    rows = record.read(results / "cpu" / "encoder.json")["rows"]
    assert not kernels.failed(rows), [row for row in rows if "wrong" in row]
    timed = {row["provider"] for row in rows if "tokens_per_s" in row}
    assert timed >= {"fastdistil, padded call", "fastdistil, packed call", "transformers sdpa", "transformers eager"}
    half = next(row for row in rows if "fill 0" in row["batch"])
    assert half["tokens"] < 32 and half["tokens_per_s"] == pytest.approx(half["tokens"] / 2e-3)
    assert any("transformers" not in line and "x sdpa" in line for line in encoder.lines(rows))


def test_a_wrong_encoder_has_no_speed(quick, monkeypatch):
    def wrong(batch, stack):
        run = encoder.packed(batch, stack)
        return lambda: run() + 1e-3

    monkeypatch.setattr(encoder, "PROVIDERS", [("wrong", wrong)])
    rows = encoder.run(shapes.TOY, CPU)
    assert all("max error" in row["wrong"] and "tokens_per_s" not in row for row in rows)


def test_a_checkpoint_and_texts_of_ones_own(minilm, quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(encoder, "PROVIDERS", [p for p in encoder.PROVIDERS if p[0] != "ONNX Runtime"])  # it takes long
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "word " * (n % 5 + 1)}) + "\n" for n in range(39)))
    arguments = ["--toy", "--model", str(minilm), "--lengths-from", str(texts), "--out", str(tmp_path / "r.json")]
    assert encoder.main(arguments) == 0
    rows = record.read(tmp_path / "r.json")["rows"]
    assert {row["batch"] for row in rows} == {"texts 0-31", "texts 32-38"}
    assert rows[0]["tokens"] == sum(n % 5 + 3 for n in range(32))
    with pytest.raises(SystemExit):
        encoder.main(["--lengths-from", str(texts)])
    assert "goes with --model" in capsys.readouterr().err


# --- tuning ---------------------------------------------------------------------------------------------------------


def test_classes_are_what_is_looked_up(monkeypatch):
    """Every case, looked up as the launchers do, finds what is recorded for its class."""
    monkeypatch.setattr(_configs, "architecture", lambda device: 90)
    monkeypatch.setattr(_configs, "processors", lambda device: 132)
    matrix = shapes.with_dtypes(shapes.FULL, ["bfloat16", "float32"])
    meta, seen = torch.device("meta"), set()
    for found in tune.classes(matrix, meta, 132, (*kernels.GEMMS, "attention", "pool")):
        seen.add((found.op, found.name))
        for case in found.cases:
            marked = {
                "attention": Attention("looped", 16, warps=2, keys=16),
                "pool": Rows(3, 1_024, 7),
            }.get(case.op, Gemm("pointer", 16, 16, 16, warps=1, stages=7))
            with tune.forced(90, found, marked):
                if case.op == "attention":
                    _, _, longest, heads = case.args
                    looked = _configs.attention(longest, case.rows.shape[1] // 3 // heads, case.dtype, meta)
                elif case.op == "pool":
                    looked = _configs.row_kernel("pool", case.rows.shape[1], case.dtype, meta)
                else:
                    m, (n, k) = len(case.rows), case.weight.shape
                    looked = _configs.gemm(case.op, m, n, k, case.dtype, meta, True).config
            assert looked == marked, (found.op, found.name, case.name)
    assert {
        ("linear", "half/wide"),
        ("linear", "ieee/some"),
        ("linear_add_layer_norm", "half/64"),
        ("attention", "half/64/16"),
        ("pool", "half/1024"),
    } <= seen
    assert ("attention", "half/64/any") in seen and not _configs.RECORDED


def test_attention_in_each_of_its_forms(monkeypatch):
    """Beside the form that runs every other that can, and why not where it cannot."""
    monkeypatch.setattr(_configs, "architecture", lambda device: 90)
    forms = dict(kernels.PROVIDERS["attention"])
    found = {}
    for longest in (16, 64, 128, 512):
        args = torch.empty(4, 3 * 768), None, longest, 12
        on_card = types.SimpleNamespace(op="attention", args=args, dtype=torch.bfloat16, device=torch.device("cuda", 0))
        for form in ("short", "single", "looped"):
            with ExitStack() as stack:
                try:
                    forms[f"fastdistil, {form}"](on_card, stack)
                    config = _configs.attention(longest, 64, torch.bfloat16, CPU)
                    assert config.form == form and (config.longest is None or config.longest >= longest)
                    found[longest, form] = "runs"
                except kernels.Missing as why:
                    found[longest, form] = str(why).split(" ", 4)[2]
    assert found == {
        (16, "short"): "what", (16, "single"): "runs", (16, "looped"): "runs",
        (64, "short"): "no", (64, "single"): "what", (64, "looped"): "runs",
        (128, "short"): "no", (128, "single"): "what", (128, "looped"): "runs",
        (512, "short"): "no", (512, "single"): "no", (512, "looped"): "what",
    }  # fmt: skip
    assert _configs.attention(16, 64, torch.bfloat16, CPU).form == "short"


def test_winners_are_recorded_in_order(monkeypatch):
    path = Path(_configs.__file__)
    rows = [
        {"arch": 90, "op": "pool", "class": "half/1024", "winner": tune._written(Rows(8, 1_024, 4))},
        {"arch": 90, "op": "linear", "class": "half/many", "winner": tune._written(Gemm("tma", 128, 256, 64, 8, 3))},
        {"arch": 80, "op": "linear", "class": "half/many", "winner": None},
        {"arch": 90, "op": "linear", "class": "half/wide", "winner": None, "whole": "Library()"},
    ]
    once = tune.apply(rows, path.read_text())
    module = types.ModuleType("configs")
    monkeypatch.setitem(sys.modules, "configs", module)  # where its dataclasses look for their module
    exec(compile(once, "configs", "exec"), module.__dict__)
    library, many = (90, "linear", "half/wide/whole"), (90, "linear", "half/many")
    assert list(module.RECORDED) == [many, library, (90, "pool", "half/1024")]
    assert module.RECORDED[library] == module.Library()
    with monkeypatch.context() as patch:  # another search that finds it no quicker
        patch.setitem(_configs.RECORDED, library, _configs.Library())
        given = '"half/wide/whole"): Library()'
        assert given in tune.apply([], once) and given not in tune.apply([rows[-1] | {"whole": None}], once)
    assert module.RECORDED[90, "linear", "half/many"] == module.Gemm("tma", 128, 256, 64, 8, 3)
    assert module.GEMM.keys() == _configs.GEMM.keys()
    assert tune.apply([], path.read_text()) == path.read_text()


LIBRARY, TILES = "Library()", "Gemm(family='tma', block_m=128)"


@pytest.mark.parametrize(
    ("scores", "name", "winner", "whole"),
    [
        ({}, "half/many", None, None),
        ({TILES: 0.99, LIBRARY: 0.98}, "half/many", None, None),
        ({TILES: 0.9, LIBRARY: 0.89}, "half/many", TILES, None),
        ({TILES: 0.9, LIBRARY: 0.8}, "half/many", TILES, LIBRARY),
        ({TILES: 1.1, LIBRARY: 0.96}, "half/wide", None, LIBRARY),
        ({LIBRARY: 0.9}, "ieee/some", None, LIBRARY),
        ({TILES: 0.9, LIBRARY: 0.8}, "half/64", LIBRARY, None),
        ({TILES: 0.8, LIBRARY: 1.0}, "ieee/16", TILES, None),
    ],
)
def test_where_the_library_is_recorded(scores, name, winner, whole):
    assert tune.decided(scores, name) == {"winner": winner, "whole": whole}


def test_the_library_is_a_candidate_that_nobody_compiles(monkeypatch):
    case = next(
        kernels.cases("linear", shapes.with_dtypes(shapes.FULL, ["float32"]), torch.float32, torch.device("meta"))
    )
    found = tune.Class("linear", "ieee/16", (case,))
    every = list(tune.candidates("linear", "ieee/16", 90))
    assert _configs.Library() in every and {(c.across, c.split) for c in every[1:]} == {
        (False, False),
        (True, False),
        (False, True),
    }
    assert list(tune.compiled(found, [_configs.Library()], 90, 1)) == [(_configs.Library(), None)]


def test_what_spills_is_not_timed():
    """The compile gate's verdict on a candidate that fits and one that does not."""
    case = next(
        kernels.cases("bias_gelu", shapes.with_dtypes(shapes.FULL, ["bfloat16"]), torch.bfloat16, torch.device("meta"))
    )
    found = tune.Class("bias_gelu", "half/many", (case,))
    fits = Gemm("tma", 128, 128, 64, warps=8, stages=3, halves=2, per_sm=2, registers=128)
    spills = Gemm("tma", 128, 256, 64, warps=4, stages=3)
    verdicts = dict(tune.compiled(found, [fits, spills], 90, 2))
    assert verdicts[fits] is None and "spills" in verdicts[spills]
    alone = replace(fits, stages=4)  # 160 KiB
    assert list(tune.compiled(found, [alone], 90, 1)) == [(alone, "a multiprocessor holds 1, not 2")]
    row = {"registers": "64", "shared": "60000", "launch": "x warps=4 stages=3"}
    assert [compile_gate.resident(row | {"sm": sm}) for sm in ("80", "86", "90", "120")] == [2, 1, 3, 1]


def test_every_case_of_a_product_is_compiled(monkeypatch):
    """How many programs share its depth differs; what is judged is the product, not the LayerNorm behind it."""
    matrix = replace(shapes.with_dtypes(shapes.FULL, ["bfloat16"]), rows=(1_024, 256, 64))
    meta, seen = torch.device("meta"), []
    (found,) = [
        one for one in tune.classes(matrix, meta, 132, ("linear_add_layer_norm",)) if one.name == "half/some"
    ]  # of many rows the product alone is searched
    assert {one.name for one in tune.classes(matrix, meta, 132, ("linear_add_layer_norm",))} == {"half/some", "half/64"}

    def compile_all(entries, jobs, keep):
        seen.extend(entries)
        for entry in entries:
            spills = "9" if "PARTS=2" in entry.describe() else "0"
            yield entry, {"spills": spills, "shared": "0", "sm": "90", "registers": "64", "launch": "warps=4"}

    monkeypatch.setattr(compile_gate, "compile_all", compile_all)
    alone = Gemm("pointer", 64, 64, 64, 4, 3)
    verdicts = list(tune.compiled(found, [alone, replace(alone, parts=8), Gemm("pointer", 64, 32, 64, 4, 3)], 90, 1))
    assert [entry.name for entry in seen] == ["gemm_pointer"] * 3 and all(len(c.weight) == 768 for c in found.cases)
    assert sorted(verdicts, key=str) == sorted(
        [(alone, None), (replace(alone, parts=8), "9 spills"), (Gemm("pointer", 64, 32, 64, 4, 3), None)], key=str
    )
    monkeypatch.setattr(tune, "_processors", lambda device: 10_000)
    assert list(tune.compiled(found, [replace(alone, parts=8)], 90, 1)) == [(replace(alone, parts=8), None)]
    assert {e.describe().partition("PARTS=")[2][0] for e in seen[3:]} == {"4", "8"}  # of 12 and of 48 steps


def test_a_depth_that_nobody_would_share_is_no_candidate(monkeypatch):
    matrix = replace(shapes.with_dtypes(shapes.FULL, ["bfloat16"]), rows=(1_024, 16))
    found = {one.name: one for one in tune.classes(matrix, torch.device("meta"), 132, ("linear_add_layer_norm",))}
    some, few = Gemm("pointer", 64, 64, 64, 4, 3, parts=8), Gemm("pointer", 16, 32, 128, 4, 3, parts=8)
    assert tune._has_idle_parts(found["half/some"], some) and tune._has_idle_parts(found["half/16"], few)
    assert [tune._has_idle_parts(found["half/16"], replace(few, parts=n)) for n in (1, 2, 4)] == [False] * 3
    assert not tune._has_idle_parts(found["half/some"], replace(some, parts=1))
    assert not tune._has_idle_parts(found["half/some"], _configs.Library())
    asked = []
    with monkeypatch.context() as few_of_them:
        few_of_them.setattr(tune, "candidates", lambda *args: [some, replace(some, parts=1)])
        few_of_them.setattr(tune, "compiled", lambda found, configs, *rest: (asked.extend(configs), [])[1])
        tune.tune(found["half/some"], 90, 9e9, 2)
    assert asked == [replace(some, parts=1)]
    heights = [
        {c.block_m for c in tune.candidates("linear", "half/16", 90, n) if isinstance(c, Gemm)} for n in (9, 32, 64)
    ]
    assert heights == [{16}, {16, 32}, {16, 32, 64}]
    for op, shared in (("linear_add_layer_norm", {1, 2, 4, 8}), ("linear", {1})):
        assert {c.parts for c in tune.candidates(op, "half/16", 90) if isinstance(c, Gemm)} == shared
    every = tune.candidates("linear_add_layer_norm", "half/some", 90)
    assert all(c.parts == 1 for c in every if isinstance(c, Gemm) and c.family == "tma")


def test_what_was_compiled_is_not_compiled_again(monkeypatch):
    """Where the time ran out before anything was timed."""
    configs = [Gemm("pointer", 16, n, 32, 4, stages) for n in (32, 64, 128, 256) for stages in (2, 3)]
    case = types.SimpleNamespace(name="a case", rows=[0], device=CPU)
    found, clock, asked = tune.Class("linear", "half/16", (case,)), [0.0], []

    def compiled(found, some, arch, jobs):
        asked.extend(some)
        clock[0] += 1
        yield from ((config, "it spills" if config.stages == 2 else None) for config in some)

    monkeypatch.setattr(tune, "compiled", compiled)
    monkeypatch.setattr(tune, "candidates", lambda *args: configs)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    kept = []
    first = tune.tune(found, 90, 0.5, 2, keep=kept.append)
    assert asked == configs[:4] and kept[0]["fitting"] == [tune._written(c) for c in configs[1:4:2]]
    assert first["fit"] == 2 and first["stopped"].startswith("4 of 8 compiled")
    for before in (first, *kept):
        asked.clear()
        again = tune.tune(found, 90, 9e9, 2, before)
        assert again["fit"] == 4 and asked == configs[4:]
    asked.clear()
    tune.tune(found, 90, 9e9, 2, {"wrong": {tune._written(configs[1]): "max error"}})
    assert asked == [configs[0], *configs[2:]]


def test_a_class_cut_off_is_gone_on_with(monkeypatch, tmp_path):
    """Candidate by candidate, on the same architecture only; what was recorded stays until the search is whole."""
    clock, timed = [0.0], []

    class Trial:
        def __init__(self, found):
            pass

        def seconds(self, arch, config, each):
            if each == 0.02:
                timed.append(config)
                clock[0] += 1
                if config.stages == 2:
                    raise AssertionError("max error")
            return [1.0 if config is None or config.block_n < 128 else 0.5]

    configs = [Gemm("pointer", 16, n, 32, 4, stages) for n in (32, 64, 128, 256) for stages in (2, 3)]
    case = types.SimpleNamespace(name="a case", rows=[0], device=types.SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(tune, "Trial", Trial)
    monkeypatch.setattr(tune, "candidates", lambda *args: configs)
    monkeypatch.setattr(
        tune, "compiled", lambda found, some, arch, jobs: [(c, "spills" if c.block_n == 64 else None) for c in some]
    )
    monkeypatch.setattr(tune, "classes", lambda *args: [tune.Class("linear", "half/many", (case,))])
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(tune._configs, "architecture", lambda device: 90)
    monkeypatch.setattr(tune._configs, "processors", lambda device: 132)
    arguments = (shapes.TOY, torch.device("cuda"), tmp_path / "tune.json")
    other = {"arch": 80, "op": "linear", "class": "half/many", "winner": None, "fit": 0, "compiled": 0}
    record.write(tmp_path / "tune.json", {"rows": [other]})
    (_, first) = tune.run(*arguments, minutes=1.5 / 60)
    assert first["stopped"].startswith("after 2 of 6") and first["winner"] is None and len(timed) == 2
    known = 'RECORDED: dict[K, V] = {\n    (90, "linear", "half/many"): x,\n}\n\n'
    monkeypatch.setitem(_configs.RECORDED, (90, "linear", "half/many"), configs[0])
    assert "half/many" in tune.apply([first], known)
    (_, second) = tune.run(*arguments, minutes=1)
    assert len(timed) == 6 and len(set(timed)) == 6 and "stopped" not in second and len(second["wrong"]) == 3
    assert second["winner"] == tune._written(configs[5]) and tune.run(*arguments, minutes=1)[1] == second
    assert len(timed) == 6 and any("max error" in line for line in tune.lines([second]))
    another = types.SimpleNamespace(**vars(case) | {"name": "another case"})  # of which nothing is known
    monkeypatch.setattr(tune, "classes", lambda *args: [tune.Class("linear", "half/many", (case, another))])
    assert tune.run(*arguments, minutes=1)[1]["cases"] == ["a case", "another case"] and len(timed) == 12
    (_, row) = record.read(tmp_path / "tune.json")["rows"]
    assert row["commit"] == record.commit() and row["triton"] and row["date"]
    for other in ("triton", "torch"):  # by another compiler: nothing of it holds
        monkeypatch.setattr(getattr(tune, other), "__version__", "9.9")
        (_, again) = tune.run(*arguments, minutes=1)
        assert again["of"] != row["of"] and again["winner"] == second["winner"]
    assert len(timed) == 24
    kernels_here = shutil.copytree(tune.CONFIGS.parent, tmp_path / "kernels")
    before = tune.made_of()
    monkeypatch.setattr(tune, "CONFIGS", kernels_here / tune.CONFIGS.name)
    assert tune.made_of() == before
    source = tune.CONFIGS.read_text()
    tune.CONFIGS.write_text(tune.apply([second | {"winner": tune._written(configs[5])}], source))
    assert tune.CONFIGS.read_text() != source and tune.made_of() == before  # what is recorded is no reason
    for name in ("_configs.py", "attention.py"):
        with open(kernels_here / name, "a") as file:
            file.write("# other\n")
        assert tune.made_of() != before
        before = tune.made_of()
    assert [row["arch"] for row in tune.run(*arguments, minutes=-1)] == [80]  # none of it is applied any more


def test_scores():
    assert tune.score([1.0, 2.0], [2.0, 4.0]) == pytest.approx(0.5)
    assert tune.score([1.0, 4.0], [2.0, 2.0]) == pytest.approx(1.0)


# --- what the results say -------------------------------------------------------------------------------------------


def kernel_row(shape, provider, us, **more):
    times = {"median_us": us, "samples_us": [us * 0.99, us, us * 1.01]}
    row = {"op": "linear", "shape": shape, "dtype": "bfloat16", "provider": provider, "flops": 1e9, "of_copy": 0.5}
    return row | {"cold": times, "graph": times} | more


def test_goals(tmp_path):
    verdicts = {line.split()[0]: line.split()[4] for line in goals.table(goals.Results(tmp_path))[0][1:]}
    assert set(verdicts.values()) == {"unmeasured"} and goals.table(goals.Results(tmp_path))[1]
    rows = [
        kernel_row("16 x 768 x 768", "fastdistil", 10.0),  # too few rows to be judged
        kernel_row("16 x 768 x 768", "eager torch", 1.0),
        kernel_row("5632 x 768 x 768", "matrix product alone", 9.6),
        kernel_row("16896 x 2304 x 768", "fastdistil", 10.0),  # the others are not there
        kernel_row("16896 x 2304 x 768", "eager torch", 99.0),
    ]
    for n in (n for n in shapes.FULL.rows if n >= 5_632):
        rows += [
            kernel_row(f"{n} x 768 x 768", "fastdistil", 10.0),
            kernel_row(f"{n} x 768 x 768", "eager torch", 11.0),
        ]
        rows += [
            kernel_row(f"{n} x 768 x 3072", "fastdistil", 10.0),
            kernel_row(f"{n} x 768 x 3072", "eager torch", 9.0),
        ]
        rows += [kernel_row(f"{n} x 3072 x 768", name, 10.0, op="bias_gelu") for name in ("fastdistil", "eager torch")]
    rows[-2] = {k: v for k, v in rows[-2].items() if k not in ("cold", "graph")} | {"wrong": "max error"}
    wrong = dict(tokens_per_s=1.0, wrong="max error", samples_s=[1.0], dtype="bfloat16")
    engine = [{"input": f"ids, L={n}, fixed"} | wrong for n in (128, 64)]
    record.write(tmp_path / "h200" / "engine.json", ON_CARD | {"rows": engine})
    record.write(tmp_path / "h200" / "kernels.json", ON_CARD | {"rows": rows})
    one = {"median": 1.0, "data": [1.0]}
    entries = [
        {"name": "bench_start_to_end", "extra_info": {}, "stats": {"median": 2.5, "data": [2.5]}},
        {"name": "x", "extra_info": {"peer": "CTranslate2 float32, sorted", "ratio": 0.9}, "stats": one},
    ]
    record.write(tmp_path / "cpu" / "jobs.json", {"machine_info": AROUND, "benchmarks": entries})
    lines, right = goals.table(goals.Results(tmp_path))
    found = {line.split()[0]: line.split()[3:5] for line in lines}
    assert (
        found["out"] == ["0.96", "met"] and found["ffn2"] == ["0.9", "missed"] and found["qkv"] == ["-", "unmeasured"]
    )
    assert found["cpu-start"] == ["2.5", "met"] and found["cpu-ct2"] == ["0.9", "missed"] and not right
    assert found["ffn1"] == found["ffn1-flops"] == found["engine-ids"] == ["wrong", "missed"]
    record.write(tmp_path / "h200" / "kernels.json", ON_CARD | {"gpu": CARD | {"name": "An L4"}, "rows": rows})
    with pytest.raises(ValueError, match="h200/kernels.json is of another GPU, An L4"):
        goals.table(goals.Results(tmp_path))


def test_other_processors_stand_beside(tmp_path, monkeypatch):
    def suite(place, cpu, **ratios):
        entries = [
            {
                "name": "bench",
                "extra_info": {"peer": peer, "ratio": ratio, "tokens_per_second": 2000, "peer_fill": 0.5},
                "stats": {"median": 1.0, "data": [1.0]},
            }
            for peer, ratio in ratios.items()
        ]
        around = AROUND | {"cpu": cpu, "python": "3.11"}
        record.write(tmp_path / place / "encode.json", {"machine_info": around, "benchmarks": entries})

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    suite("cpu", "AMD EPYC", a=2.0, b=3.0)
    assert report.cpu_table().splitlines()[0].endswith("| peer's fill |")
    suite("cpu-intel", "Intel(R) Xeon(R) Processor", b=1.5)
    suite("cpu-old", "Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", a=1.0, b=1.25)
    head, line, *rows, empty, first, second, third = report.cpu_table().splitlines()
    assert head.endswith("| peer's fill | ratio, Intel Xeon | ratio, Intel Xeon |") and not empty
    assert len({row.count("|") for row in (head, line, *rows)}) == 1
    assert rows == ["| a | 2.00x | 2,000 |  | 0.50 | | 1.00x |", "| b | 3.00x | 2,000 |  | 0.50 | 1.50x | 1.25x |"]
    assert first.startswith("AMD EPYC, ") and second.startswith("Intel(R) Xeon(R) Pr") and "E5-2680" in third
    suite("cpu-zen-4", "AMD EPYC, Zen 4", a=1.0)
    assert report.cpu_table().splitlines()[0].endswith("| ratio, AMD EPYC, Zen 4 |")


def test_labels_against_transformers_pipelines(tmp_path, monkeypatch):
    entry = {
        "name": "bench",
        "extra_info": {"peer": "theirs", "ratio": 3.0, "tokens_per_second": 2000, "batch_size": 8},
        "stats": {"median": 1.0, "data": [1.0]},
    }
    around = AROUND | {"python": "3.11"}
    record.write(tmp_path / "cpu" / "pipelines.json", {"machine_info": around, "benchmarks": [entry]})
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    head, _, line, *_ = report.pipelines_table().splitlines()
    assert head.endswith("| peer's batch size |") and line == "| theirs | 3.00x | 2,000 |  | 8 |"


def test_what_a_call_takes_of_the_host(tmp_path, monkeypatch):
    us = {"fastdistil": 812.4, "through the ops": 2031.0, "transformers sdpa": 1300.0}
    entry = {"name": "bench", "extra_info": {"batch": "1 x 16", "us": us}, "stats": {"data": [1.0]}}
    record.write(tmp_path / "cpu" / "host.json", {"machine_info": AROUND | {"python": "3"}, "benchmarks": [entry]})
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.host_table().splitlines()[2] == "| 1 x 16 | 812 | 2,031 | 1,300 |"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("vendor_id : AuthenticAMD|cpu family\t: 25|model name : AMD EPYC|flags : avx2 avx512f", "AMD EPYC, Zen 4"),
        ("vendor_id : AuthenticAMD|cpu family\t: 26|model name : AMD EPYC|flags : avx2 avx512f", "AMD EPYC, Zen 5"),
        ("vendor_id : AuthenticAMD|cpu family\t: 25|model name : AMD EPYC 7763|flags : avx2", "AMD EPYC 7763"),
        ("vendor_id : AuthenticAMD|cpu family\t: 27|model name : AMD EPYC|flags : avx512f", "AMD EPYC"),
        ("vendor_id : GenuineIntel|cpu family\t: 6|model name : Xeon: 3|flags : avx512f", "Xeon: 3"),
        ("vendor_id : GenuineIntel|model name : Xeon||model name : Atom", "Xeon"),
        ("", "elsewhere"),
        (None, "elsewhere"),
    ],
)
def test_the_processor_by_name(lines, expected, monkeypatch):
    def read_text(self, **options):
        if lines is None or str(self) != "/proc/cpuinfo":
            raise FileNotFoundError(self)
        return lines.replace("|", "\n")

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr("platform.processor", lambda: "elsewhere")
    assert record._cpu() == expected


def test_goals_of_the_committed_results(capsys):
    report.main(["--goals"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("# ") and len(lines) == len(goals.GOALS)
    assert all(line.split()[4] in ("met", "missed", "unmeasured") for line in lines)
    assert "cpu-sorted" in lines[1] and "unmeasured" not in lines[1]


def test_two_sets_are_compared_beyond_their_noise(tmp_path, capsys):
    def rows(**times):
        return [kernel_row("16 x 8 x 8", name.replace("ours", "fastdistil,"), us) for name, us in times.items()]

    before = rows(ours_same=10.0, ours_slower=10.0, ours_faster=10.0, ours_noisy=10.0, ours_gone=10.0, peer=10.0)
    after = rows(ours_same=10.2, ours_slower=10.8, ours_faster=9.0, peer=20.0)
    noisy = {"median_us": 12, "samples_us": [8.0, 12.0, 16.0]}
    after.append(rows(ours_noisy=12.0)[0] | {"cold": noisy, "graph": noisy})
    for name, found in (("a", before), ("b", after)):
        record.write(tmp_path / name / "kernels.json", ON_CARD | {"rows": found})
        record.write(tmp_path / f"{name}-on-cpu.json", AROUND | {"rows": found})
    record.write(tmp_path / "other.json", AROUND | {"rows": [kernel_row("8 x 8 x 8", "fastdistil", 1.0)]})
    wrong = kernel_row("16 x 8 x 8", "fastdistil,_faster", 0) | {"wrong": "no"}
    del wrong["cold"], wrong["graph"]
    record.write(
        tmp_path / "wrong.json",
        ON_CARD | {"rows": [row for row in after if "faster" not in row["provider"]] + [wrong]},
    )

    def compare(a, b):
        code = report.main(["--compare", str(tmp_path / a), str(tmp_path / b)])
        return code, capsys.readouterr()

    code, said = compare("a", "b")
    lines = said.out.splitlines()
    assert code == 1 and [line.split()[0] for line in lines[:6]] == ["SLOWER"] * 2 + ["faster"] * 2 + ["slower"] * 2
    assert "slower" in lines[0] and "1.080" in lines[0] and "peer" in lines[4]
    assert lines[-1].startswith("6 changed, 4 within the noise, 2 in one")
    assert sum(line.startswith("GONE") and "fastdistil,_gone" in line for line in lines) == 2
    for path in (tmp_path / "b").iterdir():
        record.write(tmp_path / "c" / path.name, ON_CARD | {"rows": after, "gpu": CARD | {"name": "An H100"}})
    code, said = compare("a", "c")
    assert code == 0 and said.out.startswith("not the same machine") and "SLOWER" not in said.out
    assert compare("a", "a/kernels.json")[0] == 0
    assert compare("a/kernels.json", "b-on-cpu.json")[1].out.startswith(
        "not the same machine: An H200 and a CPU, 2 thr"
    )
    code, said = compare("a/kernels.json", "wrong.json")  # files of other names
    assert code == 1 and "WRONG  where it was right before  linear, 16 x 8 x 8, bfloat16, fastdistil,_f" in said.out
    code, said = compare("a-on-cpu.json", "b-on-cpu.json")  # nothing of ours by more than 30 %
    assert code == 1 and "SLOWER" not in said.out and said.out.count("GONE") == 1
    code, said = compare("a", "other.json")
    assert code == 1 and "nothing in common" in said.err
    code, said = compare("a", "no-such-revision")
    assert code == 1 and "no-such-revision is no file, directory or revision" in said.err


def test_on_cpu_turns_are_compared(tmp_path):
    """A machine that is twice as slow for a turn, or for a whole run, changes nothing; we, twice as slow, do."""

    def of(ours, peer):
        rows = [kernel_row("8 x 8 x 8", "fastdistil", 0), kernel_row("8 x 8 x 8", "eager torch", 0)]
        for row, turns in zip(rows, (ours, peer), strict=True):
            row["cold"] = {"turns_us": turns, "median_us": turns[0], "samples_us": turns}
        record.write(tmp_path / "r.json", AROUND | {"rows": rows})
        return compare.load(str(tmp_path / "r.json"))

    plain, slow = of([10, 10, 10], [20, 20, 20]), of([40, 10, 20], [80, 20, 40])
    assert compare.compare(plain, slow)[1] and compare.compare(slow, plain)[1]
    lines, right = compare.compare(plain, of([20, 20, 20], [20, 20, 20]))
    assert not right and lines[0].startswith("SLOWER  2.000")
    wide = of([8, 9, 10, 11, 12], [20] * 5)  # the middle half spreads by a fifth: the band is two
    assert compare.compare(wide, of([13.5] * 5, [20] * 5))[1] and not compare.compare(wide, of([14.5] * 5, [20] * 5))[1]
    fewer = of([10, 10, 10], [20, 20])  # a peer that was stopped: times alone
    assert compare.compare(plain, fewer)[1] and not compare.compare(plain, of([14, 14, 14], [20, 20]))[1]
    one_off = of([10, 10, 10, 10, 10, 10, 10, 60], [20] * 8)  # a single turn widens no band
    assert compare.compare(one_off, plain)[1] and not compare.compare(one_off, of([14] * 8, [20] * 8))[1]

    def beside(**peers):
        return {
            "x": compare.Measured([10.0], 0.3, "here", turns=[10.0] * 3, peers={k: [v] * 3 for k, v in peers.items()})
        }

    usual = beside(a=20.0, b=20.0, c=20.0, d=20.0)
    assert compare.compare(usual, beside(a=8.0, b=20.0, c=20.0, d=20.0))[1]  # one of four in 2.5 times less
    assert not compare.compare(usual, beside(a=8.0))[1]
    for other in (beside(a=20.0), beside(a=20.0, b=20.0, c=20.0, d=20.0, e=1.0)):  # who is in one of the two only
        assert compare.compare(usual, other)[1] and compare.compare(other, usual)[1]
    assert compare.compare(usual, beside())[1] and compare.compare(beside(), usual)[1]  # times alone
    suite = {"machine_info": AROUND, "benchmarks": [{"name": "x", "stats": {"data": [1.0]}, "extra_info": {}}]}
    for name, ratios in (("a", [2.0, 2.1]), ("b", [1.5, 1.5])):
        suite["benchmarks"][0]["extra_info"]["ratios"] = ratios
        record.write(tmp_path / f"{name}.json", suite)
    assert not compare.compare(*compare.load_both(str(tmp_path / "a.json"), str(tmp_path / "b.json")))[1]


def test_suites_are_compared_by_what_they_tell(tmp_path):
    """And not by the time of a process that does other things, too; what is gone from a suite is a regression."""

    def of(**benchmarks):
        entries = [
            {"name": name, "fullname": f"benchmarks/bench_x.py::{name}", "stats": {"data": [1.0]}, "extra_info": info}
            for name, info in benchmarks.items()
        ]
        record.write(tmp_path / "r.json", {"machine_info": AROUND, "benchmarks": entries})
        return compare.load(str(tmp_path / "r.json"))

    ours = {"compared": {"by the bare tokenizer's time": [1.0, 1.01], "bytes": [100.0]}}
    before = of(words=ours, other={})
    assert compare.compare(before, of(words=ours, other={})) == (compare.compare(before, before)[0], True)
    for worse in (
        {"by the bare tokenizer's time": [3.0, 3.0], "bytes": [100.0]},
        ours["compared"] | {"bytes": [900.0]},
    ):
        lines, right = compare.compare(before, of(words={"compared": worse}, other={}))
        assert not right and lines[0].startswith("SLOWER")
    lines, right = compare.compare(before, of(words=ours))
    assert not right and any(line.startswith("GONE   r.json: other") for line in lines)
    assert compare.compare(of(words=ours), before)[1]


def test_what_fails_after_it_was_timed_has_no_figures(tmp_path, monkeypatch):
    """pytest-benchmark would write them: a suite's JSON, the tables and the goals."""
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "bench_own.py").write_text(
        "def bench_right(benchmark):\n    benchmark.pedantic(int)\n\n"
        "def bench_wrong(benchmark):\n    benchmark.pedantic(int)\n    assert 1 == 2, 'not the same'\n"
    )
    for name in ("conftest.py", "__init__.py"):
        shutil.copy(record.ROOT / "benchmarks" / name, tmp_path / name)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        str(record.ROOT / "pyproject.toml"),
    ]
    command += [f"--rootdir={tmp_path}", "--benchmark-only", f"--benchmark-json={tmp_path / 'r.json'}", "bench_own.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    paths = os.pathsep.join([str(record.ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=tmp_path, env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = record.measured(tmp_path / "r.json")
    assert [entry["name"] for entry in found["benchmarks"]] == ["bench_right"]
    [(name, why)] = found["wrong"].items()
    assert name.endswith("::bench_wrong") and why.startswith("not the same")
    (tmp_path / "cpu").mkdir()
    shutil.copy(tmp_path / "r.json", tmp_path / "cpu" / "encode.json")
    results = goals.Results(tmp_path)
    assert results.suite("encode", "bench_right", "seconds") > 0 and math.isnan(results.suite("encode", "x", "ratio"))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert "WRONG, so without figures: bench_wrong." in report.cpu_table()


def test_kernels_in_several_processes(tmp_path):
    arguments = ["--toy", "--ops", "pool", "--processes", "2", "--out", str(tmp_path / "r.json")]
    assert kernels.main(arguments) == 0
    rows = [row for row in record.read(tmp_path / "r.json")["rows"] if "cold" in row]
    assert rows and all(len(row["cold"]["turns_us"]) == 2 * timing.TURNS["cpu"] for row in rows)
    ceilings = record.read(tmp_path / "r.json")["ceilings"]
    for row in rows:  # of the ceilings that the file holds, the higher ones of two
        rate = row["bytes"] / row["cold"]["median_us"] * 1e6
        assert row["of_copy"] == pytest.approx(rate / ceilings["copy"]["bytes_per_s"])
    two = [kernel_row("8 x 8 x 8", "fastdistil", us, dtype="float32", bytes=2e9, flops=1e9) for us in (1.0, 3.0)]
    for row in two:
        row["cold"] |= {"turns_us": [row["cold"]["median_us"]]}
        row["graph"] = row["cold"]
    found = kernels.joined(two, CEILINGS)
    assert found["cold"]["median_us"] == pytest.approx(2, abs=0.05) and found["cold"]["drift"] == 2
    assert (found["of_copy"], found["of_matmul"]) == pytest.approx((1.0, 0.5), abs=0.05)
    assert kernels.joined([two[0], two[1] | {"wrong": "x"}], CEILINGS)["wrong"] == "x"
    assert kernels.joined([two[0], {"missing": "no time was left"}, {"wrong": "x"}], CEILINGS) == {"wrong": "x"}
    assert "missing" in kernels.joined([two[0], {"missing": "no time was left"}], CEILINGS)


def test_ratios_are_of_turns():
    ours, peer = {"turns_us": [1.0, 4.0, 1.0], "median_us": 1.0}, {"turns_us": [2.0, 8.0, 9.0], "median_us": 8.0}
    assert timing.ratio(peer, ours) == 2.0
    assert timing.ratio(peer | {"turns_us": [1.0]}, ours) == 8.0


def test_the_table_of_the_encoder(tmp_path, monkeypatch):
    real = goals.Results
    monkeypatch.setattr(goals, "Results", lambda: real(tmp_path))
    assert report.encoder_table() == "Not measured yet."
    row = {"batch": "1 x 32, fill 1.00", "dtype": "float32", "texts": 1, "length": 32, "fill": 1.0}
    rows = [
        row
        | {
            "provider": "fastdistil, packed call",
            "median_us": 10.0,
            "tokens_per_s": 800_000.0,
            "samples_us": [10],
            "p99_us": 11.0,
        },
        row
        | {
            "provider": "fastdistil, padded call",
            "median_us": 20.0,
            "tokens_per_s": 400_000.0,
            "samples_us": [20],
            "p99_us": 21.0,
        },
        row | {"provider": "transformers sdpa", "median_us": 15.0, "tokens_per_s": 533_333.0, "samples_us": [15]},
        row | {"provider": "transformers flash_attention_2", "missing": "no flash"},
    ]
    around = ON_CARD
    record.write(tmp_path / "h200" / "encoder.json", around | {"rows": rows})
    table = report.encoder_table().splitlines()
    assert table[2] == "| 1 x 32, fill 1.00 | float32 | 800,000 | 0.0 (0.0) | 1.50x |"
    rows[0]["peak_bytes"] = 3 * 2**20
    record.write(tmp_path / "h200" / "encoder.json", around | {"rows": rows})
    measured = report.encoder_table().splitlines()
    assert "| peak MiB (of sdpa) | sdpa" in measured[0] and measured[2].endswith("0.0 (0.0) | 3 () | 1.50x |")
    rows[2]["peak_bytes"] = 5 * 2**20
    record.write(tmp_path / "h200" / "encoder.json", around | {"rows": rows})
    assert "0.0 (0.0) | 3 (5) | 1.50x |" in report.encoder_table()
    assert "Missing: transformers flash_attention_2 (no flash)." in table and table[-1].startswith(
        "An H200, driver 1.2,"
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Toy results of kernels and encoder on CPU, and of the same as if on a GPU."""
    pytest.importorskip("transformers")
    tmp_path = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        found = {
            "kernels": {"ceilings": CEILINGS, "rows": kernels.run(shapes.TOY, CPU, CEILINGS)},
            "encoder": {"rows": encoder.run(replace(shapes.TOY, docstrings=3), CPU)},
        }
    for stage, result in found.items():
        record.write(tmp_path / "results" / "cpu" / f"{stage}.json", AROUND | result)
        record.write(tmp_path / "results" / "h200" / f"{stage}.json", result | ON_CARD)
    (tmp_path / "results" / "compile").mkdir()
    return tmp_path / "results"


def test_pictures(results, tmp_path):
    pytest.importorskip("matplotlib")
    directory = tmp_path / "figures"
    directory.mkdir()
    (directory / "cpu-foreign-dark.svg").write_text("<svg/>")
    assert len(figures.out_of_step(results, directory)) == 2 * 2 * len(figures.PICTURES) + 1
    figures.draw(results, directory)
    names = {p.name for p in directory.iterdir()}
    themes = product(("cpu", "h200"), figures.PICTURES, figures.THEMES)
    assert names == {"README.md"} | {f"{place}-{name}-{theme}.svg" for place, name, theme in themes}
    assert figures.out_of_step(results, directory) == []
    drawn = {p: p.read_text() for p in directory.iterdir()}
    for path, text in drawn.items():
        if path.suffix == ".svg":
            root = ElementTree.fromstring(text)
            assert root.tag.endswith("svg") and ("on CPU, not on a GPU" in text) == path.name.startswith("cpu")
            assert figures.THEMES["dark" if "dark" in path.name else "light"][0] in text
    fill = drawn[directory / "cpu-fill-light.svg"]
    assert "transformers sdpa" in fill and "fastdistil" in fill and "Speedup by fill, 2 texts of at most 16" in fill
    points = drawn[directory / "cpu-roofline-dark.svg"]
    assert "linear, 32 x 64 (40 x 32 x 64)" in points and "linear_add_layer_norm, 32 x 64 (" in points
    assert all(f"{op} (" in points for op in kernels.OPS if not op.startswith("linear"))
    assert "cpu-error-dark.svg" in drawn[directory / "README.md"]
    figures.draw(results, directory)
    assert drawn == {p: p.read_text() for p in directory.iterdir()}  # the same bytes again
    for name in ("README.md", "cpu-error-light.svg"):
        whole = (directory / name).read_text()
        (directory / name).write_text(whole.replace("e", "f", 1))
        assert figures.out_of_step(results, directory) == ["a picture or docs/figures/README.md is not as it was drawn"]
        (directory / name).write_text(whole)
    for path in (directory / "h200-error-light.svg", directory / "cpu-fill-dark.svg"):
        path.unlink() if "h200" in path.name else path.write_text("<svg/>")
    told = figures.out_of_step(results, directory)
    assert told == ["cpu-fill-dark.svg was drawn from other results", "h200-error-light.svg is missing"]


def test_the_table_of_kernels(results, monkeypatch):
    real = goals.Results
    monkeypatch.setattr(goals, "Results", lambda: real(results))
    table = report.kernels_table().splitlines()
    rows = [line for line in table if line.startswith("| ") and "IQR" not in line]
    by_length = 2 * 2 + 3 * 2  # attention of two forms; pool, pack, unpack
    assert table[0].startswith("| op, float32 |") and len(rows) == 6 + 2 + by_length  # GEMMs, row ops
    assert (
        any(line.startswith("| linear, 40 x 32 x 64 | 2,000 (2,000) | 2,000 |") for line in rows)
        and "An H200" in table[-1]
    )
    assert "flash-attn (flash-attn is not installed)" in table[-3]
    assert not any("16 x" in line for line in rows)  # the larger of two row counts only


def test_lengths_of_docstrings(results):
    rows = [r for r in record.read(results / "cpu" / "encoder.json")["rows"] if r["batch"] == "3 docstrings"]
    assert rows[0]["texts"] == 3 and 3 < rows[0]["length"] <= 256 and rows[0]["tokens"] < 3 * rows[0]["length"]
    assert rows[0]["error"]["max"] < 1e-5


def test_onnx_runtime_is_a_peer(results):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    rows = [r for r in record.read(results / "cpu" / "encoder.json")["rows"] if r["provider"] == "ONNX Runtime"]
    assert rows and all("tokens_per_s" in row for row in rows)


def test_the_committed_results_are_as_they_were_measured():
    files = sorted((record.ROOT / "benchmarks" / "results").glob("*/*.json"))
    assert files and all(record.read(path) for path in files)


# --- a whole run ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rehearsal_of_a_gpus_run(tmp_path):
    """Every stage in its own process, uninstalled, at toy size."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--minutes", "8", "--dry"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=record.ROOT, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {path.name: path for path in tmp_path.iterdir()}
    assert files.keys() == {f"{name}.json" for name in gpu.STAGES} and len(files) <= 8
    assert all(path.stat().st_size < 16 * 2**20 for path in files.values())
    for name, path in files.items():
        found = record.read(path)
        assert found["right"] and found["whole"] and found["dry"], name
        assert found["command"].startswith("python") and found["date"] and "clocks" in found
    engine = record.read(files["engine.json"])["rows"]
    assert {row["input"][:3] for row in engine} == {"ids", "tex"}
    assert all(row["bottleneck"] in row["stages"] for row in engine)
    assert any(row["input"] == "ids, L=16, fixed" and row["encoder_tokens_per_s"] > 0 for row in engine)
    assert record.read(files["correctness.json"])["counts"]["passed"] > 0
    summary = done.stdout[done.stdout.index("--- summary") :]
    assert all(f"{name}: right" in summary for name in gpu.STAGES) and len(summary) <= gpu.SUMMARY


def test_a_stage_that_breaks_loses_nothing_of_the_others(tmp_path, monkeypatch, capsys):
    ran = []

    so_far = [
        kernel_row("8 x 8 x 8", name, 10.0) | {"bytes": 8, "of_matmul": 0.5} for name in ("fastdistil", "eager torch")
    ]
    for row in so_far:
        for way in ("cold", "graph"):
            row[way] = row[way] | {"iqr_us": 1.0, "turns_us": [10.0]}

    class Process:
        pid = 0

        def __init__(self, command, **options):
            assert options["process_group"] == 0
            self.name = command[command.index("--stage") + 1]

        def poll(self):
            return None if self.name == "kernels" else 0

        def wait(self, timeout=None):
            if timeout in (None, gpu.WRITING):
                return ended.append(self.name)
            ran.append(self.name)
            if self.name == "kernels":
                record.write(tmp_path / "kernels.json", {"rows": so_far, "whole": False})
                raise subprocess.TimeoutExpired("kernels", 1)
            if self.name == "tune":
                (tmp_path / "tune.json").write_text('{"lines": []}')
                return 1
            if self.name == "ceilings":
                return 0
            lines = ["WRONG one thing", *(f"line {i}" + "x" * 200 for i in range(99))]
            record.write(tmp_path / f"{self.name}.json", {"lines": lines[::-1]})
            return {"encoder": gpu.WRONG, "engine": -11}.get(self.name, 0)

    ended = []
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(gpu.os, "killpg", lambda pid, signal: ended.append(pid))
    assert gpu.run_all(list(gpu.STAGES), tmp_path, 1, False) == 1
    out = capsys.readouterr().out
    summary = out[out.index("--- summary") :]
    assert ran == list(gpu.STAGES) and len(summary) <= gpu.SUMMARY
    killed = {"kernels": (0, "kernels", 0, "kernels")}  # asked to end first; the others with all that they had started
    assert ended == [each for name in gpu.STAGES for each in killed.get(name, (0, name))]
    assert "ceilings: BROKE: it wrote nothing, " in summary
    states = ("environment: right", "kernels: STOPPED", "encoder: WRONG", "engine: BROKE with status -11")
    for line in (*states, "tune: BROKE with status 1", "its digest does not fit"):
        assert line in summary
    assert "  WRONG one thing" in summary and "more lines" in summary
    assert "what it had so far" in summary and "linear           8 x 8 x 8" in summary
    assert len(record.read(tmp_path / "kernels.json")["rows"]) == 2


def test_outcomes_of_tests_whole_and_cut_off():
    """As pytest prints them, by one process and by several."""
    one = "tests/a.py::test_x[1-cuda] PASSED [ 10%]\ntests/a.py::test_y FAILED    [ 20%]\n"
    one += "tests/a.py::test_z SKIPPED (no) [ 30%]\n"
    found = gpu.outcomes(one)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert found["failures"] == ["FAILED tests/a.py::test_y"]
    whole = gpu.outcomes(one + "FAILED tests/a.py::test_y - AssertionError: max error 3\n")
    assert whole["failed"] == 1 and whole["failures"] == ["FAILED tests/a.py::test_y - AssertionError: max error 3"]
    several = "[gw1] [ 50%] PASSED tests/a.py::test_x[1 2] \n[gw0] [100%] FAILED tests/a.py::test_y \n"
    assert gpu.outcomes(several)["failures"] == ["FAILED tests/a.py::test_y"] and gpu.outcomes(several)["passed"] == 1
    broken = gpu.outcomes("ERROR tests/b.py - ImportError: no\n")
    assert broken["failed"] == 1 and broken["passed"] == 0 and gpu.outcomes("")["failed"] == 0
    assert gpu.outcomes("SKIPPED [2] tests/c.py:9: no device\n")["skips"] == ["SKIPPED [2] tests/c.py:9: no device"]


def among_others(tmp_path, monkeypatch, together, alone, minutes=3):
    """correctness() where pytest prints this of all tests together, and of each further call by its tests."""
    asked = []

    def pytest_(tests, processes, seconds, dry):
        asked.append(tests)
        output, ended = (
            together if tests == list(gpu.WITH_GPU) else alone.get(tests[0], ("tests/m.py::t PASSED [1%]", ""))
        )
        return gpu.outcomes(output) | {"ended": ended, "output": output}

    monkeypatch.setattr(gpu, "_pytest", pytest_)
    found, lines, right = gpu.correctness(gpu.Stage(tmp_path, minutes, dry=False), lambda rows: None)
    return [tests for tests in asked[1:] if tests != [gpu.ALONE]], found["counts"], lines[1:], right


FAILING = """tests/a.py::test_x[every other row] FAILED [1%]
[gw1] [ 50%] FAILED tests/a.py::test_y[a - b]\x20
tests/b.py::test_z FAILED [3%]
tests/c.py::test SKIPPED (no) [4%]
FAILED tests/a.py::test_x[every other row] - cuda
FAILED tests/a.py::test_y[a - b] - cuda
FAILED tests/b.py::test_z - cuda
SKIPPED [1] tests/c.py:3: no
"""


def test_what_failed_among_others_is_looked_at_again(tmp_path, monkeypatch):
    """One that breaks the device takes others along, which are right by themselves."""
    alone = {
        "a.py::test_x[every other row]": (
            "tests/a.py::test_x[every other row] FAILED [1%]\ntests/a.py::test_y[a - b] PASSED [2%]\n"
            "FAILED tests/a.py::test_x[every other row] - max error\n",
            "",
        ),
        "b.py::test_z": ("tests/b.py::test_z PASSED [1%]", ""),
    }
    asked, counts, lines, right = among_others(tmp_path, monkeypatch, (FAILING, ""), alone)
    assert asked == [["a.py::test_x[every other row]", "a.py::test_y[a - b]"], ["b.py::test_z"]] and not right
    assert counts == {"passed": 1, "skipped": 1, "failed": 1}
    assert lines == [
        "WRONG FAILED tests/a.py::test_x[every other row] - cuda",
        "SKIPPED [1] tests/c.py:3: no",
        "failed among others and passed by itself: tests/a.py::test_y[a - b]",
        "failed among others and passed by itself: tests/b.py::test_z",
    ]


def test_what_failed_and_could_not_be_looked_at_again_has_failed(tmp_path, monkeypatch):
    late = dict.fromkeys(("a.py::test_x[every other row]", "b.py::test_z"), ("", "not run: no time was left"))
    _, counts, lines, right = among_others(tmp_path, monkeypatch, (FAILING, "stopped: no time was left"), late)
    assert counts["failed"] == 3 and not right and not any("passed by itself" in line for line in lines)
    assert "WRONG FAILED tests/b.py::test_z - cuda" in lines and "WRONG together: stopped: no time was left" in lines
    memory = {gpu.ALONE: ("FAILED tests/kernels/test_memcheck.py::test_no - leak\n", "")}
    asked, counts, _, right = among_others(tmp_path, monkeypatch, ("tests/a.py::t PASSED [1%]", ""), memory)
    assert counts["failed"] == 1 and not right and asked == []  # it was alone already


@pytest.mark.parametrize("minutes", [1, 3])
def test_where_minutes_are_few_the_memory_checker_is_left_out(tmp_path, monkeypatch, minutes):
    """That it ran out of time is not wrong, and neither is what it did not look at right."""
    memory = {gpu.ALONE: ("tests/kernels/test_memcheck.py::t PASSED [1%]", gpu.NO_TIME)}
    _, _, lines, right = among_others(tmp_path, monkeypatch, ("tests/a.py::t PASSED [1%]", ""), memory, minutes)
    told = {1: "was not run: it takes up to 120 s, 60 s were left", 3: gpu.NO_TIME}[minutes]
    assert right and len(lines) == 1 and gpu.ALONE in lines[0] and told in lines[0]
    late = ("tests/a.py::t PASSED [1%]", gpu.NO_TIME)
    assert not among_others(tmp_path, monkeypatch, late, memory, minutes)[3]


def test_a_machine_where_no_kernel_runs_is_wrong(tmp_path, monkeypatch):
    """Every test would pass there, and eager torch's times be ours."""
    monkeypatch.setattr(gpu.ops, "why_eager", lambda device: "no C compiler was found")
    monkeypatch.setattr(gpu.record, "environment", lambda: AROUND | {"python": "3.12", "gpu": CARD})
    _, lines, right = gpu.environment(gpu.Stage(tmp_path, 1, dry=False), lambda rows: None)
    assert not right and lines[-1] == "WRONG no kernel runs here: no C compiler was found"
    monkeypatch.setattr(gpu.ops, "why_eager", lambda device: None)
    assert gpu.environment(gpu.Stage(tmp_path, 1, dry=False), lambda rows: None)[2]


def test_what_has_no_configuration_is_not_tuned(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(tune, "run", lambda *args, names, **more: asked.append(names) or [])
    gpu.of_tune(gpu.Stage(tmp_path, 1, dry=False), lambda rows: None)
    assert asked == [kernels.TUNED]


def test_results_of_several_tensors_are_overwritten():
    """Before a replay, whose result what the capture left would pass for."""
    keep = torch.ones(2, 3, dtype=torch.bool)
    result = kernels.reference.pack(keep, torch.ones(2, 3).long(), None)
    timing.overwrite(result)
    assert all((one == -7).all() for one in result) and len(result) > 2
    timing.overwrite(rows := torch.ones(3))
    assert rows.isnan().all()


def test_a_file_that_cannot_be_imported_is_wrong(tmp_path):
    """As pytest reports it, of one process and of several."""
    (tmp_path / "test_broken.py").write_text("import there_is_no_such_module\n")
    (tmp_path / "test_right.py").write_text("import pytest\n\n@pytest.mark.gpu\ndef test_right():\n    pass\n")
    for processes in (0, 2):
        found = gpu._pytest([str(tmp_path / "test_broken.py"), str(tmp_path / "test_right.py")], processes, 60, False)
        assert found["failures"] or found["ended"], found["output"]


def test_wrong_use(tmp_path, capsys):
    for argv, message in [
        (["--out", str(tmp_path), "--stages", "speed", "--dry"], "'speed' is none of environment"),
        (["--out", str(tmp_path)], "torch finds no CUDA device; --dry rehearses on CPU"),
    ]:
        if torch.cuda.is_available() and "CUDA" in message:
            continue
        with pytest.raises(SystemExit):
            gpu.main(argv)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        kernels.main(["--ops", "softmax"])
    assert "'softmax' is none of" in capsys.readouterr().err
    texts = tmp_path / "texts.jsonl"
    of_texts = ["--model", "x", "--lengths-from", str(texts)]
    for main, argv, content, message in [
        (kernels.main, ["--dtypes", "float8"], "", "--dtypes: 'float8' is none of bfloat16"),
        (kernels.main, ["--out", str(tmp_path)], "", f"--out {tmp_path} is a directory; name a file"),
        (engine.main, ["--out", str(texts / "r.json")], "", "File exists"),
        (encoder.main, ["--toy", "--model", str(tmp_path / "none")], "", f"--model {tmp_path / 'none'}: "),
        (encoder.main, [*of_texts[:3], str(tmp_path / "no.jsonl")], "", "No such file"),
        (encoder.main, of_texts, "\n", "holds no texts"),
        (encoder.main, of_texts, '{"text": "a"}\n{"tekst": 1}\n', "line 2 is not"),
        (encoder.main, of_texts, '{"text": "a"}\n\n3', "line 3 is not"),
        (encoder.main, of_texts, "a text", "line 1 is no JSON"),
        (tune.main, ["--apply", "--out", str(tmp_path / "no.json")], "", "No such file"),
    ]:
        texts.write_text(content)
        assert main(argv) == 2
        found = capsys.readouterr().err
        assert message in found and found.count("\n") == 1, found


def test_results_that_do_not_say_enough_are_refused(tmp_path):
    path = tmp_path / "r.json"
    for result, message in [
        ({"rows": []}, "lacks date, command, torch, triton, cpu, commit, gpu, or null; measure again"),
        (AROUND | {"rows": [], "commit": {"id": None}}, "lacks commit"),
        (AROUND | {"rows": [], "commit": {"id": "unknown", "dirty": False}}, "lacks commit"),
        (AROUND | {"rows": [], "commit": {"id": "0123456789"}}, "lacks commit"),
        (AROUND | {"rows": [], "commit": {"id": "012345", "dirty": False}}, "lacks commit"),
        (ON_CARD | {"rows": [], "clocks": [{"power.draw": "600 W"}]}, "lacks clocks"),
        (AROUND | {"gpu": {"name": "A GPU", "uuid": ""}}, "lacks gpu's uuid, gpu's driver_version"),
        (AROUND | {"rows": [{"cold": {"median_us": 1.0}}]}, "lacks samples of a row"),
        (AROUND | {"rows": [], "stage": "encoder"}, "lacks rows"),
        ({"machine_info": AROUND, "benchmarks": []}, "lacks benchmarks"),
        (ON_CARD | {"rows": [], "clocks": []}, "lacks clocks"),
        (ON_CARD | {"rows": [], "clocks": [{"clocks.sm": "1980 MHz"}]}, "lacks clocks"),
        ({"machine_info": AROUND | {"gpu": CARD}, "benchmarks": []}, "lacks clocks"),
        ({"machine_info": AROUND, "benchmarks": [{"stats": {"median": 1.0}}]}, "lacks data of a benchmark"),
        (AROUND | {"rows": [], "dry": True}, "is a rehearsal's, not a measurement"),
    ]:
        record.write(path, result)
        with pytest.raises(ValueError, match=message):
            record.measured(path)
    record.write(path, ON_CARD | {"rows": [{"missing": "no"}]})
    assert record.measured(path)
    record.write(path, ON_CARD | {"clocks": [{"missing": "nvidia-smi tells nothing"}]})
    assert record.measured(path)["gpu"] == CARD


def test_right_means_that_tests_ran_to_their_end(tmp_path):
    def verdict(**found):
        record.write(tmp_path / "h200" / "correctness.json", ON_CARD | {"whole": True} | found)
        (line,) = (line for line in goals.table(goals.Results(tmp_path))[0] if line.startswith("right "))
        return line.split()[3:5]

    ended, died = {"a.py": {"ended": ""}}, {"a.py": {"ended": ""}, "b.py": {"ended": "pytest ended with status 4"}}
    assert verdict(rows=[], whole=False) == ["-", "unmeasured"]
    runs = [{"run": "together", "failed": 40}, {"run": "a.py again", "failed": 39}, {"run": "memory", "failed": 1}]
    assert verdict(rows=runs, whole=False) == ["41", "missed"]
    assert verdict(counts={"passed": 5, "failed": 400, "skipped": 30}, runs=ended) == ["400", "missed"]
    assert verdict(counts={"passed": 0, "failed": 0, "skipped": 3}, runs=ended) == ["-", "unmeasured"]
    assert verdict(counts={"passed": 1, "failed": 0, "skipped": 499}, runs=ended) == ["-", "unmeasured"]
    assert verdict(counts={"passed": 9, "failed": 0, "skipped": 3}, runs=ended) == ["0", "met"]
    assert verdict(counts={"passed": 9, "failed": 0, "skipped": 3}, runs=died) == ["1", "missed"]
    assert verdict(counts={"passed": 9, "failed": 2, "skipped": 3}, runs=ended) == ["2", "missed"]


def test_the_suite_for_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "--benchmark-only", "-q", "-k", "pool or encoder and packed"]
    command += [f"--benchmark-json={tmp_path / 'r.json'}", "benchmarks/bench_kernels.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # xdist's
    subprocess.run(command, cwd=record.ROOT, env=environment | {"BENCH_TOY": "1"}, check=True, capture_output=True)
    with pytest.raises(ValueError, match="is a rehearsal's"):
        record.measured(tmp_path / "r.json")
    found = record.read(tmp_path / "r.json")["benchmarks"]
    names = {entry["params"]["provider"] for entry in found}
    assert {"fastdistil", "eager torch", "fastdistil, packed call"} <= names
    assert all(0 <= entry["extra_info"]["error"]["max"] < 1e-5 for entry in found)


def test_fastdistil_bench(capfd):
    assert cli(["bench", "roofline"]) == 0 and "H200" in capfd.readouterr().out
    assert cli(["bench"]) == 2 and "encoder" in capfd.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli(["bench", "encoder", "--lengths-from", "x"]) and sys.exit(2)  # the subject's own error
    assert caught.value.code == 2 and "goes with --model" in capfd.readouterr().err


def test_a_shape_has_its_own_figures():
    small = Shape(32, 64, 2, 2)
    assert roofline.flops_per_token(8, small) == 2 * (2 * 32 * (96 + 32 + 2 * 64) + 4 * 8 * 32)


def test_the_example_for_ones_own_card(monkeypatch, tmp_path, capsys):
    """It prints all lines, of which a summary has some, and keeps what was measured."""
    given, lines = [], [f"op {i} {'x' * 90}" for i in range(300)]

    def main(argv):
        given.extend(argv)
        record.write(tmp_path / "kernels.json", {"lines": lines})
        record.write(tmp_path / "encoder.json", {"rows": []})  # a stage that was stopped
        assert "more lines" in "\n".join(gpu.summary(tmp_path, {"kernels": "right"}))
        return 0

    monkeypatch.setattr(gpu, "main", main)
    example = runpy.run_path(str(record.ROOT / "examples" / "benchmark_my_gpu.py"))
    assert example["main"](["--help"]) == 0 and "by default benchmark-my-gpu" in capsys.readouterr().out and not given
    assert example["main"](["--out", str(tmp_path), "--dry"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert set(lines) < set(said) and f"encoder was stopped: {tmp_path / 'encoder.json'} has what it had so far" in said
    assert given[given.index("--out") + 1] == str(tmp_path) and (tmp_path / "kernels.json").is_file()
    assert given[-1] == "--dry" and set(given[given.index("--stages") + 1].split(",")) < set(gpu.STAGES)
    assert float(given[given.index("--minutes") + 1]) <= 5


def test_the_driver_is_found_without_nvidia_smi(monkeypatch, tmp_path):
    said = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\nGCC version: gcc 13.3.0\n"
    )
    monkeypatch.setattr(record, "nvidia_smi", lambda *what: [])
    monkeypatch.setattr(record, "DRIVER", tmp_path / "version")
    assert record._driver() == ""
    record.DRIVER.write_text(said)
    assert record._driver() == "580.82.07"
    monkeypatch.setattr(record, "nvidia_smi", lambda *what: [{"driver_version": "1.2"}])
    assert record._driver() == "1.2"


# --- what must not slip past ----------------------------------------------------------------------------------------


def test_a_provider_that_computes_nothing_has_no_speed(quick, monkeypatch):
    """What an earlier one left in memory would pass for its result."""

    def nothing(case, stack):
        shape = reference_of(case).shape  # what is freed here is what comes back below
        return lambda: torch.empty(shape)

    def reference_of(case):
        return kernels.expected(case)[1]

    def forgetful(case, stack):  # right when it is checked, and then no more
        calls = []
        return lambda: calls.append(1) or (reference_of(case) if len(calls) == 1 else torch.zeros(1))

    for op in kernels.OPS:
        more = [("nothing", nothing), ("forgetful", forgetful)]
        monkeypatch.setitem(kernels.PROVIDERS, op, [*kernels.PROVIDERS[op], *more])
    rows = kernels.run(shapes.TOY, CPU, CEILINGS)
    for name in ("nothing", "forgetful"):
        found = [row for row in rows if row["provider"] == name]
        assert len(found) > 20 and all("wrong" in row and "cold" not in row for row in found)


def test_a_provider_that_remembers_its_result_has_no_speed(quick, monkeypatch):
    """Right for the arguments as they were when it was first asked."""

    def kernel(case, stack):
        kept = []
        return lambda: copy.deepcopy(kept[0] if kept else kept.append(kernels.eager(case, stack)()) or kept[0])

    def weights(case, stack):  # attention's, of which q and k negated alike have the same
        qkv, cu, _, heads = case.args
        q, k, _ = (t.transpose(0, 1) for t in qkv.unflatten(-1, (3, heads, -1)).unbind(1))
        owner = torch.searchsorted(cu, torch.arange(len(qkv)), right=True)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(owner[:, None] != owner, -torch.inf).softmax(-1)
        values = qkv[:, 2 * qkv.shape[1] // 3 :].unflatten(-1, (heads, -1)).transpose(0, 1)
        return lambda: (scores @ values).transpose(0, 1).flatten(1)

    def whole(batch, stack):
        kept, run = [], encoder.padded(batch, stack)
        return lambda: kept[0].clone() if kept else kept.append(run()) or kept[0].clone()

    for op in kernels.OPS:
        monkeypatch.setitem(kernels.PROVIDERS, op, [*kernels.PROVIDERS[op], ("remembers", kernel)])
    attention = [*kernels.PROVIDERS["attention"], ("remembers weights", weights)]
    monkeypatch.setitem(kernels.PROVIDERS, "attention", attention)
    monkeypatch.setattr(encoder, "PROVIDERS", [*encoder.PROVIDERS[:2], ("remembers", whole)])
    for rows in (kernels.run(shapes.TOY, CPU, CEILINGS), encoder.run(shapes.TOY, CPU)):
        found = [row for row in rows if row["provider"].startswith("remembers")]
        assert len(found) >= 4 and all("wrong" in row and "median_us" not in row for row in found)
        assert not any("Error" in row["wrong"] and "AssertionError" not in row["wrong"] for row in found)
        assert not any("wrong" in row for row in rows if row not in found)


def test_samples_are_kept_from_all_over_a_turn():
    turns = [timing.Timing([i / 1e6 for i in range(1, 1_001)]), timing.Timing([1e-6, 2e-6, 3e-6])]
    found = timing.joined(turns, 64)
    assert found["samples_us"] == [*range(1, 1_001, 32), 1, 2, 3] and found["rounds"] == 1_003


def test_memory_is_poisoned_before_a_result_is_looked_at(monkeypatch):
    """In the sizes that results have: a GPU's allocator gives the same block again, with what lay there."""
    order, full_like = [], torch.full_like

    def filled(like, value):
        order.append(tuple(like.shape))
        return full_like(like, value)

    monkeypatch.setattr(torch, "full_like", filled)
    (case, *_) = kernels.cases("linear", shapes.TOY, torch.float32, CPU)
    truth, plain = kernels.expected(case)
    kernels.hold(lambda: order.append("run") or plain, case, truth, plain)
    assert order == [(16, 32)] * timing.POISONED + ["run"] and timing.POISONED > 1
    order.clear()
    model = encoder.model_of(shapes.TOY.shape, CPU, torch.float32)
    batch = encoder.batch_of(model, "", [4, 2], 4)
    truth, eager = encoder.truth_of(batch)
    encoder.hold(lambda: order.append("run") or eager, batch, truth, eager)
    assert order == [(6, 32)] * timing.POISONED + [(2, 4, 32)] * timing.POISONED + ["run"]


def test_a_broken_device_ends_a_stage_and_names_who_broke_it(quick, monkeypatch, tmp_path):
    def breaks(case, stack):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(kernels.PROVIDERS, "linear", [("breaks", breaks), *kernels.PROVIDERS["linear"]])
    monkeypatch.setattr(gpu.Stage, "ceilings", lambda self: CEILINGS)
    with pytest.raises(kernels.DeviceBroke, match="breaks: CUDA error"):
        gpu.run_stage("kernels", gpu.Stage(tmp_path, 1, True))
    found = record.read(tmp_path / "kernels.json")
    assert not found["whole"] and "illegal memory access" in found["rows"][-1]["wrong"]
    assert {row["op"] for row in found["rows"]} > {"qkv_projection", "linear"}  # what was measured before is kept


def test_a_crash_loses_no_row(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(encoder, "plans", lambda *a: iter([*list(_plans(*a))[:1], None]))
    with pytest.raises(TypeError):
        gpu.run_stage("encoder", gpu.Stage(tmp_path, 1, True))
    assert {row["provider"] for row in record.read(tmp_path / "encoder.json")["rows"]} >= {"fastdistil, packed call"}


_plans = encoder.plans


def test_a_graph_that_was_not_captured_is_missing(monkeypatch):
    model = encoder.model_of(shapes.TOY.shape, CPU, torch.float32)
    batch = encoder.batch_of(model, "", [4, 4], 4)
    on_card = types.SimpleNamespace(model=model, ids=batch.ids, keep=batch.keep, device=torch.device("cuda", 0))
    monkeypatch.setattr(encoder, "padded", lambda batch, stack: lambda: None)
    with ExitStack() as stack, pytest.raises(kernels.Missing, match="not captured: the model would not be"):
        encoder.captured(on_card, stack)

    def captures(batch, stack):
        return lambda: batch.model._graphs._captured.update({((2, 32), ()): object()})

    monkeypatch.setattr(encoder, "padded", captures)
    with ExitStack() as stack:
        encoder.captured(on_card, stack)


def test_above_a_ceiling(monkeypatch):
    ceilings = {"copy": {"bytes_per_s": 3e12}}
    x = torch.empty(5_632, 768, dtype=torch.bfloat16)
    case = types.SimpleNamespace(op="add_layer_norm", rows=x, dtype=x.dtype, device=torch.device("cuda", 0))
    case.cost, case.cu_seqlens = roofline.add_layer_norm(5_632, 768, 2), torch.tensor([0, 5_632])

    def over(cold, graph):
        found = {"cold": {"median_us": cold}, "graph": {"median_us": graph}}
        return list(kernels.over_ceiling(case, found, ceilings, 7e14))

    assert over(9.0, 9.0) == [] and over(2.0, 9.0)[0] > 2  # 17.3 MB are read, 8.7 MB written
    assert over(9.0, 4.0) == [] and over(9.0, 0.9)[0] > 9  # an empty graph
    case.op, case.cost = "linear", roofline.gemm("linear", 5_632, 768, 768, 2)
    assert over(20.0, 20.0) == [] and len(over(7.0, 20.0)) == len(over(20.0, 7.0)) == 1
    assert over(8.2, 8.2) == []  # 1.16 of what it reaches in a second at full power


def test_tuning_on_a_broken_device_goes_on_behind_it(monkeypatch, tmp_path):
    """The culprit is in the file, and the next run leaves it out; what runs today is timed anew with the finalists."""
    asked = []

    class Trial:
        def __init__(self, found):
            pass

        def seconds(self, arch, config, each):
            asked.append(config)
            if config is not None and config.block_n == 64:
                raise RuntimeError("CUDA error: unspecified launch failure")
            slow = 1.1 if asked.count(None) == 1 and config is None else 1.0  # an idle GPU's clocks
            return [slow]

    configs = [Gemm("pointer", 16, n, 32, 4, 2) for n in (32, 64, 128)]
    case = types.SimpleNamespace(name="a case", rows=[0], device=torch.device("cuda", 0))
    for name, value in {
        "Trial": Trial,
        "candidates": lambda *args: configs,
        "compiled": lambda found, some, arch, jobs: [(c, None) for c in some],
        "classes": lambda *args: [tune.Class("linear", "half/many", (case,))],
    }.items():
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(tune._configs, "architecture", lambda device: 90)
    monkeypatch.setattr(tune._configs, "processors", lambda device: 132)
    path = tmp_path / "tune.json"
    with pytest.raises(kernels.DeviceBroke, match="unspecified launch failure"):
        tune.run(shapes.TOY, torch.device("cuda"), path, minutes=1)
    (left,) = record.read(path)["rows"]
    assert left["tried"].keys() == {tune._written(configs[0])} and left["wrong"].keys() == {tune._written(configs[1])}
    (row,) = tune.run(shapes.TOY, torch.device("cuda"), path, minutes=1)
    assert "stopped" not in row and row["winner"] is None and len(row["best"]) == 2  # nothing is quicker
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another GPU")
    assert [r["gpu"] for r in tune.run(shapes.TOY, torch.device("cuda"), path, minutes=0)] == ["A GPU"]
    known = 'RECORDED: dict[K, V] = {\n    (90, "linear", "half/many"): x,\n}\n\n'
    monkeypatch.setitem(_configs.RECORDED, (90, "linear", "half/many"), configs[0])
    compiled_only = row | {"missing": "no CUDA device: compiled only"}
    assert "half/many" in tune.apply([compiled_only], known) and "half/many" not in tune.apply([row], known)
    record.write(path, {"rows": [row], "dry": True})
    assert tune.main(["--out", str(path), "--apply"]) == 2


def test_stopped_from_outside(tmp_path):
    """SIGTERM, as `timeout` sends it: the stage's processes end, and what there is is told."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--stages", "kernels,encoder", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=record.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().startswith("--- kernels")
    time.sleep(1)
    process.terminate()
    out, _ = process.communicate(timeout=30)  # which waits for all who hold the pipe
    assert process.returncode == 1 and "kernels: STOPPED from outside" in out


HANGS = """
import sys, time
from benchmarks import gpu, kernels

def hanging_provider(case, stack):
    print("here", flush=True)
    time.sleep(60)

kernels.PROVIDERS["qkv_projection"].insert(1, ("hangs", hanging_provider))
gpu.main(["--stage", "kernels", "--dry", "--out", sys.argv[1]])
"""


def test_a_stage_that_is_stopped_says_where_it_was(tmp_path):
    command = [sys.executable, "-c", HANGS, str(tmp_path)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=record.ROOT, **pipes)
    assert process.stdout.readline() == "here\n"
    process.terminate()
    _, error = process.communicate(timeout=30)
    assert "in hanging_provider" in error and process.returncode == 128 + signal.SIGTERM
    assert record.read(tmp_path / "kernels.json")["rows"]  # of what came before it


def test_no_minutes_and_no_commit(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--dry", "--out", str(tmp_path), "--minutes", "0"])
    assert "must be more than 0" in capsys.readouterr().err
    monkeypatch.setattr(record, "ROOT", tmp_path)  # no repository
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("FASTDISTIL_COMMIT", raising=False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert "set the variable FASTDISTIL_COMMIT" in capsys.readouterr().err
    monkeypatch.setenv("FASTDISTIL_COMMIT", "0123abc-dirty")
    assert record.commit() == {"id": "0123abc", "dirty": True}
    monkeypatch.setenv("FASTDISTIL_COMMIT", "0123abc")
    assert record.commit() == {"id": "0123abc", "dirty": False}


def test_lengths_from_json_with_other_line_ends(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b\x85c"}\r\n\n{"text": "d"}\n'.encode())
    assert encoder.read_texts(path) == ["a\u2028b\x85c", "d"]


def test_clocks_or_why_there_are_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for told, kept in (([{"clocks.sm": "1 MHz"}], "clocks.sm"), ([], "missing")):
        monkeypatch.setattr(timing, "nvidia_smi", lambda *what, told=told: told)
        monkeypatch.setattr(timing, "gpu_uuid", lambda: time.sleep(0.2) or "")  # what is watched ends before it
        with timing.Watch() as watch:
            pass
        assert kept in watch.samples[0]


def test_lengths_of_millions_of_tokens_are_drawn_in_no_time():
    start = time.perf_counter()
    found = shapes.lengths("long-tailed", 16, 200_000)  # what the engine's are made of
    assert sum(found) == 200_000 and time.perf_counter() - start < 5  # it was minutes


def test_what_the_goals_are_about_is_measured_first(monkeypatch):
    seen = []
    monkeypatch.setattr(encoder, "TELLING", ((1, 16, 1.0), (2, 8, 1.0)))
    monkeypatch.setattr(
        encoder, "measure", lambda batch, *a, late, keep: seen.append((batch.name.split(",")[0], late)) or []
    )
    encoder.run(shapes.TOY, CPU)
    telling = ["2 x 8", "1 x 16"]
    rest = len(seen) // 2 - 2
    assert [late for _, late in seen] == [False] * (2 + rest) + [True] * (2 + rest)
    assert [name for name, _ in seen[:2]] == [name for name, _ in seen[2 + rest : 4 + rest]] == telling
    assert {name for name, _ in seen[2 : 2 + rest]} == {"2 x 16", "2 x 8", "1 x 8"}
    passes = list(kernels.passes((torch.bfloat16, torch.float16, torch.float32)))
    assert len(set(passes)) == len(passes) == 12 and passes[2] == (torch.bfloat16, True, True)
    assert [late for *_, late in passes] == [False] * 2 + [True] + [False] * 4 + [True] * 5
    asked = []
    monkeypatch.setattr(kernels, "TELLING_ROWS", 40)
    monkeypatch.setattr(kernels, "measure", lambda case, *a, late, keep: asked.append((case.op, late)) or [])
    kernels.run(shapes.TOY, CPU, CEILINGS)
    n = len(kernels.OPS)
    assert [op for op, _ in asked[:n]] == list(kernels.OPS) and not asked[n][1] and asked[-1][1]


def test_pooling_is_compiled_at_one_shape():
    rows = torch.empty(16_896, 768, dtype=torch.bfloat16, device="meta")
    case = types.SimpleNamespace(op="pool", rows=rows, dtype=rows.dtype, device=torch.device("cuda", 0))
    case.name, case.args = "L=64, fixed", (rows,)
    with ExitStack() as stack, pytest.raises(kernels.Missing, match="rows only"):
        kernels.compiled(case, stack)
    case.name = "L=128, fixed"
    with ExitStack() as stack:
        assert callable(kernels.compiled(case, stack))


def test_texts_from_all_over_a_batch_are_checked():
    """A provider that leaves most of a batch out is wrong, however many of its first texts are right."""
    model = encoder.model_of(shapes.TOY.shape, CPU, torch.float32)
    batch = encoder.batch_of(model, "", [500] * 12, 500)
    assert encoder.chosen(batch) == [0, 1, 3, 4, 6, 7, 9, 11]
    truth, eager = encoder.truth_of(batch)
    with ExitStack() as stack, torch.no_grad():
        right = encoder.packed(batch, stack)()
        encoder.hold(lambda: right, batch, truth, eager)
        right[-500:] = 0
        with pytest.raises(AssertionError):
            encoder.hold(lambda: right, batch, truth, eager)


def test_a_peer_may_be_somewhat_further_off(quick, monkeypatch):
    """As torch's SDPA is on Intel's processors; what errs by more is wrong, and so is what is ours."""
    model = encoder.model_of(shapes.TOY.shape, CPU, torch.float32)
    batch = encoder.batch_of(model, "", [16] * 4, 16)
    truth, eager = encoder.truth_of(batch)

    def off(times):
        return lambda batch, stack: lambda: (truth + times * (eager - truth)).float()

    rounding = float(torch.finfo(torch.float32).eps * truth.abs().mean() / (eager - truth).abs().mean())
    near = 1.75 + rounding  # of eager's error: above what ours may be, 1.5, and below a peer's 2
    providers = [("fastdistil", off(near)), (timing.OVERLAPPED, off(near)), ("near", off(near)), ("far", off(near + 1))]
    monkeypatch.setattr(encoder, "PROVIDERS", providers)
    monkeypatch.setattr(encoder, "largest_error", lambda device: 2)
    monkeypatch.setattr(encoder, "renamed", lambda batch: nullcontext())
    ours, overlapped, near, far = encoder.measure(batch, 9e9)
    assert "wrong" in ours and "wrong" in overlapped and "tokens_per_s" in near and "wrong" in far


def test_a_provider_that_is_wrong_elsewhere_is_wrong(quick, monkeypatch):
    """Also at the texts that are not held to float64."""
    model = encoder.model_of(shapes.TOY.shape, CPU, torch.float32)
    batch = encoder.batch_of(model, "", [500, *[400] * 11], 500)

    def elsewhere(batch, stack):
        run, mine = encoder.packed(batch, stack), encoder.chosen(batch)
        rows = torch.repeat_interleave(torch.arange(12), torch.tensor(batch.lengths))
        return lambda: run() * torch.isin(rows, torch.tensor(mine))[:, None]

    monkeypatch.setattr(encoder, "PROVIDERS", [("right", encoder.packed), ("wrong", elsewhere)])
    right, wrong = encoder.measure(batch, 9e9)
    assert "tokens_per_s" in right and "text 2, which was not held to float64, is off by 1.0" in wrong["wrong"]
    half = copy.deepcopy(model).bfloat16()
    batch = encoder.batch_of(half, "", list(batch.lengths), 500)
    truth, eager = encoder.truth_of(batch)
    rest = encoder.rest_of(batch)
    of = torch.repeat_interleave(torch.arange(12), torch.tensor(batch.lengths))
    mine = torch.isin(of, torch.tensor(encoder.chosen(batch)))
    encoder.hold(lambda: rest.clone(), batch, truth, eager, rest=rest)
    factor = torch.where(mine, 1, 1.01)[:, None]  # which no row is off by more than rounding may be
    with pytest.raises(AssertionError, match=r"text \d+, which was not held to float64"):
        encoder.hold(lambda: (rest * factor).bfloat16(), batch, truth, eager, rest=rest)
    with pytest.raises(AssertionError, match=r"text \d+, which was not held to float64"):
        encoder.hold(lambda: torch.where(mine[:, None], rest, rest * 1.1), batch, truth, eager, rest=rest)
    assert encoder.rest_of(encoder.batch_of(model, "", [5] * 3, 5)) is None  # all are


def test_batches_for_which_no_time_was_left_are_listed(quick, monkeypatch):
    model = encoder.model_of(shapes.TOY.shape, CPU, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "batch_of", None)  # none is made
        rows = encoder.run(shapes.TOY, CPU, minutes=-1)
    assert {row["missing"] for row in rows} == {"no time was left"}
    assert {row["batch"] for row in rows} == {b.name for b in encoder.batches(model, shapes.TOY)}
    said = list(encoder.lines(rows))
    assert said and all(line.startswith("missing ") and line.endswith(": no time was left") for line in said)


def test_who_is_missing_is_said(quick):
    """And who has a time somewhere is not missing."""
    rows = [
        {"provider": "flash-attn", "missing": "flash-attn is not installed"},
        {"provider": "eager torch", "missing": "no time was left"},
        {"provider": "eager torch", "cold": {"median_us": 1.0}},
    ]
    assert kernels.absent(rows) == {"flash-attn": "flash-attn is not installed"}
    found = kernels.run(shapes.TOY, CPU, CEILINGS, names=("attention", "pool"))
    said = list(kernels.lines(found))
    assert any(line.startswith("missing flash-attn: flash-attn is not installed") for line in said)
    assert "missing torch.compile, max-autotune: there is no matrix product to tune" in said


def test_precisions_that_are_asked_for_have_a_ceiling(monkeypatch, tmp_path, capsys):
    assert timing.ceilings(CPU, True, (torch.bfloat16,))["bfloat16"]["flops_per_s"] > 0
    asked = []
    monkeypatch.setattr(timing, "ceilings", lambda device, toy, dtypes: asked.extend(dtypes) or CEILINGS)
    monkeypatch.setattr(kernels, "run", lambda *a, **k: [])
    out = tmp_path / "r.json"
    assert kernels.main(["--toy", "--dtypes", "bfloat16", "--out", str(out)]) == 0 and asked == [torch.bfloat16]
    assert record.read(out)["dry"]
    monkeypatch.setattr(encoder, "run", lambda *a, **k: [])
    assert encoder.main(["--toy", "--out", str(out)]) == 0 and record.read(out)["dry"]
    for main in (kernels.main, encoder.main, engine.main, tune.main, gpu.main):
        with pytest.raises(SystemExit):
            main(["--minutes", "0", "--out", str(out)])
        assert "0: it must be more than 0" in capsys.readouterr().err


def test_stages_find_what_their_command_found(monkeypatch, tmp_path):
    """Also through PYTHONPATH, wherever it was called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/somewhere:else")
    asked = []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, env, **k: asked.append(env["PYTHONPATH"]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpu.run_all(["environment"], tmp_path, 1, True)
    assert asked == [f"{record.ROOT}:/somewhere:{tmp_path / 'else'}"]
    monkeypatch.setattr(gpu, "run_all", lambda names, out, *more: asked.append(out) or 0)
    assert gpu.main(["--out", "here", "--dry"]) == 0 and asked[-1] == tmp_path / "here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for told, runs in (("v0.3.0", False), ("main", False), ("0123456789-dirty", True), ("unknown", True)):
        monkeypatch.setenv("FASTDISTIL_COMMIT", told)
        monkeypatch.setattr(subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(OSError("no git")))
        with nullcontext() if runs else pytest.raises(SystemExit):
            assert gpu.main(["--out", "here"]) == 0


def test_which_results_are_of_the_gpu(tmp_path):
    """Those of another card than the goals are of where there are none of these; none of another model."""
    for place in ("cpu", "compile", "a100"):
        (tmp_path / place).mkdir()
    record.write(tmp_path / "cpu" / "encoder.json", AROUND | {"rows": []})
    assert goals.Results(tmp_path).gpu is None and goals.Results(tmp_path / "none").gpu is None
    of_a100 = ON_CARD | {"gpu": CARD | {"name": "NVIDIA A100-SXM4-80GB"}, "rows": [{"dtype": "x"}]}
    record.write(tmp_path / "a100" / "encoder.json", of_a100)
    found = goals.Results(tmp_path)
    assert found.gpu is None and found.shown == "a100" and found.rows("encoder") == []
    assert len(found.table("encoder")["rows"]) == 1 and goals.Results(tmp_path / "none").shown == "cpu"
    record.write(tmp_path / "a100" / "encoder.json", of_a100 | {"model": "mine"})
    with pytest.raises(ValueError, match=r"a100/encoder.json is of another model, mine"):
        goals.Results(tmp_path).table("encoder")
    with pytest.raises(ValueError, match=r"a100/encoder.json is of another model, mine"):
        list(figures.wanted(tmp_path))
    for other in ({"model": "mine"}, {"shape": {"dim": 32}}):
        record.write(tmp_path / "h200" / "encoder.json", ON_CARD | {"rows": []} | other)
        with pytest.raises(ValueError, match=r"h200/encoder.json is of another model than DistilBERT-base"):
            goals.Results(tmp_path).rows("encoder")
    assert goals.Results(tmp_path).gpu == goals.Results(tmp_path).shown == "h200"


def test_a_kernels_key_is_the_same_in_every_python():
    tree = ast.parse("def f(a, b=1):\n    return g(a)\n")
    assert compile_gate.dumped(tree) == (
        "Module(body=[FunctionDef(name='f', args=arguments(posonlyargs=[], args=[arg(arg='a'), arg(arg='b')], "
        "kwonlyargs=[], kw_defaults=[], defaults=[Constant(value=1)]), body=[Return(value=Call(func=Name(id='g', "
        "ctx=Load()), args=[Name(id='a', ctx=Load())], keywords=[]))], decorator_list=[])], type_ignores=[])"
    )


def _dies(entry):
    if entry == "bad":
        os.abort()
    return {"key": entry}


def test_a_compiler_that_dies_takes_no_other_along(monkeypatch):
    monkeypatch.setattr(compile_gate, "_compiled_alone", _dies)
    found = dict(compile_gate.compile_all(["a", "bad", "b", "c"], 2))
    assert found == {"bad": "the compiler's process died"} | {name: {"key": name} for name in "abc"}


def test_a_stopped_stage_writes_what_it_has(tmp_path):
    """run_all asks it to end before it ends it."""
    code = (
        "import sys, time; from pathlib import Path; from benchmarks import gpu, kernels\n"
        "def slow(matrix, device, limits, minutes, keep):\n"
        "    keep([{'op': 'linear'}]); print('kept', flush=True); time.sleep(60)\n"
        "kernels.run = slow; gpu.Stage.ceilings = lambda self: {}\n"
        f"gpu.main(['--stage', 'kernels', '--out', {str(tmp_path)!r}, '--dry'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=record.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "kept\n"
    process.terminate()
    assert process.wait(10) == 128 + 15
    assert record.read(tmp_path / "kernels.json")["rows"] == [{"op": "linear"}]
