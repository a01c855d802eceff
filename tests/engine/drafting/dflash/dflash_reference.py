"""Block-diffusion drafters in plain torch, without a cache: the published definition, told again.

The context is given as a whole, each block is computed alone, and masks are written out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotated(x, positions, theta):
    """x [T, H, D], pairs of halves"""
    half = x.shape[-1] // 2
    angles = positions[:, None].float() * theta ** (-torch.arange(half).float() / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def visible(context_len, block, window, causal):
    """bool [block, context + block]"""
    query = context_len + torch.arange(block)[:, None]
    key = torch.arange(context_len + block)[None]
    seen = torch.ones(block, context_len + block, dtype=torch.bool)
    if causal:
        seen &= key <= query
    if window:
        seen &= query - key < window
    return seen


def convolved(x, dynamic, base):
    """x [B, H], dynamic [B, size, groups], base [size, H]"""
    out = torch.zeros_like(x)
    columns = x.shape[1] // dynamic.shape[2]
    for row in range(len(x)):
        for back in range(min(len(base), row + 1)):
            kernel = base[back] + dynamic[row, back].repeat_interleave(columns)
            out[row] += kernel * x[row - back]
    return out


class Reference:
    def __init__(self, tensors, config, embedding, head):
        self.t = tensors
        self.config = {**config, **config.get("dflash_config", {})}
        self.embedding = tensors.get("embed_tokens.weight", embedding)
        self.head = tensors.get("lm_head.weight", head)

    def layer_rule(self, index):
        """-> (window, causal)"""
        config = self.config
        kind = (config.get("layer_types") or ["full_attention"] * 99)[index]
        causal = config.get("is_causal")
        sliding = kind == "sliding_attention"
        dspark = "DSpark" in config["architectures"][0] or config.get("projector_type") == "dspark"
        return (config["sliding_window"] if sliding else 0), (
            (sliding and not dspark) if causal is None else causal
        )

    def hidden(self, seen, tokens):
        """seen [context, taps * hidden], the block's tokens -> [block, hidden] as the head reads it"""
        t, config = self.t, self.config
        eps, heads, kv_heads = (
            config["rms_norm_eps"],
            config["num_attention_heads"],
            config["num_key_value_heads"],
        )
        size = config["head_dim"]
        context = norm(F.linear(seen, t["fc.weight"]), t["hidden_norm.weight"], eps)
        x = self.embedding[torch.tensor(tokens)] * config.get("input_embedding_scale", 1.0)
        positions = torch.arange(len(context) + len(tokens))
        for index in range(config["num_hidden_layers"]):
            at = f"layers.{index}."
            window, causal = self.layer_rule(index)

            def project(name, values, at=at):
                return F.linear(
                    values, t[f"{at}self_attn.{name}.weight"], t.get(f"{at}self_attn.{name}.bias")
                )

            read = norm(x, t[at + "input_layernorm.weight"], eps)
            read, behind = self.before(at + "attention_conv.", read)
            query = norm(
                project("q_proj", read).view(-1, heads, size), t[at + "self_attn.q_norm.weight"], eps
            )
            both = torch.cat((context, read))
            key = norm(
                project("k_proj", both).view(-1, kv_heads, size), t[at + "self_attn.k_norm.weight"], eps
            )
            value = project("v_proj", both).view(-1, kv_heads, size)
            query = rotated(query, positions[len(context) :], config["rope_theta"])
            key = rotated(key, positions, config["rope_theta"])
            key, value = (
                one.repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1) for one in (key, value)
            )
            scores = query.transpose(0, 1) @ key.transpose(1, 2) * size**-0.5
            scores = scores.masked_fill(~visible(len(context), len(tokens), window, causal), float("-inf"))
            attended = (scores.softmax(-1) @ value).transpose(0, 1).reshape(len(tokens), -1)
            x = x + self.behind(at + "attention_conv.", project("o_proj", attended), behind)
            read = norm(x, t[at + "post_attention_layernorm.weight"], eps)
            read, behind = self.before(at + "mlp_conv.", read)
            gate = F.silu(F.linear(read, t[at + "mlp.gate_proj.weight"]))
            moved = F.linear(
                gate * F.linear(read, t[at + "mlp.up_proj.weight"]), t[at + "mlp.down_proj.weight"]
            )
            x = x + self.behind(at + "mlp_conv.", moved, behind)
        return norm(x, t["norm.weight"], eps)

    def before(self, at, x):
        if at + "base_kernel" not in self.t:
            return x, None
        base = self.t[at + "base_kernel"]
        dynamic = F.linear(x, self.t[at + "kernel_projection.weight"]).view(len(x), 2, base.shape[1], -1)
        return convolved(x, dynamic[:, 0], base[0]), dynamic[:, 1]

    def behind(self, at, x, dynamic):
        return x if dynamic is None else convolved(x, dynamic, self.t[at + "base_kernel"][1])

    def greedy(self, seen, last, num_drafts, first_row):
        """-> the best tokens of each place, and what every place's logits were"""
        config, t = self.config, self.t
        block = config["block_size"]
        hidden = self.hidden(seen, [last] + [config["mask_token_id"]] * (block - 1))
        tokens, logits = [], []
        state = torch.zeros(config.get("markov_rank") or 1)
        for depth in range(num_drafts):
            place = hidden[first_row + depth]
            row = F.linear(place, self.head) * config.get("output_multiplier", 1.0)
            cap = config.get("final_logit_softcapping")
            row = torch.tanh(row / cap) * cap if cap else row
            before = tokens[-1] if tokens else last
            if config.get("markov_rank"):
                bias, state = self.bias(before, place, state)
                row = row + bias
            elif config.get("selector_rank"):
                row = self.selected(row, before, place)
            if "d2t" in t:
                known = torch.arange(len(row)) + t["d2t"]
                row = torch.full((config["vocab_size"],), float("-inf")).scatter(0, known, row)
            logits.append(row)
            tokens.append(int(row.argmax()))
        return tokens, torch.stack(logits)

    def bias(self, before, place, state):
        t = self.t
        drawn = t["markov_head.markov_w1.weight"][before]
        kind = self.config["markov_head_type"]
        if kind == "gated":
            gate = F.linear(torch.cat((place, drawn)), t["markov_head.gate_proj.weight"])
            drawn = torch.sigmoid(gate + t["markov_head.gate_proj.bias"]) * drawn
        elif kind == "rnn":
            mixed = F.linear(torch.cat((state, drawn, place)), t["markov_head.joint_proj.weight"])
            gate, fresh, told = (mixed + t["markov_head.joint_proj.bias"]).chunk(3)
            state = torch.sigmoid(gate) * state + (1 - torch.sigmoid(gate)) * torch.tanh(fresh)
            drawn = torch.tanh(told)
        return F.linear(drawn, t["markov_head.markov_w2.weight"]), state

    def selected(self, row, before, place):
        t, at = self.t, "candidate_selector."
        values, tokens = row.topk(self.config["selector_top_k"])
        wish = t[at + "predecessor_codebook"][before] * F.linear(place, t[at + "hidden_projection.weight"])
        scores = values + t[at + "successor_codebook"][tokens] @ wish
        return torch.full_like(row, float("-inf")).scatter(0, tokens, scores)

    def confidence(self, before, place):
        drawn = self.t["markov_head.markov_w1.weight"][before]
        if not self.config["confidence_head_with_markov"]:
            drawn = drawn[:0]
        features = torch.cat((place, drawn))
        return torch.sigmoid(
            F.linear(features, self.t["confidence_head.proj.weight"]) + self.t["confidence_head.proj.bias"]
        )
