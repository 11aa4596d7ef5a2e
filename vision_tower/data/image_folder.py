"""A zero-shot task on disk: ROOT/CLASS/image.jpg, prompt templates, and optionally a file of class names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_text
from vision_tower.data.image_batches import Labelled

# What torchvision's ImageFolder takes for an image.
ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
DEFAULT_TEMPLATES = Path(__file__).with_name("templates.txt")


@dataclass(frozen=True, kw_only=True)
class ZeroShotTask:
    """C class folders in the order of their names, a name for each, the prompt templates and the images."""

    root: Path
    folders: list[str]
    names: list[str]
    templates: list[str]
    images: list[Labelled]

    @property
    def twins(self) -> dict[str, list[str]]:
        """Names that several folders have, as two of ImageNet's in some lists; an encoder cannot tell them apart."""
        found: dict[str, list[str]] = {}
        for folder, name in zip(self.folders, self.names, strict=True):
            found.setdefault(name, []).append(folder)
        return {name: folders for name, folders in found.items() if len(folders) > 1}


def load_task(root: Path, templates: Path | None = None, classes: Path | None = None) -> ZeroShotTask:
    """Read an ImageFolder, its templates and its class names.

    Args:
        root: the folder of class folders; images may lie deeper in them.
        templates: a text file with one template a line, `{}` where the name goes; ours if not given.
        classes: a text file with one name a line, in the order of the folders' names; if not given, the folders'
            names with spaces for underscores.
    Raises:
        UserError: what is wrong in which file or folder.
    """
    if not root.is_dir():
        raise UserError("no such folder", file=root, remedy="give one that holds a folder of images for each class")
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(folders) < 2:
        raise UserError(
            f"{len(folders)} class folders", file=root, remedy="at least two are needed, one for each class"
        )
    return ZeroShotTask(
        root=root,
        folders=folders,
        names=[folder.replace("_", " ") for folder in folders] if classes is None else read_names(classes, folders),
        templates=read_templates(templates or DEFAULT_TEMPLATES),
        images=[image for label, folder in enumerate(folders) for image in _images(root / folder, label)],
    )


def read_templates(file: Path) -> list[str]:
    """The templates of a file; blank lines and lines that begin with `#` are left out.

    Raises:
        UserError: no template, or one without exactly one `{}`.
    """
    templates = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        template = line.strip()
        if not template or template.startswith("#"):
            continue
        if template.count("{}") != 1:
            raise UserError(
                f"line {number}: '{template}' needs one {{}} where the class name goes", file=file, remedy="mend it"
            )
        templates.append(template)
    if not templates:
        raise UserError("no template", file=file, remedy="write lines such as 'a photo of a {}.'")
    return templates


def read_names(file: Path, folders: list[str]) -> list[str]:
    """One name a line for the sorted folders.

    Raises:
        UserError: an empty line, or another number of names than folders.
    """
    names = [line.strip() for line in read_text(file).splitlines()]
    if "" in names:
        raise UserError(f"line {names.index('') + 1}: empty", file=file, remedy="write one class name a line")
    if len(names) != len(folders):
        raise UserError(
            f"{len(names)} names for {len(folders)} class folders ({folders[0]} ... {folders[-1]})",
            file=file,
            remedy="write one a line, in the order of the sorted folders",
        )
    return names


def _images(folder: Path, label: int) -> list[Labelled]:
    found = [
        Path(place) / name
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in ENDINGS
    ]
    if not found:
        raise UserError(
            f"no image of this class ({' '.join(sorted(ENDINGS))})", file=folder, remedy="add some or remove it"
        )
    return [Labelled(name=str(file), content=file, label=label) for file in sorted(found)]
