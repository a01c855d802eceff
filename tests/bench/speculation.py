"""Tokens per step and speed of speculative decoding against plain decoding, on the default model.

    python -m tests.bench.speculation [--concurrency 1,4,16,32] [--drafters auto,prompt_lookup] [--rounds 2]
        [--tokens 96] [--temperature 0] [--draft-model FOLDERS] [--draft-overlap auto] [--num-threads 0]

Three kinds of work, three prompts each. Clients ask one prompt after another, and neighbours begin with
different ones; each has a salt of its own in each round, so that nobody finds pages or answers of others.
Plain and speculative alternate, in one process. Speed is the ratio of the times of a whole round, prompts
included: the median over the rounds, with the least and the most. Texts are compared, and one that differs
ends the benchmark.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from dataclasses import dataclass

from engine.building import build_engine
from engine.checkpoint import locate
from engine.config import DRAFT_OVERLAPS, DRAFTERS, EngineConfig
from engine.core import EngineCore
from engine.messages import Submit
from scheduler.types import Request, SamplingParams
from server.tokenizer import Tokenizer

LETTER = (
    "Dear Mr. Novak, thank you for your order of the 3rd of March. We are sorry to say that the blue garden "
    "chairs are out of stock until the end of April. We can send you the green ones at the same price, or "
    "keep your order until the blue ones arrive. The table and the two lamps will be delivered on Tuesday "
    "between nine and eleven."
)
FUNCTION = """def area(shape):
    if shape.kind == "circle":
        return 3.14159 * shape.radius * shape.radius
    if shape.kind == "square":
        return shape.side * shape.side
    if shape.kind == "rectangle":
        return shape.width * shape.height
    raise ValueError("unknown shape: " + shape.kind)"""
KINDS = {
    "copy": (
        f"Repeat this letter word for word:\n{LETTER}",
        f"Rewrite this letter, but with red chairs in place of the blue ones:\n{LETTER}",
        f"Repeat this function exactly, with a comment above it:\n{FUNCTION}",
    ),
    "code": (
        "Write a Python class for a bank account with the methods deposit, withdraw, transfer and balance.",
        "Write a Python function that parses a CSV file into a list of dictionaries, and tests for it.",
        "Write a small HTML page with a table of five countries, their capitals and their populations.",
    ),
    "chat": (
        "Why is the sky blue? Explain it to a child.",
        "Give me five ideas for a birthday party in the rain.",
        "Tell me a short story about a lighthouse keeper and a whale.",
    ),
}


@dataclass
class Round:
    texts: list[list[list[int]]]  # of each client, in the order of its asking
    seconds: float
    num_steps: int


class Bench:
    def __init__(self, config: EngineConfig, num_tokens: int, temperature: float) -> None:
        self.core: EngineCore = build_engine(config).core
        self.sampling = SamplingParams(temperature=temperature, max_tokens=num_tokens, seed=7)
        tokenizer = Tokenizer.from_checkpoint(locate(""))
        self.prompts = {
            kind: [
                tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", special=True)
                for text in texts
            ]
            for kind, texts in KINDS.items()
        }
        self.numbers = itertools.count()

    def round(self, kind: str, concurrency: int, method: str, drafter: str) -> Round:
        """So many clients at once, each of which asks the kind's prompts one after another; neighbours begin
        with different ones."""
        prompts = self.prompts[kind]
        waiting = {
            client: [prompts[(client + turn) % len(prompts)] for turn in reversed(range(len(prompts)))]
            for client in range(concurrency)
        }
        salts = [f"s{next(self.numbers)}" for _ in waiting]
        texts: dict[str, list[int]] = {}
        client_of: dict[str, int] = {}

        def ask(client: int) -> None:
            request = Request(
                request_id=f"r{next(self.numbers)}",
                prompt_ids=tuple(waiting[client].pop()),
                sampling=self.sampling,
                arrival_s=time.monotonic(),
                method=method,
                drafter=drafter,
                cache_salt=salts[client],
            )
            client_of[request.request_id] = client
            texts[request.request_id] = []
            self.core.handle(Submit(request))

        num_steps = 0
        begun_s = time.perf_counter()
        for client in waiting:
            ask(client)
        while self.core.has_work:
            for output in self.core.step().outputs:
                texts[output.request_id] += output.tokens
                if output.finish is not None and waiting[client_of[output.request_id]]:
                    ask(client_of[output.request_id])
            num_steps += 1
        seconds = time.perf_counter() - begun_s
        by_client: list[list[list[int]]] = [[] for _ in waiting]
        for name, text in texts.items():
            by_client[client_of[name]].append(text)
        return Round(by_client, seconds, num_steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concurrency", default="1,4,16,32")
    parser.add_argument("--drafters", default="auto", help=", ".join(DRAFTERS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--draft-model", default="")
    parser.add_argument("--draft-overlap", default="auto", choices=DRAFT_OVERLAPS)
    parser.add_argument("--num-threads", type=int, default=0)
    args = parser.parse_args()
    config = EngineConfig(
        state_folder="-",
        num_threads=args.num_threads,
        draft_model=args.draft_model,
        draft_overlap=args.draft_overlap,
    )
    bench = Bench(config, args.tokens, args.temperature)
    bench.round("chat", 1, "autoregressive", "auto")  # kernels and memory warm up
    print(f"{'clients':>7} {'work':<5} {'drafter':<14} {'tokens/step':>11} {'speed':>6}   min   max seconds")
    for clients, drafter in itertools.product(
        map(int, args.concurrency.split(",")), args.drafters.split(",")
    ):
        for kind in KINDS:
            speeds, seconds = [], []
            for _ in range(args.rounds):
                plain = bench.round(kind, clients, "autoregressive", "auto")
                drafted = bench.round(kind, clients, "speculative", drafter)
                assert plain.texts == drafted.texts, f"{kind}: another text with {drafter}"
                speeds.append(plain.seconds / drafted.seconds)
                seconds.append(drafted.seconds)
            per_step = plain.num_steps / drafted.num_steps
            spread = f"{statistics.median(speeds):>6.2f} {min(speeds):>5.2f} {max(speeds):>5.2f}"
            row = f"{clients:>7} {kind:<5} {drafter:<14} {per_step:>11.2f} {spread} {min(seconds):>7.2f}"
            print(row, flush=True)
    bench.core.close()


if __name__ == "__main__":
    main()
