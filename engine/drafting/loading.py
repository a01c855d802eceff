"""Drafters with weights: what a checkpoint is by its config.json and tensors, and loading it.

A drafter is named by its kind, so there is at most one of each.
"""

from __future__ import annotations

import logging
import time
from enum import StrEnum
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.checkpoint import locate
from engine.drafting.dflash import drafter as dflash
from engine.drafting.heads import eagle, medusa, mtp
from engine.drafting.models import pard, small_model
from engine.drafting.models.same_vocabulary import same_vocabulary
from engine.drafting.vocabularies import other_vocabulary
from engine.weights import embedded, hub
from engine.weights.errors import CheckpointError
from engine.weights.json_files import read_json_object
from engine.weights.paths import named_path
from engine.weights.safetensors import read_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from engine.checkpoint import Checkpoint
    from engine.drafting.guess import Drafter
    from engine.drafting.surroundings import Surroundings

logger = logging.getLogger("octavo.engine")


class Kind(StrEnum):
    MODEL = "model"
    PARD = "pard"
    EAGLE = "eagle"
    MTP = "mtp"
    MEDUSA = "medusa"
    DFLASH = "dflash"


OWN_HEADS = Kind.MTP.value  # in the place of a name: the heads in the target's own checkpoint
_OF_SPECULATORS = {"eagle": Kind.EAGLE, "eagle3": Kind.EAGLE, "mtp": Kind.MTP, "dflash": Kind.DFLASH}


class _Found(NamedTuple):
    """`folder` and `config`: where the checkpoint is a folder of its own."""

    source: str
    kind: Kind
    folder: Path | None = None
    config: Mapping[str, Any] | None = None


def load_drafters(draft_model: str, around: Surroundings, free_bytes: int) -> dict[str, Drafter]:
    """`draft_model`: folders, .gguf files, hub names or `mtp`, separated by commas -> drafters by name.

    Raises CheckpointError for what is no drafter for this target, for two of one kind, and, before anything
    is allocated for it, for what does not fit into its part of the memory that is free.
    """
    found: dict[Kind, _Found] = {}
    for source in (name.strip() for name in draft_model.split(",")):
        one = _find(source)
        if one.kind in found:
            raise CheckpointError(
                f"draft_model: '{found[one.kind].source}' and '{source}' are both drafters of the kind "
                f"'{one.kind}': name one of them"
            )
        found[one.kind] = one
    return {kind.value: _load(one, around, free_bytes // len(found)) for kind, one in found.items()}


def kind_of(folder: Path, config: Mapping[str, Any]) -> Kind:
    """What the checkpoint in a folder drafts as. Many EAGLE heads call themselves a Llama: their tensors say
    what they are."""
    speculators = config.get("speculators_model_type")
    if speculators is not None:
        kind = _OF_SPECULATORS.get(speculators) if isinstance(speculators, str) else None
        if kind is None:
            raise CheckpointError(
                f"{folder}: config.json speculators_model_type = {str(speculators)[:80]!r} is not supported; "
                f"these are: {', '.join(_OF_SPECULATORS)}"
            )
        return kind
    names = " ".join(map(str, [config.get("model_type"), *_listed(config.get("architectures"))])).lower()
    if "dflash" in names or "dspark" in names or "dflash_config" in config:
        return Kind.DFLASH
    if "medusa" in names or "medusa_num_heads" in config:
        return Kind.MEDUSA
    if "eagle" in names or "eagle_config" in config:
        return Kind.EAGLE
    if str(config.get("spd_type")).startswith("pard") or "pard_token" in config:
        return Kind.PARD
    return Kind.EAGLE if eagle.is_eagle(folder) else Kind.MODEL


def _find(source: str) -> _Found:
    if source == OWN_HEADS:
        return _Found(source, Kind.MTP)
    if not source:
        raise CheckpointError("draft_model: a name is empty; names are separated by single commas")
    path = named_path(source, "draft_model")
    if not path.is_dir():
        if path.exists() or path.suffix == ".gguf" or source == embedded.NAME or not hub.is_hub_name(source):
            return _Found(source, Kind.MODEL)  # `locate` says what is wrong with other files and names
        path = hub.fetch(source)
    config = read_json_object(path / "config.json")
    return _Found(source, kind_of(path, config), path, config)


def _load(found: _Found, around: Surroundings, free_bytes: int) -> Drafter:
    started = time.perf_counter()
    if found.source == OWN_HEADS:
        drafter: Drafter = mtp.load_mtp(around, free_bytes)
        size = "heads of the model's own checkpoint"
    elif found.kind in (Kind.MODEL, Kind.PARD):
        checkpoint = locate(str(found.folder or found.source))
        drafter = _model(found, checkpoint, around, free_bytes)
        size = f"{found.source} ({checkpoint.size_bytes / 1e6:.1f} MB)"
    else:
        num_bytes = _head_bytes(found, around, free_bytes)
        drafter = _head(found, around, free_bytes - num_bytes)
        size = f"{found.source} ({num_bytes / 1e6:.1f} MB)"
    logger.info("drafter %s: %s, ready in %.2f s", found.kind, size, time.perf_counter() - started)
    return drafter


def _model(found: _Found, checkpoint: Checkpoint, around: Surroundings, free_bytes: int) -> Drafter:
    """A whole model, with a vocabulary of its own."""
    is_same = same_vocabulary(checkpoint, around.checkpoint, around.model.config.vocab_size)
    if found.kind is Kind.MODEL and is_same:
        return small_model.load(checkpoint, around, free_bytes)
    if found.kind is Kind.MODEL:
        return other_vocabulary.load(checkpoint, around, free_bytes)
    if not is_same:
        raise CheckpointError(
            f"{found.source}: a PARD model with a vocabulary other than the model's: take one of its family"
        )
    assert found.config is not None, "known by its config.json"
    return pard.load(checkpoint, found.config, around, free_bytes)


def _head(found: _Found, around: Surroundings, free_bytes: int) -> Drafter:
    """Layers that build on the target's hidden states."""
    folder, config = found.folder, found.config
    assert folder is not None, "heads are in folders"
    assert config is not None, "known by its config.json"
    match found.kind:
        case Kind.MEDUSA:
            return medusa.load(folder, config, around)
        case Kind.EAGLE:
            return eagle.load(folder, config, around, free_bytes)
        case Kind.MTP:
            return mtp.load(folder, config, around, free_bytes)
        case _:
            return dflash.load(folder, config, around, free_bytes)


def _head_bytes(found: _Found, around: Surroundings, free_bytes: int) -> int:
    """What the tensors of the folder take in memory. Raises CheckpointError where there is not so much."""
    assert found.folder is not None, "heads are in folders"
    values = sum(prod(tensor.shape) for tensor in read_folder(found.folder).values())
    num_bytes = values * around.dtype.itemsize
    if num_bytes > free_bytes:
        raise CheckpointError(
            f"{found.source}: its weights take {num_bytes} bytes, {max(free_bytes, 0)} are free for it: "
            f"lower kv_cache_bytes, or draft without it"
        )
    return num_bytes


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []
