"""No field is dropped that would have changed the answer: kept, harmless, or a 400 that names it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessage, ParsedChatCompletionMessage

from server.errors import ApiError
from server.wire import body as wire_body
from server.wire.body import WireModel, validate
from server.wire.decoding import DecodingFields, LossyFields
from server.wire.fields import StreamOptions
from server.wire.requests import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
    Tool,
    ToolCall,
)
from tests.server.http.conftest import MODEL, Running, running
from tests.server.http.test_bad_input import check_envelope

if TYPE_CHECKING:
    from collections.abc import Iterator

USER = {"role": "user", "content": "hi"}
SMALLEST: dict[type[WireModel], dict[str, Any]] = {
    CompletionRequest: {"prompt": "hi"},
    ChatRequest: {"messages": [USER]},
}
PATHS = {CompletionRequest: "/v1/completions", ChatRequest: "/v1/chat/completions"}

# Names of request fields as of 2026-11-30: of the openai package 3.57 (completion_create_params.py); of vLLM
# 002032ee (entrypoints/openai/{completion,chat_completion}/protocol.py) and those of 0.10 that it replaced;
# of SGLang 004c82e0 (srt/entrypoints/openai/protocol.py); of llama.cpp 0177c342 (server-schema.cpp), which
# takes all of its own on both routes.
OPENAI_SHARED = """
    model n stop stream stream_options temperature top_p max_tokens presence_penalty frequency_penalty
    logit_bias logprobs seed user
"""
OPENAI_COMPLETIONS = "prompt suffix echo best_of"
OPENAI_CHAT = """
    messages audio function_call functions max_completion_tokens metadata modalities moderation
    parallel_tool_calls prediction prompt_cache_key prompt_cache_options prompt_cache_retention
    reasoning_effort response_format safety_identifier service_tier store tool_choice tools top_logprobs
    verbosity web_search_options
"""
VLLM_SHARED = """
    use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids
    include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
    truncate_prompt_tokens truncation_side allowed_token_ids prompt_logprobs logprob_token_ids bad_words
    echo add_special_tokens response_format structured_outputs priority request_id session_id
    return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets
    return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection
    thinking_token_budget stream_interval best_of logits_processors guided_json guided_regex guided_choice
    guided_grammar guided_decoding_backend guided_whitespace_pattern
"""
VLLM_COMPLETIONS = "prompt_embeds"
VLLM_CHAT = """
    reasoning_effort include_reasoning add_generation_prompt continue_final_message documents
    chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs return_prompt_text
"""
SGLANG_SHARED = """
    return_hidden_states return_routed_experts routed_experts_start_len return_cached_tokens_details
    return_token_ids top_k min_p min_tokens regex ebnf repetition_penalty stop_token_ids stop_regex
    no_stop_trim ignore_eos skip_special_tokens lora_path session_id session_params response_format
    custom_params custom_logit_processor images_config bootstrap_host bootstrap_port bootstrap_room
    routed_dp_rank disagg_prefill_dp_rank data_parallel_rank rid extra_key cache_salt ngram_corpus_id
    priority
"""
SGLANG_COMPLETIONS = "best_of echo suffix json_schema custom_labels"
SGLANG_CHAT = """
    return_prompt_token_ids return_meta_info reasoning_effort task continue_final_message
    separate_reasoning stream_reasoning chat_template_kwargs max_dynamic_patch min_dynamic_patch
    use_audio_in_video input_ids
"""
LLAMA_CPP_SHARED = """
    verbose timings_per_token cache_prompt return_tokens return_progress sse_ping_interval n_predict
    n_indent n_keep n_discard n_cmpl n_cache_reuse t_max_predict_ms response_fields top_n_sigma
    xtc_probability xtc_threshold typical_p dynatemp_range dynatemp_exponent repeat_last_n repeat_penalty
    dry_multiplier dry_base dry_allowed_length dry_penalty_last_n mirostat mirostat_tau mirostat_eta
    adaptive_target adaptive_decay n_probs min_keep backend_sampling post_sampling_probs lora
    dry_sequence_breakers json_schema grammar grammar_type grammar_lazy preserved_tokens grammar_triggers
    reasoning_control reasoning_budget_tokens reasoning_budget_start_tag reasoning_budget_end_tags
    reasoning_budget_end_tag reasoning_budget_message samplers id_slot
