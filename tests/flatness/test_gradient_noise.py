"""Annealed gradient noise: its size, when it is added, and its random stream."""

import lightning as L
import pytest
import torch
from torch import nn

from lightning_kd.core import Classification
from lightning_kd.core.seeding import torch_generator
from lightning_kd.core.two_pass_step import second_pass
from lightning_kd.data import DigitsDataModule
from lightning_kd.flatness import SAM, GradientNoise, add_gradient_noise, noise_scale
from tests.two_processes import on_two_ranks


@pytest.mark.parametrize(
    ("step", "scale"), [(0, 0.547723), (1, 0.452665), (2, 0.404904), (10, 0.283255), (100, 0.153947), (1000, 0.081930)]
)
def test_noise_scale_has_the_values_of_the_paper(step, scale):
    assert noise_scale(step, 0.3, 0.55) == pytest.approx(scale, abs=5e-7)


def parameter(gradient):
    p = nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype))
    p.grad = gradient.clone()
    return p


def test_noise_is_added_only_to_parameters_with_a_gradient():
    g, without = torch.randn(3, 4, dtype=torch.float64), nn.Parameter(torch.zeros(2))
    p, q = parameter(g), parameter(g[0])
    add_gradient_noise([p, without, q], 3, 0.3, 0.55, torch.Generator().manual_seed(4))
    same = torch.Generator().manual_seed(4)
    z = [torch.randn(shape, generator=same, dtype=torch.float64) for shape in ((3, 4), (4,))]
    torch.testing.assert_close(p.grad, g + (0.3 / 4**0.55) ** 0.5 * z[0], rtol=0, atol=1e-15)
    torch.testing.assert_close(q.grad, g[0] + (0.3 / 4**0.55) ** 0.5 * z[1], rtol=0, atol=1e-15)
    assert without.grad is None


def test_noise_has_the_annealed_variance_and_eta_0_adds_none():
    p = parameter(torch.zeros(20000, dtype=torch.float64))
    add_gradient_noise([p], 0, 0.0, 0.55, torch.Generator())
    assert not p.grad.any()
    add_gradient_noise([p], 1, 0.3, 0.55, torch.Generator().manual_seed(0))
    variance = 0.3 / 2**0.55
    assert p.grad.var().item() == pytest.approx(variance, abs=3 * variance * (2 / 20000) ** 0.5)
    assert p.grad.mean().item() == pytest.approx(0, abs=3 * (variance / 20000) ** 0.5)


def test_wrong_eta_negative_step_and_sparse_gradient_raise():
    with pytest.raises(ValueError, match=r"eta must be at least 0, got -0\.1"):
        GradientNoise(eta=-0.1)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        noise_scale(-1)
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.zeros(2).to_sparse()
    with pytest.raises(TypeError, match="got a sparse one"):
        add_gradient_noise([p], 0, 0.3, 0.55, torch.Generator())


class Recording(Classification):
    """Records the gradients before the noise, and the noise of the last step."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.kept = getattr(self, "kept", [])
        self.kept.append([second_pass(), *(p.grad.clone() for p in self.parameters())])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.noise = [p.grad - g for p, g in zip(self.parameters(), self.kept[-1][1:], strict=True)]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def sam(parameters):
    return SAM(parameters, sgd)


def fit(callbacks, epochs=1, optimizer=sgd, task=Classification, ckpt_path=None, **settings):
    L.seed_everything(3)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        **quiet, accelerator="cpu", enable_model_summary=False, max_epochs=epochs, callbacks=callbacks, **settings
    )
    model = task(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 10, input_shape=(1, 8, 8), optimizer=optimizer)
    data = DigitsDataModule(train_per_class=10, batch_size=20)
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def weights(trainer):
    return nn.utils.parameters_to_vector(trainer.lightning_module.parameters()).detach()


@pytest.mark.parametrize("optimizer", [sgd, sam])
def test_noise_is_added_after_clipping_and_not_to_the_first_gradient_of_sam(optimizer, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.setattr(L, "seed_everything", torch.manual_seed)
    trainer = fit([GradientNoise(seed=5)], optimizer=optimizer, task=Recording, gradient_clip_val=1e-4)
    task = trainer.lightning_module
    generator = torch_generator(5, "gradient noise", 4)
    for noise, p in zip(task.noise, task.parameters(), strict=True):
        z = torch.randn(p.shape, generator=generator)
        torch.testing.assert_close(noise, noise_scale(4) * z, rtol=0, atol=1e-6)
    # the clipped gradients hold no noise, and neither do the first gradients of SAM
    norms = [torch.cat([g.flatten() for g in gradients]).norm().item() for _, *gradients in task.kept]
    assert norms == pytest.approx([1e-4] * len(norms), rel=1e-3)
    assert [second for second, *_ in task.kept] == ([False, True] * 5 if optimizer is sam else [False] * 5)
    assert "configure_gradient_clipping" not in vars(task)


def test_two_callbacks_raise():
    with pytest.raises(RuntimeError, match="several GradientNoise callbacks"):
        fit([GradientNoise(eta=0.01), GradientNoise(eta=0.01, seed=1)])


def test_only_eta_0_trains_to_the_bit_as_without_the_callback():
    assert torch.equal(weights(fit([GradientNoise(eta=0.0)])), weights(fit([])))
    assert not torch.equal(weights(fit([GradientNoise(eta=0.01)])), weights(fit([])))


def test_resumes_to_the_bit(tmp_path):
    whole = fit([GradientNoise()], 3)
    fit([GradientNoise()], 2).save_checkpoint(tmp_path / "half.ckpt")
    assert torch.equal(weights(fit([GradientNoise()], 3, ckpt_path=tmp_path / "half.ckpt")), weights(whole))


class Manual(Classification):
    """Optimizes manually."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False


def test_manual_optimization_raises():
    with pytest.raises(RuntimeError, match="got Manual with manual optimization: call add_gradient_noise"):
        fit([GradientNoise()], task=Manual)


def fit_on_a_rank():
    return weights(fit([GradientNoise()], strategy="ddp", devices=2, optimizer=sam)).tolist()


@pytest.mark.slow
def test_two_processes_draw_the_same_noise():
    first, second = on_two_ranks(fit_on_a_rank)
    assert first == second
