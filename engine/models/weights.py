"""A layer's tensors by the roles that they play; taken from the loader's dict by their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cuda_kernels.experts import ExpertWeights

if TYPE_CHECKING:
    from engine.models.config import TransformerConfig

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class MLPWeights:
    gate_up: torch.Tensor  # [2 * intermediate, hidden]
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class MixtureWeights:
    router: torch.Tensor  # float32 [experts, hidden]
    router_bias: torch.Tensor | None
    experts: ExpertWeights


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Norms that a family does not have are None."""

    attention_norm: torch.Tensor | None
    attention_post_norm: torch.Tensor | None
    qkv: torch.Tensor  # [(Hq + 2 Hkv) * D, hidden]
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    sinks: torch.Tensor | None  # float32 [Hq]
    out: torch.Tensor
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor | None
    mlp_post_norm: torch.Tensor | None
    mlp: MLPWeights | MixtureWeights


def take_layer(weights: Weights, config: TransformerConfig, index: int) -> LayerWeights:
    """Remove layer `index` from `weights` and return it. The layout decides which norms and biases it has."""
    prefix = f"layers.{index}."

    def norm(name: str) -> torch.Tensor | None:
        return take_norm(weights, prefix + name, config) if prefix + name in weights else None

    def bias(name: str) -> torch.Tensor | None:
        return weights.pop(f"{prefix}{name}.bias", None)

    return LayerWeights(
        attention_norm=norm("attention_norm"),
        attention_post_norm=norm("attention_post_norm"),
        qkv=weights.pop(prefix + "qkv.weight"),
        qkv_bias=bias("qkv"),
        q_norm=norm("q_norm"),
        k_norm=norm("k_norm"),
        sinks=weights.pop(prefix + "sinks", None),
        out=weights.pop(prefix + "out.weight"),
        out_bias=bias("out"),
        mlp_norm=norm("mlp_norm"),
        mlp_post_norm=norm("mlp_post_norm"),
        mlp=_take_mixture(weights, prefix) if config.layers[index].experts else _take_mlp(weights, prefix),
    )


def take_norm(weights: Weights, name: str, config: TransformerConfig) -> torch.Tensor:
    weight = weights.pop(name)
    return weight.float() + 1.0 if config.norm_offset else weight


def _take_mlp(weights: Weights, prefix: str) -> MLPWeights:
    return MLPWeights(
        gate_up=weights.pop(f"{prefix}gate_up.weight"),
        gate_up_bias=weights.pop(f"{prefix}gate_up.bias", None),
        down=weights.pop(f"{prefix}down.weight"),
        down_bias=weights.pop(f"{prefix}down.bias", None),
    )


def _take_mixture(weights: Weights, prefix: str) -> MixtureWeights:
    return MixtureWeights(
        router=weights.pop(f"{prefix}router.weight"),
        router_bias=weights.pop(f"{prefix}router.bias", None),
        experts=ExpertWeights(
            gate_up=weights.pop(f"{prefix}experts.gate_up.weight"),
            gate_up_bias=weights.pop(f"{prefix}experts.gate_up.bias", None),
            down=weights.pop(f"{prefix}experts.down.weight"),
            down_bias=weights.pop(f"{prefix}experts.down.bias", None),
        ),
    )
