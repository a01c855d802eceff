"""Whatever the OpenAPI document allows, and what it does not: never a 5xx, always the envelope."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from server.app import create_app
from tests.server.fake_engine import FakeEngine
from tests.server.http.conftest import make_service
from tests.server.http.test_bad_input import check_envelope

PATHS = [
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/v1/models/{model_id}",
    "/debug/scheduler",
]


def _schema() -> Any:
    return schemathesis.openapi.from_dict(create_app(make_service(FakeEngine())).openapi())


@pytest.mark.parametrize("path", PATHS)
def test_no_5xx(server: Any, path: str) -> None:
    operation = next(iter(_schema()[path].values()))

    @settings(
        max_examples=60,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def probe(case: Any) -> None:
        response = case.call(base_url=server.url)
        asked_for_deadline = response.status_code == 504 and "timeout_s" in case.body
        assert response.status_code < 500 or asked_for_deadline, response.text
        if response.status_code >= 400:
            check_envelope(response.json())

    probe()
