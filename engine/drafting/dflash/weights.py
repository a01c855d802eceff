"""The tensors of a block-diffusion drafter, by the names under which they are published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from engine.drafting.dflash.config import DFlashConfig, MarkovKind
from engine.drafting.heads.checkpoint_parts import CheckpointParts
from engine.drafting.heads.head_layers import layer_targets, refuse_others
from engine.models.weights import LayerWeights, take_layer
from engine.weights.errors import CheckpointError
from engine.weights.safetensors import read_folder, read_integers

if TYPE_CHECKING:
    from pathlib import Path

    from engine.drafting.surroundings import Surroundings
    from engine.weights.layout import Shape

_OWN_MASK = "mask_embedding.pt"
_OPTIONAL = ("embedding", "head")  # absent: the target's
_SIDES = ("attention", "mlp")


class Affine(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None


class Convolution(NamedTuple):
    """Of DFlash-2, before and behind an attention or an MLP."""

    base: torch.Tensor  # [2, kernel, hidden]
    projection: torch.Tensor  # [2 * kernel * groups, hidden]


class Markov(NamedTuple):
    """`joint`: of a gated head the gate's projection, of one with a memory that of all its parts."""

    kind: MarkovKind
    before: torch.Tensor  # [vocab, rank]: what was drawn
    behind: torch.Tensor  # [known, rank]
    joint: Affine | None


class Selector(NamedTuple):
    predecessors: torch.Tensor  # [vocab, rank]
    successors: torch.Tensor  # [vocab, rank]
    projection: torch.Tensor  # [rank, hidden]
    top_k: int


@dataclass(frozen=True, slots=True)
class DFlashWeights:
    """`token_map`: int64 [known], where the drafter knows a part of the vocabulary."""

    layers: list[LayerWeights]
    projection: torch.Tensor  # [hidden, taps * hidden]: of the target's hidden states
    context_norm: torch.Tensor
    final_norm: torch.Tensor
    embedding: torch.Tensor
    head: torch.Tensor  # [known, hidden]
    token_map: torch.Tensor | None = None
    convolutions: tuple[tuple[Convolution, Convolution], ...] = ()  # of each layer: attention's, MLP's
    markov: Markov | None = None
    confidence: Affine | None = None
    selector: Selector | None = None


def read_weights(folder: Path, config: DFlashConfig, around: Surroundings) -> DFlashWeights:
    """Raises CheckpointError, in one line."""
    if (folder / _OWN_MASK).exists():
        raise CheckpointError(
            f"{folder}: {_OWN_MASK} is pickled, which could run code and is never opened: take a drafter "
            f"whose mask is in the model's own embeddings"
        )
    parts = CheckpointParts(folder)
    names = parts.names
    root = "model." if "model.fc.weight" in names else ""
    wanted = layer_targets(config.layers, names, f"{root}layers.{{layer}}.")
    for name, (spelt, shape) in _shapes(config).items():
        known = (place + one for one in spelt for place in (root, ""))
        stored = next((one for one in known if one in names), root + spelt[0])
        if stored in names or name not in _OPTIONAL:
            wanted.append(parts.whole(stored, shape, name))
    refuse_others(parts, f"{root}layers.", wanted, ())
    loaded = parts.load(wanted, around.dtype, around.device)
    token_map = _token_map(folder, config, root, around.device)
    if token_map is not None and "head" not in loaded:
        raise CheckpointError(f"{folder}: draft_vocab_size = {config.known}, but 'lm_head.weight' is missing")
    model = around.model
    return DFlashWeights(
        layers=[take_layer(loaded, config.layers, index) for index in range(config.layers.num_layers)],
        projection=loaded["fc"],
        context_norm=loaded["hidden_norm"],
        final_norm=loaded["final_norm"],
        embedding=_once(loaded.get("embedding"), model.embedding),
        head=_once(loaded.get("head"), model.head),
        token_map=token_map,
        convolutions=_convolutions(config, loaded),
        markov=_markov(config, loaded),
        confidence=Affine(loaded["confidence"], loaded["confidence_bias"]) if config.confidence else None,
        selector=_selector(config, loaded),
    )


def _once(own: torch.Tensor | None, of_model: torch.Tensor) -> torch.Tensor:
    """DSpark's are mostly copies of the model's, which are not kept twice."""
    return of_model if own is None or torch.equal(own, of_model) else own


