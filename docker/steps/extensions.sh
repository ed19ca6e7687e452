#!/usr/bin/env bash
# Transformer Engine and Apex: those of the base, or built against the base's torch.
#
# $TRANSFORMER_ENGINE is a version, $APEX an argument of pip install. Empty: left out.
set -euo pipefail
python=$VIRTUAL_ENV/bin/python
build() {
    PIP_CONSTRAINT='' "$python" -m pip install --constraint "$VIRTUAL_ENV/constraints.txt" --no-build-isolation "$@"
}
# From the metadata only: an import may need the driver, which a build does not have.
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
