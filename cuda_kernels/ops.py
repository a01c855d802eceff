"""The table of fused operations. `reference` defines each one; faster twins are picked here, once.

The engine calls operations only through the table, so a kernel for a device is one more entry and no
change anywhere else. All operations work on rows (tokens) and know no request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from cuda_kernels import experts, reference, reference_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from cuda_kernels.experts import ExpertWeights
    from cuda_kernels.slices import SliceTable

# Raise it with every change after which the same tokens may get keys and values of other bits: another kernel
# in `pick`, another order of sums, block or padding in one, another order of operations in the transformer.
# Then KV pages that were written to disk before are not mixed with new ones, and costs are measured again.
ARITHMETIC_VERSION: Final = 5


class AttentionPlan(Protocol):
    """What an implementation prepares once per step and uses in every layer."""

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [T, Hq, D]; keys, values [num_pages, Hkv, page_size, D] -> float32 [T, Hq, D].

        Scores are `scale` q k, then soft_cap * tanh(score / soft_cap) where a cap is given. `sinks`, float32
        [Hq], are scores without a value.
        """
        ...


@dataclass(frozen=True, slots=True)
class Operations:
    """One implementation of each operation, for one device. Arguments and results: see `reference`."""

    row_multiple: int  # rows of a step are padded to this, so that a row's result never depends on others
    # A tree's rows have the bits of plain decoding where its window lies within one block of so many slots,
    # counted from the start of the sequence. It has at most 64 tokens anyway (`SliceTable.words`).
    tree_block: int
    rms_norm: Callable[[torch.Tensor, torch.Tensor | None, float], torch.Tensor]
    rotary: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    write_kv: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    plan_attention: Callable[[SliceTable, int, int, torch.device], AttentionPlan]
    gated: Callable[[torch.Tensor, str], torch.Tensor]
    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    route: Callable[[torch.Tensor, int, str], tuple[torch.Tensor, torch.Tensor]]
    experts: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, ExpertWeights, str], torch.Tensor]


def pick(device: torch.device) -> Operations:
    """The operations for a device. Only the reference exists today, on every device."""
    del device
    return Operations(
        row_multiple=reference.ROW_MULTIPLE,
        tree_block=reference_attention.KEY_BLOCK,
        rms_norm=reference.rms_norm,
        rotary=reference.rotary,
        write_kv=reference.write_kv,
        plan_attention=reference_attention.ReferenceAttention,
        gated=reference.gated,
        linear=reference.linear,
        route=experts.route,
        experts=experts.experts,
    )
