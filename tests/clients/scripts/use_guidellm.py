"""Its benchmark, of two requests each: what is measured does not matter here, that it can be does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

from calls import KEY, MODEL, TIMEOUT_S, URL, Calls

TOKENIZER = os.environ["CLIENT_TOKENIZER"]
NUM_REQUESTS, NUM_TOKENS = 2, 8
calls = Calls("guidellm")


def benchmark(route: str, stream: bool, **changes: str) -> dict:
    """The requests of one benchmark by how they ended."""
    place = {"target": URL.removesuffix("/v1"), "model": MODEL, "api_key": KEY, **changes}
    options = {
        "backend": {"kind": "openai_http", "request_format": route, "stream": stream, "timeout": TIMEOUT_S}
        | place,
        "profile": {"kind": "concurrent", "streams": 2},
        "constraint": {"kind": "max_requests", "count": NUM_REQUESTS},
        "tokenizer": {"kind": "huggingface_auto", "model": TOKENIZER},
        "data": {"kind": "synthetic_text", "prompt_tokens": 32, "output_tokens": NUM_TOKENS},
        "output": {"kind": "json", "path": tempfile.mktemp(suffix=".json")},
    }
    words = [
        word
        for name, fields in options.items()
        for word in (f"--{name}", ",".join(f"{key}={value}" for key, value in fields.items()))
    ]
    done = subprocess.run(
        [sys.executable, "-m", "guidellm", "run", "--disable-console", *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    with open(options["output"]["path"], encoding="utf-8") as report:
        (measured,) = json.load(report)["benchmarks"]
    return measured["requests"]


def all_succeed(route: str, stream: bool) -> None:
    requests = benchmark(route, stream)
    ended = {how: len(some) for how, some in requests.items() if some}
    assert (ended.get("successful"), ended.get("errored")) == (NUM_REQUESTS, None), f"{ended}: {requests}"
    assert all(request["output"] for request in requests["successful"])
    counted = [request["output_metrics"]["text_tokens"] for request in requests["successful"]]
    assert counted == [NUM_TOKENS] * NUM_REQUESTS


@calls
def chat():
    all_succeed("/v1/chat/completions", stream=False)


@calls
def stream():
    all_succeed("/v1/chat/completions", stream=True)


@calls
def completions():
    all_succeed("/v1/completions", stream=True)


@calls
def wrong_model():
    requests = benchmark("/v1/chat/completions", stream=True, model="another")
    assert len(requests["errored"]) == NUM_REQUESTS
    assert "404" in requests["errored"][0]["info"]["error"]


calls.run()
