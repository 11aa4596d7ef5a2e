"""`clips-mllm web`: chat with a multimodal LLM in the browser.

clips-mllm web runs/my_model --examples examples.json
clips-mllm web runs/my_model --compare_with runs/my_other_model    # the same question to two models
clips-mllm web runs/my_model --encoder runs/my_encoder --images photos/
"""

from __future__ import annotations

import contextlib
import hmac
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_mllm.talk.images import read_examples
from clips_mllm.talk.recipe import WebRecipe
from clips_mllm.talk.start import bound_socket, check_model, read_token, start_engine
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.recipe import check_ranges, parse_recipe

if TYPE_CHECKING:
    from clips_mllm.talk.web.retrieval import Gallery


def main(argv: list[str]) -> None:
    """Serve the page until Ctrl-C."""
    recipe = parse_recipe(WebRecipe, argv, command="web", positional=("model",))
    signal.signal(signal.SIGTERM, exit_cleanly)
    signal.signal(signal.SIGHUP, exit_cleanly)  # the terminal was closed
    with contextlib.ExitStack() as stack:
        launch(recipe, stack).block_thread()


def exit_cleanly(*_: object) -> None:
    """Exit after closing the stack, which deletes uploads; ignore further signals."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def launch(recipe: WebRecipe, stack: contextlib.ExitStack) -> Any:
    """Load the models, start the page, and return its `gradio.Blocks`; `stack` closes everything."""
    check(recipe)
    token = read_token(recipe.token_file)
    examples = read_examples(Path(recipe.examples)) if recipe.examples else []
    stack.enter_context(gradio_environment())
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError("gradio is not installed", remedy="pip install 'clips-mllm[web]'") from error
    from clips_mllm.talk.web.page import CSS, THEME, Page
    from clips_mllm.talk.web.uploads import MEGABYTE

    gallery = load_gallery(recipe)
    models = [recipe.model] if recipe.compare_with is None else [recipe.model, recipe.compare_with]
    page = Page(
        engines=[stack.enter_context(start_engine(model, recipe, max_batch_size=4)) for model in models],
        names=short_names(models),
        examples=examples,
        gallery=gallery,
        feedback=Path(recipe.feedback) if recipe.feedback else None,
        max_upload_mb=recipe.max_upload_mb,
        max_pixels=recipe.max_pixels,
        max_images=recipe.max_images,
    )
    blocks = page.build()
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
    except OSError as error:  # another process took the port while the models were loaded
        raise UserError(f"cannot listen on {recipe.host}:{recipe.port}", remedy="choose another --port") from error
    print(f"chat at {address} (Ctrl-C stops)", flush=True)
    return blocks


@contextlib.contextmanager
def gradio_environment() -> Iterator[None]:
    """Set what Gradio reads from the environment only: no usage statistics, and the folder of uploads.

    The folder can be read by this user only, and is deleted at the end.
    """
    with tempfile.TemporaryDirectory(prefix="clips-mllm-web-", ignore_cleanup_errors=True) as uploads:
        variables = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads}
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def load_gallery(recipe: WebRecipe) -> Gallery | None:
    """Embed the images and captions of the retrieval tab, if there are any."""
    if recipe.encoder is None or recipe.images is None:
        return None
    from clips_mllm.talk.web.retrieval import Gallery
    from vision_tower.checkpoints.encoder import load_encoder

    captions = Path(recipe.captions) if recipe.captions else None
    return Gallery(load_encoder(recipe.encoder, recipe.device), Path(recipe.images), captions)


def check(recipe: WebRecipe) -> None:
    """Check the recipe before anything is loaded. Raises UserError."""
    check_model(recipe.model, recipe)
    if recipe.compare_with is not None:
        check_model(recipe.compare_with, recipe, "compare_with")
    if (recipe.encoder is None) != (recipe.images is None):
        raise UserError("the retrieval tab needs both", key="encoder, images", remedy="set both or neither")
    if recipe.captions is not None and recipe.encoder is None:
        raise UserError("needs encoder and images", key="captions", value=recipe.captions, remedy="set both")
    for key, folder in (("encoder", recipe.encoder), ("images", recipe.images)):
        if folder is not None and not Path(folder).is_dir():
            raise UserError("no such folder", key=key, value=folder, remedy="check the path")
    if recipe.captions is not None and not Path(recipe.captions).is_file():
        raise UserError("no such file", key="captions", value=recipe.captions, remedy="check the path")
    check_ranges(recipe, max_upload_mb="[1, inf)", max_pixels="[1, inf)", max_images="[1, inf)")
    if recipe.feedback is not None:
        check_writable(Path(recipe.feedback))
    bound_socket(recipe.host, recipe.port).close()


def check_writable(file: Path) -> None:
    """Raise UserError if a file cannot be created or appended to."""
    existing = file
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if file.is_dir() or (existing != file and not existing.is_dir()) or not os.access(existing, os.W_OK):
        raise UserError("cannot be written", key="feedback", value=file, remedy="choose a file in a writable folder")


def short_names(models: list[str]) -> list[str]:
    """Return the shortest path suffixes that distinguish the models; the page shows no more of their paths."""
    paths = [Path(model).parts for model in models]
    for count in range(1, max(map(len, paths)) + 1):
        suffixes = [str(Path(*parts[-count:])) for parts in paths]
        if len(set(suffixes)) == len(suffixes):
            return suffixes
    return [parts[-1] for parts in paths]


if __name__ == "__main__":
    sys.exit(run_command(main))
