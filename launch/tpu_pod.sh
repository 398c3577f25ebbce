#!/usr/bin/env bash
# Trains on a TPU pod slice by a queued resource:
#
#   PROJECT=p ZONE=us-west4-a NFS=10.0.0.2:/share launch/tpu_pod.sh NAME v5litepod-16 \
#       --config=configs/deit_small_scratch.py --config.data.data_dir=/mnt/tdm/tfds
#
# NFS is a file system that all hosts mount at /mnt/tdm (Filestore, say); the run lives in
# /mnt/tdm/runs/NAME. Started again after a preemption (SPOT=1 asks for cheaper, preemptible
# machines) it continues. `python -m tdm_jax.compile_check` says beforehand whether a training fits.
# RUNTIME is the TPU software version (v2-alpha-tpuv5-lite for v5e).
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
name=$1 type=$2; shift 2
: "${PROJECT:?expected a Google Cloud project}" "${ZONE:?expected a zone}" "${NFS:?expected host:/share}"
where=(--project="$PROJECT" --zone="$ZONE")
resource() { gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
on_all() { gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command "$1"; }

resource describe >/dev/null 2>&1 || resource create --node-id="$name" --accelerator-type="$type" \
  --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" ${SPOT:+--spot}
until state=$(resource describe --format='value(state.state)') && [ "$state" = ACTIVE ]; do
  case $state in
    FAILED | SUSPENDED) echo "error: $name is $state; delete it and start again" >&2; exit 1 ;;
  esac
  echo "waiting for $name: $state"
  sleep 30
done

archive=$(mktemp --suffix=.tgz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz -o "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:tdm_jax.tgz" "${where[@]}" --worker=all
on_all "mkdir -p tdm_jax && tar xzf tdm_jax.tgz -C tdm_jax && cd tdm_jax && pip install -q -e '.[tpu]'"
on_all "sudo mkdir -p /mnt/tdm && { mountpoint -q /mnt/tdm || sudo mount -t nfs $NFS /mnt/tdm; }"
printf -v arguments '%q ' "$@"
on_all "cd tdm_jax && python3 -m tdm_jax.train --distributed --workdir=/mnt/tdm/runs/$name $arguments"
