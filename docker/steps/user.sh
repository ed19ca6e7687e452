#!/usr/bin/env bash
# The image's user, and a place to work that every other user id can write to as well (docker run --user, enroot,
# Kubernetes). Not 1000: Ubuntu's images have a user of that id.
set -euo pipefail
groupadd --gid 10001 jreg
useradd --uid 10001 --gid jreg --no-create-home --home-dir /workspace --shell /bin/bash jreg
mkdir -p /workspace/runs /workspace/data
chmod 1777 /workspace /workspace/runs /workspace/data
