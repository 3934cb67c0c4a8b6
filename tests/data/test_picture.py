"""A picture is opened as a person sees it, whatever file it is in."""

from __future__ import annotations

import contextlib
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from written_png import write_png

import modgraft
from modgraft.core.errors import DataError, MissingFileError
from modgraft.data.picture import open_picture

HEIGHT, WIDTH = 12, 20
GREY = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)

# what a viewer does for EXIF orientations 2 to 8, in words of arrays, by the standard's table
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def read(path: Path, **how: str) -> np.ndarray:
    picture = open_picture(path, **how)
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize("form", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_it_is_upright(tmp_path: Path, form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(form, {})
    path = tmp_path / f"turned.{form}"
    Image.fromarray(COLOUR).save(path, exif=exif, **how)
    # JPEG loses a little
    stored = np.asarray(Image.open(path).convert("RGB")) if form == "jpg" else COLOUR
    assert np.array_equal(read(path), UPRIGHT[orientation](stored))


def test_deep_greys_are_in_range(tmp_path: Path) -> None:
    deep = GREY.astype(np.uint16) * 257
    for name, stored in {
        "png16.png": deep,
        "tiff16.tiff": deep,
        "tiff32.tiff": deep.astype(np.int32),
        "byte32.tiff": GREY.astype(np.int32),
        "unit.tiff": (GREY / 255).astype(np.float32),
        "byte.tiff": GREY.astype(np.float32),
        "deep.tiff": deep.astype(np.float32),
    }.items():
        path = tmp_path / name
        Image.fromarray(stored).save(path)
        assert np.array_equal(read(path), np.stack([GREY] * 3, -1)), name
    big = tmp_path / "big-endian.tiff"
    Image.frombytes("I;16B", (WIDTH, HEIGHT), deep.astype(">u2").tobytes()).save(big)
    assert np.array_equal(read(big)[..., 0], GREY)


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 1.0), (0.0, 1e6), (0.0, float("nan")), (0.25, 3.7), (0.5, 260.1)]
)
def test_numbers_in_no_known_range_are_refused(tmp_path: Path, low: float, high: float) -> None:
    path = tmp_path / "far.tiff"
    Image.fromarray(np.array([[low, high]] * 4, np.float32)).save(path)
    with pytest.raises(DataError, match=r"far.tiff: the greys of this image go from .* 8 or 16 b"):
        open_picture(path)


@pytest.mark.parametrize("kind", ["char", "short"])
def test_signed_greys_are_refused(tmp_path: Path, kind: str) -> None:
    vips = pytest.importorskip("pyvips", reason="pyvips is not installed (extra dev)")
    path = tmp_path / "signed.tiff"
    vips.Image.new_from_array(GREY // 2).cast(kind).write_to_file(str(path))
    with pytest.raises(DataError, match=r"signed.tiff: its numbers may be negative .* unsigned"):
        open_picture(path)


def test_a_byte_that_was_changed_is_seen_by_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "strip.png"
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save(path, compress_level=0)
    assert np.array_equal(read(path), pixels)
    whole = bytearray(path.read_bytes())
    place = whole.index(b"IDAT") + 100
    whole[place] ^= 255
    path.write_bytes(bytes(whole))
    with pytest.raises(DataError, match="damaged image"):
        open_picture(path)


def test_greys_that_are_multiplied_by_their_alpha(tmp_path: Path) -> None:
    path = tmp_path / "grey.tif"
    tags = [
        (256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 2, 8 | 8 << 16), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, 1, 134), (277, 3, 1, 2), (278, 3, 1, 1), (279, 4, 1, 4), (338, 3, 1, 1),
    ]  # fmt: skip
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    fields = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    path.write_bytes(head + fields + bytes(4) + bytes([50, 128, 255, 255]))
    assert read(path)[0, :, 0].tolist() == [50 + 255 - 128, 255]


def test_deep_channels_one_after_another_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "planes.tif"
    tags: list[tuple[int, int, int]] = [  # width, height, bits, no compression, RGB, …, planes
        (256, 3, 4), (257, 3, 2), (258, 3, 0), (259, 3, 1), (262, 3, 2), (273, 4, 0), (277, 3, 3),
        (278, 3, 2), (279, 4, 0), (284, 3, 2),
    ]  # fmt: skip
    after = 8 + 2 + 12 * len(tags) + 4
    fields = b""
    for tag, kind, value in tags:
        count, held = {258: (3, after), 273: (3, after + 6), 279: (3, after + 18)}.get(
            tag, (1, value)
        )
        fields += struct.pack("<HHII", tag, kind, count, held)
    begins = [after + 30 + 16 * i for i in range(3)]
    more = struct.pack("<3H3I3I", 16, 16, 16, *begins, 16, 16, 16)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + fields + b"\0" * 4
    path.write_bytes(head + more + bytes(48))
    with pytest.raises(DataError, match="one after another"):
        open_picture(path)


def shapes() -> tuple[np.ndarray, np.ndarray]:
    """A black square on nothing at all, and how much of it is there."""
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[3:9, 5:15] = 255
    alpha[3:9, 5] = 128
    return np.zeros((HEIGHT, WIDTH, 3), np.uint8), alpha


