"""`clips-mllm data sample`: build the sample world.

clips-mllm data sample --output_dir runs/quickstart/data
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import logging
import os
import random
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from clips_mllm.sample import exams, instructions, shapes
from clips_mllm.sample.llm import write_llm
from clips_mllm.sample.objects import spoken_names
from clips_mllm.sample.scenes import Scene, draw_scene, png_bytes, render_scene
from clips_mllm.sample.wording import synthetic_caption, web_caption
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.files import new_folder
from vision_tower.common.recipe import parse_recipe

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRecipe:
    """Build the sample world: pretraining shards, LLaVA JSON, retrieval and evaluation files, a small LLM.

    Args:
        output_dir: target folder; must be absent or empty.
        seed: seed of everything except the third-party material.
        llm: smollm2 is SmolLM2-135M-Instruct; tiny is a random two-layer LLaMA for tests of the pipeline.
        pretrain_scenes: scenes in the pretraining shards.
        pretrain_figures: generated geometric images in the pretraining shards.
        pretrain_shapes: easy-VQA training images in the pretraining shards.
        shard_size: image-text pairs per shard.
        align_scenes: scenes with a caption, for stage 1.
        align_shapes: easy-VQA training images with a caption, for stage 1.
        finetune_scenes: scenes with conversations, for stage 2.
        finetune_shapes: easy-VQA training images with conversations, for stage 2.
        finetune_pairs: conversations about two images, for stage 2.
        finetune_patch_texts: conversations about a scene given as one word per patch instead of an image, for stage 2.
        finetune_patch_text_shapes: the same for easy-VQA training images.
        finetune_texts: conversations without image or scene, for stage 2.
        retrieval_scenes: test scenes for retrieval, with five captions each.
        pope_scenes: test scenes for POPE.
        mmbench_scenes: test scenes with one multiple-choice question each.
        easy_vqa_questions: questions drawn from easy-VQA's test split.
    """

    output_dir: str = "data/sample"
    seed: int = 0
    llm: Literal["smollm2", "tiny"] = "smollm2"
    pretrain_scenes: int = 30_000
    pretrain_figures: int = 10_000
    pretrain_shapes: int = 4_000
    shard_size: int = 2_000
    align_scenes: int = 3_000
    align_shapes: int = 1_000
    finetune_scenes: int = 2_000
    finetune_shapes: int = 2_000
    finetune_pairs: int = 100
    finetune_patch_texts: int = 200
    finetune_patch_text_shapes: int = 100
    finetune_texts: int = 100
    retrieval_scenes: int = 1_000
    pope_scenes: int = 100
    mmbench_scenes: int = 200
    easy_vqa_questions: int = 1_500

    def check(self) -> None:
        """Raise UserError if a file would be empty."""
        optional = {"align_scenes", "align_shapes", "finetune_scenes", "finetune_shapes"}
        optional |= {"finetune_pairs", "finetune_patch_texts", "finetune_patch_text_shapes", "finetune_texts"}
        optional |= {"pretrain_figures", "pretrain_shapes"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            minimum = 0 if field.name in optional else 2 if field.name == "retrieval_scenes" else 1
            if field.name != "seed" and isinstance(value, int) and value < minimum:
                raise UserError(f"must be at least {minimum}", key=field.name, value=value)
        for stage in ("align", "finetune"):
            if getattr(self, f"{stage}_scenes") + getattr(self, f"{stage}_shapes") == 0:
                raise UserError(
                    f"the stage has no samples: {stage}_scenes and {stage}_shapes are 0",
                    key=f"{stage}_scenes",
                    value=0,
                    remedy="raise one of them",
                )


def main(argv: list[str]) -> None:
    """Build everything in a temporary folder, then rename it to the target."""
    recipe = parse_recipe(SampleRecipe, argv, command="data sample")
    recipe.check()
    with new_folder(Path(recipe.output_dir)) as work:
        train_shapes = shapes.load_shapes("train")
        write_shards(recipe, work / "pretrain", train_shapes)
        texts = write_instructions(recipe, work / "llava", train_shapes)
        write_exams(recipe, work, shapes.load_shapes("test"))
        logger.info("language model: %s", recipe.llm)
        write_llm(recipe.llm, work / "llm", texts)
        _write_json(work / "world.json", {"recipe": dataclasses.asdict(recipe), "objects": spoken_names()})
    logger.info("sample world in %s", recipe.output_dir)


def write_shards(recipe: SampleRecipe, folder: Path, train_shapes: list[shapes.ShapeImage]) -> None:
    """Write WebDataset shards of scenes, geometric images and easy-VQA images, shuffled."""
    folder.mkdir(parents=True)
    rows: list[tuple[str, Any]] = [("scene", index) for index in range(recipe.pretrain_scenes)]
    rows += [("figure", index) for index in range(recipe.pretrain_figures)]
    rows += [("shape", shape) for shape in train_shapes[: recipe.pretrain_shapes]]
    random.Random(f"{recipe.seed}/shards").shuffle(rows)
    parts = [rows[start : start + recipe.shard_size] for start in range(0, len(rows), recipe.shard_size)]
    files = [folder / f"train-{number:05d}.tar" for number in range(len(parts))]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(functools.partial(_write_shard, recipe.seed), files, parts)
        for _ in tqdm(done, "pretraining shards", len(parts)):
            pass


def _write_shard(seed: int, file: Path, rows: list[tuple[str, Any]]) -> None:
    with tarfile.open(file, "w") as tar:
        for kind, item in rows:
            sample = PAIR_MAKERS[kind](seed, item)
            if sample is None:
                continue
            key, image, web, synthetic = sample
            texts = json.dumps({"web_caption": web, "synthetic_caption": synthetic}).encode()
            for name, content in ((f"{key}.png", image), (f"{key}.json", texts)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _scene_pair(seed: int, index: int) -> tuple[str, bytes, str, str]:
    scene = draw_scene(seed, "pretrain", index)
    rng = random.Random(f"{seed}/pretrain-captions/{index}")
    return scene.key, png_bytes(render_scene(scene)), web_caption(scene, rng), synthetic_caption(scene, rng)


def _shape_pair(seed: int, shape: shapes.ShapeImage) -> tuple[str, bytes, str, str] | None:
    captions = shapes.shape_captions(shape, random.Random(f"{seed}/shape-captions/{shape.image_id}"))
    return None if captions is None else (f"easy-vqa-{shape.image_id:06d}", shape.file.read_bytes(), *captions)


def _figure_pair(seed: int, index: int) -> tuple[str, bytes, str, str]:
    image, color, shape = shapes.draw_shape(seed, index)
    captions = shapes.caption_shape(color, shape, random.Random(f"{seed}/figure-captions/{index}"))
    return f"figure-{index:06d}", image, *captions


PAIR_MAKERS: dict[str, Callable[[int, Any], tuple[str, bytes, str, str] | None]] = {
    "scene": _scene_pair,
    "shape": _shape_pair,
    "figure": _figure_pair,
}


def write_instructions(recipe: SampleRecipe, folder: Path, train_shapes: list[shapes.ShapeImage]) -> list[str]:
    """Write `stage1.json`, `stage2.json` and their images; return all text in them."""
    images = folder / "images"
    images.mkdir(parents=True)
    total = recipe.align_scenes + recipe.align_shapes
    stage1 = list(tqdm(_align_rows(recipe, images, train_shapes), "stage 1", total))
    parts = (recipe.finetune_scenes, recipe.finetune_shapes, recipe.finetune_pairs, recipe.finetune_texts)
    total = sum(parts) + recipe.finetune_patch_texts + recipe.finetune_patch_text_shapes
    stage2 = list(tqdm(_finetune_rows(recipe, images, train_shapes), "stage 2", total))
    random.Random(f"{recipe.seed}/stage1").shuffle(stage1)
    random.Random(f"{recipe.seed}/stage2").shuffle(stage2)
    _write_json(folder / "stage1.json", stage1)
    _write_json(folder / "stage2.json", stage2)
    return [turn["value"] for row in stage1 + stage2 for turn in row["conversations"]]


def _align_rows(recipe: SampleRecipe, images: Path, train_shapes: list[shapes.ShapeImage]) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{recipe.seed}/align")
    for scene in _scenes(recipe, "align", recipe.align_scenes):
        yield instructions.caption_row(scene, _save_scene(scene, images), rng)
    captioned = [shape for shape in train_shapes if shapes.shape_captions(shape, rng) is not None]
    for shape in captioned[: recipe.align_shapes]:
        sentence = f"The picture shows a {shape.color} {shape.shape}."
        prompt = rng.choice(instructions.STAGE1_PROMPTS)
        yield instructions.conversation(f"easy-vqa-{shape.image_id}", [(prompt, sentence)], [_copy(shape, images)])


def _finetune_rows(
    recipe: SampleRecipe, images: Path, train_shapes: list[shapes.ShapeImage]
) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{recipe.seed}/finetune")
    for scene in _scenes(recipe, "finetune", recipe.finetune_scenes):
        yield instructions.scene_row(scene, _save_scene(scene, images), rng)
    for shape in rng.sample(train_shapes, min(recipe.finetune_shapes, len(train_shapes))):
        yield instructions.shape_row(shape, _copy(shape, images), rng)
    pairs = _scenes(recipe, "pairs", 2 * recipe.finetune_pairs)
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        row = instructions.pair_row(first, second, [_save_scene(first, images), _save_scene(second, images)], rng)
        if row:
            yield row
    for scene in _scenes(recipe, "told", recipe.finetune_patch_texts, min_things=2):
        yield instructions.patch_text_row(scene, rng)
    known = [shape for shape in train_shapes if shape.color and shape.shape]
    for shape in rng.sample(known, min(recipe.finetune_patch_text_shapes, len(known))):
        yield instructions.patch_text_shape_row(shape, rng)
    for index in range(recipe.finetune_texts):
        yield instructions.text_row(index, rng)


def write_exams(recipe: SampleRecipe, folder: Path, test_shapes: list[shapes.ShapeImage]) -> None:
    """Write the evaluation files: scenes of the test split, easy-VQA's test split."""
    images = folder / "retrieval" / "images"
    images.mkdir(parents=True)
    (folder / "eval").mkdir()
    retrieval = _scenes(recipe, "test", recipe.retrieval_scenes)
    for scene in tqdm(retrieval, "retrieval"):
        _save_scene(scene, images)
    _write_json(folder / "retrieval" / "test.json", exams.karpathy_json(retrieval, recipe.seed))
    asked = _scenes(recipe, "test-pope", recipe.pope_scenes, min_things=2)
    for setting in exams.POPE_SETTINGS:
        exams.write_parquet(exams.pope_rows(asked, setting, recipe.seed), folder / "eval" / f"pope_{setting}.parquet")
    chosen = _scenes(recipe, "test-mmbench", recipe.mmbench_scenes)
    exams.write_parquet(exams.mmbench_rows(chosen, recipe.seed), folder / "eval" / "mmbench.parquet")
    rows = exams.easy_vqa_rows(test_shapes, recipe.easy_vqa_questions, recipe.seed)
    exams.write_parquet(rows, folder / "eval" / "easy_vqa.parquet")
    _write_examples(folder, retrieval[0], retrieval[1], test_shapes[0])


