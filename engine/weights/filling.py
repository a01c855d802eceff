"""Targets filled from a source: each allocated once, each stored tensor read once, by several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from engine.weights.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.weights.adapter import Adapter
    from engine.weights.layout import Piece, Target
    from engine.weights.source import WeightSource


@dataclass(frozen=True, slots=True)
class Filling:
    """Fills targets from a source. Peak memory is that of the targets and one piece for each thread."""

    source: WeightSource
    dtype: torch.dtype
    device: torch.device
    adapter: Adapter | None = None

    def run(self, targets: list[Target]) -> dict[str, torch.Tensor]:
        """`targets` name only what the source has, in the right shapes."""
        with self.source, self.adapter or nullcontext():
            weights = {target.name: self._allocated(target) for target in targets}
            jobs = [(target, piece) for target in targets for piece in target.pieces]
            total = sum(self.source.stored_bytes(piece.stored) for _, piece in jobs)
            with _workers() as pool, progress_bar("loading weights", total) as advance:
                work = [pool.submit(self._fill, weights[target.name], piece) for target, piece in jobs]
                for done, (_, piece) in zip(work, jobs, strict=True):
                    done.result()
                    advance(self.source.stored_bytes(piece.stored))
        return weights

    def dtype_of(self, target: Target) -> torch.dtype:
        return torch.float32 if target.exact else self.dtype

    def _allocated(self, target: Target) -> torch.Tensor:
        return torch.empty(target.shape, dtype=self.dtype_of(target), device=self.device)

    def _fill(self, target: torch.Tensor, piece: Piece) -> None:
        adapter = self.adapter if self.adapter and self.adapter.changes(piece) else None
        if piece.arrange is None and not piece.stacked and adapter is None:
            self.source.read_into(piece.stored, _place(target, piece, prod(piece.shape)).view(piece.shape))
            return
        dtype = torch.float32 if adapter else target.dtype
        values = torch.empty(piece.shape, dtype=dtype, device=target.device)
        self.source.read_into(piece.stored, values)
        if piece.arrange is not None:
            values = piece.arrange(values)
        if adapter is not None:
            adapter.merge(piece, values)
        if piece.stacked:
            target[:, piece.row : piece.row + values.shape[1]] = values
        else:
            _place(target, piece, values.numel()).copy_(values.reshape(-1))


def _place(target: torch.Tensor, piece: Piece, count: int) -> torch.Tensor:
    """The target's next `count` numbers from the piece's first row on, as a vector."""
    start = piece.row * (target.shape[-1] if target.ndim > 1 else 1)
    place = target.view(-1)[start : start + count]
    assert place.numel() == count, f"{piece.stored} goes beyond the end of its target"
    return place


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Each thread has tensors of its own, and no operation is spread over threads: widening is thousands
    of short operations, and where another process holds a core (the server starts at the same time) each
    of them would wait for its other half. One core is left to that process and to the hash.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(max(1, num_threads - 1), thread_name_prefix="weights")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)
