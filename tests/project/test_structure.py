"""Structure of the repository: import directions, fast --help, no private hosts."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from clips_mllm.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PACKAGES = {"vision_tower": ROOT / "vision_tower", "clips_mllm": ROOT / "clips_mllm"}
PACKAGES["clips_eval"] = ROOT / "eval" / "clips_eval"
# Allowed imports: a folder may import itself and the folders listed for it. A bare package name means the modules
# at the root of the package, which are commands. vt: vision_tower, mllm: clips_mllm, eval: clips_eval.
ARROWS = {
    "vt/common": "",
    "vt/text": "vt/common",
    "vt/training": "vt/common",
    "vt/data": "vt/common vt/text",
    "vt/model": "vt/common vt/text",
    "vt/checkpoints": "vt/common vt/text vt/data vt/model",
    "vt/evaluation": "vt/common vt/text vt/data vt/model vt/checkpoints",
    "vt/pretraining": "vt/common vt/text vt/training vt/data vt/model vt/checkpoints vt/evaluation",
    "vt": "vt/common vt/text vt/training vt/data vt/model vt/checkpoints vt/pretraining",
    "mllm/prompts": "vt/common",
    "mllm/model": "mllm/prompts vt/common vt/data vt/model vt/checkpoints",
    "mllm/data": "mllm/prompts mllm/model vt/common vt/data",
    "mllm/formats": "mllm/prompts mllm/model vt/common vt/checkpoints",
    "mllm/checks": "mllm/prompts mllm/model mllm/data vt/common vt/data vt/checkpoints",
    "mllm/training": "mllm/prompts mllm/model mllm/data mllm/formats mllm/checks "
    "vt/common vt/training vt/model vt/checkpoints",
    "mllm/planning": "mllm/prompts mllm/model mllm/data mllm/checks mllm/training vt/common vt/data",
    "mllm/provenance": "mllm/model mllm/formats mllm/training vt/common vt/training",
    "mllm/sample": "mllm/prompts mllm/model mllm/data mllm/training vt/common vt/checkpoints",
    "mllm/talk": "mllm/prompts mllm/model mllm/data mllm/provenance vt/common vt/data",
    "mllm/talk/web": "mllm/talk mllm/prompts vt/common vt/data vt/checkpoints",
    "mllm/talk/serve": "mllm/talk mllm/prompts vt/common",
    "mllm": "mllm/prompts mllm/model mllm/data mllm/formats mllm/checks mllm/training mllm/planning mllm/provenance "
    "mllm/talk mllm/talk/web mllm/talk/serve vt/common vt/training vt/data vt/checkpoints",
    "eval/tasks": "",
    "eval/stats": "vt/common vt/checkpoints",
    "eval/lmms": "eval/tasks eval/stats mllm/prompts mllm/model vt/common vt/checkpoints",
    "eval/retrieval": "eval/stats vt/common vt/data vt/evaluation",
    "eval/reporting": "eval/stats eval/retrieval vt/common",
    "eval/experiments": "eval/stats eval/retrieval eval/reporting vt/common vt/text",
    "eval": "eval/stats eval/lmms eval/retrieval eval/reporting eval/experiments mllm/model vt/common vt/data "
    "vt/checkpoints vt/evaluation vt/pretraining",
}
SHORT = {"vision_tower": "vt", "clips_mllm": "mllm", "clips_eval": "eval"}
MAX_MODULES = 18


def modules() -> dict[str, Path]:
    """Dotted name to file, `__init__` files as their folder's name."""
    found = {}
    for package, root in PACKAGES.items():
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    assert len(found) > 200
    return found


def folder(module: str, file: Path) -> str:
    """The folder of a module as the table writes it."""
    parts = module.split(".")
    return "/".join([SHORT[parts[0]], *(parts[1:] if file.name == "__init__.py" else parts[1:-1])])


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of this project that a file imports anywhere, also inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known.keys() or {node.module or ""}
    return found & known.keys()


def test_imports_between_folders_follow_the_table() -> None:
    known = modules()
    wrong = []
    for module, file in known.items():
        source = folder(module, file)
        allowed = {source, *ARROWS[source].split()}
        for target in imports(file, known):
            if folder(target, known[target]) not in allowed:
                wrong.append(f"{module} imports {target}: {source} -> {folder(target, known[target])}")
    assert not wrong, "\n".join(wrong)


def test_import_table_is_acyclic_and_has_no_unused_folder() -> None:
    known = modules()
    used = {folder(module, file) for module, file in known.items()}
    assert used == set(ARROWS)
    floors: set[str] = set()
    while len(floors) < len(ARROWS):
        ready = {name for name, targets in ARROWS.items() if set(targets.split()) <= floors} - floors
        assert ready, f"cycle among {set(ARROWS) - floors}"
        floors |= ready


def test_no_import_cycles() -> None:
    known = modules()
    left = {module: imports(file, known) - {module} for module, file in known.items()}
    while ready := {module for module, targets in left.items() if not targets & left.keys()}:
        left = {module: targets for module, targets in left.items() if module not in ready}
    assert not left, f"cycle among {sorted(left)}"


