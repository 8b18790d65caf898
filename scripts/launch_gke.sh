#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=scripts/launch_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

usage() {
    cat <<'USAGE'
usage: scripts/launch_gke.sh --cluster CLUSTER --workload NAME --tpu-type TYPE [options]
           -- --config FILE.py --workdir DIR [--config.key=value ...]

Train on a GKE cluster made with xpk: submit a workload that runs
`python -m contextualstory_jax.train` on all machines of a slice with what follows `--`. xpk builds
its image of this checkout. A workload that is preempted starts again and resumes from its last
checkpoint; so does a new one with the same workdir.

The workdir, the data and what training starts from must be paths that all machines see: a storage
that `xpk storage attach` gave the cluster.

  --cluster CLUSTER      made by `xpk cluster create`
  --workload NAME        of your choice; one of the past: `xpk workload delete` first
  --tpu-type TYPE        for example v5litepod-16
  --project PROJECT      gcloud's own where it is not given
  --zone ZONE            gcloud's own where it is not given
  --storage STORAGE      mount an attached storage; may be given several times
  --base-image IMAGE     with Python 3.11 or 3.12 (python:3.12); one that has the dependencies
                         starts faster
  --max-restarts N       how often it may start again (20)
  --dry-run              print the commands and run none
USAGE
}

cluster="" workload="" type="" image=python:3.12 restarts=20
options=()
while (($#)); do
    [[ $1 == --?*=* ]] && set -- "${1%%=*}" "${1#*=}" "${@:2}"
    case $1 in
    --cluster) require_value "$@" && cluster=$2 && shift ;;
    --workload) require_value "$@" && workload=$2 && shift ;;
    --tpu-type) require_value "$@" && type=$2 && shift ;;
    --project | --zone | --storage) require_value "$@" && options+=("$1=$2") && shift ;;
    --base-image) require_value "$@" && image=$2 && shift ;;
    --max-restarts) require_value "$@" && restarts=$2 && shift ;;
    --dry-run) dry_run=1 ;;
    --help | -h) usage && exit ;;
    --) break ;;
    *) unknown "$1" ;;
    esac
    shift
done
[[ ${1-} == -- ]] && shift
require_option --cluster "$cluster"
require_option --workload "$workload"
require_option --tpu-type "$type"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--max-restarts must be a whole number; got $restarts"
require_training "$@"
require_revision
require_command xpk "install it: pip install xpk"

# A folder of its own, so that the image holds what git tracks and not what lies beside it.
context=$root/build/gke
run rm -rf "$context"
run mkdir -p "$context"
run git -C "$root" archive "--output=$context.tar" "$revision"
run tar -xf "$context.tar" -C "$context"

# xpk passes SIGTERM to the command's own process alone, which is therefore replaced.
command="pip install --quiet -e '.[tpu,data]' -c constraints.txt && exec"
command+=" $(quoted bash scripts/resumable.sh --forward python -m contextualstory_jax.train "$@")"
options+=("--cluster=$cluster" "--workload=$workload" "--tpu-type=$type")
# 143, which resumable.sh ends with, is among the statuses that xpk restarts after.
options+=("--max-restarts=$restarts" --termination-grace-period-seconds=300)
options+=("--base-docker-image=$image" "--script-dir=$context" "--command=$command")
run xpk workload create "${options[@]}"
