"""SAM and ASAM: the formulas on worked numbers, and what must count once although a step has two evaluations."""

import copy
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_kd.cli import main
from lightning_kd.core import Classification
from lightning_kd.core.sample_memory import SampleMemory
from lightning_kd.core.two_pass_step import FirstPass, second_pass
from lightning_kd.data import DigitsDataModule
from lightning_kd.flatness import ASAM, SAM
from tests.two_processes import on_two_ranks

SGD = partial(torch.optim.SGD, lr=0.1)
SGD_MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)


def vector(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def closure_of(optimizer, loss, seen=None):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        if seen is not None:
            parameters = [p for g in optimizer.param_groups for p in g["params"]]
            seen.append(([p.detach().clone() for p in parameters], [copy.deepcopy(p.grad) for p in parameters]))
        return value

    return closure


# -- the formulas ------------------------------------------------------------------------------------------------------


def test_sam_step_on_a_quadratic_gives_worked_numbers():
    h = torch.tensor([1.0, 10.0], dtype=torch.float64)
    w, seen = vector(1.0, 1.0), []
    optimizer = SAM([w], SGD, rho=0.1)
    loss = optimizer.step(closure_of(optimizer, lambda: 0.5 * (h * w * w).sum(), seen))
    assert loss.item() == 5.5
    (first, _), (above, g_plus) = seen
    epsilon = above[0] - first[0]
    torch.testing.assert_close(epsilon, torch.tensor([0.00995037, 0.0995037], dtype=torch.float64), atol=1e-7, rtol=0)
    assert epsilon.norm().item() == pytest.approx(0.1, abs=1e-10)
    expected = torch.tensor([1.00995037, 10.995037], dtype=torch.float64)
    torch.testing.assert_close(g_plus[0], expected, atol=1e-6, rtol=0)
    start = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(g_plus[0], h * start + 0.1 * h**2 * start / (h * start).norm(), atol=1e-12, rtol=0)
    torch.testing.assert_close(w.detach(), start - 0.1 * g_plus[0], atol=1e-15, rtol=0)


@pytest.mark.parametrize(
    ("name", "elementwise", "expected"),
    [("weight", False, 1.005), ("bias", False, 0.5), ("bias", True, 1.0), ("net.weight_g", False, 1.005)],
)
def test_asam_perturbation_of_one_weight_gives_worked_numbers(name, elementwise, expected):
    w, seen = vector(2.0), []
    optimizer = ASAM([(name, w)], SGD, rho=0.5, eta=0.01, elementwise=elementwise)
    optimizer.step(closure_of(optimizer, lambda: (3 * w).sum(), seen))
    assert (seen[1][0][0] - seen[0][0][0]).item() == pytest.approx(expected, abs=1e-12)


def relu_net(bias):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.ReLU(), nn.Linear(4, 2, bias=bias)).double()


def perturbations(network, optimizer, x):
    """How far each parameter is moved between the two evaluations."""
    seen = []
    optimizer.step(closure_of(optimizer, lambda: network(x).pow(2).sum(), seen), network)
    return [b - a for a, b in zip(seen[0][0], seen[1][0], strict=True)]


@pytest.mark.parametrize(
    ("make", "bias", "follows"),
    [
        (partial(ASAM, eta=0.0), False, True),
        (partial(SAM, rho=0.5), False, False),
        (partial(ASAM, eta=0.0), True, False),
        (partial(ASAM, elementwise=True), True, True),
    ],
)
def test_only_asam_perturbations_scale_with_the_layers(make, bias, follows):
    x = torch.randn(6, 3, dtype=torch.float64)
    plain, scaled, a = relu_net(bias), relu_net(bias), 3.0
    with torch.no_grad():
        for p in scaled[0].parameters():
            p.mul_(a)
        scaled[2].weight.div_(a)
    before, after = (perturbations(net, make(net.parameters(), SGD), x) for net in (plain, scaled))
    factors = [a, a, 1 / a, 1.0] if bias else [a, 1 / a]
    same = [torch.allclose(f * b, c, rtol=1e-9) for f, b, c in zip(factors, before, after, strict=True)]
    assert all(same) == follows


