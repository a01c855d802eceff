"""`octavo models`: what there is, what a model is and what would fit, or the refusal of serving it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from engine.checkpoint import locate
from engine.description import describe
from server import cli
from server.settings import SETTINGS
from tests.engine.families.references import CASES, WINDOW, build

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _no_octavo_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in SETTINGS.values():
        monkeypatch.delenv(setting.variable, raising=False)
    monkeypatch.delenv("OCTAVO_CONFIG", raising=False)


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_counted_as_transformers_counts_them(name: str, tmp_path: Path) -> None:
    model = build(CASES[name])
    model.save_pretrained(tmp_path)
    found = describe(locate(str(tmp_path)))
    counts = {name: weight.numel() for name, weight in model.named_parameters()}
    assert found.num_parameters == sum(counts.values())
    experts = sum(count for name, count in counts.items() if ".experts." in name)
    idle = experts // max(1, found.num_experts) * (found.num_experts - found.experts_per_token)
    assert found.num_active_parameters == sum(counts.values()) - idle
    assert bool(experts) == bool(found.num_experts)


def test_windows_are_described(tmp_path: Path) -> None:
    build(CASES["gemma2"]).save_pretrained(tmp_path)
    assert describe(locate(str(tmp_path))).windows == ((WINDOW, 2),)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(["models", *argv])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_default_model_is_described(smollm2_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, str(smollm2_gguf))
    assert (status, err) == (0, "")
    lines = dict(line.split(None, 1) for line in out.splitlines())
    assert lines["parameters"] == "134,515,008"
    assert lines["context"] == "8,192 tokens"
    assert lines["weights"].startswith("93.8 MiB on disk, GGUF Q4_1; ")
    assert lines["KV"] == "cache       23,040 bytes per token in two bytes a number"
    assert lines["tokeniser"] == "byte-level BPE, 49,152 tokens"
    assert lines["chat"] == "template  default"


def test_json_has_the_same_facts(smollm2_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, str(smollm2_gguf), "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["num_parameters"], found["chat_templates"]) == (134515008, ["default"])
    assert found["generation"] == {"eos_token_ids": [2, 0]}
    trial = found["trial"]
    item_bytes = {"bfloat16": 2, "float32": 4}[trial["dtype"]]
    assert trial["weight_bytes"] == 134515008 * item_bytes
    assert trial["kv_bytes"] == trial["kv_tokens"] * 11520 * item_bytes
    assert trial["full_sequences"] == trial["kv_tokens"] // 8192


@pytest.fixture(scope="module")
def folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the default model's tokeniser and no template."""
    from server.tokenizer import Tokenizer

    made = tmp_path_factory.mktemp("tiny")
    build(replace(CASES["llama"], fields={"vocab_size": 49152})).save_pretrained(made)
    Tokenizer.from_checkpoint(locate(str(smollm2_gguf))).save(made / "tokenizer.json")
    return made


def changed(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_folder_says_what_it_lacks_and_what_is_not_applied(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "num_beams": 4, "eos_token_id": 2}')
    status, out, _ = run(capsys, str(folder))
    assert status == 0
    assert "chat template  none: serve with --chat-template FILE" in out
    assert "defaults       temperature 0.5" in out
    assert "not applied    num_beams" in out


def test_what_would_be_refused_is_one_line_after_the_facts(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_KV_CACHE_BYTES", "1k")
    status, out, err = run(capsys, str(folder))
    assert status == 1
    assert "parameters" in out
    assert err.startswith("octavo models: KV pages for ")
    assert err.count("\n") == 1
    monkeypatch.delenv("OCTAVO_KV_CACHE_BYTES")
    changed(folder / "config.json", intermediate_size=99)
    status, out, err = run(capsys, str(folder), "--json")
    assert status == 1
    assert "has shape [56, 48], but the configuration needs [99, 48]" in err
    assert json.loads(out)["refusal"] in err
    changed(folder / "config.json", architectures=["MambaForCausalLM"])
    status, out, err = run(capsys, str(folder))
    assert (status, out) == (1, "")
    assert "MambaForCausalLM" in err


def test_the_hubs_cache_is_listed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("a" * 40)
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", "models", "--json"],
        env={"HF_HUB_CACHE": str(tmp_path), "HOME": str(tmp_path), "OCTAVO_MODEL": "owner/name", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["owner/name"] == {"name": "owner/name", "where": "hub cache", "bytes": 2, "default": True}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("a b", "not found"),
        ("x" * 5000, "not found"),
        ("owner/name", "would be fetched"),
        (".", "file or folder"),
    ],
)
def test_the_default_that_is_not_cached_is_listed_with_where_it_is_sought(
    name: str, where: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_MODEL", name)
    status, out, _ = run(capsys)
    assert status == 0
    assert f"* {name}  ({where})" in out