def _write_examples(folder: Path, first: Scene, second: Scene, shape: shapes.ShapeImage) -> None:
    """Write three held-out images with a question each, for `clips-mllm chat --examples`."""
    copied = folder / "retrieval" / "images" / f"easy-vqa-test-{shape.image_id}.png"
    shutil.copyfile(shape.file, copied)
    examples = [
        {"image": f"retrieval/images/{first.key}.png", "question": "Describe this image."},
        {"image": f"retrieval/images/{second.key}.png", "question": "How many objects are in the image?"},
        {"image": f"retrieval/images/{copied.name}", "question": "what color is the shape?" + instructions.SHORT},
    ]
    _write_json(folder / "examples.json", examples)


def _scenes(recipe: SampleRecipe, split: str, count: int, min_things: int = 1) -> list[Scene]:
    return [draw_scene(recipe.seed, split, index, min_things=min_things) for index in range(count)]


def _save_scene(scene: Scene, images: Path) -> str:
    file = images / f"{scene.key}.png"
    file.write_bytes(png_bytes(render_scene(scene)))
    return file.name


def _copy(shape: shapes.ShapeImage, images: Path) -> str:
    name = f"easy-vqa-{shape.image_id:06d}.png"
    shutil.copyfile(shape.file, images / name)
    return name


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1))


if __name__ == "__main__":
    sys.exit(run_command(main))
