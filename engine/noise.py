"""Gumbel noise as a pure function of (seed, choice, place, token): nothing draws from a shared stream.

Counter-based Philox 4x32-10 (Salmon et al., SC'11): the counter is (token // 4, place, choice, step), the
key is the request's seed. Token t takes word t % 4. So the noise of any token at any place can be made
alone, in any order, on any device.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CHUNK = 16384  # counters at a time: the working set of one chunk stays in the cache
_HALF_ULP = 2.0**-33


def philox(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Four counter words and two key words, int64 tensors of 32-bit values that broadcast -> four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0 = c0 * _MULTIPLIERS[0]  # wraps at 64 bits like the unsigned product
        product1 = c2 * _MULTIPLIERS[1]
        high0 = (product0 >> 32) & _MASK
        high1 = (product1 >> 32) & _MASK
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = product1 & _MASK
        c3 = product0 & _MASK
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


class NoiseKeys:
    """The noise of R rows: int64 [R, 1] columns of seed halves, choice, place and diffusion step."""

    def __init__(self, seeds: list[int], choices: list[int], places: list[int], device: torch.device) -> None:
        columns = torch.tensor(
            [
                [seed & _MASK, seed >> 32, choice, place]
                for seed, choice, place in zip(seeds, choices, places, strict=True)
            ],
            dtype=torch.int64,
            device=device,
        ).view(-1, 4, 1)
        self.low, self.high, self.choice, self.place = columns.unbind(1)
        self.step = torch.zeros_like(self.place)

    def of_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int64 [R, K] -> float32 [R, K]"""
        words = self._words(tokens >> 2)
        return _gumbel(torch.stack(words, -1).gather(-1, (tokens & 3).unsqueeze(-1)).squeeze(-1))

    def of_vocabulary(self, size: int) -> torch.Tensor:
        """-> float32 [R, size], every token's noise"""
        groups = torch.arange((size + 3) // 4, dtype=torch.int64, device=self.low.device)
        count = self.low.shape[0]
        # On a CPU a few rows at a time: the working set stays in the cache.
        together = max(1, _CHUNK // len(groups)) if self.low.device.type == "cpu" else count
        begins = range(0, count, together)
        pieces = [_gumbel(self._rows(begin, begin + together, groups)[:, :size]) for begin in begins]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _rows(self, begin: int, end: int, groups: torch.Tensor) -> torch.Tensor:
        """-> int64 [rows, 4 * groups], the words of rows begin .. end"""
        rows = slice(begin, end)
        counter = (groups[None, :], self.place[rows], self.choice[rows], self.step[rows])
        return torch.stack(philox(counter, (self.low[rows], self.high[rows])), -1).flatten(1)

    def _words(self, groups: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return philox((groups, self.place, self.choice, self.step), (self.low, self.high))


def _gumbel(words: torch.Tensor) -> torch.Tensor:
    """32-bit words -> standard Gumbel float32, through w in (0, 1): -log(-log(1 - w)).

    w near 0 keeps its relative precision in float32, so large values of the noise (those that win) are
    exact, and none is infinite; at w = 1 the noise is very small and is clamped.
    """
    uniform = (words.float() * 2.0**-32 + _HALF_ULP).clamp_(max=1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()
