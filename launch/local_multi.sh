#!/usr/bin/env bash
# A run of several processes on this machine, which meet over loopback: a pod in small.
#
#   launch/local_multi.sh [--dry-run] [--processes=2] [--cpu-devices=2] -- --config=configs/... ...
#
# What follows `--` goes to `python -m md4vmd.main`. Only process 0 prints; what the others have to
# say is in their errors. Ctrl-C and SIGTERM go to all of them, which then save and end with 42. The
# exit status is the first that is not 0.
set -euo pipefail

processes=2 cpu_devices=2 dry_run=false
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry_run=true ;;
    --processes=*) processes="${1#*=}" ;;
    --cpu-devices=*) cpu_devices="${1#*=}" ;;
    --) shift; break ;;
    *) echo "error: unknown option '$1'; put -- before the arguments of md4vmd.main" >&2; exit 2 ;;
  esac
  shift
done
for count in "$processes" "$cpu_devices"; do
  if ! [[ "$count" =~ ^[1-9][0-9]*$ ]]; then
    echo "error: --processes and --cpu-devices are numbers from 1, not '$count'" >&2
    exit 2
  fi
done
if [ $# -eq 0 ]; then
  echo "error: nothing to run; give -- --config=configs/quickstart.py" >&2
  exit 2
fi

port="${PORT:-$((20000 + RANDOM % 10000))}"
command=("${PYTHON:-python}" -m md4vmd.main "$@" "--coordinator=127.0.0.1:$port"
  "--processes=$processes")

if $dry_run; then
  for ((i = 0; i < processes; i++)); do
    echo "JAX_NUM_CPU_DEVICES=$cpu_devices ${command[*]} --process=$i"
  done
  exit 0
fi

cd "$(dirname "$0")/.."
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < processes; i++)); do
  JAX_NUM_CPU_DEVICES="$cpu_devices" "${command[@]}" "--process=$i" &
  pids+=("$!")
done
status=0
for pid in "${pids[@]}"; do
  # A signal to this shell ends `wait` before the process ends.
  while true; do
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  if [ "$status" -eq 0 ]; then status=$code; fi
done
exit "$status"
