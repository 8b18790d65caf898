"""The progress bar of a copy or conversion of files."""

from __future__ import annotations

from tqdm import tqdm


def bytes_bar(size: int, name: str) -> tqdm:
    """A progress bar over `size` bytes, shown where they take longer than half a second."""
    return tqdm(total=size, desc=name, unit="B", unit_scale=True, dynamic_ncols=True, delay=0.5)
