"""A row of a product has the same bits among any number of rows that is a multiple of `ROW_MULTIPLE`."""

from __future__ import annotations

import pytest
import torch

from cuda_kernels.reference import ROW_MULTIPLE, linear

COUNTS = (16, 24, 40, 64, 128, 256, 520)
SHAPES = ((576, 960), (576, 3072), (1536, 576), (64, 192), (2048, 2560), (576, 12288))  # K, N


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_of_a_product_does_not_depend_on_the_number_of_rows(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    width, num_outputs = shape
    torch.manual_seed(7)
    rows, weight = torch.randn(max(COUNTS), width).to(dtype), torch.randn(num_outputs, width).to(dtype)
    alone = linear(rows[:ROW_MULTIPLE], weight)
    for count in COUNTS:
        assert torch.equal(linear(rows[:count], weight)[:ROW_MULTIPLE], alone), count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nor_does_one_of_a_batch_of_products(dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    queries, keys = torch.randn(9, max(COUNTS), 64).to(dtype), torch.randn(9, 64, 128).to(dtype)
    alone = queries[:, :ROW_MULTIPLE] @ keys
    for count in COUNTS:
        assert torch.equal((queries[:, :count] @ keys)[:, :ROW_MULTIPLE], alone), count
