"""Reading image files of every format and mode, and finding them in folders."""

import struct

import lightning as L
import numpy as np
import pytest
from PIL import Image, ImageOps

from lightning_kd.core import Classification
from lightning_kd.data import ImageFolderDataModule
from lightning_kd.data.image_files import class_folders, find_images, images_below, read_image
from tests.data.image_trees import fit, write_image_folders

# a ramp from dark to bright, in each mode that a file can hold
RAMP = np.linspace(20, 235, 64).reshape(8, 8)
KINDS = [
    ("L", "png"), ("L", "tif"), ("L", "jpg"), ("LA", "png"), ("LA", "tif"), ("P", "png"), ("P", "bmp"), ("P", "tif"),
    ("RGB", "png"), ("RGB", "jpg"), ("RGB", "webp"), ("RGB", "bmp"), ("RGB", "tif"), ("RGB", "ppm"), ("RGBA", "png"),
    ("RGBA", "webp"), ("RGBA", "tif"), ("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "jpg"), ("YCbCr", "tif"),
    ("LAB", "tif"), ("I;16", "png"), ("I;16", "tif"),
]  # fmt: skip


def image_of(mode):
    grey = Image.fromarray(RAMP.round().astype(np.uint8))
    if mode in ("I;16", "I"):
        deep = (RAMP * 257).round()
        return Image.fromarray(deep.astype(np.uint16 if mode == "I;16" else np.int32))
    if mode == "P":
        return grey.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    if mode == "LAB":
        return Image.merge("LAB", [grey, *[Image.new("L", grey.size, 128)] * 2])
    return grey.convert("RGB").convert(mode) if mode not in ("L", "LA") else grey.convert(mode)


@pytest.mark.parametrize(("mode", "ending"), KINDS)
def test_every_mode_keeps_its_brightness(mode, ending, tmp_path):
    path = tmp_path / f"some.{ending}"
    image_of(mode).save(path, **({"quality": 100} if ending in ("jpg", "webp") else {}))
    found = np.asarray(read_image(path)).astype(float)
    assert found.shape == (8, 8, 3)
    # LAB has another grey scale; lossy formats are close
    assert np.abs(found - RAMP.round()[..., None]).max() < (60 if mode == "LAB" else 12)
    assert (np.diff(found.mean(2).reshape(-1)[::8]) > 0).all()


def test_binary_image_becomes_0_and_255(tmp_path):
    Image.fromarray(RAMP > 128).save(tmp_path / "some.png")
    assert np.asarray(read_image(tmp_path / "some.png"))[..., 0].tolist() == (255 * (RAMP > 128)).tolist()


def test_images_of_floats_and_32_bit_integers_need_image_range(tmp_path):
    for mode, values in (("F", RAMP.astype(np.float32)), ("I", RAMP.astype(np.int32))):
        path = tmp_path / f"{mode}.tif"
        Image.fromarray(values).save(path)
        with pytest.raises(ValueError, match=rf"{mode}\.tif' holds .*give image_range"):
            read_image(path)
        found = np.asarray(read_image(path, image_range=(0, 510)))[..., 0]
        np.testing.assert_allclose(found, RAMP / 2, atol=1.01)
    Image.fromarray((RAMP * 4).astype(np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_allclose(
        np.asarray(read_image(tmp_path / "deep.png", image_range=(0, 1020)))[..., 0], RAMP, atol=1.01
    )


@pytest.mark.parametrize(("most", "kind"), [(65535, ">u2"), (1023, ">u2"), (255, "u1")])
def test_pgm_is_scaled_by_the_maximum_in_its_header(most, kind, tmp_path):
    values = np.round(RAMP / 255 * most).astype(kind)
    (tmp_path / "some.pgm").write_bytes(f"P5 8 8 {most}\n".encode() + values.tobytes())
    np.testing.assert_allclose(np.asarray(read_image(tmp_path / "some.pgm"))[..., 0], RAMP, atol=1.01)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_turns_photographs_upright(ending, tmp_path):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    path = tmp_path / f"some.{ending}"
    Image.fromarray(np.rot90(upright)).save(path, exif=exif)
    found = np.asarray(read_image(path)).astype(int)
    assert found.shape == (16, 32, 3)
    assert np.abs(found - upright).max() < 40


def exif_of(*tags):
    """An EXIF block of one folder with ``tags``: number, type, count and four bytes of each."""
    entries = b"".join(struct.pack("<HHI", *tag[:3]) + tag[3] for tag in tags)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(20)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16"])
def test_turned_tiffs_keep_their_pixel_values(mode, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = image_of(mode).crop((0, 0, 4, 8))
    image.save(tmp_path / "straight.tif")
    image.save(tmp_path / "turned.tif", exif=exif)
    found, straight = (np.asarray(read_image(tmp_path / f"{name}.tif")) for name in ("turned", "straight"))
    np.testing.assert_array_equal(found, np.rot90(straight, -1))


def test_tiff_with_invalid_metadata_is_read(tmp_path):
    image_of("L").save(tmp_path / "some.tif")
    whole = (tmp_path / "some.tif").read_bytes()
    strip = struct.pack("<HHI", 278, 4, 1)  # rows per strip, not needed for a single strip
    assert strip in whole
    (tmp_path / "some.tif").write_bytes(whole.replace(strip, struct.pack("<HHI", 700, 4, 1)))  # XMP that is a number
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "some.tif"))[..., 0], RAMP.round())


TURNED = (0x0112, 3, 1, b"\6\0\0\0")


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    ("exif", "shape"),
    [
        # tags of a type that Pillow reads, but cannot write again
        (exif_of((0x0100, 11, 1, struct.pack("<f", 3.5)), TURNED), (16, 32)),
        (exif_of((0x0100, 9, 1, struct.pack("<i", -3)), TURNED), (16, 32)),
        (exif_of(TURNED, (0xA005, 2, 4, b"abc\0")), (16, 32)),
        # invalid orientation or EXIF: read without turning
        (exif_of((0x0112, 2, 2, b"6\0\0\0")), (32, 16)),
        (exif_of((0x0112, 3, 1, b"\x09\0\0\0")), (32, 16)),
        (exif_of((0x0112, 5, 1, b"\0\0\0\x7f")), (32, 16)),
        (b"Exif\0\0no EXIF at all", (32, 16)),
        (b"Exif\0\0MM\0*\xff\xff\xff\xff", (32, 16)),
    ],
    ids=["float", "negative", "text", "letter", "ninth", "far", "garbage", "nowhere"],
)
@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning", "ignore:Truncated:UserWarning")
def test_photographs_with_unusual_or_invalid_exif_are_read(exif, shape, ending, tmp_path):
    path = tmp_path / f"some.{ending}"
    Image.new("RGB", (16, 32)).save(path, exif=exif)
    assert np.asarray(read_image(path)).shape == (*shape, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_does(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RAMP.astype(np.uint8)[:4]).save(tmp_path / "some.png", exif=exif)
    with Image.open(tmp_path / "some.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "some.png")), expected)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "RGB"])
def test_transparent_pixels_show_the_background(mode, tmp_path):
    path = tmp_path / "some.png"
    if mode in ("P", "RGB"):  # one colour counts as transparent
        Image.new("RGB", (4, 4), (10, 20, 30)).convert(mode).save(path, transparency=0 if mode == "P" else (10, 20, 30))
        if mode == "P":
            image = Image.new("P", (4, 4), 0)
            image.putpalette([10, 20, 30])
            image.save(path, transparency=0)
    else:
        Image.new(mode, (4, 4), 0).save(path)
    assert np.asarray(read_image(path)).min() == 255
    assert (np.asarray(read_image(path, background=(1, 2, 3))) == [1, 2, 3]).all()


def test_files_of_other_formats_are_counted_in_a_warning(tmp_path):
    for name in ("a.png", "b.gif", "c.gif", "d.jp2", ".hidden.gif"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"3 of 4 files are left out \(2 x \.gif, 1 x \.jp2\)"):
        assert images_below(tmp_path) == [str(tmp_path / "a.png")]


def test_other_files_in_every_class_give_one_warning(tmp_path):
    names = [f"n{k:02d}" for k in range(12)]
    for name in names:
        write_image_folders(tmp_path, [name], count=2)
        (tmp_path / name / f"{name}_boxes.txt").write_text("")
    with pytest.warns(UserWarning, match="left out") as told:
        paths, _ = find_images(tmp_path, names)
    assert len(paths) == 24
    assert len(told) == 1
    assert f"{str(tmp_path)!r}: 12 of 36 files are left out (12 x .txt)" in str(told[0].message)


def test_links_to_a_parent_folder_do_not_repeat_files(tmp_path):
    for folder in ("pool/deep", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    names = ["pool/a.png", "pool/b.png", "pool/deep/c.png", "elsewhere/d.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    links = {"pool/self": "pool", "pool/deep/up": "pool", "pool/root": ".", "pool/there": "elsewhere"}
    for link, target in {**links, "elsewhere/back": "pool", "pool/nowhere": "gone", "pool/loop": "pool/loop"}.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.warns(UserWarning, match=r"2 of 6 files are left out"):  # broken links
        found = images_below(tmp_path / "pool")
    expected = ["pool/a.png", "pool/b.png", "pool/deep/c.png", "pool/there/d.png"]
    assert found == [str(tmp_path / name) for name in expected]
    # the root is a link, and `same` is a link to the folder `more` beside it
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").unlink()
    (tmp_path / "elsewhere/more").mkdir()
    (tmp_path / "elsewhere/more/e.png").write_bytes(b"")
    (tmp_path / "elsewhere/same").symlink_to("more")
    found = images_below(tmp_path / "link")
    assert found == [str(tmp_path / "link" / name) for name in ("d.png", "more/e.png", "same/e.png")]


def test_link_to_a_parent_folder_is_no_class(tmp_path):
    root = write_image_folders(tmp_path / "train")
    (root / "all").symlink_to(root)
    (root / "a" / "others").symlink_to("..")
    assert class_folders(root) == ["a", "b"]
    paths, target = find_images(root, ["a", "b"])
    assert len(paths) == 12
    assert target.bincount().tolist() == [6, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": (0, 0, 256)}, "background must be "),
        ({"image_range": (1, 0)}, "image_range must be two numbers"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'skip', got 'ignore'"),
        ({"resize": 4}, "resize must be at least 8"),
        ({"strong_crop": "centre"}, "strong_crop must be"),
    ],
)
def test_invalid_arguments_raise(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule(str(write_image_folders(tmp_path)), image_size=8, **options)


def fit_and_save(data, path):
    trainer, _ = fit(data)
    trainer.save_checkpoint(path)


def test_new_class_folder_since_the_checkpoint_raises(tmp_path):
    root = write_image_folders(tmp_path / "images", classes=("a", "c"))
    fit_and_save(ImageFolderDataModule(str(root), image_size=8, batch_size=4), tmp_path / "some.ckpt")
    task = Classification("cnn_tiny", 3, input_shape=(3, 8, 8))
    write_image_folders(root, classes=("b",))
    data = ImageFolderDataModule(str(root), image_size=8, batch_size=4)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=2)
    for call in (trainer.fit, trainer.test, trainer.predict):
        with pytest.raises(ValueError, match=r"not those of the checkpoint \(\['b'\] are new;"):
            call(task, datamodule=data, ckpt_path=tmp_path / "some.ckpt", weights_only=True)


def test_check_classes_raises_for_another_order_or_other_classes(tmp_path):
    data = ImageFolderDataModule(str(write_image_folders(tmp_path)), image_size=8)
    data.check_classes(["a", "b"])
    data.check_classes(["a", "b", "c"])  # this data need not have every class
    with pytest.raises(ValueError, match=r"\(their order differs; its class 0 was 'b'\)"):
        data.check_classes(["b", "a"])
    with pytest.raises(ValueError, match=r"\(\['b'\] are new; \['x'\] are missing;"):
        data.check_classes(["a", "x"])


def test_numeric_folder_names_are_sorted_as_text_with_a_note(tmp_path, capsys):
    data = ImageFolderDataModule(str(write_image_folders(tmp_path, classes=("1", "2", "10"))), image_size=8)
    assert data.class_names == ["1", "10", "2"]
    assert "sorted as text, not as numbers (as in torchvision): 1, 10, 2" in capsys.readouterr().err
