"""Every test runs on eight virtual CPU devices, with the types of all signatures enforced."""

import os

# Before jax is imported: it reads these once. Most of the suite's time is compilation. LLVM's
# optimisations would double it, and XLA's way to LLVM through MLIR takes five times as long as its
# older one, which computes the same. What XLA makes of a program before is as in any other run.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)

from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401  (the hook names it, and imports its package alone)

install_import_hook("tdm_jax", "tests.typechecker.checked")
