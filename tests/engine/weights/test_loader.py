"""Weights: right names, order and values; anything missing, misshapen or tampered with is named."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from engine.checkpoint import Checkpoint, CheckpointError, locate
from engine.weights.checksum import verified
from engine.weights.layout_folder import folder_targets
from engine.weights.layout_gguf import gguf_targets
from engine.weights.loader import check_weights, load_weights
from engine.weights.mapped import MappedFiles
from tests.engine.weights import gguf_bytes as make
from tests.engine.weights.folder import config_json, folder_tensors, write_json
from tests.engine.weights.test_families import LLAMA

CPU = torch.device("cpu")
UNTIED = LLAMA | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}


def load(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return load_weights(checkpoint, dtype, CPU)


def refusal(checkpoint: Checkpoint) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_model(folder: Path, config: dict[str, Any], **save: Any) -> LlamaForCausalLM:
    """A random model, saved by transformers; our own config.json, as transformers 4 wrote it."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.save_pretrained(folder, **save)
    write_json(folder / "config.json", config)
    return model


@pytest.mark.parametrize("save", [{}, {"max_shard_size": "30KB"}], ids=["single", "sharded"])
@pytest.mark.parametrize("config", [LLAMA, UNTIED], ids=["tied", "untied"])
def test_a_folder_gives_the_tensors_that_transformers_wrote(
    tmp_path: Path, config: dict[str, Any], save: dict[str, Any]
) -> None:
    model = write_model(tmp_path, config, **save)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(save)
    checkpoint = locate(str(tmp_path))
    found = folder_tensors(checkpoint.transformer, load(checkpoint, torch.bfloat16))
    expected = model.state_dict()
    if config["tie_word_embeddings"]:
        expected.pop("lm_head.weight", None)
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].bfloat16()), name


def test_a_folder_written_by_transformers_itself_is_accepted(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**UNTIED)).save_pretrained(tmp_path)
    assert locate(str(tmp_path)).transformer.qkv_bias


def test_the_default_model_is_loaded_as_transformers_loads_it(smollm2_gguf: Path) -> None:
    """Every tensor to the last bit; the order of the q and k rows is what is easily wrong.

    Transformers' own pieces, put together: its whole loader takes half a minute.
    """
    checkpoint = locate("")
    processor = LlamaTensorProcessor(config_json(checkpoint.transformer))
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_gguf).tensors}
    weights = load(checkpoint)
    pieces = [
        (target.name, piece)
        for target in gguf_targets(checkpoint.transformer, reader)
        for piece in target.pieces
    ]
    assert sorted(piece.stored for _, piece in pieces) == sorted(reader)
    for name, piece in pieces:
        source = reader[piece.stored]
        values = gguf.quants.dequantize(source.data, source.tensor_type)
        found = weights[name][piece.row : piece.row + piece.shape[0]].numpy()
        assert np.array_equal(found, processor.process(values, source.name).weights), source.name


def test_the_folder_fixture_is_a_model_for_transformers_and_for_us(smollm2_folder: Path) -> None:
    checkpoint = locate(str(smollm2_folder))
    default = locate("")
    assert checkpoint.transformer == default.transformer
    assert checkpoint.eos_token_ids == default.eos_token_ids
    assert checkpoint.chat_template == default.chat_template
    model = LlamaForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    assert torch.equal(model.state_dict()["model.norm.weight"], load(checkpoint)["final_norm"])


