"""Every test runs on eight virtual CPU devices, with the types of all signatures enforced."""

import os

# Before jax is imported: it reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()

from jaxtyping import install_import_hook

install_import_hook("tdm_jax", "typechecker.checked")
