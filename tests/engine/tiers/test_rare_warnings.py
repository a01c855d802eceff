from __future__ import annotations

import pytest

from engine.tiers.rare_warnings import WARN_EVERY_S, RareWarnings


def test_the_first_at_once_then_one_a_while_with_the_number_kept_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s = 7.0
    warnings = RareWarnings(lambda: now_s)
    for page in range(1000):
        warnings.warn("damage", "page %d of %s is damaged", page, "100%")
    warnings.warn("error", "no space")
    assert caplog.messages == ["page 0 of 100% is damaged", "no space"]
    now_s += WARN_EVERY_S
    warnings.warn("damage", "page %d of %s is damaged", 1000, "100%")
    warnings.warn("damage", "page %d of %s is damaged", 1001, "100%")
    warnings.warn("error", "no space")
    assert caplog.messages[2:] == [
        "page 1000 of 100% is damaged (and 999 times since it was last logged)",
        "no space",
    ]
