"""What the config.json of a block-diffusion drafter says: DFlash (Chen 2026), its second form, and DSpark.

One drafter with optional parts. `DFlashDraftModel` is the plain one; `DFlash2DraftModel` has convolutions in
its layers and chooses among candidates; DSpark (`Qwen3DSparkModel`, `DSparkDraftModel`, or DFlash's name and
fields of these heads) has a Markov head and may have vocabularies of its own. Fields stand in the file's
`dflash_config` or beside it. The definitions are those of z-lab/dflash, deepseek-ai/DeepSpec and
sgl-project/SpecForge.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from engine.models.families import from_config_json
from engine.models.fields import Fields
from engine.models.transformer import NORMED
from engine.weights.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from engine.models.config import Layer, TransformerConfig

MAX_BLOCK = 64
SLIDING = "sliding_attention"


class Form(StrEnum):
    PLAIN = "plain"
    SECOND = "second"  # DFlash-2
    DSPARK = "dspark"


class MarkovKind(StrEnum):
    VANILLA = "vanilla"  # what was drawn before decides over a bias
    GATED = "gated"  # the place weighs it
    RNN = "rnn"  # with a memory of what was drawn in the block


_FORMS = {
    "DFlashDraftModel": Form.PLAIN,
    "DFlash2DraftModel": Form.SECOND,
    "Qwen3DSparkModel": Form.DSPARK,
    "DSparkDraftModel": Form.DSPARK,
}
# What would change the arithmetic in ways that nobody here knows; absent and null always pass.
_FIXED: dict[str, tuple[object, ...]] = {
    "model_type": ("qwen3", "dspark"),
    "projector_type": ("dflash", "dspark"),
    "attention_mode": ("gqa",),
    "attention_sink_bias": (False,),
    "add_swa_attention_sink_bias": (False,),
    "use_aux_hidden_state": (True,),
    "draft_adapter_rank": (0,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DFlashConfig:
    """`taps`: the target's hidden states that its context is made of. `first_row`: of the block, guesses the
    first token behind the last one. `causal`: of each layer, whether a place sees only those before it.
    `known`: the size of the drafter's vocabulary, that of the target or less.
    """

    layers: TransformerConfig
    causal: tuple[bool, ...]
    taps: tuple[int, ...]
    block_size: int
    mask_token: int
    first_row: int
    known: int
    embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    soft_cap: float = 0.0
    markov: MarkovKind | None = None
    markov_rank: int = 0
    confidence: bool = False
    confidence_with_markov: bool = False
    convolution: tuple[int, int] | None = None  # size of the kernel, columns that share one
    selector: tuple[int, int] | None = None  # rank, candidates

    @property
    def num_drafts(self) -> int:
        return self.block_size - self.first_row


def read_config(folder: Path, config_json: Mapping[str, Any], target: TransformerConfig) -> DFlashConfig:
    """Raises CheckpointError for a drafter of another model, and for what is not known."""
    source = f"{folder}: config.json"
    nested = Fields(source, config_json).within("dflash_config").values
    fields = Fields(source, {**config_json, **nested})
    if fields.has("speculators_model_type"):
        raise fields.unsupported(
            "speculators_model_type",
            fields.values["speculators_model_type"],
            ": take the drafter as z-lab/dflash or deepseek-ai/DeepSpec publish it",
        )
    form = _form(fields)
    for name, allowed in _FIXED.items():
        fields.check(name, *allowed)
    layers = _layers(folder, fields)
    if layers.hidden_size != target.hidden_size or layers.vocab_size != target.vocab_size:
        raise CheckpointError(
            f"{folder}: the drafter has hidden_size {layers.hidden_size} and vocab_size {layers.vocab_size}, "
            f"the model has {target.hidden_size} and {target.vocab_size}: take a drafter that was trained "
            f"for this model"
        )
    if fields.has("target_hidden_size") and fields.count("target_hidden_size") != target.hidden_size:
        raise fields.unsupported("target_hidden_size", fields.count("target_hidden_size"))
    if fields.has("num_target_layers") and fields.count("num_target_layers") != target.num_layers:
        raise CheckpointError(
            f"{folder}: the drafter is for a model of {fields.count('num_target_layers')} layers, this one "
            f"has {target.num_layers}: take a drafter that was trained for this model"
        )
    dspark = form is Form.DSPARK
    block_size = fields.count("block_size", 16, least=2)
    if block_size > MAX_BLOCK or any(layer.window and layer.window < block_size for layer in layers.layers):
        raise fields.unsupported("block_size", block_size, f"; the limit is {MAX_BLOCK}, and the window")
    anchored = fields.flag("sample_from_anchor", fields.flag("shift_label", dspark))
    config = DFlashConfig(
        layers=layers,
        causal=_causal(fields, layers.num_layers, dspark),
        taps=_taps(fields, target.num_layers, dspark),
        block_size=block_size,
        mask_token=_mask_token(fields, layers.vocab_size),
        first_row=0 if anchored else 1,
        known=fields.count("draft_vocab_size", layers.vocab_size),
        embedding_scale=fields.number("input_embedding_scale", 1.0),
        output_multiplier=fields.number("output_multiplier", fields.number("logit_scale", 1.0)),
        soft_cap=_soft_cap(fields),
    )
    if form is Form.SECOND:
        return replace(config, **_second(fields, layers))
    return replace(config, **_heads(fields, folder)) if dspark else config


def _form(fields: Fields) -> Form:
    architectures = fields.values.get("architectures")
    found = _FORMS.get(architectures[0]) if isinstance(architectures, list) and architectures else None
    if found is None:
        raise fields.unsupported("architectures", architectures, f"; these are: {', '.join(_FORMS)}")
    says_so = fields.values.get("projector_type") == "dspark" or fields.flag("shift_label")
    if found is Form.PLAIN and (says_so or fields.count("markov_rank", 0, least=0)):
        return Form.DSPARK
    return found


def _layers(folder: Path, fields: Fields) -> TransformerConfig:
    """Those of Qwen 3, with the windows of this drafter."""
    own = {
        "architectures": ["Qwen3ForCausalLM"],
        "layer_types": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    }
    try:
        config = from_config_json({**fields.values, **own})
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    kinds = _kinds(fields, config.num_layers)
    if SLIDING not in kinds:
        return config
    if fields.has("swa_window_size"):
        window = fields.count("swa_window_size")
    else:
        window = fields.count("sliding_window") if fields.flag("use_sliding_window") else 0
    if not window:
        raise fields.unsupported(
            "sliding_window", fields.values.get("sliding_window"), " by layers that slide"
        )

    def seen(layer: Layer, kind: str) -> Layer:
        return replace(layer, window=window) if kind == SLIDING else layer

    return replace(config, layers=tuple(map(seen, config.layers, kinds)))


def _kinds(fields: Fields, count: int) -> tuple[str, ...]:
    """How much each layer sees; `use_swa` is for drafters whose layers are said to see everything."""
    written = fields.items("layer_types", count, (str,)) or ("full_attention",) * count
    for kind in written:
        if kind not in (SLIDING, "full_attention"):
            raise fields.unsupported("layer_types", kind)
    return (SLIDING,) * count if fields.flag("use_swa") and SLIDING not in written else written


def _causal(fields: Fields, count: int, dspark: bool) -> tuple[bool, ...]:
    """Of DFlash, layers that slide are causal where nothing else is said."""
    for name in ("causal", "is_causal"):
        if fields.has(name):
            return (fields.flag(name),) * count
    written = fields.items("layer_types", count, (str,)) or ("",) * count
    return tuple(kind == SLIDING and not dspark for kind in written)


def _taps(fields: Fields, num_layers: int, dspark: bool) -> tuple[int, ...]:
    """Layer k's id stands for what comes out of it. Behind the last layer DFlash means what the head sees, as
    transformers give it; DSpark has no such tap, but -1 for the embeddings."""
    ids = fields.values.get("target_layer_ids")
    least, most = (-1, num_layers - 2) if dspark else (0, num_layers - 1)
    if not isinstance(ids, list) or not ids or not all(type(one) is int for one in ids):
        raise fields.unsupported("target_layer_ids", ids, "; a list of layers is needed")
    if not least <= min(ids) <= max(ids) <= most:
        raise fields.unsupported("target_layer_ids", ids, f"; the model's are {least} to {most}")
    return tuple(one + 1 if one + 1 < num_layers else NORMED for one in ids)


def _mask_token(fields: Fields, vocab_size: int) -> int:
    token = fields.count("mask_token_id", least=0)
    if token >= vocab_size:
        raise fields.unsupported("mask_token_id", token, f"; the vocabulary has {vocab_size}")
    return token


def _soft_cap(fields: Fields) -> float:
    value = fields.values.get("final_logit_softcapping")
    return 0.0 if value is None or value == 0 else fields.number("final_logit_softcapping")


def _second(fields: Fields, layers: TransformerConfig) -> dict[str, Any]:
    kernel, columns = fields.count("conv_kernel_size"), fields.count("conv_group_size")
    if layers.hidden_size % columns:
        raise fields.unsupported("conv_group_size", columns, f"; the hidden size is {layers.hidden_size}")
    if kernel > MAX_BLOCK:
        raise fields.unsupported("conv_kernel_size", kernel, f"; the limit is {MAX_BLOCK}")
    top_k = fields.count("selector_top_k")
    if top_k > layers.vocab_size:
        raise fields.unsupported("selector_top_k", top_k, f"; the vocabulary has {layers.vocab_size}")
    if fields.count("draft_vocab_size", layers.vocab_size) != layers.vocab_size:
        raise fields.unsupported("draft_vocab_size", fields.count("draft_vocab_size"), " by DFlash-2")
    return {"convolution": (kernel, columns), "selector": (fields.count("selector_rank"), top_k)}


def _heads(fields: Fields, folder: Path) -> dict[str, Any]:
    rank = fields.count("markov_rank", 0, least=0)
    written = fields.values.get("markov_head_type") or MarkovKind.VANILLA.value
    if written not in list(MarkovKind):
        raise fields.unsupported("markov_head_type", written, f"; these are: {', '.join(MarkovKind)}")
    confidence = fields.flag("enable_confidence_head", fields.flag("use_confidence_head"))
    with_markov = confidence and fields.flag("confidence_head_with_markov", bool(rank))
    if with_markov and not rank:
        raise CheckpointError(f"{folder}: confidence_head_with_markov needs a markov_rank above 0")
    return {
        "markov": MarkovKind(written) if rank else None,
        "markov_rank": rank,
        "confidence": confidence,
        "confidence_with_markov": with_markov,
    }
