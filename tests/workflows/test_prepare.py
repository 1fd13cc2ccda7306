"""`nextblock prepare` from the outside: one process or many, killed and begun again, as a job array; then a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from limits import largest_file
from nextblock.config.errors import UsageError
from nextblock.config.run import AdaptConfig, load_config
from nextblock.config.sections import Source
from nextblock.data.records import Records
from nextblock.data.sources import read_source
from nextblock.training.loop import train
from nextblock.workflows.prepare import prepare
from runs import config_of, weights
from samples import jsonl, texts


def config_for(*sources: str, **model: Any) -> AdaptConfig:
    data = {"sources": [{"path": source} for source in sources], "row_length": 32}
    return load_config({"model": {"tokenizer": "bytes", **model}, "data": data, "growth": {"b_max": 1}})


def files(folder: Path) -> dict[str, bytes]:
    """Arrays of a store, over all parts in order."""
    return {
        name: b"".join(path.read_bytes() for path in sorted(folder.glob(f"*/{name}.bin")))
        for name in ("tokens", "spans")
    }


def test_a_run_from_stores_is_the_run_from_their_texts(place: Path, tmp_path: Path) -> None:
    more = {"data__sources": [{"path": str(place / "sums.jsonl")}, {"path": "task:algebra", "weight": 2.0}]}
    config = config_of(place, tmp_path / "text", **more)
    train(config)
    prepare(config, tmp_path / "stores", processes=1)
    values = yaml.safe_load((tmp_path / "stores" / "nextblock.yaml").read_text())
    assert values["data"]["sources"][1] == {"path": "task:algebra", "weight": 2.0}
    train(load_config(values, {"output": str(tmp_path / "store")}))
    assert weights(tmp_path / "text") == weights(tmp_path / "store")


def test_a_job_array_and_processes_write_the_same_store_and_a_second_call_nothing(tmp_path: Path) -> None:
    config = config_for(jsonl(tmp_path / "a.jsonl", texts(40)))
    for part in (1, 0):
        assert prepare(config, tmp_path / "array", part=(part, 2))[0].manifest is None
    found = prepare(config, tmp_path / "array", merge_parts=True)
    prepare(config, tmp_path / "pool", processes=2)
    assert files(tmp_path / "array" / "0-a") == files(tmp_path / "pool" / "0-a")
    again = prepare(config, tmp_path / "array", processes=2)
    assert again[0].manifest == found[0].manifest
    with pytest.raises(UsageError, match="nothing to prepare"):
        prepare(config_for(str(tmp_path / "pool" / "0-a"), "task:algebra"), tmp_path / "more")


def test_other_text_needs_append(tmp_path: Path) -> None:
    first, second = (config_for(jsonl(tmp_path / f"{n}.jsonl", texts(20 + n))) for n in range(2))
    prepare(first, tmp_path / "out", processes=1)
    with pytest.raises(UsageError, match=r"from another source, or from other text; .*--append"):
        prepare(second, tmp_path / "out", processes=1)
    found = prepare(second, tmp_path / "out", processes=1, append=True)[0].manifest
    assert found is not None
    assert found["documents"] == 41
    assert prepare(second, tmp_path / "out", processes=1, append=True)[0].manifest == found


def test_a_preparation_that_is_killed_goes_on_from_what_it_wrote(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": "word " * 400}] * 4_000)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_for(source).model_dump(mode="json", exclude_defaults=True)))
    command = [sys.executable, "-m", "nextblock", "prepare", "c.yaml", "--output", "out", "--processes", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL)
    tokens, end = tmp_path / "out" / "0-a" / "00-00000-of-00001" / "tokens.bin", time.monotonic() + 120
    while time.monotonic() < end and not (tokens.exists() and tokens.stat().st_size):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    assert "4,000 documents, 8,004,000 tokens" in done.stdout
    assert "left" in done.stderr or "4000/4000" in done.stderr
    assert tokens.stat().st_size == 2 * 8_004_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--part", "3/2"], "--part 3/2 must be I/N with 1 <= I <= N"),
        (["--part", "1/2", "--merge"], "leave out --merge"),
        (["--merge"], "has no parts to merge"),
        (["--output", "c.yaml"], "output c.yaml is a file; give a folder"),
        (
            ["--data.sources.0.path", "broken.jsonl"],
            "broken JSON line: Invalid control character at column",
        ),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list, words: str
) -> None:
    from nextblock.cli.main import main

    source = jsonl(tmp_path / "a.jsonl", texts(4))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"text": "a\tb"}\n')
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_for(source).model_dump(mode="json", exclude_defaults=True)))
    call = ["nextblock", "prepare", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "out"), *arguments]
    monkeypatch.setattr(sys, "argv", call)
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_written_configuration_loads_as_it_was_given_and_reads_stores_of_all_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        jsonl(tmp_path / f"{name}.jsonl", texts(12, seed=ord(name)))
    (tmp_path / "own").mkdir()
    jsonl(tmp_path / "own" / "c.jsonl", texts(5))
    prepare(config_for("own"), tmp_path / "before", processes=1)
    values = config_for("a.jsonl", revision="12345e7").model_dump(mode="json", exclude_defaults=True)
    more = [{"path": "b.jsonl", "weight": 2.0}, {"path": "task:algebra"}, {"path": "before/0-own"}]
    values["stages"] = [{"name": "one"}, {"name": "two", "data": {"sources": more, "row_length": 64}}]
    found = prepare(load_config(values), Path("out"), processes=1)
    assert [one.store.name for one in found] == ["0-a", "stage-2-0-b"]
    monkeypatch.chdir("/")
    again = load_config(tmp_path / "out" / "nextblock.yaml")
    assert again.model.revision == "12345e7"
    assert [source.path for source in again.data.sources] == [str(tmp_path / "out" / "0-a")]
    sources = again.stages[1].data["sources"]
    assert [source["path"] for source in sources] == [
        str(tmp_path / "out" / "stage-2-0-b"),
        "task:algebra",
        str(tmp_path / "before" / "0-own"),
    ]
    assert again.stages[1].data["row_length"] == 64
    assert sources[0]["weight"] == 2.0
    for path in (again.data.sources[0].path, sources[0]["path"]):
        assert cast(Records, read_source(Source(path=path))).count == 12


def test_a_disk_that_does_not_take_the_configuration_is_one_line(tmp_path):
    config = config_for(jsonl(tmp_path / "a.jsonl", texts(9)))
    prepare(config, tmp_path / "out", processes=1)
    with largest_file(4), pytest.raises(UsageError, match=r"cannot write .*out.*: File too large; .*it goes on"):
        prepare(config, tmp_path / "out", processes=1)


def test_what_prepare_leaves_out_is_told(tmp_path):
    source = Path(jsonl(tmp_path / "a.jsonl", texts(9)))
    source.write_text(source.read_text() + '{"text": "cut\n')
    with pytest.raises(UsageError, match=r"a\.jsonl:10: .*; data.skip_unusable=true leaves such documents out"):
        prepare(config_for(str(source)), tmp_path / "out", processes=1)
    values = config_for(str(source)).model_dump(mode="json", exclude_defaults=True)
    config = load_config(values, {"data.skip_unusable": True})
    with pytest.warns(UserWarning, match=r"1 documents cannot be used and are left out; the first: .*a\.jsonl:10"):
        prepare(config, tmp_path / "out", processes=1)
