"""Images and masks from files: pairs, colour tables, joint views, in memory or not, layouts, and errors in files."""

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_kd.core import Segmentation, SemanticSegmentation
from lightning_kd.data import CamVidDataModule, CityscapesDataModule, SegmentationFolderDataModule
from lightning_kd.data.augment import Normalize
from lightning_kd.data.joint_views import JointViews
from lightning_kd.data.mask_files import MaskTable, read_colours
from tests.two_processes import on_two_ranks

PLAIN = {"mean": [0.0] * 3, "std": [1 / 255] * 3}


def mask_of(k, size=(12, 16), classes=3):
    return np.random.default_rng(k).integers(0, classes, size, dtype=np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def tree(root, names=("a/x", "y", "z", "w", "v"), size=(12, 16), classes=3, ignored=True, masks="masks"):
    """Writes images of colour 40 * (class + 1), so that a change of image or mask without the other is noticed."""
    for k, name in enumerate(names):
        mask = mask_of(k, size, classes)
        save(root / "images" / f"{name}.png", np.repeat(40 * (mask + 1)[..., None], 3, 2).astype(np.uint8))
        if ignored:
            mask[0, 0] = 255
        save(root / masks / f"{name}.png", mask)
    return str(root)


def folder(root, **options):
    return SegmentationFolderDataModule(
        tree(root), class_names=3, **{"batch_size": 2, "val_fraction": 0.0, **PLAIN, **options}
    )


def batches(data, split="train", epoch=0, **options):
    loader = data.loader(split, **options)
    loader.set_epoch(epoch)
    return [*loader]


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [None, True, False])
def test_images_and_masks_are_paired_by_name(tmp_path, resident):
    data = folder(tmp_path, resident=resident)
    assert isinstance(data.problem, Segmentation)
    assert (data.num_classes, data.input_shape, data.class_names) == (3, (3, 12, 16), ["0", "1", "2"])
    assert (data.train_size, data.val_size, data.test_size) == (4, 0, 1)
    assert isinstance(data.train_image, list) == (resident is False)
    for split in ("train", "test"):
        for batch in batches(data, split):
            assert batch.image.dtype == torch.float32
            assert batch.target.dtype == torch.int64
            known = batch.target >= 0
            assert (~known).flatten(1).sum(1).eq(1).all()
            torch.testing.assert_close(batch.image[:, 0][known], 40 * (batch.target[known].float() + 1))


def test_train_val_and_test_folders_are_used_as_splits(tmp_path):
    for split in ("train", "val"):
        tree(tmp_path, [f"{split}/{k}" for k in range(3)])
    data = SegmentationFolderDataModule(str(tmp_path), class_names=list("abc"), val_fraction=0.34)
    assert (data.train_size, data.val_size, data.test_size) == (2, 1, 3)
    tree(tmp_path, ["test/0"])
    data = SegmentationFolderDataModule(str(tmp_path), class_names=list("abc"), val_fraction=0.0)
    assert (data.train_size, data.val_size, data.test_size) == (3, 3, 1)
    assert data.path_of(0).endswith("test/0.png")


def test_describe_holds_stretch_and_input_shape_for_predictions(tmp_path):
    found = folder(tmp_path, image_size=(6, 8)).describe()
    assert (found["stretch"], found["input_shape"], found["problem"]) == (True, [3, 6, 8], "Segmentation")


def test_other_folder_names_and_image_endings_are_read(tmp_path):
    mask = mask_of(0)
    for name in ("one", "two"):
        save(tmp_path / "photos" / f"{name}.jpg", np.zeros((12, 16, 3), np.uint8))
        save(tmp_path / "labels" / f"{name}.png", mask)
    data = SegmentationFolderDataModule(str(tmp_path), "photos", "labels", 3, test_fraction=0.5, val_fraction=0.0)
    assert torch.equal(batches(data)[0].target[0], torch.from_numpy(mask).long())


