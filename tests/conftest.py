"""Settings every test runs under, and the real data beside the repository."""

import os
import tempfile
from pathlib import Path

# Before torch and transformers are imported: one thread, no network, a cache of our own for dynamic modules.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
_HF_HOME = tempfile.TemporaryDirectory(prefix="ffmerge-test-hf-")
os.environ["HF_HOME"] = _HF_HOME.name
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_configure():
    try:
        from transformers.utils import logging
    except ImportError:  # the ops and plain modules are tested without it
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def pytest_unconfigure():
    _HF_HOME.cleanup()


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items):
    """Jobs of several processes run one after another; what takes long begins first, so that nothing is left alone."""
    for item in items:
        if item.get_closest_marker("dist"):
            item.add_marker(pytest.mark.xdist_group("dist"))
    yield
    items.sort(key=lambda item: not (item.get_closest_marker("slow") or item.get_closest_marker("xdist_group")))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the repository; tests that want it are skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    return folder
