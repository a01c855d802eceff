"""What a request costs before and after the engine: tokeniser and chat template, in microseconds.

python -m tests.bench.text_costs [--model NAME] [--runs 100]

"render" is the template in its process, there and back; "chat" is a chat request whole: masking of special
texts, template, tokens. "back" is the detokeniser, token by token. Medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import TYPE_CHECKING

from engine.checkpoint import locate
from server.bench.prompts import WORDS
from server.detokenizer import IncrementalDetokenizer
from server.prompt import DEFAULT, ChatTemplate
from server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTHS = {"short": 8, "1k": 1024, "8k": 8192}  # tokens, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--runs", type=int, default=100)
    options = parser.parse_args()
    checkpoint = locate(options.model)
    start = time.perf_counter()
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    print(f"{checkpoint.name}: tokeniser built in {time.perf_counter() - start:.2f} s")
    source = checkpoint.chat_templates.get(DEFAULT)
    template = ChatTemplate(source, checkpoint.special_tokens) if source else None
    print(f"{'prompt':8}{'tokens':>8}{'encode':>10}{'render':>10}{'chat':>10}{'back':>10}   us")
    try:
        for name, length in LENGTHS.items():
            print(f"{name:8}{row(tokenizer, template, length, options.runs)}")
    finally:
        if template is not None:
            template.close()


def row(tokenizer: Tokenizer, template: ChatTemplate | None, length: int, runs: int) -> str:
    text = prompt(length)
    ids = tokenizer.encode(text, special=True)
    jobs: list[Callable[[], object] | None] = [lambda: tokenizer.encode(text, special=True), None, None]
    if template is not None:
        messages = [{"role": "user", "content": text}]
        jobs[1:] = [lambda: template.render(messages), lambda: template.encode(tokenizer, messages)]
    jobs.append(lambda: shown(tokenizer, ids))
    costs = "".join(f"{median_us(job, runs):>10,.0f}" if job else f"{'-':>10}" for job in jobs)
    return f"{len(ids):>8}{costs}"


def prompt(length: int) -> str:
    """Words, most of which are one token, the same every time."""
    return " ".join(random.Random(length).choices(WORDS, k=length))


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, True)
    return "".join(detokenizer.push((token,)) for token in ids) + detokenizer.flush()


def median_us(job: Callable[[], object], runs: int) -> float:
    job()
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        job()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e6


if __name__ == "__main__":
    main()
