"""Tiny random Llamas against transformers: whole prefill, chunks, and paged decode, in float32."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers

from cuda_kernels.ops import pick
from engine.batch import BatchBuilder
from engine.kv_storage import KVStorage
from engine.models.families import from_config_json
from engine.models.transformer import Transformer
from scheduler.plan import Slice, StepPlan

CPU = torch.device("cpu")
PAGE = 16
SHAPES = {
    "grouped": {"num_key_value_heads": 2},
    "one_kv_head": {"num_key_value_heads": 1},
    "full_heads_biases": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "wide_heads": {"head_dim": 32},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
        }
    },
}


class Bench:
    """A model, its pages, and a way to compute any slice of any sequence."""

    def __init__(self, reference: transformers.LlamaForCausalLM) -> None:
        config = from_config_json(reference.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
        weights = {name: value.clone() for name, value in reference.state_dict().items()}
        if config.tie_embeddings:
            weights.pop("lm_head.weight")
        ops = pick(CPU)
        self.model = Transformer(config, weights, ops)
        self.storage = KVStorage(config, 64, PAGE, torch.float32, CPU)
        self.batches = BatchBuilder(config, ops, PAGE, 512, 4, CPU)
        self.next_page = 0
        self.tables: dict[int, int] = {}

    def slice(self, seq_id: int, tokens: list[int], start: int, stop: int) -> Slice:
        held = self.tables.get(seq_id, 0)
        wanted = -(-stop // PAGE)
        pages = tuple(range(self.next_page, self.next_page + wanted - held))
        self.next_page += len(pages)
        self.tables[seq_id] = max(held, wanted)
        return Slice(seq_id, start, tuple(tokens[start:stop]), range(start, stop), held, pages, stop - start)

    @torch.inference_mode()
    def compute(self, *slices: Slice) -> list[torch.Tensor]:
        batch = self.batches.build(StepPlan(0, slices))
        logits = self.model.forward(batch.rows, self.storage)
        return list(logits.split([len(piece.tokens) for piece in slices]))


@pytest.fixture(params=SHAPES, scope="module")
def reference(request):
    torch.manual_seed(1)
    fields = {"num_key_value_heads": 2, "tie_word_embeddings": False} | SHAPES[request.param]
    config = transformers.LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.2,
        **fields,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 259, (n,), generator=generator).tolist() for n in (200, 17, 129)]


@pytest.fixture(scope="module")
def expected(reference, prompts):
    with torch.inference_mode():
        return [reference(torch.tensor([prompt])).logits[0] for prompt in prompts]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_prefill_of_several_sequences_in_one_step(reference, prompts, expected):
    bench = Bench(reference)
    slices = [bench.slice(index, prompt, 0, len(prompt)) for index, prompt in enumerate(prompts)]
    for actual, wanted in zip(bench.compute(*slices), expected, strict=True):
        close(actual, wanted)


def test_prefill_in_uneven_chunks_across_page_boundaries(reference, prompts, expected):
    bench = Bench(reference)
    for index, prompt in enumerate(prompts):
        cuts = [0, *[cut for cut in (1, 15, 16, 50, 131, 180) if cut < len(prompt)], len(prompt)]
        for start, stop in itertools.pairwise(cuts):
            close(bench.compute(bench.slice(index, prompt, start, stop))[0], expected[index][start:stop])


def test_decode_through_pages_beside_a_prefill(reference, prompts, expected):
    bench = Bench(reference)
    bench.compute(bench.slice(1, prompts[1], 0, 1), bench.slice(0, prompts[0], 0, 120))
    for step in range(1, 17):
        decode, chunk = bench.compute(
            bench.slice(1, prompts[1], step, step + 1),
            bench.slice(0, prompts[0], 115 + 5 * step, 120 + 5 * step),
        )
        close(decode, expected[1][step : step + 1])
        close(chunk, expected[0][115 + 5 * step : 120 + 5 * step])


def test_logits_of_a_row_are_the_same_bits_however_its_prompt_was_cut(reference, prompts):
    def last_logits(chunk: int, crowd: bool) -> torch.Tensor:
        bench = Bench(reference)
        result = torch.empty(0)
        for start in range(0, 200, chunk):
            stop = min(start + chunk, 200)
            slices = [bench.slice(0, prompts[0], start, stop)]
            if crowd and start == 0:
                slices.append(bench.slice(1, prompts[1], 0, 17))
            result = bench.compute(*slices)[0][-1]
        return result

    baseline = last_logits(200, crowd=False)
    for chunk in (1, 7, 16, 64, 199):
        assert torch.equal(last_logits(chunk, crowd=True), baseline), chunk
