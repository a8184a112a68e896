"""Writes folders of images, damages some of the files, and trains on them."""

import lightning as L
import numpy as np
from PIL import Image

from lightning_kd.core import Classification


def write_image_folders(root, classes=("a", "b"), count=6):
    for name in classes:
        for k in range(count):
            path = root / name / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(k).integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
    return root


def damage_three_files(root):
    """Truncates one file, empties one and writes text into one; returns their paths."""
    whole = (root / "a" / "0.png").read_bytes()
    (root / "a" / "0.png").write_bytes(whole[: len(whole) // 2])
    (root / "a" / "1.png").write_bytes(b"")
    (root / "b" / "2.png").write_bytes(b"a letter")
    return {str(root / "a" / "0.png"), str(root / "a" / "1.png"), str(root / "b" / "2.png")}


def fit(data, *callbacks):
    task = Classification("cnn_tiny", data.num_classes, input_shape=(3, 8, 8))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=list(callbacks),
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, data)
    return trainer, task
