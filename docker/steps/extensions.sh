#!/usr/bin/env bash
# Transformer Engine and Apex: the base's where it has them; else built against the base's torch.
#
# $TRANSFORMER_ENGINE is a version, $APEX what pip can install; empty leaves it out.
set -euo pipefail
python=$VIRTUAL_ENV/bin/python
build() {
    PIP_CONSTRAINT='' "$python" -m pip install --constraint "$VIRTUAL_ENV/constraints.txt" --no-build-isolation "$@"
}
# Asked by the metadata alone: importing either one may need the driver, which no build has.
has() {
    "$python" -c 'import importlib.metadata as m, sys; print(sys.argv[1], "of the base:", m.version(sys.argv[1]))' "$1" \
        2>/dev/null
}

if ! has transformer-engine && [[ -n ${TRANSFORMER_ENGINE-} ]]; then
    cuda=$("$python" -c 'import torch; print(torch.version.cuda.split(".")[0])')
    NVTE_FRAMEWORK=pytorch build "transformer-engine[pytorch,core_cu$cuda]==$TRANSFORMER_ENGINE"
fi
if ! has apex && [[ -n ${APEX-} ]]; then
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 build "$APEX"
fi
