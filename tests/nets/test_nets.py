from __future__ import annotations

import hashlib
import math
import re
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_kd.nets import build_network, library_networks, network_for, network_names


class Published(NamedTuple):
    """Known values of a public network with 100 classes and 3 channels."""

    parameters: int
    names: str  # digest of the names and shapes in the public checkpoints; "" if there is none to compare
    logits: tuple[float, float, float]  # of a functional reimplementation, with the weights of fixed_weights


PUBLISHED = {
    "resnet8": Published(83_892, "1e8d9d7be7abe181", (0.066291, -0.339965, 0.60652)),
    "resnet14": Published(181_108, "1f7917f3e9058e76", (0.0828198, 0.814096, 0.77327)),
    "resnet20": Published(278_324, "892061a106f86ce0", (-0.711794, 1.1876, 1.01192)),
    "resnet32": Published(472_756, "aa95989e7c0111bc", (-0.151426, 1.3164, 1.15179)),
    "resnet44": Published(667_188, "3525fc1cfb28ce74", (-0.953115, 0.820331, 1.4815)),
    "resnet56": Published(861_620, "337d9f747868f1dd", (-0.568496, 0.0435872, 2.17948)),
    "resnet110": Published(1_736_564, "14082e796776b460", (-4.27752, -0.315202, 2.593)),
    "resnet8x4": Published(1_233_540, "d2115bc0725be5ea", (-0.169656, -0.0999535, 0.462684)),
    "resnet32x4": Published(7_433_860, "5a2f4296fdc06de2", (-0.507741, -0.602511, 0.75755)),
    "resnet18": Published(11_220_132, "bad0f3c079fb7576", (-0.186473, 0.157989, 0.588078)),
    "resnet34": Published(21_328_292, "1fac94b56aadea3f", (0.999774, -0.531971, 0.831977)),
    "resnet50": Published(23_705_252, "74254a6e49746cd1", (-0.0403248, -1.33701, 0.802043)),
    "preact_resnet18": Published(11_217_444, "539224a831563dc9", (-0.477177, -0.202904, 0.530396)),
    "wrn_16_1": Published(180_916, "ae038b3a5a5d794f", (0.62809, -0.556671, 0.359082)),
    "wrn_16_2": Published(703_284, "ea6f5696b4b89500", (0.449341, -0.434699, 0.327676)),
    "wrn_40_1": Published(569_780, "ba38642fd19d1689", (-0.308508, -0.329223, 0.359381)),
    "wrn_40_2": Published(2_255_156, "d1626a5a68f51e63", (0.0452254, 0.304585, 0.345461)),
    "vgg8": Published(3_965_028, "192725c09135bb46", (-0.324151, -0.123309, 0.413365)),
    "vgg11": Published(9_277_284, "a940a6a922200af3", (-0.0694046, -0.187059, 0.401026)),
    "vgg13": Published(9_462_180, "1203d287d079e469", (-0.0668293, 0.396404, 0.381944)),
    "vgg16": Published(14_774_436, "d5e1b22db9c02c63", (0.127928, -0.499874, 0.402753)),
    "vgg19": Published(20_086_692, "a84ffc4efab96ae0", (0.315669, -0.00752968, 0.399791)),
    "mobilenetv2": Published(812_836, "ac02f0b4dbf9f461", (-0.248458, -0.250874, 0.418568)),
    "shufflenetv1": Published(949_258, "d337d06f2b550000", (0.449226, 0.218128, 0.784189)),
    "shufflenetv2": Published(1_355_528, "b7a1d5223ee3e848", (-0.119736, 0.130081, 0.363927)),
    "mobilenetv1": Published(3_309_476, "", (-1.62642, -0.624472, 0.54513)),
}
OTHERS = ["cnn", "cnn9", "cnn_tiny", "wrn_28_1"]


def fixed_numbers(shape: tuple[int, ...], position: int) -> Tensor:
    """Numbers in [0, 1) that are the same on every machine, without a random generator."""
    n = torch.arange(1, math.prod(shape) + 1) + 1009 * position
    return ((n * n % 1_000_003).double() / 1_000_003).reshape(shape)


def fixed_weights(network: nn.Module) -> dict[str, Tensor]:
    weights = {}
    for position, (name, old) in enumerate(sorted(network.state_dict().items())):
        new = fixed_numbers(old.shape, position)
        if not old.is_floating_point() or name.endswith("running_var"):
            new = old
        elif old.dim() > 1:
            new = (new - 0.5) * math.sqrt(24 / old[0].numel())
        else:
            new = 0.3 + 0.4 * new if name.endswith("weight") else new - 0.5
        weights[name] = new
    return weights


