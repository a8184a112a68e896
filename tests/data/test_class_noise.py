"""Simulated label noise: the labels that it gives, and the arguments that it refuses."""

import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from lightning_kd.cli import get_cli
from lightning_kd.data import (
    CIFARN,
    ArrayDataModule,
    AsymmetricNoise,
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
    InstanceDependentNoise,
    LabelFile,
    LabelNoise,
    PairFlipNoise,
    SymmetricNoise,
    TransitionNoise,
)
from lightning_kd.data.cifar import CIFAR10_CLASSES, CIFAR100_CLASSES, CIFAR100_COARSE
from lightning_kd.data.class_noise import next_in_group
from lightning_kd.data.instance_noise import _truncated_normal
from lightning_kd.data.label_noise import check_transition, estimate_transition, sample_transition

N = 50_000
TEN = np.random.default_rng(1).permutation(np.arange(N) % 10)
HUNDRED = np.random.default_rng(1).permutation(np.arange(N) % 100)
# the first labels of CIFAR-10 and -100, so that DivideMix's published check applies
TEN_START, HUNDRED_START = [6, 9, 9, 4, 1, 1, 2, 7, 8, 3], [19, 29, 0, 11, 1, 86, 90, 28, 23, 31]
GREY = torch.randint(0, 256, (2000, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

NOISES = {
    "inclusive": SymmetricNoise(0.5),
    "exclusive": SymmetricNoise(0.5, "exclusive"),
    "dividemix": SymmetricNoise(0.5, "dividemix"),
    "pair": PairFlipNoise(0.4),
    "asymmetric": AsymmetricNoise(0.4),
    "exact_subset": AsymmetricNoise(0.4, "exact_subset"),
    "instance": InstanceDependentNoise(0.4),
    "saturated": InstanceDependentNoise(0.4, soft=False),
    "transition": TransitionNoise((0.7 * np.eye(10) + 0.03).tolist()),
}


def share_wrong(given, clean):
    return float((np.asarray(given) != np.asarray(clean)).mean())


def corrupt(noise, target=TEN):
    image = GREY.repeat(len(target) // len(GREY), 1, 1, 1)
    return noise.corrupt(target, CIFAR10_CLASSES if target.max() < 10 else CIFAR100_CLASSES, image)


@pytest.mark.parametrize(("rate", "actual"), [(0.2, 0.18), (0.5, 0.45), (0.8, 0.72), (0.9, 0.81)])
def test_inclusive_noise_redraws_an_exact_number_of_labels(rate, actual):
    given = corrupt(SymmetricNoise(rate))
    assert given.dtype == np.int64
    assert share_wrong(given, TEN) == pytest.approx(actual, abs=0.006)
    # all labels are 0 of 100,000 classes, so nearly every redrawn label differs from 0 and can be counted
    zeros = np.zeros(N, dtype=np.int64)
    touched = SymmetricNoise(rate).corrupt(zeros, 100_000)
    assert (touched != 0).sum() == pytest.approx(int(rate * N), abs=5)


@pytest.mark.parametrize(
    ("start", "clean", "first", "actual"),
    [
        (TEN_START, TEN, [8, 5, 9, 4, 1, 8, 3, 7, 6, 2], 0.44968),
        (HUNDRED_START, HUNDRED, [66, 46, 0, 11, 1, 71, 25, 28, 50, 20], 0.49502),
    ],
)
def test_dividemix_noise_draws_the_published_first_labels(start, clean, first, actual):
    clean = np.concatenate([start, clean[10:]])
    given = corrupt(SymmetricNoise(0.5, "dividemix", seed=123), clean)
    assert given[:10].tolist() == first
    assert share_wrong(given, clean) == pytest.approx(actual, abs=0.004)  # exact on the real labels


@pytest.mark.parametrize("rate", [0.2, 0.5])
@pytest.mark.parametrize("make", [PairFlipNoise, lambda rate: SymmetricNoise(rate, "exclusive"), AsymmetricNoise])
def test_drawn_labels_follow_the_transition_matrix(make, rate):
    noise = make(rate)
    meant = noise.transition(CIFAR10_CLASSES)
    error = np.sqrt(meant * (1 - meant) / (N / 10))
    found = estimate_transition(TEN, corrupt(noise), 10)
    assert (np.abs(found - meant) <= 4 * error).all()
    assert meant.sum(1) == pytest.approx(np.ones(10))


def test_transition_matrices_of_pair_flip_and_symmetric_noise():
    assert PairFlipNoise(0.3).transition("abc") == pytest.approx(np.array([[7, 3, 0], [0, 7, 3], [3, 0, 7]]) / 10)
    exclusive = SymmetricNoise(0.3, "exclusive").transition("abcd")
    assert exclusive == pytest.approx(np.full((4, 4), 0.1) + 0.6 * np.eye(4))
    assert SymmetricNoise(0.4).transition("abcd") == pytest.approx(np.full((4, 4), 0.1) + 0.6 * np.eye(4))


@pytest.mark.parametrize("kind", ["iid", "exact_subset"])
def test_asymmetric_cifar10_noise_flips_only_its_five_pairs(kind):
    given = corrupt(AsymmetricNoise(0.4, kind))
    assert share_wrong(given, TEN) == pytest.approx(0.2, abs=0.006)
    never = np.isin(TEN, [0, 1, 6, 7, 8])
    assert (given[never] == TEN[never]).all()
    moved = given[given != TEN]
    assert not np.isin(moved, [2, 4, 6, 8, 9]).any()
    counts = [(given[a == TEN] == b).sum() for a, b in ((3, 5), (5, 3), (9, 1), (2, 0), (4, 7))]
    assert np.abs(np.array(counts) - 2000).max() < 4 * math.sqrt(5000 * 0.24)


def test_exact_subset_noise_flips_an_exact_number_of_labels():
    clean = np.full(1000, 9)
    given = AsymmetricNoise(0.25, "exact_subset").corrupt(clean, CIFAR10_CLASSES)
    assert (given == 1).sum() == 250


def test_asymmetric_cifar100_noise_stays_within_superclasses():
    noise = AsymmetricNoise(0.4)
    matrix = noise.transition(CIFAR100_CLASSES)
    off = matrix[~np.eye(100, dtype=bool)]
    assert (off > 0).sum() == 100
    assert (off[off > 0] == 0.4).all()
    given, coarse = corrupt(noise, HUNDRED), np.array(CIFAR100_COARSE)
    assert (coarse[given] == coarse[HUNDRED]).all()
    changed = given != HUNDRED
    assert set(HUNDRED[changed]) == set(given[changed]) == set(range(100))
    assert share_wrong(given, HUNDRED) == pytest.approx(0.4, abs=0.01)
    assert np.bincount(coarse).tolist() == [5] * 20
    # the aquatic mammals, as the superclass is published: beaver, dolphin, otter, seal, whale
    step = next_in_group(CIFAR100_COARSE)
    assert [CIFAR100_CLASSES[step[CIFAR100_CLASSES.index(n)]] for n in ("beaver", "otter", "whale")] == [
        "dolphin",
        "seal",
        "beaver",
    ]


def test_blocks_noise_stays_within_blocks_of_five_not_superclasses():
    given, coarse = corrupt(AsymmetricNoise(0.4, "blocks"), HUNDRED), np.array(CIFAR100_COARSE)
    assert (given // 5 == HUNDRED // 5).all()
    assert set(given[HUNDRED == 0]) == {0, 1}  # apple, aquarium fish
    assert set(given[HUNDRED == 4]) == {4, 0}
    assert share_wrong(coarse[given], coarse[HUNDRED]) > 0.2


@pytest.mark.parametrize("soft", [True, False])
def test_instance_dependent_noise_depends_on_the_image(soft):
    # 2000 images, 25 copies each, all of one class
    clean = np.full(N, 3)
    given = corrupt(InstanceDependentNoise(0.4, soft), clean)
    assert share_wrong(given, clean) == pytest.approx(0.4, abs=0.01)
    by_image = given.reshape(25, 2000)
    kinds = np.array([len(set(labels[labels != 3])) for labels in by_image.T])
    assert (kinds.mean() > 3.5) == soft
    # within an image the wrong labels agree more often than between images
    same = np.mean([(a == b)[(a != 3) & (b != 3)].mean() for a, b in pairwise(by_image)])
    rolled = np.roll(by_image, 1, axis=1)
    other = np.mean([(a == b)[(a != 3) & (b != 3)].mean() for a, b in zip(by_image, rolled[1:], strict=False)])
    assert same > other + 0.02


def test_instance_dependent_noise_standardises_features():
    feature = torch.randn(3000, 5, generator=torch.Generator().manual_seed(0))
    feature[:, 4] = 7
    clean = np.arange(3000) % 3
    noise = InstanceDependentNoise(0.3)
    given = noise.corrupt(clean, 3, feature)
    assert share_wrong(given, clean) == pytest.approx(0.3, abs=0.04)
    assert (given == noise.corrupt(clean, 3, feature * 10 + 2)).mean() > 0.99  # standardised


@pytest.mark.parametrize(
    ("rate", "actual"), [(0.01, 0.084), (0.05, 0.101), (0.1, 0.129), (0.2, 0.206), (0.4, 0.4), (0.9, 0.871), (1, 0.920)]
)
def test_instance_rates_follow_a_normal_truncated_to_0_and_1(rate, actual):
    drawn = _truncated_normal(rate, 0.1, N, np.random.default_rng(0))
    assert drawn.shape == (N,)
    assert 0 < drawn.min() < drawn.max() < 1
    assert drawn.mean() == pytest.approx(actual, abs=0.002)
    # drawn again, not clipped
    assert len(np.unique(drawn)) == N
    given = InstanceDependentNoise(rate).corrupt(TEN[:4000], 10, GREY.repeat(2, 1, 1, 1))
    assert share_wrong(given, TEN[:4000]) == pytest.approx(actual, abs=0.03)


@pytest.mark.parametrize("name", NOISES)
def test_labels_depend_only_on_the_seed(name):
    noise, clean = NOISES[name], TEN.copy()
    first = corrupt(noise)
    np.random.default_rng(5).random(100)
    torch.rand(7)
    assert (corrupt(noise) == first).all()
    assert (clean == TEN).all()
    assert 0.1 < share_wrong(first, TEN) < 0.55
    noise_again = type(noise)(**{**vars(noise), "seed": 1})
    assert (corrupt(noise_again) != first).any()


@pytest.mark.parametrize("name", [name for name in NOISES if name != "transition"])
def test_rate_0_changes_nothing(name):
    noise = type(NOISES[name])(**{**vars(NOISES[name]), "rate": 0})
    assert (corrupt(noise) == TEN).all()


# DivideMix's own recipe draws sample by sample; the network of instance-dependent noise works in chunks
VECTORISED = [name for name in NOISES if "sat" not in name and name not in ("instance", "dividemix")]


@pytest.mark.parametrize("name", VECTORISED)
def test_drawing_does_not_loop_over_samples(name):
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        corrupt(NOISES[name])
    finally:
        sys.setprofile(None)
    assert 0 < calls < len(TEN) / 4, calls


def test_classes_without_samples_can_be_estimated_and_drawn():
    clean = np.array([0, 0, 2, 2] * 50)
    assert estimate_transition(clean, clean, 4) == pytest.approx(np.eye(4))
    assert set(SymmetricNoise(1.0, "exclusive").corrupt(clean, 4)) == {0, 1, 2, 3}
    assert set(TransitionNoise([[0, 1], [0, 1]]).corrupt([0, 0, 1], 2)) == {1}


def test_sampling_never_draws_a_class_of_probability_0():
    class ExtremeDraws:
        def random(self, count):
            return np.resize([0.0, np.nextafter(1, 0), 0.5], count)

    table = np.array([[0, 0.5, 0.5, 0], [0, 0, 1, 0], [0.1] * 2 + [0.8, 0], [0, 0, 0, 1]])
    got = sample_transition(np.repeat(np.arange(4), 3), table, ExtremeDraws())
    assert got.tolist() == [1, 2, 2, 2, 2, 2, 0, 2, 2, 3, 3, 3]


def test_estimated_transition_is_normalised_per_clean_class():
    clean, given = np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 1, 1])
    assert estimate_transition(clean, given, 2) == pytest.approx(np.array([[0.75, 0.25], [0, 1]]))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
def test_transition_matrix_is_read_from_npy_npz_and_csv(tmp_path, suffix):
    matrix, path = np.array([[0.9, 0.1], [0.25, 0.75]]), tmp_path / f"matrix{suffix}"
    {".npy": np.save, ".npz": np.savez, ".csv": lambda p, m: np.savetxt(p, m, delimiter=",")}[suffix](path, matrix)
    clean = TEN % 2
    given = TransitionNoise(str(path)).corrupt(clean, 2)
    assert (given == TransitionNoise(matrix.tolist()).corrupt(clean, 2)).all()
    assert share_wrong(given[clean == 0], 0) == pytest.approx(0.1, abs=0.01)
    assert share_wrong(given[clean == 1], 1) == pytest.approx(0.25, abs=0.015)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[1.0, 0.0]], "must be square"),
        ([[1.0, 0.0], [1.0]], "rows of one length"),
        ([[0.5, 0.4], [0, 1]], "sum to 1, got 0.9 in row 0"),
        ([[0.5, 0.499998], [0, 1]], "sum to 1"),
        ([[1.5, -0.5], [0, 1]], "got -0.5 at"),
        ([[math.nan, 1], [0, 1]], "got nan"),
        ([], "must be square"),
    ],
)
def test_invalid_transition_matrices_raise(matrix, message):
    with pytest.raises(ValueError, match=message):
        TransitionNoise(matrix)


