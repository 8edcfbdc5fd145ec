#!/bin/bash
# bash hw2_2.sh NOISE_FOLDER OUTPUT_FOLDER UNET_PT: an image NN.png for every noise NN.pt, by 50 steps of DDIM at eta 0
if [ $# -ne 3 ] || [ -z "$1" ] || [ -z "$2" ] || [ -z "$3" ]; then
    echo "error: usage: bash hw2_2.sh NOISE_FOLDER OUTPUT_FOLDER UNET_PT" >&2
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
exec "$python" "$root/P2_ddim.py" --noise="$1" --output="$2" --model="$3"
