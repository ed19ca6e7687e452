#!/usr/bin/env bash
# Run `python -m MODULE ARGS...` of this checkout. The Python is $PYTHON; else the first with the needed packages among
# python3 (of the container, or of an activated environment) and the one in .venv.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

candidates=(python3 "$root/.venv/bin/python")
if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
for python in "${candidates[@]}"; do
    if PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$python" -c '
import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) is None for name in ("jreg_megatron", "megatron", "torch")))' 2>/dev/null
    then
        PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m "$@"
    fi
done
echo "jreg_megatron: error: ${PYTHON:-python3} has no jreg_megatron with torch and megatron-core;" \
    "run make venv in $root, or set PYTHON to a Python that has them" >&2
exit 2