def test_invalid_transition_files_raise(tmp_path):
    (tmp_path / "text.csv").write_text("a,b\n0,1\n")
    with pytest.raises(ValueError, match="not a table of numbers"):
        TransitionNoise(str(tmp_path / "text.csv")).corrupt([0, 1], 2)
    np.savez(tmp_path / "two.npz", a=np.eye(2), b=np.eye(2))
    with pytest.raises(ValueError, match=r"must hold one array, got a, b"):
        TransitionNoise(str(tmp_path / "two.npz")).corrupt([0, 1], 2)
    for name in ("none.csv", "none.npy"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            TransitionNoise(name).corrupt([0, 1], 2)
    with pytest.raises(ValueError, match=r"for 2 classes, got a data set of 3"):
        TransitionNoise([[1, 0], [0, 1]]).corrupt([0, 1], 3)
    assert check_transition([[0.5, 0.5000005], [0, 1]]).sum(1) == pytest.approx([1, 1], abs=1e-15)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("kind", [SymmetricNoise, PairFlipNoise, AsymmetricNoise, InstanceDependentNoise])
def test_rates_out_of_range_raise(kind, rate):
    with pytest.raises(ValueError, match=f"rate must be at least 0 and at most 1, got {rate}"):
        kind(rate)


@pytest.mark.parametrize("seed", ["123", -1, 1.5, True])
def test_seeds_other_than_whole_numbers_raise(seed):
    with pytest.raises(ValueError, match=r"seed must be (at least 0|a whole number), got .*: give such a whole number"):
        SymmetricNoise(0.5, "dividemix", seed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SymmetricNoise(0.5, "sometimes"), "kind must be"),
        (lambda: AsymmetricNoise(0.5, "sometimes"), "kind must be"),
        (lambda: AsymmetricNoise(0.5).corrupt([0, 1], 10), "got 10 classes, 0, 1, 2"),
        (lambda: AsymmetricNoise(0.5, "superclass").corrupt([0, 1], CIFAR10_CLASSES), "'superclass' got 10 classes"),
        (lambda: AsymmetricNoise(0.5, "iid").corrupt([0, 1], CIFAR100_CLASSES), "'iid' got 100 classes"),
        (lambda: SymmetricNoise(0.5).corrupt([0, 5], 5), "clean labels must be between 0 and 4, got 5 at position 1"),
        (lambda: SymmetricNoise(0.5).corrupt([0, -1], 5), "clean labels must be between 0 and 4, got -1"),
        (lambda: SymmetricNoise(0.5).corrupt([0.5], 5), "clean labels must hold integers"),
        (lambda: PairFlipNoise(0.5).corrupt([0, 0], 1), "needs 2 classes or more, got 1"),
        (lambda: InstanceDependentNoise(0.5).corrupt([0, 0], 2), "in memory, got NoneType"),
        (lambda: InstanceDependentNoise(0.5).corrupt([0, 0], 2, ["a.png", "b.png"]), "in memory, got list"),
        (lambda: InstanceDependentNoise(0.5).corrupt([0, 0], 2, torch.ones(3, 2)), "3 samples, got 2 labels"),
    ],
)
def test_invalid_kinds_labels_and_images_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class TooLarge(LabelNoise):
    """A user's own noise, which adds ``shift`` to every label."""

    def __init__(self, shift, seed=0):
        self.shift = shift
        super().__init__(seed)

    def draw(self, clean, generator):
        return clean.target + self.shift


