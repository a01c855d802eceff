"""Groups of equally many layers, as the published shapes need them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.kv_storage import KVStorage
from engine.models.config import Layer
from engine.models.kv_groups import MAX_GROUPS, kv_groups, kv_values, page_values
from tests.engine.tiny import CPU, TINY

PAGE = 16


def model(pattern: str, num_layers: int, window: int = 512, chunk: int = 0, max_positions: int = 32768):
    """`pattern` of local (l) and global (g) layers, repeated."""
    local = Layer(window=window, chunk=chunk)
    layers = [local if pattern[index % len(pattern)] == "l" else Layer() for index in range(num_layers)]
    return replace(TINY, layers=tuple(layers), max_positions=max_positions)


def sizes(config) -> list[tuple[int, int]]:
    return [(group.span, len(group.layers)) for group in kv_groups(config)]


PUBLISHED = {
    "llama": (model("g", 32), [(0, 32)]),
    "mistral": (model("l", 32, window=4096), [(4096, 32)]),
    "gemma2_9b": (model("lg", 42, window=4096), [(0, 21), (4096, 21)]),
    "gpt_oss_20b": (model("lg", 24, window=128), [(0, 12), (128, 12)]),
    "gemma3_1b": (model("lllllg", 26), [(0, 4), *[(512, 4)] * 5, (512, 2)]),
    "gemma3_12b": (model("lllllg", 48, window=1024), [(0, 8), *[(1024, 8)] * 5]),
    "llama4": (model("lllg", 48, window=0, chunk=8192, max_positions=2**20), [(0, 12), *[(8192, 12)] * 3]),
    "more_global": (model("gggl", 32), [(0, 12), (0, 12), (512, 8)]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name):
    config, expected = PUBLISHED[name]
    groups = kv_groups(config)
    assert sizes(config) == expected
    assert sorted(layer for group in groups for layer in group.layers) == list(range(config.num_layers))
    for group in groups:
        rules = {(config.layers[index].window, config.layers[index].chunk) for index in group.layers}
        assert rules == {(group.window, group.chunk)}


@pytest.mark.parametrize("num_layers", [9, 31, 62, 127])
@pytest.mark.parametrize("pattern", ["lllllg", "lg", "gl", "llllllllllg", "glll"])
def test_groups_are_few(pattern, num_layers):
    assert len(kv_groups(model(pattern, num_layers))) <= MAX_GROUPS


def test_a_page_has_the_same_bytes_whatever_its_group():
    config = model("lllllg", 8, max_positions=512)
    storage = KVStorage(config, 5, PAGE, torch.bfloat16, CPU)
    assert storage.page_bytes == 2 * page_values(config, PAGE)
    places = [layer for group in kv_groups(config) for layer in group.layers]
    assert sorted(places) == list(range(8))
    for group in kv_groups(config):
        parts = [storage.keys[layer].data_ptr() for layer in group.layers]
        assert len(set(parts)) == len(parts), "two layers of a group in one place"


def test_what_a_sequence_takes():
    plain, sliding = model("g", 12), model("llg", 12, window=64)
    assert kv_values(plain, 160) == plain.kv_values_per_token * 160
    assert kv_values(plain, 161) == plain.kv_values_per_token * 176
    per_layer = kv_values(plain, 16) // 12
    assert kv_values(sliding, 160) == per_layer * (4 * 10 + 8 * 5)  # 64 tokens, and the page that is written
    assert kv_values(sliding, 32) == per_layer * 12 * 2
