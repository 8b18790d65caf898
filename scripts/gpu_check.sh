#!/usr/bin/env bash
# Compares a checkout with the original's numbers on a GPU, then measures it; at most 10 minutes,
# no network.
#
#     WHEELS=wheels scripts/gpu_check.sh [options of scripts/benchmark.py]
#
# Everything is printed, and benchmark.json lies in $OUT. From the environment:
#
#     WHEELS      a folder of wheels missing in the machine's Python; they are unpacked into $OUT
#     PYTHON      the machine's Python, with JAX for its GPU (python3)
#     OUT         a folder (gpu_check)
#     LIMIT       seconds for everything (600)
#
# JAX_PLATFORMS=cpu scripts/gpu_check.sh --config tests/helpers/tiny_config.py tries it without a GPU.
set -euo pipefail
if [[ -n ${WHEELS:-} ]]; then
    [[ -d $WHEELS ]] || { echo "error: no folder $WHEELS; name one with wheels" >&2; exit 2; }
    WHEELS=$(cd "$WHEELS" && pwd)
fi
out=${OUT:-$(dirname "$0")/../gpu_check}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
limit=${LIMIT:-600}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}

section() { printf '\n==== %s (after %d s) ====\n' "$*" "$SECONDS"; }

# A command, in what is left of the time.
within_limit() { timeout "$((limit > SECONDS ? limit - SECONDS : 1))" "$@"; }

packages=$out/packages
if [[ -n ${WHEELS:-} ]]; then
    section "wheels"
    "$python" -m pip install --quiet --no-index --no-deps --upgrade \
        --target "$packages" "$WHEELS"/*.whl
fi
export PYTHONPATH=$PWD:$packages${PYTHONPATH:+:$PYTHONPATH}
"$python" -c 'import jax; print(jax.__version__, *jax.devices())'

section "parity: float32 at the highest precision, bfloat16"
# What is compiled here runs once: choosing the fastest kernels would take longer than it saves.
status=0
parity() {
    JAX_DEFAULT_MATMUL_PRECISION=highest XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_autotune_level=0" \
        within_limit "$python" -m pytest "$@"
}
parity tests/parity && parity -m slow tests/parity/test_bfloat16.py || status=$?

if ((status == 0)); then
    section "benchmark"
    within_limit "$python" scripts/benchmark.py --suite gpu --json "$out/benchmark.json" "$@" ||
        status=$?
fi
((status != 124)) || echo "stopped after $limit s; the lines so far are in $out" >&2
exit "$status"