def test_labels_of_a_users_own_noise_are_checked():
    assert repr(TooLarge(1)) == "TooLarge(shift=1, seed=0)"
    assert TooLarge(1).corrupt([0, 1], 3).tolist() == [1, 2]
    assert math.isnan(TooLarge(1).nominal_rate)
    with pytest.raises(ValueError, match=r"labels of TooLarge\(shift=2, seed=0\) must be between 0 and 2, got 3"):
        TooLarge(2).corrupt([0, 1], 3)


def test_repr_of_a_long_matrix_is_short_and_depends_on_its_values():
    one, other = (TransitionNoise(m) for m in (np.eye(50).tolist(), np.eye(50)[::-1].tolist()))
    assert len(repr(one)) < 100
    assert repr(one) != repr(other)


MODULES = {
    "digits": lambda **k: DigitsDataModule(**k),
    "cifar10": lambda **k: CIFAR10DataModule("missing", fake=True, **k),
    "fashion_mnist": lambda **k: FashionMNISTDataModule("missing", fake=True, **k),
    "array": lambda **k: ArrayDataModule("missing.npz", fake=True, **k),
    "folder": lambda **k: ImageFolderDataModule("missing", image_size=16, fake=True, **k),
}


@pytest.mark.parametrize("name", MODULES)
def test_data_modules_train_and_validate_on_noisy_labels(name):
    plain, noisy = MODULES[name](), MODULES[name](noise=SymmetricNoise(0.5, "exclusive"))
    assert not plain._ready
    plain.setup("fit")
    noisy.setup("fit")
    assert plain.train_clean is None
    assert torch.equal(noisy.train_clean, plain.train_target)
    assert torch.equal(noisy.test_target, plain.test_target)
    assert noisy.train_target.dtype == torch.int64
    assert 0.4 < share_wrong(noisy.train_target, noisy.train_clean) < 0.6
    assert not noisy.hparams
    # the validation set keeps the given labels, and has its share of each of them
    batch = next(iter(noisy.val_dataloader()))
    assert torch.equal(batch.target, noisy.train_target[batch.index])
    assert share_wrong(noisy.train_target[noisy.val_indices], noisy.train_clean[noisy.val_indices]) > 0.25
    count = np.bincount(noisy.train_target, minlength=10)
    held = np.bincount(noisy.train_target[noisy.val_indices], minlength=10)
    assert np.abs(held - 0.1 * count).max() <= 1