"""
LLAMA_CPP_CHAT = """
    chat_format reasoning_format generation_prompt parse_tool_calls chat_parser thinking_forced_open
    add_generation_prompt chat_template_kwargs
"""
SENT = {
    CompletionRequest: [
        *(OPENAI_SHARED + OPENAI_COMPLETIONS + VLLM_SHARED + VLLM_COMPLETIONS).split(),
        *(SGLANG_SHARED + SGLANG_COMPLETIONS + LLAMA_CPP_SHARED).split(),
    ],
    ChatRequest: [
        *(OPENAI_SHARED + OPENAI_CHAT + VLLM_SHARED + VLLM_CHAT).split(),
        *(SGLANG_SHARED + SGLANG_CHAT + LLAMA_CPP_SHARED + LLAMA_CPP_CHAT).split(),
    ],
}
MODELS = [
    CompletionRequest,
    ChatRequest,
    TokenizeTextRequest,
    TokenizeChatRequest,
    DetokenizeRequest,
    DecodingFields,
    LossyFields,
    StreamOptions,
    ChatMessage,
    Tool,
    ToolCall,
]


def refusal(value: dict[str, Any], model: type[WireModel]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        validate(value, model)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize("model", SMALLEST)
def test_something_is_decided_of_every_field_that_other_servers_take(model: type[WireModel]) -> None:
    assert set(SENT[model]) - wire_body._own_names(model) - model.FOREIGN.names == set()


@pytest.mark.parametrize("model", MODELS)
def test_no_field_stands_in_two_lists(model: type[WireModel]) -> None:
    own, foreign = wire_body._own_names(model), model.FOREIGN
    assert not own & foreign.names
    assert not foreign.harmless & set(foreign.refused)


@pytest.mark.parametrize("model", SMALLEST)
@pytest.mark.parametrize("value", ["wanted", 17, ["wanted"], {"wanted": 1}], ids=str)
def test_a_field_that_asks_for_what_is_not_there_is_refused(model: type[WireModel], value: object) -> None:
    for name in model.FOREIGN.refused:
        error = refusal({**SMALLEST[model], name: value}, model)
        assert (error.param, error.code) == (name, "unsupported_parameter")
        assert name in error.message


@pytest.mark.parametrize("model", SMALLEST)
def test_a_field_that_asks_for_nothing_is_taken(model: type[WireModel]) -> None:
    for name, refused in model.FOREIGN.refused.items():
        for value in (None, *refused.neutral):
            assert validate({**SMALLEST[model], name: value}, model).ignored == (), name


@pytest.mark.parametrize("model", SMALLEST)
def test_harmless_fields_are_taken_whatever_they_hold(model: type[WireModel]) -> None:
    for value in (True, 0, "x", [1], {"a": {}}):
        fields = dict.fromkeys(model.FOREIGN.harmless, value)
        assert set(validate({**SMALLEST[model], **fields}, model).ignored) == model.FOREIGN.harmless


@pytest.mark.parametrize("model", SMALLEST)
def test_null_asks_for_nothing_within_an_object_too(model: type[WireModel]) -> None:
    """SDKs that send all that they know of wrote a json_schema of null beside the type, and were refused."""
    empty: list[dict[str, Any]] = [
        {"response_format": {"type": "text", "json_schema": None}},
        {"structured_outputs": {"json": None, "regex": None, "choice": None}},
    ]
    for fields in empty:
        assert validate({**SMALLEST[model], **fields}, model).ignored == ()


@pytest.mark.parametrize(
    ("model", "field", "said"),
    [
        (ChatRequest, {"structured_outputs": {"regex": "a"}}, "check what comes. Leave it out, or send {}."),
        (ChatRequest, {"mirostat": 2}, "typical_p are. Leave it out, or send 0."),
        (ChatRequest, {"function_call": {"name": "f"}}, 'Leave it out, or send "none" or "auto".'),
        (ChatRequest, {"reasoning_effort": "low"}, "reasoning_effort: how a model thinks is said by"),
        (ChatRequest, {"options": {"seed": 1}}, "options: its fields belong beside the others"),
        (ChatRequest, {"extra_body": {"guided_json": {}}}, "extra_body: its fields belong beside the others"),
        (CompletionRequest, {"reasoning_effort": "low"}, "chats have it, at /v1/chat/completions"),
        (CompletionRequest, {"inputs": "a"}, "inputs: the field is prompt."),
    ],
    ids=str,
)
def test_a_refusal_names_the_field_first_and_reads_well(
    model: type[WireModel], field: dict[str, Any], said: str
) -> None:
    (name,) = field
    message = refusal({**SMALLEST[model], **field}, model).message
    assert message.startswith(f"{name}: ")
    assert said in message


def test_no_alternatives_need_no_log_probabilities(server: Running) -> None:
    """vLLM's clients send its default of 0 whether they want log-probabilities or not."""
    for body in ({"top_logprobs": 0}, {"top_logprobs": 0, "logprobs": False}):
        response = server.post("/v1/chat/completions", {"messages": [USER], "max_tokens": 1, **body})
        assert response.status_code == 200