@pytest.mark.parametrize(("ground", "behind"), [("white", 255), ("black", 0), ("#808080", 128)])
@pytest.mark.parametrize("form", ["png", "webp", "tiff", "la.png"])
def test_what_is_transparent_shows_the_ground(
    tmp_path: Path, form: str, ground: str, behind: int
) -> None:
    ink, alpha = shapes()
    path = tmp_path / f"clear.{form}"
    image = Image.fromarray(np.concatenate([ink, alpha[..., None]], -1))
    image = image.convert("LA") if form == "la.png" else image
    image.save(path, **({"lossless": True, "exact": True} if form == "webp" else {}))
    wanted = np.rint(behind * (1 - alpha / 255.0))
    found = read(path, ground=ground).astype(float)
    assert np.abs(found - wanted[..., None]).max() <= 1


def test_one_colour_that_is_transparent_shows_the_ground(tmp_path: Path) -> None:
    ink, alpha = shapes()
    clear = alpha == 0
    palette = Image.fromarray(np.where(clear, 7, 0).astype(np.uint8))
    palette.putpalette([0, 0, 0] * 256)
    deep = Image.fromarray(np.where(clear, 7, 0).astype(np.uint16))
    for name, image, key in (
        ("palette.png", palette, 7),
        ("palette.gif", palette, 7),
        ("grey.png", Image.fromarray(np.where(clear, 7, 0).astype(np.uint8)), 7),
        ("deep.png", deep, 7),
        ("rgb.png", Image.fromarray(np.where(clear[..., None], 7, ink).astype(np.uint8)), (7,) * 3),
    ):
        image.save(tmp_path / name, transparency=key)
        found = read(tmp_path / name)
        assert np.array_equal(found[..., 0], np.where(clear, 255, 0)), name


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr", "RGBX"])
def test_other_modes_are_read(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(COLOUR)
    picture = picture.convert(mode)
    path = tmp_path / "other.tiff"
    picture.save(path)
    with Image.open(path) as again:
        assert again.mode == ("RGB" if mode == "RGBX" else mode)
    near = {"1": 255, "P": 60}.get(mode, 4)
    assert np.abs(read(path).astype(int) - COLOUR).max() <= near


def test_the_first_of_several_frames_is_read_and_said(tmp_path: Path) -> None:
    for name in ("film.gif", "film.webp", "film.png", "pages.tiff"):
        frames = [Image.fromarray(np.full((8, 8), grey, np.uint8)) for grey in (10, 200)]
        how = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **how)
        with pytest.warns(UserWarning, match=f"{name} has 2 frames; the first is read"):
            assert np.abs(read(tmp_path / name).astype(int) - 10).max() <= 1


def test_a_page_of_several_is_upright_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "pages.tiff"
    pages = [Image.fromarray(COLOUR), Image.fromarray(COLOUR[::-1])]
    pages[0].save(path, save_all=True, append_images=pages[1:], exif=exif)
    with pytest.warns(UserWarning, match="2 frames"):
        assert np.array_equal(read(path), UPRIGHT[6](COLOUR))


def test_a_colour_profile_is_not_applied(tmp_path: Path) -> None:
    swapped = ImageCms.createProfile("LAB")  # not even one of RGB
    for form in ("png", "jpg", "webp", "tiff"):
        how = {"lossless": True} if form == "webp" else {}
        path = tmp_path / f"profile.{form}"
        Image.fromarray(COLOUR).save(
            path, icc_profile=ImageCms.ImageCmsProfile(swapped).tobytes(), **how
        )
        assert np.abs(read(path).astype(int) - COLOUR).max() <= (0 if form != "jpg" else 90)


NETPBM = {
    "p1.pbm": ("P1\n{} {}\n", GREY < 128, " "),
    "p2.pgm": ("P2\n{} {}\n255\n", GREY, " "),
    "p3.ppm": ("P3\n{} {}\n255\n", COLOUR, " "),
    "p4.pbm": ("P4\n{} {}\n", np.packbits(GREY < 128, axis=-1), ""),
    "p5.pgm": ("P5\n{} {}\n255\n", GREY, ""),
    "p6.ppm": ("P6\n{} {}\n255\n", COLOUR, ""),
    "deep.pgm": ("P5\n{} {}\n65535\n", (GREY.astype(np.uint16) * 257).astype(">u2"), ""),
    "dark.pgm": ("P5\n{} {}\n65535\n", GREY.astype(">u2"), ""),
    "odd.pgm": ("P5\n{} {}\n1020\n", (GREY.astype(np.uint16) * 4).astype(">u2"), ""),
    "deep.ppm": ("P6\n{} {}\n65535\n", (COLOUR.astype(np.uint16) * 257).astype(">u2"), ""),
    "float.pfm": ("Pf\n{} {}\n-1.0\n", np.float32(GREY[::-1] / 255.0), ""),
}


