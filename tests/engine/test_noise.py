"""Philox against the known answers of its authors (Random123), and the shape of the noise."""

from __future__ import annotations

import math

import pytest
import torch

from engine.noise import NoiseKeys, philox

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter, key, expected):
    words = philox(
        tuple(torch.tensor([word]) for word in counter), tuple(torch.tensor([word]) for word in key)
    )
    assert [int(word) for word in words] == expected


def test_noise_of_a_token_is_the_same_alone_and_in_the_whole_vocabulary():
    keys = NoiseKeys([2**64 - 1, 7], [0, 3], [5, 1], CPU)
    whole = keys.of_vocabulary(10_001)
    tokens = torch.tensor([[0, 1, 2, 3, 10_000], [9_999, 4, 7, 6, 5]])
    assert torch.equal(keys.of_tokens(tokens), whole.gather(1, tokens))


def test_every_part_of_the_key_matters():
    base = NoiseKeys([1], [0], [0], CPU).of_vocabulary(64)
    for seed, choice, place in ((2, 0, 0), (1 + 2**32, 0, 0), (1, 1, 0), (1, 0, 1)):
        assert not torch.equal(NoiseKeys([seed], [choice], [place], CPU).of_vocabulary(64), base)


def test_it_is_standard_gumbel_and_finite():
    noise = NoiseKeys(list(range(40)), [0] * 40, [9] * 40, CPU).of_vocabulary(25_000)
    assert torch.isfinite(noise).all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)  # Euler-Mascheroni
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)
