#!/usr/bin/env bash
# Installs what jreg_megatron needs on a CPU, without itself, so that the layer lasts as long as the pins do.
#
#   cpu_dependencies.sh EXTRA...   # of pyproject.toml
#
# $TORCH_BACKEND=cpu takes PyTorch's build for the CPU; empty, that of the package index.
set -euo pipefail
cd "$(dirname "$0")/../.."
install=("${UV:-$VIRTUAL_ENV/bin/uv}" pip install --python "$VIRTUAL_ENV/bin/python" --constraint constraints.txt)
# Megatron-Core imports triton on a CPU too. torch's build for the CPU does not bring it, and uv would look for it
# beside that build.
"${install[@]}" triton
"${install[@]}" --requirement pyproject.toml "${@/#/--extra=}" ${TORCH_BACKEND:+--torch-backend="$TORCH_BACKEND"}
