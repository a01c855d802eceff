"""What the routes use: the model's text side, the engine, admission and metrics, composed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
import uuid
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from scheduler.types import Request
from server import logs
from server.admission import Admission
from server.buffers import Buffers
from server.chat_templates import check_named_file, load_templates
from server.decoding import decoding_of
from server.errors import ApiError, unavailable
from server.generation_defaults import GenerationDefaults, generation_defaults
from server.metrics import Metrics
from server.prompt import TemplateError, TemplateUnavailable
from server.prompt_reader import PromptReader
from server.refusals import Refusal, draining
from server.sampling import (
    base_sampling,
    check_limits,
    check_min_tokens,
    fit_max_tokens,
    seed_of_prompt,
)
from server.streams import Generation, TextOptions
from server.tenants import TenantLimits
from server.text_threads import TextThreads
from server.tokenizer import Tokenizer
from server.version import octavo_version

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.checkpoint import Checkpoint
    from engine.client import EngineClient
    from engine.messages import Ready, StepOutput
    from scheduler.types import SamplingParams
    from server.admission import Ticket
    from server.config import Config
    from server.decoding import Decoding
    from server.prompt import ChatTemplates
    from server.prompt_reader import Prompt
    from server.wire.fields import GenerationFields

NOT_READY_RETRY_S = 2
_SALT_BYTES = 16
RESTART_WAIT_S = 10.0  # work is taken so long after an engine's end: the next one is about to begin
DRAIN_GRACE_S = 1.0  # what cut streams get to send their last words


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a route asks for, in terms that completions and chat share."""

    id: str
    tenant: str
    body: GenerationFields
    num_prompts: int
    num_choices: int  # per prompt
    read_prompts: Callable[[PromptReader], list[Prompt]]  # runs in a worker thread
    max_tokens: int | None
    default_max_tokens: int | None  # None = all that fits
    max_tokens_param: str
    logprobs: int | None
    prompt_logprobs: int | None = None
    discard_output: bool = False
    renders: bool = False  # a chat template


