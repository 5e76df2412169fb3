"""How many rows a tile has: few enough for caches and threads, and worth its overhead."""

from __future__ import annotations

MAX_TILE_ROWS = 65_536  # rows that are read at once
# numbers of a tile: what a core's cache holds, and on a GPU (not measured there) what keeps it busy
# between launches, half a GB of scores; 2**23 would be 104 rows for 80,000 centroids
TILE = {"cpu": 2**21, "cuda": 2**27}
FEW_ROWS = 16_384  # so few are cut into one tile a thread: a tile costs a millisecond
FEW_PRODUCTS = 2**25  # so few multiplications are one tile: a thread takes longer to begin
MOST_COMPILED = 2**33  # a core's multiplications in about half a second: tiles show that it lives


def tile_rows(n: int, dim: int, k: int, threads: int, device: str) -> int:
    """Return the rows of a tile, each with k scores that are held until its end."""
    if n * dim * k <= FEW_PRODUCTS:
        return MAX_TILE_ROWS
    most = TILE.get(device, TILE["cpu"]) // max(k, dim)
    return _share(n, most, threads * (4 if n > FEW_ROWS else 1))


def compiled_tile_rows(n: int, dim: int, k: int, threads: int) -> int:
    """Return the rows of a tile of a pass with bounds (`bounds.py`), which holds no scores.

    On two cores one tile a thread took a tenth less time than four, up to 50,000 rows.
    """
    if n <= FEW_ROWS and n * dim * k <= FEW_PRODUCTS:
        return MAX_TILE_ROWS
    most = min(4 * TILE["cpu"] // dim, MOST_COMPILED // (dim * k))
    return _share(n, most, threads * (4 if n > MAX_TILE_ROWS else 1))


def searched_rows(k: int) -> int:
    """Return how many rows that bounds leave open are searched at once, each with k scores."""
    return max(1, TILE["cpu"] // k)


def _share(n: int, most: int, parts: int) -> int:
    """Return the rows of a tile if there shall be at least so many tiles."""
    return min(max(min(most, -(-n // parts)), 64), MAX_TILE_ROWS)
