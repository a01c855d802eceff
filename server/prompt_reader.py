"""From what a request carries (text, ids, messages) to checked token ids. Runs in a worker thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from server.errors import ApiError, invalid, unavailable
from server.prompt import TemplateError, TemplateUnavailable
from server.special_text import NoFreeCharacter, strings_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.chat_messages import Message
    from server.config import ServerConfig
    from server.prompt import ChatTemplates, RenderOptions
    from server.tokenizer import Tokenizer
    from server.wire.requests import ChatRequest, TokenizeTextRequest

RawPrompt = str | list[int]

TEMPLATE_RETRY_S = 1
# What a template may be given beside messages, and the fields of the request that hold it
OPTIONAL: dict[Literal["tools", "documents", "kwargs"], str] = {
    "tools": "tools",
    "documents": "documents",
    "kwargs": "chat_template_kwargs",
}
NO_TEMPLATE = (
    "The model has no chat template: use /v1/completions, or start the server with --chat-template FILE."
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is what the client sent, or what the template made; None when the client sent ids."""

    ids: tuple[int, ...]
    text: str | None


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Turns raw prompts into ids within the model's limits. Raises ApiError (400)."""

    tokenizer: Tokenizer
    template: ChatTemplates | None
    limits: ServerConfig
    max_model_len: int
    vocab_size: int

    def read(self, raw: RawPrompt, param: str, *, add_special: bool) -> Prompt:
        if isinstance(raw, str):
            self._check_chars(len(raw), param)
            prompt = Prompt(tuple(self._encode(raw, begin=add_special)), raw)
        else:
            self._check_length(len(raw), param)
            prompt = Prompt(tuple(raw), None)
        if not prompt.ids:
            raise invalid("The prompt is empty.", param, "empty_prompt")
        self._check_ids(prompt.ids, param)
        return prompt

    def read_chat(self, body: ChatRequest) -> Prompt:
        text, ids = self._encode_chat(body)
        self._check_ids(ids, "messages")
        return Prompt(tuple(ids), text)

    def tokenize_chat(self, body: ChatRequest) -> list[int]:
        """The ids of `read_chat`, which here may be more than the model's context."""
        return self._encode_chat(body)[1]

    def tokenize_text(self, body: TokenizeTextRequest) -> list[int]:
        """The ids of `read`, which here may be more than the model's context."""
        if len(body.prompt) > self.limits.max_tokenize_chars:
            sizes = f"{len(body.prompt)} characters; at most {self.limits.max_tokenize_chars} are tokenised"
            raise invalid(f"The text has {sizes}.", "prompt", "text_too_long")
        return self._encode(body.prompt, begin=body.add_special_tokens is not False)

    def _encode_chat(self, body: ChatRequest) -> tuple[str, list[int]]:
        """The template's text and its ids; what users wrote never becomes a special token."""
        if self.template is None:
            raise invalid(NO_TEMPLATE, "messages", "no_chat_template")
        if len(body.messages) > self.limits.max_messages:
            sizes = f"{len(body.messages)} messages; at most {self.limits.max_messages} are taken"
            message = f"The request has {sizes}."
            raise invalid(message, "messages")
        messages, options = _shown(body)
        num_chars = {"messages": sum(map(len, strings_in(messages)))} | {
            param: sum(map(len, strings_in(options[name]))) for name, param in OPTIONAL.items()
        }
        largest = max(num_chars, key=lambda param: num_chars[param])
        self._check_chars(sum(num_chars.values()), largest)
        try:
            text, ids = self.template.encode(self.tokenizer, messages, **options)
        except NoFreeCharacter as error:
            raise invalid(f"{largest}: {error}.", largest) from None
        except TemplateError as error:
            param = self._culprit(self.template, messages, options)
            raise invalid(f"The chat template cannot render these {param}: {error}", param) from None
        except TemplateUnavailable as error:
            message = f"The chat template cannot be rendered now: {error}"
            raise unavailable(message, TEMPLATE_RETRY_S, "template_unavailable") from None
        if not ids:
            raise invalid("The prompt is empty.", "messages", "empty_prompt")
        return text, ids

    def _culprit(self, template: ChatTemplates, messages: list[Message], options: RenderOptions) -> str:
        """The field at fault where the template fails: one without which it does not."""

        def renders_without(*names: str) -> bool:
            fewer = cast("RenderOptions", {**options, **dict.fromkeys(names)})
            try:
                template.encode(self.tokenizer, messages, **fewer)
            except (TemplateError, TemplateUnavailable, NoFreeCharacter):
                return False
            return True

        given = [name for name in OPTIONAL if options[name]]
        if not given or not renders_without(*given):
            return "messages"
        return OPTIONAL[next((name for name in given if renders_without(name)), given[0])]

    def _encode(self, text: str, *, begin: bool) -> list[int]:
        """`begin`: with the beginning-of-sequence token, where the checkpoint wants one."""
        return self.tokenizer.encode_prompt(text) if begin else self.tokenizer.encode(text, special=True)

    def _check_chars(self, num_chars: int, param: str) -> None:
        if num_chars > self.max_model_len * self.limits.max_chars_per_token:
            message = (
                f"The prompt has {num_chars} characters, which cannot fit into the model's "
                f"{self.max_model_len} tokens."
            )
            raise invalid(message, param, "context_length_exceeded")

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        """A tokeniser may know tokens that the model has no row for, so its ids are checked as well."""
        self._check_length(len(ids), param)
        check_token_ids(ids, self.vocab_size, param)

    def _check_length(self, num_tokens: int, param: str) -> None:
        if num_tokens >= self.max_model_len:
            raise context_exceeded(num_tokens, 1, self.max_model_len, param)


