"""`clips-mllm inspect DIR`: what a folder is and where it came from.

folder --files, declared fields--> kind
       --manifest.json, recipe.yaml, and those of what it came from--> origin
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from clips_mllm.model.fingerprints import file_hash
from clips_mllm.provenance.folder_kinds import find_kind, manifest
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.files import read_object, read_text
from vision_tower.common.recipe import parse_recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectRecipe:
    """Tell what a folder is: data, encoder, tower, LLM, run, checkpoint, adapter, converted; and where it came from.

    Args:
        folder: any folder that a command of this project, open_clip or the original LLaVA code left.
        json: print JSON.
        verify: compare the weights with the hashes in the manifest, which reads all of them.
    """

    folder: Path
    json: bool = False
    verify: bool = False


def main(argv: list[str]) -> None:
    """Print it.

    Raises:
        UserError: an unknown kind of folder, a damaged file, or with `verify` weights that are not the manifest's.
    """
    recipe = parse_recipe(InspectRecipe, argv, command="inspect", positional=("folder",))
    told = describe(recipe.folder)
    if recipe.verify:
        told["verified"] = verify(recipe.folder)
    print(json.dumps(told, indent=1, default=str) if recipe.json else as_text(told))


def describe(folder: Path) -> dict[str, Any]:
    """All that is known of a folder."""
    kind = find_kind(folder)
    told: dict[str, Any] = {"folder": str(folder), "kind": kind.kind, "line": kind.line, "facts": kind.facts}
    home = folder.resolve().parent if kind.kind == "checkpoint" else folder
    about = manifest(home)
    if about:
        told["manifest"] = {name: value for name, value in about.items() if name not in ("recipe", "environment")}
    if (home / "environment.json").is_file():
        environment = read_object(home / "environment.json")
        told["made"] = {name: environment.get(name) for name in ("command", "git", "packages")}
    told["origin"] = origin(home)
    return told


def origin(folder: Path, depth: int = 0) -> list[dict[str, Any]]:
    """What a folder was made of, and that in turn, as far back as folders are still there."""
    found: list[dict[str, Any]] = []
    for role, source in _sources(folder).items():
        place = Path(source.get("folder", source["name"]))
        entry: dict[str, Any] = {"role": role, "name": source["name"], "depth": depth}
        if not place.exists():
            entry["line"] = "not in a folder here"
        else:
            entry |= _state(place, source)
            found.append(entry)
            if place.is_dir() and depth < 8:
                found += origin(place, depth + 1)
            continue
        found.append(entry)
    return found


def _state(place: Path, source: dict[str, Any]) -> dict[str, Any]:
    try:
        kind = find_kind(place)
    except UserError:
        return {"line": "a file" if place.is_file() else "no folder that is known here"}
    file = place / "manifest.json"
    changed = "manifest" in source and (not file.is_file() or file_hash(file) != source["manifest"])
    return {"line": kind.line, "kind": kind.kind, "changed_since": changed}


def _sources(folder: Path) -> dict[str, dict[str, Any]]:
    """By the manifest, else by the recipe of a run that has none."""
    about = manifest(folder)
    if "from" in about:
        return dict(about["from"])
    file = folder / "recipe.yaml"
    if not file.is_file():
        if folder.resolve().name in ("tower", "ema"):  # of a `pretrain` run
            return {"encoder": {"name": str(folder.resolve().parent)}}
        return {}
    import yaml

    recipe = yaml.safe_load(read_text(file))
    data, model = recipe.get("data") or {}, recipe.get("model") or {}
    names = ("checkpoint", "tower", "llm", "start_from")
    named = {name: model.get(name) for name in names} | {"shards": data.get("shards")}
    return {role: {"name": str(name)} for role, name in named.items() if name}


def verify(folder: Path) -> list[str]:
    """Names of the files whose hashes are the manifest's. Raises UserError where one is not, or none is told."""
    written = manifest(folder).get("written")
    if not written:
        raise UserError(
            "tells of no weights", file=folder / "manifest.json", remedy="only finished runs, merges and conversions do"
        )
    for name, wanted in written.items():
        if not (folder / name).is_file() or file_hash(folder / name) != wanted:
            raise UserError(
                "not what the manifest tells of", file=folder / name, remedy="make or fetch the folder again"
            )
    return list(written)


def as_text(told: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{told['folder']}: {told['line']}"]
    about = told.get("manifest", {})
    for name, part in about.get("parts", {}).items():
        lines.append(f"  {name:<10} {part['hash']}  {part['class']}, before training")
    for name in ("tokenizer", "image_processor"):
        if name in about:
            lines.append(f"  {name:<10.10} {about[name]}")
    if "template" in about:
        lines.append(f"  template   {about['template']['hash']}  {about['template']['name']}")
    for source in about.get("data", {}).get("sources", []):
        lines.append(f"  data       {source.get('hash', '-'):<32}  {source['file']}")
    if "made" in told:
        lines.append(f"  made by    {told['made']['command']}")
        lines.append(f"  git        {told['made']['git']}")
    for entry in told["origin"]:
        changed = " (changed since)" if entry.get("changed_since") else ""
        lines.append(f"  {'  ' * entry['depth']}from {entry['role']} {entry['name']}: {entry['line']}{changed}")
    if "verified" in told:
        lines.append(f"  verified   {', '.join(told['verified'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
