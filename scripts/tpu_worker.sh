#!/usr/bin/env bash
# What launch_tpu_pod.sh runs on each worker of a slice, in the home folder.
#
#     tpu_worker.sh install [BUCKET]   install contextualstory/new, mount BUCKET
#     tpu_worker.sh train ARGUMENT ... train, and show what training says until it ends
set -euo pipefail
cd ~/contextualstory

GCSFUSE=3.8.0 # installed where the machine has none

# Training that still runs, as when the connection was lost, saves and ends. A number in the file
# may be another process's by now.
stop() {
    local process
    process=$(cat train.pid 2>/dev/null) || return 0
    if grep -qas contextualstory_jax.train "/proc/$process/cmdline"; then
        echo "stopping the training that runs here; it saves first"
        kill -TERM "$process"
        tail --pid="$process" -f /dev/null
    fi
}

mount_bucket() {
    local folder=/mnt/$1
    if ! command -v gcsfuse >/dev/null; then
        curl -fsSL -o gcsfuse.deb "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v$GCSFUSE/gcsfuse_${GCSFUSE}_amd64.deb"
        sudo apt-get install -y -qq -o DPkg::Lock::Timeout=600 ./gcsfuse.deb
    fi
    if ! mountpoint -q "$folder"; then
        sudo mkdir -p "$folder"
        sudo chown "$(id -u)" "$folder"
        # The limit is for buckets without a hierarchical namespace.
        gcsfuse --implicit-dirs --rename-dir-limit=1000000 "$1" "$folder"
    fi
}

case $1 in
install)
    stop
    rm -rf code
    mv new code
    if [[ ${2-} ]]; then mount_bucket "$2"; fi
    # The machine's own Python is too old.
    python3 -m pip install --user --quiet uv
    [[ -x venv/bin/python ]] || ~/.local/bin/uv venv --quiet --python 3.12 venv
    cd code
    ~/.local/bin/uv pip install --quiet --python ../venv/bin/python -e '.[tpu,data]' -c constraints.txt
    ;;
train)
    stop
    cd code
    : >../train.log # there before `tail` looks for it
    # In a session of its own, so that it outlives the connection.
    setsid ../venv/bin/python -m contextualstory_jax.train "${@:2}" >>../train.log 2>&1 </dev/null &
    process=$!
    echo "$process" >../train.pid
    tail -n +1 --pid="$process" -f ../train.log || true
    wait "$process"
    ;;
esac
