"""A folder as transformers writes it, without a chat template: completions work, chats say what to do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from engine.checkpoint import locate
from server.tokenizer import Tokenizer
from tests.e2e.daemon import Daemon
from tests.engine.families.references import CASES, build

if TYPE_CHECKING:
    from pathlib import Path

MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
TEMPLATE = """{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if messages[0].role != 'system' %}
{{ raise_exception('a system message is needed') }}
{% endif %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
FLAGS = ("--state-folder", "-", "--costs", "", "--max-model-len", "256")


@pytest.fixture(scope="module")
def folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    build(replace(CASES["llama"], fields={"vocab_size": 49152})).save_pretrained(made)
    Tokenizer.from_checkpoint(locate(str(smollm2_gguf))).save(made / "tokenizer.json")
    (made / "generation_config.json").write_text('{"temperature": 0, "eos_token_id": 49151}')
    return made


def test_without_a_template_only_chats_are_refused(folder: Path) -> None:
    with Daemon(str(folder), *FLAGS) as daemon:
        daemon.find_line(r"generation defaults .*temperature=0\.0")
        answer = daemon.complete(prompt="Once upon", max_tokens=8)
        assert answer["usage"]["completion_tokens"] == 8
        again = daemon.complete(prompt="Once upon", max_tokens=8, seed=1)
        assert again["choices"][0]["text"] == answer["choices"][0]["text"]  # the model's own temperature of 0
        refused = daemon.post("/v1/chat/completions", messages=MESSAGES)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("no_chat_template", "messages")
        assert "--chat-template FILE" in error["message"]


def test_with_a_template_file_chats_are_answered(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(TEMPLATE)
    override = json.dumps({"max_new_tokens": 5})
    flags = ("--chat-template", str(file), "--override-generation-config", override)
    with Daemon(str(folder), *FLAGS, *flags) as daemon:
        answer = daemon.post("/v1/chat/completions", messages=MESSAGES)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 5
        prompt = (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        )
        whole = daemon.complete(prompt=prompt, max_tokens=5)
        assert whole["choices"][0]["text"] == answer.json()["choices"][0]["message"]["content"]
        assert whole["usage"]["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
        refused = daemon.post("/v1/chat/completions", messages=MESSAGES[1:])
        assert refused.status_code == 400
        assert "a system message is needed" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("text", "why"), [("x\n{% if %}", "line 2: "), ("", "is empty"), ("x" * (2**20 + 1), "1048576 bytes")]
)
def test_a_broken_template_file_ends_the_start_in_one_line(
    folder: Path, tmp_path: Path, text: str, why: str
) -> None:
    file = tmp_path / "broken.jinja"
    file.write_text(text)
    daemon = Daemon(str(folder), *FLAGS, "--chat-template", str(file))
    assert daemon.wait() == 1
    (line,) = [line for line in daemon.lines if line.startswith("octavo serve: ")]
    assert f"chat_template {file}" in line
    assert why in line


def test_broken_generation_defaults_end_the_start_only_of_those_who_want_them(
    folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "generation_config.json").write_text("{")
    refused = Daemon(str(copy), *FLAGS)
    assert refused.wait() == 1
    (line,) = [line for line in refused.lines if line.startswith("octavo serve: ")]
    assert "generation_config.json: not JSON" in line
    assert line.endswith("--generation-config none leaves such defaults out")
    with Daemon(str(copy), *FLAGS, "--generation-config", "none") as daemon:
        daemon.find_line(r"generation defaults cannot be read")
        daemon.complete(prompt="Once upon", max_tokens=1)
