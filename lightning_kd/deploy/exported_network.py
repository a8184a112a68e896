"""Exporting the network of a trained run as one file, with the normalisation inside, and checking its outputs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.core.checkpoint_files import check_checksums
from lightning_kd.core.outputs import logits_of
from lightning_kd.core.teacher import FrozenTeacher
from lightning_kd.deploy.predictor import Predictor
from lightning_kd.file_writing import written_whole

__all__ = ["FORMATS", "Answer", "export", "formats_missing"]

#: the formats, with the name of the file that each is written to by default
FORMATS = {"onnx": "exported.onnx", "torchscript": "exported.torchscript", "state_dict": "exported.pt"}
# packages needed to write and check an ONNX file
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


class Answer(nn.Module):
    """A module from images, float32 ``[B, C, H, W]`` of 0 to 1 (or features ``[B, D]``), to probabilities.

    The output is ``[B, K]``, for segmentation ``[B, K, H, W]``; a method with several networks combines them.

    Args:
        predictor: the trained run; its task is changed to the contiguous memory format.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        task = predictor.task
        task.channels_last = False
        task.to(memory_format=torch.contiguous_format).requires_grad_(False)
        shape = (-1, *[1] * (len(predictor.input_shape) - 1))
        self.register_buffer("mean", torch.tensor(predictor.mean).view(shape))
        self.register_buffer("std", torch.tensor(predictor.std).view(shape))
        # not the task itself as a submodule, since exporters read every attribute of a module
        networks = [
            m for m in task.children() if any(True for _ in m.parameters()) and not isinstance(m, FrozenTeacher)
        ]
        self._answer: tuple[Callable[[Tensor], tuple[Tensor, Tensor]]] = (task.scores_and_probabilities,)
        task.eval()
        # only networks that are called, such as the average and not the live network
        self.networks = nn.ModuleList(self._called(networks, predictor))
        self.eval()

    @torch.no_grad()
    def _called(self, networks: list[nn.Module], predictor: Predictor) -> list[nn.Module]:
        """The networks that a forward pass calls."""
        called: set[nn.Module] = set()

        def note(module: nn.Module, *args: Any) -> None:
            called.add(module)

        hooks = [part.register_forward_pre_hook(note) for network in networks for part in network.modules()]
        self(torch.rand(2, *predictor.input_shape))
        for hook in hooks:
            hook.remove()
        return [network for network in networks if called & {*network.modules()}]

    def forward(self, image: Tensor) -> Tensor:
        return self._answer[0]((image - self.mean) / self.std)[1]


def formats_missing() -> list[str]:
    """The packages for ONNX that are missing."""
    return [name for name in ONNX_PACKAGES if find_spec(name) is None]


def export(predictor: Predictor, kind: str, path: Path, images: Tensor) -> float:
    """Write the network of a trained run to ``path``, read it again and compare its outputs with those of the run.

    - ``onnx``: input ``image``, output ``probabilities``, see ``Answer``; any batch size; the names of the classes as
      JSON in the metadata ``class_names``.
    - ``torchscript``: the same as a TorchScript module, with the names in the extra file ``class_names.json``.
    - ``state_dict``: the weights of the plain network alone, for ``torch.load``, without the normalisation.

    Args:
        predictor: the run, on the CPU.
        kind: one of ``FORMATS``.
        path: the file.
        images: float32 ``[N, C, H, W]`` of 0 to 1, not normalised, to compare outputs on; features ``[N, D]``.

    Returns:
        The largest difference of a probability (``state_dict``: of a logit) between the file and the run.

    Raises:
        ImportError: if a package for ONNX is missing.
        ValueError: for an unknown kind, and if the network cannot be exported or its outputs differ.
        OSError: if the file cannot be written.
    """
    if kind not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {kind!r}: give one of them")
    if kind == "onnx" and (missing := formats_missing()):
        raise ImportError(f"format onnx needs {', '.join(missing)}: pip install 'lightning_kd[onnx]'")
    write, read = {
        "onnx": (_write_onnx, _read_onnx),
        "torchscript": (_write_torchscript, _read_torchscript),
        "state_dict": (_write_weights, _read_weights),
    }[kind]
    whole = Answer(predictor)
    answer: nn.Module = whole
    if kind == "state_dict":
        answer, images = predictor.network, (images - whole.mean) / whole.std
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about the exporters themselves
        expected = logits_of(answer(images))
        with written_whole(path) as part:
            try:
                write(answer, images[:2].repeat(2, *[1] * (images.ndim - 1))[:2], part, predictor.class_names)
                times = 1 if len(images) > 2 else 3  # another batch size than that of the example
                found = logits_of(read(answer, part, images.repeat_interleave(times, 0)))[::times]
            except OSError:
                raise
            except Exception as error:  # exporters raise many kinds of errors
                reason = " ".join(str(error).split())[:300]
                raise ValueError(
                    f"this network cannot be exported as {kind} ({type(error).__name__}: {reason}): try another of "
                    f"{', '.join(FORMATS)}"
                ) from error
            largest = float((found - expected).abs().max())
            if not largest < 1e-3 * max(1.0, float(expected.abs().max())):
                raise ValueError(
                    f"the outputs of the exported {kind} differ by up to {largest:.3g}, so it is not kept: try another "
                    f"of {', '.join(FORMATS)}"
                )
    return largest


def _write_onnx(answer: nn.Module, example: Tensor, path: Path, names: list[str]) -> None:
    program: Any = torch.onnx.export(
        answer,
        (example,),
        input_names=["image"],
        output_names=["probabilities"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    program.model.metadata_props["class_names"] = json.dumps(names)
    program.save(str(path), external_data=False)


def _read_onnx(answer: nn.Module, path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


def _write_torchscript(answer: nn.Module, example: Tensor, path: Path, names: list[str]) -> None:
    traced: Any = torch.jit.trace(answer, example, check_trace=False)
    torch.jit.save(traced, str(path), _extra_files={"class_names.json": json.dumps(names)})


def _read_torchscript(answer: nn.Module, path: Path, images: Tensor) -> Tensor:
    found: Tensor = torch.jit.load(str(path), map_location="cpu")(images)
    return found


def _write_weights(network: nn.Module, example: Tensor, path: Path, names: list[str]) -> None:
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    with path.open("wb") as file:  # given a path, torch stores the name of the temporary file in it
        torch.save(weights, file)


def _read_weights(network: nn.Module, path: Path, images: Tensor) -> Any:
    check_checksums(path)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network(images)