def smallest_side(name: str) -> int:
    """The smallest images with which normalisation by the batch still has enough values in the last stage."""
    return {"mobilenetv1": 64, "mobilenetv2": 32, "cnn9": 32}.get(name, 16)


def last_linear(network: nn.Module) -> nn.Linear:
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1]


@pytest.fixture(scope="module", params=[*PUBLISHED, *OTHERS])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def network(name: str) -> nn.Module:
    """Built once for all tests of a name, because initialisation is half of their time."""
    torch.manual_seed(0)
    return build_network(name, 100)


def test_parameter_count_and_checkpoint_names(name: str, network: nn.Module) -> None:
    if name not in PUBLISHED:
        pytest.skip("not a public network")
    assert sum(parameter.numel() for parameter in network.parameters()) == PUBLISHED[name].parameters
    if PUBLISHED[name].names:
        lines = sorted((key, list(value.shape)) for key, value in network.state_dict().items())
        text = "\n".join(f"{key}:{shape}" for key, shape in lines)
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == PUBLISHED[name].names


@torch.no_grad()
def test_forward_keeps_layer_outputs_and_is_equal_in_channels_last(name: str, network: nn.Module) -> None:
    """Logits are finite, the classifier gets the pooled feature, no layer changes another's output in place."""
    images = torch.randn(2, 3, 32, 32)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    features = []

    def keep(path: str, output: Tensor) -> None:
        seen[path] = (output, output.clone())

    hooks = [
        module.register_forward_hook(lambda _, __, output, path=path: keep(path, output))
        for path, module in network.named_modules()
        if path
    ]
    classifier = last_linear(network)
    hooks.append(classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0])))
    network.eval()
    logits = network(images)
    for hook in hooks:
        hook.remove()

    assert logits.shape == (2, 100)
    assert logits.isfinite().all()
    assert [feature.shape for feature in features] == [(2, classifier.in_features)]
    assert torch.equal(classifier(features[0]), logits)
    changed = [path for path, (output, copy) in seen.items() if not output.equal(copy)]
    assert not changed

    network.to(memory_format=torch.channels_last)
    other = network(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(other, logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())
    network.to(memory_format=torch.contiguous_format)


def test_gradient_reaches_every_parameter(name: str, network: nn.Module) -> None:
    network.train()
    logits = network(torch.randn(2, 3, smallest_side(name), smallest_side(name)))
    nn.functional.cross_entropy(logits, torch.tensor([3, 7])).backward()
    without = [
        key for key, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert not without


@torch.no_grad()
def test_logits_equal_those_of_the_public_network(name: str, network: nn.Module) -> None:
    if name not in PUBLISHED:
        pytest.skip("not a public network")
    # Batch statistics keep deep activations apart; double precision makes them comparable.
    network.double().train()
    network.load_state_dict(fixed_weights(network))
    logits = network(3 * (fixed_numbers((2, 3, smallest_side(name), smallest_side(name)), 0) - 0.5))
    measured = (logits[0, 0].item(), logits[1, 57].item(), logits.std().item())
    assert measured == pytest.approx(PUBLISHED[name].logits, rel=1e-5)


def test_pooled_feature_is_the_mean_of_the_last_stage() -> None:
    network = build_network("resnet8x4", 10).eval()
    stage: list[Tensor] = []
    feature: list[Tensor] = []
    network.get_submodule("layer3").register_forward_hook(lambda _, __, output: stage.append(output))
    last_linear(network).register_forward_pre_hook(lambda _, inputs: feature.append(inputs[0]))
    network(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(feature[0], stage[0].mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, (1, 28, 28)) for name in ("resnet8", "resnet18", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1")]
    + [(name, (1, 8, 8)) for name in ("resnet8", "resnet18", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv2", "cnn")]
    + [(name, (4, 64, 48)) for name in ("resnet8x4", "wrn_16_2", "vgg8", "mobilenetv2", "shufflenetv2", "cnn_tiny")]
    + [("mobilenetv1", (1, 96, 96)), ("cnn9", (1, 28, 28)), ("cnn9", (4, 64, 48)), ("preact_resnet18", (1, 8, 8))],
)
@torch.no_grad()
def test_networks_take_other_channels_and_image_sizes(name: str, shape: tuple[int, int, int]) -> None:
    network = network_for(name, 7, shape).eval()
    assert network(torch.randn(2, *shape)).shape == (2, 7)


@torch.no_grad()
def test_vgg_pools_once_more_from_64_pixels_on() -> None:
    network = build_network("vgg8", 10).eval()
    sizes: list[int] = []
    network.get_submodule("block4").register_forward_hook(lambda _, __, output: sizes.append(output.shape[-1]))
    for side in (32, 64, 128):
        network(torch.randn(1, 3, side, side))
    assert sizes == [4, 4, 8]


def test_same_seed_gives_the_same_weights() -> None:
    torch.manual_seed(3)
    first = build_network("wrn_16_1", 10).state_dict()
    torch.manual_seed(3)
    again = build_network("wrn_16_1", 10).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_initial_weights_of_resnet_vgg_and_wide_resnet() -> None:
    torch.manual_seed(0)
    convolution = build_network("resnet32x4", 100).get_submodule("layer3.1.conv1")
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.02)
    assert last_linear(build_network("vgg8", 100)).weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not last_linear(build_network("wrn_16_1", 100)).bias.any()


def test_weight_names_and_shapes_are_those_of_public_checkpoints() -> None:
    some = {
        "resnet20": ("layer2.0.downsample.0.weight", (32, 16, 1, 1)),
        "resnet50": ("layer1.0.shortcut.0.weight", (256, 64, 1, 1)),
        "preact_resnet18": ("layer2.0.shortcut.0.weight", (128, 64, 1, 1)),
        "wrn_40_2": ("block1.layer.0.convShortcut.weight", (32, 16, 1, 1)),
        "vgg8": ("block4.1.running_var", (512,)),
        "mobilenetv2": ("classifier.weight", (100, 1280)),
        "shufflenetv1": ("layer1.0.conv3.weight", (216, 18, 1, 1)),
        "shufflenetv2": ("layer1.0.conv5.weight", (58, 58, 1, 1)),
        "mobilenetv1": ("model.13.3.weight", (1024, 1024, 1, 1)),
    }
    for name, (key, shape) in some.items():
        assert build_network(name, 100).state_dict()[key].shape == shape


def test_parameter_count_with_a_second_head_equals_published_totals() -> None:
    """A second head of one hidden layer of 1024 beside the classifier: the published totals."""
    for name, classes, total in (
        ("preact_resnet18", 10, 11_706_836),
        ("preact_resnet18", 100, 11_845_256),
        ("resnet34", 10, 21_817_684),
    ):
        head = 512 * 1024 + 1024 + 1024 * classes + classes
        assert sum(parameter.numel() for parameter in build_network(name, classes).parameters()) + head == total


@torch.no_grad()
def test_cnn9_equals_its_layers_computed_one_by_one() -> None:
    network = build_network("cnn9", 10)
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_434_570
    network.train()(torch.randn(2, 3, 32, 32))  # running statistics other than the initial ones
    weights = network.eval().state_dict()
    x = images = torch.randn(2, 3, 32, 32)
    for stage, padding in ((1, 1), (2, 1), (3, 0)):
        for k in (0, 3, 6):
            conv, norm = f"layer{stage}.{k}", f"layer{stage}.{k + 1}"
            x = nn.functional.conv2d(x, weights[f"{conv}.weight"], weights[f"{conv}.bias"], padding=padding)
            x = nn.functional.batch_norm(
                x, *(weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
            )
            x = torch.where(x > 0, x, 0.01 * x)
        if stage < 3:
            x = nn.functional.max_pool2d(x, 2)
    assert x.shape == (2, 128, 2, 2)
    expected = x.mean((2, 3)) @ weights["linear.weight"].T + weights["linear.bias"]
    torch.testing.assert_close(network(images), expected)


def test_cnn9_drops_whole_channels_in_training_only() -> None:
    network = build_network("cnn9", 10)
    kept: list[Tensor] = []
    network.get_submodule("dropout2").register_forward_hook(lambda _, __, output: kept.append(output))
    images = torch.randn(4, 3, 28, 28)
    network.train()(images)
    network.eval()(images)
    off = [(output == 0).all(dim=(2, 3)).float().mean().item() for output in kept]
    assert off == pytest.approx([0.25, 0], abs=0.06)
    with pytest.raises(ValueError, match=r"^cnn9 takes images of at least 28x28, got 32x8: use cnn instead$"):
        network(torch.randn(2, 3, 32, 8))


def test_listed_network_names_are_sorted_and_complete() -> None:
    names = network_names()
    assert names == sorted(set(names))
    # those that the fixture `name` builds and runs, and the mlp of the test below
    assert {*PUBLISHED, *OTHERS, "mlp"} - {"wrn_28_1"} == set(names)


@pytest.mark.parametrize(
    ("name", "widths"),
    [("mlp", [64, 128, 128, 10]), ("mlp_32", [64, 32, 10]), ("mlp_256_128_64", [64, 256, 128, 64, 10])],
)
@pytest.mark.parametrize("shape", [(64,), (1, 8, 8)])
def test_mlp_has_the_widths_of_its_name_and_relu_between_layers(
    name: str, widths: list[int], shape: tuple[int, ...]
) -> None:
    network = network_for(name, 10, shape)
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    assert [layers[0].in_features, *(layer.out_features for layer in layers)] == widths
    inputs = torch.randn(5, *shape)
    logits = network(inputs)
    assert logits.shape == (5, 10)
    # ReLU after every layer but the last
    expected = inputs.reshape(5, -1)
    for layer in layers[:-1]:
        expected = layer(expected).clamp(min=0)
    torch.testing.assert_close(logits, layers[-1](expected))


@pytest.mark.parametrize("name", ["mlp_", "mlp_0", "mlp_a", "mlp128", "mlp_1_", ""])
def test_malformed_mlp_names_raise(name: str) -> None:
    with pytest.raises(ValueError, match="is not known"):
        build_network(name, 10, 64)


def test_unknown_network_name_suggests_similar_ones() -> None:
    message = r"^network 'resnet21' is not known; did you mean resnet\w+, resnet\w+, resnet\w+\? `lightning-kd list`"
    with pytest.raises(ValueError, match=message):
        build_network("resnet21", 10)
    with pytest.raises(ValueError, match=r"^network 'q' is not known; `lightning-kd list` shows all$"):
        build_network("q", 10)


def test_wide_resnet_depth_other_than_6n_plus_4_raises() -> None:
    with pytest.raises(ValueError, match=r"must be 6n \+ 4 .* got 17"):
        build_network("wrn_17_1", 10)
    assert build_network("wrn_10_3", 10)(torch.randn(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet8", "mlp", "timm/resnet18", "torchvision/resnet18"])
def test_num_classes_and_in_channels_below_1_raise(name: str) -> None:
    with pytest.raises(ValueError, match=f"^num_classes of network '{name}' must be at least 1, got 0$"):
        build_network(name, 0)
    with pytest.raises(ValueError, match=f"^in_channels of network '{name}' must be at least 1, got -1$"):
        build_network(name, 10, -1)


@pytest.mark.parametrize("name", ["resnet8", "timm/resnet18", "unknown"])
def test_features_with_an_image_network_raise(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' takes images \(C, H, W\), but input_shape is \(64,\); .* an mlp"):
        network_for(name, 10, (64,))


@torch.no_grad()
def test_timm_network_is_built_and_unknown_name_raises() -> None:
    pytest.importorskip("timm")
    network = build_network("timm/resnet10t", 7, in_channels=2).eval()
    assert network(torch.randn(2, 2, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"^network 'timm/resnet19' is not known; did you mean timm/resnet"):
        build_network("timm/resnet19", 7)


def test_timm_network_without_timm_installed_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    message = re.escape("network 'timm/resnet18' needs timm: pip install \"lightning-kd[timm]\"")
    with pytest.raises(ImportError, match=message):
        build_network("timm/resnet18", 10)


@torch.no_grad()
def test_torchvision_network_is_built_and_wrong_use_raises() -> None:
    network = build_network("torchvision/squeezenet1_1", 7).eval()
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match="takes images of 3 channels, but in_channels is 1"):
        build_network("torchvision/resnet18", 7, 1)
    with pytest.raises(
        ValueError, match=r"^network 'torchvision/resnet19' is not known; did you mean torchvision/resn"
    ):
        build_network("torchvision/resnet19", 7)


@pytest.mark.parametrize(("name", "side"), [("googlenet", 32), ("inception_v3", 75)])
@torch.no_grad()
def test_torchvision_networks_with_auxiliary_classifiers_give_logits_in_training(
    name: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}
    get_model = library_networks.torchvision.models.get_model

    def noted(name: str, **options: Any) -> nn.Module:
        asked.update(options)
        return get_model(name, **{**options, "init_weights": False})  # the real initialisation takes seconds

    monkeypatch.setattr(library_networks.torchvision.models, "get_model", noted)
    network = build_network(f"torchvision/{name}", 7)
    assert asked == {"weights": None, "num_classes": 7, "aux_logits": False, "init_weights": True}
    logits = network.train()(torch.randn(2, 3, side, side))
    assert isinstance(logits, Tensor)
    assert logits.shape == (2, 7)
