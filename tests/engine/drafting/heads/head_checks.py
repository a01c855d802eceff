"""Heads written to folders and loaded from there, and their guesses held against the definitions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from engine.drafting.draft_kv import DraftKV, DraftPiece
from engine.drafting.guess import ROOT, Seen, Want
from engine.sampling.candidates import candidates
from engine.sampling.places import Place
from tests.engine.drafting.heads.head_definitions import Shared, causal, eagle, eagle3, eagle3_features, mtp
from tests.engine.tiny import CPU

if TYPE_CHECKING:
    from pathlib import Path

    from engine.drafting.heads.head_drafter import HeadDrafter
    from engine.models.transformer import Transformer
    from scheduler.types import Sequence
    from tests.engine.drafting.heads.head_definitions import Tensors

FREE_BYTES = 1 << 28


@dataclass(frozen=True)
class Definition:
    """`kind`: eagle, eagle3 or mtp."""

    kind: str
    tensors: Tensors
    config: dict[str, object]
    model: Transformer
    window: int = 512

    def logits(self, seen: torch.Tensor, tokens: list[int], path: tuple[int, ...]) -> torch.Tensor:
        """What follows `path` behind the last of the tokens, which are behind the places that were seen
        [T, taps, hidden]: computed with nothing but that path."""
        shared = Shared(self.model.embedding, self.model.head)
        features = eagle3_features(self.tensors, seen) if self.kind == "eagle3" else seen[:, 0]
        tokens = list(tokens)
        for token in (*path, None):
            rows = causal(features, tokens, self.window)
            if self.kind == "eagle3":
                made, logits = eagle3(self.tensors, shared, rows, self.config)
            else:
                made, logits = (eagle if self.kind == "eagle" else mtp)(self.tensors, shared, rows)
            if token is not None:
                features, tokens = torch.cat((features, made[-1:])), [*tokens, token]
        return logits[-1]


def written(folder: Path, tensors: Tensors, **config: object) -> tuple[Path, dict[str, object]]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder, config


@torch.inference_mode()
def true_features(model: Transformer, tokens: list[int], taps: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """[tokens, hidden] of each tap, of all tokens at once."""
    kv = DraftKV(model.config, model.ops, 64, 16, 512, 1, model.embedding.dtype, CPU)
    rows = kv.rows([DraftPiece(1, tuple(tokens), range(len(tokens)), 0, 1)])
    _, found = model.compute(rows, kv.storage, taps)
    return tuple(tap[: len(tokens)] for tap in found)


def seen(drafter: HeadDrafter, model: Transformer, sequence: Sequence, start: int = 0, end: int = 0) -> Seen:
    """What a step says that computes tokens start .. end of a sequence; `end` 0: all but the last."""
    end = end or len(sequence.tokens) - 1
    features = true_features(model, sequence.tokens[:end], drafter.taps)
    part = tuple(tap[start:] for tap in features)
    return Seen(sequence, start, tuple(sequence.tokens[start:end]), (), (), (), part, None)


def show(drafter: HeadDrafter, model: Transformer, sequence: Sequence, start: int = 0, end: int = 0) -> None:
    drafter.observe([seen(drafter, model, sequence, start, end)])


def guess(drafter: HeadDrafter, *sequences: Sequence, limit: int = 16):
    return drafter.guess([Want(one, limit) for one in sequences])


def assert_defined(
    drafter: HeadDrafter, definition: Definition, sequence: Sequence, num_parents: int = 64
) -> int:
    """Every node of the last guess's tree is what the definition, given its path alone, says of it -> how
    many there are. `num_parents`: how many nodes' children are looked at."""
    _, tree = drafter._trees[sequence.seq_id]
    progress = drafter.waiting.of(sequence.seq_id)
    tokens = sequence.tokens
    seen = torch.stack(true_features(definition.model, tokens[:-1], drafter.taps), 1)[progress.first :]
    behind = tokens[progress.first + 1 :]
    children: dict[int, list[int]] = {}
    for node, one in enumerate(tree.nodes):
        children.setdefault(one.parent, []).append(node)
    for parent, nodes in list(children.items())[:num_parents]:
        path = tree.path(parent) if parent != ROOT else ()
        logits = definition.logits(seen, behind, path)[None]
        place = Place(sequence, path, drafter.around.processor_of(sequence))
        best = candidates(logits, [place], logits.shape[1])
        chances = dict(zip(best.tokens[0].tolist(), best.chances[0].tolist(), strict=True))
        for node in nodes:
            assert abs(chances[tree.nodes[node].token] - tree.nodes[node].chance) < 1e-4
    return len(tree.nodes)
