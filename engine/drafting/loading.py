"""Drafters with weights: what a checkpoint is by its config.json and headers, and loading it.

Finding needs the target's files only, so what is no drafter for it is refused before the target's weights are
read. A drafter is named by its kind, so there is at most one of each.
"""

from __future__ import annotations

import logging
import time
from enum import StrEnum
from functools import partial
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
from engine.weights.paths import is_gguf, named_path
from engine.weights.safetensors import read_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from engine.checkpoint import Checkpoint
    from engine.drafting.guess import Drafter
    from engine.drafting.surroundings import Surroundings
    from engine.models.config import TransformerConfig

    Loader = Callable[[Surroundings, int], Drafter]

logger = logging.getLogger("octavo.engine")


class Kind(StrEnum):
    MODEL = "model"
    PARD = "pard"
    EAGLE = "eagle"
    MTP = "mtp"
    MEDUSA = "medusa"
    DFLASH = "dflash"


OWN_HEADS = Kind.MTP.value  # in the place of a name: the heads in the target's own checkpoint
_HEADS: Mapping[Kind, Callable[[Path, Mapping[str, Any], TransformerConfig], Loader]] = {
    Kind.EAGLE: eagle.find, Kind.MTP: mtp.find, Kind.MEDUSA: medusa.find, Kind.DFLASH: dflash.find,
}  # fmt: skip
_OF_SPECULATORS = {"eagle": Kind.EAGLE, "eagle3": Kind.EAGLE, "mtp": Kind.MTP, "dflash": Kind.DFLASH}


class Found(NamedTuple):
    """`load`: the target as it is served, and the bytes that are free for the drafter beside `num_values`
    weights in the target's dtype."""

    source: str
    kind: Kind
    load: Loader
    size_bytes: int  # as it is stored; 0: a part of the target's checkpoint
    num_values: int = 0  # 0: `load` counts them


def find_drafters(
    draft_model: str, target: Checkpoint | None, config: TransformerConfig
) -> tuple[Found, ...]:
    """`draft_model`: folders, .gguf files, hub names or `mtp`, separated by commas; empty: none. `target`, of
    shape `config`; None: it was made from no files.

    Raises CheckpointError for what is no drafter for this target, and for two of one kind.
    """
    found: dict[Kind, Found] = {}
    for source in (name.strip() for name in draft_model.split(",")) if draft_model else ():
        if not source:
            raise CheckpointError("draft_model: a name is empty; names are separated by single commas")
        try:
            one = _find(source, target, config)
        except CheckpointError as error:
            raise CheckpointError(f"draft_model: {error} (name another there, or none)") from error
        if one.kind in found:
            raise CheckpointError(
                f"draft_model: '{found[one.kind].source}' and '{source}' are both drafters of the kind "
                f"'{one.kind}': name one of them"
            )
        found[one.kind] = one
    return tuple(found.values())


def load_drafters(found: tuple[Found, ...], around: Surroundings, free_bytes: int) -> dict[str, Drafter]:
    """Drafters by name. Raises CheckpointError for tensors that do not fit the target and, before anything is
    allocated for it, for what does not fit into its part of the memory that is free."""
    return {one.kind.value: _load(one, around, free_bytes // len(found)) for one in found}


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


def _find(source: str, target: Checkpoint | None, config: TransformerConfig) -> Found:
    if source == OWN_HEADS:
        return Found(source, Kind.MTP, mtp.find_own(target, config), 0)
    path = named_path(source)
    if not path.is_dir():
        if path.exists() or is_gguf(path) or source == embedded.NAME or not hub.is_hub_name(source):
            return _model(source, source, {}, target, config)  # `locate` says what is wrong with other names
        path = hub.fetch(source)
    fields = read_json_object(path / "config.json")
    kind = kind_of(path, fields)
    if kind in (Kind.MODEL, Kind.PARD):
        return _model(source, str(path), fields, target, config, kind)
    tensors = read_folder(path).values()
    size_bytes = sum(tensor.num_bytes for tensor in tensors)
    return Found(
        source, kind, _HEADS[kind](path, fields, config), size_bytes, sum(prod(one.shape) for one in tensors)
    )


def _model(
    source: str,
    place: str,
    fields: Mapping[str, Any],
    target: Checkpoint | None,
    config: TransformerConfig,
    kind: Kind = Kind.MODEL,
) -> Found:
    """A whole model, with a vocabulary of its own."""
    checkpoint = locate(place)
    is_same = same_vocabulary(checkpoint, target, config.vocab_size)
    load: Loader
    if kind is Kind.PARD:
        if not is_same:
            raise CheckpointError(
                f"{source}: a PARD model with a vocabulary other than the model's: take one of its family"
            )
        load = pard.find(checkpoint, fields)
    elif is_same:
        load = partial(small_model.load, checkpoint)
    else:
        load = other_vocabulary.find(checkpoint, target)
    return Found(source, kind, load, checkpoint.size_bytes)


def _load(found: Found, around: Surroundings, free_bytes: int) -> Drafter:
    started = time.perf_counter()
    num_bytes = found.num_values * around.dtype.itemsize
    if num_bytes > free_bytes:
        raise CheckpointError(
            f"{found.source}: its weights take {num_bytes} bytes, {max(free_bytes, 0)} are free for it: "
            f"lower kv_cache_bytes, or draft without it"
        )
    drafter = found.load(around, free_bytes - num_bytes)
    size = f"({found.size_bytes / 1e6:.1f} MB)" if found.size_bytes else "of the model's own checkpoint"
    took_s = time.perf_counter() - started
    logger.info("drafter %s: %s %s, ready in %.2f s", found.kind, found.source, size, took_s)
    return drafter


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []
