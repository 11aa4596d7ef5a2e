#!/usr/bin/env bash
# Pretrain a CLIPS encoder:  scripts/pretrain_clips.sh --config configs/vision/s16_112.yaml [--section.field value ...]
# Several nodes: HOSTFILE=hosts.txt scripts/pretrain_clips.sh ... (DeepSpeed's host file: "name slots=8" a line).
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec deepspeed --quiet --num_gpus "$RANKS" ${HOSTFILE:+--hostfile "$HOSTFILE"} --module vision_tower.pretrain "$@"
