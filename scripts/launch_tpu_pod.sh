#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=scripts/launch_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

usage() {
    cat <<'USAGE'
usage: scripts/launch_tpu_pod.sh --name NAME --zone ZONE --accelerator-type TYPE [options]
           -- --config FILE.py --workdir DIR [--config.key=value ...]

Train on a Cloud TPU slice: ask for it where it is not there, send this checkout to all its
workers, install it, and run `python -m contextualstory_jax.train` on all with what follows `--`.
Ctrl-C or a lost connection ends the watching, not the training; the same command again stops it
(it saves), and resumes from its last checkpoint, in a new slice where the old was preempted.

The workdir, the data and what training starts from must be paths that all workers see: give
--bucket, or mount a file system of yours with --setup.

  --name NAME              of the slice
  --zone ZONE              for example us-west4-a
  --accelerator-type TYPE  for example v5litepod-16 (TPU v2 to v6e; newer: launch_gke.sh)
  --project PROJECT        gcloud's own where it is not given
  --runtime-version V      the one for TYPE where it is not given
  --spot                   cheaper, and may be preempted
  --bucket BUCKET          mount the Cloud Storage bucket as /mnt/BUCKET; it should have a
                           hierarchical namespace, in which a checkpoint appears at once
  --setup COMMAND          run on each worker first
  --delete                 delete the slice when training has ended well
  --dry-run                print the commands and run none
USAGE
}

name="" zone="" type="" project="" runtime="" bucket="" setup="" spot="" delete=""
while (($#)); do
    [[ $1 == --?*=* ]] && set -- "${1%%=*}" "${1#*=}" "${@:2}"
    case $1 in
    --name) require_value "$@" && name=$2 && shift ;;
    --zone) require_value "$@" && zone=$2 && shift ;;
    --accelerator-type) require_value "$@" && type=$2 && shift ;;
    --project) require_value "$@" && project=$2 && shift ;;
    --runtime-version) require_value "$@" && runtime=$2 && shift ;;
    --bucket) require_value "$@" && bucket=${2#gs://} && shift ;;
    --setup) require_value "$@" && setup=$2 && shift ;;
    --spot) spot=1 ;;
    --delete) delete=1 ;;
    --dry-run) dry_run=1 ;;
    --help | -h) usage && exit ;;
    --) break ;;
    *) unknown "$1" ;;
    esac
    shift
done
[[ ${1-} == -- ]] && shift
require_option --name "$name"
require_option --zone "$zone"
require_option --accelerator-type "$type"
if [[ -z $runtime ]]; then
    case $type in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v[234]-*) runtime=tpu-ubuntu2204-base ;;
    *) fail "no runtime is known for --accelerator-type $type; give --runtime-version" ;;
    esac
fi
[[ ${bucket%/} != */* ]] || fail "--bucket $bucket is a path; name the bucket alone"
bucket=${bucket%/}
require_training "$@"
require_revision
require_command gcloud "install the Google Cloud CLI, then: gcloud auth login"

where=(--quiet "--zone=$zone")
[[ $project ]] && where+=("--project=$project")

slices() { run gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }

# The state of the request for the slice; nothing where there is none.
state() { slices describe '--format=value(state.state)' 2>/dev/null || true; }

request() {
    local options=("--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime")
    [[ $spot ]] && options+=(--spot)
    slices create "${options[@]}"
}

on_all() {
    run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all "--command=$1"
}

# A slice that was preempted, or never came, is requested again.
have_slice() {
    local now
    now=$(state)
    case $now in
    SUSPEND* | FAILED)
        slices delete --force
        now=""
        ;;
    esac
    [[ $now ]] || request
    until [[ $(state) == ACTIVE ]]; do
        [[ $(state) != FAILED ]] || fail "no slice $name came; try another --zone, or --spot"
        printf 'waiting for %s\n' "$name" >&2
        sleep "${LAUNCH_POLL_SECONDS:-30}"
    done
    # A new machine takes a while to let one in.
    for _ in {1..10}; do
        on_all true && return
        sleep "${LAUNCH_POLL_SECONDS:-30}"
    done
    fail "the workers of $name do not answer; see: gcloud compute tpus tpu-vm ssh $name"
}

if [[ $dry_run ]]; then
    echo "# where there is no such slice, or it was preempted:"
    request
    echo "# when it is there:"
else
    have_slice
fi

[[ -z $setup ]] || on_all "$setup"
archive=$root/build/tpu_pod.tar.gz
[[ $dry_run ]] || mkdir -p "$root/build"
run git -C "$root" archive --format=tar.gz "--output=$archive" "$revision"
run gcloud compute tpus tpu-vm scp "$archive" "$name:contextualstory.tar.gz" "${where[@]}" \
    --worker=all
unpack="rm -rf contextualstory/new && mkdir -p contextualstory/new"
unpack+=" && tar -xzf contextualstory.tar.gz -C contextualstory/new"
install=(bash contextualstory/new/scripts/tpu_worker.sh install)
[[ $bucket ]] && install+=("$bucket")
on_all "$unpack && $(quoted "${install[@]}")"
on_all "$(quoted bash contextualstory/code/scripts/tpu_worker.sh train "$@")"
[[ -z $delete ]] || slices delete --force
