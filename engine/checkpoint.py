"""What a model's name stands for: where its files lie, its shape, and what it says about text. No torch.

Both processes locate the same checkpoint: the server for the vocabulary and the chat template, the
engine for the weights.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from engine.models.families import from_config_json, from_gguf
from engine.models.gguf_rotary import FACTOR_TENSORS
from engine.weights import embedded, folder_text, gguf_text, hub
from engine.weights.errors import CheckpointError
from engine.weights.gguf import GGUFFile, read_gguf
from engine.weights.json_files import read_json_object
from engine.weights.paths import is_gguf, named_path
from engine.weights.safetensors import weight_files

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from engine.models.config import TransformerConfig
    from engine.weights.gguf import TensorInfo

__all__ = ["Checkpoint", "CheckpointError", "CheckpointKind", "locate"]

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
    adapter: Path | None = None  # folder of a LoRA adapter, merged into the weights as they are read
    eos_token_ids: tuple[int, ...] = ()  # whichever of them ends a text
    bos_token_id: int | None = None
    add_bos: bool | None = None  # None: the checkpoint does not say
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # "bos_token", "eos_token", ... -> text
    chat_templates: Mapping[str, str] = field(default_factory=dict, repr=False)  # the usual one is "default"
    generation: Mapping[str, Any] = field(
        default_factory=dict
    )  # as generation_config.json names them, unchecked
    generation_problem: str = ""  # why the model's own defaults cannot be used; "" where they can
    gguf: GGUFFile | None = field(default=None, repr=False)  # parsed once; holds the vocabulary

    @property
    def chat_template(self) -> str | None:
        """The usual one."""
        return self.chat_templates.get("default")


def locate(model: str, revision: str = "") -> Checkpoint:
    """Find `model`: "" or its name (the embedded default), a folder, a .gguf file or a hub name `owner/name`.

    Raises CheckpointError when there is no such thing, or when it is not supported.
    """
    path = named_path(model)
    if not model or (model == embedded.NAME and not path.exists()):
        return _default()
    if path.is_dir():
        return _from_folder(path, path.resolve().name, str(path))
    if path.is_file():
        if not is_gguf(path):
            raise CheckpointError(
                f"{path}: a file that is not .gguf; name the folder of a checkpoint instead"
            )
        return _from_gguf(path, path.stem, str(path))
    if is_gguf(path) or not hub.is_hub_name(model):
        raise CheckpointError(f"'{model}' is no folder, no .gguf file and no hub name of the form owner/name")
    folder = hub.fetch(model, revision)
    return _from_folder(folder, model, str(folder))


def _default() -> Checkpoint:
    path = embedded.find_embedded()
    if path is not None:
        return _with_sampling(replace(_from_gguf(path, embedded.NAME, ""), sha256=embedded.SHA256))
    try:
        folder = hub.fetch(embedded.HUB_NAME)
    except CheckpointError as error:
        raise CheckpointError(
            f"the default model is not installed; run: {embedded.INSTALL_COMMAND} ({error})"
        ) from error
    return _with_sampling(_from_folder(folder, embedded.NAME, str(folder)))


def _with_sampling(checkpoint: Checkpoint) -> Checkpoint:
    """The default model's, which its files do not say."""
    return replace(checkpoint, generation={**embedded.GENERATION, **checkpoint.generation})


def _from_gguf(path: Path, name: str, source: str) -> Checkpoint:
    file = read_gguf(path)
    metadata = file.metadata
    add_bos = metadata.get("tokenizer.ggml.add_bos_token")
    return Checkpoint(
        name=name,
        source=source,
        path=path,
        kind=CheckpointKind.GGUF,
        transformer=_gguf_transformer(file),
        size_bytes=file.size_bytes,
        eos_token_ids=gguf_text.end_ids(metadata),
        bos_token_id=gguf_text.token_id(metadata, "bos"),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        special_tokens=gguf_text.special_tokens(metadata),
        chat_templates=gguf_text.chat_templates(metadata),
        generation=gguf_text.generation(metadata),
        gguf=file,
    )


def _gguf_transformer(file: GGUFFile) -> TransformerConfig:
    """The shape by the metadata, by the presence of optional tensors and by the rotary factors in some."""
    factors = {
        name: _rope_factors(file, file.tensors[name]) for name in FACTOR_TENSORS if name in file.tensors
    }
    try:
        return from_gguf(file.metadata, file.tensors, factors)
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from error


def _rope_factors(file: GGUFFile, info: TensorInfo) -> tuple[float, ...]:
    if info.type.name != "F32" or len(info.shape) != 1 or info.shape[0] > _MAX_ROPE_FACTORS:
        raise CheckpointError(f"{file.path}: tensor '{info.name}' is {info.type.name} {list(info.shape)}")
    with file.path.open("rb") as data:
        data.seek(info.offset)
        return struct.unpack(f"<{info.shape[0]}f", data.read(info.num_bytes))


def _from_folder(folder: Path, name: str, source: str) -> Checkpoint:
    with suppress(OSError):  # why it cannot be looked at, reading it says
        if not (folder / "config.json").exists():
            raise CheckpointError(
                f"{folder}: no config.json, so no folder of a checkpoint; a .gguf file is served by its own "
                f"path"
            )
    config = read_json_object(folder / "config.json")
    texts = folder_text.read(folder)
    try:
        transformer = from_config_json(config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    nested = config.get("text_config")
    configs = (config, nested if isinstance(nested, dict) else {})
    problem = texts.generation_problem
    try:
        begin, ends = _begin_and_ends(folder, texts.generation, *configs)
    except CheckpointError as error:
        begin, ends = _begin_and_ends(folder, *configs)  # if these are sound, the defaults are not
        problem = str(error)
    return Checkpoint(
        name=name,
        source=source,
        path=folder,
        kind=CheckpointKind.FOLDER,
        transformer=transformer,
        size_bytes=sum(file.stat().st_size for file in weight_files(folder) if file.is_file()),
        eos_token_ids=tuple(dict.fromkeys([*ends, *texts.named_end_ids()])),
        bos_token_id=next(iter(begin), None),
        add_bos=texts.add_bos(),
        special_tokens=texts.special_tokens(),
        chat_templates=texts.chat_templates(),
        generation=texts.generation,
        generation_problem=problem,
    )


def _begin_and_ends(folder: Path, *sources: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of each the first source that says something: null says nothing."""
    names = ("bos_token_id", "eos_token_id")
    said = (next((one[name] for one in sources if one.get(name) is not None), None) for name in names)
    begin, ends = (_ids(folder, name, value) for name, value in zip(names, said, strict=True))
    return begin, ends


def _ids(folder: Path, name: str, value: object) -> tuple[int, ...]:
    """Token ids written as nothing, one number or a list."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    for token in ids:
        if type(token) is not int or token < 0:
            raise CheckpointError(f"{folder}: {name} = {str(value)[:80]} is not a token id")
    return ids
