"""What a measurement ran on: the facts that must stand beside a time."""

import datetime
import os
import platform
from pathlib import Path

import jax

from tdm_jax.version import __version__


def describe() -> dict[str, str | int | float]:
    """Versions, device and load of this process, now.

    Returns:
      `tdm_jax`, `jax`, `python`: versions. `device`: what JAX computes on. `devices`: how many of
      them there are. `cores`: CPU cores this process may use. `load`: processes that wanted one,
      on average over the last minute, this one included.
    """
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "tdm_jax": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cores": cores or 1,
        "load": round(os.getloadavg()[0], 2),
    }


def now() -> str:
    """The time, as it stands beside a measurement: ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def line(facts: dict[str, str | int | float]) -> str:
    """The facts as one line, to stand below a table."""
    cores = f"{facts['cores']} CPU core{'' if facts['cores'] == 1 else 's'}"
    return (
        f"JAX {facts['jax']} on {facts['devices']} × {facts['device']} ({facts['platform']}), "
        f"{cores}, load {facts['load']}, Python {facts['python']}, "
        f"tdm_jax {facts['tdm_jax']}"
    )


def _processor() -> str:
    # platform.processor() is empty on most Linux machines.
    info = Path("/proc/cpuinfo")
    if info.exists():
        for text in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = text.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
