"""Image decoding: the pixels and errors of strict Pillow, orientation, 16-bit gray."""

from __future__ import annotations

import io
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from vision_tower.data.images import BadImage, decode_image


def test_16_bit_gray_keeps_its_shades() -> None:
    """Medical images and depth maps: clipped to white they would carry no information."""

    def encoded(pixels: np.ndarray, form: str) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, form)
        return buffer.getvalue()

    shades = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    for form in ("PNG", "TIFF"):
        decoded = np.asarray(decode_image(encoded(shades, form)))
        assert (decoded == (shades // 256)[..., None]).all()
    for kind, maximum in (("float32", 1), ("int32", 1 << 20)):
        with pytest.raises(BadImage):
            decode_image(encoded((shades / 65535 * maximum).astype(kind), "TIFF"))


FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {},
    "JPEG progressive": {"progressive": True},
    "MPO": {},
    "PNG": {"dpi": (72, 72)},
    "GIF": {},
    "BMP": {},
    "PPM": {},
    "TIFF": {},
    "TIFF lzw": {"compression": "tiff_lzw"},
    "TGA": {"compression": "tga_rle"},
    "JPEG2000": {},
    "WEBP": {},
}


def encode(image: Image.Image, name: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name.partition(" ")[0], **FORMATS[name])
    return buffer.getvalue()


def pixels_or_none(content: bytes) -> bytes | None:
    try:
        return decode_image(content).tobytes()
    except BadImage:
        return None


def pillow_pixels_or_none(content: bytes) -> bytes | None:
    try:
        return Image.open(io.BytesIO(content)).convert("RGB").tobytes()
    except Exception:
        return None


@pytest.fixture
def noise() -> Image.Image:
    return Image.merge("RGB", [Image.effect_noise((45, 38), spread) for spread in (80, 60, 40)])


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_images_are_refused_as_in_strict_pillow(
    name: str, noise: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the global LOAD_TRUNCATED_IMAGES off and on alike, and never by another error than BadImage."""
    content, rng = encode(noise, name), random.Random(0)
    cases = [content, *(content[: rng.randint(1, len(content))] for _ in range(30))]
    cases += [content[:-cut] for cut in range(1, 16)]
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(rng.choice((min(len(content), 200), len(content))))] = rng.randrange(256)
        cases.append(bytes(damaged))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # an lmms-eval task may have set it before
    expected = [pillow_pixels_or_none(case) for case in cases]
    assert expected[0] is not None and expected.count(None) > 20
    for tolerant in (False, True):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
        assert [pixels_or_none(case) for case in cases] == expected
        assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant


def test_truncated_images_are_refused_while_another_thread_toggles_the_global(
    noise: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    contents = [encode(noise, name) for name in FORMATS]
    cases = [case for content in contents for case in (content, content[: len(content) // 2])] * 20
    expected = [pillow_pixels_or_none(case) for case in cases]
    done = threading.Event()

    def toggle() -> None:
        while not done.is_set():
            ImageFile.LOAD_TRUNCATED_IMAGES = not ImageFile.LOAD_TRUNCATED_IMAGES

    thread = threading.Thread(target=toggle)
    thread.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(pixels_or_none, cases)) == expected
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("min_size", [1, 40, 120, 300])
def test_jpeg_decodes_at_a_reduced_size_as_pillow_does(min_size: int) -> None:
    content = encode(Image.merge("RGB", [Image.effect_noise((330, 250), spread) for spread in (80, 60, 40)]), "JPEG")
    image = Image.open(io.BytesIO(content))
    image.draft("RGB", (min_size, min_size))
    assert decode_image(content, min_size).tobytes() == image.tobytes()
    with pytest.raises(BadImage):
        decode_image(content[: len(content) // 2], min_size)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(kind: str) -> None:
    """Damaged EXIF data is ignored."""
    tall = Image.new("RGB", (32, 64), "red")
    tall.paste("blue", (0, 0, 32, 16))  # sky
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    tall.transpose(Image.Transpose.ROTATE_90).save(out, kind, exif=exif)
    for image in (decode_image(out.getvalue()), decode_image(out.getvalue(), min_size=16)):
        wide, high = image.size
        assert high == 2 * wide
        assert image.getpixel((wide // 2, 1))[2] > 200 > 100 > image.getpixel((wide // 2, high - 2))[2]
    out = io.BytesIO()
    tall.save(out, kind, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode_image(out.getvalue()).size == (32, 64)
