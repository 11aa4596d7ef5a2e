"""`clips-mllm NAME ...`: the table of commands. Each command is a module with `main(argv)`, imported on demand."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys

from vision_tower.common.errors import UserError, run_command


@dataclasses.dataclass(frozen=True)
class Command:
    """The module of a command, and its summary for `clips-mllm --help`."""

    module: str
    summary: str


COMMANDS = {
    "data sample": Command("clips_mllm.sample.build", "build the sample world: images, captions, benchmarks, an LLM"),
    "data doctor": Command("clips_mllm.doctor", "check every row and image of a data set; write a clean copy"),
    "data preview": Command("clips_mllm.preview", "show samples with supervised tokens marked"),
    "pretrain": Command("vision_tower.pretrain", "pretrain a CLIPS encoder from image-text pairs"),
    "convert": Command("clips_mllm.convert", "convert checkpoints: open_clip, CLIPS, the stock tower, original LLaVA"),
    "train": Command("clips_mllm.train", "stage 1 (align the projector) and stage 2 (finetune the LLM)"),
    "inspect": Command("clips_mllm.inspect_folder", "show what a folder contains and how it was made"),
    "plan": Command("clips_mllm.plan", "estimate memory, batch size and time of a recipe before it runs"),
    "merge": Command("clips_mllm.merge", "merge an adapter into its base model"),
    "retrieve": Command("clips_eval.retrieve", "evaluate an encoder on image-text retrieval"),
    "zeroshot": Command("clips_eval.zeroshot", "evaluate an encoder on zero-shot classification"),
    "evaluate": Command("clips_eval.evaluate", "run lmms-eval tasks on a multimodal LLM"),
    "ablate": Command("clips_eval.ablate", "rerun the paper's ablations: caption length, objectives"),
    "compare": Command("clips_eval.compare", "compare vision towers in the same MLLM: several seeds, paired tests"),
    "report": Command("clips_eval.report", "write a run's report: Markdown, HTML with plots, JSON"),
    "chat": Command("clips_mllm.chat", "chat with a multimodal LLM in the terminal"),
    "web": Command("clips_mllm.web", "chat with a multimodal LLM in the browser"),
    "serve": Command("clips_mllm.serve", "serve a multimodal LLM to OpenAI clients"),
}


def overview() -> str:
    """Return the text of `clips-mllm --help`."""
    lines = [f"  {name:<12} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: clips-mllm COMMAND ...", "", *lines, "", "Options: clips-mllm COMMAND --help"])


def main(argv: list[str]) -> None:
    """Find the command by its name, one or two words, and call it."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return
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
    raise UserError(f"no command '{' '.join(argv[:2])}'", remedy=remedy)


def make_waiting_threads_sleep() -> None:
    """Set OpenMP's wait policy, unless the user did; must run before torch is imported, which reads it once.

    Threads that spin while they wait take processor time from the loader processes.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run() -> int:
    """Entry point of the console script."""
    make_waiting_threads_sleep()
    return run_command(main)


if __name__ == "__main__":
    sys.exit(run())
