"""Vocabularies: from what a checkpoint has to a `tokenizers.Tokenizer`.

document.py        a tokenizer.json document to the library's tokeniser; every source goes through it
folder.py          folders: tokenizer.json, or tokenizer.model, or vocab.json and merges.txt
gguf.py            GGUF metadata
pre_tokenizers.py  how byte-level BPE cuts a text into words, by name
words.py           the patterns of these cuts
sentencepiece.py   SentencePiece pieces and rules to a document
scored_merges.py   their merges, where pieces share a score
sentencepiece_file.py  reads tokenizer.model
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.checkpoint import CheckpointError
from server.vocabulary.document import Vocabulary
from server.vocabulary.folder import from_folder
from server.vocabulary.gguf import from_gguf

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint

__all__ = ["Vocabulary", "load"]


def load(checkpoint: Checkpoint) -> Vocabulary:
    """Raises CheckpointError when there is no vocabulary, or it is of a kind that is not supported."""
    try:
        if checkpoint.gguf is not None:
            return from_gguf(checkpoint.gguf.metadata)
        return from_folder(checkpoint.path, checkpoint.transformer.vocab_size)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
