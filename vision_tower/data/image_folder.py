"""A zero-shot task on disk: ROOT/CLASS/image.jpg, prompt templates, and optionally a file of class names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_text
from vision_tower.data.image_batches import Labeled

# The extensions of torchvision's ImageFolder.
ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
DEFAULT_TEMPLATES = Path(__file__).with_name("templates.txt")


@dataclass(frozen=True, kw_only=True)
class ZeroShotTask:
    """C class folders sorted by name, a class name for each, the prompt templates, and the images."""

    root: Path
    folders: list[str]
    names: list[str]
    templates: list[str]
    images: list[Labeled]

    @property
    def duplicate_names(self) -> dict[str, list[str]]:
        """Class names shared by several folders, which no encoder can distinguish; some ImageNet lists have two."""
        found: dict[str, list[str]] = {}
        for folder, name in zip(self.folders, self.names, strict=True):
            found.setdefault(name, []).append(folder)
        return {name: folders for name, folders in found.items() if len(folders) > 1}


def load_task(root: Path, templates: Path | None = None, classes: Path | None = None) -> ZeroShotTask:
    """Read an ImageFolder, its templates and its class names.

    Args:
        root: the folder of class folders; images are found at any depth.
        templates: a text file with one template per line, with `{}` for the class name; our own by default.
        classes: a text file with one class name per line, in the order of the sorted folders; by default the folder
            names, with spaces for underscores.
    Raises:
        UserError: a missing folder, fewer than two classes, a class without images, or a bad text file.
    """
    if not root.is_dir():
        raise UserError("no such folder", file=root, remedy="give a folder with one subfolder of images per class")
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(folders) < 2:
        raise UserError(f"{len(folders)} class folders", file=root, remedy="at least two are needed, one per class")
    return ZeroShotTask(
        root=root,
        folders=folders,
        names=[folder.replace("_", " ") for folder in folders] if classes is None else read_names(classes, folders),
        templates=read_templates(templates or DEFAULT_TEMPLATES),
        images=[image for label, folder in enumerate(folders) for image in _images(root / folder, label)],
    )


def read_templates(file: Path) -> list[str]:
    """Read prompt templates; blank lines and lines that start with `#` are ignored.

    Raises:
        UserError: no template, or one without exactly one `{}`.
    """
    templates = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        template = line.strip()
        if not template or template.startswith("#"):
            continue
        if template.count("{}") != 1:
            raise UserError(f"line {number}: '{template}' needs exactly one {{}}", file=file, remedy="fix the line")
        templates.append(template)
    if not templates:
        raise UserError("no template", file=file, remedy="write lines such as 'a photo of a {}.'")
    return templates


def read_names(file: Path, folders: list[str]) -> list[str]:
    """Read one class name per line, for the sorted folders.

    Raises:
        UserError: an empty line, or the number of names differs from that of folders.
    """
    names = [line.strip() for line in read_text(file).splitlines()]
    if "" in names:
        raise UserError(f"line {names.index('') + 1}: empty", file=file, remedy="write one class name per line")
    if len(names) != len(folders):
        raise UserError(
            f"{len(names)} names for {len(folders)} class folders ({folders[0]} ... {folders[-1]})",
            file=file,
            remedy="write one per line, in the order of the sorted folders",
        )
    return names


def _images(folder: Path, label: int) -> list[Labeled]:
    found = [
        Path(parent) / name
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in ENDINGS
    ]
    if not found:
        raise UserError(f"no image ({' '.join(sorted(ENDINGS))})", file=folder, remedy="add some or remove it")
    return [Labeled(name=str(file), content=file, label=label) for file in sorted(found)]
