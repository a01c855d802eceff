"""Which chat templates a server has: those of its checkpoint, or the one file that replaces them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from engine.checkpoint import CheckpointError
from engine.weights.paths import named_path
from server import logs
from server.prompt import DEFAULT, ChatTemplate, ChatTemplates, TemplateError, TemplateLimits
from server.template_process import TemplateUnavailable

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint
    from server.config import ServerConfig

MAX_TEMPLATE_BYTES = 2**20


def load_templates(config: ServerConfig, checkpoint: Checkpoint) -> ChatTemplates | None:
    """None where there are none. The usual one's process has started. Raises CheckpointError."""
    sources = {DEFAULT: _text_of(config.chat_template)} if config.chat_template else checkpoint.chat_templates
    if not sources:
        return None
    limits = TemplateLimits(max_chars=config.max_template_output_chars, timeout_s=config.template_timeout_s)
    special = checkpoint.special_tokens
    templates = ChatTemplates({name: ChatTemplate(text, special, limits) for name, text in sources.items()})
    templates.start()
    return templates


def check_named_file(config: ServerConfig, templates: ChatTemplates | None) -> None:
    """Raise CheckpointError where the file that was asked for does not compile. A model's own template
    that is broken concerns chats alone: see `Service.check_template`."""
    if templates is None or not config.chat_template:
        return
    try:
        templates.check()
    except TemplateError as error:
        raise CheckpointError(f"chat_template {config.chat_template}: {error}") from None
    except TemplateUnavailable as error:
        logs.log(logging.WARNING, "chat template not checked", cause=str(error))


def _text_of(name: str) -> str:
    path = named_path(name, "chat_template")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_TEMPLATE_BYTES + 1)
        text = raw.decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"chat_template {path}: {error.strerror or error}") from None
    except UnicodeError as error:
        raise CheckpointError(f"chat_template {path}: not UTF-8 ({error})") from None
    if len(raw) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"chat_template {path}: more than the {MAX_TEMPLATE_BYTES} bytes that are read")
    if not text.strip():
        raise CheckpointError(f"chat_template {path}: the file is empty")
    return text
