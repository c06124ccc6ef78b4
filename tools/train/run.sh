#!/bin/sh
# Corpus folder in, model directory out:  sh run.sh CORPUS WORK MODEL_DIR [options of train.py]
# Each MODEL_DIR has its own folder under WORK, named like it, so a model and its judge share one tokenizer and one split.
set -eu
corpus=$1 work=$2 model=$3
shift 3
here=$(dirname "$0")
python=${PYTHON:-python3}
[ -f "$work/data/data.npz" ] || "$python" "$here/prepare.py" "$corpus" "$work/data"
"$python" "$here/train.py" --data "$work/data" --out "$work/$(basename "$model")" --export "$model" "$@"
"$python" "$here/check.py" "$model"