def test_true_is_not_one() -> None:
    assert refusal({**SMALLEST[ChatRequest], "use_beam_search": 0}, ChatRequest).param == "use_beam_search"
    assert refusal({**SMALLEST[ChatRequest], "mirostat": False}, ChatRequest).param == "mirostat"


CONSTRAINTS: list[dict[str, Any]] = [
    {"guided_choice": ["yes", "no"]},
    {"guided_regex": "[0-9]{4}"},
    {"structured_outputs": {"regex": "[0-9]{4}"}},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
    {"json_schema": {}},
    {"regex": "[0-9]{4}"},
    {"ebnf": "root ::= [0-9]"},
    {"grammar": "root ::= [0-9]"},
    {"use_beam_search": True},
    {"truncate_prompt_tokens": 5},
]


@pytest.mark.parametrize("path", PATHS.values())
@pytest.mark.parametrize("fields", CONSTRAINTS, ids=str)
def test_who_asks_for_digits_does_not_get_prose(server: Running, path: str, fields: dict[str, Any]) -> None:
    smallest = next(SMALLEST[model] for model in SMALLEST if PATHS[model] == path)
    before = len(server.engine.requests)
    response = server.post(path, {**smallest, **fields})
    assert response.status_code == 400
    assert check_envelope(response.json())["param"] == next(iter(fields))
    assert len(server.engine.requests) == before


@pytest.mark.parametrize(
    "fields", [{"modalities": ["text", "audio"]}, {"echo": True}, {"add_special_tokens": True}]
)
def test_what_chats_do_not_have_is_refused(server: Running, fields: dict[str, Any]) -> None:
    response = server.post("/v1/chat/completions", {"messages": [USER], **fields})
    assert check_envelope(response.json())["param"] == next(iter(fields))


@pytest.mark.parametrize(
    ("model", "sent", "hint"),
    [
        (CompletionRequest, "max_token", "max_tokens"),
        (CompletionRequest, "temprature", "temperature"),
        (CompletionRequest, "guided_jsn", "guided_json"),
        (ChatRequest, "topK", "top_k"),
        (ChatRequest, "maxTokens", "max_tokens"),
        (ChatRequest, "metdata", "metadata"),
        (ChatRequest, "ignored", ""),
        (CompletionRequest, "nvext", ""),
        (ChatRequest, "zz", ""),
    ],
)
def test_a_misspelt_field_is_refused_with_the_nearest_name(
    model: type[WireModel], sent: str, hint: str
) -> None:
    error = refusal({**SMALLEST[model], sent: None}, model)
    assert (error.param, error.code) == (sent, "unknown_parameter")
    assert ("did you mean" in error.message) == bool(hint)
    assert error.message.endswith(f"did you mean {hint}?" if hint else "not known")


