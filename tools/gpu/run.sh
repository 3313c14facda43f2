#!/usr/bin/env bash
# All that this project wants to know of a GPU, in one command on a bare machine: nothing is installed.
#   bash tools/gpu/run.sh [--from PART] [--only PART,PART] [--budget SECONDS] [--emulate]
# Results go to $OUT (8 files at most), written after every step. Wheels in .whl/, where there are any, go before the
# machine's own packages. --emulate runs all of it on a CPU, at tiny shapes, with times that are made up.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$(dirname "$here")")
work=${SPARSIFY_GPU_WORK:-/tmp/sparsify-gpu}
python=${PYTHON:-python3}
# `passes` and `backends` lie beside `sparsify` in a checkout, and inside it where it is installed.
rm -rf "$work/tree"
mkdir -p "$work/tree/sparsify"
ln -s "$root"/sparsify/* "$root/passes" "$root/backends" "$work/tree/sparsify/"
export PYTHONPATH="$work/tree:$root/tests"
if compgen -G "$root/.whl/*.whl" > /dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" \
    "$root"/.whl/*.whl
  export PYTHONPATH="$work/site:$PYTHONPATH"
fi
export SPARSIFY_CACHE="$work/cache" OUT=${OUT:-$work/out} PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
exec "$python" "$here/main.py" --work "$work" "$@"
