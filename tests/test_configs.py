"""Every shipped config parses and builds what it says; one of each method is trained, tested and resumed."""

import functools
from pathlib import Path

import pytest
import torch
import yaml

from lightning_kd.cli import get_cli, main
from lightning_kd.cli.composition import can_run, composed_settings
from lightning_kd.cli.config_names import config_folder, config_names
from lightning_kd.core.warmup import WarmupCosine
from lightning_kd.distillation.dkd import DKD, published_beta

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SMALL = ["--model.student", "cnn_tiny", "--model.teacher", "cnn", "--model.teacher_weights", "random"]


@functools.cache
def content(name):
    return composed_settings(config_folder() / f"{name}.yaml")


def method_of(name):
    return content(name).get("model", {}).get("class_path", "").rpartition(".")[2]


COMPLETE = [name for name in config_names() if can_run(content(name))]
PAIRS = [name for name in config_names() if "/pairs/" in name]
FEATURE_METHODS = ("fitnet", "at", "nst", "sp", "rkd", "pkt", "reviewkd")
DISTILLING = [name for name in COMPLETE if "teacher" in content(name)["model"]["init_args"]]
OVERLAYS = [name for name in config_names() if name.startswith(("noisy_labels/noise/", "noisy_labels/settings/"))]
OPENNESS = [name for name in config_names() if name.startswith("active_learning/openness/")]
# what a config must name: else values of the optimizer class before it would remain
OPTIMIZER_ARGUMENTS = {
    "torch.optim.SGD": {"lr", "momentum", "weight_decay", "dampening", "nesterov"},
    "torch.optim.Adam": {"lr", "betas", "eps", "weight_decay", "amsgrad"},
    "torch.optim.AdamW": {"lr", "betas", "eps", "weight_decay", "amsgrad"},
    "timm.optim.Lion": {
        "lr",
        "betas",
        "weight_decay",
        "caution",
        "corrected_weight_decay",
        "maximize",
        "foreach",
    },
    "lightning_kd.flatness.SAM": {"rho", "average_first_pass", "base_optimizer"},
    "lightning_kd.flatness.ASAM": {"rho", "eta", "elementwise", "average_first_pass", "base_optimizer"},
}


def small_networks(name):
    """Options that replace the networks of a config by small ones without loaded weights."""
    pixels = name.startswith("segmentation/")
    network = "fcn_tiny" if pixels else "cnn_tiny"
    given = content(name)["model"]["init_args"]
    start = [word for key in ("weights", "student_weights") if key in given for word in (f"--model.{key}", "null")]
    networks = [network if pixels and word.startswith("cnn") else word for word in SMALL]
    networks = networks if name in DISTILLING else ["--model.network", network]
    if method_of(name) == "L2D":  # which needs an embedding of each label
        networks = [f"{word}+ml_decoder_16" if word.startswith("cnn") else word for word in networks]
    return [*start, *networks]


def arguments(name):
    """The options of a config for a run of seconds; the image folders that it reads are made."""
    if "tiny_imagenet" in name:  # its classes are read from the folders when the data module is built
        for k in range(200):
            Path(f"data/tiny-imagenet-200/train/n{k:03d}").mkdir(parents=True, exist_ok=True)
    if name == "active_learning/margin_folder":
        for part in ("photos/cats", "photos/dogs", "unlabelled"):
            Path(part).mkdir(parents=True, exist_ok=True)
    stages = ["--model.negative_epochs", "1", "--model.snapshot_interval", "1"] if method_of(name) == "BUAL" else []
    return ["--config", name, "--config", "_overlay/smoke", *QUIET, *stages]


def test_each_config_has_a_comment_and_names_all_optimizer_arguments():
    assert len(PAIRS) == 10
    for name in config_names():
        assert (config_folder() / f"{name}.yaml").read_text().startswith("# "), name
        optimizer = content(name).get("model", {}).get("init_args", {}).get("optimizer")
        if name in COMPLETE:
            for one in (optimizer, optimizer["init_args"].get("base_optimizer", optimizer)):
                assert OPTIMIZER_ARGUMENTS[one["class_path"]] <= one["init_args"].keys(), name
            assert "ReduceLROnPlateau" not in str(content(name))


