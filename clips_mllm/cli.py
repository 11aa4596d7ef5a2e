"""`clips-mllm NAME ...`: the table of commands. Each is a module with `main(argv)`, imported when it is called."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys

from vision_tower.common.errors import UserError, run_command


@dataclasses.dataclass(frozen=True)
class Command:
    """Where a command lives, and its line in the overview."""

    module: str
    does: str


COMMANDS = {
    "data sample": Command("clips_mllm.sample.build", "build the sample world: images, captions, benchmarks, an LLM"),
    "data doctor": Command("clips_mllm.doctor", "check every row and image of a data set; write a clean copy"),
    "data preview": Command("clips_mllm.preview", "show samples with supervised tokens marked"),
    "pretrain": Command("vision_tower.pretrain", "pretrain a CLIPS encoder from image-text pairs"),
    "convert": Command("clips_mllm.convert", "convert checkpoints: open_clip, CLIPS, the stock tower, original LLaVA"),
    "train": Command("clips_mllm.train", "stage 1 (align the projector) and stage 2 (finetune the LLM)"),
    "inspect": Command("clips_mllm.inspect_folder", "show what a folder contains and how it was made"),
    "plan": Command("clips_mllm.plan", "estimate memory, batch size and time of a recipe before it runs"),
    "merge": Command("clips_mllm.merge", "merge an adapter into its base: a plain checkpoint"),
    "retrieve": Command("clips_eval.retrieve", "measure an encoder's image-text retrieval"),
    "zeroshot": Command("clips_eval.zeroshot", "measure an encoder's zero-shot classification"),
    "evaluate": Command("clips_eval.evaluate", "run lmms-eval tasks on a multimodal LLM"),
    "ablate": Command("clips_eval.ablate", "rerun the paper's comparisons: caption length, objectives"),
    "compare": Command("clips_eval.compare", "swap the vision tower and nothing else: several seeds, paired tests"),
    "report": Command("clips_eval.report", "write a run's report: Markdown, HTML with plots, JSON"),
    "chat": Command("clips_mllm.chat", "talk to a multimodal LLM in the terminal"),
    "web": Command("clips_mllm.web", "talk to a multimodal LLM in the browser"),
    "serve": Command("clips_mllm.serve", "serve a multimodal LLM to OpenAI clients"),
}


def overview() -> str:
    """The text of `clips-mllm --help`."""
    lines = [f"  {name:<12} {command.does}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: clips-mllm COMMAND ...", "", *lines, "", "clips-mllm COMMAND --help tells more."])


def main(argv: list[str]) -> None:
    """Find the command and call it."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return
    # Threads that spin while they wait fight with loader processes over few cores. Read once, with torch's libraries.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            importlib.import_module(COMMANDS[name].module).main(argv[words:])
            return
    if argv[0] == "data" and argv[1:] in ([], ["-h"], ["--help"]):
        print(overview())
        return
    import difflib

    near = difflib.get_close_matches(" ".join(argv[:2]), COMMANDS, n=1) or difflib.get_close_matches(argv[0], COMMANDS)
    remedy = f"did you mean '{near[0]}'?" if near else "see 'clips-mllm --help'"
    raise UserError(f"clips-mllm: no command '{' '.join(argv[:2])}'", remedy=f"{remedy}")


def run() -> int:
    """Entry point of the console script."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(run())
