"""``lightning-kd export``: write the network of a trained run as one file for other programs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

COUNT = 32


def main(args: Sequence[str]) -> None:
    """Run the command with ``args``; an error is a ``ValueError``, ``OSError`` or ``ImportError`` with one message."""
    parser = argparse.ArgumentParser(
        prog="lightning-kd export",
        description="Write the network of a run as one file, with the normalisation inside: from images, float32 "
        "[B, C, H, W] of 0 to 1 in the size that was trained on, to probabilities. The file is read again and its "
        "outputs are compared with those of the run.",
    )
    parser.add_argument("run", help="a run folder (best.ckpt, else last.ckpt), or a checkpoint in one")
    parser.add_argument(
        "--format",
        choices=("onnx", "torchscript", "state_dict"),
        default="onnx",
        help="onnx (needs pip install 'lightning_kd[onnx]'), torchscript, or state_dict: the weights of the plain "
        "network alone, without the normalisation; default: onnx",
    )
    parser.add_argument("--output", help="the file; default: exported.onnx, .torchscript or .pt in the run folder")
    parser.add_argument(
        "--images",
        help="images to compare outputs on: a folder, an image, a list, or a .npy or .npz; default: the run's test set",
    )
    given = parser.parse_args(args)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that users' own classes can be imported
    from lightning_kd.core.notes import note
    from lightning_kd.deploy.exported_network import FORMATS, export
    from lightning_kd.deploy.predictor import load

    predictor = load(given.run, device="cpu")
    folder = predictor.checkpoint.absolute().parent.parent
    path = Path(given.output) if given.output else Path(os.path.relpath(folder / FORMATS[given.format]))
    if path.is_dir():
        raise IsADirectoryError(
            f"--output {str(path)!r} is a folder: name a file in it, such as {FORMATS[given.format]}"
        )
    images, source = predictor.images_to_compare(given.images, COUNT)
    if source is None:
        source = "random noise"
        note("the data of the run were not found: the file is compared on random noise; give images with --images")
    largest = export(predictor, given.format, path, images)
    print(f"{path}: {given.format} of {predictor.checkpoint}")
    pixels = len(predictor.input_shape) == 3
    kind = "images" if pixels else "features"
    of = f"logits of normalised {kind}" if given.format == "state_dict" else "probabilities"
    print(f"{of} differ by {largest:.2g} at most, on {len(images)} samples of {source}")
    if given.format == "state_dict":
        unit = " (of values from 0 to 1)" * pixels
        print(f"normalise its {kind} by mean {predictor.mean} and std {predictor.std}{unit}")
    else:
        print(
            f"input: float32 [B, {', '.join(map(str, predictor.input_shape))}]{' of 0 to 1' * pixels}, not normalised"
        )
