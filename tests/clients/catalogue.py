"""The clients that `make clients` tries, and the calls that it tries with them: data alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Client:
    name: str
    packages: tuple[str, ...]  # as pip or npm take them; the first is the one whose version is told
    script: str  # in scripts/; its ending says in what language
    needs_torch: bool = False  # then torch is installed first, by docker/install.sh

    @property
    def in_node(self) -> bool:
        return self.script.endswith(".mjs")


@dataclass(frozen=True)
class Call:
    name: str
    meaning: str
    refusal: str = ""  # how Octavo refuses it, where it does


CLIENTS = (
    Client("openai", ("openai==3.57.0",), "use_openai.py"),
    Client("openai-node", ("openai@6.49.0",), "use_openai.mjs"),
    Client("anthropic", ("anthropic==2.14.0",), "use_anthropic.py"),
    Client("langchain-openai", ("langchain-openai==1.7.4",), "use_langchain.py"),
    Client("litellm", ("litellm==1.110.2",), "use_litellm.py"),
    Client("instructor", ("instructor==1.17.0",), "use_instructor.py"),
    Client("pydantic-ai", ("pydantic-ai-slim[openai]==2.68.0",), "use_pydantic_ai.py"),
    Client("llama-index", ("llama-index-llms-openai-like==0.8.1",), "use_llama_index.py"),
    Client("outlines", ("outlines[openai]==1.3.3",), "use_outlines.py"),
    Client("lm-eval", ("lm-eval[api]==0.4.13", "transformers==5.24.0"), "use_lm_eval.py"),
    Client("guidellm", ("guidellm==0.8.1",), "use_guidellm.py", needs_torch=True),
    Client("haystack", ("haystack-ai==3.4.1",), "use_haystack.py"),
    Client("smolagents", ("smolagents[openai]==1.26.0",), "use_smolagents.py"),
    Client("dspy", ("dspy==3.4.1",), "use_dspy.py"),
    Client("semantic-kernel", ("semantic-kernel==1.45.0",), "use_semantic_kernel.py"),
    Client("ai-sdk", ("ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7"), "use_ai_sdk.mjs"),
    Client("langchain-js", ("@langchain/openai@1.5.8", "@langchain/core@1.4.0"), "use_langchain.mjs"),
)

CALLS = (
    Call("chat", "system and user message, greedy: text, why it ended, tokens counted"),
    Call("stream", "the same request streamed: the same text"),
    Call("async", "the client's asynchronous calls, several at a time"),
    Call("completions", "a plain prompt; where the client takes them, several"),
    Call("logprobs", "log-probabilities of the text with alternatives"),
    Call("n", "several choices, which differ"),
    Call("stop", "a stop string ends the text and is not in it"),
    Call("seed", "the same seed gives the same text, another seed another"),
    Call("stream_usage", "tokens counted at the end of a stream"),
    Call("tools_auto", "tools, and the model may choose: its text comes back as it is"),
    Call("tool_choice", "a call of a tool is demanded", "400 that names `tool_choice` (or `tools`)"),
    Call("json_schema", "text that follows a JSON schema", "400 that names `response_format`"),
    Call("constraint", "a pattern or choice in vLLM's fields", "400 that names `structured_outputs`"),
    Call("embeddings", "POST /v1/embeddings", "404 `unknown_route`"),
    Call("responses", "POST /v1/responses", "404 `unknown_route`"),
    Call("messages", "POST /v1/messages, Anthropic's", "404 `unknown_route`"),
    Call("models", "the list of models"),
    Call("wrong_model", "404 as the client's own error"),
    Call("wrong_key", "401 as the client's own error"),
    Call("timeout", "the client's own timeout, after which the server answers as before"),
    Call("disconnect", "a stream that is left, after which the server answers as before"),
    Call("large_prompt", "a prompt of over 2,000 tokens"),
    Call("too_large", "a prompt beyond the context: 400 as the client's own error"),
)

# Nothing is asked of hosts elsewhere, and nothing is told to them.
ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "DSPY_DISABLE_TELEMETRY": "1",
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "AI_SDK_LOG_WARNINGS": "false",
    "DO_NOT_TRACK": "1",
    "NO_PROXY": "127.0.0.1",
    "PYTHONUNBUFFERED": "1",
}