def _shown(body: ChatRequest) -> tuple[list[Message], RenderOptions]:
    """What the template is given of a chat, in the form in which the client sent it."""
    continued = body.continue_final_message or False
    begin = body.add_generation_prompt
    tools = [tool.model_dump(exclude_unset=True, by_alias=True) for tool in body.tools or ()]
    return [message.model_dump(exclude_unset=True) for message in body.messages], {
        "add_generation_prompt": not continued if begin is None else begin,
        "continue_final_message": continued,
        "tools": tools or None,
        "documents": body.documents,
        "kwargs": body.chat_template_kwargs,
    }


def context_exceeded(num_prompt: int, num_output: int, max_model_len: int, param: str) -> ApiError:
    message = (
        f"This model's maximum context length is {max_model_len} tokens. The request asks for "
        f"{num_prompt + num_output}: {num_prompt} in the prompt and at least {num_output} in the output."
    )
    return invalid(message, param, "context_length_exceeded")


def split_prompts(value: Any, max_prompts: int) -> list[RawPrompt]:
    """OpenAI's four shapes of `prompt`, by the first element; the elements themselves are typed here."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise invalid(
            "prompt: must be a string, a list of strings, token ids or lists of token ids", "prompt"
        )
    if not value:
        raise invalid("The prompt is empty.", "prompt", "empty_prompt")
    if type(value[0]) is int:
        _check_ids(value, "prompt")
        return [value]
    if len(value) > max_prompts:
        raise invalid(f"The request has {len(value)} prompts; at most {max_prompts} are taken.", "prompt")
    for position, item in enumerate(value):
        if type(item) is not type(value[0]) or not isinstance(item, str | list):
            raise invalid("must be a string or a list of token ids, all alike", f"prompt.{position}")
        if isinstance(item, list):
            _check_ids(item, f"prompt.{position}")
    return value


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Ids beyond the logits' width would read and write other sequences' memory."""
    for token in (min(ids), max(ids)) if ids else ():
        if not 0 <= token < vocab_size:
            message = f"Token id {str(token)[:20]} is out of range: the vocabulary has {vocab_size} entries."
            raise invalid(message, param, "token_id_out_of_range")


def _check_ids(ids: list[Any], param: str) -> None:
    # set(map(type)) runs at C speed; bool is refused although it is an int
    if set(map(type, ids)) - {int}:
        raise invalid("must hold integers only", param)
