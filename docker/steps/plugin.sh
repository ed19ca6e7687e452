#!/usr/bin/env bash
# Installs jreg_megatron itself: editable, so that a checkout can be mounted over the image's copy.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$VIRTUAL_ENV/bin/python
uv=${UV:-$VIRTUAL_ENV/bin/uv}
# The constraints also pin the build tools.
if [[ -x $uv ]]; then
    "$uv" pip install --python "$python" --no-deps --build-constraints constraints.txt --editable .
else
    # Which of the two names applies to a build depends on pip's version.
    PIP_CONSTRAINT=$PWD/constraints.txt PIP_BUILD_CONSTRAINT=$PWD/constraints.txt \
        "$python" -m pip install --no-deps --editable .
fi
# The image's user cannot write here. By hash, since the times of the sources differ between builds.
"$python" -m compileall -q --invalidation-mode unchecked-hash jreg_megatron
pinned=$(sed -n 's/^megatron-core==//p' constraints.txt)
"$python" - "$pinned" <<'PYTHON'
import importlib.metadata, sys

import jreg_megatron

found = importlib.metadata.version("megatron-core")
if found != sys.argv[1]:
    sys.exit(f"plugin.sh: error: megatron-core is {found}; constraints.txt pins {sys.argv[1]}")
print(f"jreg_megatron {jreg_megatron.__version__} on Megatron-Core {found}, torch {importlib.metadata.version('torch')}")
PYTHON
