#!/bin/bash
# bash hw2_3.sh INPUT_JSON OUTPUT_FOLDER CHECKPOINT: 25 pictures per prompt, OUTPUT_FOLDER/{key}/{prompt}/source{key}_prompt{prompt}_{n}.png
if [ $# -ne 3 ] || [ -z "$1" ] || [ -z "$2" ] || [ -z "$3" ]; then
    echo "error: usage: bash hw2_3.sh INPUT_JSON OUTPUT_FOLDER CHECKPOINT" >&2
    exit 2
fi
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
. "$root/runtime/python.sh"
exec "$python" "$root/P3_inference.py" --input="$1" --output="$2" --model="$3"
