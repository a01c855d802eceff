"""Pages as the tiers see them are the same memory as layers as the model sees them."""

from __future__ import annotations

import torch

from engine.tiers import HostPool
from tests.engine.tiers.small import PAGE_SIZE, content, fill, small_storage
from tests.engine.tiny import TINY


def test_a_page_is_its_part_of_every_layer():
    storage = small_storage()
    fill(storage)
    for layer in range(TINY.num_layers):
        assert torch.equal(storage.keys[layer][3], content(storage, 3)[layer, 0])
        assert torch.equal(storage.values[layer][3], content(storage, 3)[layer, 1])


def test_layers_are_contiguous_and_of_the_documented_shape():
    storage = small_storage(5)
    for layer in (*storage.keys, *storage.values):
        assert layer.shape == (5, TINY.num_kv_heads, PAGE_SIZE, TINY.head_dim)
        assert layer.is_contiguous()


def test_page_bytes_are_what_the_model_says():
    storage = small_storage()
    assert storage.page_bytes == TINY.kv_values_per_token * PAGE_SIZE * 2
    assert storage.page_bytes == storage.pages[0].nbytes


def test_clearing_touches_only_the_named_pages():
    storage = small_storage()
    fill(storage)
    storage.clear([2, 5])
    for page in range(len(storage.pages)):
        expected = torch.zeros(storage.page_shape) if page in (2, 5) else content(storage, page).float()
        assert torch.equal(storage.pages[page].float(), expected)


def test_a_host_page_is_one_run_of_bytes():
    storage = small_storage()
    host = HostPool(storage, 3)
    host.cells[1] = content(storage, 1)
    assert host.page(1).contiguous
    assert host.page(1).nbytes == storage.page_bytes
    assert bytes(host.page(1)) == content(storage, 1).view(torch.uint8).numpy().tobytes()
    assert not any(host.page(0))
    host.page(2)[:] = host.page(1)
    assert torch.equal(host.cells[2], content(storage, 1))
