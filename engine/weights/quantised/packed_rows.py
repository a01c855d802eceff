"""pack-quantized of compressed-tensors: each row's integers packed into words, scales by row or group."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from engine.weights.errors import CheckpointError
from engine.weights.quantised.fields import along_rows, chunks, from_groups
from engine.weights.quantised.parts import FLOATING, group_of, modules_with, need, part
from engine.weights.safetensors import read_integers
from engine.weights.source import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from engine.weights.safetensors import StoredTensor

_PACKED = ".weight_packed"


def packed_recipes(
    stored: Mapping[str, StoredTensor], widths: Collection[int]
) -> dict[str, Callable[[], Recipe]]:
    """`widths`: the bits that the configuration speaks of; which of them, a tensor's size says."""
    return {
        f"{module}.weight": partial(_recipe, stored, module, widths)
        for module in modules_with(stored, _PACKED)
        if stored[module + _PACKED].dtype != "U8"  # which is packed by bytes: floats of 4 bits
    }


def _recipe(stored: Mapping[str, StoredTensor], module: str, widths: Collection[int]) -> Recipe:
    packed = part(stored, f"{module}{_PACKED}", "I32")
    scale = part(stored, f"{module}.weight_scale", *FLOATING)
    sizes = part(stored, f"{module}.weight_shape", "I64", "I32")
    need(sizes.shape == (2,), sizes, "[2]")
    rows, columns = read_integers(sizes)
    fitting = [bits for bits in widths if packed.shape == (rows, -(-columns * bits // 32))]
    if rows < 1 or columns < 1 or len(fitting) != 1:
        raise CheckpointError(
            f"{packed.file}: tensor '{packed.name}' of shape {list(packed.shape)} does not hold "
            f"{[rows, columns]} numbers of {' or '.join(map(str, widths))} bits"
        )
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    by_row = scale.shape in ((rows, groups), (1,), (1, 1)) and groups > 0 and not columns % groups
    need(by_row, scale, f"[{rows}, groups]")
    parts = [packed, scale]
    kinds = []
    for kind, dtypes in (("zero_point", ("I32", "I8")), ("g_idx", ("I32",))):
        if f"{module}.weight_{kind}" in stored:
            parts.append(part(stored, f"{module}.weight_{kind}", *dtypes))
            kinds.append(kind)
            _check_extra(parts[-1], kind, rows, columns, groups, fitting[0])
    return Recipe((rows, columns), tuple(parts), partial(_widen, fitting[0], tuple(kinds)))


def _check_extra(tensor: StoredTensor, kind: str, rows: int, columns: int, groups: int, bits: int) -> None:
    if kind == "g_idx":
        need(tensor.shape == (columns,), tensor, f"[{columns}]")
    elif tensor.dtype == "I32":
        need(tensor.shape == (-(-rows * bits // 32), groups), tensor, f"[rows in words, {groups}]")
    else:
        single = groups == 1 and tensor.shape in ((1,), (1, 1))
        need(single or tensor.shape == (rows, groups), tensor, f"[{rows}, {groups}]")


def _widen(bits: int, kinds: tuple[str, ...], parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    extra = dict(zip(kinds, parts[2:], strict=True))
    packed, (rows, columns) = parts[0], out.shape
    scales = parts[1].float().reshape(-1, parts[1].shape[-1]).expand(rows, -1)
    zeros = _zeros(extra.get("zero_point"), bits, rows, scales)
    group = group_of(extra["g_idx"], scales.shape[1]) if "g_idx" in extra else None
    for chunk in chunks(rows, columns):
        numbers = along_rows(packed[chunk], bits)[:, :columns]
        out[chunk] = from_groups(numbers, zeros[chunk], scales[chunk], group)


def _zeros(stored: torch.Tensor | None, bits: int, rows: int, scales: torch.Tensor) -> torch.Tensor:
    """float32 [rows, groups]: what unsigned integers are counted from."""
    offset = 1 << (bits - 1)
    if stored is None:
        return torch.full_like(scales, offset)
    if stored.dtype == torch.int32:
        return along_rows(stored.t(), bits).t()[:rows].float()
    return (stored.float() + offset).reshape(-1, scales.shape[1]).expand(rows, -1)
