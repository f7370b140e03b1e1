import pytest
import torch

from benchmarks import record, timing

_watch = timing.Watch()


def pytest_sessionstart(session):
    _watch.__enter__()


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(record.environment())


def pytest_benchmark_update_json(config, benchmarks, output_json):
    _watch.__exit__()
    output_json["clocks"] = _watch.samples
    output_json["digest"] = record.digest(output_json)
