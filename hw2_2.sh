#!/bin/bash
# bash hw2_2.sh NOISE_FOLDER OUTPUT_FOLDER UNET_PT: a picture NN.png for every NN.pt, by 50 steps of DDIM at eta 0
if [ $# -ne 3 ] || [ -z "$1" ] || [ -z "$2" ] || [ -z "$3" ]; then
    echo "error: usage: bash hw2_2.sh NOISE_FOLDER OUTPUT_FOLDER UNET_PT" >&2
    exit 2
fi
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
. "$root/runtime/python.sh"
exec "$python" "$root/P2_ddim.py" --noise="$1" --output="$2" --model="$3"