def sam_by_definition(network, batches, rho, steps):
    """SAM with SGD of rate 0.1, momentum 0.9 and weight decay 5e-4, written out."""
    velocity = None
    for x, y in batches[:steps]:
        parameters = list(network.parameters())
        g = torch.autograd.grad(F.cross_entropy(network(x), y), parameters)
        norm = torch.cat([v.flatten() for v in g]).norm()
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, v in zip(parameters, g, strict=True):
                p.add_(rho * v / (norm + 1e-12))
        up = torch.autograd.grad(F.cross_entropy(network(x), y), parameters)
        with torch.no_grad():
            for p, w in zip(parameters, before, strict=True):
                p.copy_(w)
            full = [v + 5e-4 * p for v, p in zip(up, parameters, strict=True)]
            velocity = full if velocity is None else [0.9 * o + v for o, v in zip(velocity, full, strict=True)]
            for p, v in zip(parameters, velocity, strict=True):
                p.sub_(0.1 * v)
    return network


def batches_of(count, dtype=torch.float64, width=3):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, width, generator=generator, dtype=dtype), torch.randint(0, 2, (8,), generator=generator))
        for _ in range(count)
    ]


def entropy(network, x, y):
    return lambda: F.cross_entropy(network(x), y)


def test_momentum_and_weight_decay_act_at_the_unperturbed_weights():
    network = relu_net(True)
    reference = sam_by_definition(copy.deepcopy(network), batches_of(3), 0.05, 3)
    optimizer = SAM(network.parameters(), SGD_MOMENTUM)
    for x, y in batches_of(3):
        optimizer.step(closure_of(optimizer, entropy(network, x, y)))
    for p, q in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-13, rtol=0)


@pytest.mark.parametrize("base", [SGD_MOMENTUM, partial(torch.optim.AdamW, lr=1e-2)])
@pytest.mark.parametrize("make", [SAM, partial(ASAM, elementwise=True)])
def test_rho_zero_is_the_base_optimizer_to_the_bit(make, base):
    networks = [relu_net(True).float() for _ in range(2)]
    optimizers = [make(networks[0].parameters(), base, rho=0.0), base(networks[1].parameters())]
    for x, y in batches_of(4, torch.float32):
        for network, optimizer in zip(networks, optimizers, strict=True):
            optimizer.step(closure_of(optimizer, entropy(network, x, y)))
    for p, q in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_parameter_groups_have_their_own_rho_and_a_common_gradient_norm():
    a, b, seen = vector(1.0), vector(1.0), []
    optimizer = SAM([{"params": [a], "rho": 0.0}, {"params": [b], "lr": 0.5}], SGD, rho=0.1)
    optimizer.step(closure_of(optimizer, lambda: 3 * a.sum() + 4 * b.sum(), seen))
    assert [v.item() for v in seen[1][0]] == pytest.approx([1.0, 1.08])
    assert [a.item(), b.item()] == pytest.approx([0.7, -1.0])


# -- gradients that are missing, zero, infinite or of another kind -----------------------------------------------------


def test_steps_with_frozen_unused_zero_and_second_pass_only_gradients():
    frozen, unused, zero, late = vector(1.0).requires_grad_(False), vector(1.0), vector(1.0), vector(1.0)
    optimizer = SAM([frozen, unused, zero, late], SGD)
    optimizer.step(closure_of(optimizer, lambda: (0 * zero).sum() + (late.sum() if second_pass() else 0)))
    assert [p.item() for p in (frozen, unused, zero, late)] == pytest.approx([1, 1, 1, 0.9])
    assert not second_pass()


def test_non_finite_first_gradient_raises_and_moves_nothing():
    w = vector(0.0)
    optimizer = SAM([w], SGD)
    with pytest.raises(RuntimeError, match=r"first gradient of SAM is not finite \(norm inf\): check the inputs"):
        optimizer.step(closure_of(optimizer, lambda: w.sqrt().sum()))
    assert w.item() == 0


