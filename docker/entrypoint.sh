#!/usr/bin/env bash
# Runs a recipe, a tool or any other command in a container of jreg_megatron.
#
#   llama_1b jreg [--dry-run | --smoke] [-- MORE MEGATRON FLAGS]
#   selftest --nproc 2
#   data prepare --help
#   bash
#
# Recipes and tools take --help. Results go to /workspace/runs: mount a folder there to keep them.
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)

recipes=()
for file in "$home"/recipes/*.sh; do
    name=$(basename "$file" .sh)
    # run and slurm are no recipes; they start one.
    if [[ -x $file && $name != run && $name != slurm ]]; then recipes+=("$name"); fi
done
tools=(bench claims compare data demo evaluate export import launch measure pretrain report selftest sweep)
if [[ -d $home/tests ]] && python -c 'import pytest' 2>/dev/null; then tools+=(test); fi
known="recipes: ${recipes[*]}; tools: ${tools[*]}"

name=${1---help}
if [[ $name == -h || $name == --help ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    echo "${known/; /$'\n'}"
    exit
fi
shift || true
# exec, so that a scheduler's SIGTERM reaches the command.
if [[ " ${recipes[*]} " == *" $name "* ]]; then
    exec "$home/recipes/$name.sh" "$@"
elif [[ $name == test && " ${tools[*]} " == *" test "* ]]; then
    # In the source folder, where the image's user cannot write
    export HYPOTHESIS_STORAGE_DIRECTORY=$PWD/.hypothesis
    cd "$home"
    exec python -m pytest -p no:cacheprovider "$@"
elif [[ " ${tools[*]} " == *" $name "* ]]; then
    exec python -m jreg_megatron.cli "$name" "$@"
elif command -v -- "$name" >/dev/null; then
    exec "$name" "$@"
fi
echo "entrypoint.sh: error: there is no recipe, tool or command '$name' here; $known" >&2
exit 2
