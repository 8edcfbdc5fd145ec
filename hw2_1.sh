#!/bin/bash
# bash hw2_1.sh OUTPUT_FOLDER: 50 pictures per digit and domain, OUTPUT_FOLDER/{mnistm,svhn}/{digit}_{001..050}.png
if [ $# -ne 1 ] || [ -z "$1" ]; then
    echo "error: usage: bash hw2_1.sh OUTPUT_FOLDER" >&2
    exit 2
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python
exec "$python" "$root/P1_inference.py" --output="$1"
