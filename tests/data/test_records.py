"""Laws of raw documents."""

from __future__ import annotations

import pytest

from nextblock.config.errors import UsageError
from nextblock.data.records import check_characters


@pytest.mark.parametrize("value", ["caf\udce9", [{"role": "user", "content": "\ud83d"}], {"a": ["\udc00"]}])
def test_what_is_no_character_is_refused_wherever_it_stands(value):
    with pytest.raises(UsageError, match="prompt 3: half of a surrogate pair, or a byte that is not UTF-8"):
        check_characters(value, "prompt 3")
    check_characters([{"role": "user", "content": "café 😀 \ufeff"}], "prompt 3")
