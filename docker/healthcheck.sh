#!/usr/bin/env bash
# Is this container fit to train? The first time: the self-test on two CPU ranks, out of a training job's way (no GPU,
# low priority, one thread a rank). Once it has passed, only whether the same GPUs are still there.
#
# $JREG_HEALTH is the file that remembers.
set -euo pipefail
passed=${JREG_HEALTH:-${TMPDIR:-/tmp}/jreg_megatron.healthy}

gpus() {
    # Put into the container by NVIDIA's runtime, if it is given GPUs
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
