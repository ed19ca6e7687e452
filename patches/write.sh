#!/usr/bin/env bash
# Write the patch for a tag (or branch) of Megatron-LM: patches/write.sh CLONE TAG
set -euo pipefail
test $# = 2 || { echo "usage: patches/write.sh CLONE TAG" >&2; exit 2; }
clone=$(realpath "$1") tag=$2
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cd "$folder"
git -C "$clone" archive "$tag" megatron/training/arguments.py megatron/training/training.py | tar x
git init --quiet
git add .

import='from jreg_megatron import training_loop as jreg'
sed -i -e "0,/^import torch\$/s//&\n\n$import/" -e 's/^def add_megatron_arguments(/@jreg.add_arguments\n&/' \
    megatron/training/arguments.py
sed -i -e "0,/^import torch.distributed\$/s//&\n\n$import/" \
    -e 's/^def setup_model_and_optimizer(/@jreg.attach_to_model\n&/' \
    -e 's/^def train_step(/@jreg.require_attached\n&/' \
    -e 's/^def training_log(/@jreg.log_training\n&/' \
    -e 's/^def evaluate(/@jreg.measure_validation\n&/' \
    -e 's/^def evaluate_and_print_results(/@jreg.log_validation\n&/' \
    megatron/training/training.py
added=$(git diff --unified=0 | grep -c '^+[@f]')
test "$added" = 8 || { echo "$tag: $added of 8 lines found their place" >&2; exit 1; }
mkdir -p "$here/megatron-lm/$tag"
git diff --unified=1 | sed -E 's/^(@@ [^@]*@@).*/\1/' >"$here/megatron-lm/$tag/jreg.patch"
