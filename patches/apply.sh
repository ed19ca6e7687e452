#!/usr/bin/env bash
# Put JREG into a Megatron-LM tree, or take it out again.
#
#   patches/apply.sh TREE           apply
#   patches/apply.sh --check TREE   say what would be done
#   patches/apply.sh --revert TREE  take it out
#
# The patch is that of the tree's version (megatron/core/package_info.py). Nothing is changed unless all of it fits.
set -euo pipefail

fail() {
    echo "patches/apply.sh: error: $*" >&2
    exit 2
}

action=apply
case ${1-} in
    --check | --revert) action=${1#--} && shift ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit ;;
    -*) fail "unknown option $1; known are --check and --revert" ;;
esac
test $# = 1 || fail "give one Megatron-LM tree; usage: patches/apply.sh [--check | --revert] TREE"
tree=$(cd -P "$1" 2>/dev/null && pwd) || fail "$1 is not a folder"
command -v git >/dev/null || fail "git is not installed, and the patch is applied by it"

info=$tree/megatron/core/package_info.py
test -f "$info" || fail "$tree is no Megatron-LM tree: it has no megatron/core/package_info.py"
number() { sed -nE "s/^$1 *= *([0-9]+).*/\1/p" "$info"; }
version=$(number MAJOR).$(number MINOR)

patches=$(cd "$(dirname "$0")" && pwd)/megatron-lm
patch=
for candidate in "$patches"/*/jreg.patch; do
    case $(basename "$(dirname "$candidate")") in
        core_v"$version".*) patch=$candidate ;;
    esac
done
if test -z "$patch"; then
    patch=$patches/main/jreg.patch
    echo "No patch for Megatron-Core $version by name; trying that of Megatron-LM's main branch"
fi
name=megatron-lm/$(basename "$(dirname "$patch")")/jreg.patch

# As if the tree were in no repository: a tree that is vendored in a larger one is patched alike.
git_apply() { (cd -P "$tree" && GIT_CEILING_DIRECTORIES=$(dirname "$PWD") git apply "$@" "$patch"); }

if git_apply --reverse --check 2>/dev/null; then
    if test "$action" = revert; then
        git_apply --reverse
        echo "Reverted $name in $tree"
    else
        echo "$tree (Megatron-Core $version) has $name already"
    fi
    exit
fi
if grep -qs '^@jreg\.' "$tree"/megatron/training/{arguments,training}.py; then
    fail "$tree has a part of $name, or another version of it; nothing was changed. Take its lines out by hand (they" \
        "begin with @jreg. and 'from jreg_megatron'), or restore megatron/training/{arguments,training}.py"
fi
test "$action" != revert || fail "$tree does not have $name, so there is nothing to revert"
if ! said=$(git_apply --check 2>&1); then
    echo "$said" >&2
    fail "$name does not fit $tree (Megatron-Core $version); nothing was changed. Take the launcher (python -m" \
        "jreg_megatron.launch), or write the eight lines by hand: patches/README.md says what each is for"
fi
if test "$action" = check; then
    echo "$name fits $tree (Megatron-Core $version)"
    exit
fi
git_apply
echo "Applied $name to $tree (Megatron-Core $version)"
