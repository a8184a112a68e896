"""The base of the methods for candidate labels: remembered weights, loaders with a meta set, and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_kd.core.batch import Batch
from lightning_kd.core.inference_pass import ordered_pass
from lightning_kd.core.losses import at_least_float32
from lightning_kd.core.notes import note
from lightning_kd.core.phased_loader import Phase, PhasedLoader
from lightning_kd.core.precision import no_tf32
from lightning_kd.core.random_state import set_torch_random_state, torch_random_state
from lightning_kd.core.sample_memories import SampleMemories
from lightning_kd.core.supervised_task import SupervisedTask
from lightning_kd.core.task import Task
from lightning_kd.file_writing import write_text
from lightning_kd.spreadsheet import csv_text
from lightning_kd.weak_labels.candidate_weights import likely_weights, uniform_weights

__all__ = ["CandidateTask"]

Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]


class MetaBatch(NamedTuple):
    """A batch ``labelled`` of samples with candidates and a batch ``meta`` of samples with true labels."""

    labelled: Batch
    meta: Batch


class MetaLoader(PhasedLoader):
    """Pairs each batch of samples with candidates with a batch of the meta set, which starts over when it ends."""

    def __init__(self, loader: Any, meta: Any) -> None:
        super().__init__([Phase(0, loader, meta)])

    def __iter__(self) -> Iterator[Any]:
        for step in super().__iter__():
            assert step.unlabelled is not None
            yield MetaBatch(step.labelled, step.unlabelled)


class CandidateTask(SampleMemories, SupervisedTask):
    """Base of methods that train one network on candidate labels, each with a weight; a subclass chooses the weights.

    The data module must have ``candidates`` (see ``UniformCandidates``, ``CandidateFile``, ``PartialLabelDataModule``).
    The true labels of training samples, if known, are used only for the metrics ``train/acc`` and ``train/true_weight``
    (mean weight of the true label).

    After ``fit`` the run folder holds ``disambiguated.csv`` with one row per training sample: its candidates, the
    candidate with the largest weight and this weight, and the candidate with the largest probability and this
    probability (normalised over the candidates). Samples with the smallest weights come first.

    Args:
        network: name of a network (``lightning-kd list``) or any ``nn.Module`` that returns logits ``[B, K]``.
        num_classes: see ``Task``.
        kwargs: ``input_shape``, ``weights`` of ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: in a fit, if the data has no candidates.
    """

    loss_is_plain = False
    #: whether the weights of each sample are kept from epoch to epoch
    remembers_weights = True
    #: whether the data must have a meta set, a few samples with true labels
    needs_meta_set = False

    def __init__(self, network: str | nn.Module, num_classes: int, **kwargs: Any) -> None:
        super().__init__(network, num_classes, **kwargs)
        # a row of zeros: the sample has no weights yet
        self.stored = self.add_sample_memory("candidate_weights", (num_classes,)) if self.remembers_weights else None

    def default_optimizer(self, parameters: list[Any]) -> torch.optim.Optimizer:
        given = self.has_given_weights or self.freeze_part is not None
        return super().default_optimizer(parameters) if given else Task.default_optimizer(self, parameters)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        data = self.data
        data.setup()
        if getattr(data, "train_candidates", None) is None:
            raise ValueError(
                f"{type(self).__name__} learns from candidates, and {type(data).__name__} has none: set "
                "data.candidates, or use PartialLabelDataModule"
            )
        meta = getattr(data, "meta_indices", ())
        if self.needs_meta_set and not len(meta):
            raise ValueError(
                f"{type(self).__name__} needs a few samples with true labels, got meta_per_class=None: set "
                "data.meta_per_class, such as 10"
            )
        for name in ("train", "val"):
            others = getattr(data, f"{name}_indices", ()) if getattr(data, "_val_source", "train") == "train" else ()
            if both := {*meta} & {*others}:
                raise ValueError(
                    f"meta_indices must be disjoint from {name}_indices, got sample {min(both)} in both: remove one"
                )

    # -- loaders -----------------------------------------------------------------------------------------------------

    def meta_loader(self, data: Any, batch_size: int) -> MetaLoader:
        """The training samples, each batch paired with one of the meta set.

        Batches of the meta set all have the same size, so that averages over processes are exact.
        """
        size = min(batch_size, max(1, len(data.meta_indices) // self.trainer.world_size))
        given = {"shuffle": True, "augment": True, "batch_size": size, "stream": "meta", "drop_last": True}
        return MetaLoader(super().train_loader(data), data.loader("train", data.meta_indices, **given))

    def candidates_of(self, batch: Batch) -> Tensor:
        """The candidates ``[B, K]`` of a batch, above 0 where a class is a candidate.

        Raises:
            ValueError: if the batch has no candidates.
        """
        if "candidates" not in batch.extras:
            raise ValueError(
                f"{type(self).__name__} learns from candidates, and the batch has none: use PartialLabelDataModule"
            )
        return batch.extras["candidates"]

    # -- training ----------------------------------------------------------------------------------------------------

    def training_logits(self, image: Tensor) -> Tensor:
        """Logits ``[B, K]`` of the trained network, at least float32."""
        output = self.network(self.format_image(image))
        return at_least_float32(self.problem.logits(output, image, self.network))[0]

    @contextmanager
    def stateless_forward(self) -> Iterator[Forward]:
        """Context for forward passes that do not change the network's state.

        It yields ``forward(parameters, image)``, which returns logits ``[B, K]`` in float32 or wider. ``parameters``,
        tensors by name, replace the network's own; missing ones are taken from the network. The network keeps its mode
        (training mode within a step). Every pass uses the same random masks; running statistics and torch's random
        generators are restored afterwards. Passes run in full precision, whatever the precision of the run.
        """
        network, device = self.network, self.device
        tensors = {name: p.detach() for name, p in network.named_parameters()}
        tensors |= {name: buffer.clone() for name, buffer in network.named_buffers()}
        own = dict(zip(tensors, at_least_float32(*tensors.values()), strict=True))
        state = torch_random_state(device)

        def forward(parameters: Mapping[str, Tensor], image: Tensor) -> Tensor:
            set_torch_random_state(state, device)
            (image,) = at_least_float32(self.format_image(image))
            output = functional_call(network, {**own, **parameters}, (image,))
            return at_least_float32(self.problem.logits(output, image, network))[0]

        stance = torch.compiler.set_stance("force_eager") if self.compile_networks else nullcontext()
        try:
            with stance, no_tf32(), torch.autocast(device.type, enabled=False):
                yield forward
        finally:
            set_torch_random_state(state, device)

    def stored_weights(self, batch: Batch) -> Tensor:
        """The remembered weights ``[B, K]`` of a batch; equal weights for samples that have none yet."""
        assert self.stored is not None
        start = uniform_weights(self.candidates_of(batch))
        rows = self.stored.rows[self.index_of(batch)]
        return torch.where(rows.sum(1, keepdim=True) > 0, rows, start)

    def log_true_weight(self, weights: Tensor, target: Tensor) -> None:
        """Add the weights of the true labels (``target`` ``[B]``, ``weights`` ``[B, K]``) to the epoch's metric."""
        with torch.no_grad():
            found = weights.gather(1, target[:, None].clamp(min=0)).squeeze(1)
            known = (target >= 0).to(found.dtype)
            count = known.sum()
            self.accumulate(("true_weight",), ((found * known).sum() / count.clamp(min=1))[None], count)

    # -- results -----------------------------------------------------------------------------------------------------

    def write_results(self, folder: Path) -> None:
        def measure(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            candidates = self.candidates_of(batch)
            likely = likely_weights(self(batch.image), candidates)
            return candidates, likely if self.stored is None else self.stored_weights(batch), likely

        index, candidates, weights, likely = ordered_pass(self, self.data.loader("train"), measure)
        if not self.trainer.is_global_zero:
            return
        (weight, label), (probability, predicted) = weights.max(1), likely.max(1)
        names, files = self.data.class_names, self.data.train_image
        paths = files if isinstance(files, list) else None
        head = ["index", *(["path"] if paths else []), "candidates", "class_name", "weight", "predicted", "probability"]
        rows: list[list[Any]] = [head]
        for i in weight.argsort(stable=True).tolist():
            where = [str(paths[int(index[i])])] if paths else []
            there = "|".join(names[c].replace("|", "\\|") for c in candidates[i].nonzero().squeeze(1).tolist())
            found = [names[int(label[i])], f"{float(weight[i]):.6g}"]
            rows.append(
                [int(index[i]), *where, there, *found, names[int(predicted[i])], f"{float(probability[i]):.6g}"]
            )
        write_text(folder / "disambiguated.csv", csv_text(rows))
        doubtful = int((weight < 0.5).sum())
        note(
            f"{doubtful} of {len(rows) - 1} samples have no candidate with weight 0.5: see the top of disambiguated.csv"
        )
