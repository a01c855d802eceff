"""Rotary positions (RoFormer, Su 2021) and the ways in which published models stretch them.

Every angle is a pure function of the row's own position, so keys in the cache never depend on how a prompt
was cut or how long its sequence became.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from engine.models.config import ScalingKind

if TYPE_CHECKING:
    from engine.models.config import Rope, RopeScaling


class Rotary:
    """Cosine and sine of positions, for the layers that share one `Rope`."""

    def __init__(self, rope: Rope, device: torch.device) -> None:
        self.rope = rope
        self.inverse_frequencies = inverse_frequencies(rope).to(device)
        self.factor = 1.0 if rope.scaling is None else rope.scaling.attention_factor

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions int64 [T] -> cos, sin float32 [T, 1, num_rotated / 2]"""
        scaling = self.rope.scaling
        frequencies = self.inverse_frequencies
        if scaling is not None and scaling.kind is ScalingKind.DYNAMIC:
            frequencies = _dynamic(self.rope, scaling, positions)
        angles = positions[:, None, None].float() * frequencies
        if self.factor == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * self.factor, angles.sin() * self.factor


def inverse_frequencies(rope: Rope) -> torch.Tensor:
    """float32 [num_rotated / 2]: the angle per position of each pair."""
    plain = 1.0 / rope.theta ** _exponents(rope)
    scaling = rope.scaling
    if scaling is None:
        return plain
    match scaling.kind:
        case ScalingKind.DYNAMIC:
            return plain
        case ScalingKind.LINEAR:
            return plain / scaling.factor
        case ScalingKind.LLAMA3:
            return _llama3(plain, scaling)
        case ScalingKind.YARN:
            return _yarn(plain, rope, scaling)
        case ScalingKind.FACTORS:
            return plain / torch.tensor(scaling.factors)
    raise AssertionError(f"{scaling.kind} is decided before a model is built: see `for_context`")


def _exponents(rope: Rope) -> torch.Tensor:
    return torch.arange(0, rope.num_rotated, 2, dtype=torch.int64).float() / rope.num_rotated


def _llama3(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Wavelengths longer than original / low_freq_factor are stretched by `factor`, those shorter than
    original / high_freq_factor stay, the ones between are interpolated (Llama 3.1); between equal factors, as
    Llama 4 has them, there are none."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_positions * plain / (2 * math.pi)
    keep = ((turns - low) / ((high - low) or 1e-9)).clamp(0.0, 1.0)
    return plain * keep + plain / scaling.factor * (1.0 - keep)


def _yarn(plain: torch.Tensor, rope: Rope, scaling: RopeScaling) -> torch.Tensor:
    """Pairs that turn more than `beta_fast` times within the original context stay, those that turn less
    than `beta_slow` times are stretched, with a ramp over the pairs between (Peng 2023)."""

    def pair_that_turns(times: float) -> float:
        # A sum of logarithms: `times` may be any number, and its product none.
        share = math.log(scaling.original_max_positions / (2 * math.pi)) - math.log(times)
        return rope.num_rotated * share / (2 * math.log(rope.theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.num_rotated - 1)
    width = last - first or 0.001
    stretch = ((torch.arange(len(plain)).float() - first) / width).clamp(0.0, 1.0)
    return plain / scaling.factor * stretch + plain * (1.0 - stretch)


def _dynamic(rope: Rope, scaling: RopeScaling, positions: torch.Tensor) -> torch.Tensor:
    """-> [T, 1, num_rotated / 2]. NTK scaling with the row's own position as the length so far: what a model
    computes that decodes token by token, whatever was prefilled at once."""
    length = (positions + 1).clamp(min=scaling.original_max_positions).double()
    growth = scaling.factor * length / scaling.original_max_positions - (scaling.factor - 1)
    base = rope.theta * growth ** (rope.num_rotated / (rope.num_rotated - 2))
    exponents = _exponents(rope).to(positions.device)
    return (1.0 / base[:, None, None] ** exponents).float()
