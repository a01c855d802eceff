"""EAGLE, EAGLE-3 and multi-token prediction in plain torch, by the papers and under published names.

A head is given whole sequences of rows: the feature of a place, the token behind it, the place, and for each
row which rows it sees. It returns features of the next places, and logits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from tests.engine.tiny import TINY

HIDDEN, VOCAB, WIDE = TINY.hidden_size, TINY.vocab_size, 40
HEADS, KV_HEADS, SIZE = 4, 2, 16
EPS, THETA = 1e-5, 10000.0
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": 1, "vocab_size": VOCAB,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": SIZE, "rms_norm_eps": EPS,
    "rope_theta": THETA, "max_position_embeddings": 64,
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


class Rows(NamedTuple):
    features: torch.Tensor  # [T, hidden]
    tokens: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    sees: torch.Tensor  # bool [T, T]


class Shared(NamedTuple):
    """The target's own."""

    embedding: torch.Tensor
    head: torch.Tensor


def causal(features: torch.Tensor, tokens: list[int], window: int = 512) -> Rows:
    count = len(tokens)
    sees = torch.ones(count, count).tril().triu(1 - window).bool()
    return Rows(features, torch.tensor(tokens), torch.arange(count), sees)


def eagle(tensors: Tensors, shared: Shared, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    embedded, features = shared.embedding[rows.tokens], rows.features
    if "embedding_layernorm.weight" in tensors:
        embedded = rms(embedded, tensors["embedding_layernorm.weight"])
        features = rms(features, tensors["hidden_states_layernorm.weight"])
    hidden = torch.cat((embedded, features), -1) @ tensors["fc.weight"].T
    hidden = hidden + tensors.get("fc.bias", torch.zeros(HIDDEN))
    for index in range(len({name for name in tensors if name.endswith("o_proj.weight")})):
        at = f"layers.{index}."
        read = rms(hidden, tensors[f"{at}input_layernorm.weight"]) if index else hidden
        hidden = decoder(tensors, at, hidden, read, rows)
    return hidden, hidden @ shared.head.T


def eagle3_features(tensors: Tensors, taps: torch.Tensor) -> torch.Tensor:
    """taps [T, taps, hidden]"""
    if "fc_norm.0.weight" in tensors:
        taps = torch.stack(
            [rms(taps[:, tap], tensors[f"fc_norm.{tap}.weight"]) for tap in range(taps.shape[1])], 1
        )
    seen = taps.flatten(1)
    if "input_norm.weight" in tensors:
        seen = rms(seen, tensors["input_norm.weight"])
    return seen @ tensors["fc.weight"].T


def eagle3(
    tensors: Tensors, shared: Shared, rows: Rows, config: dict[str, object]
) -> tuple[torch.Tensor, torch.Tensor]:
    embedding = tensors.get("embed_tokens.weight", shared.embedding)
    normed = rms(rows.features, tensors["midlayer.hidden_norm.weight"])
    embedded = rms(embedding[rows.tokens], tensors["midlayer.input_layernorm.weight"])
    residual = normed if config.get("norm_before_residual") else rows.features
    hidden = decoder(tensors, "midlayer.", residual, torch.cat((embedded, normed), -1), rows)
    if "layers.1.input_layernorm.weight" in tensors:
        read = rms(hidden, tensors["layers.1.input_layernorm.weight"])
        hidden = decoder(tensors, "layers.1.", hidden, read, rows)
    out = rms(hidden, tensors["norm.weight"])
    logits = out @ tensors.get("lm_head.weight", shared.head).T
    if "d2t" in tensors:
        known = torch.arange(len(logits[0])) + tensors["d2t"]
        logits = torch.full((len(logits), VOCAB), -math.inf).index_copy(1, known, logits)
    return (out if config.get("norm_output") else hidden), logits


def mtp(tensors: Tensors, shared: Shared, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Under DeepSeek's names, without what stands before them."""
    embedded = rms(shared.embedding[rows.tokens], tensors["enorm.weight"])
    features = rms(rows.features, tensors["hnorm.weight"])
    hidden = torch.cat((embedded, features), -1) @ tensors["eh_proj.weight"].T
    hidden = decoder(tensors, "", hidden, rms(hidden, tensors["input_layernorm.weight"]), rows)
    out = rms(hidden, tensors["shared_head.norm.weight"])
    return out, out @ shared.head.T


def decoder(tensors: Tensors, at: str, hidden: torch.Tensor, read: torch.Tensor, rows: Rows) -> torch.Tensor:
    query, key, value = (
        (linear(tensors, f"{at}self_attn.{name}_proj", read)).view(len(read), -1, SIZE).transpose(0, 1)
        for name in "qkv"
    )
    if f"{at}self_attn.q_norm.weight" in tensors:
        query = rms(query, tensors[f"{at}self_attn.q_norm.weight"])
        key = rms(key, tensors[f"{at}self_attn.k_norm.weight"])
    query, key = turned(query, rows.positions), turned(key, rows.positions)
    key, value = (part.repeat_interleave(HEADS // KV_HEADS, 0) for part in (key, value))
    scores = (query @ key.transpose(1, 2) / math.sqrt(SIZE)).masked_fill(~rows.sees, -math.inf)
    attended = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
    hidden = hidden + linear(tensors, f"{at}self_attn.o_proj", attended)
    normed = rms(hidden, tensors[f"{at}post_attention_layernorm.weight"])
    if f"{at}mlp.gate.weight" in tensors:
        return hidden + experts(tensors, f"{at}mlp.", normed)
    return hidden + gated(tensors, f"{at}mlp.", normed)


def gated(tensors: Tensors, at: str, x: torch.Tensor) -> torch.Tensor:
    gate, up = (linear(tensors, f"{at}{name}_proj", x) for name in ("gate", "up"))
    return linear(tensors, f"{at}down_proj", torch.nn.functional.silu(gate) * up)


def experts(tensors: Tensors, at: str, x: torch.Tensor) -> torch.Tensor:
    """Of each row its two best, by the softmax of their scores."""
    scores, chosen = linear(tensors, f"{at}gate", x).topk(2)
    rows = []
    for row, shares, members in zip(x, scores.softmax(-1), chosen, strict=True):
        parts = [gated(tensors, f"{at}experts.{member}.", row[None])[0] for member in members]
        rows.append(sum(share * part for share, part in zip(shares, parts, strict=True)))
    return torch.stack(rows)


def linear(tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [heads, T, D]"""
    angles = positions[:, None] / THETA ** (torch.arange(0, SIZE, 2) / SIZE)
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Numbers:
    """Random tensors, the same in every run."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 0.25) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator) * scale

    def norm(self, size: int = HIDDEN) -> torch.Tensor:
        return 1.0 + self(size, scale=0.1)

    def layer(self, at: str, *, columns: int = HIDDEN, biases: bool = False, qk: bool = False) -> Tensors:
        sizes = {"q": HEADS * SIZE, "k": KV_HEADS * SIZE, "v": KV_HEADS * SIZE}
        found = {f"{at}self_attn.{name}_proj.weight": self(rows, columns) for name, rows in sizes.items()}
        if biases:
            found |= {f"{at}self_attn.{name}_proj.bias": self(rows) for name, rows in sizes.items()}
        if qk:
            found |= {f"{at}self_attn.{name}_norm.weight": self.norm(SIZE) for name in "qk"}
        return found | {
            f"{at}self_attn.o_proj.weight": self(HIDDEN, HEADS * SIZE),
            f"{at}mlp.gate_proj.weight": self(WIDE, HIDDEN),
            f"{at}mlp.up_proj.weight": self(WIDE, HIDDEN),
            f"{at}mlp.down_proj.weight": self(HIDDEN, WIDE),
            f"{at}post_attention_layernorm.weight": self.norm(),
        }


def eagle_tensors(*, layers: int = 1, bias: bool = True, norms: bool = False, seed: int = 1) -> Tensors:
    numbers = Numbers(seed)
    found = {"fc.weight": numbers(HIDDEN, 2 * HIDDEN)}
    if bias:
        found["fc.bias"] = numbers(HIDDEN)
    if norms:
        found |= {f"{name}_layernorm.weight": numbers.norm() for name in ("embedding", "hidden_states")}
    for index in range(layers):
        found |= numbers.layer(f"layers.{index}.", biases=bias)
        if index:
            found[f"layers.{index}.input_layernorm.weight"] = numbers.norm()
    return found


def eagle3_tensors(
    *,
    layers: int = 1,
    taps: int = 3,
    known: int = 0,
    embedding: bool = False,
    norms: str = "",
    qk: bool = False,
    seed: int = 2,
) -> Tensors:
    numbers = Numbers(seed)
    found = numbers.layer("midlayer.", columns=2 * HIDDEN, qk=qk) | {
        "fc.weight": numbers(HIDDEN, taps * HIDDEN),
        "midlayer.hidden_norm.weight": numbers.norm(),
        "midlayer.input_layernorm.weight": numbers.norm(),
        "norm.weight": numbers.norm(),
        "lm_head.weight": numbers(known or VOCAB, HIDDEN, scale=0.5),
    }
    if known:
        tokens = torch.randperm(VOCAB, generator=numbers.generator)[:known].sort().values
        found["d2t"] = tokens - torch.arange(known)
        found["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, tokens, True)
    if embedding:
        found["embed_tokens.weight"] = numbers(VOCAB, HIDDEN)
    if layers == 2:
        found |= numbers.layer("layers.1.") | {"layers.1.input_layernorm.weight": numbers.norm()}
    if norms == "one":
        found["input_norm.weight"] = numbers.norm(taps * HIDDEN)
    if norms == "each":
        found |= {f"fc_norm.{tap}.weight": numbers.norm() for tap in range(taps)}
    return found


def mtp_tensors(seed: int = 3, wide: int = TINY.intermediate_size) -> Tensors:
    """Of the shape of the target's layers."""
    numbers = Numbers(seed)
    found = numbers.layer("")
    shapes = {"gate": (wide, HIDDEN), "up": (wide, HIDDEN), "down": (HIDDEN, wide)}
    found |= {f"mlp.{name}_proj.weight": numbers(*shape) for name, shape in shapes.items()}
    norms = ("enorm", "hnorm", "shared_head.norm", "input_layernorm")
    return (
        found
        | {f"{name}.weight": numbers.norm() for name in norms}
        | {"eh_proj.weight": numbers(HIDDEN, 2 * HIDDEN)}
    )
