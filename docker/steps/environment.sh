#!/usr/bin/env bash
# Makes the virtual environment of an image, in $VIRTUAL_ENV.
#
#   environment.sh             an empty one, with uv
#   environment.sh --on-base   one on top of the base's packages; it records their versions
#
# $BASE_PYTHON is the base's Python (default: python3). $UV is an installed uv.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${BASE_PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' || {
    echo "environment.sh: error: the base has $("$python" --version), and Megatron-Core 0.19 needs 3.12 or later" >&2
    exit 2
}
if [[ ${1-} == --on-base ]]; then
    # Without pip: the base's pip is visible here, and Ubuntu's Python cannot install another one.
    "$python" -m venv --without-pip --system-site-packages "$VIRTUAL_ENV"
    "$python" docker/steps/base.py record "$VIRTUAL_ENV/base.json"
    "$python" docker/steps/base.py constraints "$VIRTUAL_ENV/base.json" constraints.txt >"$VIRTUAL_ENV/constraints.txt"
    # The base's own torchrun starts the base's Python, which does not see this environment.
    printf '#!/bin/sh\nexec "%s/bin/python" -m torch.distributed.run "$@"\n' "$VIRTUAL_ENV" >"$VIRTUAL_ENV/bin/torchrun"
    chmod +x "$VIRTUAL_ENV/bin/torchrun"
else
    "$python" -m venv ${UV:+--without-pip} "$VIRTUAL_ENV"
    test -n "${UV-}" || "$VIRTUAL_ENV/bin/python" -m pip install --quiet --constraint constraints.txt uv
fi
