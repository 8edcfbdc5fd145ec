#!/bin/bash
# bash hw2_1.sh OUTPUT_FOLDER [CHECKPOINT]: 50 images per digit and domain, OUTPUT_FOLDER/{mnistm,svhn}/{digit}_{001..050}.png
if [ $# -lt 1 ] || [ $# -gt 2 ] || [ -z "$1" ] || [ -z "${2-checkpoint}" ]; then
    echo "error: usage: bash hw2_1.sh OUTPUT_FOLDER [CHECKPOINT]" >&2
    exit 2
fi
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python="$root/.venv/Scripts/python.exe" # Windows
[ -x "$python" ] || python="$(command -v python || command -v python3)"
if ! "$python" -c 'import importlib.util as u; raise SystemExit(not u.find_spec("torch"))' >/dev/null 2>&1; then
    echo "error: no torch in ${python:-Python, which is missing too}: run make setup in $root" >&2
    exit 2
fi
exec "$python" "$root/P1_inference.py" --output="$1" ${2+--model="$2"}
