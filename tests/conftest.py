"""Every test runs on eight virtual CPU devices, with the types of all signatures enforced."""

import os

# Before jax is imported: it reads these once. Most of the suite's time is compilation. LLVM's
# optimisations would double it, and XLA's way to LLVM through MLIR takes five times as long as its
# older one, which computes the same. What XLA makes of a program before is as in any other run.
# TDM_TESTS_XLA=default compiles as users do: .ci/run repeats the golden tests so.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0"
        " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
        if os.environ.get("TDM_TESTS_XLA", "cheap") == "cheap"
        else "",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)

import functools
from typing import Any

import pytest
from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401  (the hook names it, and imports its package alone)

install_import_hook("tdm_jax", "tests.typechecker.checked")


# pytest-xdist hands out files in this order: those that take a minute must not be the last.
LONGEST = (
    "test_common",
    "test_loop",
    "test_comparison",
    "test_sweep",
    "test_page",
    "test_pretrained",
    "test_backbones",
    "test_families",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the longest files to the front."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def tiny_model():
    """Makes a small model and variables for it: `tiny_model("tdm", 0.5, layers=(1,), width=32)`."""
    import jax
    import numpy as np

    from tdm_jax import create_model  # after the hook

    sizes = dict(image_size=16, patch_size=4, width=16, depth=3, num_heads=2, num_classes=3)

    @functools.cache
    def variables(model: Any) -> dict[str, Any]:
        """As `model.init` shapes them, drawn at random, biases too; nothing is compiled."""
        images = jax.ShapeDtypeStruct((1, *model.image_size, model.in_channels), np.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        rng = np.random.default_rng(0)
        return jax.tree.map(lambda x: rng.normal(0.0, 0.3, x.shape).astype(np.float32), shapes)

    def make(reducer: Any = "none", keep_rate: float | None = None, **settings: Any):
        model = create_model("vit", reducer, keep_rate, **sizes | settings)
        return model, variables(model)

    return make


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that stands for the object store gs://bucket."""
    from etils import epath
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    class Bucket(DirFileSystem):
        def _join(self, path):
            return super()._join(path.removeprefix("gs://bucket/"))

    store = Bucket(str(tmp_path), LocalFileSystem(auto_mkdir=True))
    monkeypatch.setattr(type(epath.backend.fsspec_backend), "fs", lambda self, path: store)
    return tmp_path
