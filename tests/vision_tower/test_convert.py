"""Conversion of encoders: embeddings equal to open_clip's in both directions, and bad input."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import AutoModel, ViTModel

from clips_mllm.convert import main
from tests.helpers.errors import raises_user_error
from vision_tower.checkpoints.encoder import load_encoder, save_encoder
from vision_tower.checkpoints.loading import continued
from vision_tower.common.errors import UserError
from vision_tower.model.modeling import ClipsModel
from vision_tower.model.positions import sincos_positions
from vision_tower.model.recipe import ModelRecipe, TowerRecipe
from vision_tower.pretraining.setup import model_config
from vision_tower.text.tokenizer import CLS, PAD, UNK, ClipsTokenizer

VOCABULARY = [f"[unused{index - 1}]" for index in range(102)]
VOCABULARY[0], VOCABULARY[100], VOCABULARY[101] = PAD, UNK, CLS
VOCABULARY += ["a", "dog", "cat", "##s", "on", "the", "mat"]
SAFETENSORS, PICKLE = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
TEXTS = ["a dog", "", "the cats on the mat " * 100, "🐶 犬"]


def published(width: int, heads: int, text: int, text_heads: int, **changes: Any) -> dict[str, Any]:
    """JSON of a published checkpoint (UCSC-VLAA), with fewer layers and tokens."""
    ratio = changes.pop("mlp_ratio", 4.0)
    return {
        "model_cfg": {
            "embed_dim": text,
            "vision_cfg": {
                "image_size": 224,
                "layers": 2,
                "width": width,
                "patch_size": 14,
                "no_ln_pre": True,
                "pool_type": "avg",
                "final_ln_after_pool": True,
                "norm_kwargs": {"eps": 1e-06},
                "head_width": width // heads,
                "mlp_ratio": ratio,
                **changes,
            },
            "text_cfg": {
                "context_length": 80,
                "vocab_size": 200,
                "hf_tokenizer_name": "bert-base-uncased",
                "tokenizer_kwargs": {"strip_sep_token": True},
                "width": text,
                "heads": text_heads,
                "layers": 2,
                "mlp_ratio": ratio,
                "pool_type": "last",
                "no_causal_mask": True,
                "act_kwargs": {"approximate": "tanh"},
                "norm_kwargs": {"eps": 1e-06},
            },
        },
        "preprocess_cfg": {
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
    }


SMALL = published(32, 2, 24, 3, image_size=28, patch_size=7)
FULL = {
    "L-14-224": published(1024, 16, 768, 12),
    "L-14-336": published(1024, 16, 768, 12, image_size=336, layers=1),
    "H-14-224": published(1280, 16, 1024, 16),
    "So400m-14-224": published(1152, 16, 1152, 16, mlp_ratio=3.7362, layers=1),
}


def theirs(tree: dict[str, Any], kind: type = CLIP) -> Any:
    """open_clip's model with random numbers in every parameter, including those initialized to zero or one."""
    torch.manual_seed(0)
    given = copy.deepcopy(tree["model_cfg"])
    text = {key: value for key, value in given["text_cfg"].items() if not key.startswith(("hf_", "tokenizer"))}
    model = kind(given["embed_dim"], given["vision_cfg"], text)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(std=value.shape[-1] ** -0.5)
            elif name.startswith("logit"):
                value.fill_(3.5)
            else:
                value.normal_(std=0.2).add_(name.endswith("weight"))
    return model.eval()


def folder_of(model: Any, tree: dict[str, Any], folder: Path, weights: str = "open_clip_model.safetensors") -> Path:
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(tree))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    if weights.endswith(".safetensors"):
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / weights)
    else:
        torch.save(model.state_dict(), folder / weights)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = theirs(SMALL)
    return model, folder_of(model, SMALL, tmp_path_factory.mktemp("open_clip") / "small")


