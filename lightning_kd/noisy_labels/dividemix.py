"""DivideMix: two networks split the training set for each other into clean and noisy labels.

Junnan Li, Richard Socher, Steven C. H. Hoi. DivideMix: Learning with Noisy Labels as Semi-supervised Learning. ICLR
2020, arXiv 2002.07394.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import Batch
from lightning_kd.core.mixing import draw_mix, mix
from lightning_kd.core.mixture import Mixture
from lightning_kd.core.notes import note
from lightning_kd.core.phased_loader import Phase, PhaseBatch
from lightning_kd.noisy_labels.label_scores import LabelScores, logit_margin, split_scaled, unit_scores
from lightning_kd.noisy_labels.mixmatch import linear_ramp, prior_penalty, sharpen
from lightning_kd.noisy_labels.two_networks import TwoNetworkTask

__all__ = ["DivideMix"]


class DivideMix(TwoNetworkTask):
    """DivideMix (Li et al., ICLR 2020, arXiv 2002.07394), algorithm 1: split by loss, then semi-supervised training.

    Labels with a small loss are probably right. After a warm-up, two networks repeatedly split the training set for
    each other by loss. Samples with probably clean labels are trained on as labelled; the labels of the others are
    ignored, and the samples are used as unlabelled.

    At the end of every epoch both networks compute the loss of all labels (eval mode, no augmentation). Two Gaussians
    are fitted to the losses, scaled to [0, 1] and negated; a label counts as clean if the posterior of the Gaussian
    with the smaller losses is above ``threshold``. In the next epoch each network is trained on the split by the other:
    clean labels are refined with its own predictions, the labels of the other samples are guessed by both networks, and
    all are mixed (MixMatch).

    If a split has fewer than 2 clean or 2 other samples, the network gets a warm-up epoch instead. If there are fewer
    clean samples than a batch, they form one batch. Both cases print a line.

    Predictions use the sum of both networks' logits, probabilities are the mean of their softmax outputs.

    Several processes: all compute the same split from gathered losses; mixing weights and partners are drawn per
    process.

    Args:
        network: see ``TwoNetworkTask``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        warmup_epochs: epochs of plain training at the start, at least 1; batches are twice ``data.batch_size``.
        lambda_u: weight of the unsupervised loss after its ramp.
        ramp_epochs: length of that ramp after the warm-up. It rises in each step, by the finished share of the epoch's
            steps; the official code divides by ``floor(n / B) + 1`` for ``n`` clean samples, one step too many if the
            batch size ``B`` divides ``n``.
        temperature: temperature of the sharpening.
        threshold: labels with a larger clean probability count as clean, in (0, 1).
        mixup_alpha: both parameters of the Beta distribution of the mixing weight.
        labelled_anchors: mix only the labelled images with others, so that a step is half as large; if ``lambda_u`` is
            0 (WebVision).
        confidence_penalty: add the negative entropy of the predictions in the warm-up; for asymmetric and human noise.
        loss_history: number of epochs over which the scaled scores are averaged before the split, starting with those
            for the first split; 5 at 90 % symmetric noise.
        clip: share of the scores clipped at either end before scaling, against outliers, in [0, 0.5).
        kwargs: ``gradient_clip_val`` of ``TwoNetworkTask``; ``optimizer``, ``lr_scheduler``, ``lr_interval``,
            ``channels_last``, ``compile`` of ``Task``.

    Raises:
        ValueError: if an argument is out of range, or ``labelled_anchors`` is set with ``lambda_u`` above 0.
    """

    #: drop the last batch of a stream if it is smaller than the others
    drop_last = False
    views: tuple[str, ...] = ("weak", "weak")

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        warmup_epochs: int = 10,
        lambda_u: float = 25.0,
        ramp_epochs: float = 16.0,
        temperature: float = 0.5,
        threshold: float = 0.5,
        mixup_alpha: float = 4.0,
        labelled_anchors: bool = False,
        confidence_penalty: bool = False,
        loss_history: int = 1,
        clip: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, input_shape=input_shape, **kwargs)
        check_numbers(least=1, whole=True, warmup_epochs=warmup_epochs, loss_history=loss_history)
        check_numbers(least=0, lambda_u=lambda_u, ramp_epochs=ramp_epochs)
        check_numbers(above=0, temperature=temperature, mixup_alpha=mixup_alpha)
        check_numbers(above=0, below=1, remedy="give a probability", threshold=threshold)
        check_numbers(least=0, below=0.5, remedy="give the share to cut off at either end", clip=clip)
        self.warmup_epochs = warmup_epochs
        self.lambda_u = lambda_u
        self.ramp_epochs = ramp_epochs
        self.temperature = temperature
        self.threshold = threshold
        self.mixup_alpha = mixup_alpha
        if labelled_anchors and lambda_u > 0:
            raise ValueError(f"labelled_anchors needs lambda_u=0, got {lambda_u}: the unsupervised loss has no images")
        self.labelled_anchors = labelled_anchors
        self.confidence_penalty = confidence_penalty
        self.loss_history = loss_history
        self.clip = clip
        self.clean = self.add_sample_memory("clean_probability", (2,), fill=1.0)  # one column per network
        if loss_history > 1:
            self.add_sample_memory("scores", (2, loss_history), fill=-1.0)  # scaled, latest first; -1: none yet
        self._network_scores: list[LabelScores] = []
        self._history = torch.empty(0)

    # -- methods for subclasses to override --------------------------------------------------------------------------

    def warmup_terms(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss terms of a warm-up step from logits ``[B, C]`` and given labels ``[B]``."""
        terms = {"warmup": F.cross_entropy(logits, target)}
        if self.confidence_penalty:
            terms["confidence"] = (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        return terms

    def sample_scores(self, logits: Tensor, target: Tensor) -> Tensor:
        """The scores ``[B]`` by which labels are split, larger for labels that are probably clean."""
        return -F.cross_entropy(logits, target, reduction="none")

    def split(self, scores: Tensor) -> tuple[Tensor, Mixture | None]:
        """Clean probabilities ``[N]`` from scaled scores ``[N]``, and the fitted mixture."""
        return split_scaled(scores)

    def mixed_logits(self, k: int, image: Tensor, second: bool) -> tuple[Tensor, Tensor]:
        """Logits of network ``k`` for the supervised and the unsupervised loss; ``second``: is the latter used."""
        logits = self.logits_of(k, image)
        return logits, logits

    def supervised_terms(self, logits: Tensor, target: Tensor, partner: Tensor, weight: float) -> dict[str, Tensor]:
        """Loss terms on mixed labelled images.

        Their label is ``weight * target + (1 - weight) * partner``, both ``[n, C]``.
        """
        mixed = weight * target + (1 - weight) * partner
        return {"x": -(mixed * logits.log_softmax(1)).sum(1).mean()}

    def consistency_terms(
        self, k: int, logits: Tensor, images: Sequence[Tensor], partner: Tensor, share: float
    ) -> dict[str, Tensor]:
        """Further loss terms on the other views of all samples, mixed like the first views; none here."""
        return {}

    # -- streams -----------------------------------------------------------------------------------------------------

    def phases(self, data: Any) -> list[Phase]:
        return [self._phase(data, k) for k in range(2)]

    def _phase(self, data: Any, k: int) -> Phase:
        stream = f"network_{k}"
        if self.current_epoch >= self.warmup_epochs:
            clean = self.clean.rows[:, 1 - k].cpu().numpy()[data.train_indices] > self.threshold
            labelled, unlabelled = data.train_indices[clean], data.train_indices[~clean]
            # batch normalisation needs 2 samples on each process
            if min(len(labelled), len(unlabelled)) >= 2 * self.trainer.world_size:
                if not 0.01 <= len(labelled) / len(data.train_indices) <= 0.99:
                    note(
                        f"network {k + 1}: {len(labelled)} of {len(data.train_indices)} labels count as clean, an "
                        "extreme split: look at the margins (LabelPictures), or set clip"
                    )
                elif len(labelled) < data.batch_size * self.trainer.world_size:
                    note(f"network {k + 1}: only {len(labelled)} labels count as clean, so they form one batch")
                shared: dict[str, Any] = {"shuffle": True, "batch_size": data.batch_size, "views": self.views}
                shared["drop_last"] = self.drop_last
                return Phase(
                    k,
                    data.loader("train", labelled, stream=stream, **shared),
                    data.loader("train", unlabelled, stream=f"{stream}_unlabelled", **shared),
                )
            note(f"network {k + 1}: {len(labelled)} labels count as clean, {len(unlabelled)} not: a warm-up epoch")
        return Phase(k, data.loader("train", shuffle=True, augment=True, batch_size=2 * data.batch_size, stream=stream))

    def steps_of_epoch(self) -> None:
        """Unknown in advance: it depends on the split."""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._draws = [self.generator("mix", k) for k in range(2)]

    # -- training ----------------------------------------------------------------------------------------------------

    def network_step(self, k: int, batch: PhaseBatch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        if batch.unlabelled is None:
            logits = self.logits_of(k, batch.labelled.image)
            return self.warmup_terms(logits, batch.labelled.target), logits, batch.labelled.target
        return self.semi_supervised_step(k, batch.labelled, batch.unlabelled, self.current_epoch + batch.progress)

    def semi_supervised_step(
        self, k: int, labelled: Batch, unlabelled: Batch, epoch: float
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """One step: guess labels, refine labels, mix, and compute the loss terms; ``epoch`` may be fractional."""
        x, u = labelled.image, unlabelled.image
        with torch.no_grad():
            guessed, refined = self.guess(k, u[:2]), self.refine(k, x[:2], labelled)
            target = torch.cat([refined, refined, guessed, guessed])
            share, partner = draw_mix(self._draws[k], self.mixup_alpha, len(target), target.device)
            count = 2 * len(labelled.target)
            anchors = count if self.labelled_anchors else len(target)
            partner, theirs = partner[:anchors], target[partner[:anchors]]
        weight = self.lambda_u * linear_ramp(epoch, self.warmup_epochs, self.ramp_epochs)
        logits, second = self.mixed_logits(k, mix(torch.cat([*x[:2], *u[:2]]), partner, share), weight > 0)
        terms = self.supervised_terms(logits[:count], target[:count], theirs[:count], share)
        if weight > 0:
            soft = share * target[count:] + (1 - share) * theirs[count:]
            terms["u"] = weight * (self.probabilities(second[count:]) - soft).square().mean()
        terms["prior"] = prior_penalty(self.probabilities(logits))
        terms |= self.consistency_terms(k, logits, [*x[2:], *u[2:]], partner, share)
        return terms, logits[:count], target[:count].argmax(1)

    def guess(self, k: int, views: Sequence[Tensor]) -> Tensor:
        """Guessed labels ``[B, C]``: sharpened mean prediction of both networks over the views; ``k`` in train mode."""
        own = sum(self.probabilities(self.logits_of(k, view)) for view in views)
        other = self.probabilities(self.partner_logits(k, torch.cat(list(views)))).unflatten(0, (len(views), -1))
        return sharpen((own + other.sum(0)) / (2 * len(views)), self.temperature)

    def partner_logits(self, k: int, image: Tensor) -> Tensor:
        """Logits ``[B, C]`` of the other network, which guesses labels together with network ``k``."""
        return self.logits_of(1 - k, image)

    def refine(self, k: int, views: Sequence[Tensor], labelled: Batch) -> Tensor:
        """Refined labels ``[B, C]``: clean probability times label plus the rest times own prediction, sharpened."""
        own = sum(self.probabilities(self.logits_of(k, view)) for view in views) / len(views)
        weight = self.clean.rows[labelled.index, 1 - k][:, None].to(own.dtype)  # type: ignore[union-attr]
        given = F.one_hot(labelled.target, self.num_classes).to(own.dtype)  # type: ignore[union-attr]
        return sharpen(weight * given + (1 - weight) * own, self.temperature)

    # -- the split ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        epochs = self.trainer.max_epochs
        if stage == "fit" and epochs is not None and 0 < epochs <= self.warmup_epochs:
            rank_zero_warn(
                f"all {epochs} epochs are warm-up, as warmup_epochs={self.warmup_epochs}: lower it, or raise max_epochs"
            )

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.label_scores()
        self.log_scores(*self._network_scores)
        device = self.clean.rows.device
        index = self._network_scores[0].index.to(device)
        self.clean.write(index, torch.stack([v.clean_probability for v in self._network_scores], 1).to(device))
        if self._keeps_history:
            self.memories["scores"].write(index, self._history.to(device))

    @property
    def _keeps_history(self) -> bool:
        """Whether scores are averaged over epochs by now; the official code starts with those for the first split."""
        return self.loss_history > 1 and self.current_epoch + 1 >= self.warmup_epochs

    def score_training_set(self) -> LabelScores:
        """Label scores from both networks: mean margin and mean score, and the clean probability from these.

        The scores of each network, from which the next epoch's splits are made, are stored in ``self._network_scores``.
        """

        def measure(batch: Batch) -> list[Tensor]:
            both = [self.logits_of(k, batch.image) for k in range(2)]
            columns = [torch.stack([f(z, batch.target) for z in both], 1) for f in (self.sample_scores, logit_margin)]
            return [*columns, torch.stack([z.argmax(1) for z in (*both, both[0] + both[1])], 1)]

        index, given, clean, scores, margin, predicted = self.over_training_set(measure)
        known = clean if bool((clean >= 0).all()) else None
        units = [unit_scores(scores[:, k], self.clip) for k in range(2)]
        if self._keeps_history:
            units = self._averaged(index, units)

        def label_scores(predicted: Tensor, margin: Tensor, unit: Tensor) -> LabelScores:
            probability, mixture = self.trainer.strategy.broadcast(self.split(unit))
            return LabelScores(index, given, predicted, margin, unit, probability, mixture, known, self.threshold)

        self._network_scores = [label_scores(predicted[:, k], margin[:, k], unit) for k, unit in enumerate(units)]
        return label_scores(predicted[:, 2], margin.mean(1), unit_scores(units[0] + units[1]))

    def _averaged(self, index: Tensor, units: list[Tensor]) -> list[Tensor]:
        """The scaled scores of each network, averaged with those of earlier epochs."""
        memory = self.memories["scores"]
        latest = torch.stack(units, 1)[:, :, None].float()
        earlier = memory.rows[index.to(memory.rows.device)].cpu()[:, :, :-1]
        self._history = torch.cat([latest, earlier], 2)
        filled = self._history >= 0
        return list(((self._history.double() * filled).sum(2) / filled.sum(2)).unbind(1))
