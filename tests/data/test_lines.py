"""The rows of JSON files are found by an index that does not grow with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextblock.config.errors import UsageError
from nextblock.data import lines
from nextblock.data.lines import Lines, is_between_lines

PIECES = st.sampled_from(["{}", '{"text": "é"}', "", " ", "\t", "\r", "  {}", "x" * 40, "\ufeff", "\x0b"])


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, max_size=60), st.booleans(), st.integers(1, 9), st.integers(1, 80))
def test_rows_are_the_lines_that_are_not_blank(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], ended: bool, marks: int, block: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "rows.jsonl"
    file.write_bytes(("\n".join(pieces) + "\n" * ended).encode())
    wanted, start = [], 0
    for line, data in enumerate(file.open("rb"), 1):
        if (data if start else data.removeprefix("\ufeff".encode())).strip():
            wanted.append((line, start, data))
        start += len(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", block)
        found = Lines(str(file), marks)
    assert len(found._marks) <= marks
    assert found.count == len(wanted)
    order = np.random.default_rng(0).permutation(found.count).tolist()
    assert [found.read(row) for row in order] == [wanted[row] for row in order]


def test_a_file_that_was_cut_while_it_was_open_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("{}\n" * 9)
    found = Lines(str(file), 4)
    file.write_text("{}\n")
    with pytest.raises(UsageError, match=r"a\.jsonl is shorter"):
        found.read(8)


def test_only_whole_lines_can_have_been_added_behind_a_line_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n{1}\r\n{22}")
    between = [at for at in range(14) if is_between_lines(str(tmp_path / "a.jsonl"), at)]
    assert between == [0, 2, 3, 6, 7, 8]
