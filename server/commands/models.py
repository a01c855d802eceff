"""List the models on this machine, or describe one.

Without an argument: the embedded model, what the Hugging Face cache holds, and (marked with *) what
`octavo serve` would load. With one: its parameters, bytes, context and KV bytes per token; a hub name
that is not in the cache is fetched.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from server.commands import CommandError
from server.commands.serve import environment_settings

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from engine.checkpoint import Checkpoint
    from engine.models.config import TransformerConfig

KV_ITEM_BYTES = 2  # bfloat16, the default


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder, .gguf file or hub name to describe"
    )


def run(args: argparse.Namespace) -> int:
    return _describe(args.model) if args.model else _list()


def _describe(model: str) -> int:
    from engine.checkpoint import CheckpointError, locate

    try:
        checkpoint = locate(model)
    except CheckpointError as error:
        raise CommandError(str(error)) from None
    for name, value in describe(checkpoint).items():
        print(f"{name:<14} {value}")
    return 0


def describe(checkpoint: Checkpoint) -> dict[str, str]:
    """What someone who plans memory wants to know, as text."""
    shape = checkpoint.transformer
    return {
        "model": checkpoint.name,
        "path": f"{checkpoint.path} ({checkpoint.kind})",
        "architecture": f"{shape.architecture}, {shape.num_layers} layers of {shape.hidden_size}",
        "parameters": f"{num_parameters(shape):,}",
        "weights": f"{checkpoint.size_bytes:,} bytes on disk",
        "context": f"{shape.max_positions:,} tokens",
        "KV cache": f"{shape.kv_values_per_token * KV_ITEM_BYTES:,} bytes per token in bfloat16",
    }


def num_parameters(shape: TransformerConfig) -> int:
    """Weights of the transformer, a tied embedding counted once."""
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = 2 * hidden * queries + 2 * hidden * keys
    attention += (queries + 2 * keys + hidden) if shape.attention_bias else 0
    feed_forward = 3 * hidden * mlp + ((2 * mlp + hidden) if shape.mlp_bias else 0)
    embeddings = shape.vocab_size * hidden * (1 if shape.tie_embeddings else 2)
    return embeddings + shape.num_layers * (attention + feed_forward + 2 * hidden) + hidden


def _list() -> int:
    from engine.weights import embedded

    default = environment_settings().config.engine.model
    path = embedded.find_embedded()
    known = {}
    if path:
        known[embedded.NAME] = f"embedded, {path.stat().st_size / 2**20:,.0f} MiB"
    known.update(_cached())
    default_name = default or (embedded.NAME if path else embedded.HUB_NAME)
    known.setdefault(default_name, "file or folder" if Path(default_name).exists() else "would be fetched")
    for name, about in known.items():
        print(f"{'*' if name == default_name else ' '} {name}  ({about})")
    return 0


def _cached() -> Iterator[tuple[str, str]]:
    """Models in the Hugging Face cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda repository: repository.repo_id):
        if repository.repo_type == "model":
            yield repository.repo_id, f"hub cache, {repository.size_on_disk / 2**20:,.0f} MiB"
