"""Mixtures of experts and gated activations against obvious loops, in double."""

from __future__ import annotations

import pytest
import torch

from cuda_kernels.experts import ExpertWeights, experts, route
from cuda_kernels.reference import gated

COUNT, PER_TOKEN, WIDE, INNER = 6, 3, 24, 20


def spiky(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    values[torch.rand(shape, generator=generator) < 0.02] *= 20
    return values


def mixture(*, bias: bool) -> ExpertWeights:
    return ExpertWeights(
        gate_up=spiky(COUNT, 2 * INNER, WIDE, seed=1) * 0.2,
        gate_up_bias=spiky(COUNT, 2 * INNER, seed=2) if bias else None,
        down=spiky(COUNT, WIDE, INNER, seed=3) * 0.2,
        down_bias=spiky(COUNT, WIDE, seed=4) if bias else None,
    )


def activation_of(gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
    if name == "silu":
        return gate / (1 + (-gate).exp()) * up
    if name == "gelu_tanh":
        inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1 + inner.tanh()) * up
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate / (1 + (-1.702 * gate).exp()) * (up + 1)


@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "clamped_swish"])
def test_gated_activations(name):
    gate_up = spiky(7, 2 * INNER, seed=5) * 4
    gate, up = gate_up.double().chunk(2, dim=-1)
    torch.testing.assert_close(
        gated(gate_up, name).double(), activation_of(gate, up, name), atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize("routing", ["softmax_all", "softmax_chosen"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_mixture_equals_the_obvious_loop(routing, bias):
    x, logits, model = spiky(11, WIDE, seed=6), spiky(11, COUNT, seed=7), mixture(bias=bias)
    chosen, weights = route(logits, PER_TOKEN, routing)
    expected = torch.zeros(11, WIDE, dtype=torch.float64)
    for row in range(11):
        best = sorted(range(COUNT), key=lambda expert: -logits[row, expert].item())[:PER_TOKEN]
        among = best if routing == "softmax_chosen" else range(COUNT)
        total = sum(logits[row, expert].double().exp() for expert in among)
        for expert in best:
            inner = model.gate_up[expert].double() @ x[row].double()
            inner = inner + (model.gate_up_bias[expert].double() if bias else 0)
            inner = activation_of(*inner.chunk(2), "clamped_swish")
            out = model.down[expert].double() @ inner + (model.down_bias[expert].double() if bias else 0)
            expected[row] += logits[row, expert].double().exp() / total * out
    found = experts(x, chosen, weights, model, "clamped_swish").double()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bits_whoever_shares_its_experts(dtype):
    x, logits = spiky(37, WIDE, seed=8).to(dtype), spiky(37, COUNT, seed=9)
    raw = mixture(bias=True)
    model = ExpertWeights(
        raw.gate_up.to(dtype), raw.gate_up_bias.to(dtype), raw.down.to(dtype), raw.down_bias.to(dtype)
    )

    def compute(rows: slice) -> torch.Tensor:
        return experts(x[rows], *route(logits[rows], PER_TOKEN, "softmax_all"), model, "silu")

    together = compute(slice(0, 37))
    for rows in (slice(0, 1), slice(5, 7), slice(9, 20), slice(36, 37)):
        assert torch.equal(compute(rows), together[rows])