def test_weights_are_restored_when_the_second_evaluation_raises():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = copy.deepcopy(network.state_dict())
    optimizer = SAM(network.parameters(), SGD, rho=1.0)

    def loss():
        value = network(torch.ones(4, 3) * torch.arange(4)[:, None]).pow(2).sum()
        if second_pass():
            assert not torch.equal(network[0].weight, before["0.weight"])
            raise MemoryError
        return value

    with pytest.raises(MemoryError):
        optimizer.step(closure_of(optimizer, loss), network)
    assert torch.equal(network[0].weight, before["0.weight"])
    assert network[1].num_batches_tracked == 1
    assert not second_pass()


def test_wrong_arguments_closures_and_gradient_kinds_raise():
    w = vector(1.0)
    with pytest.raises(ValueError, match="rho must be at least 0, got -1"):
        SAM([w], SGD, rho=-1)
    with pytest.raises(ValueError, match="cannot step by LBFGS"):
        SAM([w], torch.optim.LBFGS)
    with pytest.raises(ValueError, match=r"step\(\) without a closure.*bf16-mixed or 32"):
        SAM([w], SGD).step()
    optimizer = ASAM([w], SGD)
    with pytest.raises(ValueError, match=r"parameters without names: give it model\.named_parameters"):
        optimizer.step(closure_of(optimizer, lambda: w.sum()))
    table = nn.Embedding(3, 2, sparse=True)
    optimizer = SAM(table.parameters(), SGD)
    with pytest.raises(TypeError, match="got a sparse one"):
        optimizer.step(closure_of(optimizer, lambda: table(torch.tensor([1])).sum()))
    z = nn.Parameter(torch.ones(1, dtype=torch.complex64))
    optimizer = SAM([z], SGD)
    with pytest.raises(TypeError, match=r"real gradients, got torch\.complex64"):
        optimizer.step(closure_of(optimizer, lambda: z.abs().sum()))


# -- what counts once per step -----------------------------------------------------------------------------------------


class Rebinding(nn.Module):
    """Counts its calls in a buffer that it replaces."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return x


class Stateful(nn.Module):
    """Has batch norm, dropout, a counter and a metric, each of which must count a step once."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Dropout(0.5), Rebinding())
        self.metric = MeanMetric()

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_buffers_metric_and_dropout_count_once_in_a_plain_loop(momentum, compiled):
    network = Stateful(momentum)
    once = copy.deepcopy(network)
    x, outputs = torch.randn(8, 3), []
    if compiled:
        network.compile()
    optimizer = SAM(network.parameters(), SGD, rho=0.1)

    def loss():
        outputs.append(network(x))
        value = outputs[-1].pow(2).mean()
        network.metric(value.detach())
        return value

    torch.manual_seed(3)
    once(x)
    after_one = torch.get_rng_state()
    torch.manual_seed(3)
    optimizer.step(closure_of(optimizer, loss), network)
    if not compiled:  # compiled dropout may draw from another generator
        assert torch.equal(torch.get_rng_state(), after_one)
    assert torch.equal(outputs[0] == 0, outputs[1] == 0)
    assert not torch.equal(outputs[0], outputs[1])
    for name, value in once.named_buffers():
        torch.testing.assert_close(
            network.get_buffer(name), value, msg=name, rtol=1e-6 * compiled, atol=1e-7 * compiled
        )
    assert network.metric.update_count == 1
    assert network.metric.compute() == pytest.approx(outputs[0].pow(2).mean().item())


# -- under a Trainer ---------------------------------------------------------------------------------------------------


def sam(parameters, **settings):
    return SAM(parameters, SGD_MOMENTUM, **settings)


