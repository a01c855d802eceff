"""Which published configurations are which transformer. No torch here.

A family is data: the names it goes by, what its absent fields mean, the fields whose supported values are
assumed by the arithmetic, and the few lines that make it differ. A field that would change the arithmetic is
refused by its name; one that would not (sizes of initialisers, training switches) is ignored, as Hugging
Face's own models ignore it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.models.fields import Fields, unsupported
from engine.models.folder_families import FAMILIES
from engine.models.gguf_families import GGUF_FAMILIES, read_gguf_config
from engine.models.shape import checked, read_shape

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from engine.models.config import TransformerConfig
    from engine.models.gguf_families import GGUFFamily
    from engine.models.shape import Family


_OUTER = ("tie_word_embeddings",)  # what a model around the text model decides for it


def from_config_json(config: Mapping[str, Any]) -> TransformerConfig:
    """The transformer that a parsed config.json describes. Raises CheckpointError."""
    family = _family_of(config)
    own = Fields("config.json", config)
    if family.nested:
        own = own.within(family.nested)
    outer = {name: config[name] for name in _OUTER if family.nested and name in config}
    # Null is a value: there is none of this.
    fields = replace(own, values={**family.defaults, **own.values, **outer})
    for name, allowed in family.fixed.items():
        fields.check(name, *allowed)
    return checked(read_shape(family, fields))


def _family_of(config: Mapping[str, Any]) -> Family:
    """By its architecture; where none is named by its model_type, as transformers finds it."""
    architectures, kind = config.get("architectures"), config.get("model_type")
    named = architectures not in (None, [])
    for family in FAMILIES:
        if architectures == [family.architecture] if named else kind == family.model_type:
            return family
    if named or kind is None:
        raise unsupported("config.json architectures", architectures, _known(FAMILIES))
    known = ", ".join(family.model_type for family in FAMILIES)
    raise unsupported("config.json without architectures: model_type", kind, f"; these are: {known}")


def from_gguf(
    metadata: Mapping[str, Any],
    tensors: Collection[str] = (),
    factors: Mapping[str, tuple[float, ...]] | None = None,
) -> TransformerConfig:
    """The transformer that GGUF metadata describes. Raises CheckpointError.

    `tensors` are the names in the file, some of which say what the metadata does not: a head of its own,
    biases. `factors` are the values of its tensors rope_freqs, rope_factors_short and rope_factors_long, by
    which files say how each rotary frequency is stretched.
    """
    architecture = metadata.get("general.architecture")
    family = next((known for known in GGUF_FAMILIES if known.architecture == architecture), None)
    if family is None:
        raise unsupported("metadata general.architecture", architecture, _known(GGUF_FAMILIES))
    return checked(read_gguf_config(family, metadata, tensors, factors or {}))


def _known(families: Iterable[Family | GGUFFamily]) -> str:
    return f"; these are: {', '.join(dict.fromkeys(family.architecture for family in families))}"
