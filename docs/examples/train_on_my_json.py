"""Fine-tune a multimodal LLM on your own questions and answers.

Writes LLaVA's JSON from a CSV with the columns image, question, answer, checks it, and starts stage 2:

python docs/examples/train_on_my_json.py my.csv --images photos --checkpoint runs/vicuna_7b_align --output runs/my
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

from clips_mllm.doctor import main as doctor
from clips_mllm.train import main as train


def to_llava(rows: list[dict[str, str]]) -> list[dict[str, object]]:
    """Return one conversation per row, in the format of LLaVA's instruction data."""
    return [
        {
            "id": str(number),
            "image": row["image"],
            "conversations": [
                {"from": "human", "value": "<image>\n" + row["question"]},
                {"from": "gpt", "value": row["answer"]},
            ],
        }
        for number, row in enumerate(rows)
    ]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", type=Path)
    parser.add_argument("--images", required=True, help="folder that the column `image` is relative to")
    parser.add_argument("--checkpoint", required=True, help="a LLaVA checkpoint, for example a run of stage 1 or 2")
    parser.add_argument("--output", required=True)
    parser.add_argument("--template", default="vicuna_v1", help="the chat template of the LLM; see docs/training.md")
    args, more = parser.parse_known_args(argv)

    with args.questions.open(newline="", encoding="utf-8") as file:
        conversations = to_llava(list(csv.DictReader(file)))
    data = args.questions.with_suffix(".json")
    data.write_text(json.dumps(conversations, indent=1))

    doctor([str(data), "--images", args.images])  # reads every image; prints what training would skip
    train(
        [
            *("--output_dir", args.output, "--model.checkpoint", args.checkpoint),
            *("--data.file", str(data), "--data.images", args.images, "--data.template", args.template),
            *("--stage.llm", "true", "--training.learning_rate", "2e-5"),
            *more,  # any other field of the recipe, for example --training.epochs 3
        ]
    )


if __name__ == "__main__":
    main(sys.argv[1:])
