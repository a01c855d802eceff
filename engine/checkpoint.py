"""What a model's name stands for: where its files lie, its shape, and what it says about text. No torch.

Both processes locate the same checkpoint: the server for the vocabulary and the chat template, the
engine for the weights.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from engine.models.config import TransformerConfig
from engine.models.families import from_config_json, from_gguf
from engine.weights import embedded, hub
from engine.weights.errors import CheckpointError
from engine.weights.gguf import GGUFFile, read_gguf
from engine.weights.json_files import read_json_object, read_text

__all__ = ["Checkpoint", "CheckpointError", "CheckpointKind", "locate"]

_GGUF_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_MAX_ROPE_FACTORS = 1024


class CheckpointKind(StrEnum):
    GGUF = "gguf"  # one file with everything in it
    FOLDER = "folder"  # config.json, tokenizer.json, *.safetensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    name: str  # the model's id in the API
    source: str  # locate(source) finds these very files again, without a network
    path: Path
    kind: CheckpointKind
    transformer: TransformerConfig
    size_bytes: int  # of the weights' files
    sha256: str | None = None  # what the file must have, verified while the weights are read
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    add_bos: bool | None = None  # None: the checkpoint does not say
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # "bos_token", "eos_token", ... -> text
    chat_template: str | None = field(default=None, repr=False)
    temperature: float | None = None  # the checkpoint's own defaults of sampling
    top_p: float | None = None
    top_k: int | None = None
    gguf: GGUFFile | None = field(default=None, repr=False)  # parsed once; holds the vocabulary


def locate(model: str, revision: str = "") -> Checkpoint:
    """Find `model`: "" (the embedded default), a folder, a .gguf file or a hub name `owner/name`.

    Raises CheckpointError when there is no such thing, or when it is not supported.
    """
    if not model:
        return _default()
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path, path.resolve().name, str(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: a file that is not .gguf; name the folder of a checkpoint instead")
        return _from_gguf(path, path.stem, str(path))
    if path.suffix == ".gguf" or not hub.is_hub_name(model):
        raise CheckpointError(
            f"'{model}' is no folder, no .gguf file and no hub name of the form owner/name"
        )
    folder = hub.fetch(model, revision)
    return _from_folder(folder, model, str(folder))


def _default() -> Checkpoint:
    path = embedded.find_embedded()
    if path is not None:
        return replace(_from_gguf(path, embedded.NAME, ""), sha256=embedded.SHA256)
    try:
        folder = hub.fetch(embedded.HUB_NAME)
    except CheckpointError as error:
        raise CheckpointError(
            f"the default model is not installed; run: {embedded.INSTALL_COMMAND} ({error})"
        ) from error
    return _from_folder(folder, embedded.NAME, str(folder))


def _from_gguf(path: Path, name: str, source: str) -> Checkpoint:
    file = read_gguf(path)
    metadata = file.metadata
    token_ids = {key: _id(metadata, f"tokenizer.ggml.{word}_token_id") for key, word in _GGUF_SPECIAL.items()}
    ends = (token_ids["eos"], _id(metadata, "tokenizer.ggml.eot_token_id"))
    add_bos = metadata.get("tokenizer.ggml.add_bos_token")
    template = metadata.get("tokenizer.chat_template")
    return Checkpoint(
        name=name,
        source=source,
        path=path,
        kind=CheckpointKind.GGUF,
        transformer=_gguf_transformer(file),
        size_bytes=file.size_bytes,
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        bos_token_id=token_ids["bos"],
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        special_tokens=_gguf_special_tokens(metadata, token_ids),
        chat_template=template if isinstance(template, str) else None,
        gguf=file,
    )


def _gguf_transformer(file: GGUFFile) -> TransformerConfig:
    """The shape by the metadata, and by the presence of optional tensors."""
    try:
        config = from_gguf(file.metadata, _rope_factors(file))
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    return replace(
        config,
        tie_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
    )


def _rope_factors(file: GGUFFile) -> tuple[float, ...]:
    info = file.tensors.get("rope_freqs.weight")
    if info is None:
        return ()
    if info.type.name != "F32" or len(info.shape) != 1 or info.shape[0] > _MAX_ROPE_FACTORS:
        raise CheckpointError(
            f"{file.path}: tensor 'rope_freqs.weight' is {info.type.name} {list(info.shape)}"
        )
    with file.path.open("rb") as data:
        data.seek(info.offset)
        return struct.unpack(f"<{info.shape[0]}f", data.read(info.num_bytes))


def _gguf_special_tokens(metadata: Mapping[str, Any], token_ids: dict[str, int | None]) -> dict[str, str]:
    texts = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(texts, tuple):
        return {}
    return {
        f"{key}_token": str(texts[token])
        for key, token in token_ids.items()
        if token is not None and token < len(texts)
    }


def _from_folder(folder: Path, name: str, source: str) -> Checkpoint:
    config = read_json_object(folder / "config.json")
    generation = _optional(folder / "generation_config.json")
    tokenizer = _optional(folder / "tokenizer_config.json")
    try:
        transformer = from_config_json(config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    ends = generation.get("eos_token_id")
    add_bos = tokenizer.get("add_bos_token")
    begin = _id(generation, "bos_token_id")
    return Checkpoint(
        name=name,
        source=source,
        path=folder,
        kind=CheckpointKind.FOLDER,
        transformer=transformer,
        size_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        eos_token_ids=_ids(config.get("eos_token_id") if ends is None else ends) + _named_end(tokenizer),
        bos_token_id=_id(config, "bos_token_id") if begin is None else begin,
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        special_tokens=_special_tokens(tokenizer),
        chat_template=_folder_template(folder, tokenizer),
        temperature=_number(generation, "temperature"),
        top_p=_number(generation, "top_p"),
        top_k=None if (top_k := _number(generation, "top_k")) is None else int(top_k),
    )
