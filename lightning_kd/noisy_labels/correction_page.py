"""The page on which a person corrects the labels that are most probably wrong."""

from __future__ import annotations

from typing import Any

from lightning_kd.core.label_page import PageRow, label_page, pictures_of
from lightning_kd.noisy_labels.label_scores import LabelScores

__all__ = ["correction_page"]


def correction_page(scores: LabelScores, data: Any, count: int) -> str:
    """The text of the page; what is saved on it, ``corrections.csv``, is a file that ``LabelFile`` takes.

    ``LabelFile`` changes the data set's own labels. So the file also has the samples that have another label than that,
    as after earlier corrections; validation samples too, as they may be training samples the next time.

    Args:
        scores: of all training labels.
        data: the data module that they are of.
        count: how many to show, the most doubtful first.

    Raises:
        ValueError: where the samples are no images.
    """
    order = scores.order()[:count]
    indices = scores.index[order].tolist()
    clean = getattr(data, "train_clean", None)
    changed = {*(() if clean is None else (data.train_target != clean).nonzero().flatten().tolist())}
    files = data.train_image if isinstance(data.train_image, list) else None
    names = data.class_names
    rows = []

    def cells(index: int) -> list[Any]:
        return [index] if files is None else [index, files[index]]

    for k, index, picture in zip(order, indices, pictures_of(data, indices), strict=True):
        given, predicted = names[int(scores.given[k])], names[int(scores.predicted[k])]
        facts = [("index", str(index)), ("given", given), ("predicted", predicted)]
        facts.append(("clean probability", f"{float(scores.clean_probability[k]):.3f}"))
        if files is not None:
            facts.insert(0, ("path", files[index]))
        rows.append(PageRow(cells(index), picture, facts, predicted, given, given if index in changed else None))
    return label_page(
        "the most doubtful labels",
        rows,
        # not "label": names of classes may be whole numbers other than their own
        ["index", *([] if files is None else ["path"]), "class_name"],
        names,
        file_name="corrections.csv",
        command="lightning-kd fit --config RUN/config.yaml --run ANOTHER_FOLDER --data.noise LabelFile "
        "--data.noise.path corrections.csv",
        keep_open=False,
        more=[[*cells(index), names[int(data.train_target[index])]] for index in sorted(changed - {*indices})],
    )