def assert_same(model: Any, folder: Path) -> None:
    """Assert that both towers of the converted folder give the embeddings of open_clip's model."""
    encoder = load_encoder(folder, "cpu")
    pixels = torch.randn(2, 3, *model.visual.image_size)
    ids = encoder.tokenizer.contrastive(TEXTS, 80)
    with torch.no_grad():
        image, text = normalize(model.encode_image(pixels), dim=-1), normalize(model.encode_text(ids), dim=-1)
        assert (encoder.model.embed_images(pixels) - image).abs().max() < 1e-5
        assert (encoder.model.embed_texts(ids) - text).abs().max() < 1e-5
    assert text[0] @ text[2] < 0.999  # different texts must differ, or the comparison shows nothing
    torch.testing.assert_close(encoder.model.logit_scale.flatten(), model.logit_scale.flatten())


@pytest.mark.parametrize("name", FULL)
def test_published_sizes_convert_both_ways(name: str, tmp_path: Path) -> None:
    model = theirs(FULL[name])
    source = folder_of(model, FULL[name], tmp_path / "source")
    main([str(source), str(tmp_path / "ours"), "--to", "clips"])
    assert_same(model, tmp_path / "ours")
    main([str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "open_clip"])
    back = open_clip.create_model(f"local-dir:{tmp_path / 'back'}").eval()
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in back.state_dict().items())
    side = FULL[name]["model_cfg"]["vision_cfg"]["image_size"]
    pixels, ids = torch.randn(1, 3, side, side), torch.randint(0, 200, (2, 80))
    with torch.no_grad():  # equal weights are not enough: the config (heads, eps, widths) matters too
        assert (back.encode_image(pixels, True) - model.encode_image(pixels, True)).abs().max() < 1e-5
        assert (back.encode_text(ids, True) - model.encode_text(ids, True)).abs().max() < 1e-5
    shutil.rmtree(tmp_path)


def test_open_clip_loads_the_export(small: tuple[Any, Path], tmp_path: Path) -> None:
    """With open_clip's own loader, preprocessing and tokenizer."""
    main([str(small[1]), str(tmp_path / "ours"), "--to", "clips"])
    main([str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "open_clip"])
    name = f"local-dir:{tmp_path / 'back'}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    ids = open_clip.get_tokenizer(name)(TEXTS)
    encoder = load_encoder(tmp_path / "ours", "cpu")
    assert torch.equal(ids, encoder.tokenizer.contrastive(TEXTS, 80)) and 107 in ids
    photo = Image.effect_noise((90, 50), 90).convert("RGB").resize((60, 40))
    pixels = preprocess(photo)[None]
    ours = encoder.processor(images=[photo], return_tensors="pt")["pixel_values"]
    assert pixels.shape == ours.shape and (pixels - ours).abs().max() < 1.01 / 255 / 0.224  # one step of rounding
    with torch.no_grad():
        image, text = model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)
    torch.testing.assert_close(encoder.model.embed_images(pixels).detach(), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.embed_texts(TEXTS), text, atol=1e-5, rtol=0)


