"""Block diffusion as a drafter (DFlash, Chen 2026): one pass guesses a whole block.

The block is the last token and masks behind it. Its places see each other and a context that is projected
from the target's hidden states of all tokens before: so the context costs a few products for each token, and
the drafter reads what the target knows. A sequence whose beginning was found in a cache has a context from
there on. Positions are counted from the context's beginning: rotary ones are relative.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from engine.drafting.candidate_tree import LEAST_CHANCE, CandidateTrees, Level
from engine.drafting.dflash.config import read_config
from engine.drafting.dflash.heads import BlockHeads
from engine.drafting.dflash.layers import BlockLayers
from engine.drafting.dflash.weights import read_weights
from engine.drafting.draft_kv import DraftKV, DraftPiece
from engine.drafting.guess import CATCHING_UP, NO_GUESS
from engine.drafting.heads.catching_up import readers
from engine.drafting.heads.waiting_features import MAX_WAITING_BYTES, WaitingFeatures
from engine.models.context import for_context
from engine.sampling.candidates import candidates
from engine.sampling.places import Place
from scheduler.types import Visibility

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Sequence as SequenceOf
    from pathlib import Path

    from engine.drafting.dflash.config import DFlashConfig
    from engine.drafting.dflash.weights import DFlashWeights
    from engine.drafting.guess import Guess, Seen, Want
    from engine.drafting.heads.catching_up import Reader
    from engine.drafting.surroundings import Surroundings
    from engine.models.config import TransformerConfig
    from engine.models.layers import Rows
    from scheduler.types import Sequence

WIDTH = 8  # candidates for a place
BLOCK_ROWS = 2048  # of blocks that one guess computes at most
LOGIT_ROWS = 256  # whose logits are held at a time


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
        able = self._take_in(wants)
        found = {reader.seq_id: CATCHING_UP for reader in able if not reader.catches_up}
        ready = [reader for reader in able if reader.catches_up]
        del ready[max(1, BLOCK_ROWS // self.config.block_size) :]
        if ready:
            hidden = self._blocks(ready)
            deepest = min(self.config.num_drafts, max(one.want.limit for one in ready))
            step = max(1, LOGIT_ROWS // deepest)
            for first in range(0, len(ready), step):
                part = slice(first, first + step)
                found |= self._guesses(ready[part], hidden[part], deepest)
        return [found.get(want.sequence.seq_id, NO_GUESS) for want in wants]

    def _take_in(self, wants: SequenceOf[Want]) -> list[Reader]:
        """Keys and values of the contexts; which tokens are there nobody asks. -> who has one, or will"""
        able = readers(wants, self.waiting, self.kv, self.config.block_size)
        pieces, rows = [], []
        for reader in able:
            if reader.rows is not None:
                slots = range(reader.start, reader.start + reader.count)
                tokens = (0,) * reader.count
                pieces.append(DraftPiece(reader.seq_id, tokens, slots, reader.start, num_logits=0))
                rows.append(reader.rows)
        if pieces:
            self.layers.write_context(torch.cat(rows), self.kv.rows(pieces), self.kv.storage)
        return able

    def _blocks(self, ready: list[Reader]) -> torch.Tensor:
        """-> [R, block, hidden], what the head reads of the last tokens and of the masks behind them"""
        seeing = {causal: self._rows(ready, causal) for causal in set(self.config.causal)}
        tokens = next(iter(seeing.values())).tokens
        embedded = self.embedding.index_select(0, tokens) * self.config.embedding_scale
        hidden = self.layers.blocks(embedded, seeing, self.kv.storage)
        for one in ready:
            self.kv.crop(one.seq_id, one.progress.num_read)
        return hidden[: len(ready) * self.config.block_size].view(len(ready), self.config.block_size, -1)

    def _rows(self, ready: list[Reader], causal: bool) -> Rows:
        block = self.config.block_size
        masks = (self.config.mask_token,) * (block - 1)
        return self.kv.rows(
            [
                DraftPiece(
                    seq_id=one.seq_id,
                    tokens=(one.want.sequence.tokens[-1], *masks),
                    positions=range(one.progress.num_read, one.progress.num_read + block),
                    start=one.progress.num_read,
                    num_logits=0,
                    num_window=block,
                    visibility=Visibility.CAUSAL if causal else Visibility.ALL,
                )
                for one in ready
            ]
        )

    def _guesses(self, ready: list[Reader], hidden: torch.Tensor, deepest: int) -> dict[int, Guess]:
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
            one.seq_id: self.trees.grow(one.want.sequence, line, one.want.limit, spreads=spreads)
            for one, line in zip(ready, levels, strict=True)
        }


def find(
    folder: Path, config_json: Mapping[str, Any], target: TransformerConfig
) -> Callable[[Surroundings, int], DFlash]:
    """Its configuration only -> what loads the drafter. Raises CheckpointError for one of another model or of
    an unknown form."""
    return partial(_load, folder, read_config(folder, config_json, target))


def _load(folder: Path, config: DFlashConfig, around: Surroundings, free_bytes: int) -> DFlash:
    """Raises CheckpointError for tensors that do not fit."""
    weights = read_weights(folder, config, around)
    reach = max(config.layers.max_positions, around.max_model_len)  # beyond its training it is merely worse
    layers = for_context(replace(config.layers, max_positions=reach), around.max_model_len)
    kv = DraftKV.beside(around, layers, free_bytes)
    return DFlash(replace(config, layers=layers), weights, kv, around)
