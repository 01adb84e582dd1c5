"""Ray for a command: the cluster that RAY_ADDRESS names (`ray job submit` sets it), else one on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray


@contextmanager
def connected() -> Iterator[None]:
    """Ray is up inside the block. A cluster that the block started ends with it; one that was there stays.

    A local one listens on loopback only and starts no dashboard.
    """
    if ray.is_initialized():
        yield
        return
    # The coming default; asking for it now silences a warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
    else:
        ray.init(
            address="local",
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    _quiet_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def _quiet_ray_data() -> None:
    """Keep Ray Data's running commentary in its log files; commands print their own progress."""
    from ray.data._internal.logging import configure_logging

    configure_logging()
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)
