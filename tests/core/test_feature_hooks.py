import copy

import pytest
import torch
from torch import nn

from lightning_kd.core.feature_hooks import Tap, find_classifier, penultimate_tap


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.body(x))


def test_classifier_is_found_automatically_or_by_name():
    net = Net()
    assert find_classifier(net) == ("head", net.head)
    assert find_classifier(net, "body.0") == ("body.0", net.body[0])
    with pytest.raises(ValueError, match=r"'body' is Sequential in Net: name an nn\.Linear"):
        find_classifier(net, "body")
    with pytest.raises(ValueError, match="'tail' is nothing"):
        find_classifier(net, "tail")
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear"):
        find_classifier(nn.Sequential(nn.ReLU()))


def test_penultimate_tap_keeps_the_feature_with_its_gradient():
    net = Net()
    tap, classifier = penultimate_tap(net)
    x = torch.randn(4, 3)
    logits = net(x)
    feature = tap.pop()
    torch.testing.assert_close(nn.functional.linear(feature, classifier.weight, classifier.bias), logits)
    feature.sum().backward()
    assert net.body[0].weight.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="has seen no tensor"):
        tap.pop()


def test_tap_keeps_a_modules_output_and_wrong_arguments_raise():
    net = Net()
    tap = Tap(net, "body")
    x = torch.randn(4, 3)
    net(x)
    torch.testing.assert_close(tap.pop(), net.body(x))
    with pytest.raises(ValueError, match=r"no module 'boddy' in Net; at that depth there are \['body', 'head'\]"):
        Tap(net, "boddy")
    with pytest.raises(ValueError, match="side must be"):
        Tap(net, "body", "top")


def test_tap_after_compile_raises():
    net = Net()
    net.compile(backend="eager")
    with pytest.raises(RuntimeError, match="tap the network first"):
        Tap(net, "body")


def test_tap_before_compile_works():
    net = Net()
    tap, _ = penultimate_tap(net)
    net.compile(backend="eager")
    for _ in range(3):
        x = torch.randn(4, 3)
        net(x)
        torch.testing.assert_close(tap.pop(), net.body(x))


def test_copy_of_a_tapped_network_reports_to_the_same_tap():
    net = Net()
    tap, _ = penultimate_tap(net)
    net(torch.randn(1, 3))  # a tensor with a graph, which could not be copied
    copied, x = copy.deepcopy(net), torch.randn(1, 3)
    copied(x)
    assert torch.equal(tap.pop(), copied.body(x))