@pytest.mark.parametrize("name", COMPLETE)
def test_config_parses_and_builds_what_it_says(name):
    extra = small_networks(name)
    stages = ("negative_epochs", "snapshot_interval")
    given = content(name)["model"]["init_args"]
    own = [word for key in stages if key in given for word in (f"--model.{key}", str(given[key]))]
    cli = get_cli([*arguments(name), *extra, *own])
    assert type(cli.model).__name__ == method_of(name)
    for key, value in given.items():
        if isinstance(value, (int, float)) and isinstance(getattr(cli.model, key, None), (int, float)):
            assert getattr(cli.model, key) == value, key
    if "lr_interval" in given:  # the number of steps is known in a fit only
        cli.model.schedule_length, cli.model.second_stage_begin = (lambda unit: 100), (lambda unit: 30)
    configured = cli.model.configure_optimizers()
    configured = {"optimizer": configured} if isinstance(configured, torch.optim.Optimizer) else configured
    for one in configured if isinstance(configured, list) else [configured]:
        said = dict(given["optimizer"]["init_args"])
        base = said.pop("base_optimizer", None)  # SAM holds its settings among its own
        for key, value in {**said, **(base["init_args"] if base else {})}.items():
            expected = tuple(value) if isinstance(value, list) else value
            known = one["optimizer"].defaults
            assert (known[key] if key in known else getattr(one["optimizer"], key)) == expected, key
        if base:
            assert type(one["optimizer"].base_optimizer).__name__ == base["class_path"].rpartition(".")[2]
        if "lr_scheduler" in given:
            assert one["lr_scheduler"]["interval"] == given.get("lr_interval", "epoch")
        else:
            assert name.startswith("active_learning/")  # whose papers keep the learning rate constant


@pytest.mark.parametrize("name", OVERLAYS)
def test_noise_overlays_compose(name):
    part = name.rpartition("/")[2]
    dataset = "cifar100" if part.startswith("cifar100") else "cifar10"
    method = "dpc" if "/settings/" in name else "ce"
    cli = get_cli([*arguments(f"noisy_labels/{method}_{dataset}"), "--config", name, "--model.network", "cnn_tiny"])
    noise = content(name)["data"]["init_args"]["noise"]
    assert type(cli.datamodule.noise).__name__ == noise["class_path"].rpartition(".")[2]
    for key, value in noise["init_args"].items():
        assert getattr(cli.datamodule.noise, key) == value
    for key, value in content(name).get("model", {}).get("init_args", {}).items():
        assert getattr(cli.model, key) == value
    cli.datamodule.setup()
    assert (cli.datamodule.train_target != cli.datamodule.train_clean).any()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] if "vgg" in n else [])  # 134 million parameters
        for n in config_names()
        if n.startswith(("flatness/nets/", "flatness/with_"))
    ],
)
def test_flatness_overlays_compose(name):
    method = ("sam", "sos")["nets" in name]
    cli = get_cli([*arguments(f"flatness/{method}_cifar10"), "--config", name])
    network = content(name).get("model", {}).get("init_args", {}).get("network")
    assert network is None or cli.model.hparams.network == network
    added = [entry["class_path"].rpartition(".")[2] for entry in content(name).get("trainer", {}).get("callbacks+", [])]
    assert {*added} <= {type(callback).__name__ for callback in cli.trainer.callbacks}


def test_flatness_10k_overlay_sets_batch_size_augmentation_and_schedule():
    for method in ("sgd", "sam"):
        cli = get_cli([*arguments(f"flatness/{method}_cifar10"), "--config", "flatness/cifar10_10k"])
        assert (cli.datamodule.batch_size, cli.datamodule.crop_flip) == (128, None)
        assert cli.model.configure_optimizers()["lr_scheduler"]["scheduler"].T_max == cli.trainer.max_epochs == 30


