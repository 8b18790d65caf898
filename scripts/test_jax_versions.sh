#!/usr/bin/env bash
# Runs the tests of what depends on devices with the oldest and the newest JAX that pyproject.toml
# admits, in two virtual environments that it removes at its end.
#
#     OLD=python3.11 NEW=python3.12 scripts/test_jax_versions.sh [options of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."

tests=(tests/project/test_devices.py tests/models/test_fused_attention.py tests/distributed/test_sharding.py)
oldest=$(sed -n 's/^    "jax>=\([0-9.]*\),.*/\1/p' pyproject.toml)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# The tests, with a Python and a version of JAX.
check() {
    local python=$1 version=$2
    shift 2
    rm -rf "$folder/venv"
    "$python" -m venv "$folder/venv"
    "$folder/venv/bin/python" -m pip install --quiet '.[test]' "jax$version"
    "$folder/venv/bin/python" -c 'import flax, jax; print("jax", jax.__version__, "flax", flax.__version__)'
    PYTHONPATH=$PWD JAX_PLATFORMS=cpu "$folder/venv/bin/python" -m pytest "${tests[@]}" "$@"
}

check "${OLD:-python3.11}" "==$oldest" "$@"
check "${NEW:-python3.12}" "" "$@"
