"""An engine core around a tiny random model: everything is real but the size."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from cuda_kernels.ops import pick
from engine.batch import BatchBuilder
from engine.core import EngineCore
from engine.drafting.skips.scratch_pages import num_scratch_pages
from engine.drafting.surroundings import Surroundings
from engine.kv_storage import KVStorage
from engine.messages import Abort, SequenceOutput, Submit, TokenLogprobs
from engine.models.config import Layer, Rope, TransformerConfig
from engine.models.context import for_context
from engine.models.kv_groups import kv_spans
from engine.models.transformer import Transformer
from engine.runner import Runner
from engine.tiers import Copier, DiskFile, HostPool
from scheduler.config import SchedulerConfig
from scheduler.invariants import check, check_empty
from scheduler.scheduler import Scheduler
from scheduler.types import FinishReason, Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine.drafting.guess import Drafter
    from scheduler.clock import Clock
    from scheduler.plan import Copy

CPU = torch.device("cpu")
TINY = TransformerConfig(
    architecture="llama",
    vocab_size=300,
    hidden_size=48,
    intermediate_size=64,
    layers=(Layer(rope=Rope(theta=10000.0, num_rotated=16)),) * 2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_positions=512,
)
COPIES_WITHIN_S = 5.0
SETTINGS = SchedulerConfig(
    num_pages=256,
    max_num_seqs=16,
    max_num_batched_tokens=64,
    policy="fcfs",
    growth_share=0.0,  # where pages are few, too many are admitted, and preempted as they grow
)


def random_weights(config: TransformerConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    hidden, wide = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = {
        "embedding": weight(config.vocab_size, hidden),
        "final_norm": torch.ones(hidden),
        "head": weight(config.vocab_size, hidden),
    }
    for index in range(config.num_layers):
        layer = {
            "attention_norm": torch.ones(hidden),
            "mlp_norm": torch.ones(hidden),
            "qkv.weight": weight(queries + 2 * keys, hidden),
            "out.weight": weight(hidden, queries),
            "gate_up.weight": weight(2 * wide, hidden),
            "down.weight": weight(hidden, wide),
        }
        weights |= {f"layers.{index}.{name}": value for name, value in layer.items()}
    return weights


def tiny_core(
    *,
    disk: Path | None = None,
    before: Callable[[Copy], None] | None = None,
    clock: Clock = time.monotonic,
    drafters: Callable[[Surroundings], dict[str, Drafter]] | None = None,
    **settings: object,
) -> EngineCore:
    """`disk`: the file of the disk pages, if `settings` have any; `before`: the copier's hook. With host
    pages the core has a copy thread: it is to be closed."""
    scheduling = replace(SETTINGS, **settings)  # type: ignore[arg-type]
    return core_around(
        TINY, random_weights(TINY), scheduling, disk=disk, before=before, clock=clock, drafters=drafters
    )


def core_around(
    config: TransformerConfig,
    weights: dict[str, torch.Tensor],
    scheduling: SchedulerConfig,
    *,
    disk: Path | None = None,
    before: Callable[[Copy], None] | None = None,
    clock: Clock = time.monotonic,
    drafters: Callable[[Surroundings], dict[str, Drafter]] | None = None,
) -> EngineCore:
    """Of a model in float32 on the CPU, whose context is `config.max_positions`."""
    torch.set_num_threads(1)  # a second one gains nothing here, and spins beside a busy neighbour
    ops = pick(CPU)
    config = for_context(config, config.max_positions)
    model = Transformer(config, weights, ops)
    storage = KVStorage(
        config, scheduling.num_pages, scheduling.page_size, torch.float32, CPU, num_scratch_pages(config)
    )
    file = DiskFile(disk, b"tiny", storage.page_bytes, scheduling.disk_pages) if disk else None
    copier = None
    if scheduling.host_pages:
        copier = Copier(storage, HostPool(storage, scheduling.host_pages), file, before=before)
    index = file.index() if file else {}
    spans = kv_spans(config, scheduling.page_size).spans
    scheduler = Scheduler(scheduling, clock, config.max_positions, disk_index=index, spans=spans)
    batches = BatchBuilder(
        config, ops, scheduling.page_size, config.max_positions, scheduling.max_num_seqs, CPU
    )
    runner = Runner(model, storage, batches, scheduler)
    found = drafters(Surroundings.of(runner, None)) if drafters is not None else {}
    return EngineCore(scheduler, runner, config.vocab_size, copier, found)


def request(name: str, prompt: list[int], **fields: object) -> Request:
    """`fields` of the request where they are its own, of the sampling parameters otherwise."""
    own = {key: fields.pop(key) for key in list(fields) if key in Request.__dataclass_fields__}
    sampling = SamplingParams(**fields)  # type: ignore[arg-type]
    return Request(
        request_id=name,
        prompt_ids=tuple(prompt),
        sampling=sampling,
        arrival_s=time.monotonic(),
        **own,  # type: ignore[arg-type]
    )


class Heard:
    """What one choice of a request was told, folded."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self.error: str | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.num_cached = 0

    def hear(self, output: SequenceOutput) -> None:
        assert self.finish is None, "news after the end"
        self.tokens += output.tokens
        self.finish, self.error = output.finish, output.error
        self.logprobs += output.logprobs or ()
        self.prompt_logprobs += output.prompt_logprobs or ()
        self.num_cached = max(self.num_cached, output.num_cached)


def run(
    core: EngineCore, *requests: Request, checked: bool = True, steps_between: int = 0
) -> dict[tuple[str, int], Heard]:
    """Submit all, `steps_between` one and the next, and step until all have ended; the invariants hold after
    every step. It sleeps while only copies are awaited, as the engine's process does."""
    heard = {(one.request_id, index): Heard() for one in requests for index in range(one.num_choices)}
    coming = list(requests)
    for number in range(5000):
        while coming and (not steps_between or number % steps_between == 0 or not core.has_work):
            core.handle(Submit(coming.pop(0)))
            if steps_between:
                break
        if core.copier is not None and not core.can_step:
            core.copier.wait(COPIES_WITHIN_S)
        for output in core.step().outputs:
            heard[output.request_id, output.index].hear(output)
        if checked:
            check(core.scheduler)
        if not coming and not core.has_work:
            break
    assert all(one.finish is not None for one in heard.values()), "a choice never ended"
    assert not core.speculation.failed, "a drafter raised"
    if checked:
        check_empty(core.scheduler)
        assert not core.runner.methods, "a decoding method outlived its sequence"
        assert not core.runner.processors, "a logits processor outlived its sequence"
        assert not core.runner.batches.num_tables, "a page table outlived its sequence"
    return heard


def abort(core: EngineCore, name: str, index: int | None = None) -> None:
    core.handle(Abort(name, index))
