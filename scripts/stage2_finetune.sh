#!/usr/bin/env bash
# LLaVA stage 2, projector and LLM:  scripts/stage2_finetune.sh --config configs/mllm/vicuna_7b_finetune.yaml [--section.field value ...]
# Several nodes: HOSTFILE=hosts.txt scripts/stage2_finetune.sh ... (DeepSpeed's host file: "name slots=8" a line).
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec deepspeed --quiet --num_gpus "$RANKS" ${HOSTFILE:+--hostfile "$HOSTFILE"} --module clips_mllm.train "$@"
