"""`clips-mllm web`: talk to a multimodal LLM in the browser.

clips-mllm web runs/quickstart/finetune --examples runs/quickstart/data/examples.json
clips-mllm web runs/quickstart/finetune --beside runs/quickstart/align          # the same question to two models
clips-mllm web runs/quickstart/finetune --encoder runs/quickstart/encoder --images photos/
"""

from __future__ import annotations

import contextlib
import hmac
import os
import signal
import sys
from pathlib import Path

from clips_mllm.talk.examples import read_examples
from clips_mllm.talk.recipes import WebRecipe
from clips_mllm.talk.start import bound_socket, check_model, read_token, start_engine
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.recipe import parse_recipe


def main(argv: list[str]) -> None:
    """Serve the page until Ctrl-C."""
    recipe = parse_recipe(WebRecipe, argv, command="web", positional=("model",))
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGHUP, end)  # a terminal that is closed
    with contextlib.ExitStack() as stack:
        launch(recipe, stack).block_thread()


def end(*_: object) -> None:
    """End, but not without leaving the stack, which deletes uploads; a second signal does not disturb that."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def launch(recipe: WebRecipe, stack: contextlib.ExitStack):  # type: ignore[no-untyped-def]  # gradio is an extra
    """Load everything, start the page, and return it; leaving `stack` closes it."""
    check(recipe)
    token = read_token(recipe.token_file)
    examples = read_examples(Path(recipe.examples)) if recipe.examples else []
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UserError("gradio is not installed", remedy="pip install 'clips-mllm[web]'") from error
    from clips_mllm.talk.web.page import CSS, THEME, Page
    from clips_mllm.talk.web.uploads import MEGABYTE, upload_folder

    gallery = None
    if recipe.encoder is not None and recipe.images is not None:
        from clips_mllm.talk.web.gallery import Gallery
        from vision_tower.checkpoints.encoder import load_encoder

        captions = Path(recipe.captions) if recipe.captions else None
        gallery = Gallery(load_encoder(recipe.encoder, recipe.device), Path(recipe.images), captions)
    names = [recipe.model] if recipe.beside is None else [recipe.model, recipe.beside]
    engines = [stack.enter_context(start_engine(name, recipe, max_batch_size=4)) for name in names]
    page = Page(
        engines=engines,
        names=short_names(names),
        examples=examples,
        gallery=gallery,
        feedback=Path(recipe.feedback) if recipe.feedback else None,
        max_upload_mb=recipe.max_upload_mb,
        max_pixels=recipe.max_pixels,
        max_images=recipe.max_images,
    )
    stack.enter_context(upload_folder())
    blocks: gradio.Blocks = page.build()
    stack.callback(blocks.close)
    try:
        _, address, _ = blocks.queue(default_concurrency_limit=8, max_size=64).launch(
            server_name=recipe.host,
            server_port=recipe.port or None,
            auth=None if token is None else (lambda _, given: hmac.compare_digest(given.encode(), token.encode())),
            max_file_size=recipe.max_upload_mb * MEGABYTE,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            footer_links=[],
            show_error=False,
            theme=THEME,
            css=CSS,
        )
    except OSError as error:  # somebody else took the port while the models were loaded
        raise UserError(f"{recipe.host}:{recipe.port}: cannot listen there", remedy="give another port") from error
    print(f"talk at {address} (Ctrl-C stops)", flush=True)
    return blocks


def check(recipe: WebRecipe) -> None:
    """What can be seen before anything is loaded. Raises UserError."""
    for key in ("model", "beside"):
        if (name := getattr(recipe, key)) is not None:
            check_model(name, recipe, key)
    if (recipe.encoder is None) != (recipe.images is None):
        raise UserError("encoder and images belong together: the retrieval tab needs both")
    if recipe.captions is not None and recipe.encoder is None:
        raise UserError("the retrieval tab needs encoder and images, too", key="captions")
    for key in ("encoder", "images"):
        if (folder := getattr(recipe, key)) is not None and not Path(folder).is_dir():
            raise UserError(f"no such folder ({key})", file=folder, remedy="check the path")
    if recipe.captions is not None and not Path(recipe.captions).is_file():
        raise UserError("no such file (captions)", file=recipe.captions, remedy="check the path")
    for key in ("max_upload_mb", "max_pixels", "max_images"):
        if getattr(recipe, key) < 1:
            raise UserError(f"{key}={getattr(recipe, key)}: at least 1")
    if recipe.feedback is not None:
        check_writable(Path(recipe.feedback))
    bound_socket(recipe.host, recipe.port).close()


def check_writable(file: Path) -> None:
    """Raise UserError where a file cannot be appended to, or made."""
    there = file
    while not there.exists() and there != there.parent:
        there = there.parent
    if file.is_dir() or (there != file and not there.is_dir()) or not os.access(there, os.W_OK):
        raise UserError("cannot be written (feedback)", file=file, remedy="name a JSONL file in a folder of yours")


def short_names(models: list[str]) -> list[str]:
    """The shortest ends of their paths that tell the models apart: the page shows no more of this machine."""
    paths = [Path(model).parts for model in models]
    for count in range(1, max(map(len, paths)) + 1):
        ends = [str(Path(*parts[-count:])) for parts in paths]
        if len(set(ends)) == len(ends):
            return ends
    return [parts[-1] for parts in paths]


if __name__ == "__main__":
    sys.exit(run_command(main))