@dataclass
class Service:
    config: Config
    tokenizer: Tokenizer
    template: ChatTemplates | None
    checkpoint: Checkpoint
    client: EngineClient
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)

    def __post_init__(self) -> None:
        server, scheduler = self.config.server, self.config.engine.scheduler
        named = dict.fromkeys(filter(None, server.served_model_name))
        self.model_names = tuple(named) or (self.checkpoint.name,)
        self.model_name = self.model_names[0]
        self.version = octavo_version()
        self.created_s = int(time.time())
        self.metrics = Metrics(self.model_name)
        self.buffers = Buffers(server.max_buffered_bytes)
        self.metrics.show_buffers(self.buffers)
        self.admission = Admission(
            scheduler.max_queued_requests + scheduler.max_num_seqs,
            tenants=TenantLimits(server.max_tenant_requests, server.tenant_tokens_per_minute),
        )
        self.threads = TextThreads(server.num_text_threads, server.max_waiting_text_jobs)
        # Of their own for what renders a template: one that is slow must not hold up who needs none.
        self.rendering = TextThreads(server.num_text_threads, server.max_waiting_text_jobs)
        self._active: set[Generation] = set()
        self._known_ready: Ready | None = None
        self._facts: Ready | None = None  # of the engine that runs, or ran last: the next one has the same
        self._lost_s = -math.inf
        self._last_step_s = 0.0
        self._fingerprint = ""
        self.client.on_step = self._on_step
        self.client.on_change = self.note_ready

    # State

    @property
    def facts(self) -> Ready | None:
        """What the engine said of itself, also while the next one begins. None before the first."""
        return self.client.ready or self._facts

    @property
    def max_model_len(self) -> int:
        ready = self.facts
        return ready.max_model_len if ready else self.checkpoint.transformer.max_positions

    @property
    def vocab_size(self) -> int:
        """Ids that are both in the tokeniser and in the logits."""
        ready = self.facts
        return min(self.tokenizer.vocab_size, ready.vocab_size) if ready else self.tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """Changes when the same seed may give another text."""
        ready = self.facts
        if not self._fingerprint and ready is not None:
            parts = (self.version, self.model_name, ready.dtype, ready.device, ready.identity)
            self._fingerprint = "fp_" + hashlib.blake2b("|".join(parts).encode(), digest_size=6).hexdigest()
        return self._fingerprint

    def why_not_ready(self) -> str | None:
        """One phrase, or None when requests are served."""
        if self.admission.draining:
            return "draining"
        if self.client.ready is None:
            return "loading"
        return "stalled" if self._is_stalled() else None

    def _is_stalled(self) -> bool:
        """Work is queued and no step came for too long."""
        if not self.admission.in_flight:
            return False
        since = max(self._last_step_s, self.admission.busy_since_s)
        limit_s = max(self.config.server.engine_stall_timeout_s, self.client.step_limit_s)
        return time.monotonic() - since > limit_s

    def check_ready(self) -> None:
        """Raise the 503 if work cannot be taken. What comes while an engine begins again waits for it."""
        reason = self.why_not_ready()
        if reason == "loading" and time.monotonic() - self._lost_s > RESTART_WAIT_S:
            raise unavailable("The model is loading.", NOT_READY_RETRY_S, "loading")
        if reason == "stalled":
            raise unavailable("The engine makes no progress.", NOT_READY_RETRY_S, "stalled")

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.model_names:
            shown, served = logs.sanitise(name), "', '".join(self.model_names)
            message = f"The model '{shown}' does not exist; this server serves '{served}'."
            raise ApiError(404, message, param="model", code="model_not_found")

    def prompt_reader(self) -> PromptReader:
        return PromptReader(
            tokenizer=self.tokenizer,
            template=self.template,
            limits=self.config.server,
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
        )

    # Work

    def check(self, body: GenerationFields) -> None:
        """All that can be refused before anything costs: readiness, model, limits."""
        self.check_ready()
        self.check_model(body.model)
        check_limits(body, self.config.server, self.vocab_size)
        self._decoding(body)

    async def generate(self, job: Job) -> Generation:
        """Admit, tokenise and submit. The caller must `release` what it gets. Raises ApiError."""
        arrival_s = time.monotonic()
        ticket = self._reserve(job)
        try:
            threads = self.rendering if job.renders else self.threads
            prompts, sampling = await threads.run(lambda: self._prepare(job))
            self.check_ready()
            generation = Generation(
                self._requests(job, prompts, sampling, arrival_s),
                self._text_options(job),
                client=self.client,
                tokenizer=self.tokenizer,
                metrics=self.metrics,
                ticket=ticket,
                outgoing=self.buffers.outgoing,
                keep_text=self.config.server.log_prompts,
                reports_drafts=bool(job.body.decoding and job.body.decoding.report),
            )
        except BaseException:
            ticket.close()
            raise
        self._active.add(generation)
        try:
            ticket.charge(sum(len(prompt.ids) for prompt in prompts))
            generation.start()
            self._log_prompts(job, prompts)
        except BaseException:
            self.release(generation)
            raise
        return generation

    def _reserve(self, job: Job) -> Ticket:
        try:
            return self.admission.reserve(job.tenant, job.num_prompts * job.num_choices)
        except Refusal as refusal:
            self.metrics.count_refused(refusal.reason)
            raise

    def release(self, generation: Generation) -> None:
        generation.close()
        self._active.discard(generation)
        for index, text in generation.texts.items():
            logs.info("output", request=generation.requests[0].request_id, index=index, text=text)

    def _prepare(self, job: Job) -> tuple[list[Prompt], SamplingParams]:
        prompts = job.read_prompts(self.prompt_reader())
        sampling = base_sampling(
            job.body,
            self.defaults,
            self.tokenizer,
            self.vocab_size,
            logprobs=job.logprobs,
            prompt_logprobs=job.prompt_logprobs,
        )
        return prompts, sampling

    def _requests(
        self, job: Job, prompts: list[Prompt], sampling: SamplingParams, arrival_s: float
    ) -> list[Request]:
        body = job.body
        requests = []
        for number, prompt in enumerate(prompts):
            max_tokens = fit_max_tokens(
                job.max_tokens,
                job.default_max_tokens,
                len(prompt.ids),
                self.max_model_len,
                job.max_tokens_param,
            )
            check_min_tokens(sampling.min_tokens, max_tokens, job.max_tokens_param)
            requests.append(
                Request(
                    request_id=f"{job.id}-{number}",
                    prompt_ids=prompt.ids,
                    sampling=replace(sampling, seed=seed_of_prompt(body), max_tokens=max_tokens),
                    num_choices=job.num_choices,
                    arrival_s=arrival_s,
                    deadline_s=self._deadline_s(arrival_s, body.timeout_s),
                    priority=body.priority or 0,
                    tenant=job.tenant,
                    cache_salt=self._cache_salt(job),
                    **self._decoding(body),
                )
            )
        return requests

    def _cache_salt(self, job: Job) -> str:
        """Under which all that requests share is kept: KV pages on every tier, earlier answers, tables of
        drafts. Where keys tell tenants apart, each has its own."""
        server = self.config.server
        tenant = job.tenant if server.api_keys and not server.tenants_share_cache else ""
        salt = job.body.cache_salt or ""
        if not (tenant or salt):
            return ""
        # Neither can spell the other's part, and a digest's length is bounded.
        return hashlib.blake2b(json.dumps([tenant, salt]).encode(), digest_size=_SALT_BYTES).hexdigest()

    def _decoding(self, body: GenerationFields) -> Decoding:
        return decoding_of(body.decoding, self.config.engine, self.facts)

    def _deadline_s(self, arrival_s: float, asked_s: float | None) -> float | None:
        waits = [wait for wait in (self.config.server.request_timeout_s, asked_s) if wait]
        return arrival_s + min(waits) if waits else None

    def _text_options(self, job: Job) -> TextOptions:
        body = job.body
        return TextOptions(
            stops=tuple(body.stop or ()),
            include_stop=body.include_stop_str_in_output or False,
            skip_special=body.skip_special_tokens is not False,
            min_tokens=body.min_tokens or 0,
            eos_token_ids=frozenset(self.defaults.eos_token_ids),
            discard_output=job.discard_output,
        )

    def _log_prompts(self, job: Job, prompts: list[Prompt]) -> None:
        if self.config.server.log_prompts:
            for number, prompt in enumerate(prompts):
                text = self.tokenizer.decode(list(prompt.ids), skip_special=False)
                logs.info("prompt", request=f"{job.id}-{number}", text=text)

    # The process

    def _on_step(self, step: StepOutput) -> None:
        self.note_ready()
        self._last_step_s = time.monotonic()
        self.metrics.on_step(step)

    def note_ready(self) -> None:
        """Tell the metrics of an engine that was not there before, or is no more."""
        ready = self.client.ready
        if ready is self._known_ready:
            return
        self._known_ready = ready
        if ready is None:
            self._lost_s = time.monotonic()
            self.metrics.on_lost()
        else:
            self._facts = ready
            self.metrics.on_ready(ready)

    async def check_template(self) -> None:
        """Say in the log, once, that chats will fail."""
        if self.template is None:
            return
        try:
            await self.rendering.run(self.template.check)
        except (TemplateError, TemplateUnavailable) as error:
            logs.log(logging.ERROR, "chat template fails", cause=str(error))

    async def drain(self) -> None:
        """Take no new work, let what runs end, and after drain_timeout_s end it with an error."""
        self.admission.draining = True
        timeout_s = self.config.server.drain_timeout_s
        logs.info("draining", sequences=self.admission.in_flight, timeout_s=timeout_s)
        if await self._idle_within(timeout_s):
            return
        logs.log(logging.WARNING, "drain timeout", sequences=self.admission.in_flight)
        self.stop_now()
        await self._idle_within(DRAIN_GRACE_S)

    def stop_now(self) -> None:
        """End whatever runs with an error."""
        self.admission.draining = True
        for generation in list(self._active):
            generation.fail(draining())

    async def _idle_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self.admission.wait_idle()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stop the engine and the template's process."""
        await self.client.close()
        if self.template is not None:
            self.template.close()

    async def report_throughput(self, interval_s: float = 10.0) -> None:
        """A line per interval in which tokens were computed. Runs until cancelled."""
        prompt = output = 0
        while True:
            await asyncio.sleep(interval_s)
            totals = self.metrics.totals
            new_prompt, new_output = totals.prompt_tokens - prompt, totals.generation_tokens - output
            prompt, output = totals.prompt_tokens, totals.generation_tokens
            if new_prompt or new_output or self.admission.in_flight:
                self._report(new_prompt / interval_s, new_output / interval_s)

    def _report(self, prompt_rate: float, output_rate: float) -> None:
        stats = self.metrics.scheduler.stats
        logs.info(
            "throughput",
            prompt_tokens_per_s=round(prompt_rate, 1),
            output_tokens_per_s=round(output_rate, 1),
            running=stats.num_running,
            waiting=stats.num_waiting,
            kv_used=round(stats.num_pages_held / max(1, stats.num_pages), 3),
            prefix_hits=round(stats.prefix_hit_tokens / max(1, stats.prefix_query_tokens), 3),
            preemptions=stats.num_preemptions,
        )


def build_service(config: Config, checkpoint: Checkpoint, client: EngineClient) -> Service:
    """Read the checkpoint's text side. Raises CheckpointError, in one line."""
    templates = load_templates(config.server, checkpoint)
    try:
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        defaults = generation_defaults(config.server, checkpoint, tokenizer)
        check_named_file(config.server, templates)
    except BaseException:
        if templates is not None:
            templates.close()
        raise
    return Service(config, tokenizer, templates, checkpoint, client, defaults)


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
