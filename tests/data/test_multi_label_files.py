"""Images with several labels from files: a table, the layouts of COCO, VOC and NUS-WIDE, and errors in the files."""

import json

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_kd.core import MultiLabel, MultiLabelClassification
from lightning_kd.data import (
    CandidateLabels,
    COCODataModule,
    MultiLabelFolderDataModule,
    NUSWIDEDataModule,
    VOCDataModule,
)
from lightning_kd.data.described_samples import DescribedSamples
from lightning_kd.data.label_tables import split_names
from lightning_kd.data.preparation import Preparation
from lightning_kd.data.voc import VOC_CLASSES


def picture(path, k=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(k).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def labels_by_file(data, split="train"):
    """The label names of each image by its file name; ``?`` marks an unknown label."""
    data.setup()
    found = {}
    paths, target = getattr(data, f"{split}_image"), getattr(data, f"{split}_target")
    for path, row in zip(paths, target, strict=True):
        some = [("?" if v < 0 else "") + name for name, v in zip(data.class_names, row.tolist(), strict=True) if v]
        found[path.rpartition("/")[2].partition(".")[0]] = " ".join(some)
    return found


# -- a table -------------------------------------------------------------------------------------------------------


def write_table(tmp_path, text, files=("a/x.png", "b/y.png", "z.png")):
    for k, file in enumerate(files):
        picture(tmp_path / file, k)
    (tmp_path / "labels.csv").write_text(text)
    return str(tmp_path)


OPTIONS = {"image_size": 8, "test_fraction": 0.34, "val_fraction": 0}


def labels_of_all_files(data):
    return labels_by_file(data) | labels_by_file(data, "test")


def test_table_with_a_column_per_class_is_read(tmp_path):
    root = write_table(tmp_path, "file,sky,old house\na/x.png,1,0\ny.png,,1\nz.png,0,0\n")
    data = MultiLabelFolderDataModule(root, **OPTIONS)
    assert data.class_names == ["sky", "old house"]
    assert isinstance(data.problem, MultiLabel)
    assert labels_of_all_files(data) == {"x": "sky", "y": "?sky old house", "z": ""}
    turned = MultiLabelFolderDataModule(root, class_names=["old house", "sky"], **OPTIONS)
    assert labels_of_all_files(turned)["x"] == "sky"


def test_table_with_label_names_in_one_column_is_read(tmp_path):
    root = write_table(tmp_path, "path;labels\na\\x.png;sky|sea\nb/y.png;\nz.png;house | sea\n")
    data = MultiLabelFolderDataModule(root, **OPTIONS)
    assert data.class_names == ["house", "sea", "sky"]
    assert labels_of_all_files(data) == {"x": "sea sky", "y": "", "z": "house sea"}
    assert split_names(r"a\|b|c;d\\") == ["a|b", "c", "d\\"]


@pytest.mark.filterwarnings("error")  # the table itself gives no warning
def test_table_splits_are_used_and_images_without_a_line_left_out(tmp_path, capsys):
    text = "image,split,tags\nx.png,train,a;b\ny.png,test,b\nz.png,val,a\n"
    data = MultiLabelFolderDataModule(write_table(tmp_path, text, ("x.png", "y.png", "z.png", "w.png")), image_size=8)
    assert (labels_by_file(data), labels_by_file(data, "test")) == ({"x": "a b"}, {"y": "b"})
    assert (data.train_size, data.val_size, data.test_size) == (1, 1, 1)
    assert "no line for 1 of 4 images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,sky\na/x.png,2\n", r"labels\.csv', line 2: 'sky' must be 0, 1 or empty .* got '2'"),
        ("file,sky\na/x.png,1\n\nno.png,1\n", r"labels\.csv', line 4: 'no.png' is no image below"),
        ("file,sky\na/x.png,1\nb/y.png,0,1\n", r"labels\.csv', line 3: 3 cells, the header has 2"),
        ("name,sky\na/x.png,1\n", r"labels\.csv', line 1, must have a column file, path"),
        ("file,sky\nx.png,1\na/x.png,0\n", r"lines 2 and 3, are for one image, .* and differ"),
        ("file,sky,sky\nx.png,1,1\n", r"line 1, names the column 'sky' twice"),
        ("file\nx.png\n", r"line 1, has no column of labels"),
        ("file,labels\nx.png,\n", "holds no label"),
        ("file,labels,split\nx.png,a,tran\n", r"labels\.csv', line 2: split 'tran' must be one of"),
        ("file,labels,split\nx.png,a,train\n", "no line with split 'test'"),
        ("file,labels\n", "must have a header and a line for each image"),
    ],
)
def test_invalid_tables_raise(tmp_path, text, message):
    root = write_table(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        MultiLabelFolderDataModule(root, **OPTIONS).setup()


def test_ambiguous_file_name_or_unknown_label_raises(tmp_path):
    root = write_table(tmp_path, "file,labels\nx.png,a\n", ("a/x.png", "b/x.png"))
    with pytest.raises(ValueError, match=r"line 2: 'x.png' is the name of 2 images below"):
        MultiLabelFolderDataModule(root, **OPTIONS).setup()
    with pytest.raises(ValueError, match=r"line 2: 'a' is not in class_names"):
        MultiLabelFolderDataModule(root, class_names=["b"], **OPTIONS)


def test_fit_raises_for_damaged_files_or_skips_them(tmp_path):
    lines = [f"{k}.png,{'a' if k % 2 else 'b|a'}" for k in range(20)]
    root = write_table(tmp_path, "\n".join(["file,labels", *lines]), [f"{k}.png" for k in range(20)])
    (tmp_path / "3.png").write_bytes(b"")

    def trained(**options):
        data = MultiLabelFolderDataModule(root, image_size=8, batch_size=4, **options)
        task = MultiLabelClassification("cnn_tiny", 2, input_shape=(3, 8, 8))
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(task, data)
        trainer.test(task, data, verbose=False)
        return data

    with pytest.raises(ValueError, match=r"1 of \d+ images cannot be read: .*3\.png"):
        trained()
    with pytest.warns(UserWarning, match=r"left out, as 1 of"):
        data = trained(on_error="skip", labelled_fraction=0.5, candidates=CandidateLabels(0.2))
    assert len(data.train_indices) + len(data.unlabelled_indices) + data.val_size + data.test_size == 19


# -- views ---------------------------------------------------------------------------------------------------------


def test_plain_weak_and_strong_views_of_files(tmp_path):
    root = write_table(tmp_path, "file,labels\nx.png,a\ny.png,b\nz.png,a\n")
    data = MultiLabelFolderDataModule(root, normalize=False, batch_size=2, **OPTIONS)
    loader = data.loader("train", views=("plain", "weak", "strong"))
    plain, weak, strong = next(iter(loader)).image
    expected = np.asarray(Image.open(data.train_image[0]).resize((8, 8), Image.Resampling.BILINEAR)) / 255
    assert np.abs(plain[0].permute(1, 2, 0).numpy() - expected).max() < 1e-6  # the aspect ratio is not kept
    assert all(torch.equal(w, p) or torch.equal(w.flip(-1), p) for w, p in zip(weak, plain, strict=True))
    assert not torch.equal(strong, weak)
    assert 0 <= strong.min() <= strong.max() <= 1


# -- COCO ----------------------------------------------------------------------------------------------------------


def coco(tmp_path, change=lambda content: None, **options):
    content = {
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 44, "name": "bottle"}],
        "images": [{"id": k, "file_name": f"{k:03d}.png"} for k in (9, 10, 2, 3)],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 1, "iscrowd": 1, "area": 1023},
            {"id": 2, "image_id": 9, "category_id": 90, "iscrowd": 0, "area": 1024},
            {"id": 3, "image_id": 10, "category_id": 44, "area": 9215.5},
            {"id": 4, "image_id": 2, "category_id": 44, "area": 9216},
            {"id": 5, "image_id": 2, "category_id": 44, "area": 1000000.0},
        ],
    }
    for split in ("train", "val"):
        for image in content["images"]:
            picture(tmp_path / f"{split}2017" / image["file_name"])
        part = json.loads(json.dumps(content))
        if split == "train":
            change(part)
        (tmp_path / "annotations").mkdir(exist_ok=True, parents=True)
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(part, indent=1))
    return COCODataModule(str(tmp_path), year=2017, image_size=8, val_fraction=0, **options)