@pytest.mark.parametrize(
    ("base", "overlay"),
    [
        ("distillation/classification_cifar100", "distillation/cifar100_10k"),
        ("flatness/sgd_cifar10", "flatness/cifar10_10k"),
        ("noisy_labels/ce_cifar10", "noisy_labels/cifar10_10k"),
        ("active_learning/entropy_cifar10", "active_learning/cifar10_10k"),
        ("weak_labels/mogd_fashion_mnist", "weak_labels/fashion_10k"),
        ("weak_labels/selfcrowd_cifar10", "weak_labels/cifar10_10k"),
    ],
)
def test_overlay_sets_a_schedule_as_long_as_its_training(tmp_path, base, overlay):
    """Even after a config with a schedule of another length."""
    own = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 240}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"lr_scheduler": own}}}))
    parts = [base, str(tmp_path / "own.yaml"), overlay]
    cli = get_cli([*(word for part in parts for word in ("--config", part)), *QUIET, "--model.network", "cnn_tiny"])
    schedule = cli.model.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert (type(schedule).__name__, schedule.T_max) == ("CosineAnnealing", cli.trainer.max_epochs)


@pytest.mark.parametrize("name", [n for n in config_names() if n.startswith("weak_labels/crowds/")])
def test_crowd_overlays_compose(name):
    cli = get_cli([*arguments("weak_labels/selfcrowd_cifar10"), "--config", name, "--model.network", "cnn_tiny"])
    crowd = content(name)["data"]["init_args"]["annotations"]
    assert type(cli.datamodule.annotations).__name__ == crowd["class_path"].rpartition(".")[2]
    for key, value in crowd["init_args"].items():
        assert getattr(cli.datamodule.annotations, key) == value
    cli.datamodule.setup()
    assert cli.datamodule.train_annotations.shape[1] == 3


def test_crowd_10k_overlays_set_samples_epochs_and_rounds():
    added = ["weak_labels/cifar10_10k", "weak_labels/selfcrowd_10k", "weak_labels/crowds/cifar10n_sparse"]
    cli = get_cli(["--config", "weak_labels/selfcrowd_cifar10", *(w for a in added for w in ("--config", a)), *QUIET])
    assert (cli.datamodule.train_per_class, cli.trainer.max_epochs) == (2447, 20)
    assert cli.model.round_before(8) == 1
    assert cli.model.start_epochs + cli.model.rounds * cli.model.round_epochs == 20


@pytest.mark.parametrize("name", OPENNESS)
def test_openness_overlays_compose(name):
    dataset, _, known = name.rpartition("/")[2].rpartition("_")
    method = ("lfosa", "bual", "dcfs", "entropy")[OPENNESS.index(name) % 4]
    cli = get_cli([*arguments(f"active_learning/{method}_{dataset}"), "--config", name, "--model.network", "cnn_tiny"])
    assert cli.datamodule.num_classes == cli.model.num_classes == int(known)
    total = {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 200}[dataset]
    first = (config_folder() / f"{name}.yaml").read_text().splitlines()[0]
    assert first == f"# {known} of {total} classes known: openness {1 - int(known) / total:.2f}"


def test_pool_10k_overlays_set_data_budget_and_epochs():
    for method in ("lfosa", "bual", "dcfs", "entropy"):
        parts = ["cifar10_10k", "fashion_10k", *(["bual_10k"] if method == "bual" else [])]
        added = [word for part in parts for word in ("--config", f"active_learning/{part}")]
        cli = get_cli(["--config", f"active_learning/{method}_cifar10", *added, *QUIET])
        assert type(cli.datamodule.source).__name__ == "FashionMNISTDataModule"
        assert (cli.datamodule.budget, cli.datamodule.rounds, cli.datamodule.batch_size) == (300, 6, 32)
        assert cli.trainer.max_epochs == (60 if method == "bual" else 30)


