import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from twoviews.data.decoding import Decoded
from twoviews.data.picture_files import dark, decode, shorter_side, tree
from twoviews.errors import BadInput


def constant(path, colour, mode="RGB", size=(16, 16), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return str(path)


def pixel(path, channels=3):
    canvas, _ = decode(path, 16, channels)
    assert canvas.shape == (channels, 16, 16)
    assert canvas.dtype == np.uint8
    return canvas[:, 4, 4].tolist()


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tif", "ppm"])
def test_lossless_formats_keep_every_pixel(tmp_path, suffix):
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(values).save(path, **({"lossless": True} if suffix == "webp" else {}))
    canvas, sizes = decode(str(path), 16, 3)
    assert sizes == (16, 16)
    assert np.array_equal(canvas, values.transpose(2, 0, 1))


def test_jpeg_is_close(tmp_path):
    assert np.allclose(pixel(constant(tmp_path / "a.jpg", (200, 100, 50), quality=95)), (200, 100, 50), atol=2)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, [255, 255, 255]),
        ("L", 77, [77, 77, 77]),
        ("LA", (100, 255), [100, 100, 100]),
        ("LA", (100, 0), [255, 255, 255]),
        ("RGBA", (255, 0, 0, 255), [255, 0, 0]),
        ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
        ("RGBA", (0, 0, 0, 51), [204, 204, 204]),
    ],
)
def test_modes_of_png(tmp_path, mode, colour, expected):
    assert pixel(constant(tmp_path / "a.png", colour, mode)) == expected


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=1)
    assert pixel(str(tmp_path / "plain.png")) == [10, 200, 30]
    assert pixel(str(tmp_path / "clear.png")) == [255, 255, 255]


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_has_the_right_colour(tmp_path, suffix):
    path = constant(tmp_path / f"a.{suffix}", (0, 255, 255, 0), "CMYK", **({"quality": 95} if suffix == "jpg" else {}))
    assert np.allclose(pixel(path), (255, 0, 0), atol=3)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("value", "expected"), [(65535, 255), (0, 0), (32896, 128), (257, 1), (129, 1), (128, 0)])
def test_16_bit_grey_is_scaled_not_cut(tmp_path, suffix, value, expected):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.full((16, 16), value, np.uint16)).save(path)
    assert pixel(str(path)) == [expected] * 3
    assert pixel(str(path), channels=1) == [expected]


def test_16_bit_colour_png(tmp_path):
    def block(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + struct.pack(">3H", 65535, 0x8080, 0) * 16 for _ in range(16))
    head = struct.pack(">2I5B", 16, 16, 16, 2, 0, 0, 0)
    blocks = block(b"IHDR", head) + block(b"IDAT", zlib.compress(rows)) + block(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + blocks)
    assert pixel(str(tmp_path / "a.png")) == [255, 128, 0]


def test_big_endian_and_32_bit_tiff(tmp_path):
    Image.frombytes("I;16B", (16, 16), np.full((16, 16), 65535, ">u2").tobytes()).save(tmp_path / "big.tif")
    assert pixel(str(tmp_path / "big.tif")) == [255] * 3
    Image.fromarray(np.full((16, 16), 65535, np.int32)).save(tmp_path / "int.tif")
    assert pixel(str(tmp_path / "int.tif")) == [255] * 3
    Image.fromarray(np.full((16, 16), 70000, np.int32)).save(tmp_path / "large.tif")
    with pytest.raises(ValueError, match="70000"):
        decode(str(tmp_path / "large.tif"), 16, 3)
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="data=array"):
        decode(str(tmp_path / "float.tif"), 16, 3)