def test_masks_with_palette_16_bits_or_another_ignored_id_are_read(tmp_path):
    mask = mask_of(1)
    picture = Image.fromarray(mask, mode="P")
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    picture.save(tmp_path / "p.png")
    assert torch.equal(MaskTable(3).read(str(tmp_path / "p.png")).long(), torch.from_numpy(mask).long())
    found = MaskTable(2, ignore=2).read(str(tmp_path / "p.png"))
    assert torch.equal(found == -1, torch.from_numpy(mask == 2))
    half = MaskTable(3).read(str(tmp_path / "p.png"), (6, 8))
    assert half.shape == (6, 8)
    wide = np.where(mask == 2, 40_000, mask.astype(np.uint16))
    Image.fromarray(wide).save(tmp_path / "w.png")
    assert torch.equal(MaskTable(2, ignore=40_000).read(str(tmp_path / "w.png")), found)


COLOURS = {"sky": [0, 0, 255], "road": [128, 64, 128], "void": [0, 0, 0]}


def test_colour_masks_are_read_by_a_table(tmp_path):
    mask = mask_of(2)
    save(tmp_path / "images/x.png", np.zeros((12, 16, 3), np.uint8))
    save(tmp_path / "images/y.png", np.zeros((12, 16, 3), np.uint8))
    for name in "xy":
        save(tmp_path / f"masks/{name}.png", np.array([*COLOURS.values()], dtype=np.uint8)[mask])
    options = {"test_fraction": 0.5, "val_fraction": 0.0}
    (tmp_path / "t.csv").write_text("name,r,g,b\n" + "".join(f"{k},{r},{g},{b}\n" for k, (r, g, b) in COLOURS.items()))
    for table in (COLOURS, str(tmp_path / "t.csv")):
        data = SegmentationFolderDataModule(str(tmp_path), colours=table, **options)
        assert data.class_names == ["sky", "road", "void"]
        assert torch.equal(batches(data)[0].target[0], torch.from_numpy(mask).long())
    ignored = torch.from_numpy(np.where(mask == 2, -1, 1 - mask.astype(int)))
    data = SegmentationFolderDataModule(str(tmp_path), class_names=["road", "sky"], colours=COLOURS, **options)
    assert torch.equal(batches(data)[0].target[0], ignored)
    two = {name: COLOURS[name] for name in ("road", "sky")}
    data = SegmentationFolderDataModule(str(tmp_path), colours=two, ignore=[0, 0, 0], **options)
    assert torch.equal(batches(data)[0].target[0], ignored)
    with pytest.raises(ValueError, match=r"holds the colour \[0, 0, 0\], which is not in the table"):
        SegmentationFolderDataModule(str(tmp_path), colours=two, **options).setup()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,r,g,b\nsky,0,0\n", "line 2: must be a name and three numbers from 0 to 255, got sky, 0, 0"),
        ("sky,0,0,256\n", "line 1: must be a name and three"),
        ("sky,0,0,1\nsky,0,0,2\n", "line 2: 'sky' has an earlier line too"),
        ("name,r,g,b\n", "holds no class"),
    ],
)
def test_invalid_colour_tables_raise(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_colours(str(tmp_path / "t.csv"))


def test_image_size_resizes_images_and_masks(tmp_path):
    data = folder(tmp_path, image_size=(6, 8), augment=False)
    batch = batches(data)[0]
    assert (data.input_shape, data.crop_size) == ((3, 6, 8), (6, 8))
    assert batch.image.shape == (4, 3, 6, 8)
    assert batch.target.shape == (4, 6, 8)


# -- joint views -----------------------------------------------------------------------------------------------------


def test_views_crop_and_flip_image_and_mask_together(tmp_path):
    """At scale 1 each pixel keeps the colour of its class; pixels outside the image are 0, and ignored."""
    data = folder(tmp_path, crop_size=(10, 20), scale=(1.0, 1.0))
    seen = set()
    for epoch in range(12):
        for batch in batches(data, epoch=epoch, shuffle=True, augment=True):
            assert batch.image.shape == (2, 3, 10, 20)
            assert batch.target[..., 16:].eq(-1).all()
            assert batch.image[..., 16:].eq(0).all()
            known = batch.target >= 0
            torch.testing.assert_close(batch.image[:, 1][known], 40 * (batch.target[known].float() + 1))
            for index, target in zip(batch.index.tolist(), batch.target, strict=True):
                whole = data.train_target[index].long()
                places = [
                    (top, flip)
                    for top in range(3)
                    for flip in (False, True)
                    if torch.equal(target[:, :16], (whole.flip(-1) if flip else whole)[top : top + 10])
                ]
                assert len(places) == 1
                seen.add(places[0])
    assert len(seen) == 6  # three positions, flipped or not


def draw_views(views, count=400, size=(20, 30)):
    torch.manual_seed(0)
    image, mask = torch.full((3, *size), 100, dtype=torch.uint8), torch.zeros(size, dtype=torch.int16)
    normalize = Normalize([0.0] * 3, [1 / 255] * 3, (3, *size))
    return [views(image, mask, normalize) for _ in range(count)]


def test_scale_factors_are_drawn_in_steps():
    views = JointViews((60, 80), (0.5, 2.0), 0.1, flip=False)
    heights = {int((mask >= 0).any(1).sum()) for _, mask in draw_views(views)}
    assert heights == {*range(10, 41, 2)}
    assert views.steps == 16
    assert JointViews((4, 4), (0.5, 0.5)).steps == 1
    free = {int((mask >= 0).any(1).sum()) for _, mask in draw_views(JointViews((60, 80), (0.5, 2.0), None))}
    assert {11, 25, 39} < free <= {*range(10, 41)}


def test_scaled_mask_fits_its_scaled_image():
    normalize = Normalize([0.0] * 3, [1 / 255] * 3, (3, 8, 12))
    mask = torch.zeros(8, 12, dtype=torch.int16)
    mask[:, 6:] = 1
    image = (mask * 200).to(torch.uint8).expand(3, -1, -1).contiguous()
    for factor in (0.5, 2.0):
        shown, target = JointViews((round(8 * factor), round(12 * factor)), (factor, factor), flip=False)(
            image, mask, normalize
        )
        assert ((shown[0] > 100) == (target == 1)).all()
        assert target.float().mean() == 0.5


def test_colour_option_changes_images_and_not_masks():
    plain = draw_views(JointViews((20, 30), (1.0, 1.0), flip=False), 1)[0]
    found = draw_views(JointViews((20, 30), (1.0, 1.0), flip=False, colour=0.4), 50)
    values = torch.stack([image.mean() for image, _ in found])
    assert 57 <= values.min() < 80 < 120 < values.max() <= 140  # rounded down three times
    assert all(torch.equal(mask, plain[1]) for _, mask in found)


def test_views_do_not_depend_on_workers_memory_or_batches(tmp_path):
    def by_index(**options):
        data = folder(tmp_path, colour=0.2, **options)
        found = {}
        for epoch in range(2):
            for batch in batches(data, epoch=epoch, shuffle=True, augment=True):
                found |= {
                    (epoch, i): (image, mask)
                    for i, image, mask in zip(batch.index.tolist(), batch.image, batch.target, strict=True)
                }
        return found

    first = by_index()
    assert not torch.equal(first[0, 0][0], first[1, 0][0])
    for other in ({"num_workers": 1, "resident": False}, {"batch_size": 4, "resident": True}):
        again = by_index(**other)
        assert again.keys() == first.keys()
        for key, pair in first.items():
            assert all(torch.equal(a, b) for a, b in zip(pair, again[key], strict=True))


def test_global_random_generator_is_not_used(tmp_path):
    data = folder(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    batches(data, augment=True)
    assert torch.equal(torch.rand(2), expected)


# -- training --------------------------------------------------------------------------------------------------------


def fitted(data, **options):
    L.seed_everything(0, verbose=False)
    task = SemanticSegmentation("fcn_tiny", data.num_classes, input_shape=data.input_shape)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(**{**quiet, "enable_checkpointing": False, "max_epochs": 2, **options})
    trainer.fit(task, data)
    return task, trainer


@pytest.mark.parametrize("resident", [True, False])
def test_fit_uses_crops_and_test_and_predict_whole_images(tmp_path, resident):
    data = folder(tmp_path, crop_size=(8, 8), resident=resident, val_fraction=0.3)
    task, trainer = fitted(data)
    assert {"val/miou", "train/loss"} <= {*trainer.callback_metrics}
    (found,) = trainer.test(task, data, verbose=False)
    assert 0 <= found["test/miou"] <= 1
    assert [one["prediction"].shape for one in trainer.predict(task, data)] == [(1, 12, 16)]


def test_new_images_are_predicted_without_the_training_data(tmp_path):
    for k, size in enumerate([(9, 11), (5, 7)]):
        save(tmp_path / "new" / f"{k}.png", np.zeros((*size, 3), np.uint8))
    data = SegmentationFolderDataModule(
        "gone", class_names=["a", "b"], predict=str(tmp_path / "new"), eval_batch_size=1
    )
    task = SemanticSegmentation("fcn_tiny", 2, input_shape=data.input_shape)
    trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)
    assert [one["prediction"].shape[1:] for one in trainer.predict(task, data)] == [(9, 11), (5, 7)]
    assert data.path_of(1).endswith("1.png")
    data = SegmentationFolderDataModule("gone", class_names=["a", "b"], predict=str(tmp_path / "new"))
    with pytest.raises(
        ValueError, match=r"^eval_batch_size=8 cannot hold images of different sizes, got 5 x 7, 9 x 11"
    ):
        trainer.predict(task, data)


def test_resume_with_changed_masks_raises(tmp_path):
    for resident in (True, False):
        data = folder(tmp_path, resident=resident)
        task, trainer = fitted(data)
        trainer.save_checkpoint(tmp_path / "two.ckpt")
        path = data.train_masks[0]
        save(tmp_path / "masks" / path.rpartition("masks/")[2], np.zeros((12, 16), np.uint8))
        changed = SegmentationFolderDataModule(
            str(tmp_path), class_names=3, batch_size=2, val_fraction=0.0, resident=resident, **PLAIN
        )
        with pytest.raises(ValueError, match="trained on other data"):
            L.Trainer(
                accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False, enable_checkpointing=False
            ).fit(task, changed, ckpt_path=tmp_path / "two.ckpt")


def test_fake_data_of_each_module_has_the_crop_size():
    for data in (
        SegmentationFolderDataModule("none", fake=True),
        CamVidDataModule("none", fake=True),
        CityscapesDataModule("none", fake=True, crop_size=(32, 64)),
    ):
        batch = batches(data, augment=True)[0]
        assert batch.image.shape[2:] == batch.target.shape[1:] == data.crop_size
        data.problem.check_target(batch.target)
        assert batches(data, "test")[0].image.shape[2:] == data.crop_size


# -- layouts ---------------------------------------------------------------------------------------------------------


def camvid(root, value=11):
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        for k in range(count):
            mask = mask_of(k, classes=11)
            mask[0] = value
            save(root / split / f"{k}.jpg", np.zeros((12, 16, 3), np.uint8))
            save(root / f"{split}annot" / f"{k}.png", mask)
    return CamVidDataModule(str(root), batch_size=2)


def test_camvid_layout_is_read(tmp_path):
    data = camvid(tmp_path)
    assert (data.num_classes, data.class_names[9], data.input_shape) == (11, "pedestrian", (3, 12, 16))
    assert (data.train_size, data.val_size, data.test_size) == (3, 2, 1)
    target = batches(data, "val")[0].target
    assert target[:, 0].eq(-1).all()
    assert torch.equal(target[1, 1:], torch.from_numpy(mask_of(1, classes=11))[1:].long())
    with pytest.raises(
        ValueError, match=r"annot/0\.png' holds the value 12, which is none of the 11 classes and not ig"
    ):
        camvid(tmp_path, 12).setup()


def test_cityscapes_layout_is_read_with_mapped_ids(tmp_path):
    ids = np.array([[7, 8, 33, 0], [31, 34 - 1, 255, 29], [26, 11, 12, 1]], dtype=np.uint8)
    for split in ("train", "val"):
        for k in range(2):
            save(tmp_path / f"leftImg8bit/{split}/ulm/ulm_{k}_leftImg8bit.png", np.zeros((3, 4, 3), np.uint8))
            save(tmp_path / f"gtFine/{split}/ulm/ulm_{k}_gtFine_labelIds.png", ids)
            save(tmp_path / f"gtFine/{split}/ulm/ulm_{k}_gtFine_color.png", np.zeros((3, 4, 3), np.uint8))
    data = CityscapesDataModule(str(tmp_path), val_fraction=0.0)
    assert (data.num_classes, data.class_names[13], data.class_names[18]) == (19, "car", "bicycle")
    assert (data.crop_size, data.train_size, data.test_size) == ((512, 1024), 2, 2)
    target = batches(data, "test")[0].target
    assert target[0].tolist() == [[0, 1, 18, -1], [16, 18, -1, -1], [13, 2, 3, -1]]
    save(tmp_path / "gtFine/val/ulm/ulm_0_gtFine_labelIds.png", np.full((3, 4), 34, np.uint8))
    with pytest.raises(ValueError, match="holds the value 34"):
        batches(CityscapesDataModule(str(tmp_path), val_fraction=0.0), "test")


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("masks/y.png", np.zeros((12, 15), np.uint8), r"is 12 x 16 and its mask .*y\.png' 12 x 15 pixels"),
        ("masks/y.png", np.full((12, 16), 3, np.uint8), r"y\.png' holds the value 3, which is none of the 3 classes"),
        ("masks/y.png", np.zeros((12, 16, 3), np.uint8), r"y\.png' is in colours .RGB.*give a table of colours"),
        ("masks/y.png", None, r"y\.png"),
        ("images/y.png", None, r"y\.png"),
    ],
)
def test_invalid_masks_and_damaged_files_raise(tmp_path, name, array, message, resident):
    folder(tmp_path)
    if array is None:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    else:
        save(tmp_path / name, array)
    data = SegmentationFolderDataModule(str(tmp_path), class_names=3, val_fraction=0.0, resident=resident)
    with pytest.raises(ValueError, match=message):
        fitted(data, max_epochs=1)


