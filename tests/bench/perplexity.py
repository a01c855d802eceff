"""Perplexity of the default model on the text beside this file, for each format that weights may lie in.

    python -m tests.bench.perplexity [--only GGUF] [--window 1024] [--every 1] [--json FILE]

The shipped file is widened to float32, stored in each format by `requantised`, loaded and computed by
Octavo's own engine; arithmetic is float32 but for the row that says otherwise. The text is cut into windows
of so many tokens, each of which is scored from its second token on.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from engine.building import build_engine
from engine.checkpoint import locate
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import Submit
from scheduler.config import SchedulerConfig
from scheduler.types import Request, SamplingParams
from server.tokenizer import Tokenizer
from tests.bench.requantised import FOLDER_KINDS, GGUF_KINDS, write_folder_as, write_gguf
from tests.engine.weights.folder import write_folder

TEXTS = ("english", "documentation", "code", "languages")
FOLDER = Path(__file__).with_name("perplexity_text")
MACHINE = Path(__file__).parents[2] / "configs" / "machines" / "cpu-2-cores-smollm2-135m.toml"
SHIPPED = "GGUF Q4_1, as shipped"


@dataclass(frozen=True)
class Score:
    """nats: minus the log-probability of all scored tokens together; num_bytes: of their text."""

    name: str
    nats: float
    num_tokens: int
    num_bytes: int
    weight_bytes: int
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.num_tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes


def read_text() -> str:
    return "\n".join((FOLDER / f"{name}.txt").read_text(encoding="utf-8") for name in TEXTS)


def score(
    name: str, source: Path, windows: list[list[int]], tokenizer: Tokenizer, dtype: str, threads: int
) -> Score:
    scheduling = SchedulerConfig(
        max_num_seqs=2, num_pages=2 * (len(windows[0]) // 16 + 2), prefix_cache=False
    )
    config = EngineConfig(
        model=str(source),
        device="cpu",
        num_threads=threads,
        dtype=dtype,
        state_folder="-",
        costs=str(MACHINE),
        scheduler=scheduling,
    )
    core = build_engine(config).core
    started = time.perf_counter()
    nats, scored = 0.0, 0
    for number, window in enumerate(windows):
        for token, logprob in zip(window[1:], logprobs_of(core, str(number), window), strict=True):
            nats -= logprob
            scored += len(tokenizer.token_bytes(token))
    return Score(
        name=name,
        nats=nats,
        num_tokens=sum(len(window) - 1 for window in windows),
        num_bytes=scored,
        weight_bytes=locate(str(source)).size_bytes,
        seconds=time.perf_counter() - started,
    )


def logprobs_of(core: EngineCore, name: str, tokens: list[int]) -> list[float]:
    """The log-probability of each token but the first, after those before it."""
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    core.handle(Submit(Request(request_id=name, prompt_ids=tuple(tokens), sampling=sampling)))
    found: list[float] = []
    while core.has_work:
        for output in core.step().outputs:
            assert output.error is None, output.error
            found += [entry.logprob for entry in output.prompt_logprobs or ()]
    return found


def formats(shipped: Path, work: Path) -> Iterator[tuple[str, str, Callable[[], Path]]]:
    """(name, dtype of the arithmetic, what makes the file)"""
    yield SHIPPED, "float32", lambda: shipped
    yield f"{SHIPPED}, bfloat16 arithmetic", "bfloat16", lambda: shipped
    plain = work / "float32"
    yield (
        "safetensors F32",
        "float32",
        partial(_made, plain, lambda: write_folder(locate(str(shipped)), plain)),
    )
    for kind in FOLDER_KINDS:
        folder = work / kind
        yield (
            f"safetensors {kind}",
            "float32",
            partial(_made, folder, partial(write_folder_as, plain, folder, kind)),
        )
    for kind in GGUF_KINDS:
        file = work / f"{kind}.gguf"
        yield f"GGUF {kind}", "float32", partial(_made, file, partial(write_gguf, shipped, file, kind))


def _made(path: Path, make: Callable[[], None]) -> Path:
    make()
    return path


def print_row(found: Score, base: Score) -> None:
    change = found.perplexity / base.perplexity - 1
    figures = f"{found.weight_bytes / 1e6:.1f} | {found.perplexity:.3f} | {found.bits_per_byte:.4f}"
    difference = f"{found.perplexity - base.perplexity:+.3f} ({change:+.2%})"
    print(f"| {found.name} | {figures} | {difference} | {found.seconds:.0f} s |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="formats whose name begins so, beside the shipped one")
    parser.add_argument("--window", type=int, default=1024, help="tokens that are scored together")
    parser.add_argument("--threads", type=int, default=1, help="two on a busy machine wait for each other")
    parser.add_argument(
        "--every", type=int, default=1, help="score each so-manyth window alone, to save time"
    )
    parser.add_argument("--json", type=Path, help="file for the raw figures")
    asked = parser.parse_args()
    checkpoint = locate("")
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    ids = tokenizer.encode(read_text(), special=False)
    cut = [ids[at : at + asked.window] for at in range(0, len(ids), asked.window)]
    windows = [window for window in cut if len(window) > 1][:: asked.every]
    print("| weights | MB | perplexity | bits per byte | to the shipped file's | time |")
    print("|---|---:|---:|---:|---:|---:|")
    scores: list[Score] = []
    with tempfile.TemporaryDirectory() as work:
        for name, dtype, make in formats(checkpoint.path, Path(work)):
            source = make()
            if scores and not name.startswith(asked.only):
                continue
            scores.append(score(name, source, windows, tokenizer, dtype, asked.threads))
            print_row(scores[-1], scores[0])
            if asked.json:
                asked.json.write_text(
                    json.dumps(list(map(asdict, scores)), indent=1) + "\n", encoding="utf-8"
                )
    print(f"\n{len(windows)} windows, {scores[0].num_tokens} tokens, {scores[0].num_bytes} bytes")


if __name__ == "__main__":
    main()
