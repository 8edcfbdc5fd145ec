# Sourced by the grading scripts, which set `root`: sets `python` to that of .venv, else of PATH; without torch, one line and exit code 2.
python="$root/.venv/bin/python"
[ -x "$python" ] || python="$root/.venv/Scripts/python.exe" # Windows
[ -x "$python" ] || python="$(command -v python || command -v python3)"
if ! "$python" -c 'import importlib.util as u; raise SystemExit(not u.find_spec("torch"))' >/dev/null 2>&1; then
    echo "error: no torch in ${python:-Python, which is missing too}: run make setup in $root" >&2
    exit 2
fi
