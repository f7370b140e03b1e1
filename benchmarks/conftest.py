import os
from typing import Any

import pytest
import torch

from benchmarks import record, timing

_watch = timing.Watch()
# pytest-benchmark keeps the times of a test that fails, or is interrupted, after them
_passed: set[str] = set()
_failed: dict[str, str] = {}
_around: dict[str, Any] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" and report.passed:
        _passed.add(item.nodeid)
    elif report.when == "call" and report.failed:
        _failed[item.nodeid] = str(call.excinfo.value if call.excinfo else report.longrepr).partition("\n")[0][:300]
    return report


def pytest_sessionstart(session):
    _around.update(record.environment())  # before it is measured, for the commit may be another afterwards
    _watch.__enter__()


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(_around)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    _watch.__exit__()
    output_json["benchmarks"] = [entry for entry in output_json["benchmarks"] if entry["fullname"] in _passed]
    output_json["wrong"] = _failed
    output_json["clocks"] = _watch.samples
    output_json["dry"] = bool(os.environ.get("BENCH_TOY"))
    output_json["digest"] = record.digest(output_json)
