"""Checkpoints as the engine serves them, from the files to the text, and every row of logits on the way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from engine.checkpoint import locate
from engine.messages import Submit
from engine.weights.loader import load_weights
from scheduler.invariants import check
from tests.engine.tiny import CPU, SETTINGS, core_around, request

if TYPE_CHECKING:
    from pathlib import Path

    from engine.core import EngineCore
    from engine.models.transformer import Rows
    from scheduler.plan import StepPlan


@dataclass(frozen=True)
class Text:
    """tokens: prompt and output. logits: [T - 1, vocab], row i says what follows tokens[: i + 1]."""

    tokens: list[int]
    logits: torch.Tensor


def serve(
    source: Path, prompts: list[list[int]], *, step_tokens: int, num_tokens: int, max_model_len: int = 0
) -> list[Text]:
    """Greedy texts of `num_tokens` after each prompt, side by side; prompts are computed in slices of what
    is left of `step_tokens` in a step."""
    checkpoint = locate(str(source))
    config = checkpoint.transformer
    weights = load_weights(checkpoint, torch.float32, CPU)
    shape = replace(config, max_positions=max_model_len or config.max_positions)
    settings = replace(SETTINGS, max_num_batched_tokens=step_tokens, max_num_seqs=4)
    core = core_around(shape, weights, settings)
    recorder = _Recorder(core)
    for number, prompt in enumerate(prompts):
        one = request(str(number), prompt, max_tokens=num_tokens, temperature=0.0, prompt_logprobs=0)
        core.handle(Submit(one))
    outputs: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    while core.has_work:
        for output in core.step().outputs:
            assert output.error is None, output.error
            outputs[output.request_id] += output.tokens
        check(core.scheduler)
    return [
        Text(prompt + outputs[str(number)], torch.cat(recorder.rows[str(number)]))
        for number, prompt in enumerate(prompts)
    ]


class _Recorder:
    """Keeps the logits of every row that a plan wants them of, by request."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.rows: dict[str, list[torch.Tensor]] = {}
        self._execute, self._compute = core.runner.execute, core.runner.model.compute
        self._logits = torch.empty(0)
        core.runner.execute = self.execute
        core.runner.model.compute = self.compute

    def compute(self, rows: Rows, *arguments: object) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        hidden, tapped = self._compute(rows, *arguments)
        self._logits = self.core.runner.model.logits(hidden, rows.wanted)
        return hidden, tapped

    def execute(self, plan: StepPlan) -> object:
        names = [self.core.scheduler.sequence(piece.seq_id).request.request_id for piece in plan.slices]
        outcomes = self._execute(plan)
        parts = self._logits.split([piece.num_logits for piece in plan.slices])
        for name, part in zip(names, parts, strict=True):
            self.rows.setdefault(name, []).append(part.clone())
        return outcomes
