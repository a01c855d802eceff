"""Small targets, and what a drafter for them is given."""

from __future__ import annotations

from dataclasses import replace

import torch

from cuda_kernels.ops import pick
from engine.batch import BatchBuilder
from engine.drafting.heads.head_layers import take_layers
from engine.drafting.heads.heads import FusingHead
from engine.drafting.surroundings import Surroundings
from engine.kv_storage import KVStorage
from engine.models.config import Layer, Rope, TransformerConfig
from engine.models.context import for_context
from engine.models.transformer import NORMED, Transformer
from engine.sampling.processors import LogitsProcessor, needs_processing
from scheduler.types import Sequence
from tests.engine.tiny import CPU, TINY, random_weights, request

NUM_WORDS = 24
CHAIN = TransformerConfig(
    architecture="llama",
    vocab_size=NUM_WORDS,
    hidden_size=32,
    intermediate_size=8,
    layers=(Layer(rope=Rope(theta=10000.0, num_rotated=8)),) * 3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    max_positions=256,
)


def following(token: int, steps: int = 1) -> int:
    """The word that is so many steps behind `token` where a chain's target is sure."""
    return (token * 7**steps + 5 * sum(7**step for step in range(steps))) % NUM_WORDS


def chain_weights(sureness: float = 4.0) -> dict[str, torch.Tensor]:
    """A model whose layers add nothing and whose hidden states are one-hot: the word behind `token` is
    `following(token)`, the likelier the greater `sureness`."""
    weights = {name: torch.zeros_like(value) for name, value in random_weights(CHAIN).items()}
    for name, value in weights.items():
        if name.endswith("norm"):
            value.fill_(1.0)
    weights["embedding"][:, :NUM_WORDS] = torch.eye(NUM_WORDS)
    weights["head"].copy_(chain_head(1, sureness))
    return weights


def chain_head(steps: int, sureness: float = 4.0) -> torch.Tensor:
    """[vocab, hidden]: on what a chain's head sees of a token, it names the word `steps` behind it."""
    head = torch.zeros(CHAIN.vocab_size, CHAIN.hidden_size)
    for token in range(NUM_WORDS):
        head[following(token, steps), token] = sureness
    return head


def knowing_head(around: Surroundings, from_token: bool) -> FusingHead:
    """A head that knows a chain's next hidden states by the token behind its place, or by those of its
    place."""
    config = around.model.config
    layer = {
        name: torch.zeros_like(value) for name, value in random_weights(config).items() if "layers.0" in name
    }
    layer = {name: value + 1.0 if "norm" in name else value for name, value in layer.items()}
    config = replace(config, layers=config.layers[:1])
    size = config.hidden_size
    fuse = torch.zeros(size, 2 * size)
    for word in range(NUM_WORDS):
        if from_token:
            fuse[word, word] = size**0.5
        else:
            fuse[following(word), size + word] = 1.0
    return FusingHead(take_layers(config, layer, around.ops), around.model, (NORMED,), fuse)


def surroundings(
    config: TransformerConfig = TINY,
    weights: dict[str, torch.Tensor] | None = None,
    max_len: int = 256,
    dtype: torch.dtype = torch.float32,
) -> Surroundings:
    ops, config = pick(CPU), for_context(config, max_len)
    weights = weights or random_weights(config)
    model = Transformer(config, {name: value.to(dtype) for name, value in weights.items()}, ops)
    processors: dict[int, LogitsProcessor] = {}

    def processor_of(sequence: Sequence) -> LogitsProcessor | None:
        if not needs_processing(sequence.request.sampling):
            return None
        fresh = LogitsProcessor(sequence, config.vocab_size, CPU)
        return processors.setdefault(sequence.seq_id, fresh)

    return Surroundings(
        checkpoint=None,
        model=model,
        storage=KVStorage(config, 64, 16, dtype, CPU),
        batches=BatchBuilder(config, ops, 16, max_len, 8, CPU),
        ops=ops,
        dtype=dtype,
        device=CPU,
        max_model_len=max_len,
        max_num_seqs=8,
        processor_of=processor_of,
    )


def sequence(tokens: list[int], number: int = 0, prompt_len: int = 1, **sampling: object) -> Sequence:
    return Sequence(number, request(f"s{number}", tokens[:prompt_len], **sampling), 0, list(tokens))
