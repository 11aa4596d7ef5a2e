#!/usr/bin/env bash
# Pretrain a CLIPS encoder:  scripts/pretrain_clips.sh --config configs/vision/s16_112.yaml [--section.field value ...]
# RANKS, PORT and HOSTFILE: see environment.sh.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec "${LAUNCH[@]}" --module vision_tower.pretrain "$@"
