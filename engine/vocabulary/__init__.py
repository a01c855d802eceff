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
from engine.vocabulary.document import Vocabulary
from engine.vocabulary.folder import from_folder
from engine.vocabulary.gguf import from_gguf

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint

__all__ = ["Vocabulary", "load"]


def load(checkpoint: Checkpoint) -> Vocabulary:
    """Raises CheckpointError when there is no vocabulary, or it is of a kind that is not supported."""
    try:
        if checkpoint.gguf is not None:
            return _within(from_gguf(checkpoint.gguf.metadata), checkpoint.transformer.vocab_size)
        return from_folder(checkpoint.path, checkpoint.transformer.vocab_size)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def _within(found: Vocabulary, num_rows: int) -> Vocabulary:
    """Raise CheckpointError for tokens that the model has no rows for."""
    num_tokens = found.marked.get_vocab_size()
    if num_tokens > num_rows:
        raise CheckpointError(f"the vocabulary has {num_tokens} tokens, but the model only {num_rows} rows")
    return found
