#!/usr/bin/env bash
# LLaVA stage 2, projector and LLM:  scripts/stage2_finetune.sh --config configs/mllm/vicuna_7b_finetune.yaml [--section.field value ...]
# RANKS, PORT and HOSTFILE: see environment.sh.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec "${LAUNCH[@]}" --module clips_mllm.train "$@"
