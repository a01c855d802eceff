"""From the messages of a chat to the prompt's text and ids, by the checkpoint's chat templates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict, Unpack, cast

from server.chat_messages import TemplateTraits, fit_messages
from server.special_text import FreeCharacters, SpecialTextMask, strings_in
from server.template_process import TemplateError, TemplateLimits, TemplateProcess, TemplateUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from server.chat_messages import Message
    from server.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "ChatTemplates",
    "RenderOptions",
    "TemplateError",
    "TemplateLimits",
    "TemplateUnavailable",
]

DEFAULT, TOOL_USE, RAG = "default", "tool_use", "rag"  # the names that the hub gives templates


class RenderOptions(TypedDict, total=False):
    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    add_generation_prompt: bool  # default True
    continue_final_message: bool  # the prompt ends where the last message does; default False
    kwargs: Mapping[str, Any] | None  # the request's own variables for the template


class ChatTemplates:
    """A checkpoint's templates by name, most often one. Any thread may call."""

    def __init__(self, templates: Mapping[str, ChatTemplate]) -> None:
        self._templates = dict(templates)

    @property
    def source(self) -> str | None:
        """The usual template's text."""
        usual = self._templates.get(DEFAULT)
        return None if usual is None else usual.source

    def start(self) -> None:
        """Start the process of the usual template; others start when they are asked for."""
        for name, template in self._templates.items():
            if name == DEFAULT:
                template.start()

    def check(self) -> None:
        """Wait until the usual template is compiled and tried, so that no request need wait for that.
        Raises TemplateError where it does not compile, and TemplateUnavailable."""
        self._pick({}).traits()

    def close(self) -> None:
        for template in self._templates.values():
            template.close()

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], **options: Unpack[RenderOptions]
    ) -> tuple[str, list[int]]:
        """As `ChatTemplate.encode`, of messages in whatever form OpenAI's clients send them."""
        template = self._pick(options)
        developer = "developer" in template.source
        fitted = fit_messages(list(messages), template.traits(), developer=developer)
        return template.encode(tokenizer, fitted, **options)

    def _pick(self, options: RenderOptions) -> ChatTemplate:
        wanted = {TOOL_USE: options.get("tools"), RAG: options.get("documents"), DEFAULT: True}
        for name, is_wanted in wanted.items():
            if is_wanted and name in self._templates:
                return self._templates[name]
        raise TemplateError(f"there is none for this; the model has {', '.join(sorted(self._templates))}")


class ChatTemplate:
    """A Jinja template in a process of its own, bounded in time, memory and output. Any thread may call.

    `special_tokens` are the variables bos_token, eos_token and their like.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        limits: TemplateLimits | None = None,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._process = TemplateProcess(source, limits or TemplateLimits())
        self._traits: TemplateTraits | None = None

    def start(self) -> None:
        """Start the process without waiting for it, so that the first rendering need not."""
        self._process.start()

    def check(self) -> None:
        """Wait until the template is compiled. Raises TemplateError or TemplateUnavailable."""
        self._process.check()

    def close(self) -> None:
        self._process.close()

    def traits(self) -> TemplateTraits:
        """What the template can show, found once. Raises TemplateError when it does not compile, and
        TemplateUnavailable; a template that goes beyond its bounds when tried counts as a usual one."""
        if self._traits is None:
            self.check()
            try:
                self._traits = TemplateTraits.of(self._process.traits(self._special_tokens))
            except TemplateError:
                self._traits = TemplateTraits()
        return self._traits

    def render(self, messages: Sequence[Message], **options: Unpack[RenderOptions]) -> str:
        """The prompt's text. Raises TemplateError, TemplateUnavailable or NoFreeCharacter, in one line."""
        return self._render(messages, options, self._free_characters(messages, options))

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], **options: Unpack[RenderOptions]
    ) -> tuple[str, list[int]]:
        """The prompt's text and ids. Special tokens come from the template alone: the same characters
        in a message are plain text. Raises as `render` does."""
        if options.get("documents") and "documents" not in self.source:
            raise TemplateError("it shows none")
        free = self._free_characters(messages, options)
        mask = SpecialTextMask(tokenizer.special_texts, free)
        masked = cast("RenderOptions", {name: mask.apply(value) for name, value in options.items()})
        text = self._render(mask.apply(messages), masked, free)
        return mask.restore(text), tokenizer.encode_masked(text, mask.plain)

    def _free_characters(self, messages: Sequence[Message], options: RenderOptions) -> FreeCharacters:
        return FreeCharacters((self.source, *strings_in(messages), *strings_in(options)))

    def _render(self, messages: Sequence[Message], options: RenderOptions, free: FreeCharacters) -> str:
        add_generation_prompt, mark = options.get("add_generation_prompt", True), ""
        if options.get("continue_final_message"):
            if add_generation_prompt:
                raise TemplateError("continue_final_message contradicts add_generation_prompt")
            mark = free.take()
            messages = _marked(messages, mark)
        given = {
            **self._special_tokens,
            "messages": messages,
            "tools": options.get("tools"),
            "documents": options.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._process.render(given, options.get("kwargs") or {})
        return _until(text, mark) if mark else text


def _marked(messages: Sequence[Message], mark: str) -> list[Message]:
    """The messages with `mark` and a space after the last one's text: see `_until`."""
    *earlier, last = messages or [{}]
    content = last.get("content")
    if isinstance(content, str):
        return [*earlier, {**last, "content": f"{content}{mark} "}]
    if isinstance(content, list) and content and isinstance(content[-1], dict) and "text" in content[-1]:
        part = {**content[-1], "text": f"{content[-1]['text']}{mark} "}
        return [*earlier, {**last, "content": [*content[:-1], part]}]
    raise TemplateError("continue_final_message needs a last message with text")


def _until(text: str, mark: str) -> str:
    """The text before `mark`. Where the template trimmed the space after it, it trims the text as well."""
    at = text.rfind(mark)
    if at < 0:
        raise TemplateError("continue_final_message: the template does not show the last message")
    return text[:at] if text.startswith(f"{mark} ", at) else text[:at].rstrip()
