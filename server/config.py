"""Settings of the HTTP side, and the whole configuration composed of its parts.

Each field's `help` is its documentation: the command line and `--print-config` read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.config import EngineConfig

LOG_FORMATS = ("plain", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on"})
    port: int = field(default=8000, metadata={"help": "port to listen on; 0 = any free one", "max": 65535})
    uds: str = field(
        default="",
        metadata={"help": "path of a Unix socket (mode 660) to listen on, in place of host and port"},
    )
    ssl_certfile: str = field(
        default="", metadata={"help": "PEM file of the certificate and its chain; empty = no TLS"}
    )
    ssl_keyfile: str = field(
        default="", metadata={"help": "PEM file of its key; empty = it is in ssl_certfile"}
    )
    ssl_keyfile_password: str = field(
        default="", metadata={"help": "of an encrypted ssl_keyfile", "secret": True}
    )
    ssl_ca_certs: str = field(
        default="",
        metadata={"help": "PEM file of authorities: only clients with a certificate of theirs connect"},
    )
    served_model_name: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "the model's ids in the API; answers name the one that was asked for, metrics the first; "
            "none = derived from the checkpoint"
        },
    )
    api_keys: tuple[str, ...] = field(
        default=(), metadata={"help": "accepted bearer keys; none = no authentication", "secret": True}
    )
    api_key_names: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "names of the tenants, one per API key in order (keys may share one); none = key- and a "
            "hash of the key"
        },
    )
    tenants_share_cache: bool = field(
        default=False,
        metadata={
            "help": "with API keys: tenants find each other's KV pages and drafts, which is faster where "
            "prompts are alike, and lets each find out by cached_tokens, accepted drafts and timing what "
            "others have sent and got"
        },
    )
    admin_key: str = field(
        default="", metadata={"help": "bearer key of GET /debug/scheduler; empty = 404", "secret": True}
    )
    metrics_require_key: bool = field(default=False, metadata={"help": "guard /metrics by the API keys too"})
    cors_allow_origins: tuple[str, ...] = field(default=(), metadata={"help": "CORS origins; none = off"})
    cors_allow_methods: tuple[str, ...] = field(
        default=("GET", "POST", "OPTIONS"), metadata={"help": "CORS methods"}
    )
    cors_allow_headers: tuple[str, ...] = field(
        default=("*",), metadata={"help": "CORS headers; * = whichever a browser asks for"}
    )
    max_body_bytes: int = field(
        default=16 * 2**20, metadata={"help": "larger bodies are answered 413", "min": 1}
    )
    max_header_bytes: int = field(
        default=64 * 2**10,
        metadata={"help": "request line and headers, with 32 for each; more is answered 431", "min": 1024},
    )
    max_connections: int = field(
        default=4096,
        metadata={
            "help": "open connections; an idle one makes room for another, more are answered 503, but for "
            "probes (/live, /health, /metrics)",
            "min": 1,
        },
    )
    max_buffered_bytes: int = field(
        default=256 * 2**20,
        metadata={
            "help": "requests and answers in memory, over all connections: half for what arrives (more is "
            "answered 503), half for output that is not read (more ends the stream that holds the most)",
            "min": 2**16,
        },
    )
    head_timeout_s: float = field(
        default=20.0,
        metadata={"help": "time for a connection's first byte, and from there for the head", "min": 0.001},
    )
    body_timeout_s: float = field(
        default=30.0,
        metadata={
            "help": "time without a byte of a body, and after which it must average 512 bytes/s; else 408",
            "min": 0.001,
        },
    )
    keep_alive_timeout_s: float = field(
        default=75.0, metadata={"help": "time that an idle connection stays open", "min": 0.001}
    )
    send_timeout_s: float = field(
        default=120.0,
        metadata={"help": "an answer of which nothing is read for this long is cut off", "min": 0.001},
    )
    max_prompts: int = field(default=128, metadata={"help": "prompts in one completion request", "min": 1})
    max_choices: int = field(default=16, metadata={"help": "upper bound of n and best_of", "min": 1})
    max_stop_strings: int = field(default=16, metadata={"help": "strings in `stop`"})
    max_stop_chars: int = field(default=256, metadata={"help": "characters of one stop string", "min": 1})
    max_logprobs: int = field(default=20, metadata={"help": "alternatives per token in logprobs"})
    max_logit_bias: int = field(default=1024, metadata={"help": "entries in logit_bias"})
    max_bad_words: int = field(default=64, metadata={"help": "entries in bad_words"})
    max_stop_token_ids: int = field(default=128, metadata={"help": "entries in stop_token_ids"})
    max_messages: int = field(default=4096, metadata={"help": "messages in one chat request"})
    max_chars_per_token: int = field(
        default=128,
        metadata={
            "help": "a prompt with more characters than this times the context is not even tokenised",
            "min": 1,
        },
    )
    max_json_depth: int = field(
        default=64, metadata={"help": "arrays and objects within each other in a body", "min": 4, "max": 200}
    )
    max_waiting_text_jobs: int = field(
        default=1024,
        metadata={"help": "large bodies, /tokenize and /detokenize that wait for a thread; more = 429"},
    )
    max_tokenize_chars: int = field(default=2**20, metadata={"help": "characters of text in /tokenize"})
    num_text_threads: int = field(
        default=2,
        metadata={"help": "threads that render and tokenise prompts beside the event loop", "min": 1},
    )
    max_template_output_chars: int = field(
        default=4 * 2**20, metadata={"help": "characters a chat template may produce", "min": 1}
    )
    template_timeout_s: float = field(
        default=1.0, metadata={"help": "time a chat template may take", "min": 0.001}
    )
    chat_template: str = field(
        default="", metadata={"help": "Jinja file that replaces the model's own chat templates"}
    )
    generation_config: str = field(
        default="model",
        metadata={
            "help": "defaults of sampling: model = the model's own, none = OpenAI's, else a "
            "generation_config.json or its folder"
        },
    )
    override_generation_config: str = field(
        default="",
        metadata={
            "help": "JSON object of such defaults that precede the others: temperature, top_p, top_k, min_p, "
            "typical_p, repetition_penalty, max_new_tokens (of a chat), eos_token_id (one or a list)"
        },
    )
    request_timeout_s: float = field(
        default=600.0, metadata={"help": "deadline of a request; 0 = none. A request may ask for less"}
    )
    max_tenant_requests: int = field(
        default=0,
        metadata={
            "help": "sequences of one tenant (API key, else `user`) in flight, queued or running; more are "
            "answered 429; 0 = no limit"
        },
    )
    tenant_tokens_per_minute: int = field(
        default=0,
        metadata={
            "help": "prompt and output tokens of one tenant per minute; more are answered 429; 0 = no limit",
            "max": 10**12,
        },
    )
    drain_timeout_s: float = field(
        default=30.0, metadata={"help": "time that running requests get after SIGTERM"}
    )
    engine_start_timeout_s: float = field(
        default=600.0,
        metadata={"help": "time in which the engine's start must get on; loading weights does", "min": 0.001},
    )
    engine_stall_timeout_s: float = field(
        default=120.0,
        metadata={
            "help": "no step for this long with work queued = not ready, and the engine is started again; "
            "ten times what a step is predicted to take, where that is longer",
            "min": 0.001,
        },
    )
    max_engine_restarts: int = field(
        default=3,
        metadata={
            "help": "engine deaths in a row that are survived, if between them no request gets on and none "
            "is found to be the cause; a hundred times as many where somebody kills it",
        },
    )
    sse_keep_alive_s: float = field(
        default=15.0,
        metadata={"help": "comment on a silent stream, before which its status is sent; 0 = off"},
    )
    log_format: str = field(default="plain", metadata={"help": "plain or json", "choices": LOG_FORMATS})
    log_level: str = field(
        default="info", metadata={"help": "debug, info, warning or error", "choices": LOG_LEVELS}
    )
    log_prompts: bool = field(default=False, metadata={"help": "write prompts and outputs to the log"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    server: ServerConfig = field(default_factory=ServerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
