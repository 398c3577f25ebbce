"""Every test runs on eight virtual CPU devices, with the types of all signatures enforced."""

import os

# Before jax is imported: it reads these once. Two thirds of the suite's time is compilation, which
# LLVM's optimisations double; the programs that XLA hands to it are those of any other run.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)

from jaxtyping import install_import_hook

install_import_hook("tdm_jax", "typechecker.checked")
