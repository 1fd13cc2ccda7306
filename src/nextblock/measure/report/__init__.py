"""Figures, tables and the self-contained HTML report of an adaptation run.

`results.json` holds what the report shows. Every part may be absent or null; its part of the report is
then left out::

    title         str
    created       ISO 8601 time
    command       str, how to make it again
    environment   {"python", "torch", "transformers", "nextblock", "device", "threads"}
    parent        {"name": str, "parameters": int}
    settings      {"block_size", "mask_token_id", "context", "prediction"}
    training      {"steps": int, "seconds": float, "tokens": int, "growth": [[step, block_size], ...],
                   "stages": [[first step, name], ...]}
    log           path of log.jsonl relative to results.json: `training.run.StepMetrics`, and records of other kinds
    bits_per_byte [{"model": "parent" | "adapted", "measure": "AR (exact)" | "diffusion (bound)",
                    "block_size": int | null, "value": float, "bytes": int}]
    decoding      [{"model": "parent" | "adapted", "task": str, "mode": "ar" | "diffusion" | "speculative",
                    "threshold": float | null (one token per denoising step), "block_size": int,
                    "accuracy": 0..1, "examples": int, "tokens_per_forward": float,
                    "tokens_per_second": float, "equal_to_ar": 0..1 | null (share of prompts),
                    "speedup", "speedup_low", "speedup_high": float, optional (`bench.scores.score_modes`)}]
    samples       [{"task": str, "prompt": str, "mode": str, "answer": str,
                    "steps": [[token text | null (masked), ...], ...],
                    "confidence": same shape, optional}]

A row of `steps` is the state after one denoising step, of the block in work or of the whole answer so far.
The page asks for nothing outside itself, and all text from a model is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nextblock.config.errors import UsageError
from nextblock.config.files import user_path, write_whole
from nextblock.measure.report.page import render
from nextblock.training.log import finite, read_log

RESULTS = "results.json"
REPORT = "report.html"


def load_results(folder: Path | str) -> dict[str, Any]:
    """Read `results.json` of a run, to build its report again.

    Raises:
        UsageError: the folder has none, or it is not a JSON object.
    """
    path = user_path(Path(folder) / RESULTS, "run")
    if not path.is_file():
        raise UsageError(f"{folder} has no {RESULTS}; give a folder that `nextblock adapt` or `nextblock demo` wrote")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); make it again") from error
    if not isinstance(results, dict):
        raise UsageError(f"{path} holds a {type(results).__name__}, not an object; make it again")
    return results


def write_report(results: Mapping[str, Any], folder: Path | str) -> Path:
    """Write `results.json` and `report.html` into `folder`, and return the report's path.

    Args:
        results: as the module says; its `log` is read from `folder` when it is there.
        folder: made if missing.
    Raises:
        UsageError: a line of the log cannot be read; nothing is written then.
    """
    folder = user_path(folder, "report folder")
    path = folder / results["log"] if results.get("log") else None
    records = [read_log(path, kind) if path else [] for kind in (None, "profile", "resume")]
    results = finite(results)
    page = render(results, *records)
    folder.mkdir(parents=True, exist_ok=True)
    stored = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for name, text in ((RESULTS, stored), (REPORT, page)):
        write_whole(folder / name, text.encode("utf-8"))  # a reader never sees half a file
    return folder / REPORT