def tiny_gguf(folder: Path, change: dict[str, Any] | None = None, drop: str = "") -> Checkpoint:
    """A whole GGUF model of the Llama shape, whose tensors are F32."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (4, 32), "output_norm.weight": (32,), "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,), "blk.0.attn_q.weight": (32, 32), "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32), "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_gate.weight": (64, 32), "blk.0.ffn_up.weight": (64, 32), "blk.0.ffn_down.weight": (32, 64),
    } | (change or {})  # fmt: skip
    shapes.pop(drop, None)
    tensors = {}
    for name, shape in shapes.items():
        values = np.arange(np.prod(shape), dtype=np.float32)
        tensors[name] = (shape, 0, values.tobytes())
    path = folder / "tiny.gguf"
    path.write_bytes(make.gguf(make.TINY_METADATA, tensors))
    return locate(str(path))


def test_gguf_rows_of_queries_and_keys_are_put_back_into_halves(tmp_path: Path) -> None:
    qkv = load(tiny_gguf(tmp_path))["layers.0.qkv.weight"][:, 0].tolist()
    # Head 0 has rows (0, 4), (1, 5), ... side by side in the file, and 0 .. 7 in our order.
    assert qkv[:8] == qkv[32:40] == [32.0 * row for row in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert qkv[48:51] == [0.0, 32.0, 64.0]  # values stay


def test_gguf_defects_are_named(tmp_path: Path) -> None:
    assert "'blk.0.ffn_up.weight' is missing" in refusal(tiny_gguf(tmp_path, drop="blk.0.ffn_up.weight"))
    said = refusal(tiny_gguf(tmp_path, {"blk.0.attn_k.weight": (8, 32)}))
    assert "'blk.0.attn_k.weight' has shape [8, 32]" in said
    assert "[16, 32]" in said
    (tmp_path / "q.gguf").write_bytes(
        make.gguf(make.TINY_METADATA, {"token_embd.weight": ((4, 256), 19, bytes(200))})
    )
    assert "'token_embd.weight' has the type IQ1_S; supported are F32, " in refusal(
        locate(str(tmp_path / "q.gguf"))
    )


def test_a_gguf_file_that_shrank_after_it_was_located_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny_gguf(tmp_path)
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:-64])
    assert "bytes now" in refusal(checkpoint)


def test_a_wrong_sum_names_both(tmp_path: Path) -> None:
    checkpoint = tiny_gguf(tmp_path)
    said = refusal(replace(checkpoint, sha256="0" * 64))
    assert "0" * 64 in said
    assert len(said.split("SHA-256 is ")[1].split(",")[0]) == 64


def test_a_file_that_cannot_be_hashed_is_named(tmp_path: Path) -> None:
    checkpoint = replace(tiny_gguf(tmp_path), sha256="0" * 64)
    checkpoint.path.unlink()
    with pytest.raises(CheckpointError, match=r"gguf: No such file"), verified(checkpoint):
        pass


def broken(tmp_path: Path, name: str, tensor: torch.Tensor | None) -> Checkpoint:
    """A folder whose tensor `name` is replaced, or left out."""
    write_json(tmp_path / "config.json", LLAMA)
    checkpoint = locate(str(tmp_path))
    targets = folder_targets(checkpoint.transformer, ())
    tensors = {piece.stored: torch.zeros(piece.shape) for target in targets for piece in target.pieces}
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    return checkpoint


def test_folder_defects_are_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    assert f"'{name}' is missing" in refusal(broken(tmp_path, name, None))
    said = refusal(broken(tmp_path, name, torch.zeros(3, 5)))
    assert f"'{name}' has shape [3, 5]" in said
    assert "[96, 64]" in said
    said = refusal(broken(tmp_path, name, torch.zeros(96, 64, dtype=torch.int8)))
    assert f"'{name}' has the type I8, supported are F32" in said


def test_a_wrong_checkpoint_fails_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a file was opened")

    monkeypatch.setattr(MappedFiles, "open", fail)
    assert "is missing" in refusal(broken(tmp_path, "model.norm.weight", None))
    assert "has shape [3]" in refusal(broken(tmp_path, "model.norm.weight", torch.zeros(3)))
    write_model(tmp_path, LLAMA)
    with pytest.raises(CheckpointError, match=r"takes \d+ bytes as float32 on cpu, 1000 are free"):
        load_weights(locate(str(tmp_path)), torch.float32, CPU, 1000)


def test_what_is_checked_is_what_is_loaded(tmp_path: Path) -> None:
    write_model(tmp_path, LLAMA)
    checkpoint = locate(str(tmp_path))
    kept = sum(tensor.nbytes for tensor in load(checkpoint, torch.bfloat16).values())
    assert check_weights(checkpoint, torch.bfloat16, CPU, 2**30) == ("safetensors F32", kept)


def test_a_folder_that_shrank_after_it_was_located_is_refused(tmp_path: Path) -> None:
    checkpoint = broken(tmp_path, "model.norm.weight", torch.zeros(64))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors" in refusal(checkpoint)
    path.unlink()
    assert "neither model.safetensors nor" in refusal(checkpoint)


PEAK = """
import sys, torch
from engine.checkpoint import locate
from engine.weights.loader import load_weights

def now(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

checkpoint = locate("")
torch.zeros(8).bfloat16()
before = now("VmRSS:")
weights = load_weights(checkpoint, torch.bfloat16, torch.device("cpu"))
print(now("VmHWM:") - before - sum(tensor.nbytes for tensor in weights.values()))
"""


def test_the_peak_is_little_more_than_the_weights(smollm2_gguf: Path) -> None:
    """98 MB are read for 269 MB of weights; neither they nor float32 copies may add up."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60e6  # 22e6 when written


def test_written_configurations_are_read_back(smollm2_gguf: Path, tmp_path: Path) -> None:
    transformer = locate(str(smollm2_gguf)).transformer
    write_json(tmp_path / "config.json", config_json(transformer))
    assert locate(str(tmp_path)).transformer == transformer
