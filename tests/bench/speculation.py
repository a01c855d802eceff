"""Tokens per step and speed of speculative decoding against plain decoding, on the default model.

    python -m tests.bench.speculation [--concurrency 1,4,16,32] [--drafters auto,prompt_lookup] [--rounds 2]
        [--tokens 96] [--temperature 0] [--draft-model FOLDERS] [--draft-overlap auto] [--num-threads 0]

Three kinds of work, three prompts each. Clients ask one prompt after another, and neighbours begin with
different ones; each has a salt of its own in each round, so that nobody finds pages or answers of others.
Two engines of one process, one plain and one speculative, take their steps in turn, whichever has committed
fewer tokens: then both meet a machine that is now fast and now slow alike. Speed is the ratio of the times
that their steps took in a round, prompts included: the median over the rounds, with the least and the most.
Texts are compared, and one that differs ends the benchmark.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.building import build_engine
from engine.checkpoint import locate
from engine.config import DRAFT_OVERLAPS, DRAFTERS, EngineConfig
from engine.messages import Submit
from scheduler.types import Request, SamplingParams
from server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.core import EngineCore

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
NUMBERS = itertools.count()
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


@dataclass(frozen=True)
class Way:
    """How a request is decoded."""

    method: str = "autoregressive"
    drafter: str = "auto"


@dataclass
class Client:
    salt: str
    prompts: list[list[int]]  # those that it will ask, the next one last
    texts: list[list[int]] = field(default_factory=list)


class Clients:
    """So many clients of an engine, each of which asks these prompts one after another."""

    def __init__(
        self, core: EngineCore, way: Way, sampling: SamplingParams, prompts: list[list[int]], count: int
    ) -> None:
        self.core, self.way, self.sampling = core, way, sampling
        self.num_steps = self.num_tokens = 0
        self.seconds = 0.0
        self._asking: dict[str, Client] = {}
        self.clients = [
            Client(
                f"s{next(NUMBERS)}", [prompts[(first - turn) % len(prompts)] for turn in range(len(prompts))]
            )
            for first in range(count)
        ]
        for client in self.clients:
            self._ask(client)

    def step(self) -> None:
        begun_s = time.perf_counter()
        outputs = self.core.step().outputs
        self.seconds += time.perf_counter() - begun_s
        self.num_steps += 1
        for output in outputs:
            client = self._asking[output.request_id]
            client.texts[-1] += output.tokens
            self.num_tokens += len(output.tokens)
            if output.finish is not None and client.prompts:
                self._ask(client)

    @property
    def texts(self) -> list[list[list[int]]]:
        return [client.texts for client in self.clients]

    def _ask(self, client: Client) -> None:
        request = Request(
            request_id=f"r{next(NUMBERS)}",
            prompt_ids=tuple(client.prompts.pop()),
            sampling=self.sampling,
            arrival_s=time.monotonic(),
            method=self.way.method,
            drafter=self.way.drafter,
            cache_salt=client.salt,
        )
        self._asking[request.request_id] = client
        client.texts.append([])
        self.core.handle(Submit(request))


def take_turns(*all_clients: Clients) -> None:
    while running := [clients for clients in all_clients if clients.core.has_work]:
        min(running, key=lambda clients: clients.num_tokens).step()


class Bench:
    def __init__(self, config: EngineConfig, num_tokens: int, temperature: float) -> None:
        self.plain = build_engine(config).core
        self.drafting = build_engine(config).core
        self.sampling = SamplingParams(temperature=temperature, max_tokens=num_tokens, seed=7)
        tokenizer = Tokenizer.from_checkpoint(locate(""))
        self.prompts = {
            kind: [
                tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", special=True)
                for text in texts
            ]
            for kind, texts in KINDS.items()
        }

    def round(self, kind: str, concurrency: int, drafter: str) -> tuple[Clients, Clients]:
        """-> plain, with drafts"""
        prompts = self.prompts[kind]
        plain = Clients(self.plain, Way(), self.sampling, prompts, concurrency)
        drafted = Clients(self.drafting, Way("speculative", drafter), self.sampling, prompts, concurrency)
        take_turns(plain, drafted)
        assert plain.texts == drafted.texts, f"{kind}: another text with {drafter}"
        return plain, drafted

    def warm_up(self) -> None:
        """Kernels and memory."""
        for core in (self.plain, self.drafting):
            take_turns(Clients(core, Way(), self.sampling, self.prompts["chat"], 1))

    def close(self) -> None:
        self.plain.close()
        self.drafting.close()


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
    # The second engine finds there the costs that the first has measured.
    state = tempfile.TemporaryDirectory()
    config = EngineConfig(
        state_folder=state.name,
        num_threads=args.num_threads,
        draft_model=args.draft_model,
        draft_overlap=args.draft_overlap,
    )
    bench = Bench(config, args.tokens, args.temperature)
    bench.warm_up()
    print(f"{'clients':>7} {'work':<5} {'drafter':<14} {'tokens/step':>11} {'speed':>6}   min   max seconds")
    for clients, drafter in itertools.product(
        map(int, args.concurrency.split(",")), args.drafters.split(",")
    ):
        for kind in KINDS:
            rounds = [bench.round(kind, clients, drafter) for _ in range(args.rounds)]
            speeds = [plain.seconds / drafted.seconds for plain, drafted in rounds]
            plain, drafted = rounds[-1]
            per_step = plain.num_steps / drafted.num_steps
            spread = f"{statistics.median(speeds):>6.2f} {min(speeds):>5.2f} {max(speeds):>5.2f}"
            row = f"{clients:>7} {kind:<5} {drafter:<14} {per_step:>11.2f} {spread} {drafted.seconds:>7.2f}"
            print(row, flush=True)
    bench.close()
    state.cleanup()


if __name__ == "__main__":
    main()