def test_noisy_labels_do_not_depend_on_the_data_modules_seed():
    first = DigitsDataModule(seed=0, noise=SymmetricNoise(0.5), val_fraction=0)
    second = DigitsDataModule(seed=1, noise=SymmetricNoise(0.5), batch_size=7)
    first.setup()
    second.setup()
    assert torch.equal(first.train_target, second.train_target)


@pytest.mark.parametrize(
    "noise",
    [
        *NOISES.values(),
        TransitionNoise("missing.npy"),
        LabelFile("missing.npz"),
        CIFARN("worst"),
    ],
    ids=[*NOISES, "transition_file", "label_file", "human"],
)
def test_noise_on_fake_data_needs_no_files(noise):
    data = CIFAR10DataModule("missing", fake=True, noise=noise)
    data.setup()
    assert 0.1 < share_wrong(data.train_target, data.train_clean) < 0.6
    assert data.noise is noise


def test_fake_cifar100_takes_human_label_noise():
    data = CIFAR100DataModule("missing", fake=True, noise=CIFARN("noisy100"))
    data.setup()
    assert 0.3 < share_wrong(data.train_target, data.train_clean) < 0.5
    coarse = CIFAR100DataModule("missing", "coarse", fake=True, noise=CIFARN("noisy100_coarse"))
    coarse.setup()
    assert 0.15 < share_wrong(coarse.train_target, coarse.train_clean) < 0.4


