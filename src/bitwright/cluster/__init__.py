"""Blocks solved by many processes, on one machine or many: Ray schedules them and repeats them."""

from importlib.util import find_spec
from typing import Any

from bitwright.errors import ClusterError
from bitwright.pipeline.run import Engine


def on_ray(**options: Any) -> Engine:
    """An engine for `bitwright.quantize`; options are those of `RayEngine`.

    Raises ClusterError if Ray is not installed.
    """
    if find_spec("ray") is None:
        raise ClusterError("--engine ray needs Ray: pip install 'bitwright[ray]'")
    from bitwright.cluster.ray_engine import RayEngine

    return RayEngine(**options)
