"""List the models on this machine, or say what one is and what would fit.

Without an argument: the embedded model, what the Hugging Face cache holds, and (marked with *) what
`octavo serve` would load. With one: its family, sizes, context, KV bytes per token, tokeniser, templates
and defaults, and what this machine could hold of it under the settings of the environment; or, with status
1, the line with which serving would refuse it. A hub name that is not in the cache is fetched.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from server.commands import CommandError
from server.commands.serve import environment_settings

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from engine.checkpoint import Checkpoint
    from engine.description import Description, Trial
    from server.generation_defaults import GenerationDefaults

_NAME_CHARS = 14


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder, .gguf file or hub name to describe"
    )
    parser.add_argument("--revision", default="", help="hub revision; empty = main")
    parser.add_argument("--json", action="store_true", help="print JSON, all sizes in bytes")


def run(args: argparse.Namespace) -> int:
    if args.model:
        return _describe(args.model, args.revision, as_json=args.json)
    return _list(as_json=args.json)


def _describe(model: str, revision: str, *, as_json: bool) -> int:
    """Print what is known, and raise what serving would: facts of a model that does not fit are facts."""
    from engine.checkpoint import CheckpointError, locate
    from engine.description import describe, try_out

    config = environment_settings().config
    lines: dict[str, str] = {}
    found: dict[str, Any] = {}
    try:
        checkpoint = locate(model, revision)
        description = describe(checkpoint)
        lines |= _shape_lines(checkpoint, description)
        found |= {"name": checkpoint.name, "path": str(checkpoint.path), "kind": str(checkpoint.kind)}
        found |= asdict(description)
        tokeniser, defaults = _text_side(config.server, checkpoint)
        lines |= _text_lines(checkpoint, tokeniser, defaults)
        found |= {"tokeniser": tokeniser, "chat_templates": sorted(checkpoint.chat_templates)}
        found |= {"generation": defaults.changed()}
        trial = try_out(replace(config.engine, model=model), checkpoint)
        lines |= _trial_lines(description, trial)
        found |= {"trial": asdict(trial)}
    except CheckpointError as error:
        refusal = str(error)
    else:
        refusal = ""
    if as_json:
        print(json.dumps(found | ({"refusal": refusal} if refusal else {}), indent=2))
    else:
        for name, value in lines.items():
            print(f"{name:<{_NAME_CHARS}} {value}")
    if refusal:
        raise CommandError(refusal)
    return 0


def _text_side(config: Any, checkpoint: Checkpoint) -> tuple[str, GenerationDefaults]:
    """The vocabulary, for people, and the defaults of generation. Raises CheckpointError."""
    from server.generation_defaults import generation_defaults
    from server.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    return tokenizer.described(), generation_defaults(config, checkpoint, tokenizer)


def _shape_lines(checkpoint: Checkpoint, found: Description) -> dict[str, str]:
    parameters = f"{found.num_parameters:,}"
    if found.num_experts:
        parameters += (
            f"; {found.num_active_parameters:,} for a token, by {found.experts_per_token} of "
            f"{found.num_experts} experts"
        )
    context = f"{found.max_positions:,} tokens"
    return {
        "model": checkpoint.name,
        "path": f"{checkpoint.path} ({checkpoint.kind})",
        "family": f"{found.architecture}, {found.num_layers} layers of {found.hidden_size}",
        "parameters": parameters,
        "weights": f"{_size(found.stored_bytes)} on disk",
        "context": context + (f", rotary scaling {found.rope_scaling}" if found.rope_scaling else ""),
        "layers": _layers(found),
        "KV cache": f"{found.kv_bytes_per_token:,} bytes per token in two bytes a number",
    }


def _layers(found: Description) -> str:
    limited = [f"{count} see {tokens:,} tokens" for tokens, count in found.windows]
    limited += [f"{count} see their own {tokens:,} tokens" for tokens, count in found.chunks]
    rest = found.num_layers - sum(count for _, count in (*found.windows, *found.chunks))
    limited += [f"{rest} see all"] if rest else []
    positions = found.num_layers_without_positions
    return ", ".join([*limited, *([f"{positions} without positions"] if positions else [])])


def _text_lines(checkpoint: Checkpoint, tokeniser: str, defaults: GenerationDefaults) -> dict[str, str]:
    from server.generation_defaults import unread

    changed = defaults.changed()
    ends = changed.pop("eos_token_ids", ())
    values = [f"{name} {value:g}" for name, value in changed.items()]
    ignored = unread(checkpoint.generation)
    lines = {
        "tokeniser": tokeniser,
        "chat template": ", ".join(sorted(checkpoint.chat_templates))
        or "none: serve with --chat-template FILE",
        "defaults": ", ".join(values) or "those of OpenAI's API",
        "end tokens": ", ".join(map(str, ends)) or "none: a text ends by its length",
    }
    return lines | ({"not applied": ", ".join(ignored)} if ignored else {})


def _trial_lines(found: Description, trial: Trial) -> dict[str, str]:
    return {
        "weights": f"{_size(found.stored_bytes)} on disk, {trial.weight_format}; "
        f"{_size(trial.weight_bytes)} as {trial.dtype}",
        "memory": f"{_size(trial.free_bytes)} free on {trial.device}, {_size(trial.kv_bytes)} for KV pages",
        "would hold": f"{trial.kv_tokens:,} tokens, {trial.full_sequences:,} times {trial.max_model_len:,}",
    }


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def _list(*, as_json: bool) -> int:
    from engine.weights import embedded

    default = environment_settings().config.engine.model
    path = embedded.find_embedded()
    known: dict[str, tuple[str, int]] = {}
    if path:
        known[embedded.NAME] = "embedded", path.stat().st_size
    known.update(_cached())
    default_name = default or (embedded.NAME if path else embedded.HUB_NAME)
    known.setdefault(default_name, (_whereabouts(default_name), 0))
    if as_json:
        rows = [
            {"name": name, "where": where, "bytes": size, "default": name == default_name}
            for name, (where, size) in known.items()
        ]
        print(json.dumps(rows, indent=2))
        return 0
    for name, (where, size) in known.items():
        about = f"{where}, {_size(size)}" if size else where
        print(f"{'*' if name == default_name else ' '} {name}  ({about})")
    return 0


def _whereabouts(name: str) -> str:
    from engine.checkpoint import CheckpointError
    from engine.weights import hub, paths

    try:
        if paths.named_path(name).exists():
            return "file or folder"
    except CheckpointError:
        return "not found"
    return "would be fetched" if hub.is_hub_name(name) else "not found"


def _cached() -> Iterator[tuple[str, tuple[str, int]]]:
    """Models in the Hugging Face cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda repository: repository.repo_id):
        if repository.repo_type == "model":
            yield repository.repo_id, ("hub cache", repository.size_on_disk)
