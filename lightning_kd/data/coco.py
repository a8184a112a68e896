"""COCO as a multi-label data set: the labels of an image are the classes of its objects."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_kd.core.notes import note
from lightning_kd.data.array_files import Arrays
from lightning_kd.data.multi_label_files import MultiLabelFilesDataModule

__all__ = ["COCODataModule"]

# upper limit of the area in pixels
AREAS = {"small": 32**2, "medium": 96**2, "large": math.inf}


class COCODataModule(MultiLabelFilesDataModule):
    """COCO 2014 or 2017 with 80 classes, those of the objects in an image; trained on ``train``, tested on ``val``.

    Reads ``ROOT/trainYEAR``, ``ROOT/valYEAR`` and ``instances_trainYEAR.json``, ``instances_valYEAR.json`` in
    ``ROOT/annotations`` or ``ROOT``. Class indices follow the order of the list ``categories``, not the category ids.
    Crowd annotations (``iscrowd``) count as objects. Images are sorted by their ids as strings, as in the papers'
    scripts, so that ``labelled_fraction`` gives the same splits. COCO 2014 has 82,081 training and 40,137 test images,
    or 82,783 and 40,504 with those without objects. See ``MultiLabelFilesDataModule`` for how images are read and for
    further arguments.

    Args:
        root: the folder of the data set.
        year: 2014 or 2017.
        keep_empty: keep images without any object, with no positive label. Default: leave them out of both splits.
        areas: count only objects of these sizes: ``"small"``, below 32 x 32 pixels; ``"medium"``, below 96 x 96;
            ``"large"``, the others. Default: all.
        kwargs: see ``MultiLabelFilesDataModule``. The published protocols have no validation set: ``val_fraction=0``.

    Raises:
        ValueError: naming the file, where it is damaged or inconsistent.
        FileNotFoundError, PermissionError: where a file does not exist or may not be read.
    """

    def __init__(
        self,
        root: str = "data/coco",
        year: Literal[2014, 2017] = 2014,
        keep_empty: bool = False,
        areas: Sequence[Literal["small", "medium", "large"]] | None = None,
        **kwargs: Any,
    ) -> None:
        if year not in (2014, 2017):
            raise ValueError(f"year must be 2014 or 2017, got {year!r}: choose one")
        if areas is not None and (isinstance(areas, str) or not areas or not {*areas} <= {*AREAS}):
            raise ValueError(f"areas must be a list of {', '.join(map(repr, AREAS))}, got {areas!r}: correct it")
        self.areas = None if areas is None else tuple(areas)
        self.year = year
        self.keep_empty = keep_empty
        self._read: dict[str, dict[str, Any]] = {}
        if kwargs.get("fake") and not _json_path(root, "train", year).is_file():
            names = [f"class_{c}" for c in range(80)]
        else:
            self._read["train"] = _read_instances(_json_path(root, "train", year))
            names = [category["name"] for category in self._read["train"]["categories"]]
        super().__init__(class_names=names, root=root, **kwargs)

    def load_arrays(self) -> Arrays:
        return Arrays(*self._split("train"), *self._split("val"))

    def _split(self, split: str) -> tuple[list[str], Tensor]:
        path = _json_path(self.root, split, self.year)
        content = self._read.pop(split, None) or _read_instances(path)  # not kept: it is large
        names = [category["name"] for category in content["categories"]]
        if names != self.class_names:
            odd = sorted({*names} ^ {*self.class_names})[:5]
            raise ValueError(f"{str(path)!r} has other categories than train ({odd}, or another order): replace it")
        column = {category["id"]: c for c, category in enumerate(content["categories"])}
        images = sorted(content["images"], key=lambda image: str(image["id"]))
        row = {image["id"]: k for k, image in enumerate(images)}
        if len(row) < len(images):
            twice = next(a["id"] for a, b in pairwise(images) if a["id"] == b["id"])
            raise ValueError(f"{str(path)!r} has image id {twice} twice: replace the file")
        target = torch.zeros(len(images), len(names))
        rows, columns = [], []
        for one in content["annotations"]:
            for key, known in (("image_id", row), ("category_id", column)):
                if one[key] not in known:
                    raise ValueError(
                        f"{str(path)!r}, annotation {one.get('id')}: {key} {one[key]} is not in the file: replace it"
                    )
            if self.areas is not None and _size_of(one, path) not in self.areas:
                continue
            rows.append(row[one["image_id"]])
            columns.append(column[one["category_id"]])
        target[rows, columns] = 1.0
        folder = Path(self.root) / f"{split}{self.year}"
        files = [str(folder / image["file_name"]) for image in images]
        kept = torch.arange(len(files)) if self.keep_empty else target.any(1).nonzero()[:, 0]
        if len(kept) < len(files):
            note(f"{path.name}: {len(files) - len(kept)} of {len(files)} images have no object and are left out")
        return [files[k] for k in kept.tolist()], target[kept]


def _size_of(annotation: dict[str, Any], path: Path) -> str:
    if not isinstance(annotation.get("area"), int | float):
        raise ValueError(f"{str(path)!r}, annotation {annotation.get('id')}, has no area: leave areas out")
    return next(name for name, most in AREAS.items() if annotation["area"] < most)


def _json_path(root: str, split: str, year: int) -> Path:
    name = f"instances_{split}{year}.json"
    inside = Path(root) / "annotations" / name
    return inside if inside.is_file() or not (Path(root) / name).is_file() else Path(root) / name


def _read_instances(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{str(path)!r} does not exist: is root the folder of COCO, and year right?") from None
    except PermissionError:
        raise PermissionError(f"{str(path)!r} may not be read: check the permissions of the file") from None
    except ValueError as error:  # its message names the line
        raise ValueError(f"{str(path)!r} is damaged ({error}): replace it") from None
    wanted = {
        "images": {"id", "file_name"},
        "annotations": {"image_id", "category_id"},
        "categories": {"id", "name"},
    }
    for name, keys in wanted.items():
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) and keys <= e.keys() for e in entries):
            raise ValueError(f"{str(path)!r} must hold a list {name!r} with {sorted(keys)} in each: replace it")
        if not entries and name != "annotations":
            raise ValueError(f"{str(path)!r} holds no {name}: replace it")
    return content
