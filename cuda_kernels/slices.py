"""The shape of a step as the kernels see it: rows, the pages behind them, and what each row may see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class SliceTable:
    """S slices over T rows (tokens), host arrays.

    Slot k of slice s lives in page `pages[s, k // page_size]`. A row sees slot k of its own sequence when
    `starts[row] <= k < ends[row]`, or when bit `k - ends[row]` of `words[row]` is set (the 64 slots from its
    end on). That one rule covers causal rows (end = own slot + 1), rows that see their whole slice, and rows
    that see only their ancestors in a tree (end = where the tree begins); a start above 0 is a window.
    """

    first_rows: NDArray[np.int64]  # [S] row of each slice's first token
    num_rows: NDArray[np.int64]  # [S]
    lengths: NDArray[np.int64]  # [S] slots filled after the step: start + num_rows
    pages: NDArray[np.int64]  # [S, P] entries past a slice's length are not read
    starts: NDArray[np.int64]  # [T]
    ends: NDArray[np.int64]  # [T]
    words: NDArray[np.uint64]  # [T]
    page_size: int
