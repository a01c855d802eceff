"""Two API keys, and what one can find out of the other's prompts and answers."""

from __future__ import annotations

from typing import Any

from tests.e2e.daemon import Daemon

PROMPT = list(range(1000, 1150))
# Who drafts from nothing else cannot draft for whom no answer is kept.
DRAFTED = {"method": "speculative", "drafter": "past_outputs", "report": True}
FLAGS = ("--state-folder", "-", "--max-model-len", "512", "--api-keys", "k1,k2")


def ask(daemon: Daemon, key: str, **body: Any) -> dict[str, int]:
    asked = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "decoding": DRAFTED}
    with daemon.client(headers={"authorization": f"Bearer {key}"}) as client:
        response = client.post("/v1/completions", json=asked | body)
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    drafts = usage["completion_tokens_details"]
    return {
        "cached": usage["prompt_tokens_details"]["cached_tokens"],
        "drafts": drafts["accepted_prediction_tokens"] + drafts["rejected_prediction_tokens"],
    }


def test_no_tenant_finds_out_what_another_has_asked_or_was_answered() -> None:
    with Daemon(*FLAGS) as daemon:
        assert ask(daemon, "k1") == {"cached": 0, "drafts": 0}
        for salt in ({}, {"cache_salt": "k1"}):
            assert ask(daemon, "k2", **salt) == {"cached": 0, "drafts": 0}
        assert ask(daemon, "k1")["cached"] == 144
        assert ask(daemon, "k2")["cached"] == 144, "bob's own"


def test_tenants_share_where_the_operator_says_so() -> None:
    with Daemon(*FLAGS, "--tenants-share-cache") as daemon:
        assert ask(daemon, "k1")["cached"] == 0
        assert ask(daemon, "k2")["cached"] == 144
        assert ask(daemon, "k2", cache_salt="mine")["cached"] == 0