def test_noise_is_set_on_the_command_line():
    name = "lightning_kd.data.SymmetricNoise"
    args = ["--model", "Classification", "--model.network", "mlp", "--data", "DigitsDataModule"]
    options = ["--data.noise", name, "--data.noise.rate", "0.5", "--data.noise.kind", "dividemix"]
    noise = get_cli([*args, *options, "--data.noise.seed", "123"]).datamodule.noise
    assert repr(noise) == "SymmetricNoise(rate=0.5, kind='dividemix', seed=123)"
    assert get_cli(args).datamodule.noise is None
    noise = get_cli([*args, "--data.noise=TransitionNoise", "--data.noise.matrix=[[1.0, 0.0], [0.5, 0.5]]"])
    assert noise.datamodule.noise.matrix == [[1.0, 0.0], [0.5, 0.5]]


def test_noise_is_set_in_yaml(tmp_path):
    (tmp_path / "noise.yaml").write_text(
        "model: {class_path: Classification, init_args: {network: mlp}}\n"
        "data:\n  class_path: CIFAR10DataModule\n  init_args:\n    fake: true\n    noise:\n"
        "      class_path: lightning_kd.data.CIFARN\n      init_args: {labels: worst}\n"
    )
    data = get_cli(["--config", str(tmp_path / "noise.yaml")]).datamodule
    assert repr(data.noise) == "CIFARN(labels='worst', path=None, synthetic=False, seed=0)"
