#!/bin/bash
# The GPU tests and the benchmarks that a GPU changes, in under nine minutes, as one JSON file.
#
#   benchmarks/gpu.sh [gpu.json]          PYTHON=.venv/bin/python benchmarks/gpu.sh
#
# Each part has its own time limit, and goes on without those before it. Nothing is installed: tests whose packages are
# missing are skipped with that reason.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
output=$(realpath -m "${1:-gpu.json}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

part() { # NAME SECONDS COMMAND...: SIGINT at the limit, so that pytest still reports what it has done
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    timeout --signal=INT --kill-after=8 "$limit" "$@" >"$work/$name.txt" 2>&1
    local status=$?
    printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - began))" "$*" >>"$work/parts.tsv"
    tail -n 3 "$work/$name.txt"
    echo "== $name: status $status, $((SECONDS - began)) s of $limit"
}

# Most of a test's time is the compiler's: it needs the other cores, but not the GPU.
part tests 230 "$python" -m pytest -q -n 8 -m gpu --junitxml="$work/tests.xml" \
    tests/training/test_gpu.py tests/decoding/test_compiled.py tests/model/test_lora.py
part liger 30 "$python" -m pytest -q --junitxml="$work/liger.xml" tests/recipe/test_objective.py -k liger
part training 120 "$python" benchmarks/training.py --shape qwen3-0.6b --row-length 2048 --rows 2 --views 1 --draft-adapter \
    --rounds 3 --output "$work/training.json"
part decoding 100 "$python" -m nextblock bench decode tiny-bd --examples 8 --rounds 3 --batch 1 --mode speculative --output "$work/decoding.json"
part forwards 50 "$python" -m nextblock bench decode --shape qwen3-0.6b --forwards --rounds 3 --output "$work/forwards.json"

"$python" - "$work" "$output" <<'END'
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

work, output = map(Path, sys.argv[1:])
try:
    import torch

    machine = {"torch": torch.__version__, "cuda": torch.version.cuda}
    machine["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
except Exception as error:  # the parts have failed, too, and say so
    machine = {"error": str(error)}


def outcome(case):
    """passed, skipped, failed or error, and why."""
    found = next((child for child in case if child.tag in ("skipped", "failure", "error")), None)
    how = "passed" if found is None else {"failure": "failed"}.get(found.tag, found.tag)
    why = {} if found is None else {"why": (found.get("message") or "")[:2000]}
    return {"outcome": how, "seconds": float(case.get("time", 0)), **why}


parts = {}
for line in (work / "parts.tsv").read_text().splitlines():
    name, status, seconds, command = line.split("\t")
    command = command.replace(str(work), "WORK")
    parts[name] = {"status": int(status), "seconds": int(seconds), "command": command}
    parts[name]["end"] = (work / f"{name}.txt").read_text(errors="replace")[-4000:]
    try:
        if (report := work / f"{name}.xml").exists():
            cases = ElementTree.parse(report).iter("testcase")
            parts[name]["tests"] = {f"{case.get('classname')}::{case.get('name')}": outcome(case) for case in cases}
        if (figures := work / f"{name}.json").exists():
            parts[name]["figures"] = json.loads(figures.read_text())
    except (ValueError, ElementTree.ParseError) as error:
        parts[name]["unreadable"] = str(error)
output.write_text(json.dumps({"machine": machine, "parts": parts}, indent=1) + "\n")
print(output)
END
