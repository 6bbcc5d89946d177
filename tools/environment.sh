#!/bin/sh
# Install pinned requirements into a virtual environment, with progress: environment.sh VENV REQUIREMENTS_FILE...
# uv installs in parallel, from the index that pip is configured for. Where it has no build or fails, pip does it.
set -eu

venv=$1
shift
pip="$venv/bin/python -m pip --disable-pip-version-check"
folder=$(dirname "$0")/../requirements
files=$(printf -- '-r %s ' "$@")

if ! $venv/bin/python -c 'import uv' 2>/dev/null; then
    $pip install --quiet --no-deps --no-compile --require-hashes -r "$folder/uv.txt" || true
fi
if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
    index=${PIP_INDEX_URL:-$($pip config get global.index-url 2>/dev/null || true)}
    [ -z "$index" ] || export UV_DEFAULT_INDEX="$index"
fi
if [ -x "$venv/bin/uv" ] && "$venv/bin/uv" pip install --python "$venv/bin/python" --require-hashes $files; then
    exit 0
fi
echo "installing with pip instead"
exec $pip install --require-hashes $files