@pytest.mark.parametrize("name", [n for n in COMPLETE if "OneCycle" in str(content(n))])
def test_one_cycle_schedules_of_multi_label_configs_are_those_of_the_papers(name):
    config = content(name)
    model, epochs = config["model"]["init_args"], config["trainer"]["max_epochs"]
    stretch = model["lr_scheduler"]["init_args"].get("stretch", 1.0)
    warm = model.get("warmup_epochs")
    stages = [epochs] if warm is None else [warm, epochs - warm]
    made_for = [part * times for part, times in zip(stages, stretch if warm else [stretch], strict=True)]
    whole = {"CAP": [12, 40], "CDCR": [80, 80]}.get(method_of(name), [80])
    assert made_for == pytest.approx(whole, rel=1e-5)
    assert (model["lr_interval"], config["data"]["init_args"]["normalize"]) == ("step", False)
    assert model.get("decay_weights_only", False) == (method_of(name) not in ("CAP", "PAT"))


def test_pool_configs_have_the_settings_of_their_papers():
    ours = ("digits", "fashion", "folder")  # settings that no paper has
    for name in [n for n in COMPLETE if n.startswith("active_learning/") and not n.endswith(ours)]:
        data, model = content(name)["data"]["init_args"], content(name)["model"]["init_args"]
        lfosa = "lfosa" in name
        assert data["rounds"] == (9 if lfosa else 7)
        assert data["source"]["init_args"]["batch_size"] == 128
        assert data["budget"] == (3000 if "tiny" in name and not lfosa else 1500)
        assert data["initial_fraction"] == (0.01 if name.endswith("_cifar10") else 0.08)
        assert model["optimizer"]["init_args"]["weight_decay"] == (5e-4 if lfosa else 1e-4)
        assert content(name)["trainer"]["max_epochs"] == (200 if "bual" in name else 100)


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_compose(pair):
    teacher, student = (content(pair)["model"]["init_args"][k] for k in ("teacher", "student"))
    assert pair.endswith(f"{teacher}_{student}")
    # a pair sets only what all methods take, so each pair is tried with a share of the methods
    methods = [*("kd", "dkd", "dhkd", "lskd", "dist", "nkd"), *FEATURE_METHODS]
    for method in methods[PAIRS.index(pair) :: len(PAIRS)]:
        check_pair(pair, method)


def check_pair(pair, method):
    teacher, student = (content(pair)["model"]["init_args"][k] for k in ("teacher", "student"))
    cli = get_cli(
        [*arguments(f"distillation/{method}_cifar100"), "--config", pair, "--model.teacher_weights", "random"]
    )
    small = student.startswith(("mobile", "shuffle"))
    assert cli.model.configure_optimizers()["optimizer"].defaults["lr"] == (0.01 if small else 0.05)
    assert (cli.model.hparams.student, cli.model.hparams.teacher) == (student, teacher)


@pytest.mark.parametrize(
    ("pair", "beta"),
    [
        ("resnet56_resnet20", 2),
        ("resnet110_resnet32", 2),
        ("resnet32x4_resnet8x4", 8),
        ("wrn_40_2_wrn_16_2", 6),
        ("wrn_40_2_wrn_40_1", 6),
        ("vgg13_vgg8", 6),
        ("resnet32x4_shufflenetv1", 8),
        ("resnet32x4_shufflenetv2", 8),
        ("vgg13_mobilenetv2", 6),
        ("resnet50_mobilenetv2", 8),
    ],
)
def test_dkd_beta_of_each_pair_is_the_published_one(pair, beta):
    given = content(f"distillation/pairs/{pair}")["model"]["init_args"]
    assert published_beta(given["student"], given["teacher"]) == beta
    assert "beta" not in content("distillation/dkd_cifar100")["model"]["init_args"]


def test_dkd_takes_the_published_beta_unless_one_is_given():
    task = DKD("resnet20", "resnet56", 100, teacher_weights="random")
    assert task.beta == 2
    assert DKD("resnet20", "resnet56", 100, teacher_weights="random", beta=3.0).beta == 3
    assert published_beta("torchvision/resnet18", "torchvision/resnet34") == 0.5
    assert published_beta(task.student, "resnet56") == published_beta("cnn_tiny", "cnn") == 8


def test_imagenet_configs_have_the_crop_ranges_of_their_papers():
    for name, scale, ratio in (
        ("kd", [0.08, 1.0], [3 / 4, 4 / 3]),
        ("dkd", [0.08, 1.0], [3 / 4, 4 / 3]),
        ("dhkd", [0.1, 1.0], [0.8, 1.25]),
    ):
        data = content(f"distillation/{name}_imagenet")["data"]["init_args"]
        assert (data["scale"], data["ratio"]) == (pytest.approx(scale), pytest.approx(ratio))


