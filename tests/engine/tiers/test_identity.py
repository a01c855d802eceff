"""Whose pages a file holds: told by what the weights are and what they are computed with, by nothing else."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from cuda_kernels.ops import pick
from engine.checkpoint import locate
from engine.tiers import kv_identity
from engine.weights.checksum import weights_digest
from engine.weights.loader import load_weights
from server.tokenizer import Tokenizer
from tests.e2e.daemon import Daemon
from tests.engine.families.references import CASES, build
from tests.engine.tiny import CPU, TINY, random_weights
from tests.engine.weights.test_families import LLAMA
from tests.engine.weights.test_loader import write_model

if TYPE_CHECKING:
    from pathlib import Path

    from cuda_kernels.ops import Operations


def identity(
    weights: bytes = b"weights",
    *,
    kernels: Operations | None = None,
    dtype: torch.dtype = torch.float32,
    eps: float = TINY.rms_norm_eps,
    page_size: int = 16,
) -> bytes:
    shape = replace(TINY, rms_norm_eps=eps)
    return kv_identity(weights, shape, kernels or pick(CPU), dtype, CPU, page_size)


def test_the_same_again_is_the_same() -> None:
    assert identity() == identity()


def test_what_the_arithmetic_depends_on_changes_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    first = identity()
    others = [
        identity(b"other"),
        identity(dtype=torch.bfloat16),
        identity(eps=1e-4),
        identity(page_size=8),
        identity(kernels=replace(pick(CPU), linear=torch.nn.functional.linear)),
        identity(kernels=replace(pick(CPU), row_multiple=16)),
    ]
    for target, value in (
        ("cuda_kernels.ops.ARITHMETIC_VERSION", 0),
        ("torch.__version__", "1.0"),
        ("torch.backends.cpu.get_cpu_capability", lambda: "another level"),
        ("torch.cpu.get_capabilities", lambda: {"another": True}),
        ("torch.get_num_threads", lambda: 99),
        ("engine.tiers.identity.device_name", lambda device: "another CPU"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(target, value)
            others.append(identity())
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    others.append(identity())
    assert len({first, *others}) == 1 + len(others)


def test_a_change_anywhere_in_any_tensor_changes_the_digest() -> None:
    """A fine-tune of one layer, of one tensor, of one row: sampled blocks would miss it."""
    weights = random_weights(TINY)
    found = {weights_digest(weights)}
    for tensor in weights.values():
        for place in (0, tensor.numel() // 3, tensor.numel() - 1):
            kept = tensor.view(-1)[place].clone()
            tensor.view(-1)[place] += 0.001
            found.add(weights_digest(weights))
            tensor.view(-1)[place] = kept
    assert len(found) == 1 + 3 * len(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_only_changes_places_changes_the_digest(dtype: torch.dtype) -> None:
    matrix = torch.randn(64, 4096).to(dtype)
    same = {"m": matrix}
    rows, columns = matrix.clone(), matrix.clone()
    rows[[3, 9]], columns[:, [8, 2000]] = matrix[[9, 3]], matrix[:, [2000, 8]]
    found = [same, {"m": rows}, {"m": columns}, {"n": matrix}, {"m": matrix.view(128, 2048)}]
    assert len({weights_digest(weights) for weights in found}) == len(found)


def test_odd_sizes_have_a_digest() -> None:
    sizes = (0, 1, 3, 511, 512, 513, 2048, 2049)
    assert len({weights_digest({"m": torch.ones(size, dtype=torch.bfloat16)}) for size in sizes}) == len(
        sizes
    )


def digest_of(folder: Path) -> bytes:
    return weights_digest(load_weights(locate(str(folder)), torch.float32, CPU))


def retuned(folder: Path, name: str) -> None:
    """Other numbers in one tensor of the file, under the same name, size and time of change."""
    path = folder / "model.safetensors"
    before, tensors = path.stat(), load_file(path)
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, path, metadata={"format": "pt"})
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_fine_tunes_with_equal_names_sizes_and_times_are_two_models(tmp_path: Path) -> None:
    write_model(tmp_path, LLAMA)
    first = digest_of(tmp_path)
    retuned(tmp_path, "model.layers.1.self_attn.q_proj.weight")
    second = digest_of(tmp_path)
    assert second != first
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert digest_of(tmp_path) == second, "a file that was only touched is the same model"


def test_another_models_pages_are_never_served_from_the_disk(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Two fine-tunes, one after the other, in the same folder and with the same state folder."""
    folder = tmp_path / "model"
    build(replace(CASES["llama"], fields={"vocab_size": 49152})).save_pretrained(folder)
    Tokenizer.from_checkpoint(locate(str(smollm2_gguf))).save(folder / "tokenizer.json")
    flags = (
        str(folder), "--state-folder", str(tmp_path / "state"), "--max-model-len", "256", "--costs", "",
        "--num-pages", "32", "--host-cache-bytes", "1m", "--disk-cache-bytes", "4m",
    )  # fmt: skip

    def cached() -> int:
        """Of a prompt, asked once, then pushed out of the device's pages by others."""
        with Daemon(*flags) as daemon:
            answer = daemon.complete(prompt=list(range(100, 200)), max_tokens=1)
            for other in range(1, 8):
                daemon.complete(prompt=list(range(1000 * other, 1000 * other + 200)), max_tokens=1)
            daemon.terminate()
            assert daemon.wait() == 0
        details = answer["usage"]["prompt_tokens_details"] or {}
        return int(details.get("cached_tokens") or 0)

    assert cached() == 0
    assert cached() > 0, "the same model finds its pages again"
    retuned(folder, "model.layers.0.self_attn.k_proj.weight")
    assert cached() == 0