def test_missing_mask_or_folder_raises(tmp_path):
    folder(tmp_path)
    (tmp_path / "masks/a/x.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"images/a/x\.png' has no mask .*masks/a/x\.png: add it, or remove"):
        SegmentationFolderDataModule(str(tmp_path), class_names=3).setup()
    with pytest.raises(FileNotFoundError, match=r"root must hold images and masks, but 'none/images' is no folder"):
        SegmentationFolderDataModule("none", class_names=3)


@pytest.mark.parametrize(
    ("make", "folders"),
    [
        (CamVidDataModule, ("train", "trainannot")),
        (CityscapesDataModule, ("leftImg8bit/train", "gtFine/train")),
        (lambda root: SegmentationFolderDataModule(root, class_names=3), ("images", "masks")),
    ],
)
def test_empty_folder_raises(tmp_path, make, folders):
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{folders[0]}' holds no image: give a folder that does"):
        make(str(tmp_path))


def test_masks_of_0_and_255_give_a_note_and_are_read_by_colours(tmp_path, capsys):
    """Without colours 255 is ignored, although it usually marks the object: a constant prediction would be perfect."""
    for name in "abcd":
        save(tmp_path / "images" / f"{name}.png", np.zeros((12, 16, 3), np.uint8))
        save(tmp_path / "masks" / f"{name}.png", 255 * mask_of(0, classes=2))
    options = {"val_fraction": 0.0, "crop_size": (8, 8), "eval_batch_size": 1}
    for resident in (True, False):
        data = SegmentationFolderDataModule(str(tmp_path), class_names=["no", "yes"], resident=resident, **options)
        fitted(data, max_epochs=1)
        said = capsys.readouterr().err
        assert "all labelled pixels of 3 training masks are of class 'no': a network has nothing to learn" in said
        assert "255 is ignored: if it is a class, give colours, as {no: [0, 0, 0], yes: [255, 255, 255]}" in said
    data = SegmentationFolderDataModule(str(tmp_path), colours={"no": [0] * 3, "yes": [255] * 3}, **options)
    fitted(data, max_epochs=1)
    assert "nothing to learn" not in capsys.readouterr().err
    assert torch.equal(batches(data, "test")[0].target[0], torch.from_numpy(mask_of(0, classes=2)).long())


def test_masks_without_an_image_are_left_out_with_a_note(tmp_path, capsys):
    folder(tmp_path)
    save(tmp_path / "masks/more.png", mask_of(0))
    SegmentationFolderDataModule(str(tmp_path), class_names=3, val_fraction=0.0).setup()
    assert "1 of 6 masks have no image and are left out" in capsys.readouterr().err


def test_images_of_two_sizes_need_eval_batch_size_1(tmp_path):
    tree(tmp_path, ["a", "b", "c", "d"])
    tree(tmp_path, ["e", "f", "g", "h"], size=(10, 10))
    data = SegmentationFolderDataModule(str(tmp_path), class_names=3, val_fraction=0.0, test_fraction=0.5)
    data.setup()
    assert isinstance(data.train_image, list)
    task, _ = fitted(data)  # crops are of one size
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"^eval_batch_size=8 cannot hold images of .* in split 'test': give eval_bat"):
        trainer.test(task, data)
    data = SegmentationFolderDataModule(
        str(tmp_path), class_names=3, test_fraction=0.5, val_fraction=0.0, eval_batch_size=1
    )
    trainer.test(task, data, verbose=False)
    with pytest.raises(ValueError, match=r"^resident needs images of one size, got \(10, 10\)"):
        SegmentationFolderDataModule(str(tmp_path), class_names=3, resident=True, val_fraction=0.0).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": None}, "class_names must say which classes the masks have, got None"),
        ({"class_names": 1}, "class_names must be at least 2, got 1"),
        ({"ignore": 2}, "ignore=2 is the id of one of the 3 classes"),
        ({"ignore": [0, 0, 0]}, "ignore must be an id where masks hold ids"),
        ({"ignore": -1}, "ignore must be at least 0 and at most 65535, got -1"),
        ({"crop_size": (8, 0)}, "crop_size must be at least 1, got 0"),
        ({"crop_size": (8,)}, "crop_size must be height and width"),
        ({"crop_size": 8}, "crop_size must be height and width, got 8: give two whole numbers"),
        ({"image_size": 8}, "image_size must be height and width, got 8: give two whole numbers"),
        ({"scale": (2.0, 0.5)}, "scale must be two numbers, the smaller one first"),
        ({"scale": (0.0, 0.5)}, "scale must be above 0, got 0.0"),
        ({"colour": 1.0}, "colour must be at least 0 and below 1, got 1.0"),
        ({"colours": {"a": [0, 0, 0], "b": [0, 0, 0]}, "class_names": None}, "colours must all differ"),
        ({"colours": {"a": [0, 0, 256], "b": [0, 0, 0]}, "class_names": None}, "colours must be .* got 256"),
        ({"colours": {"a": [0, 0, 2], "b": [0, 0, 0]}, "class_names": ["a", "c"]}, "class_names has 'c', which has no"),
    ],
)
def test_invalid_arguments_raise(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        folder(tmp_path, **options) if "class_names" not in options else SegmentationFolderDataModule(
            tree(tmp_path), **options
        )


def _batches_of_a_rank(root):
    data = SegmentationFolderDataModule(root, class_names=3, batch_size=1, val_fraction=0.0, **PLAIN)
    seen = []

    class BatchRecorder(L.Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            seen.append((batch.index.tolist(), float(batch.image.sum()), int(batch.target.sum())))

    fitted(data, devices=2, strategy="ddp", callbacks=[BatchRecorder()], max_epochs=1, limit_val_batches=0)
    return seen


def test_two_processes_share_the_batches_of_one(tmp_path):
    root = tree(tmp_path)
    ranks = on_two_ranks(_batches_of_a_rank, root)
    L.seed_everything(0, verbose=False)
    data = folder(tmp_path)
    together = [([*a[0], *b[0]], a[1] + b[1], a[2] + b[2]) for a, b in zip(*ranks, strict=True)]
    expected = [
        (batch.index.tolist(), float(batch.image.double().sum()), int(batch.target.sum()))
        for batch in batches(data, shuffle=True, augment=True)
    ]
    assert [one[0] for one in together] == [one[0] for one in expected]
    assert [one[2] for one in together] == [one[2] for one in expected]
    assert [one[1] for one in together] == pytest.approx([one[1] for one in expected])
