"""Quantised folders against definitions in numpy: numbers packed one by one, widened one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.weights.errors import CheckpointError
from engine.weights.folder_source import folder_source
from tests.engine.weights.stored import read, read_one, write

RNG = np.random.default_rng(3)


def halves(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float16)


def pack(numbers: np.ndarray, bits: int, order: tuple[int, ...] = ()) -> np.ndarray:
    """uint [rows, n] -> int32 [rows, words]: number order[i] of each word in its i-th field from below."""
    fields = 32 // bits
    order = order or tuple(range(fields))
    rows, count = numbers.shape
    padded = np.zeros((rows, -(-count // fields) * fields), np.uint32)
    padded[:, :count] = numbers
    words = np.zeros((rows, padded.shape[1] // fields), np.uint32)
    for word in range(words.shape[1]):
        for place, number in enumerate(order):
            words[:, word] |= padded[:, word * fields + number] << np.uint32(bits * place)
    return words.view(np.int32)


def tensors(**arrays: np.ndarray) -> dict[str, torch.Tensor]:
    return {f"m.{name}": torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def compressed(bits: int, form: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    group = {"weights": {"num_bits": bits, "type": "int", **weights}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


@pytest.mark.parametrize("order", [False, True], ids=["in order", "g_idx"])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("rows", [4, 20], ids=["4 rows", "20 rows"])
@pytest.mark.parametrize(("bits", "columns", "groups"), [(4, 64, 4), (4, 60, 1), (8, 64, 2), (2, 64, 64)])
def test_packed_rows(
    tmp_path: Path, rows: int, bits: int, columns: int, groups: int, zeros: bool, order: bool
) -> None:
    numbers = RNG.integers(0, 2**bits, (rows, columns))
    zero = RNG.integers(0, 2**bits, (rows, groups)) if zeros else np.full((rows, groups), 2 ** (bits - 1))
    scale = halves(rows, groups)
    group = np.arange(columns) * groups // columns
    stored = {"weight_packed": pack(numbers, bits), "weight_scale": scale}
    stored["weight_shape"] = np.array([rows, columns])
    if zeros:
        stored["weight_zero_point"] = pack(zero.T, bits).T
    if order:
        group = RNG.permutation(group)
        stored["weight_g_idx"] = group.astype(np.int32)
    expected = (numbers - zero[:, group]).astype(np.float32) * scale[:, group].astype(np.float32)
    got = read(tmp_path, tensors(**stored), compressed(bits), "m.weight")
    assert np.array_equal(got.numpy(), expected)


def test_packed_rows_of_two_widths_tell_themselves_apart(tmp_path: Path) -> None:
    config = compressed(4)
    config["config_groups"]["group_1"] = {"weights": {"num_bits": 8}, "targets": ["re:.*down.*"]}
    numbers = RNG.integers(0, 256, (4, 32))
    stored = tensors(
        weight_packed=pack(numbers, 8), weight_scale=halves(4, 1), weight_shape=np.array([4, 32])
    )
    got = read(tmp_path, stored, config, "m.weight")
    assert np.array_equal(got.numpy(), (numbers - 128).astype(np.float32) * stored["m.weight_scale"].numpy())


@pytest.mark.parametrize("shape", [(), (1,), (6, 1), (6,), (6, 4)], ids=str)
@pytest.mark.parametrize("zeros", [False, True])
def test_int8_with_scales(tmp_path: Path, shape: tuple[int, ...], zeros: bool) -> None:
    numbers = RNG.integers(-128, 128, (6, 32)).astype(np.int8)
    scale, zero = halves(*shape), RNG.integers(-128, 128, shape).astype(np.int8) if zeros else None
    stored = {"weight": numbers, "weight_scale": np.asarray(scale)}
    if zero is not None:
        stored["weight_zero_point"] = np.asarray(zero)

    def spread(values: np.ndarray) -> np.ndarray:
        matrix = np.asarray(values, np.float32).reshape((*shape, 1, 1)[:2])
        return np.kron(matrix, np.ones((6 // matrix.shape[0], 32 // matrix.shape[1]), np.float32))

    expected = (numbers - (spread(zero) if zero is not None else 0)).astype(np.float32) * spread(scale)
    got = read(tmp_path, tensors(**stored), compressed(8, "int-quantized"), "m.weight")
    assert np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("shape", [(256, 256), (200, 300), (128, 64)], ids=str)
def test_float8_in_blocks(tmp_path: Path, shape: tuple[int, int], suffix: str) -> None:
    weight = torch.from_numpy(RNG.normal(size=shape)).to(torch.float8_e4m3fn)
    scale = RNG.normal(size=(-(-shape[0] // 128), -(-shape[1] // 128))).astype(np.float32)
    expected = (
        weight.float().numpy() * np.kron(scale, np.ones((128, 128), np.float32))[: shape[0], : shape[1]]
    )
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    got = read(tmp_path, {"m.weight": weight, f"m.{suffix}": torch.from_numpy(scale)}, config, "m.weight")
    assert np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize("form", ["float-quantized", "naive-quantized"])
@pytest.mark.parametrize("shape", [(1,), (8, 1)], ids=["tensor", "channel"])
def test_float8_with_scales(tmp_path: Path, form: str, shape: tuple[int, ...]) -> None:
    every_finite = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].expand(256, 2)
    weight = torch.nan_to_num(every_finite.float()).reshape(8, 64).to(torch.float8_e4m3fn)
    scale = torch.from_numpy(halves(*shape)).bfloat16()
    got = read(tmp_path, {"m.weight": weight, "m.weight_scale": scale}, compressed(8, form), "m.weight")
    assert torch.equal(got, weight.float() * scale.float())


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 16), (8, 16), (4, -1), (2, 32)])
def test_gptq(tmp_path: Path, version: str, act_order: bool, bits: int, group_size: int) -> None:
    inputs, outputs = 64, 32
    size = inputs if group_size == -1 else group_size
    group = np.arange(inputs) // size
    if act_order:
        group = RNG.permutation(group)
    numbers = RNG.integers(0, 2**bits, (inputs, outputs))
    zero, scale = RNG.integers(0, 2**bits, (inputs // size, outputs)), halves(inputs // size, outputs)
    written = (zero - 1) % 2**bits if version == "gptq" else zero
    stored = {"qweight": pack(numbers.T, bits).T, "qzeros": pack(written, bits), "scales": scale}
    if act_order:
        stored["g_idx"] = group.astype(np.int32)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "checkpoint_format": version}
    expected = ((numbers - zero[group]).astype(np.float32) * scale[group].astype(np.float32)).T
    got = read(tmp_path, tensors(**stored), config | {"desc_act": act_order, "sym": False}, "m.weight")
    assert np.array_equal(got.numpy(), expected)


def test_awq(tmp_path: Path) -> None:
    inputs, outputs, size = 64, 32, 16
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    numbers, zero = RNG.integers(0, 16, (inputs, outputs)), RNG.integers(0, 16, (inputs // size, outputs))
    scale, group = halves(inputs // size, outputs), np.arange(inputs) // size
    stored = {"qweight": pack(numbers, 4, order), "qzeros": pack(zero, 4, order), "scales": scale}
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    expected = ((numbers - zero[group]).astype(np.float32) * scale[group].astype(np.float32)).T
    assert np.array_equal(read(tmp_path, tensors(**stored), config, "m.weight").numpy(), expected)


def test_mxfp4_experts(tmp_path: Path) -> None:
    table = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    blocks = RNG.integers(0, 256, (2, 6, 3, 16)).astype(np.uint8)
    scales = RNG.integers(0, 250, (2, 6, 3)).astype(np.uint8)
    expected = np.zeros((2, 96, 6), np.float32)
    for expert, row, group, byte in np.ndindex(*blocks.shape):
        for half in range(2):
            code = int(blocks[expert, row, group, byte]) >> (4 * half) & 15
            value = table[code & 7] * (-1 if code & 8 else 1) * 2.0 ** (int(scales[expert, row, group]) - 127)
            expected[expert, group * 32 + byte * 2 + half, row] = value
    stored = tensors(experts_blocks=blocks, experts_scales=scales)
    got = read(tmp_path, stored, {"quant_method": "mxfp4"}, "m.experts")
    assert np.array_equal(got.numpy(), expected)
    source = folder_source(tmp_path)
    source.recipe("m.experts")
    turned = source.empty("m.experts", torch.float32, torch.device("cpu"))
    with source:
        source.read_into("m.experts", turned)
    assert turned.transpose(1, 2).is_contiguous()  # no number is moved twice
    assert torch.equal(turned, got)


@pytest.mark.parametrize("form", ["nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_float4_matrices(tmp_path: Path, form: str) -> None:
    table = np.array((0, 0.5, 1, 1.5, 2, 3, 4, 6), np.float32)
    codes = RNG.integers(0, 16, (6, 64))
    values = table[codes & 7] * np.where(codes & 8, -1, 1).astype(np.float32)
    stored = {"weight_packed": torch.from_numpy((codes[:, ::2] | (codes[:, 1::2] << 4)).astype(np.uint8))}
    if form.startswith("nv"):
        stored["weight_scale"] = torch.rand(6, 4).to(torch.float8_e4m3fn)
        stored["weight_global_scale"] = torch.tensor([37.5])
        scale = (stored["weight_scale"].float() / 37.5).numpy()
    else:
        stored["weight_scale"] = torch.from_numpy(RNG.integers(100, 140, (6, 2)).astype(np.uint8))
        scale = 2.0 ** (stored["weight_scale"].numpy().astype(np.float32) - 127)
    expected = values * scale.repeat(64 // scale.shape[1], 1)
    got = read(
        tmp_path, {f"m.{name}": tensor for name, tensor in stored.items()}, compressed(4, form), "m.weight"
    )
    assert np.array_equal(got.numpy(), expected)


def test_widening_is_rounded_once_and_plain_tensors_stay(tmp_path: Path) -> None:
    weight = torch.randn(8, 8).to(torch.float8_e4m3fn)
    stored = {"m.weight": weight, "m.weight_scale": torch.tensor([0.3]), "n.weight": torch.ones(2)}
    source = folder_source(write(tmp_path, stored, {"quantization_config": {"quant_method": "fp8"}}))
    assert source.quantised_activations
    assert torch.equal(read_one(source, "m.weight", torch.bfloat16), (weight.float() * 0.3).bfloat16())
    assert torch.equal(read_one(source, "n.weight", torch.float32), torch.ones(2))


def refusal(folder: Path, stored: dict[str, torch.Tensor], quantisation: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(folder, stored, quantisation, "m.weight")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("quantisation", "said"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method = 'bitsandbytes'"),
        ({"quant_method": "hqq"}, "supported are compressed-tensors, fp8"),
        ({"load_in_4bit": True}, "quant_method = None"),
        ({"quant_method": "gptq", "bits": 3}, "bits = 3"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size = 0"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version = 'gemv'"),
        ({"quant_method": "gptq", "bits": 4, "format": "bitblas"}, "format = 'bitblas'"),
        ({"quant_method": "awq", "bits": 8}, "bits = 8"),
        ({"quant_method": "awq", "bits": 4, "format": "marlin"}, "format = 'marlin'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [2**70, 128]}, "weight_block_size"),
        (compressed(6, "mxfp6-pack-quantized"), "'mxfp6-pack-quantized'"),
        (compressed(4) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (compressed(4) | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        (compressed(4), "no tensor is so stored"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, quantisation: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, {"m.weight": torch.ones(4, 4)}, quantisation)


def test_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    good = tensors(
        weight_packed=pack(RNG.integers(0, 16, (8, 32)), 4),
        weight_scale=halves(8, 2),
        weight_shape=np.array([8, 32]),
        weight_g_idx=np.zeros(32, np.int32),
    )
    read(tmp_path, good, compressed(4), "m.weight")
    for name, tensor, said in (
        ("weight_scale", None, "'m.weight_scale' is missing"),
        ("weight_scale", torch.ones(8, 3), "needed is [8, groups]"),
        ("weight_scale", torch.ones(8, 2, dtype=torch.int32), "has the type I32"),
        ("weight_shape", torch.tensor([8, 40]), "does not hold [8, 40] numbers of 4 bits"),
        ("weight_shape", torch.tensor([8, -1]), "does not hold"),
        ("weight_zero_point", torch.zeros(2, 2, dtype=torch.int32), "rows in words"),
        ("weight_zero_point", torch.zeros(1, dtype=torch.int8), "needed is [8, 2]"),
        ("weight_g_idx", torch.full((32,), 2, dtype=torch.int32), "names group 2 of 2"),
    ):
        stored = dict(good)
        stored.pop(f"m.{name}", None)
        if tensor is not None:
            stored[f"m.{name}"] = tensor
        assert said in refusal(tmp_path, stored, compressed(4)), name
    gptq = tensors(
        qweight=pack(RNG.integers(0, 16, (8, 32)), 4).T,
        qzeros=np.zeros((2, 1), np.int32),
        scales=halves(2, 8),
        g_idx=np.full(32, -2, np.int32),
    )
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    assert "names group -2 of 2" in refusal(tmp_path, gptq, config)
    assert "'m.scales' has shape [2, 8], needed is [4, 8]" in refusal(
        tmp_path, gptq, config | {"group_size": 8}
    )
    fp8 = {"m.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "m.weight_scale": torch.ones(3, 1)}
    assert "one that divides [4, 4]" in refusal(tmp_path, fp8, {"quant_method": "fp8"})
    blocks = {"quant_method": "fp8", "weight_block_size": [2, 2]}
    assert "needed is [rows, columns]" in refusal(
        tmp_path, fp8 | {"m.weight_scale": torch.ones(2, 2, 3)}, blocks
    )
    del fp8["m.weight_scale"]
    assert "no tensor is so stored" in refusal(tmp_path, fp8, {"quant_method": "fp8"})


SUFFIXES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight_shape",
    "weight_zero_point",
)
SUFFIXES += (
    "weight_global_scale",
    "weight_g_idx",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "experts_blocks",
    "experts_scales",
)
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64)
DTYPES += (torch.float8_e4m3fn,)
STORED = st.dictionaries(
    st.sampled_from(SUFFIXES),
    st.tuples(
        st.sampled_from(DTYPES),
        st.lists(st.sampled_from((0, 1, 2, 4, 8, 16)), max_size=4),
        st.sampled_from((0, 1, 2, 8, 64, 120)),
    ),
    max_size=6,
)
CONFIGS = st.one_of(
    st.sampled_from(
        [
            compressed(4),
            compressed(8),
            compressed(8, "float-quantized"),
            compressed(4, "nvfp4-pack-quantized"),
            compressed(8, "int-quantized", block_structure=[2, 4]),
            {"quant_method": "fp8", "weight_block_size": [2, 4]},
            {"quant_method": "mxfp4"},
            {"quant_method": "awq", "group_size": 4},
            {"quant_method": "gptq", "bits": 4, "group_size": 4},
            {"quant_method": "gptq", "bits": 8, "group_size": -1},
        ]
    ),
    st.fixed_dictionaries(
        {"quant_method": st.sampled_from(["compressed-tensors", "fp8", "gptq", "awq", "mxfp4"])},
        optional={
            name: st.none() | st.integers(-2, 9) | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
            for name in ("bits", "group_size", "weight_block_size", "config_groups", "format", "version")
        },
    ),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stored=STORED, quantisation=CONFIGS)
def test_any_parts_are_read_or_refused(tmp_path: Path, stored: Any, quantisation: dict[str, Any]) -> None:
    tensors = {
        f"m.{suffix}": torch.full(shape, value).to(dtype) for suffix, (dtype, shape, value) in stored.items()
    }
    write(tmp_path, tensors, {"quantization_config": quantisation})
    said = []
    try:
        source = folder_source(tmp_path)
    except CheckpointError as error:
        said.append(str(error))
    else:
        for name in source.names:
            try:
                read_one(source, name, torch.float32)
            except CheckpointError as error:
                said.append(str(error))
    assert not any("\n" in line for line in said)
