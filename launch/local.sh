#!/usr/bin/env bash
# Runs N processes of one training on this machine, over loopback: launch/local.sh N [flags of train]
#
#   launch/local.sh 2 --config=configs/digits.py --workdir=runs/two
#
# DEVICES=4 gives each process four virtual CPU devices. All processes end when one fails; a TERM or
# INT to this script reaches all of them, so that they save and stop.
set -euo pipefail
[ $# -ge 1 ] && [[ $1 =~ ^[1-9][0-9]*$ ]] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
count=$1; shift
port=${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
if [ -n "${DEVICES:-}" ]; then
  export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
fi

pids=()
forward() { kill "-$1" "${pids[@]}" 2>/dev/null || true; }
trap 'forward TERM' TERM INT
for ((process = 0; process < count; process++)); do
  "${PYTHON:-python3}" -m tdm_jax.train "$@" \
    --coordinator_address="127.0.0.1:$port" --num_processes="$count" --process_id="$process" &
  pids+=($!)
done

status=0
for _ in "${pids[@]}"; do
  # The first to end decides; a trapped signal interrupts `wait` without anybody having ended.
  code=0
  wait -n "${pids[@]}" || code=$?
  if [ "$code" -gt 128 ] && kill -0 "${pids[0]}" 2>/dev/null; then wait "${pids[@]}" || code=$?; fi
  if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then status=$code; forward TERM; fi
done
exit "$status"
