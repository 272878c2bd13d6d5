#!/usr/bin/env bash
# A run on a Cloud TPU slice: asks for the slice, installs on all workers, starts the same command
# on each, and gives the slice back.
#
#   launch/tpu_pod.sh [--dry-run] ACTION [-- --config=configs/owt.py --workdir=gs://BUCKET/runs/owt]
#
# ACTION is one of
#   create    queue a request for the slice and wait until it is there
#   setup     copy this checkout to all workers and install it
#   run       start `python -m md4vmd.main` with what follows `--` on all workers
#   stop      send SIGTERM to it: all workers save the same step and end
#   delete    give the slice back
#   all       create, setup, run; starts again where a preempted slice ended the run; then delete
#
# The environment says which slice: NAME, ZONE, TYPE (v5litepod-16), VERSION (v2-alpha-tpuv5-lite),
# PROJECT if it is not gcloud's own, SPOT=1 for capacity that may be taken back, FOLDER for a
# workdir that all workers see (a mounted bucket or NFS).
set -euo pipefail

NAME="${NAME:-md4vmd}" ZONE="${ZONE:-us-central1-a}" TYPE="${TYPE:-v5litepod-16}"
VERSION="${VERSION:-v2-alpha-tpuv5-lite}"
dry_run=false
if [ "${1:-}" = --dry-run ]; then dry_run=true; shift; fi
action="${1:-}"
[ $# -gt 0 ] && shift
if [ "${1:-}" = -- ]; then shift; fi

where=("--zone=$ZONE")
if [ "${PROJECT:-}" ]; then where+=("--project=$PROJECT"); fi

call() {
  local restarts
  for ((restarts = 0; restarts <= ${MOST_RESTARTS:-100}; restarts++)); do
    create
    setup
    local status=0
    run "$@" || status=$?
    # 42: stopped on SIGTERM, its state saved; 255: the connection broke with the slice.
    if [ "$status" -ne 42 ] && [ "$status" -ne 255 ]; then break; fi
    echo "the slice was taken back; asking for another to continue from the newest checkpoint" >&2
    delete
  done
  delete
  return "$status"
}

case "$action" in
  create | setup | delete) "$action" ;;
  stop) on_all_workers "pkill -TERM -f md4vmd.main" ;;
  run | all) "$action" "$@" ;;
  *) echo "error: unknown action '$action'; use create, setup, run, stop, delete or all" >&2; exit 2 ;;
esac