def test_tower_alone_needs_no_vocabulary(small: tuple[Any, Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(small[1], bare, ignore=shutil.ignore_patterns("vocab.txt"))
    main([str(bare), str(tmp_path / "tower"), "--to", "tower"])
    tower, info = AutoModel.from_pretrained(tmp_path / "tower", output_loading_info=True)
    assert isinstance(tower, ViTModel)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        hidden = tower.eval()(pixels, output_hidden_states=True).hidden_states[-1]
        found = small[0].visual.forward_intermediates(
            pixels, indices=1, output_fmt="NLC", intermediates_only=True, output_extra_tokens=True
        )
    torch.testing.assert_close(hidden[:, 1:], found["image_intermediates"][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden[:, :1], found["image_intermediates_prefix"][0], atol=1e-5, rtol=0)
    with raises_user_error(file=bare):
        main([str(bare), str(tmp_path / "clips"), "--to", "clips"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "tower"]


def training_checkpoint(model: Any) -> dict[str, Any]:
    """Training checkpoint as open_clip_train writes it."""
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    return {"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}}


@pytest.mark.parametrize("kind", ["bin", "pt", "custom text", "bare json", "half", "tokenizer.json", "named"])
def test_all_published_file_formats(kind: str, small: tuple[Any, Path], tmp_path: Path) -> None:
    model, tree, weights = small[0], copy.deepcopy(SMALL), "open_clip_model.safetensors"
    match kind:
        case "bin":
            weights = "open_clip_pytorch_model.bin"
        case "custom text":
            model, tree["model_cfg"]["custom_text"] = theirs(SMALL, CustomTextCLIP), True
        case "bare json":
            tree = tree["model_cfg"]
        case "half":
            model = copy.deepcopy(model).half()
    source = folder_of(model, tree, tmp_path / "source", weights)
    if kind == "pt":
        (source / weights).unlink()
        torch.save(training_checkpoint(model), source / "epoch_3.pt")
    if kind == "tokenizer.json":
        (source / "vocab.txt").unlink()
        pieces = {piece: index for index, piece in enumerate(VOCABULARY)}
        (source / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": pieces}}))
    if kind == "named":  # a vocabulary with other names for the two special tokens
        names = dict(zip(VOCABULARY, ["[PAD]", "<s>", "</s>", *VOCABULARY[3:]], strict=True))
        (source / "vocab.txt").write_text("\n".join(names.values()) + "\n")
        settings = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    main([str(source), str(tmp_path / "ours"), "--to", "clips"])
    assert_same(model.float(), tmp_path / "ours")
    tokenizer = load_encoder(tmp_path / "ours", "cpu").tokenizer
    assert tokenizer.contrastive(["cats"], 7).tolist() == [[1, 104, 105, 2, 0, 0, 101]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fixed", [True, False])
def test_sincos_positions_are_recognized(fixed: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = theirs(SMALL)
    if fixed:
        model.visual.positional_embedding.data = sincos_positions(4, 32, class_token=True)
    source = folder_of(model.to(dtype), SMALL, tmp_path / "source")
    main([str(source), str(tmp_path / "ours"), "--to", "clips"])
    assert load_encoder(tmp_path / "ours", "cpu").model.config.positions == ("sincos" if fixed else "learned")
    larger = load_encoder(tmp_path / "ours", "cpu", image_size=42)
    assert larger.model.patches(torch.randn(1, 3, 42, 42)).shape == (1, 36, 32)


def test_pretraining_starts_from_a_converted_model(tmp_path: Path) -> None:
    tree = copy.deepcopy(SMALL)
    tree["model_cfg"]["vision_cfg"]["norm_kwargs"] = {"eps": 1e-3}  # not a field of the recipe: must be kept
    model = theirs(tree)
    main([str(folder_of(model, tree, tmp_path / "source")), str(tmp_path / "ours"), "--to", "clips"])
    recipe = ModelRecipe(
        image=TowerRecipe(width=32, layers=2, mlp=128, heads=2),
        text=TowerRecipe(width=24, layers=2, mlp=96, heads=3),
        captioner=TowerRecipe(width=16, layers=1, mlp=16, heads=2),
        embed_dim=24,
        image_size=28,
        patch_size=7,
        class_token=True,
        positions="learned",
        target_length=9,
        vocabulary_size=200,
    )
    tokenizer = load_encoder(tmp_path / "ours", "cpu").tokenizer
    start = continued(tmp_path / "ours", recipe, model_config(recipe, tokenizer)).eval()
    pixels, ids = torch.randn(2, 3, 28, 28), tokenizer.contrastive(TEXTS, 80)
    with torch.no_grad():
        assert (start.embed_images(pixels) - model.encode_image(pixels, True)).abs().max() < 1e-5
        assert (start.embed_texts(ids) - model.encode_text(ids, True)).abs().max() < 1e-5
    assert start.captioner.queries.shape == (9, 16)


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        ("vision_cfg.no_ln_pre", False, None),
        ("vision_cfg.pool_type", None, None),
        ("vision_cfg.timm_model_name", "vit", None),
        ("vision_cfg.ls_init_value", 1e-5, None),
        ("vision_cfg.qk_norm", True, None),
        ("vision_cfg.depth", 3, None),
        ("vision_cfg.image_size", [28, 28], None),
        ("vision_cfg.layers", 2.5, None),
        ("text_cfg.mlp_ratio", "4", None),
        ("vision_cfg.norm_kwargs", {"eps": "x"}, "norm_kwargs.eps"),
        ("vision_cfg.head_width", 24, None),
        ("vision_cfg.norm_kwargs", {"epsilon": 1}, "norm_kwargs"),
        ("text_cfg.act_kwargs", None, None),  # CLIPA
        ("text_cfg.no_causal_mask", None, None),
        ("text_cfg.heads", 5, None),
        ("text_cfg.hf_model_name", "bert", None),
        ("text_cfg", None, None),  # OpenVision 2
        ("multimodal_cfg", {}, "model_cfg.multimodal_cfg"),  # CoCa
        ("embed_dim", None, "model_cfg.embed_dim"),
    ],
)
def test_models_of_another_layout_are_refused(
    path: str, value: Any, key: str | None, small: tuple[Any, Path], tmp_path: Path
) -> None:
    tree = copy.deepcopy(SMALL)
    *parents, name = path.split(".")
    section = tree["model_cfg"]
    for parent in parents:
        section = section[parent]
    section[name] = value
    if value is None:
        del section[name]
    file = write_json(small[1], tmp_path, json.dumps(tree))
    refuse(file.parent, tmp_path, file=file, key=key or path)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("{", None),
        ("[]", None),
        (json.dumps(SMALL | {"preprocess_cfg": None}), "preprocess_cfg"),
        (json.dumps(SMALL | {"preprocess_cfg": {"mean": [0.5] * 3}}), "preprocess_cfg.mean"),
    ],
)
def test_damaged_json_is_refused(text: str, key: str | None, small: tuple[Any, Path], tmp_path: Path) -> None:
    file = write_json(small[1], tmp_path, text)
    refuse(file.parent, tmp_path, file=file, key=key)


def write_json(source: Path, tmp_path: Path, text: str) -> Path:
    """Copy the folder with another open_clip_config.json, and return this file."""
    file = Path(shutil.copytree(source, tmp_path / "source")) / "open_clip_config.json"
    file.write_text(text)
    return file


def refuse(
    source: Path, tmp_path: Path, *, file: Path | None, key: str | None = None, to: str = "clips", contains: str = ""
) -> None:
    """`convert` raises a UserError with these fields, and leaves no folder."""
    with raises_user_error(file=file, key=key) as caught:
        main([str(source), str(tmp_path / "out"), "--to", to])
    assert contains in caught.value.problem and caught.value.remedy and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


class Payload:
    """A pickle that writes a file when it is read carelessly."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.file, "ran")


@pytest.mark.parametrize(
    ("damage", "name", "key", "contains"),
    [
        ("missing", SAFETENSORS, None, "visual.proj"),
        ("unexpected", SAFETENSORS, None, "visual.ln_pre.weight"),
        ("deeper", SAFETENSORS, None, "visual.transformer.resblocks.2.attn.in_proj_bias"),
        ("shape", SAFETENSORS, "visual.conv1.weight", "(32, 3, 14, 14)"),
        ("two candidates", ".", None, "2"),
        ("none", ".", None, ""),
        ("cut", SAFETENSORS, None, ""),
        ("code", PICKLE, None, ""),
        ("pointer", PICKLE, None, ""),
        ("cut bin", PICKLE, None, ""),
        ("empty bin", PICKLE, None, ""),
        ("list", PICKLE, None, ""),
        ("nan", SAFETENSORS, "visual.proj", ""),
        ("tokenizer", "tokenizer.json", None, ""),
        ("vocabulary", ".", None, "text_cfg.vocab_size=200"),
    ],
)
def test_damaged_files_are_refused(
    damage: str, name: str, key: str | None, contains: str, small: tuple[Any, Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(small[1], tmp_path / "source"))
    file, pickled = source / SAFETENSORS, source / PICKLE
    state, content = load_file(file), file.read_bytes()
    file.unlink()
    block = "visual.transformer.resblocks."
    match damage:
        case "missing":
            save_file({name: value for name, value in state.items() if name != "visual.proj"}, file)
        case "unexpected":
            save_file(state | {"visual.ln_pre.weight": torch.ones(32)}, file)
        case "deeper":
            more = {
                name.replace("s.1.", "s.2."): value.clone() for name, value in state.items() if f"{block}1." in name
            }
            save_file(state | more, file)
        case "shape":
            save_file(state | {"visual.conv1.weight": torch.zeros(32, 3, 14, 14)}, file)
        case "two candidates":
            torch.save(state, source / "a.pt")
            torch.save(state, source / "b.pt")
        case "cut":
            file.write_bytes(content[: len(content) // 2])
        case "code":
            pickled.write_bytes(pickle.dumps({"weight": Payload(tmp_path / "ran")}, protocol=2))
        case "pointer":  # a clone without git-lfs has this instead of the file
            pickled.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
        case "cut bin":
            torch.save(state, pickled)
            pickled.write_bytes(pickled.read_bytes()[:5000])
        case "empty bin":
            pickled.write_bytes(b"")
        case "list":
            torch.save([1, 2], pickled)
        case "nan":
            save_file(state | {"visual.proj": torch.full_like(state["visual.proj"], math.nan)}, file)
        case "tokenizer":
            file.write_bytes(content)
            (source / "vocab.txt").unlink()
            (source / "tokenizer.json").write_text('{"model": {"vocab": [["a", -1.5]]}}')
        case "vocabulary":
            file.write_bytes(content)
            more = [f"w{index}" for index in range(201 - len(VOCABULARY))]
            (source / "vocab.txt").write_text("\n".join([*VOCABULARY, *more]))
    refuse(source, tmp_path, file=source / name, key=key, contains=contains)
    assert not (tmp_path / "ran").exists()


def test_encoder_with_infinite_weights_is_refused(encoder_dir: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(encoder_dir, tmp_path / "source"))
    state = load_file(source / "model.safetensors")
    state["visual_projection.weight"][0, 0] = math.inf
    save_file(state, source / "model.safetensors", {"format": "pt"})
    refuse(source, tmp_path, file=source, key="visual_projection.weight")


def test_open_clip_export_with_masked_padding_is_refused(encoder_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(encoder_dir, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"padding": "masked"}))
    refuse(source, tmp_path, file=None, key="--to", to="open_clip")


def test_open_clip_export_without_class_token_is_refused(encoder_dir: Path, tmp_path: Path) -> None:
    refuse(encoder_dir, tmp_path, file=None, key="--to", to="open_clip")
    main([str(encoder_dir), str(tmp_path / "tower"), "--to", "tower"])
    first, second = (load_file(folder / "model.safetensors") for folder in (encoder_dir / "tower", tmp_path / "tower"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_open_clip_export_omits_the_captioner(tmp_path: Path) -> None:
    tokenizer = ClipsTokenizer.train(["a dog and a cat on the mat"], 60)
    tower = TowerRecipe(width=16, layers=2, mlp=20, heads=2)
    recipe = ModelRecipe(
        image=tower,
        text=tower,
        captioner=tower,
        embed_dim=10,
        image_size=24,
        patch_size=8,
        class_token=True,
        text_length=9,
        vocabulary_size=60,
    )
    model = ClipsModel.from_scratch(model_config(recipe, tokenizer)).eval()
    save_encoder(model, tokenizer, tmp_path / "run")
    main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", "open_clip"])
    name = f"local-dir:{tmp_path / 'out'}"
    theirs, ids = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)(["a dog", "mat cat"])
    assert torch.equal(ids, tokenizer.contrastive(["a dog", "mat cat"], 9))
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        assert (theirs.encode_image(pixels, True) - model.embed_images(pixels)).abs().max() < 1e-5
        assert (theirs.encode_text(ids, True) - model.embed_texts(ids)).abs().max() < 1e-5
        model.text_model.head.bias[0] = 1.0
    save_encoder(model, tokenizer, tmp_path / "biased")
    with raises_user_error(key="text_model.head.bias"):
        main([str(tmp_path / "biased"), str(tmp_path / "other"), "--to", "open_clip"])


def test_unusable_sources_and_destinations_are_refused(
    small: tuple[Any, Path], encoder_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="full"):
        main([str(small[1]), str(tmp_path / "full"), "--to", "clips"])
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
    refuse(tmp_path / "nothing", tmp_path, file=tmp_path / "nothing")
    shutil.copytree(encoder_dir / "tower", tmp_path / "tower")
    (tmp_path / "tower" / "tokenizer.json").touch()
    refuse(tmp_path / "tower", tmp_path, file=tmp_path / "tower", key="model_type")
