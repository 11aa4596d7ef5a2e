#!/usr/bin/env bash
# Pretrain a CLIPS encoder:  scripts/pretrain_clips.sh --config configs/vision/s16_112.yaml [--section.field value ...]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec torchrun --standalone --nproc_per_node "$RANKS" -m vision_tower.pretrain "$@"