def _shapes(config: DFlashConfig) -> dict[str, tuple[tuple[str, ...], Shape]]:
    """What there is beside the layers: name -> the names under which it may be stored, its shape."""
    hidden, vocab = config.layers.hidden_size, config.layers.vocab_size
    found: dict[str, tuple[tuple[str, ...], Shape]] = {
        "fc": (("fc.weight",), (hidden, len(config.taps) * hidden)),
        "hidden_norm": (("hidden_norm.weight",), (hidden,)),
        "final_norm": (("norm.weight",), (hidden,)),
        "embedding": (("embed_tokens.weight",), (vocab, hidden)),
        "head": (("lm_head.weight",), (config.known, hidden)),
    }
    rank = config.markov_rank
    if config.markov is not None:
        head = "markov_head."
        found["before"] = (f"{head}markov_w1.weight", "markov_w1.weight"), (vocab, rank)
        found["behind"] = (f"{head}markov_w2.weight", "markov_w2.weight"), (config.known, rank)
        if config.markov is not MarkovKind.VANILLA:
            gated = config.markov is MarkovKind.GATED
            joint = f"{head}{'gate_proj' if gated else 'joint_proj'}"
            rows, columns = (rank, hidden + rank) if gated else (3 * rank, hidden + 2 * rank)
            found["joint"] = (f"{joint}.weight",), (rows, columns)
            found["joint_bias"] = (f"{joint}.bias",), (rows,)
    if config.confidence:
        columns = hidden + rank * config.confidence_with_markov
        spelt = ("confidence_head.proj", "confidence_proj")
        found["confidence"] = tuple(f"{name}.weight" for name in spelt), (1, columns)
        found["confidence_bias"] = tuple(f"{name}.bias" for name in spelt), (1,)
    if config.selector is not None:
        rank = config.selector[0]
        head = "candidate_selector."
        found["predecessors"] = _codebook(f"{head}predecessor_codebook"), (vocab, rank)
        found["successors"] = _codebook(f"{head}successor_codebook"), (vocab, rank)
        found["selection"] = (f"{head}hidden_projection.weight",), (rank, hidden)
    if config.convolution is not None:
        kernel, columns = config.convolution
        rows = 2 * kernel * (hidden // columns)
        for index in range(config.layers.num_layers):
            for side in _SIDES:
                at = f"layers.{index}.{side}_conv."
                found[f"{at}base"] = (f"{at}base_kernel",), (2, kernel, hidden)
                found[f"{at}projection"] = (f"{at}kernel_projection.weight",), (rows, hidden)
    return found


def _codebook(name: str) -> tuple[str, ...]:
    return name, f"{name}.weight"


def _token_map(folder: Path, config: DFlashConfig, root: str, device: torch.device) -> torch.Tensor | None:
    """`d2t`: of each token that the drafter knows, how much further on it is in the target's vocabulary."""
    vocab = config.layers.vocab_size
    if config.known == vocab:
        return None
    stored = read_folder(folder).get(f"{root}d2t")
    if stored is None or stored.dtype not in ("I32", "I64") or stored.shape != (config.known,):
        raise CheckpointError(
            f"{folder}: draft_vocab_size = {config.known} needs as many integers in tensor '{root}d2t'"
        )
    tokens = [token + offset for token, offset in enumerate(read_integers(stored))]
    if len(set(tokens)) != len(tokens) or not 0 <= min(tokens) <= max(tokens) < vocab:
        raise CheckpointError(
            f"{folder}: tensor '{root}d2t' names a token twice, or one outside the vocabulary of {vocab}"
        )
    return torch.tensor(tokens, dtype=torch.int64, device=device)


def _convolutions(
    config: DFlashConfig, loaded: dict[str, torch.Tensor]
) -> tuple[tuple[Convolution, Convolution], ...]:
    if config.convolution is None:
        return ()

    def one(index: int, side: str) -> Convolution:
        at = f"layers.{index}.{side}_conv."
        return Convolution(loaded[f"{at}base"], loaded[f"{at}projection"])

    return tuple((one(index, "attention"), one(index, "mlp")) for index in range(config.layers.num_layers))


def _markov(config: DFlashConfig, loaded: dict[str, torch.Tensor]) -> Markov | None:
    if config.markov is None:
        return None
    joint = Affine(loaded["joint"], loaded["joint_bias"]) if "joint" in loaded else None
    return Markov(config.markov, loaded["before"], loaded["behind"], joint)


def _selector(config: DFlashConfig, loaded: dict[str, torch.Tensor]) -> Selector | None:
    if config.selector is None:
        return None
    return Selector(loaded["predecessors"], loaded["successors"], loaded["selection"], config.selector[1])
