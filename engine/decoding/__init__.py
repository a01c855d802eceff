"""Decoding methods by name: the registry is the only place that lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.decoding.autoregressive import Autoregressive
from engine.decoding.lossy import Lossy
from engine.decoding.method import Decision, DecodingMethod, Draws, MethodFactory
from engine.decoding.speculative import Speculative

if TYPE_CHECKING:
    from scheduler.types import Request

METHODS: dict[str, MethodFactory] = {"autoregressive": Autoregressive, "speculative": Speculative}


def method_of(request: Request) -> DecodingMethod:
    """A new one for a sequence of the request."""
    if request.lossy is not None and request.method == "speculative":
        return Lossy()
    return METHODS[request.method]()


__all__ = [
    "METHODS", "Autoregressive", "Decision", "DecodingMethod", "Draws", "Lossy", "MethodFactory",
    "Speculative", "method_of",
]  # fmt: skip