@pytest.mark.parametrize("name", NETPBM)
def test_portable_maps_of_any_depth(tmp_path: Path, name: str) -> None:
    head, values, between = NETPBM[name]
    text = " ".join(str(int(v)) for v in values.ravel()).encode() if between else values.tobytes()
    (tmp_path / name).write_bytes(head.format(WIDTH, HEIGHT).encode() + text)
    wanted = COLOUR if name.endswith("ppm") else np.stack([GREY] * 3, -1)
    if name.endswith("pbm"):  # 1 is black
        wanted = np.where(wanted < 128, 0, 255)
    if name == "dark.pgm":  # all but black, as its numbers say
        wanted = np.rint(wanted / 257)
    assert np.array_equal(read(tmp_path / name), wanted)


@pytest.mark.parametrize("bits", [24, 32, 8])
def test_bitmaps(tmp_path: Path, bits: int) -> None:
    channels = {24: COLOUR[..., ::-1], 32: np.dstack([COLOUR[..., ::-1], GREY]), 8: GREY}[bits]
    palette = b"".join(bytes([i, i, i, 0]) for i in range(256)) if bits == 8 else b""
    start, size = 54 + len(palette), WIDTH * HEIGHT * bits // 8
    head = struct.pack("<2sIIIIiiHHIIiiII", b"BM", start + size, 0, start, 40, WIDTH, HEIGHT, 1,
                       bits, 0, size, 0, 0, 0, 0)  # fmt: skip
    path = tmp_path / "map.bmp"
    path.write_bytes(head + palette + np.ascontiguousarray(channels[::-1]).tobytes())
    assert np.array_equal(read(path), np.stack([GREY] * 3, -1) if bits == 8 else COLOUR)


@pytest.mark.parametrize(("bits", "key"), [(1, 0), (1, 1), (2, 1), (4, 9)])
def test_one_grey_of_few_bits_that_is_transparent(tmp_path: Path, bits: int, key: int) -> None:
    values = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 2**bits
    write_png(tmp_path / "few.png", bits, 0, values, (key,))
    wanted = np.where(values == key, 128, values * (255 // (2**bits - 1)))
    assert np.array_equal(read(tmp_path / "few.png", ground="#808080")[..., 0], wanted)


def test_a_key_of_16_bits_is_compared_by_its_upper_8(tmp_path: Path) -> None:
    exact, near, far = (0x1234, 0x5678, 0x9ABC), (0x12FF, 0x5600, 0x9A00), (0x3412, 0x7856, 0xBC9A)
    path = tmp_path / "key.png"
    row = np.array([exact, near, far], np.uint16)
    write_png(path, 16, 2, row[None], exact)
    assert read(path)[0].tolist() == [[255] * 3, [255] * 3, [0x34, 0x78, 0xBC]]


FORMS = {
    "png": {}, "jpg": {}, "webp": {}, "gif": {}, "bmp": {}, "ppm": {}, "tiff": {},
    "lzw.tiff": {"compression": "tiff_lzw"},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_is_cut_or_changed_is_a_picture_or_an_error(tmp_path: Path, form: str) -> None:
    path, rng = tmp_path / f"hurt.{form}", random.Random(0)
    Image.fromarray(COLOUR).save(path, **FORMS[form])
    good = path.read_bytes()
    for length in (0, 1, 10, len(good) // 2, len(good) * 3 // 4):
        path.write_bytes(good[:length])
        with pytest.raises(DataError, match=rf"hurt.{form}: (not an|a damaged) image"):
            open_picture(path)
    for _ in range(150):
        hurt = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            hurt[rng.randrange(min(len(hurt), 200))] = rng.randrange(256)
        path.write_bytes(hurt)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow tells of odd tags
            with contextlib.suppress(DataError):
                assert open_picture(path).mode == "RGB"


def test_too_many_pixels_are_refused_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 3)
    with pytest.raises(DataError, match=r"bomb.png: too large an image .*Save it with fewer"):
        open_picture(tmp_path / "bomb.png")


def test_pictures_are_opened_in_one_place() -> None:
    source = Path(modgraft.__file__).parent
    found = [p for p in source.rglob("*.py") if "Image.open(" in p.read_text("utf-8")]
    assert found == [source / "data" / "picture.py"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.fromarray(COLOUR).save(good)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (tmp_path / "text.png").write_text("a text")
    for name, words in {"cut.png": "a damaged image", "text.png": "not an image"}.items():
        with pytest.raises(DataError, match=rf"{name}, question '7': {words}.*Fetch or save the f"):
            open_picture(tmp_path / name, id="7")
    Image.fromarray(COLOUR).convert("LAB").save(tmp_path / "lab.tiff")
    with pytest.raises(DataError, match=r"lab.tiff: its colours are of the kind LAB.* Save it in"):
        open_picture(tmp_path / "lab.tiff")
    with pytest.raises(MissingFileError, match=r"the image is missing: a folder has its name"):
        open_picture(tmp_path)
    with pytest.raises(MissingFileError, match=r"none.png: the image is missing"):
        open_picture(tmp_path / "none.png")
    with pytest.raises(ValueError, match="unknown color"):
        open_picture(good, ground="transparent-ish")
