#!/usr/bin/env bash
# Prepares imagenet2012 for training, once: launch/prepare_imagenet.sh DOWNLOADS DATA_DIR
#
# DOWNLOADS holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org
# (which needs an account). DATA_DIR gets about 160 GB of ArrayRecord; train with
# --config.data.data_dir=DATA_DIR. TensorFlow is needed here, in an environment of its own, and nowhere
# else.
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
downloads=$(realpath "$1") data_dir=$2
for part in train val; do
  file=$downloads/ILSVRC2012_img_$part.tar
  [ -e "$file" ] || { echo "error: $file is missing" >&2; exit 2; }
done
mkdir -p "$data_dir"
environment=$data_dir/.prepare
[ -x "$environment/bin/tfds" ] || {
  python3 -m venv "$environment"
  "$environment/bin/pip" install -q tensorflow-cpu tensorflow-datasets importlib_resources array_record
}
"$environment/bin/tfds" build imagenet2012 --data_dir="$data_dir" --manual_dir="$downloads" \
  --file_format=array_record
echo "ready: --config.data.data_dir=$data_dir"
