"""Ask a running `clips-mllm serve` about an image with the official OpenAI client, and stream the answer.

clips-mllm serve runs/quickstart/finetune --port 8000
python docs/examples/call_server.py http://HOST:8000/v1 photo.png "What is in the image?"
"""

from __future__ import annotations

import argparse
import base64
import mimetypes
import sys
from pathlib import Path

import openai


def data_url(file: Path) -> str:
    """Return an image file as a data URL."""
    kind = mimetypes.guess_type(file.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="the server's address with /v1 at the end")
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--token", default="none", help="the token of `--token_file`, if the server has one")
    args = parser.parse_args(argv)

    client = openai.OpenAI(base_url=args.address, api_key=args.token)
    model = client.models.list().data[0].id
    content = [
        {"type": "image_url", "image_url": {"url": data_url(args.image)}},
        {"type": "text", "text": args.question},
    ]
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], max_tokens=128, stream=True
    )
    for event in stream:
        if event.choices and event.choices[0].delta.content:
            print(event.choices[0].delta.content, end="", flush=True)
    print()


if __name__ == "__main__":
    main(sys.argv[1:])