def test_exif_rotation_turns_the_picture_and_its_size(tmp_path):
    values = np.zeros((20, 40, 3), np.uint8)
    values[:, :20] = (255, 0, 0)  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: left becomes top
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(values).save(tmp_path / "a.jpg", exif=exif, quality=95)
    for name in ("a.png", "a.jpg"):
        canvas, sizes = decode(str(tmp_path / name), 16, 3)
        assert sizes == (40, 20)
        assert canvas[0, :6].min() > 240
        assert canvas[0, 10:].max() < 15


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_every_orientation_in_every_format(tmp_path, suffix, orientation):
    """As Pillow itself turns them, with the size of the upright picture."""
    values = np.zeros((24, 48, 3), np.uint8)
    values[:12, :24], values[12:, :24] = (250, 0, 0), (0, 250, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = ImageOps.exif_transpose(_with_exif(Image.fromarray(values), exif))
    Image.fromarray(values).save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    canvas, sizes = decode(str(tmp_path / f"a.{suffix}"), 16, 3)
    assert sizes == (upright.height, upright.width)
    plain = np.asarray(upright.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(canvas.astype(int) - plain).mean() < 8


def _with_exif(image, exif):
    file = io.BytesIO()
    image.save(file, "png", exif=exif)
    return Image.open(file)


def _entry(kind, count, value):
    """EXIF with one entry, the orientation, of this type."""
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1)
    return head + struct.pack("<HHI", 0x0112, kind, count) + value.ljust(4, b"\0") + struct.pack("<I", 0)


@pytest.mark.parametrize(
    "exif",
    [
        *(_entry(3, 1, struct.pack("<H", value)) for value in (0, 9, 255, 65535)),
        _entry(2, 2, b"6\0"),
        _entry(3, 2, struct.pack("<HH", 6, 6)),
        _entry(7, 4, b"\6\0\0\0"),
        _entry(5, 1, struct.pack("<I", 9999)),
        b"Exif\0\0nonsense",
    ],
)
def test_orientations_that_mean_nothing_turn_nothing(tmp_path, exif):
    Image.fromarray(np.zeros((24, 48, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert decode(str(tmp_path / "a.jpg"), 16, 3)[1] == (24, 48)


def test_twelve_bits_in_files_of_sixteen_are_said(tmp_path):
    noise = np.random.default_rng(0)
    for name, bits in (("dark", 12), ("bright", 16)):
        for i in range(3):
            Image.fromarray(noise.integers(0, 2**bits, (16, 16), dtype=np.uint16)).save(tmp_path / f"{name}{i}.png")
    (sentence,) = dark([str(tmp_path / f"dark{i}.png") for i in range(3)])
    assert "nearly black" in sentence and "Multiply them by 16" in sentence
    assert dark([str(tmp_path / f"bright{i}.png") for i in range(3)]) == []
    assert dark([constant(tmp_path / "eight.png", 1, "L")]) == []


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JPEG", "dib", "tga"])
def test_other_names_of_pictures(tmp_path, suffix):
    Image.new("RGB", (16, 16), (200, 0, 0)).save(tmp_path / f"a.{suffix}")
    (path,) = tree(tmp_path).paths
    assert decode(path, 16, 3)[0][0].min() > 190


def test_the_whole_picture_goes_onto_the_canvas_and_large_jpegs_keep_their_size(tmp_path):
    values = np.zeros((300, 500, 3), np.uint8)
    values[150:, 250:] = 255
    Image.fromarray(values).save(tmp_path / "a.jpg", quality=95)
    canvas, sizes = decode(str(tmp_path / "a.jpg"), 32, 3)
    assert sizes == (300, 500)
    assert canvas[:, 18:, 18:].min() > 245
    assert canvas[:, :14].max() < 10
    assert shorter_side(str(tmp_path / "a.jpg")) == 300


def test_decoding_agrees_with_a_plain_resize_on_a_photograph():
    from sklearn import datasets

    photograph = datasets.load_sample_image("china.jpg")
    canvas, sizes = decode(f"{Path(datasets.__file__).parent}/images/china.jpg", 96, 3)
    assert sizes == photograph.shape[:2]
    plain = np.asarray(Image.fromarray(photograph).resize((96, 96), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(canvas.astype(int) - plain).mean() < 2


def test_tree_lists_pictures_only_and_in_order(tmp_path):
    for name in ("b/2.PNG", "b/deep/er/1.jpg", "a/x.webp", ".hidden/y.png", "a/.z.png"):
        constant(tmp_path / name, 0, "RGB", format="PNG")
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    found = tree(tmp_path)
    assert found.names == ("a/x.webp", "b/2.PNG", "b/deep/er/1.jpg")
    assert (found.others, found.loose, found.classes) == ("1 .txt", 0, ("a", "b"))
    assert found.paths[0] == str(tmp_path / "a" / "x.webp")


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(BadInput, match="no file at all"):
        tree(tmp_path)
    (tmp_path / "readme.txt").write_text("x")
    (tmp_path / "Makefile").write_text("x")
    (tmp_path / "a.heic").write_text("x")
    with pytest.raises(BadInput, match=r"only 3 other files: 1 \.heic, 1 \.txt, 1 Makefile\); .*\.png"):
        tree(tmp_path)


def written(folder, count=70):
    rng = np.random.default_rng(1)
    folder.mkdir(exist_ok=True)
    paths = [str(folder / f"{i:03d}.png") for i in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return paths


def test_decoded_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    paths = written(tmp_path)
    parts = torch.randperm(70, generator=torch.Generator().manual_seed(0)).split(40)
    state = torch.get_rng_state()
    expected = [torch.stack([torch.from_numpy(decode(paths[i], 8, 3)[0].copy()) for i in part]) for part in parts]
    for workers in (0, 2):
        decoded = Decoded(paths, size=8, channels=3, workers=workers)
        for _ in range(2):  # the workers stay for the second pass
            for ours, theirs in zip(decoded.batches(parts), expected, strict=True):
                assert torch.equal(ours, theirs)
    assert torch.equal(state, torch.get_rng_state())


def test_a_pass_may_be_left_early_and_two_may_run_at_once(tmp_path):
    decoded = Decoded(written(tmp_path), size=8, channels=3, workers=1)
    everything = torch.arange(70).split(20)
    first = decoded.batches(everything)
    head = next(first)
    second = list(decoded.batches(everything))
    assert torch.equal(head, second[0])
    assert torch.equal(next(first), second[1])
    first.close()
    assert all(map(torch.equal, decoded.batches(everything), second))


def test_a_file_that_breaks_or_goes_later_is_named(tmp_path):
    paths = written(tmp_path, 3)
    decoded = Decoded(paths, size=8, channels=3, workers=0)
    (tmp_path / "001.png").write_bytes(b"not any more")
    with pytest.raises(BadInput, match=r"001\.png was a sound picture"):
        list(decoded.batches([torch.arange(3)]))
    (tmp_path / "001.png").unlink()
    with pytest.raises(BadInput, match=r"001\.png cannot be read: No such file"):
        list(decoded.batches([torch.arange(3)]))
