#!/usr/bin/env bash
# A run on a Cloud TPU slice: asks for the slice, installs on all workers, starts the same command
# on each, and gives the slice back.
#
#   launch/tpu_pod.sh [--dry-run] ACTION [-- --config=configs/owt.py --workdir=/mnt/runs/owt]
#
# ACTION is one of
#   create    queue a request for the slice and wait until it is there
#   setup     copy the commit that is checked out to all workers and install it
#   run       start `python -m md4vmd.main` with what follows `--` on all workers
#   stop      send SIGTERM to it: all workers save the same step and end
#   delete    give the slice back
#   all       create, setup, run; starts again where the slice was taken back; then delete
#
# The environment says which slice: NAME, ZONE, TYPE (v5litepod-16), VERSION (v2-alpha-tpuv5-lite),
# PROJECT if it is not gcloud's own, SPOT=1 for capacity that may be taken back, FOLDER for the
# workdir, which all workers see and which outlives the slice: NFS, Filestore, or a mounted bucket
# whose folders can be renamed (hierarchical namespace).
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
  if $dry_run; then printf '%q ' "$@"; echo; else "$@"; fi
}

on_all_workers() {
  call gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all "--command=$1"
}

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" '--format=value(state.state)'
}

create() {
  local spot=()
  if [ "${SPOT:-}" ]; then spot=(--spot); fi
  call gcloud compute tpus queued-resources create "$NAME" "${where[@]}" "--node-id=$NAME" \
    "--accelerator-type=$TYPE" "--runtime-version=$VERSION" "${spot[@]}" || return
  if $dry_run; then return; fi
  local now
  while true; do
    now="$(state)" || return
    case "$now" in
      ACTIVE) return ;;
      FAILED | SUSPENDED) echo "error: the request for $NAME is $now" >&2; return 1 ;;
    esac
    sleep "${POLL_SECONDS:-30}"
  done
}

setup() {
  local archive="${TMPDIR:-/tmp}/md4vmd-$NAME.tgz" commit
  local repository=(git -C "$(dirname "$0")/..")
  commit="$("${repository[@]}" rev-parse HEAD)" || return
  "${repository[@]}" diff --quiet HEAD ||
    echo "warning: changes that are not committed are not copied" >&2
  call "${repository[@]}" archive --format=tgz "--output=$archive" HEAD &&
  call gcloud compute tpus tpu-vm scp "$archive" "$NAME:md4vmd.tgz" "${where[@]}" --worker=all &&
  on_all_workers "mkdir -p md4vmd && tar -xzf md4vmd.tgz -C md4vmd && cd md4vmd && \
echo $commit > COMMIT && \
python3 -m venv .venv && .venv/bin/pip install --quiet '.[tpu]'"
}

check() {
  if [ $# -eq 0 ]; then
    echo "error: nothing to run; give -- --config=configs/owt.py --workdir=FOLDER" >&2
    exit 2
  fi
  if [[ -z "${FOLDER:-}" && " $*" != *" --workdir"* ]]; then
    echo "error: the run has no folder that outlives the slice; set FOLDER, or give --workdir" >&2
    exit 2
  fi
}

run() {
  local arguments
  arguments="$(printf '%q ' "$@" ${FOLDER:+"--workdir=$FOLDER"})"
  # Asynchronous collectives: the gather of a layer's parameters overlaps the layer before it.
  on_all_workers "cd md4vmd && echo \$\$ > pid && \
export JAX_COMPILATION_CACHE_DIR=\$HOME/.cache/jax && \
export LIBTPU_INIT_ARGS='--xla_tpu_enable_async_collective_fusion=true \
--xla_tpu_overlap_compute_collective_tc=true' && \
exec .venv/bin/python -m md4vmd.main --coordinator=auto $arguments"
}

stop() {
  on_all_workers "kill -TERM \$(cat md4vmd/pid)"
}

delete() {
  call gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

all() {
  local restarts status
  for ((restarts = 0; restarts <= ${MOST_RESTARTS:-100}; restarts++)); do
    status=0
    create || { status=$?; break; }
    setup || { status=$?; echo "error: setup failed; giving the slice back" >&2; break; }
    run "$@" || status=$?
    # Whatever the workers end with when some of them vanish, the slice is then no longer there; a
    # slice that is still there has ended by itself or by `stop`. 255: the connection broke.
    if [ "$status" -eq 0 ] || { [ "$status" -ne 255 ] && [ "$(state)" = ACTIVE ]; }; then break; fi
    echo "the slice was taken back; asking for another to continue from the newest checkpoint" >&2
    delete
  done
  delete
  return "$status"
}

case "$action" in
  create | setup | stop | delete) "$action" ;;
  run | all) check "$@"; "$action" "$@" ;;
  *) echo "error: unknown action '$action'; use create, setup, run, stop, delete or all" >&2; exit 2 ;;
esac
