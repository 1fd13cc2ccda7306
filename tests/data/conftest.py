"""What tests of the data are given."""

from __future__ import annotations

from typing import Any

import pytest

from samples import TOKENIZERS


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()
