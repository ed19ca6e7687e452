#!/usr/bin/env bash
# Builds both images without a Docker engine, and uses them.
#
#   docker/check.sh [cpu] [cluster]   # default: both
#
# It needs root, debootstrap and buildah (both are Debian packages). Only the bases are substitutes, since a machine
# without an image registry cannot have the real ones: a fresh Debian with its Python; for the cluster, the same with
# torch in the place of NVIDIA's, under another version than ours, and with some packages older than ours. Transformer
# Engine, Apex and GPUs are not tested. $WORK is its folder of 40 GB, which stays.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${WORK:-${TMPDIR:-/tmp}/jreg_megatron_images}
uv=${UV:-.venv/bin/uv}
for program in buildah debootstrap "$uv"; do
    command -v "$program" >/dev/null || { echo "check.sh: error: there is no $program; install it" >&2 && exit 2; }
done
[[ $EUID == 0 ]] || { echo "check.sh: error: it makes a Debian in a folder, so it must run as root" >&2 && exit 2; }
mkdir -p "$work"
export DOCKER=$work/docker
printf '#!/bin/sh\nexec buildah --root "%s" --runroot "%s" "$@"\n' "$work/images" "$work/state" >"$DOCKER"
chmod +x "$DOCKER"
cache=$("$uv" cache dir)

say() { printf '\n== %s\n' "$*"; }
fail() { say "FAILED: $*" && exit 1; }

# Makes a base image from a folder
import() {
    local container
    container=$("$DOCKER" from scratch)
    "$DOCKER" add --quiet "$container" "$1" /
    # This host's certificates: it may be behind a proxy.
    "$DOCKER" config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        --env SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt "$container"
    "$DOCKER" commit --quiet --rm "$container" "localhost/$2"
}

build() {
    say "Building the $1 image"
    docker/build.sh "$1" --tag "localhost/jreg-$1" --isolation chroot --format docker --layers=false --pull-never \
        --volume "$cache:/root/.cache/uv" --build-arg BASE_DIGEST= "${@:2}"
}

# Does what docker run IMAGE ARGUMENTS... does, as the user $AS if it is set
run() {
    local image=localhost/jreg-$1 container entrypoint status=0
    read -ra entrypoint <<<"$("$DOCKER" inspect --type image --format '{{range .OCIv1.Config.Entrypoint}}{{.}} {{end}}' "$image")"
    container=$("$DOCKER" from --pull-never "$image")
    # A host name that resolves, as Docker gives it: torchrun and gloo look up their own address.
    "$DOCKER" run --isolation chroot --hostname localhost ${AS:+--user "$AS"} "$container" -- "${entrypoint[@]}" "${@:2}" || status=$?
    "$DOCKER" rm "$container" >/dev/null
    return "$status"
}

debian() {
    local root=$work/debian
    if [[ ! -f $root/usr/bin/python ]]; then
        say "Making a Debian"
        rm -rf "$root"
        debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv trixie "$root" >"$work/debian.log"
        ln -s python3 "$root/usr/bin/python"
        cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
        # pip refuses to install into Debian's Python. The images of Python and NVIDIA have no such rule.
        rm -f "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
    fi
    import "$root" python
}

like_nvidia() {
    local root=$work/like_nvidia site info
    if [[ ! -f $root/ready ]]; then
        say "Putting torch into it"
        rm -rf "$root"
        cp -a "$work/debian" "$root"
        rm -rf "$root"/usr/lib/python3*/ensurepip # Ubuntu has it in a package that is not in NVIDIA's image
        site=$(echo "$root"/usr/local/lib/python3.*/dist-packages)
        "$uv" pip install --quiet --target "$site" --python-version "$(basename "${site%/*}" | tr -d '[:alpha:]')" \
            "torch==$(sed -n 's/^torch==//p' constraints.txt)" numpy==2.3.5 packaging==24.0 protobuf==5.29.5
        info=$(echo "$site"/torch-*.dist-info)
        sed -i 's/^Version: .*/&+nv.stand.in/' "$info/METADATA"
        mv "$info" "${info%.dist-info}+nv.stand.in.dist-info"
        touch "$root/ready"
    fi
    import "$root" nvidia
}

try_both() { # IMAGE
    say "$1: what it knows"
    run "$1" --help
    say "$1: the recipes"
    run "$1" llama_1b jreg --dry-run | tail -n 5
    say "$1: the user"
    [[ $(run "$1" id -u) == 10001 ]] || fail "it does not run as user 10001"
    run "$1" touch /opt/venv/mine 2>/dev/null && fail "its user can change it"
    say "$1: the health check, the second time without the self-test"
    # shellcheck disable=SC2016
    run "$1" bash -c 'time "$0" && time "$0"' /opt/jreg_megatron/docker/healthcheck.sh
    say "$1: as a user whom it does not know"
    AS=4242:4242 run "$1" selftest --nproc 1 | tail -n 1
}

wanted=${*:-cpu cluster}
debian
if [[ $wanted == *cpu* ]]; then
    build cpu --build-arg BASE_IMAGE=localhost/python --build-arg TORCH_BACKEND=
    try_both cpu
    say "cpu: the demo"
    run cpu demo --iterations 10
    say "cpu: some tests"
    run cpu test -q tests/test_formulas.py tests/test_settings.py tests/test_patches.py
fi
if [[ $wanted == *cluster* ]]; then
    like_nvidia
    build cluster --build-arg BASE_IMAGE=localhost/nvidia --build-arg TRANSFORMER_ENGINE= --build-arg APEX=
    try_both cluster
    say "cluster: torch is the base's"
    run cluster python -c 'import torch; from importlib.metadata import version as v; print(v("torch"), torch.__file__)' |
        tee /dev/stderr | grep -q 'nv.stand.in /usr/local/' || fail "it is not"
    say "cluster: torchrun"
    run cluster torchrun --nproc-per-node 2 -m jreg_megatron.selftest --tp 2 --precision fp32 | tail -n 1
    say "cluster: a base without torch is refused"
    said=$(build cluster --tag localhost/none --build-arg BASE_IMAGE=localhost/python 2>&1) && fail "it was not"
    grep 'the base has no torch' <<<"$said" || fail "by another error: $said"
fi
say "All is well"
