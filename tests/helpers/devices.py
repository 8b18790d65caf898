"""Processes in which the CPU passes for several devices."""

from __future__ import annotations

import os


def environment(devices: int) -> dict[str, str]:
    """This process's environment, for one that is to see `devices` devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags}
