"""PAT as a task: how patches are cut, heads, loss terms, use on a trained network, pivot patches, resume."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lightning_kd.core import MultiLabelClassification
from lightning_kd.core.batch import Batch
from lightning_kd.core.losses import asymmetric_loss
from lightning_kd.data import DigitsDataModule, MosaicDataModule
from lightning_kd.multi_label import PAT, aggregate_patches, cut_patches
from tests.multi_label.runs import CLASSES, Labels, built, fitted, resumes_to_the_bit, trainer_of

OPTIONS = {"view": "weak", "average_decay": 0.5}


def test_patches_are_the_enlarged_quarters_of_the_image():
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat_interleave(3, 0).repeat_interleave(3, 1)
    patches = cut_patches(image.expand(2, 3, 6, 6))
    assert patches.shape == (4, 2, 3, 6, 6)
    for k in range(4):
        assert torch.equal(patches[k], torch.full((2, 3, 6, 6), k + 1.0))
    assert torch.equal(cut_patches(image[None, None], 1)[0], image[None, None])
    with pytest.raises(ValueError, match=r"^n_grid must be at most the 6 pixels of a side, got 7"):
        cut_patches(image[None, None], 7)


@pytest.mark.parametrize(("attention", "heads"), [("cross", 3), ("self", 2)])
def test_loss_terms_and_prediction_equal_a_plain_computation(attention, heads):
    task = built(PAT, attention=attention, answer_with="live", **OPTIONS).eval()
    found = {}
    task.step_loss = lambda terms, logits, target: found.update(terms) or sum(terms.values())
    image, target, *_ = Labels().load_arrays()
    image, target = image[:6].float() / 255, target[:6]
    task.training_step(Batch(image, target), 0)
    full = task.network(image)
    assert full.shape == (6, heads, CLASSES)
    patches = torch.stack([task.network(patch) for patch in cut_patches(image)])
    together = aggregate_patches(patches[:, :, 1], patches[:, :, -1])
    torch.testing.assert_close(found["full"], asymmetric_loss(full[:, 0], target))
    torch.testing.assert_close(found["patch"], asymmetric_loss(together, target))
    torch.testing.assert_close(task(image), (full[:, 0] + together) / 2)
    views = (image, *(F.hardtanh(patch) for patch in cut_patches(image)))
    torch.testing.assert_close(task(views), task(image))


def test_pat_without_attention_predicts_with_a_trained_network(tmp_path):
    tagger, trainer = fitted(MultiLabelClassification)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    weights = str(tmp_path / "one.ckpt")
    task = built(PAT, attention=None, answer_with="live", weights=weights).eval()
    image = next(iter(Labels().loader("test"))).image
    own = tagger.eval()(image)
    patches = torch.stack([tagger(patch) for patch in cut_patches(image)])
    torch.testing.assert_close(task(image), (own + aggregate_patches(patches, patches)) / 2)
    wide = built(PAT, weights=weights)
    assert torch.equal(wide.network.network.fc.weight[:CLASSES], tagger.network.fc.weight)
    assert "test/map" in trainer_of().test(task, datamodule=Labels(), verbose=False)[0]


def test_predict_gives_the_pivot_patch_of_each_predicted_label():
    task, trainer = fitted(PAT, **OPTIONS)
    (out,) = trainer.predict(task, datamodule=Labels())
    assert out["pivot_patch"].shape == (32, CLASSES)
    assert torch.equal(out["pivot_patch"] >= 0, out["prediction"])
    assert int(out["pivot_patch"].max()) <= 3
    assert set(task.problem.columns(out, ["a", "b", "c", "d"])) >= {"labels", "pivot_patch_0"}
    image = next(iter(Labels().loader("test"))).image
    _, weights = task.patch_answer(image)
    assert torch.equal(weights.argmax(0)[out["prediction"]], out["pivot_patch"][out["prediction"]])


def test_strong_patches_of_the_data_are_used_in_training_only():
    source = DigitsDataModule(fake=True, val_fraction=0.2)
    counts = {"train_mosaics": 64, "val_mosaics": 16, "test_mosaics": 16}
    data = MosaicDataModule(source, **counts, batch_size=32)
    seen = []

    class Looking(PAT):
        def views_of(self, image):
            seen.append((self.trainer.training, 1 if isinstance(image, torch.Tensor) else len(image)))
            return super().views_of(image)

    options = {**OPTIONS, "view": "strong_patches", "input_shape": data.input_shape, "channels_last": False}
    L.seed_everything(0, verbose=False)
    trainer_of(max_epochs=1).fit(Looking("cnn_tiny", data.num_classes, **options), datamodule=data)
    assert {*seen} == {(True, 5), (False, 1)}
    with pytest.raises(ValueError, match=r"^data.n_grid must be 4, as n_grid of PAT, got 2: change one"):
        trainer_of().fit(PAT("cnn_tiny", data.num_classes, n_grid=4, **options), datamodule=data)


def test_unsuitable_network_and_wrong_attention_raise():
    with pytest.raises(ValueError, match=r"^the last linear layer of MLDecoderNetwork, .* must give 4 logits, got 16"):
        built(PAT, network="cnn_tiny+ml_decoder_16")
    with pytest.raises(ValueError, match=r"^attention must be 'cross', 'self' or None, got 'both'"):
        built(PAT, attention="both")


def test_resumes_to_the_bit(tmp_path):
    assert resumes_to_the_bit(PAT, tmp_path, **OPTIONS)
