"""`clips-mllm inspect DIR`: what a folder contains and how it was made.

files and declared fields --folder_kinds--> kind
provenance.json, and those of its inputs and their inputs --> origin
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from clips_mllm.provenance.folder_kinds import find_kind, known_kind
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.hashes import file_hash
from vision_tower.common.provenance import FILE, describe_input, read_provenance
from vision_tower.common.recipe import parse_recipe

MAX_DEPTH = 8  # of inputs of inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectRecipe:
    """Print what a folder contains (encoder, vision tower, LLM, multimodal LLM, adapter or run) and how it was made.

    Args:
        folder: an output folder of this project, or a checkpoint of transformers, open_clip or the original LLaVA code.
        json: print JSON.
        verify: compare the weight files with the hashes in provenance.json; reads all of them.
    """

    folder: Path
    json: bool = False
    verify: bool = False


def main(argv: list[str]) -> None:
    """Print the description of a folder.

    Raises:
        UserError: an unknown kind of folder, a damaged file, or with `verify` weights that differ from their hashes.
    """
    recipe = parse_recipe(InspectRecipe, argv, command="inspect", positional=("folder",))
    about = describe(recipe.folder)
    if recipe.verify:
        about["verified"] = verify(recipe.folder)
    print(json.dumps(about, indent=1, default=str) if recipe.json else as_text(about))


def describe(folder: Path) -> dict[str, Any]:
    """Collect kind, facts, provenance and origin of a folder."""
    found = find_kind(folder)
    about: dict[str, Any] = {"folder": str(folder), "kind": found.kind, "line": found.line, "facts": found.facts}
    run = Path(found.facts.get("run", folder))  # an intermediate checkpoint has the provenance of its run
    if provenance := read_provenance(run):
        about["provenance"] = provenance
    return about | {"origin": origin(run)}


def origin(folder: Path, depth: int = 0) -> list[dict[str, Any]]:
    """List the inputs of a folder, each followed by its own inputs, as far back as the folders exist."""
    entries: list[dict[str, Any]] = []
    for role, source in _inputs(folder).items():
        entry: dict[str, Any] = {"role": role, "name": source["name"], "depth": depth}
        path = Path(source.get("path", source["name"]))
        entries.append(entry | _state(path, source))
        if path.is_dir() and depth < MAX_DEPTH:
            entries += origin(path, depth + 1)
    return entries


def _inputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Inputs by role, as provenance.json records them."""
    if provenance := read_provenance(folder):
        return dict(provenance["inputs"])
    if folder.resolve().name in ("tower", "ema"):  # subfolders of a `pretrain` run
        return {"encoder": describe_input(str(folder.resolve().parent))}
    return {}


def _state(path: Path, source: dict[str, Any]) -> dict[str, Any]:
    if not path.exists():
        return {"line": "not a local path"}
    changed = source.get("sha256") != describe_input(str(path)).get("sha256")
    if not path.is_dir():
        return {"line": "file", "changed_since": changed}
    found = known_kind(path)
    kind, line = (found.kind, found.line) if found else (None, "unknown folder")
    return {"line": line, "kind": kind, "changed_since": changed}


def verify(folder: Path) -> list[str]:
    """Compare the weight files with their recorded hashes and return their names.

    Raises:
        UserError: a file differs, or no hashes are recorded.
    """
    recorded = read_provenance(folder).get("outputs")
    if not recorded:
        raise UserError(
            "no hashes of weights", file=folder / FILE, key="outputs", remedy="give a finished run, merge or conversion"
        )
    for name, wanted in recorded.items():
        if not (folder / name).is_file() or file_hash(folder / name) != wanted:
            raise UserError(f"differs from its hash in {FILE}", file=folder / name, remedy="make or download it again")
    return list(recorded)


def as_text(about: dict[str, Any]) -> str:
    """Format what `describe` returned."""
    lines = [f"{about['folder']}: {about['line']}"]
    provenance = about.get("provenance", {})
    rows = [(name, f"{part['hash']}  {part['class']}") for name, part in provenance.get("parts", {}).items()]
    rows += [(name, provenance[name][:32]) for name in ("tokenizer", "image_processor") if name in provenance]
    if template := provenance.get("template"):
        rows.append(("template", f"{template['hash'][:32]}  {template['name']}"))
    for source in provenance.get("data", {}).get("sources", []):
        rows.append(("data", f"{source.get('hash', '-')[:32]:<32}  {source['file']}"))
    if provenance:
        rows += [("command", provenance["command"]), ("git", str(provenance["git"]))]
    lines += [f"  {name:<15}  {text}" for name, text in rows]
    for entry in about["origin"]:
        changed = " (changed since)" if entry.get("changed_since") else ""
        lines.append(f"  {'  ' * entry['depth']}from {entry['role']} {entry['name']}: {entry['line']}{changed}")
    if "verified" in about:
        lines.append(f"  {'verified':<15}  {', '.join(about['verified'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
