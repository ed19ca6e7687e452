#!/usr/bin/env bash
# Checks whether this container can train. The first check is the self-test on two CPU ranks, which does not disturb a
# training job (no GPU, low priority, one thread per rank). Later checks only compare the list of GPUs with the first.
#
# $JREG_HEALTH is the file that marks a passed self-test.
set -euo pipefail
passed=${JREG_HEALTH:-${TMPDIR:-/tmp}/jreg_megatron.healthy}

gpus() {
    # NVIDIA's runtime adds nvidia-smi to a container with GPUs
    if command -v nvidia-smi >/dev/null; then nvidia-smi -L; fi
}

now=$(gpus) || { echo "unhealthy: nvidia-smi fails: $now" && exit 1; }
if [[ -f $passed ]]; then
    if [[ $now != "$(<"$passed")" ]]; then
        echo "unhealthy: the GPUs are not those of the start: $now"
        exit 1
    fi
    echo "healthy: the self-test has passed before"
    exit
fi
report=$(CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 nice -n 5 python -m jreg_megatron.selftest --nproc 2 2>&1) || {
    echo "unhealthy: the self-test fails:"
    tail -n 20 <<<"$report"
    exit 1
}
printf '%s\n' "$now" >"$passed"
echo "healthy: $(tail -n 1 <<<"$report")"