def test_modules_at_the_root_of_a_package_are_commands() -> None:
    commands = {command.module for command in COMMANDS.values()} | {"clips_mllm.cli"}
    roots = {module for module, file in modules().items() if module.count(".") == 1 and file.name != "__init__.py"}
    assert roots <= commands, roots - commands


def test_no_folder_has_too_many_modules() -> None:
    counts = Counter(file.parent for file in modules().values() if file.name != "__init__.py")
    assert max(counts.values()) <= MAX_MODULES, counts


def test_no_test_imports_another_test() -> None:
    for file in sorted((ROOT / "tests").rglob("*.py")):
        names = re.findall(r"^\s*(?:from|import) ([\w.]+)", file.read_text(), flags=re.MULTILINE)
        assert not [name for name in names if name.rpartition(".")[2].startswith("test_")], file


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")]), "COLUMNS": "200"}


HEAVY = {"torch", "torchvision", "transformers", "datasets", "accelerate", "deepspeed", "peft", "PIL"}
HEAVY |= {"lmms_eval", "matplotlib", "gradio", "fastapi", "uvicorn"}
AS_MODULE_AND_AS_COMMAND = """
import contextlib, io, json, runpy, sys
from clips_mllm import cli
module, name, texts = sys.argv[1], sys.argv[2].split(), []
for run, words in ((lambda: runpy.run_module(module, run_name="__main__", alter_sys=True), []), (cli.run, name)):
    sys.argv = ["clips-mllm", *words, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.suppress(SystemExit):
        run()
    texts.append(stdout.getvalue())
print(json.dumps([*texts, list(sys.modules)]))
"""


def python(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name: str) -> None:
    """As script, as module and as `clips-mllm NAME`: the same text, every option described, no heavy import."""
    module = COMMANDS[name].module
    script = python(str(modules()[module].relative_to(ROOT)), "--help")
    both = python("-c", AS_MODULE_AND_AS_COMMAND, module, name)
    as_module, as_command, imported = json.loads(both.stdout)
    assert as_command.startswith(f"usage: clips-mllm {name} ") and "--verbose" in as_command
    assert script.stdout == as_module == as_command
    assert not script.stderr and not both.stderr
    assert not HEAVY & set(imported)
    # `--print_config` and the sections' own `--section CONFIG` are jsonargparse's.
    bare = re.findall(r"^  (?:--)?([\w.]+)(?: [\w{},.]+)?\s+\((?:required|type)", as_command, flags=re.MULTILINE)
    assert not bare, f"options without a description in the recipe's docstring: {bare}"


def test_script_folder_shadows_no_package(tmp_path: Path) -> None:
    """As eval/clips_eval/evaluate.py would shadow the package `evaluate`."""
    (tmp_path / "__init__.py").touch()
    (tmp_path / "yaml.py").write_text("raise AssertionError")
    (tmp_path / "command.py").write_text(
        "import sys\nfrom vision_tower.common.errors import run_command\n"
        "def main(argv):\n    import yaml\n    print(yaml.safe_load('1'))\n"
        "sys.exit(run_command(main))"
    )
    assert python(str(tmp_path / "command.py")).stdout == "1\n"


def test_overview_lists_every_command() -> None:
    text = python("-m", "clips_mllm.cli", "--help").stdout
    assert all(f"  {name} " in text for name in COMMANDS)
    error = python("-m", "clips_mllm.cli", "pretrian", code=2).stderr
    assert error.startswith("error: ") and "'pretrain'" in error and error.count("\n") == 1


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:  # a source archive
        return [path for path in ROOT.rglob("*") if path.is_file() and not {".git", ".venv", "runs"} & set(path.parts)]
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_file_names_a_package_index_or_a_private_path() -> None:
    hosts = re.compile(
        r"--(?:extra-)?index-url|--find-links|--trusted-host|files\.pythonhosted|/simple/?\b(?=[\s\"'])"
        r"|https?://(?:localhost|10\.|192\.168\.|172\.1[6-9])|/(?:tmp|root|home|work)/\w"
    )
    found = []
    for file in tracked():
        if file.suffix in {".png", ".jpg", ".parquet", ".tar"} or file.name == Path(__file__).name:
            continue
        for number, line in enumerate(file.read_text(errors="ignore").splitlines(), 1):
            if hosts.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found


def test_lock_file_contains_only_pins() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    pinned = re.compile(r"[A-Za-z0-9._-]+(\[[\w,-]+\])?==[\w.+!-]+( ; [\w\s.*<>=!'()-]+)?")
    assert pins and all(pinned.fullmatch(pin) for pin in pins)
    names = {re.split(r"[\[=]", pin)[0].lower().replace("_", "-") for pin in pins}
    assert {"torch", "transformers", "deepspeed", "jsonargparse", "docstring-parser", "pytest", "ruff"} <= names


def test_library_does_not_mention_the_quickstart() -> None:
    """The quickstart consists of recipes in configs/ and of clips_mllm/sample/."""
    named = re.compile(r"quickstart|smoke", re.IGNORECASE)
    wrong = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in modules().values()
        if "sample" not in file.parts
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if named.search(line)
    ]
    assert not wrong
