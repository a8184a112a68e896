"""Feature maps of each stage: which are found, before and after activation, and no side effects."""

import copy
import random

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig

from lightning_kd.core.stage_features import StageFeatures
from lightning_kd.nets import build_network


def net_of(name, **kwargs):
    torch.manual_seed(0)
    return build_network(name, 7, **kwargs).eval()


def images(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# channels and height of the stem and of the stages for 32x32 images, and the width of the pooled feature
FAMILIES = {
    "resnet8x4": ([(32, 32), (64, 32), (128, 16), (256, 8)], 256),
    "resnet18": ([(64, 32), (64, 32), (128, 16), (256, 8), (512, 4)], 512),
    "wrn_16_2": ([(16, 32), (32, 32), (64, 16), (128, 8)], 128),
    "vgg8": ([(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)], 512),
    "mobilenetv2": ([(16, 16), (12, 16), (16, 8), (48, 4), (160, 2)], 1280),
    "shufflenetv1": ([(24, 32), (240, 16), (480, 8), (960, 4)], 960),
    "shufflenetv2": ([(24, 32), (116, 16), (232, 8), (464, 4)], 1024),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_of_known_networks_have_the_expected_maps(name):
    sizes, width = FAMILIES[name]
    net = net_of(name)
    features = StageFeatures(net, (3, 32, 32), before=True)
    shapes = features.shapes
    assert [shapes.stem, *shapes.maps] == [(c, s, s) for c, s in sizes]
    assert shapes.before == shapes.maps
    assert shapes.pooled == (width,)
    logits = net(images(2, 3, 32, 32))
    found = features.pop()
    assert [tuple(m.shape[1:]) for m in found.maps] == list(shapes.maps)
    classifier = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    torch.testing.assert_close(classifier(found.pooled), logits)
    if name.startswith("wrn"):  # maps are not activated; before is the output of the next normalisation
        assert all(m.min() < 0 for m in found.maps)
        norms = net.block2.layer[0].bn1, net.block3.layer[0].bn1, net.bn1
        for m, before, norm in zip(found.maps, found.before, norms, strict=True):
            torch.testing.assert_close(before, norm(m))
    elif name == "mobilenetv2":
        assert all(m.min() < 0 and m is b for m, b in zip(found.maps, found.before, strict=True))
    else:
        for m, before in zip(found.maps, found.before, strict=True):
            assert before.min() < 0
            after = before.relu()
            if name == "shufflenetv2":
                after = after.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
            torch.testing.assert_close(m, after, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18"])
def test_maps_survive_in_place_operations_of_the_network(name):
    net = net_of(name)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight)  # timm starts the last ones from 0
    features = StageFeatures(net, (3, 32, 32), before=True)
    net(images(2, 3, 32, 32))
    found = features.pop()
    assert features.paths == ["layer1", "layer2", "layer3", "layer4"]
    for m, before in zip(found.maps, found.before, strict=True):
        assert before.min() < 0
        torch.testing.assert_close(m, before.relu(), rtol=0, atol=0)
    with_grad = net.train()(images(2, 3, 32, 32))
    (sum(b.square().sum() for b in features.pop().before) + with_grad.sum()).backward()


@pytest.mark.parametrize("name", ["cnn", "resnet20", "wrn_16_1", "vgg11", "mobilenetv1", "preact_resnet18"])
def test_maps_of_rectangular_images_keep_their_proportions(name):
    net = net_of(name)
    features = StageFeatures(net, (3, 32, 48), before=True)
    net(images(1, 3, 32, 48))
    found = features.pop()
    assert [tuple(m.shape[1:]) for m in found.maps] == list(features.shapes.maps)
    assert [tuple(m.shape[1:]) for m in found.before] == list(features.shapes.before)
    assert all(2 * w == 3 * h for _, h, w in features.shapes.maps if h > 1)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("torchvision/mobilenet_v2", ["features.1", "features.3", "features.6", "features.13", "features"]),
        ("torchvision/densenet121", [f"features.denseblock{k}" for k in (1, 2, 3, 4)]),
        ("timm/convnext_atto", [f"stages.{k}" for k in range(4)]),
        ("fcn_tiny", ["stage1", "stage2", "stage3"]),
    ],
)
def test_stages_are_found_in_any_network(name, stages):
    net = net_of(name)
    features = StageFeatures(net, (3, 64, 64))
    assert features.paths == stages
    net(images(1, 3, 64, 64))
    found = features.pop()
    assert found.before == ()
    assert (found.pooled is None) == (name == "fcn_tiny")
    assert [m.shape[1:] for m in found.maps] == [torch.Size(shape) for shape in features.shapes.maps]


def small_swin():
    return torchvision.models.SwinTransformer([4, 4], 8, [1, 1, 2, 1], [1] * 4, [2, 2], num_classes=7)


def small_convnext():
    blocks = [CNBlockConfig(width, 2 * width if width < 64 else None, 1) for width in (8, 16, 32, 64)]
    return torchvision.models.ConvNeXt(blocks, num_classes=7)


