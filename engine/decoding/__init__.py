"""Decoding methods by name: the registry is the only place that lists them."""

from engine.decoding.autoregressive import Autoregressive
from engine.decoding.method import Decision, DecodingMethod, Draws, MethodFactory
from engine.decoding.speculative import Speculative

METHODS: dict[str, MethodFactory] = {"autoregressive": Autoregressive, "speculative": Speculative}

__all__ = [
    "METHODS", "Autoregressive", "Decision", "DecodingMethod", "Draws", "MethodFactory", "Speculative",
]  # fmt: skip