NESTED: list[tuple[dict[str, Any], str]] = [
    ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages"),
    ({"messages": [{**USER, "contents": "x"}]}, "messages.0.contents"),
    ({"messages": [USER, {**USER, "audio": {"id": "a"}}]}, "messages.1.audio"),
    ({"messages": [{**USER, "function_call": {"name": "f"}}]}, "messages.0.function_call"),
    ({"messages": [{**USER, "prefix": True}]}, "messages.0.prefix"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "tex": "b"}]}]},
        "messages.0.content.0.tex",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0.image_url",
    ),
    (
        {"messages": [{**USER, "tool_calls": [{"function": {"name": "f", "args": {}}}]}]},
        "messages.0.tool_calls.0.function.args",
    ),
    (
        {"messages": [{**USER, "tool_calls": [{"function": {"name": "f"}, "kind": "x"}]}]},
        "messages.0.tool_calls.0.kind",
    ),
]


@pytest.mark.parametrize(("body", "param"), NESTED, ids=[param for _, param in NESTED])
def test_fields_within_fields_are_as_strict(server: Running, body: dict[str, Any], param: str) -> None:
    error = check_envelope(server.post("/v1/chat/completions", {"messages": [USER], **body}).json())
    assert error["param"] == param
    assert param in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": "x", "add_special_token": False}, "add_special_token"),
        ("/tokenize", {"content": "x"}, "content"),
        ("/tokenize", {"messages": [USER], "add_generation_promt": False}, "add_generation_promt"),
        ("/tokenize", {"messages": [USER], "return_tokens_strs": True}, "return_tokens_strs"),
        ("/detokenize", {"tokens": [97], "skip_special_tokens": True}, "skip_special_tokens"),
    ],
)
def test_requests_about_tokens_are_as_strict(
    server: Running, path: str, body: dict[str, Any], param: str
) -> None:
    assert check_envelope(server.post(path, body).json())["param"] == param


def test_a_hostile_name_is_one_printable_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("octavo").propagate = True
    with caplog.at_level(logging.INFO, "octavo"), running() as server:
        for name in ("a\r\nset-cookie: x", "é" * 2000):
            response = server.post("/v1/completions", {"prompt": "x", name: 1})
            assert response.status_code == 400
            assert len(response.content) < 2000
    shown = [record.fields["param"] for record in caplog.records if "param" in getattr(record, "fields", {})]
    assert shown[0] == "a??set-cookie: x"
    assert len(shown[1]) <= 201


def test_harmless_fields_leave_no_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("octavo").propagate = True
    with caplog.at_level(logging.INFO, "octavo"), running() as server:
        server.complete(max_tokens=1, store=True, metadata={"a": "b"}, service_tier="auto", priority=3)
    assert not [record for record in caplog.records if record.getMessage() == "ignored fields"]


# Whole answers sent back

ANSWERED: dict[str, dict[str, Any]] = {
    "openai": ChatCompletionMessage(role="assistant", content="ok").model_dump(),
    "openai, parsed": ParsedChatCompletionMessage[Any](
        role="assistant", content="{}", annotations=[], parsed={"a": 1}
    ).model_dump(),
    "litellm": {
        "role": "assistant",
        "content": "ok",
        "tool_calls": None,
        "function_call": None,
        "provider_specific_fields": {"refusal": None},
        "annotations": [],
        "images": [],
        "thinking_blocks": None,
        "reasoning_content": "well",
    },
    "a call": {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "index": 0,
                "function": {"name": "f", "arguments": "{}", "parsed_arguments": {}},
            }
        ],
    },
    "vllm": {"role": "assistant", "content": "ok", "reasoning": None, "audio": None, "refusal": None},
}


@pytest.mark.parametrize("message", ANSWERED.values(), ids=ANSWERED)
def test_an_answer_is_taken_back_with_all_its_fields(server: Running, message: dict[str, Any]) -> None:
    body = {"messages": [USER, message, USER], "max_tokens": 1}
    assert server.post("/v1/chat/completions", body).status_code == 200
    assert server.post("/tokenize", {"messages": [USER, message]}).status_code == 200


@pytest.fixture
def sdk(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_sdks_own_message_goes_round(sdk: openai.OpenAI) -> None:
    first = sdk.chat.completions.create(model=MODEL, messages=[USER], max_tokens=3, logprobs=True)  # type: ignore[list-item]
    for message in (first.choices[0].message, first.choices[0].message.model_dump()):
        again = sdk.chat.completions.create(model=MODEL, messages=[USER, message, USER], max_tokens=3)  # type: ignore[list-item]
        assert again.choices[0].message.content == "abc"
