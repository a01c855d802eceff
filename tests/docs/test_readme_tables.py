"""README says of settings and metrics what the code says."""

from __future__ import annotations

from tests.docs.tables import README, with_tables


def test_the_tables_are_those_of_the_code() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: python -m tests.docs.tables"
