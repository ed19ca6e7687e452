#!/usr/bin/env bash
# Installs the packages that jreg_megatron needs and the base lacks. The layer changes only when the pins change.
#
#   cluster_dependencies.sh EXTRA...   # of pyproject.toml
#
# With pip: in a virtual environment uv does not see the base's packages and would install another torch.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$VIRTUAL_ENV/bin/python
# Without PIP_CONSTRAINT, which names the base's own file: ours has the same packages, and says which may change.
"$python" docker/steps/base.py requirements pyproject.toml "$@" |
    PIP_CONSTRAINT='' "$python" -m pip install --constraint "$VIRTUAL_ENV/constraints.txt" --requirement /dev/stdin || {
    echo "cluster_dependencies.sh: error: what jreg_megatron needs does not fit the base, see above;" \
        "take another BASE_IMAGE" >&2
    exit 1
}
"$python" docker/steps/base.py check
