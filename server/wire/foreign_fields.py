"""What is made of the fields that clients send and this server does not have: the only place that says it.

OpenAI, vLLM, SGLang, llama.cpp, TGI, Ollama and their clients each have fields of their own. One that cannot
change what the answer holds is harmless, and ignored. Any other is refused, for a client that asks for digits
and gets prose with a 200 is worse off than one that gets an error; only values by which it asks for nothing
are taken, null always. A name that stands nowhere is a mistake, and refused as well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Refused:
    """Why, and what to do instead. `neutral`: values that ask for nothing, and are taken."""

    reason: str
    neutral: tuple[Any, ...] = ()

    def asks_nothing(self, value: Any) -> bool:
        if isinstance(value, dict):  # clients send all that they know of, most of it null
            value = {name: item for name, item in value.items() if item is not None}
        return value is None or any(_same(value, neutral) for neutral in self.neutral)

    def __str__(self) -> str:
        taken = " or ".join(json.dumps(value) for value in self.neutral)
        return f"{self.reason} Leave it out, or send {taken}." if taken else self.reason


@dataclass(frozen=True, slots=True)
class ForeignFields:
    """Of one object of the API."""

    harmless: frozenset[str] = frozenset()
    refused: Mapping[str, Refused] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def names(self) -> frozenset[str]:
        return self.harmless.union(self.refused)


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON: true is not 1."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _all(reason: str, **neutral: tuple[Any, ...]) -> dict[str, Refused]:
    """Fields that are refused for one reason, each with its neutral values."""
    return {name: Refused(reason, values) for name, values in neutral.items()}


# What both generating routes may be sent.

_ACCOUNTING = """
    store metadata service_tier safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options
    request_id rid session_id custom_labels keep_alive
"""
_SPEED_AND_PLACE = """
    prediction cache_prompt n_cache_reuse skip_reading_prefix_cache ngram_corpus_id id_slot backend_sampling
    routed_dp_rank disagg_prefill_dp_rank data_parallel_rank
"""
_DELIVERY_AND_FIGURES = """
    stream_interval sse_ping_interval return_progress timings_per_token return_cached_tokens_details
    return_mm_kwargs verbose
"""
# Each means something beside another field alone, which is refused where it asks for anything; the spaces
# between special tokens, beside slow tokenisers, which are not here.
_COMPANIONS = """
    guided_decoding_backend guided_decoding_disable_fallback guided_decoding_disable_any_whitespace
    guided_decoding_disable_additional_properties guided_whitespace_pattern truncation_side n_keep n_discard
    spaces_between_special_tokens routed_experts_prompt_start routed_experts_start_len custom_params
    dynatemp_exponent dynatemp_low dynatemp_high smoothing_curve xtc_threshold mirostat_tau mirostat_eta
    dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers adaptive_decay
    reasoning_budget_start_tag reasoning_budget_end_tag reasoning_budget_end_tags reasoning_budget_message
    mm_processor_kwargs media_io_kwargs images_config max_dynamic_patch min_dynamic_patch use_audio_in_video
