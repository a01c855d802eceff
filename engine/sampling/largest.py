"""The largest values of rows and their places. On a CPU torch takes ten times as long to find a place as to
find a value, so the largest value of each block is found first, and its place in the best blocks alone."""

from __future__ import annotations

import torch

BLOCK = 64  # the vocabularies of nearly all models are multiples of it


def largest(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values float32 [R, V] -> the largest of each row and its first place, both [R], as `values.max(-1)` has
    them: a NaN is larger than anything."""
    if not _pays(values, 1):
        peaks, places = values.max(-1)
        return peaks, places
    found, among = _within(values, _tops(values).argmax(-1, keepdim=True))
    best = among.argmax(-1, keepdim=True)
    return among.gather(-1, best)[:, 0], found.gather(-1, best)[:, 0]


def largest_places(values: torch.Tensor, count: int) -> torch.Tensor:
    """values float32 [R, V] -> int64 [R, min(count, V)], places of the largest, best first, as topk has them;
    which of equal ones is as good as any."""
    if not _pays(values, count):
        return values.topk(min(count, values.shape[1]), -1).indices
    found, among = _within(values, _tops(values).topk(count, -1).indices)
    return found.gather(-1, among.topk(count, -1).indices)


def _pays(values: torch.Tensor, count: int) -> bool:
    width = values.shape[1]
    return values.device.type == "cpu" and width % BLOCK == 0 and width >= 2 * count * BLOCK


def _tops(values: torch.Tensor) -> torch.Tensor:
    """-> [R, blocks], the largest of each block"""
    return values.reshape(len(values), -1, BLOCK).amax(-1)


def _within(values: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """blocks int64 [R, n] -> [R, n * BLOCK], the places in them and the values there"""
    places = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)
    return places, values.gather(-1, places)
