#!/usr/bin/env bash
# Builds an image from this checkout.
#
#   docker/build.sh cluster|cpu [--dry-run] [more flags of docker build]
#
# The tag is jreg_megatron:VERSION-cluster or -cpu. $DOCKER is the build program (default: docker).
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1-} in
    cluster) file=docker/Dockerfile ;;
    cpu) file=docker/Dockerfile.cpu ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit ;;
    *) echo "docker/build.sh: error: the image is '${1-}'; it must be cluster or cpu" >&2 && exit 2 ;;
esac
image=$1
shift
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' jreg_megatron/__init__.py)
# The image has the commit's time, so the same commit gives the same layers.
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
command=(
    "${DOCKER:-docker}" build --file "$file" --tag "jreg_megatron:$version-$image"
    --build-arg "VERSION=$version"
    --build-arg "REVISION=$(git describe --always --abbrev=40 --dirty --exclude='*' 2>/dev/null || echo unknown)"
    --build-arg "CREATED=$(date --utc --date="@$SOURCE_DATE_EPOCH" +%FT%TZ)"
    --build-arg "SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH"
)
if [[ ${1-} == --dry-run ]]; then
    shift
    printf '%q ' "${command[@]}" "$@" .
    echo
    exit
fi
DOCKER_BUILDKIT=1 exec "${command[@]}" "$@" .
