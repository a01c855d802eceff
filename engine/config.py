"""Settings of the engine process: what to load, where, and how much memory it may take."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.config import SchedulerConfig

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "bfloat16", "float16", "float32")
DECODING_METHODS = ("autoregressive", "speculative")
DRAFTERS = (
    "auto", "prompt_lookup", "past_outputs", "recycling", "lookahead", "skipped_layers",
    "model", "pard", "eagle", "mtp", "medusa", "dflash",
)  # fmt: skip
DRAFT_OVERLAPS = ("auto", "on", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    model: str = field(
        default="",
        metadata={"help": "folder, .gguf file or hub name; empty = the embedded SmolLM2-135M-Instruct"},
    )
    revision: str = field(default="", metadata={"help": "hub revision; empty = main"})
    lora: str = field(
        default="", metadata={"help": "folder of a PEFT LoRA adapter, merged into the weights; empty = none"}
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda", "choices": DEVICES})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "auto (bfloat16 where the device has it), bfloat16, float16, float32",
            "choices": DTYPES,
        },
    )
    num_threads: int = field(default=0, metadata={"help": "CPU threads for arithmetic; 0 = every core"})
    max_model_len: int = field(
        default=0, metadata={"help": "tokens a sequence may have, prompt and output; 0 = the model's own"}
    )
    kv_cache_bytes: int = field(
        default=0, metadata={"help": "memory for KV pages; 0 = a share of what is free"}
    )
    host_cache_bytes: int = field(
        default=0,
        metadata={"help": "host memory for KV pages that leave the device; 0 = none", "min": 0},
    )
    disk_cache_bytes: int = field(
        default=0,
        metadata={"help": "disk space for KV pages that leave host memory; 0 = none", "min": 0},
    )
    disk_cache_path: str = field(default="", metadata={"help": "the file for them; empty = in state_folder"})
    state_folder: str = field(
        default="",
        metadata={
            "help": "where learned output lengths and measured costs are kept; empty = the user's cache "
            "folder; - = nowhere"
        },
    )
    costs: str = field(
        default="",
        metadata={
            "help": "what steps cost: empty = measured at the first start and kept; measure = measured anew; "
            "else a machine file, as in configs/machines"
        },
    )
    decoding: str = field(
        default="autoregressive",
        metadata={
            "help": "how requests are decoded that do not say: autoregressive, or speculative, which gives "
            "the same text in fewer steps where drafts pay",
            "choices": DECODING_METHODS,
        },
    )
    drafter: str = field(
        default="auto",
        metadata={
            "help": "who drafts for requests that do not say: auto (whichever is expected to gain most), "
            "prompt_lookup (the request's own text), past_outputs (earlier answers), "
            "recycling (what followed a token last), lookahead (Jacobi iterations), "
            "skipped_layers (the model with fewer layers); and as draft_model has them model, pard, eagle, "
            "mtp, medusa, dflash",
            "choices": DRAFTERS,
        },
    )
    draft_model: str = field(
        default="",
        metadata={
            "help": "weights that draft: folders, .gguf files or hub names, separated by commas; mtp = the "
            "heads in the model's own checkpoint; empty = none"
        },
    )
    draft_overlap: str = field(
        default="auto",
        metadata={
            "help": "whether a draft model goes on while the model verifies: auto (on CUDA; on a CPU where "
            "num_threads leaves cores, which it takes), on, off",
            "choices": DRAFT_OVERLAPS,
        },
    )
    draft_store_bytes: int = field(
        default=0,
        metadata={
            "help": "memory for what prompt_lookup, past_outputs and recycling remember, set aside before KV "
            "pages are; 0 = a sixteenth of what is free, at most 640 MiB",
            "min": 0,
        },
    )
    max_draft_tokens: int = field(
        default=0, metadata={"help": "drafts per sequence and step; 0 = as many as pay", "min": 0}
    )
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
