"""Makes the vocabularies and vectors beside it: python -m tests.engine.vocabulary.vectors.make"""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import sentencepiece  # not a dependency: pip install sentencepiece, where this is run

from tests.server.text.awkward import PARTS, texts

HERE = Path(__file__).parent
MAX_CHARS = 120
LONG_RUN = 50
IDENTITY = {"normalization_rule_name": "identity", "character_coverage": 0.98, "num_threads": 1}
AS_IS = {**IDENTITY, "remove_extra_whitespaces": False, "byte_fallback": True}
OWN = ["\u2581\u2581", "\u2581\u2581\u2581\u2581", "\n\n", "<start_of_turn>"]
KINDS = {
    "bpe": {
        **AS_IS,
        "model_type": "bpe",
        "vocab_size": 700,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
    },
    "bpe_no_prefix": {
        **AS_IS,
        "model_type": "bpe",
        "vocab_size": 640,
        "add_dummy_prefix": False,
        "user_defined_symbols": OWN,
    },
    "unigram": {**AS_IS, "model_type": "unigram", "vocab_size": 600},
    "unigram_merging_spaces": {**IDENTITY, "model_type": "unigram", "vocab_size": 420},
}


def corpus() -> list[str]:
    files = ("README.md", "ARCHITECTURE.md")
    lines = [line for path in files for line in Path(path).read_text("utf-8").splitlines() if line]
    parts = [part for part in PARTS if part.strip() and not {"\0", "\u2581"} & set(part)]
    return [*lines, *parts * 3, *["    return x", "        if y:", "the the the", "            deep"] * 20]


def is_decided(text: str, kind: str) -> bool:
    """Unigram: long runs have many likeliest cuts, and U+2581 may count as a space to be merged."""
    if not kind.startswith("unigram"):
        return True
    return (
        "\u2581" not in text
        and max((len([*run]) for _, run in itertools.groupby(text)), default=0) < LONG_RUN
    )


def make(kind: str) -> None:
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=made, minloglevel=2, **KINDS[kind]
    )
    (HERE / f"{kind}.model").write_bytes(made.getvalue())
    reference = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    kept = (text for text in texts(joined=60) if len(text) <= MAX_CHARS and is_decided(text, kind))
    rows = [json.dumps({"text": text, "ids": reference.encode(text)}, separators=(",", ":")) for text in kept]
    (HERE / f"{kind}.json").write_text("[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    for name in KINDS:
        make(name)
