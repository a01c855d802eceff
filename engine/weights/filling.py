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

_TEMPORARY_SHARE = 1 / 8  # of the weights' bytes, that pieces on their way may take on top


@dataclass(frozen=True, slots=True)
class Filling:
    """Fills targets from a source. Peak memory is that of the targets and one piece for each thread; where
    pieces are large, as all experts of a layer are, there are fewer threads."""

    source: WeightSource
    dtype: torch.dtype
    device: torch.device
    adapter: Adapter | None = None
    num_cores: int = 0  # 0: as many as torch has threads

    def run(self, targets: list[Target]) -> dict[str, torch.Tensor]:
        """`targets` name only what the source has, in the right shapes."""
        with self.source, self.adapter or nullcontext():
            weights = {target.name: self._allocated(target) for target in targets}
            jobs = [(target, piece) for target in targets for piece in target.pieces]
            total = sum(self.source.stored_bytes(piece.stored) for _, piece in jobs)
            with (
                workers(self._num_threads(targets)) as pool,
                progress_bar("loading weights", total) as advance,
            ):
                work = [pool.submit(self._fill, weights[target.name], piece) for target, piece in jobs]
                for done, (_, piece) in zip(work, jobs, strict=True):
                    done.result()
                    advance(self.source.stored_bytes(piece.stored))
        return weights

    def kept_bytes(self, targets: list[Target]) -> int:
        """Of the weights themselves."""
        return sum(prod(target.shape) * self._dtype_of(target).itemsize for target in targets)

    def peak_bytes(self, targets: list[Target]) -> int:
        """What `run` needs on the device."""
        return self.kept_bytes(targets) + self._num_threads(targets) * self._temporary_bytes(targets)

    def _temporary_bytes(self, targets: list[Target]) -> int:
        """Of the piece that takes most on its way to its place."""
        pieces = ((target, piece) for target in targets for piece in target.pieces)
        return max((self._on_its_way(target, piece) for target, piece in pieces), default=0)

    def _on_its_way(self, target: Target, piece: Piece) -> int:
        """Bytes as stored, where that is copied to another device; as read and as arranged, where it is."""
        stored = 0 if self.device.type == "cpu" else self.source.stored_bytes(piece.stored)
        if self._goes_straight(piece):
            return stored
        width = 4 if self._is_adapted(piece) else self._dtype_of(target).itemsize
        return stored + prod(piece.shape) * width * 2

    def _num_threads(self, targets: list[Target]) -> int:
        """One core is left to the server, which starts at the same time, and to the hash."""
        bound = int(self.kept_bytes(targets) * _TEMPORARY_SHARE) // max(1, self._temporary_bytes(targets))
        return max(1, min((self.num_cores or torch.get_num_threads()) - 1, bound))

    def _is_adapted(self, piece: Piece) -> bool:
        return self.adapter is not None and self.adapter.changes(piece)

    def _goes_straight(self, piece: Piece) -> bool:
        return piece.arrange is None and not piece.stacked and not self._is_adapted(piece)

    def _dtype_of(self, target: Target) -> torch.dtype:
        return torch.float32 if target.exact else self.dtype

    def _allocated(self, target: Target) -> torch.Tensor:
        filled = sum(prod(piece.shape) for piece in target.pieces)
        assert filled == prod(target.shape), f"{target.name} has a gap"
        return torch.empty(target.shape, dtype=self._dtype_of(target), device=self.device)

    def _fill(self, target: torch.Tensor, piece: Piece) -> None:
        if self._goes_straight(piece):
            self.source.read_into(piece.stored, _place(target, piece, prod(piece.shape)).view(piece.shape))
            return
        adapter = self.adapter if self._is_adapted(piece) else None
        dtype = torch.float32 if adapter else target.dtype
        values = self.source.empty(piece.stored, dtype, target.device)
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
def workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Each thread has tensors of its own, and no operation is spread over threads: widening is thousands
    of short operations, and where another process holds a core each of them would wait for its other half.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count, thread_name_prefix="weights")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)
