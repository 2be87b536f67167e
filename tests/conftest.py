"""Fixtures shared by all tests. What needs vLLM is marked `engine` and runs in processes of its own."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_support import models
from engine_support.worker import Worker


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the engine's tests where vLLM is not installed, and say how to install it; `make test` insists on it."""
    if importlib.util.find_spec("vllm") is not None or os.environ.get("KVTRACE_TEST_ENGINE") == "required":
        return
    skip = pytest.mark.skip(reason="vLLM is not installed: make test")
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _no_tracing_by_accident() -> Iterator[None]:
    """Keep the caller's own tracing settings out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("KVTRACE_") and name != "KVTRACE_CACHE_DIR"] + [
            "VLLM_PLUGINS",
            "PYTHONHASHSEED",
        ]:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config without weights, for runs that only look at the scheduler."""
    return models.tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def weighted_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose outputs depend on the whole prompt, for runs that compare outputs."""
    return models.weighted_llama(tmp_path_factory.mktemp("model") / "weighted")


@pytest.fixture(scope="session")
def chat_model() -> Path:
    """SmolLM2-135M-Instruct, unpacked once per checkout into .models/."""
    return models.smollm2()


@pytest.fixture(scope="session")
def engine_worker() -> Iterator[Worker]:
    """One process with vLLM imported, untraced, in which many tests run their engines one after another."""
    with Worker() as worker:
        yield worker