"""
_HARMLESS = frozenset((_ACCOUNTING + _SPEED_AND_PLACE + _DELIVERY_AND_FIGURES + _COMPANIONS).split())

_REFUSED = {
    **_all(
        "an answer cannot be held to a form yet: say the form in the prompt, and check what comes.",
        response_format=({"type": "text"},),
        structured_outputs=({},),
        guided_json=(),
        guided_json_object=(False,),
        guided_regex=(),
        guided_choice=(),
        guided_grammar=(),
        json_schema=(),
        regex=(),
        ebnf=(),
        grammar=("",),
        grammar_type=("",),
        grammar_lazy=(False,),
        grammar_triggers=([],),
        preserved_tokens=([],),
        format=("",),
        n_indent=(0,),
    ),
    **_all(
        "this sampler is not here; temperature, top_p, top_k, min_p and typical_p are.",
        top_a=(0,),
        tfs=(1,),
        tfs_z=(1,),
        top_n_sigma=(-1, 0),
        nsigma=(0,),
        epsilon_cutoff=(0,),
        eta_cutoff=(0,),
        xtc_probability=(0,),
        mirostat=(0,),
        mirostat_mode=(0,),
        dynamic_temperature=(False,),
        dynatemp_range=(0,),
        dynatemp_min=(0,),
        dynatemp_max=(0,),
        smoothing_factor=(0,),
        skew=(0,),
        adaptive_target=(-1,),
        min_keep=(0,),
        samplers=(),
        sampler_order=(),
        sampler_priority=(),
        temperature_last=(False,),
        watermark=(False,),
        watermarking=(False,),
        custom_logit_processor=("",),
        logits_processors=([],),
        vllm_xargs=({},),
    ),
    **_all(
        "this penalty is not here; repetition_penalty, presence_penalty and frequency_penalty are, over the "
        "whole text.",
        repeat_penalty=(1,),
        repeat_last_n=(-1,),
        repetition_penalty_range=(0,),
        no_repeat_ngram_size=(0,),
        encoder_repetition_penalty=(1,),
        penalty_alpha=(0,),
        penalize_nl=(False,),
        dry_multiplier=(0,),
        repetition_detection=(),
    ),
    **_all(
        "beams are not searched: n draws several texts, and best_of of a completion ranks them.",
        use_beam_search=(False,),
        length_penalty=(1,),
        early_stopping=(False,),
        num_beams=(1,),
    ),
    **_all("the field is max_tokens.", n_predict=(), num_predict=(), max_new_tokens=(), max_length=()),
    **_all("the field is n.", n_cmpl=(1,)),
    **_all("a temperature of 0 is greedy.", do_sample=(True,)),
    **_all("the fields are logprobs and top_logprobs.", n_probs=(0,), top_n_tokens=(0,), details=(False,)),
    **_all(
        "log-probabilities are those before sampling, of the likeliest tokens.",
        post_sampling_probs=(False,),
        logprob_token_ids=(),
    ),
    **_all("the field is prompt_logprobs.", decoder_input_details=(False,)),
    **_all("the fields are stop and stop_token_ids.", stop_regex=([], ""), stop_sequences=([],)),
    **_all("the field is include_stop_str_in_output.", no_stop_trim=(False,)),
    **_all("the field is ignore_eos.", ban_eos_token=(False,)),
    **_all("the field is bad_words.", custom_token_bans=("",), banned_tokens=([],), banned_strings=([],)),
    **_all("the field is timeout_s.", t_max_predict_ms=(-1, 0), t_max_prompt_ms=(-1, 0), max_time=()),
    **_all("the field is cache_salt.", extra_key=("",)),
    **_all("the field is add_special_tokens.", add_bos_token=(True,)),
    **_all(
        "a prompt is not cut; the sizes are in the error where one is too long, and /tokenize counts.",
        truncate_prompt_tokens=(),
        truncate=(),
        truncation_length=(),
    ),
    **_all("the context is that of the server's max_model_len.", num_ctx=()),
    **_all(
        "its fields belong beside the others, named as in OpenAI's API.",
        options=({},),
        parameters=({},),
        sampling_params=({},),
        extra_body=({},),
    ),
    **_all(
        "an adapter is merged when the server starts, by its setting lora.",
        lora=([],),
        lora_path=("", []),
        adapter_id=("",),
    ),
    **_all(
        "the answer cannot hold that. return_token_ids gives the ids of the prompt and of the text.",
        return_tokens=(False,),
        return_hidden_states=(False,),
        return_routed_experts=(False,),
        return_token_offsets=(False,),
        return_prompt_text=(False,),
        return_prompt_token_ids=(False,),
        return_meta_info=(False,),
        return_full_text=(False,),
        response_fields=([],),
        detokenize=(True,),
    ),
    **_all(
        "KV is not taken from another server, nor handed to one.",
        kv_transfer_params=({},),
        ec_transfer_params=({},),
        bootstrap_host=(),
        bootstrap_port=(),
        bootstrap_room=(),
    ),
    **_all("sessions are not kept: send the whole prompt, whose beginning is cached.", session_params=({},)),
    **_all(
        "thoughts are part of the text, and not bounded apart: max_tokens bounds both.",
        thinking_token_budget=(-1,),
        thinking_budget=(),
        reasoning_budget=(-1,),
        reasoning_budget_tokens=(-1,),
        reasoning_control=(False,),
        thinking_forced_open=(False,),
    ),
    **_all("this model reads text alone.", image_data=([],), images=([],), prompt_embeds=()),
    **_all("guidance by a second prompt is not here.", guidance_scale=(1,), negative_prompt=("",)),
    **_all("text is not moderated.", moderation=()),
}

CHAT = ForeignFields(
    _HARMLESS.union({"parallel_tool_calls", "stream_reasoning", "separate_reasoning"}),
    _REFUSED
    | _all("chats take messages.", prompt=(), input_ids=(), suffix=("",), system_prompt=("",))
    | _all("the chat template puts special tokens in.", add_special_tokens=(False,))
    | _all("the answer alone is given back: /tokenize shows the prompt.", echo=(False,))
    | _all("best_of is of completions.", best_of=(1,))
    | _all(
        "tools took its place: the fields are tools and tool_choice.",
        functions=([],),
        function_call=("none", "auto"),
    )
    | _all(
        "calls of tools are not parsed yet: the answer is the text.",
        parse_tool_calls=(False,),
        chat_parser=("",),
        chat_format=(),
        tool_prompt=("",),
    )
    | _all("this model writes text alone.", modalities=(["text"],), audio=())
    | _all(
        "nothing is searched: put what was found into the messages.", web_search_options=(), data_sources=()
    )
    | _all("a chat template is the server's, by its setting chat_template.", chat_template=())
    | _all(
        "how a model thinks is said by variables of its chat template, where it has any: "
        'chat_template_kwargs, as {"enable_thinking": false} or {"reasoning_effort": "low"}.',
        reasoning_effort=(),
        reasoning=(),
        thinking=(),
        enable_thinking=(),
        think=(),
        task=(),
    )
    | _all(
        "thoughts are not told from the text: they come in it.",
        include_reasoning=(True,),
        reasoning_format=("none", "auto"),
    )
    | _all("say in the messages how long answers shall be.", verbosity=("medium",))
    | _all("say it in the messages.", guideline=("",), generation_prompt=("",)),
)
COMPLETION = ForeignFields(
    _HARMLESS,
    _REFUSED
    | _all(
        "the model cannot fill in the middle.",
        suffix=("",),
        input_prefix=("",),
        input_suffix=("",),
        input_extra=([],),
    )
    | _all("the field is prompt.", input=(), inputs=(), text=(), content=())
    | _all(
        "chats have it, at /v1/chat/completions; here the field is prompt.",
        messages=(),
        system=("",),
        tools=([],),
        tool_choice=("none", "auto"),
        functions=([],),
        function_call=("none", "auto"),
        modalities=(["text"],),
        reasoning_effort=(),
        documents=([],),
        chat_template=(),
        chat_template_kwargs=({},),
        add_generation_prompt=(),
        continue_final_message=(False,),
    )
    | _all("the field is max_tokens.", max_completion_tokens=())
    | _all("the field is logprobs: of a completion it is the number.", top_logprobs=()),
)
STREAM_OPTIONS = ForeignFields(frozenset({"include_obfuscation"}))

# What messages carry, most of all those of the assistant: clients send back every field of an answer.

_MARKS = frozenset({"cache_control", "prompt_cache_breakpoint", "provider_specific_fields", "extra_content"})

MESSAGE = ForeignFields(
    # `parsed` says again what the content says; `annotations` point into it
    _MARKS.union({"id", "metadata", "annotations", "parsed", "weight"}),
    {
        **_all("the chat template cannot show it: put it into the content.", refusal=("",)),
        **_all(
            "the chat template cannot show it: send the thoughts as reasoning_content.",
            thinking_blocks=([],),
            reasoning_details=([],),
        ),
        **_all("this model reads text alone.", audio=(), images=([],)),
        **_all("tools took its place: the field is tool_calls.", function_call=()),
        **_all(
            "continue_final_message of the request goes on with the last message.",
            prefix=(False,),
            partial=(False,),
        ),
    },
)
PART = ForeignFields(
    _MARKS.union({"annotations"}),
    _all(
        "this model reads text alone.",
        image_url=(),
        image=(),
        input_audio=(),
        audio_url=(),
        video_url=(),
        video=(),
        file=(),
        refusal=(),
    ),
)
TOOL_CALL = ForeignFields(
    _MARKS.union({"index"}), _all("calls are of functions alone.", custom=(), output=())
)
CALLED_FUNCTION = ForeignFields(_MARKS.union({"parsed_arguments"}))
TOOL = ForeignFields(
    _MARKS,
    _all("tools are functions alone.", custom=())
    | _all("all tools are shown at once.", defer_loading=(False,)),
)
FUNCTION = ForeignFields(_MARKS, _all("all tools are shown at once.", defer_loading=(False,)))

TOKENIZE = ForeignFields(
    refused=_all("the field is prompt.", content=(), text=(), input=(), inputs=(), messages=())
    | _all("the field is add_special_tokens.", add_special=())
    | _all("the field is return_token_strs.", with_pieces=(False,))
    | _all("text that spells a special token of the vocabulary is that token.", parse_special=(True,)),
)
