#!/usr/bin/env bash
# Everything that needs a GPU, in one command; nothing is downloaded.
#
#   bench/gpu.sh            conformance on the device, benchmark, predicted against measured
#   bench/gpu.sh --dry-run  print the commands
#
# Results go to bench/results/<card>/; PYTHON chooses the interpreter. Takes the first CUDA device.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # cuBLAS repeats its bits only so
unset TRITON_INTERPRET

dry=
case ${1-} in
    --dry-run) dry=1 ;;
    '') ;;
    *) echo "usage: $0 [--dry-run]" >&2; exit 2 ;;
esac

if [ -n "$dry" ]; then
    card=CARD
else
    card=$("$PYTHON" -c '
import re, torch
if not torch.cuda.is_available():
    raise SystemExit("gpu.sh: torch finds no CUDA device")
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
fi
results=bench/results/$card

# Run a step with its output on the terminal and in a file; a step that fails does not stop the
# next, but the script's exit status.
status=0
step() {
    local log=$results/$1.txt
    shift
    echo "+ $* > $log"
    [ -n "$dry" ] && return
    mkdir -p "$results"
    if ! "$@" 2>&1 | tee "$log"; then
        status=1
        echo "FAILED: $*"
    fi
}

step facts "$PYTHON" -m eamnet doctor
step conformance env EAMNET_TEST_DEVICE=cuda "$PYTHON" -m pytest -q -p no:cacheprovider \
    tests/kernels/test_conformance.py -k triton
step cuda "$PYTHON" -m pytest -q -p no:cacheprovider tests/cuda_host/test_on_card.py
step benchmark "$PYTHON" -m bench --device cuda --parts operators --output "$results" \
    --dtype float32 --dtype bfloat16
step predicted "$PYTHON" -m bench.predict --measured "$results"
exit $status