class Plain(L.LightningModule):
    """A user's own module that knows nothing of SAM."""

    def __init__(self, optimizer=sam, width=3):
        super().__init__()
        self.network, self.factory, self.width = Stateful(), optimizer, width
        self.losses, self.reported_losses, self.norms, self.updates = [], [], [], 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.network(x), y)
        self.network.metric(loss.detach(), len(x))
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(x))
        self.log("metric", self.network.metric, on_step=False, on_epoch=True)
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.updates += 1

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.reported_losses.append(outputs["loss"].item())
        self.norms.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item())

    def configure_optimizers(self):
        optimizer = self.factory(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def trainer(**settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {**quiet, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1, **settings}
    return L.Trainer(**settings)


def loader(count=4):
    x, y = (torch.cat(part) for part in zip(*batches_of(count, torch.float32), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=8)


def test_each_step_counts_once_under_a_trainer():
    task, fit = Plain(), trainer(log_every_n_steps=1)
    fit.fit(task, loader())
    first = task.losses[::2]
    assert fit.global_step == 4
    assert (len(task.losses), task.updates) == (8, 8)
    assert task.network.body[1].num_batches_tracked == task.network.body[3].calls == 4
    assert task.reported_losses == first
    assert fit.callback_metrics["loss_step"].item() == first[-1]
    assert fit.callback_metrics["loss_epoch"].item() == pytest.approx(sum(first) / 4)
    assert fit.callback_metrics["metric"].item() == pytest.approx(sum(first) / 4)
    assert "log" not in vars(task)
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)
    assert len(fit.optimizers[0].state_dict()["state"]) == 4  # momentum


def test_trainer_steps_equal_those_of_a_plain_loop():
    torch.manual_seed(0)
    task = Plain()
    copied = copy.deepcopy(task.network)
    torch.manual_seed(5)
    trainer(gradient_clip_val=0.5).fit(task, loader())
    assert max(task.norms) == pytest.approx(0.5)
    torch.manual_seed(5)
    optimizer = sam(copied.parameters())
    for x, y in loader():
        closure = closure_of(optimizer, entropy(copied, x, y))

        def clipped(closure=closure):
            closure()
            nn.utils.clip_grad_norm_(copied.parameters(), 0.5)

        optimizer.step(clipped, copied)
    for name, value in copied.state_dict().items():
        assert torch.equal(task.network.state_dict()[name], value), name


def test_bf16_mixed_trains_and_16_mixed_raises():
    task = Plain()
    trainer(precision="bf16-mixed").fit(task, loader())
    assert task.network.body[1].num_batches_tracked == 4
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))
    with pytest.raises(ValueError, match="use precision bf16-mixed or 32, since 16-mixed passes none"):
        trainer(plugins=[plugin]).fit(Plain(), loader())


