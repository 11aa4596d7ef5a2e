#!/usr/bin/env bash
# Run the pipeline end to end:  scripts/pipeline.sh quickstart|smoke
# A step that finished with the same command is skipped; an interrupted one resumes from its last checkpoint.
set -euo pipefail
NAME=${1:?usage: scripts/pipeline.sh quickstart|smoke}
RUN=runs/$NAME
source "$(dirname "$0")/environment.sh"
step() { python scripts/step.py "$RUN/steps/$1.json" "${@:2}"; }

step 1-data     clips-mllm data sample --config "configs/data/$NAME.yaml"
step 2-pretrain scripts/pretrain_clips.sh --config "configs/vision/$NAME.yaml"
step 3-retrieve clips-mllm retrieve "$RUN/encoder" --data "$RUN/data/retrieval/test.json"
step 4-projector python -m clips_mllm.sample.projector --config "configs/mllm/${NAME}_align.yaml"
step 5-align    scripts/stage1_align.sh --config "configs/mllm/${NAME}_align.yaml"
step 6-finetune scripts/stage2_finetune.sh --config "configs/mllm/${NAME}_finetune.yaml"
step 7-evaluate clips-mllm evaluate "$RUN/finetune" --config "configs/eval/$NAME.yaml"
step 8-shuffled clips-mllm evaluate "$RUN/finetune" --config "configs/eval/${NAME}_shuffled.yaml"
step 9-chat     clips-mllm chat "$RUN/finetune" --examples "$RUN/data/examples.json" --output "$RUN/chat.json"
clips-mllm report "$RUN"