def test_coco_annotations_become_labels(tmp_path, capsys):
    data = coco(tmp_path)
    assert data.class_names == ["toothbrush", "person", "bottle"]
    assert labels_by_file(data) == {"010": "bottle", "002": "bottle", "009": "toothbrush person"}
    assert [path[-7:-4] for path in data.train_image] == ["010", "002", "009"]  # sorted by the ids as text
    assert "1 of 4 images have no object" in capsys.readouterr().err
    kept = COCODataModule(str(tmp_path), year=2017, image_size=8, val_fraction=0, keep_empty=True)
    assert labels_by_file(kept)["003"] == ""
    assert next(iter(data.loader("test"))).image.shape == (3, 3, 8, 8)


def replaced(name, place, **values):
    return lambda content: content[name][place].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            replaced("annotations", 2, category_id=12),
            r"train2017\.json', annotation 3: category_id 12 is not in the file",
        ),
        (replaced("annotations", 1, image_id=77), r"train2017\.json', annotation 2: image_id 77 is not in the file"),
        (replaced("images", 1, id=9), r"train2017\.json' has image id 9 twice"),
        (lambda content: content.pop("images"), r"train2017\.json' must hold a list 'images'"),
        (lambda content: content["categories"].reverse(), r"val2017\.json' has other categories than train"),
    ],
)
def test_invalid_coco_annotations_raise(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        coco(tmp_path, change).setup()


def test_coco_areas_keep_objects_of_the_named_sizes(tmp_path):
    found = {name: coco(tmp_path / name, keep_empty=True, areas=[name]) for name in ("small", "medium", "large")}
    for data in found.values():
        data.setup()
    assert labels_by_file(found["small"]) == {"010": "", "002": "", "003": "", "009": "person"}
    assert labels_by_file(found["medium"]) == {"010": "bottle", "002": "", "003": "", "009": "toothbrush"}
    assert labels_by_file(found["large"]) == {"010": "", "002": "bottle", "003": "", "009": ""}
    with pytest.raises(ValueError, match=r"^areas must be a list of 'small', 'medium', 'large', got 'small'"):
        coco(tmp_path / "no", areas="small")
    data = coco(tmp_path / "none", lambda content: content["annotations"][3].pop("area"), areas=["small"])
    with pytest.raises(ValueError, match=r"train2017\.json', annotation 4, has no area: leave areas out"):
        data.setup()


def test_damaged_or_missing_coco_files_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="is root the folder of COCO"):
        COCODataModule(str(tmp_path))
    (tmp_path / "instances_train2014.json").write_text('{"images": [\n1,\n}')
    with pytest.raises(ValueError, match=r"train2014\.json' is damaged \(.*line 3"):
        COCODataModule(str(tmp_path))
    assert COCODataModule(str(tmp_path / "none"), image_size=8, fake=True).num_classes == 80


