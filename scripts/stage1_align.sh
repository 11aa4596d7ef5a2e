#!/usr/bin/env bash
# LLaVA stage 1, the projector:  scripts/stage1_align.sh --config configs/mllm/vicuna_7b_align.yaml [--section.field value ...]
# RANKS, PORT and HOSTFILE: see environment.sh.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec "${LAUNCH[@]}" --module clips_mllm.train "$@"
