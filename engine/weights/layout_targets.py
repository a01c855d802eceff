"""Every tensor of a transformer in the order of its layers, of whatever a checkpoint calls its parts.

A *role* is what a stored tensor is: a runtime tensor as a whole ("qkv", "gate_up"), a part of one ("q",
"k", "v", "gate", "up"), one expert's part ("expert_gate", ...), or all experts' ("experts_gate", ...). A
spelling says for each role that a kind of checkpoint knows what the tensor is called there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.models.config import NormPlacement, QKNorm
from engine.weights.layout import Piece, Shape, Target
from engine.weights.layout_order import pairs_to_halves

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    import torch

    from engine.models.config import Experts, Layer, TransformerConfig

    Arrange = Callable[[torch.Tensor], torch.Tensor]

_PRE = ("attention_norm", "mlp_norm")
_POST = ("attention_post_norm", "mlp_post_norm")
_NORMS = {
    NormPlacement.PRE: _PRE,
    NormPlacement.POST: _POST,
    NormPlacement.SANDWICH: (*_PRE, *_POST),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """`stored` maps a role to the name of the weight; "{layer}" and "{expert}" stand for numbers.

    `modules` maps a role to the module in Hugging Face's model, by which adapters name it. `neighbours`: the
    two rows of a rotary pair lie side by side in q and k. `columns`: experts' weights are [E, in, out].
    `orders` are for roles whose rows have another order, for the weight and the bias.
    """

    stored: Mapping[str, str]
    modules: Mapping[str, str]
    neighbours: bool = False
    columns: bool = False
    orders: Mapping[str, tuple[Arrange, Arrange | None]] = field(default_factory=dict)


def targets(config: TransformerConfig, names: Collection[str], spelling: Spelling) -> Iterator[Target]:
    """Lazy. `names` are the checkpoint's tensors, which decide between the whole of a role and its parts."""
    layout = _Layout(config, names, spelling)
    yield layout.single("embedding", "embedding", (config.vocab_size, config.hidden_size))
    for index, layer in enumerate(config.layers):
        yield from layout.layer(index, layer)
    yield layout.norm("final_norm", "final_norm", config.hidden_size)
    if not config.tie_embeddings:
        yield layout.single("head", "head", (config.vocab_size, config.hidden_size))


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows of a matrix. `heads`: how many of them turn by rotary pairs, 0: none."""

    role: str
    rows: int
    heads: int = 0


@dataclass(frozen=True, slots=True)
class _Layout:
    config: TransformerConfig
    names: Collection[str]
    spelling: Spelling

    def layer(self, index: int, layer: Layer) -> Iterator[Target]:
        config, at = self.config, f"layers.{index}."
        for role in _NORMS[config.norm_placement]:
            yield self.norm(at + role, role, config.hidden_size, index)
        yield from self._attention(index, at)
        if layer.experts:
            assert config.experts is not None, "a layer has experts, the configuration has none"
            yield from self._experts(index, at, config.experts)
        else:
            yield from self._mlp(index, at)

    def _attention(self, index: int, at: str) -> Iterator[Target]:
        config, size = self.config, self.config.head_dim
        queries, keys = config.num_heads * size, config.num_kv_heads * size
        parts = (
            _Part("q", queries, config.num_heads),
            _Part("k", keys, config.num_kv_heads),
            _Part("v", keys),
        )
        yield from self._linear(f"{at}qkv", "qkv", parts, config.hidden_size, config.qkv_bias, index)
        if config.qk_norm in (QKNorm.HEAD, QKNorm.WHOLE):
            whole = config.qk_norm is QKNorm.WHOLE
            yield self.norm(f"{at}q_norm", "q_norm", queries if whole else size, index)
            yield self.norm(f"{at}k_norm", "k_norm", keys if whole else size, index)
        yield from self._linear(f"{at}out", "out", (), queries, config.out_bias, index, config.hidden_size)
        if config.sinks:
            yield self.single(f"{at}sinks", "sinks", (config.num_heads,), index, exact=True)

    def _mlp(self, index: int, at: str) -> Iterator[Target]:
        hidden, inner, bias = self.config.hidden_size, self.config.intermediate_size, self.config.mlp_bias
        parts = (_Part("gate", inner), _Part("up", inner))
        yield from self._linear(f"{at}gate_up", "gate_up", parts, hidden, bias, index)
        yield from self._linear(f"{at}down", "down", (), inner, bias, index, hidden)

    def _experts(self, index: int, at: str, experts: Experts) -> Iterator[Target]:
        hidden, inner, count = self.config.hidden_size, experts.intermediate_size, experts.count
        yield self.single(f"{at}router.weight", "router", (count, hidden), index, exact=True)
        if experts.bias:
            yield self.single(f"{at}router.bias", "router", (count,), index, bias=True, exact=True)
        for name, parts, rows, columns in (
            ("gate_up", ("gate", "up"), 2 * inner, hidden),
            ("down", ("down",), hidden, inner),
        ):
            for kind, shape in (("weight", (count, rows, columns)), ("bias", (count, rows))):
                if kind == "weight" or experts.bias:
                    pieces = self._expert_pieces(name, parts, shape, index, bias=kind == "bias")
                    yield Target(f"{at}experts.{name}.{kind}", shape, pieces)

    def norm(self, target: str, role: str, size: int, index: int = 0) -> Target:
        """Gemma's weights are near 0 or 1 as stored, and matter in every digit: their norms stay exact."""
        sandwich = self.config.norm_placement is NormPlacement.SANDWICH
        return self.single(target, role, (size,), index, exact=self.config.norm_offset or sandwich)

    def single(
        self, target: str, role: str, shape: Shape, index: int = 0, *, bias: bool = False, exact: bool = False
    ) -> Target:
        return Target(target, shape, (self._piece(role, shape, index, bias=bias),), exact)

    def _linear(
        self,
        target: str,
        whole: str,
        parts: tuple[_Part, ...],
        columns: int,
        bias: bool,
        index: int,
        rows: int = 0,
    ) -> Iterator[Target]:
        """A weight and possibly a bias, stored as a whole or in parts; `rows` where it has no parts."""
        if not parts or self._chosen(whole, parts[0].role, index=index) == whole:
            parts = (_Part(whole, rows or sum(part.rows for part in parts)),)
        total = sum(part.rows for part in parts)
        for kind, tail in (("weight", (columns,)), ("bias", ())):
            if kind == "weight" or bias:
                pieces, row = [], 0
                for part in parts:
                    pieces.append(self._part_piece(part, tail, row, index, bias=kind == "bias"))
                    row += part.rows
                yield Target(f"{target}.{kind}", (total, *tail), tuple(pieces))

    def _part_piece(self, part: _Part, tail: Shape, row: int, index: int, *, bias: bool) -> Piece:
        return self._piece(part.role, (part.rows, *tail), index, row=row, heads=part.heads, bias=bias)

    def _expert_pieces(
        self, name: str, parts: tuple[str, ...], shape: Shape, index: int, *, bias: bool
    ) -> tuple[Piece, ...]:
        """All experts' rows in one tensor; all experts' parts, a tensor each; or a tensor for everything."""
        count, rows, *tail = shape
        share = rows // len(parts)
        whole, stacks, singles = f"experts_{name}", f"experts_{parts[0]}", f"expert_{parts[0]}"
        role = self._chosen(whole, stacks, singles, index=index)
        if role == whole:
            stored = (count, *tail, rows) if self.spelling.columns and not bias else shape
            return (self._piece(role, stored, index, bias=bias),)
        if role == stacks:
            stored = (count, share, *tail)
            return tuple(
                self._piece(f"experts_{part}", stored, index, row=share * place, stacked=True, bias=bias)
                for place, part in enumerate(parts)
            )
        return tuple(
            self._piece(
                f"expert_{part}",
                (share, *tail),
                index,
                row=expert * rows + share * place,
                expert=expert,
                bias=bias,
            )
            for expert in range(count)
            for place, part in enumerate(parts)
        )

    def _chosen(self, *roles: str, index: int) -> str:
        """Which of the roles the checkpoint has: the first that is there, else the last that is spelt."""
        spelt = [role for role in roles if role in self.spelling.stored]
        here = [role for role in spelt if self._name(role, index, 0, bias=False) in self.names]
        return here[0] if here else spelt[-1]

    def _name(self, role: str, index: int, expert: int, *, bias: bool) -> str:
        name = self.spelling.stored[role].format(layer=index, expert=expert)
        if not bias:
            return name
        return name.removesuffix("weight") + "bias" if name.endswith(".weight") else f"{name}_bias"

    def _piece(
        self,
        role: str,
        shape: Shape,
        index: int,
        *,
        row: int = 0,
        heads: int = 0,
        expert: int = 0,
        stacked: bool = False,
        bias: bool = False,
    ) -> Piece:
        spelling = self.spelling
        arrange = spelling.orders.get(role, (None, None))[bias]
        if heads and spelling.neighbours:
            arrange = pairs_to_halves(heads)
        module = "" if bias else spelling.modules.get(role, "").format(layer=index, expert=expert)
        stored = self._name(role, index, expert, bias=bias)
        return Piece(stored, shape, row, arrange, module, stacked)