class Manual(Plain):
    """Optimizes manually."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.optimizers().step()


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (Plain, {"accumulate_grad_batches": 2}, "got accumulate_grad_batches=2: set it to 1"),
        (Plain, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "clip by norm"),
        (Manual, {}, "SAM needs automatic optimization, got Manual"),
    ],
)
def test_unsupported_trainer_settings_raise(task, settings, message):
    made = task()
    made.automatic_optimization = task is not Manual
    with pytest.raises(RuntimeError, match=message):
        trainer(**settings).fit(made, loader())


class WithoutGradientNorms(Plain):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        """The last epoch of SWA has no gradients to record."""


def test_swa_updates_its_running_statistics_without_a_sam_step():
    task = WithoutGradientNorms()
    fit = trainer(max_epochs=3, callbacks=[StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)])
    fit.fit(task, loader())
    assert fit.current_epoch == 4  # the last epoch takes no step
    assert len(task.losses) == 3 * 4 * 2 + 4


def test_first_parameter_group_may_be_empty():
    p = nn.Parameter(torch.ones(2))
    optimizer = SAM([{"params": []}, {"params": [p]}], SGD_MOMENTUM, rho=0.1)
    optimizer.step(closure_of(optimizer, lambda: p.pow(2).sum()))
    assert (p < 1).all()


def test_asam_gets_parameter_names_from_the_module():
    seen = {}

    class Recording(Plain):
        def training_step(self, batch, batch_idx):
            seen[second_pass()] = {k: v.detach().clone() for k, v in self.network.named_parameters()}
            return super().training_step(batch, batch_idx)

    task = Recording(lambda p: ASAM(p, SGD, eta=0.0))
    with torch.no_grad():
        task.network.body[0].weight[0] = 0
        task.network.body[0].bias[0] = 0
    trainer(limit_train_batches=1).fit(task, loader())
    rise = {name: seen[True][name] - seen[False][name] for name in seen[True]}
    assert not rise["body.0.weight"][0].any()  # with eta = 0, a zero weight is not perturbed
    assert rise["body.0.weight"][1:].all()
    assert rise["body.0.bias"].any()


def digits(optimizer, epochs, ckpt_path=None, **settings):
    L.seed_everything(7)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3))
    network.append(nn.Linear(4 * 36, 10))
    task = Classification(network, 10, input_shape=(1, 8, 8), optimizer=optimizer)
    fit = trainer(max_epochs=epochs, **settings)
    fit.fit(task, DigitsDataModule(train_per_class=10, batch_size=20), ckpt_path=ckpt_path, weights_only=True)
    return fit


@pytest.mark.parametrize("make", [SAM, ASAM])
def test_resumes_to_the_bit(make, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")

    def optimizer(parameters):
        return make(parameters, SGD_MOMENTUM)

    whole = digits(optimizer, 3)
    half = digits(optimizer, 2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = digits(optimizer, 3, tmp_path / "half.ckpt")
    assert whole.global_step == resumed.global_step == 15
    for name, value in whole.lightning_module.state_dict().items():
        assert torch.equal(resumed.lightning_module.state_dict()[name], value), name
    optimizer = resumed.optimizers[0]
    assert optimizer.state is optimizer.base_optimizer.state
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert whole.callback_metrics["train/loss"] == resumed.callback_metrics["train/loss"]


def test_copies_and_added_groups_share_state_with_the_base_optimizer():
    network = relu_net(True)
    optimizer = sam(network.parameters())
    x, y = batches_of(1)[0]
    optimizer.step(closure_of(optimizer, lambda: F.cross_entropy(network(x), y)))
    copied = copy.deepcopy(optimizer)
    assert copied.state is copied.base_optimizer.state
    assert len(copied.state) == 4
    optimizer.add_param_group({"params": [vector(1.0)]})
    assert optimizer.base_optimizer.param_groups[1]["lr"] == 0.1
    assert optimizer.param_groups[1]["rho"] == 0.05


def test_loads_a_checkpoint_of_the_base_optimizer():
    network = relu_net(True)
    plain = SGD_MOMENTUM(network.parameters())
    for x, y in batches_of(2):
        plain.step(closure_of(plain, entropy(network, x, y)))
    optimizer = sam(network.parameters(), rho=0.1)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["rho"] == 0.1
    buffer = optimizer.base_optimizer.state[network[0].weight]["momentum_buffer"]
    assert torch.equal(buffer, plain.state[network[0].weight]["momentum_buffer"])
    optimizer.step(closure_of(optimizer, entropy(network, x, y)))


def test_autocast_around_the_step_uses_the_perturbed_weights():
    network, losses = relu_net(True).float(), []
    optimizer = SAM(network.parameters(), SGD, rho=1.0)
    x, y = batches_of(1, torch.float32)[0]

    def loss():
        losses.append(F.cross_entropy(network(x), y))
        return losses[-1]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step(closure_of(optimizer, loss))
    assert losses[1] > losses[0] + 0.1


class Counting(Classification):
    """Records over how many samples each mean of an epoch is taken."""

    def on_train_epoch_end(self):
        self.counts = [int(weight) for _, weight in self._means._sums.values()]
        super().on_train_epoch_end()


def test_second_pass_repeats_the_numpy_draws_of_a_module():
    module = nn.Linear(1, 1)
    module.draws, module.both = np.random.default_rng(0), [np.random.default_rng(k) for k in (1, 2)]

    def drawn():
        return [generator.random() for generator in (module.draws, *module.both)]

    before = FirstPass(module, torch.device("cpu"))
    first = drawn()
    with before.repeated():
        assert drawn() == first
        drawn()  # further draws of the second pass do not count
    assert drawn() == [np.random.default_rng(k).random(2)[1] for k in range(3)]


def test_epoch_means_and_memories_of_a_task_count_once():
    task = Counting("cnn_tiny", 10, input_shape=(1, 8, 8), optimizer=sam)
    trainer().fit(task, DigitsDataModule(train_per_class=5, batch_size=20))
    assert task.counts == [50]
    memory = SampleMemory()
    memory.allocate(2, torch.device("cpu"))
    with FirstPass(None, torch.device("cpu")).repeated():
        memory.write(torch.tensor([0]), torch.ones(1))
    assert memory.rows.tolist() == [0, 0]


@pytest.mark.slow  # the config of SAM is also run, killed and resumed in test_kill
@pytest.mark.parametrize("name", ["sam", "asam", "lion", "swa", "ema", "gradient_noise"])
def test_configs_of_flatness_methods_fit_test_and_resume(name, capsys):
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    words = ["--config", f"flatness/{name}_digits", "--config", "_overlay/smoke", *quiet, "--run", "run"]
    main(["fit", *words])
    main(["test", *words, "--ckpt_path", "last"])
    main(["fit", *words, "--ckpt_path", "last", "--trainer.max_epochs", "3"])
    last = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert last["epoch"] == (3 if name == "swa" else 2)  # swa: one more epoch for running statistics
    if name == "sam":
        assert last["global_step"] == 9
        assert last["optimizer_states"][0]["param_groups"][0]["rho"] == 0.05
        main(["fit", "--config", "run/config.yaml", *quiet, "--run", "again", "--model.optimizer.rho", "0.2"])
        again = torch.load("again/checkpoints/last.ckpt", weights_only=True)
        assert again["optimizer_states"][0]["param_groups"][0]["rho"] == 0.2
        assert again["optimizer_states"][0]["param_groups"][0]["momentum"] == 0.9


# -- two processes -----------------------------------------------------------------------------------------------------


class FirstGradients(Plain):
    """Records the first gradients of its last step."""

    def on_after_backward(self):
        if not second_pass():
            self.first_gradients = [p.grad.clone() for p in self.parameters()]


def fit_on_a_rank(average):
    torch.manual_seed(0)
    task = FirstGradients(partial(sam, average_first_pass=average))
    fit = trainer(strategy="ddp", devices=2, max_epochs=2)
    fit.fit(task, loader(20))
    weights = torch.cat([p.detach().flatten() for p in task.parameters()]).tolist()
    return fit.global_step, weights, torch.cat([g.flatten() for g in task.first_gradients]).tolist()


@pytest.mark.parametrize("average", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_perturb_by_own_or_averaged_gradient_and_stay_equal(average):
    first, second = on_two_ranks(fit_on_a_rank, average)
    assert first[0] == second[0] == 20
    assert first[1] == second[1]
    assert (first[2] == second[2]) == average


def plain_loop_on_a_rank():
    import os

    import torch.distributed as dist

    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    network = relu_net(True)
    parallel = DistributedDataParallel(network)
    optimizer, first = sam(network.parameters()), []
    for x, y in batches_of(20)[rank::2]:
        closure = closure_of(optimizer, entropy(parallel, x, y))

        def noting(closure=closure):
            closure()
            if not second_pass():
                first.append(network[0].weight.grad.tolist())

        optimizer.step(noting, parallel)
    dist.destroy_process_group()
    return network[0].weight.tolist(), first[0]


@pytest.mark.slow
def test_plain_loop_with_ddp_keeps_the_weights_of_two_processes_equal():
    a, b = on_two_ranks(plain_loop_on_a_rank)
    assert a[0] == b[0]
    assert a[1] != b[1]
