"""Block diffusion as a drafter (DFlash, Chen 2026): one pass guesses a whole block.

The block is the last token and masks behind it. Its places see each other and a context that is projected
from the target's hidden states of all tokens before: so the context costs a few products for each token, and
the drafter reads what the target knows. A sequence whose beginning was found in a cache has a context from
there on. Positions are counted from the context's beginning: rotary ones are relative.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from engine.drafting.candidate_tree import LEAST_CHANCE, CandidateTrees, Level
from engine.drafting.dflash.config import read_config
from engine.drafting.dflash.heads import BlockHeads
from engine.drafting.dflash.layers import BlockLayers
from engine.drafting.dflash.weights import read_weights
from engine.drafting.draft_kv import DraftKV, DraftPiece
from engine.drafting.guess import CATCHING_UP, NO_GUESS
from engine.drafting.heads.waiting_features import MAX_WAITING_BYTES, Progress, WaitingFeatures
from engine.models.context import for_context
from engine.sampling.candidates import candidates
from engine.sampling.places import Place
from scheduler.types import Visibility

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as SequenceOf
    from pathlib import Path

    from engine.drafting.dflash.config import DFlashConfig
    from engine.drafting.dflash.weights import DFlashWeights
    from engine.drafting.guess import Guess, Seen, Want
    from engine.drafting.surroundings import Surroundings
    from engine.models.layers import Rows
    from scheduler.types import Sequence

WIDTH = 8  # candidates for a place
CATCH_UP_ROWS = 2048  # of contexts that one guess takes in at most, over all sequences
BLOCK_ROWS = 2048  # of blocks that one guess computes at most
LOGIT_ROWS = 256  # whose logits are held at a time


class _Ready(NamedTuple):
    """A sequence whose context is complete."""

    want: Want
    context_len: int


class DFlash:
    def __init__(
        self, config: DFlashConfig, weights: DFlashWeights, kv: DraftKV, around: Surroundings
    ) -> None:
        self.config = config
        self.kv = kv
        self.around = around
        self.taps = config.taps
        self.layers = BlockLayers(config, weights, around.ops, around.device)
        self.heads = BlockHeads(config, weights, around.ops)
        self.embedding = weights.embedding
        self.trees = CandidateTrees()
        row_bytes = len(config.taps) * around.model.config.hidden_size * around.dtype.itemsize
        self.waiting = WaitingFeatures(max(1, MAX_WAITING_BYTES // row_bytes))

    def observe(self, seen: SequenceOf[Seen]) -> None:
        self.waiting.observe(seen)

    def release(self, sequence: Sequence) -> None:
        self.waiting.release(sequence.seq_id)
        self.kv.release(sequence.seq_id)
        self.trees.release(sequence.seq_id)

    @torch.inference_mode()
    def guess(self, wants: SequenceOf[Want]) -> list[Guess]:
        found: dict[int, Guess] = {}
        ready: list[_Ready] = []
        for want, progress in self._catch_up(wants):
            if progress.num_waiting:
                found[want.sequence.seq_id] = CATCHING_UP
            elif progress.num_read and len(ready) * self.config.block_size < BLOCK_ROWS:
                ready.append(_Ready(want, progress.num_read))
        if ready:
            hidden = self._blocks(ready)
            deepest = min(self.config.num_drafts, max(one.want.limit for one in ready))
            step = max(1, LOGIT_ROWS // deepest)
            for first in range(0, len(ready), step):
                part = slice(first, first + step)
                found |= self._guesses(ready[part], hidden[part], deepest)
        return [found.get(want.sequence.seq_id, NO_GUESS) for want in wants]

    def _catch_up(self, wants: SequenceOf[Want]) -> list[tuple[Want, Progress]]:
        """Take in what waits, the shortest first -> those that there is room for, and how far they are."""
        able = []
        for want in wants:
            progress = self.waiting.of(want.sequence.seq_id)
            if want.limit > 0 and progress is not None and progress.end == len(want.sequence.tokens) - 1:
                able.append((want, progress))
        able.sort(key=lambda entry: entry[1].num_waiting)
        pieces, seen = [], []
        left = CATCH_UP_ROWS
        able = self._with_room(able)
        for want, progress in able:
            count = min(progress.num_waiting, left)
            if count:
                left -= count
                start = progress.num_read
                slots = range(start, start + count)
                pieces.append(DraftPiece(want.sequence.seq_id, (0,) * count, slots, start, num_logits=0))
                seen.append(progress.take(count))
        if pieces:
            self.layers.write_context(torch.cat(seen), self.kv.rows(pieces), self.kv.storage)
        return able

    def _with_room(self, able: list[tuple[Want, Progress]]) -> list[tuple[Want, Progress]]:
        """Those with room in the KV. Who has lost theirs begin anew with what waits."""
        block = self.config.block_size
        held = self.kv.reserve(
            (want.sequence.seq_id, progress.num_read + progress.num_waiting + block)
            for want, progress in able
        )
        for want, progress in able:
            if self.kv.length(want.sequence.seq_id) < progress.num_read:
                progress.start_anew()
        return [entry for entry in able if entry[0].sequence.seq_id in held]

    def _blocks(self, ready: list[_Ready]) -> torch.Tensor:
        """-> [R, block, hidden], what the head reads of the last tokens and of the masks behind them"""
        seeing = {causal: self._rows(ready, causal) for causal in set(self.config.causal)}
        tokens = next(iter(seeing.values())).tokens
        embedded = self.embedding.index_select(0, tokens) * self.config.embedding_scale
        hidden = self.layers.blocks(embedded, seeing, self.kv.storage)
        for one in ready:
            self.kv.crop(one.want.sequence.seq_id, one.context_len)
        return hidden[: len(ready) * self.config.block_size].view(len(ready), self.config.block_size, -1)

    def _rows(self, ready: list[_Ready], causal: bool) -> Rows:
        block = self.config.block_size
        masks = (self.config.mask_token,) * (block - 1)
        return self.kv.rows(
            [
                DraftPiece(
                    seq_id=one.want.sequence.seq_id,
                    tokens=(one.want.sequence.tokens[-1], *masks),
                    positions=range(one.context_len, one.context_len + block),
                    start=one.context_len,
                    num_logits=0,
                    num_window=block,
                    visibility=Visibility.CAUSAL if causal else Visibility.ALL,
                )
                for one in ready
            ]
        )

    def _guesses(self, ready: list[_Ready], hidden: torch.Tensor, deepest: int) -> dict[int, Guess]:
        """hidden [R, block, hidden] -> a tree for each, of candidates for at most `deepest` places"""
        first = self.config.first_row
        asked = hidden[:, first : first + deepest]
        base = self.heads.base(asked.flatten(0, 1)).view(len(ready), deepest, -1)
        sequences = [one.want.sequence for one in ready]
        processors = [self.around.processor_of(sequence) for sequence in sequences]
        paths: list[tuple[int, ...]] = [() for _ in ready]
        levels: list[list[Level]] = [[] for _ in ready]
        before = torch.tensor([one.tokens[-1] for one in sequences], device=hidden.device)
        memory = self.heads.begin(len(ready))
        hopes = [1.0] * len(ready)
        for depth in range(deepest):
            if max(hopes) < LEAST_CHANCE:
                break
            guessed, memory = self.heads.place(asked[:, depth], base[:, depth], before, memory)
            places = [Place(*place) for place in zip(sequences, paths, processors, strict=True)]
            found = candidates(guessed.logits, places, WIDTH)
            before, chances = found.tokens[:, 0], found.chances
            if guessed.confidence is not None:
                chances = chances * guessed.confidence[:, None]
            rows = zip(found.tokens.tolist(), chances.tolist(), strict=True)
            for row, level in enumerate(Level(*entry) for entry in rows):
                levels[row].append(level)
                paths[row] = (*paths[row], level.tokens[0])
                hopes[row] *= self.trees.hope(sequences[row], level, depth)
        if not all(line[0].chances[0] for line in levels):
            self.kv.storage.tainted = True  # perhaps numbers went wrong: pages are cleared from now on
        spreads = self.heads.spreads
        return {
            one.want.sequence.seq_id: self.trees.grow(
                one.want.sequence, line, one.want.limit, spreads=spreads
            )
            for one, line in zip(ready, levels, strict=True)
        }


def load(folder: Path, config_json: Mapping[str, Any], around: Surroundings, free_bytes: int) -> DFlash:
    """A drafter for the target. Raises CheckpointError for one of another model or of an unknown form."""
    target = around.model.config
    config = read_config(folder, config_json, target)
    weights = read_weights(folder, config, around)
    layers = for_context(config.layers, around.max_model_len)
    kv = DraftKV.beside(around, layers, free_bytes)
    return DFlash(replace(config, layers=layers), weights, kv, around)