def test_cifar100_distillation_configs_have_the_recipe_of_the_papers():
    for name in ("classification", "kd", "dkd", "dhkd", "lskd", "dist", "nkd", "z_loss", *FEATURE_METHODS):
        config = content(f"distillation/{name}_cifar100")
        assert config["trainer"]["max_epochs"] == 240
        assert config["data"]["init_args"]["batch_size"] == 64
        assert config["model"]["init_args"]["lr_scheduler"]["init_args"] == {
            "milestones": [150, 180, 210],
            "gamma": 0.1,
        }
    cli = get_cli([*arguments("distillation/kd_cifar100"), *SMALL])
    configured = cli.model.configure_optimizers()
    rates = []
    for _ in range(240):  # the rate of each epoch: the drop comes after epoch 150, counted from 1
        rates.append(configured["optimizer"].param_groups[0]["lr"])
        configured["optimizer"].step()
        configured["lr_scheduler"]["scheduler"].step()
    assert rates[149] == pytest.approx(0.05)
    assert rates[150] == pytest.approx(0.005)
    assert rates[239] == pytest.approx(0.05 * 1e-3)


@pytest.mark.parametrize("overlay", [n for n in config_names() if n.startswith("_overlay/") and "ddp" not in n])
def test_overlays_compose(overlay):
    cli = get_cli(["--config", "distillation/kd_digits", "--config", overlay, *QUIET, *SMALL])
    said = content(overlay)
    for key, value in said.get("trainer", {}).items():
        # Lightning has no 16-mixed on a CPU
        expected = "bf16-mixed" if key == "precision" and not torch.cuda.is_available() else value
        assert getattr(cli.trainer, key) == expected, key
    assert cli.datamodule.fake == said.get("data", {}).get("init_args", {}).get("fake", False)
    model = said.get("model", {}).get("init_args", {})
    assert cli.model.compile_networks == model.get("compile", False)
    schedule = model.get("lr_scheduler")
    if schedule:
        cli.model.schedule_length = lambda unit: {"step": 900}[unit]  # known in a fit only
        found = cli.model.configure_optimizers()["lr_scheduler"]
        assert (found["interval"], type(found["scheduler"])) == ("step", WarmupCosine)
        assert found["scheduler"].warmup_steps == schedule["init_args"]["warmup_steps"] == 500
    assert said.keys() <= {"trainer", "data", "model"}
    assert model.keys() <= {"compile", "lr_interval", "lr_scheduler"}


@pytest.mark.parametrize("method", sorted({method_of(name) for name in COMPLETE}))
def test_fit_test_resume(method, tmp_path):
    name = next(n for n in COMPLETE if method_of(n) == method and ("digits" in n or "_arrays" in n))
    extra = ["--model.teacher_weights", "random"] if name in DISTILLING else []
    given = content(name)["model"]["init_args"]
    extra += ["--model.student_weights", "null"] if "student_weights" in given else []
    if "warmup_epochs" in given:
        extra += ["--model.warmup_epochs", "1"]
    run = ["--run", "run", *extra]
    main(["fit", *arguments(name), *run])
    main(["test", *arguments(name), *run, "--ckpt_path", "last"])
    if not name.startswith("active_learning/"):
        main(["predict", *arguments(name), *run, "--ckpt_path", "last"])
        assert (tmp_path / "run/predictions.csv").is_file()
    main(["fit", *arguments(name), *run, "--ckpt_path", "last", "--trainer.max_epochs", "3"])
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 2
    lines = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert len(lines) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in COMPLETE if "digits" not in n and "_arrays" not in n])
def test_every_full_size_config_fits_and_tests(name):
    extra = small_networks(name)
    batch = "--data.source.batch_size" if name.startswith("active_learning/") else "--data.batch_size"
    main(["fit", *arguments(name), *extra, "--run", "run", batch, "8"])
    main(["test", *arguments(name), *extra, "--run", "run", "--ckpt_path", "last"])
