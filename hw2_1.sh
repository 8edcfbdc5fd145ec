#!/bin/bash
# bash hw2_1.sh OUTPUT_FOLDER [CHECKPOINT]: 50 pictures per digit and domain, OUTPUT_FOLDER/{mnistm,svhn}/{digit}_{001..050}.png
if [ $# -lt 1 ] || [ $# -gt 2 ] || [ -z "$1" ] || [ -z "${2-checkpoint}" ]; then
    echo "error: usage: bash hw2_1.sh OUTPUT_FOLDER [CHECKPOINT]" >&2
    exit 2
fi
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
. "$root/runtime/python.sh"
exec "$python" "$root/P1_inference.py" --output="$1" ${2+--model="$2"}
