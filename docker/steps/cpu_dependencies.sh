#!/usr/bin/env bash
# Installs the packages that jreg_megatron needs on a CPU. The layer changes only when the pins change.
#
#   cpu_dependencies.sh EXTRA...   # of pyproject.toml
#
# $TORCH_BACKEND=cpu takes PyTorch's CPU build; empty: the build of the package index.
set -euo pipefail
cd "$(dirname "$0")/../.."
install=("${UV:-$VIRTUAL_ENV/bin/uv}" pip install --python "$VIRTUAL_ENV/bin/python" --constraint constraints.txt)
# Megatron-Core imports triton on a CPU too. PyTorch's CPU build does not include it, and uv would look for it in the
# index of that build.
"${install[@]}" triton
"${install[@]}" --requirement pyproject.toml "${@/#/--extra=}" ${TORCH_BACKEND:+--torch-backend="$TORCH_BACKEND"}