# -- VOC -----------------------------------------------------------------------------------------------------------


def voc(tmp_path, **options):
    main = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Main"
    main.mkdir(parents=True)
    there = {"a": {"cat": 1, "dog": 0}, "b": {"dog": 0}, "c": {"dog": 1}, "d": {}}
    for split in ("train", "val"):
        for name in VOC_CLASSES:
            lines = [f"{image} {labels.get(name, -1):2d}" for image, labels in there.items()]
            (main / f"{name}_{split}.txt").write_text("\n".join(lines) + "\n")
    for image in there:
        picture(main.parents[1] / "JPEGImages" / f"{image}.jpg")
    return main, VOCDataModule(str(tmp_path), image_size=8, val_fraction=0, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"a": "cat", "c": "dog"}),
        ({"difficult": "ignore"}, {"a": "cat ?dog", "c": "dog"}),
        ({"difficult": "ignore", "keep_empty": True}, {"a": "cat ?dog", "b": "?dog", "c": "dog", "d": ""}),
    ],
)
def test_voc_difficult_and_empty_images_follow_the_options(tmp_path, options, expected):
    _, data = voc(tmp_path, **options)
    assert labels_by_file(data) == labels_by_file(data, "test") == expected
    assert len(data.class_names) == 20
    assert next(iter(data.loader("train"))).target.shape == (len(expected), 20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 1\nb 2\n", r"cat_train\.txt', line 2: must be an image and -1, 0 or 1, got 'b 2'"),
        ("a 1\nb -1\nc -1\nd -1\na 0\n", r"cat_train\.txt', line 5: image 'a' has another label above"),
        ("a 1\nb -1\nc -1\n", r"cat_train\.txt' and the list of aeroplane have different images, 'd'"),
        ("", r"cat_train\.txt' holds no image"),
    ],
)
def test_invalid_voc_lists_raise(tmp_path, text, message):
    main, data = voc(tmp_path)
    (main / "cat_train.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        data.setup()


def test_missing_voc_lists_raise(tmp_path):
    main, data = voc(tmp_path)
    (main / "sheep_val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"sheep_val\.txt' does not exist"):
        data.setup()
    with pytest.raises(FileNotFoundError, match="holds no VOC2007/ImageSets/Main"):
        VOCDataModule(str(tmp_path), year=2007, image_size=8).setup()


# -- NUS-WIDE ------------------------------------------------------------------------------------------------------


def nus_wide(tmp_path, **options):
    labels = tmp_path / "Groundtruth" / "TrainTestLabels"
    labels.mkdir(parents=True)
    (tmp_path / "ImageList").mkdir()
    for split in ("Train", "Test"):
        (tmp_path / "ImageList" / f"{split}Imagelist.txt").write_text("sky\\a.jpg\nold town\\b.jpg\nsky\\c.jpg\n")
        (labels / f"Labels_water_{split}.txt").write_text("1\n1\n0\n")
        (labels / f"Labels_airport_{split}.txt").write_text("0 \n1 \n0 \n")
    for k, file in enumerate(("sky/a.jpg", "old town/b.jpg", "sky/c.jpg")):
        picture(tmp_path / "Flickr" / file, k)
    return NUSWIDEDataModule(str(tmp_path), image_size=8, val_fraction=0, **options)


def test_nus_wide_lists_become_labels(tmp_path):
    data = nus_wide(tmp_path)
    assert data.class_names == ["airport", "water"]
    assert labels_by_file(data) == labels_by_file(data, "test") == {"a": "water", "b": "airport water"}
    assert labels_by_file(NUSWIDEDataModule(str(tmp_path), image_size=8, val_fraction=0, keep_empty=True))["c"] == ""


def test_truncated_photographs_are_used_unless_truncated_is_false(tmp_path):
    data = nus_wide(tmp_path, on_error="skip")
    photo = tmp_path / "Flickr" / "sky" / "a.jpg"
    photo.write_bytes(photo.read_bytes()[:-40])
    data.setup()
    assert next(iter(data.loader("train"))).image.shape == (2, 3, 8, 8)
    strict = NUSWIDEDataModule(str(tmp_path), image_size=8, val_fraction=0, truncated=False, on_error="skip")
    with pytest.warns(UserWarning, match=r"left out, as 1 of 4 images cannot be read"):
        strict.setup()
    assert (strict.train_size, strict.test_size) == (1, 1)


@pytest.mark.parametrize("truncated", [True, False])
def test_prediction_reads_truncated_photographs_only_if_the_run_did(tmp_path, truncated):
    described = nus_wide(tmp_path, truncated=truncated).describe()
    photo = tmp_path / "Flickr" / "sky" / "a.jpg"
    photo.write_bytes(photo.read_bytes()[:-40])
    data = DescribedSamples(described, str(photo.parent))
    if truncated:
        (batch,) = data.loader("predict")
        assert batch.image.shape == (2, 3, 8, 8)
        assert Preparation(described, (3, 8, 8))(photo).shape == (3, 8, 8)
        return
    with pytest.raises(ValueError, match="cannot be read"):
        list(data.loader("predict"))
    with pytest.raises(ValueError, match="cannot be read"):
        Preparation(described, (3, 8, 8))(photo)


def test_missing_photographs_raise_or_are_skipped(tmp_path, capsys):
    data = nus_wide(tmp_path)
    (tmp_path / "Flickr" / "old town" / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"TrainImagelist\.txt', line 2: .*b\.jpg' does not exist \(1 of 2"):
        data.setup()
    assert labels_by_file(NUSWIDEDataModule(str(tmp_path), image_size=8, val_fraction=0, missing="skip")) == {
        "a": "water"
    }
    assert "1 of 2 images are missing" in capsys.readouterr().err


def test_invalid_nus_wide_lists_raise(tmp_path):
    data = nus_wide(tmp_path)
    path = tmp_path / "Groundtruth" / "TrainTestLabels" / "Labels_water_Test.txt"
    path.write_text("1\n3\n0\n")
    with pytest.raises(ValueError, match=r"Labels_water_Test\.txt', line 2: must be 0 or 1, got '3'"):
        data.setup()
    path.write_text("1\n0\n")
    with pytest.raises(ValueError, match=r"Labels_water_Test\.txt' has 2 labels, .* 3 images"):
        data.setup()
    with pytest.raises(FileNotFoundError, match="is root the folder of NUS-WIDE"):
        NUSWIDEDataModule(str(tmp_path / "none"))


def test_fake_images_need_no_files(tmp_path):
    for make, classes in ((VOCDataModule, 20), (NUSWIDEDataModule, 81), (MultiLabelFolderDataModule, 10)):
        data = make(str(tmp_path / "none"), image_size=8, fake=True)
        batch = next(iter(data.train_dataloader()))
        assert (data.num_classes, batch.target.shape[1]) == (classes, classes)
