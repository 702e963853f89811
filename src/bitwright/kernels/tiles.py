"""What one program of a Triton product computes, chosen by the number of rows."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """What one program computes, and how it is compiled."""

    rows: int
    channels: int
    warps: int
    stages: int


def tile_for(rows: int, tiles: Sequence[tuple[int, Tile]]) -> Tile:
    """The first entry of (limit, tile) whose limit ``rows`` does not exceed."""
    return next(tile for limit, tile in tiles if rows <= limit)