@pytest.mark.parametrize(
    ("build", "last"),
    [(small_swin, "permute"), (small_convnext, "features")],
)
@pytest.mark.parametrize("width", [64, 96])
def test_networks_with_channels_last_give_channels_first_maps(build, last, width):
    net = build().eval()
    features = StageFeatures(net, (3, 64, width), before=True)
    assert features.paths == ["features.1", "features.3", "features.5", last]
    w = width // 4
    shapes = [(8, 16, w), (16, 8, w // 2), (32, 4, w // 4), (64, 2, w // 8)]
    assert list(features.shapes.maps) == shapes
    image = images(2, 3, 64, width)
    net(image)
    maps = features.pop().maps
    assert [tuple(m.shape[1:]) for m in maps] == shapes
    first = net.features[:2](image)
    torch.testing.assert_close(maps[0], first if build is small_convnext else first.permute(0, 3, 1, 2))
    named = StageFeatures(net, (3, 64, width), ["features.3"])
    assert named.shapes.maps == ((16, 8, w // 2),)


def test_stage_is_the_last_module_of_each_size_except_pooling():
    body = nn.Sequential(
        *[nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1)],
        *[nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)],
    )
    net = nn.Sequential(body, nn.Flatten(), nn.Linear(4, 7))
    features = StageFeatures(net, (3, 8, 8), before=True)
    assert features.paths == ["0.1", "0.5"]
    net(images(2, 3, 8, 8))
    found = features.pop()
    for m, before in zip(found.maps, found.before, strict=True):
        assert before.min() < 0
        torch.testing.assert_close(m, before.relu())


def test_stages_can_be_given_by_name_or_none_at_all():
    net = net_of("resnet20")
    features = StageFeatures(net, (3, 32, 32), ["layer2.1", "layer3.0.conv1"], before=True)
    pooled = StageFeatures(net, (3, 32, 32), [])
    net(images(2, 3, 32, 32))
    found = features.pop()
    assert found.stem is None
    assert [tuple(m.shape) for m in found.maps] == [(2, 32, 16, 16), (2, 64, 8, 8)]
    torch.testing.assert_close(found.maps[0], found.before[0].relu())
    torch.testing.assert_close(found.before[1], net.layer3[0].bn1(found.maps[1]))  # the module that follows directly
    assert pooled.pop()[:3] == ((), (), None)
    mlp = build_network("mlp_5", 7, 12)
    assert StageFeatures(mlp, (3, 2, 2), []).shapes == ((), (), None, (5,))


def test_finding_stages_changes_neither_network_nor_random_state():
    net = build_network("resnet8", 7).train()
    net.layer1[0].bn1.eval()
    before = copy.deepcopy(net.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    StageFeatures(net, (3, 32, 32), before=True)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.training
    assert not net.layer1[0].bn1.training
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    assert hooks == 3 + 3 + 1 + 1  # maps, before, stem, pooled


def test_maps_of_a_compiled_network_with_and_without_gradient():
    net = build_network("cnn_tiny", 7)
    features = StageFeatures(net, (3, 16, 16), before=True)
    net.compile(backend="eager")
    for _ in range(2):
        net(images(2, 3, 16, 16))
        found = features.pop()
        torch.testing.assert_close(found.maps[1], found.before[1].relu())
    found.maps[0].sum().backward()
    assert net.layer1[0].weight.grad.abs().sum() > 0
    with torch.no_grad():
        net(images(2, 3, 16, 16))
    found = features.pop()
    assert not any(t.requires_grad for t in (*found.maps, *found.before, found.pooled))
    with pytest.raises(RuntimeError, match="has seen no tensor"):
        features.pop()
    with pytest.raises(RuntimeError, match="tap the network first"):
        StageFeatures(net, (3, 16, 16))


class Functional(nn.Module):
    """Ends its stages in an activation that is no module, and has a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2 = (nn.Sequential(nn.Conv2d(3, 3, 2, 2), Rectify()) for _ in range(2))
        self.idle, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(3, 7)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class Rectify(nn.Module):
    def forward(self, x):
        return torch.relu(x)


def test_wrong_stages_raise():
    net = Functional()
    assert StageFeatures(net, (3, 8, 8)).paths == ["layer1", "layer2"]
    with pytest.raises(ValueError, match=r"^stage 'layer1' of Functional ends in an activation that is no module"):
        StageFeatures(net, (3, 8, 8), before=True)
    for path, message in {
        "layer3": r"^no module 'layer3' in Functional",
        "fc": r"^stage 'fc' of Functional must give a map \[B, C, H, W\], got \[1, 7\]: name another",
        "idle": r"^stage 'idle' of Functional is never called",
    }.items():
        with pytest.raises(ValueError, match=message):
            StageFeatures(net, (3, 8, 8), [path])
    with pytest.raises(ValueError, match=r"^MLP has no maps \[B, C, H, W\] of several sizes: give a network of images"):
        StageFeatures(build_network("mlp_5", 7, 12), (12,))
