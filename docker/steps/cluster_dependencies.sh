#!/usr/bin/env bash
# Installs what jreg_megatron needs and the base lacks, without itself, so that the layer lasts as long as the pins do.
#
#   cluster_dependencies.sh EXTRA...   # of pyproject.toml
#
# By pip, for uv does not see the base's packages from inside a virtual environment and would bring another torch.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$VIRTUAL_ENV/bin/python
# Without PIP_CONSTRAINT, which names the base's own file there: ours holds the same packages, and says which may move.
"$python" docker/steps/base.py requirements pyproject.toml "$@" |
    PIP_CONSTRAINT='' "$python" -m pip install --constraint "$VIRTUAL_ENV/constraints.txt" --requirement /dev/stdin || {
    echo "cluster_dependencies.sh: error: what jreg_megatron needs does not fit the base, see above;" \
        "take another BASE_IMAGE" >&2
    exit 1
}
"$python" docker/steps/base.py check
