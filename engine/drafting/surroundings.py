"""What a drafter may build on: the target as it is served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from cuda_kernels.ops import Operations
    from engine.batch import BatchBuilder
    from engine.checkpoint import Checkpoint
    from engine.kv_storage import KVStorage
    from engine.models.transformer import Transformer
    from engine.runner import Runner
    from engine.sampling.processors import LogitsProcessor
    from scheduler.types import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """`processor_of`: what a sequence's request asks of its logits, None where it asks nothing; the same
    object that the target's own draws go through."""

    checkpoint: Checkpoint | None  # of the target; None: it was made from no files
    model: Transformer
    storage: KVStorage
    batches: BatchBuilder
    ops: Operations
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    max_num_seqs: int
    processor_of: Callable[[Sequence], LogitsProcessor | None]

    @classmethod
    def of(cls, runner: Runner, checkpoint: Checkpoint | None) -> Surroundings:
        """What a runner computes with, and for whom."""
        batches, scheduler = runner.batches, runner.scheduler
        return cls(
            checkpoint=checkpoint,
            model=runner.model,
            storage=runner.storage,
            batches=batches,
            ops=batches.ops,
            dtype=runner.storage.pages.dtype,
            device=batches.device,
            max_model_len=scheduler.max_model_len,
            max_num_seqs=scheduler.config.max_num_seqs,
            processor_of=runner.processor_of,
        )
