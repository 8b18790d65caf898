#!/usr/bin/env bash
# Runs training for a scheduler. SIGTERM makes training save and end with status 0, which to a
# scheduler means that there is nothing left to do; this makes it 143, so that it starts it again.
#
#     resumable.sh [--forward] COMMAND ...
#
# With --forward SIGTERM is passed on, for schedulers that send it to one process alone.
set -uo pipefail

forward=""
if [[ $1 == --forward ]]; then
    forward=1
    shift
fi
stopped=0
trap 'stopped=1; [[ -z $forward ]] || kill -TERM "$process" 2>/dev/null' TERM
"$@" &
process=$!
# A signal ends `wait` early.
while wait "$process"; kill -0 "$process" 2>/dev/null; do :; done
wait "$process"
status=$?
((stopped && status == 0)) && status=143
exit "$status"
