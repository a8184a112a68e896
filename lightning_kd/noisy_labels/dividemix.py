"""DivideMix: two networks divide the training set for each other and learn the rest semi-supervised.

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
    """DivideMix (Li et al., ICLR 2020, arXiv 2002.07394), algorithm 1: a split by loss, and MixMatch on its two parts.

    At the end of every epoch both networks score all labels (eval mode, no augmentation) by their loss, two Gaussians
    are fitted to the scaled scores, and a label counts as clean where the posterior of the better one is above
    ``threshold``. In the next epoch each network trains on the split made by the other: labels of the clean part are
    refined by its own predictions, those of the rest guessed by both networks, and everything is mixed.

    A split with fewer than 2 clean or 2 other samples falls back to a warm-up epoch for that network; a clean part
    smaller than a batch is one batch. Both are said in one line.

    Predictions: sum of logits; probabilities: mean of the two softmaxes. Several processes: the pass over the training
    set is shared and its result gathered by index, so that all have the same split; mixing weights and partners are
    drawn for each process.

    Args:
        network: see ``TwoNetworkTask``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        warmup_epochs: epochs of plain training at the start, at least 1; batches are twice ``data.batch_size``.
        lambda_u: weight of the unsupervised loss after its ramp.
        ramp_epochs: length of that ramp after the warm-up. It rises with each step, by the share of the epoch's true
            number of steps that is done; the official code divides by ``floor(n / B) + 1`` for ``n`` clean samples,
            one step more where the batch size ``B`` divides ``n``.
        temperature: of the sharpening.
        threshold: labels with a larger clean probability are kept.
        mixup_alpha: both parameters of the Beta distribution of the mixing weight.
        labelled_anchors: mix only the labelled images with others, so that a step is half as large; where ``lambda_u``
            is 0 (WebVision).
        confidence_penalty: add the negative entropy of the predictions in the warm-up; for asymmetric and human noise.
        loss_history: epochs over which the scaled scores are averaged before the split, beginning with those that the
            first split is made of; 5 at 90 % symmetric noise.
        clip: share of the scores cut off at either end before scaling, against outliers.
        kwargs: ``gradient_clip_val`` of ``TwoNetworkTask``; ``optimizer``, ``lr_scheduler``, ``lr_interval``,
            ``channels_last``, ``compile`` of ``Task``.
    """

    #: leave out the last batch of either stream where it is smaller than the others
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
        self.clean = self.add_sample_memory("clean_probability", (2,), fill=1.0)  # as each network sees it
        if loss_history > 1:
            self.add_sample_memory("scores", (2, loss_history), fill=-1.0)  # scaled, latest first; -1: none yet
        self._verdicts: list[LabelScores] = []
        self._history = torch.empty(0)

    # -- what a method on the same machinery changes -----------------------------------------------------------------

    def warmup_terms(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The loss of a warm-up step on ``[B, C]`` logits and given labels."""
        terms = {"warmup": F.cross_entropy(logits, target)}
        if self.confidence_penalty:
            terms["confidence"] = (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        return terms

    def sample_scores(self, logits: Tensor, target: Tensor) -> Tensor:
        """What the labels are judged by, ``[B]``, larger for cleaner."""
        return -F.cross_entropy(logits, target, reduction="none")

    def split(self, scores: Tensor) -> tuple[Tensor, Mixture | None]:
        """Clean probabilities ``[N]`` from scaled scores ``[N]``, and the mixture behind them."""
        return split_scaled(scores)

    def mixed_logits(self, k: int, image: Tensor, second: bool) -> tuple[Tensor, Tensor]:
        """Logits of network ``k`` for the supervised and (needed only if ``second``) for the unsupervised loss."""
        logits = self.logits_of(k, image)
        return logits, logits

    def supervised_terms(self, logits: Tensor, target: Tensor, partner: Tensor, weight: float) -> dict[str, Tensor]:
        """The loss on mixed labelled images: ``weight`` of ``target`` and the rest of ``partner``, both ``[n, C]``."""
        mixed = weight * target + (1 - weight) * partner
        return {"x": -(mixed * logits.log_softmax(1)).sum(1).mean()}

    def consistency_terms(
        self, k: int, logits: Tensor, images: Sequence[Tensor], partner: Tensor, share: float
    ) -> dict[str, Tensor]:
        """Further loss terms on the other views of all samples, to be mixed as the first ones; here none."""
        return {}

    # -- streams -----------------------------------------------------------------------------------------------------

    def phases(self, data: Any) -> list[Phase]:
        return [self._phase(data, k) for k in range(2)]

    def _phase(self, data: Any, k: int) -> Phase:
        stream = f"network_{k}"
        if self.current_epoch >= self.warmup_epochs:
            clean = self.clean.rows[:, 1 - k].cpu().numpy()[data.train_indices] > self.threshold
            labelled, unlabelled = data.train_indices[clean], data.train_indices[~clean]
            # batch normalisation needs two samples on each process
            if min(len(labelled), len(unlabelled)) >= 2 * self.trainer.world_size:
                if not 0.01 <= len(labelled) / len(data.train_indices) <= 0.99:
                    note(
                        f"network {k + 1}: {len(labelled)} of {len(data.train_indices)} labels taken for clean, an "
                        "extreme split: look at the margins (LabelPictures), or set clip"
                    )
                elif len(labelled) < data.batch_size * self.trainer.world_size:
                    note(f"network {k + 1}: only {len(labelled)} clean samples, taken as one batch")
                shared: dict[str, Any] = {"shuffle": True, "batch_size": data.batch_size, "views": self.views}
                shared["drop_last"] = self.drop_last
                return Phase(
                    k,
                    data.loader("train", labelled, stream=stream, **shared),
                    data.loader("train", unlabelled, stream=f"{stream}_unlabelled", **shared),
                )
            note(
                f"network {k + 1}: {len(labelled)} samples taken for clean, {len(unlabelled)} not: an epoch of warm-up"
            )
        return Phase(k, data.loader("train", shuffle=True, augment=True, batch_size=2 * data.batch_size, stream=stream))

    def steps_of_epoch(self) -> None:
        """Not known in advance: the split decides."""

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
        """Guess, refine, mix and score; ``epoch`` may be fractional."""
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
        """Sharpened mean prediction of both networks over the views, ``[B, C]``; network ``k`` is in train mode."""
        own = sum(self.probabilities(self.logits_of(k, view)) for view in views)
        other = self.probabilities(self.partner_logits(k, torch.cat(list(views)))).unflatten(0, (len(views), -1))
        return sharpen((own + other.sum(0)) / (2 * len(views)), self.temperature)

    def partner_logits(self, k: int, image: Tensor) -> Tensor:
        """Logits ``[B, C]`` of the network that guesses along with network ``k``, as it is now."""
        return self.logits_of(1 - k, image)

    def refine(self, k: int, views: Sequence[Tensor], labelled: Batch) -> Tensor:
        """The given labels, weighted by their clean probability, mixed with the network's own prediction, sharpened."""
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
        self.log_scores(*self._verdicts)
        device = self.clean.rows.device
        index = self._verdicts[0].index.to(device)
        self.clean.write(index, torch.stack([v.clean_probability for v in self._verdicts], 1).to(device))
        if self._keeps_history:
            self.memories["scores"].write(index, self._history.to(device))

    @property
    def _keeps_history(self) -> bool:
        """Whether the scores now are averaged over epochs: the official code begins with those of the first split."""
        return self.loss_history > 1 and self.current_epoch + 1 >= self.warmup_epochs

    def score_training_set(self) -> LabelScores:
        """The verdict of both networks: mean margin and score, and the clean probability by these.

        Leaves that of each network, which the next epoch's split is made of, in ``self._verdicts``.
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

        def verdict(predicted: Tensor, margin: Tensor, unit: Tensor) -> LabelScores:
            probability, mixture = self.trainer.strategy.broadcast(self.split(unit))
            return LabelScores(index, given, predicted, margin, unit, probability, mixture, known, self.threshold)

        self._verdicts = [verdict(predicted[:, k], margin[:, k], unit) for k, unit in enumerate(units)]
        return verdict(predicted[:, 2], margin.mean(1), unit_scores(units[0] + units[1]))

    def _averaged(self, index: Tensor, units: list[Tensor]) -> list[Tensor]:
        """Each network's scaled scores, averaged with those of the epochs before."""
        memory = self.memories["scores"]
        latest = torch.stack(units, 1)[:, :, None].float()
        earlier = memory.rows[index.to(memory.rows.device)].cpu()[:, :, :-1]
        self._history = torch.cat([latest, earlier], 2)
        filled = self._history >= 0
        return list(((self._history.double() * filled).sum(2) / filled.sum(2)).unbind(1))
