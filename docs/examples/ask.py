"""Ask a multimodal LLM about an image, with the stock `generate` of transformers.

python docs/examples/ask.py runs/quickstart/finetune photo.png "What is in the image?"
"""

from __future__ import annotations

import argparse
import sys

import torch
from PIL import Image

from clips_mllm import load_mllm


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub id of a LLaVA checkpoint or of an adapter")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    args = parser.parse_args(argv)

    mllm = load_mllm(args.model)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": args.question}]}]
    prompt = mllm.processor.apply_chat_template(messages, add_generation_prompt=True)
    image = Image.open(args.image).convert("RGB")
    inputs = mllm.processor(text=prompt, images=[image], return_tensors="pt").to(mllm.device, mllm.model.dtype)
    with torch.inference_mode():
        output = mllm.model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    print(mllm.tokenizer.decode(answer, skip_special_tokens=True).strip())


if __name__ == "__main__":
    main(sys.argv[1:])
