"""The pool: known classes, labelled samples, answers of the oracle, and what a strategy may see."""

from collections.abc import Mapping
from types import FunctionType, MethodType, ModuleType, NoneType

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_kd.data import (
    ArrayDataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    ImageFolderDataModule,
    OpenSetDataModule,
    SymmetricNoise,
)
from lightning_kd.pool import PoolRecord


def digits(**kwargs):
    return DigitsDataModule(**{"val_fraction": 0.0, **kwargs})


def pool_of(source=None, **kwargs):
    given = {"known_classes": 4, "initial_count": 40, "budget": 30, "rounds": 3, **kwargs}
    return OpenSetDataModule(source or digits(), **given)


def ready(*args, **kwargs):
    data = pool_of(*args, **kwargs)
    data.setup()
    return data


def check_partition(data):
    parts = [data.known_indices, data.unknown_indices, data.unlabelled_indices]
    joint = np.concatenate(parts)
    assert np.array_equal(np.sort(joint), data.source.train_indices)
    target = data.train_target.numpy()
    assert ((target[parts[0]] >= 0) & (target[parts[0]] < data.num_classes)).all()
    assert (target[parts[1]] == data.num_classes).all()
    assert (target[parts[2]] == -1).all()


@pytest.mark.parametrize(
    ("known", "order", "ids"),
    [
        (4, "first", [0, 1, 2, 3]),
        (3, [8, 2, 7, 4, 3], [2, 7, 8]),
        ([5, 1], "first", [1, 5]),
        (["9", 0, "4"], "first", [0, 4, 9]),
        (10, "first", list(range(10))),
    ],
)
def test_known_classes_are_chosen_by_number_order_or_name(known, order, ids):
    data = ready(known_classes=known, class_order=order, initial_count=150)
    assert data.known_ids == ids
    assert data.num_classes == len(ids)
    assert data.class_names == [str(c) for c in ids]
    original = digits()
    original.setup()
    truth = original.train_target.numpy()[data.known_indices]
    assert np.array_equal(np.array(ids)[data.train_target.numpy()[data.known_indices]], truth)


def test_class_order_is_read_from_a_file(tmp_path):
    (tmp_path / "wnids.txt").write_text("7\n2\r\n\n9\n0\n", encoding="utf-8")
    assert pool_of(known_classes=3, class_order=str(tmp_path / "wnids.txt")).known_ids == [2, 7, 9]
    assert pool_of(known_classes=2, class_order=["7", 2]).known_ids == [2, 7]
    # a list of known classes ignores the file, so that it can replace the number in a config with a file
    assert pool_of(known_classes=["7", 1], class_order=str(tmp_path / "wnids.txt")).known_ids == [1, 7]
    with pytest.raises(ValueError, match="class_order names 4 classes, fewer than known_classes=5"):
        pool_of(known_classes=5, class_order=str(tmp_path / "wnids.txt"))


def test_class_order_file_is_found_in_the_image_folder(tmp_path):
    names = ["n02124075", "n04067472", "n04540053", "n04099969", "n07749582"]
    for name in names:
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "wnids.txt").write_text("\n".join(names))
    source = ImageFolderDataModule(str(tmp_path), image_size=8)
    data = OpenSetDataModule(source, known_classes=3, class_order="wnids.txt", initial_count=3)
    assert data.class_names == sorted(names[:3])
    made_up = ImageFolderDataModule("nowhere", image_size=8, fake=True)
    assert OpenSetDataModule(
        made_up, known_classes=3, class_order="wnids.txt", initial_count=9, fake=True
    ).known_ids == [
        0,
        1,
        2,
    ]


def test_random_classes_follow_the_split_seed():
    chosen = [pool_of(class_order="random", split_seed=seed).known_ids for seed in (0, 0, 1, 2)]
    assert chosen[0] == chosen[1]
    assert len({tuple(ids) for ids in chosen}) == 3


def test_pool_has_the_sizes_of_the_cifar100_protocol():
    class Fifty(CIFAR100DataModule):
        def load_arrays(self):
            arrays = self.fake_arrays()
            return arrays._replace(
                train_image=torch.zeros(50_000, 3, 1, 1, dtype=torch.uint8).expand(-1, -1, 32, 32),
                train_target=torch.arange(50_000) % 100,
                test_image=torch.zeros(10_000, 3, 1, 1, dtype=torch.uint8).expand(-1, -1, 32, 32),
                test_target=torch.arange(10_000) % 100,
            )

    data = OpenSetDataModule(Fifty(val_fraction=0.0), 20, initial_fraction=0.08)
    data.setup()
    assert (len(data.known_indices), len(data.unlabelled_indices)) == (800, 49_200)
    assert len(data.test_indices) == 2000
    assert data.known_total == 10_000
    check_partition(data)


def test_split_is_seeded_and_not_stratified():
    a, b, c = (ready(split_seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(a.known_indices, b.known_indices)
    assert not np.array_equal(a.known_indices, c.known_indices)
    assert len(set(np.bincount(a.train_target.numpy()[a.known_indices]))) > 1


def test_loaders_hide_the_labels_of_unlabelled_samples():
    data = ready()
    labelled = [batch.target for batch in data.loader("train")]
    assert len(torch.cat(labelled)) == 40
    assert int(torch.cat(labelled).max()) < 4
    hidden = torch.cat([batch.target for batch in data.loader("train", data.unlabelled_indices)])
    assert (hidden == -1).all()
    for name in ("test", "train"):
        targets = torch.cat([batch.target for batch in data.loader(name)])
        assert int(targets.max()) == 3
    assert len(data.predict_dataloader().sampler.indices) == len(data.unlabelled_indices)


def test_validation_samples_are_of_known_classes_and_not_in_the_pool():
    data = ready(digits(val_fraction=0.2))
    targets = torch.cat([batch.target for batch in data.val_dataloader()])
    assert sorted(set(targets.tolist())) == [0, 1, 2, 3]
    assert not np.isin(data.val_indices, data.unlabelled_indices).any()
    check_partition(data)


def record_with_answers(data, tmp_path, indices):
    record = PoolRecord(tmp_path / "pool.json")
    data.set_record(record)
    record.add_query(indices, np.zeros(len(indices)), ["0"] * len(indices))
    names = [*data.class_names, "unknown"]
    record.add_answers({int(i): names[a] for i, a in zip(indices, data.oracle(indices), strict=True)}, "oracle")
    record.save()
    return record


def test_answers_move_samples_out_of_the_pool(tmp_path):
    data = ready()
    before = len(data.unlabelled_indices)
    asked = data.unlabelled_indices[::7]
    record = record_with_answers(data, tmp_path, asked)
    data.set_record(record)
    check_partition(data)
    assert len(data.unlabelled_indices) == before - len(asked)
    truth = data.oracle(asked)
    assert np.array_equal(data.train_target.numpy()[asked], truth)
    assert data.precision == (truth < 4).mean()
    assert data.round == 1
    again = ready()
    again.set_record(PoolRecord.load(tmp_path / "pool.json"))
    assert np.array_equal(again.known_indices, data.known_indices)


def test_another_record_removes_the_answers_of_the_first(tmp_path):
    data = ready()
    before = data.unlabelled_indices
    data.set_record(record_with_answers(data, tmp_path, before[::7]))
    data.set_record(PoolRecord(tmp_path / "another.json"))
    check_partition(data)
    assert data.unlabelled_indices.tolist() == before.tolist()


def test_query_without_an_answer_adds_no_label(tmp_path):
    data = ready()
    record = PoolRecord(tmp_path / "pool.json")
    record.add_query([int(data.unlabelled_indices[0])], [0.0], ["0"])
    data.set_record(record)
    assert len(data.known_indices) == 40
    assert data.precision == 0


@pytest.mark.parametrize("change", [{"split_seed": 1}, {"known_classes": 5}, {"initial_count": 41}])
def test_record_of_another_pool_raises(tmp_path, change):
    record_with_answers(ready(), tmp_path, np.array([0]))
    with pytest.raises(ValueError, match=r"pool.json was begun with"):
        ready(**change).set_record(PoolRecord.load(tmp_path / "pool.json"))


def reachable_from(value, seen=None):
    """Everything that can be reached from a value, through attributes, items, arguments kept by functions and bases."""
    seen = {} if seen is None else seen
    if id(value) in seen or isinstance(value, str | bytes | type | ModuleType | NoneType):
        return seen
    seen[id(value)] = value
    if isinstance(value, Mapping):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        parts = [*value]
    elif isinstance(value, FunctionType):
        parts = [cell.cell_contents for cell in value.__closure__ or ()]
    elif isinstance(value, MethodType):
        parts = [value.__self__, value.__func__]
    else:
        parts = [value.base] if isinstance(value, np.ndarray) else []
    for part in [*parts, *vars(value).values()] if hasattr(value, "__dict__") else parts:
        reachable_from(part, seen)
    return seen


def holds_hidden_labels(view, data):
    """Whether the true labels of all samples, or those of the unlabelled ones, can be reached from a view."""
    indices = data.unlabelled_indices
    hidden = data.oracle(indices)
    for value in [*reachable_from(view).values()]:
        if isinstance(value, np.ndarray | torch.Tensor | list) and len(flat := np.ravel(np.asarray(value))):
            if len(flat) == len(hidden) and np.array_equal(flat, hidden):
                return True
            if len(flat) > indices.max() and np.array_equal(flat[indices], hidden):
                return True
    return False


def test_strategy_view_is_a_copy_and_reaches_no_hidden_label(tmp_path):
    data = ready()
    data.set_record(record_with_answers(data, tmp_path, data.unlabelled_indices[::7]))
    view = data.view()
    assert np.array_equal(view.known_target, data.train_target.numpy()[data.known_indices])
    assert not holds_hidden_labels(view, data)
    scores = {"feature": torch.zeros(len(view.known), 2)}
    assert not holds_hidden_labels(data.view(labelled_scores=scores), data)
    for array in (view.unlabelled, view.known, view.known_target, view.unknown):  # a strategy may change its view
        assert array.any()
        array[:] = 0
    for array in (data.unlabelled_indices, data.known_indices, data.unknown_indices):
        assert array.any()
    assert data.train_target.numpy()[data.known_indices].any()


@pytest.mark.parametrize(
    "leak",
    [
        lambda data: data._truth,
        lambda data: torch.from_numpy(data._truth),
        lambda data: data._truth[:-1],
        lambda data: data.oracle(data.unlabelled_indices).tolist(),
        lambda data: {"deep": [(data,)]},
        lambda data: data.oracle,
        lambda data: lambda: data,
    ],
    ids=["array", "tensor", "part", "list", "data", "method", "closure"],
)
def test_search_for_hidden_labels_finds_them_in_a_view(leak):
    data = ready()
    assert holds_hidden_labels(data.view(labelled_scores={"leak": leak(data)}), data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"known_classes": 1}, "known_classes must be at least 2 and at most 10, got 1"),
        ({"known_classes": 11}, "known_classes must be at least 2 and at most 10, got 11: the source has 10 classes"),
        ({"known_classes": None}, "known_classes must be given"),
        ({"known_classes": [1, 1]}, "known_classes holds class 1 more than once"),
        ({"known_classes": [0, 10]}, "known_classes holds 10"),
        ({"known_classes": [0, -1]}, "known_classes holds -1"),
        ({"known_classes": ["0", "ten"]}, "known_classes holds 'ten'"),
        ({"known_classes": [0, 1], "class_order": "random"}, "class_order needs known_classes to be a number"),
        ({"known_classes": [0, 1], "class_order": [2, 1]}, "class_order needs known_classes to be a number"),
        ({"class_order": "last"}, "class_order must be"),
        ({"class_order": [1, 2, 1, 3]}, "class_order holds class 1 more than once"),
        ({"class_order": [1, 2]}, "class_order names 2 classes"),
        ({"class_order": ["1", "ten"]}, "class_order holds 'ten', which is no class of the source"),
        ({"budget": 0}, "budget must be at least 1"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"budget": 2000}, "budget=2000 is more than the"),
        ({"initial_count": None}, "give one of them"),
        ({"initial_fraction": 0.1}, "give one of them"),
        ({"initial_count": None, "initial_fraction": 1.5}, "initial_fraction must be above 0"),
        ({"initial_count": None, "initial_fraction": 0.0001}, "initial_fraction=0.0001"),
        ({"initial_count": 5000}, "initial_count=5000"),
        ({"initial_count": 3}, "has none of class"),
        ({"pool": "x"}, "are for a source without pool"),
        ({"source": digits(noise=SymmetricNoise(0.2))}, "source must have no noise"),
    ],
)
def test_invalid_arguments_raise(change, message):
    with pytest.raises(ValueError, match=message):
        ready(**change)


def test_class_named_unknown_raises(tmp_path):
    np.savez(tmp_path / "a.npz", feature=np.zeros((20, 3), np.float32), target=np.arange(20) % 2)
    with pytest.raises(ValueError, match="may not be named 'unknown'"):
        pool_of(ArrayDataModule(str(tmp_path / "a.npz"), class_names=["known", "unknown"]), known_classes=2)


def test_pool_of_a_million_samples_takes_answers(tmp_path):
    features = np.zeros((1_000_000, 1), np.float32)
    np.savez(tmp_path / "a.npz", train_feature=features, train_target=np.arange(1_000_000) % 10,
             test_feature=features[:10], test_target=np.arange(10))  # fmt: skip
    data = ready(ArrayDataModule(str(tmp_path / "a.npz"), val_fraction=0.0), initial_fraction=0.01, initial_count=None)
    asked = data.unlabelled_indices[:10_000]
    data.set_record(record_with_answers(data, tmp_path, asked))
    check_partition(data)


# -- a user's own pool, without true labels --------------------------------------------------------------------------


@pytest.fixture
def project_folder(tmp_path):
    generator = np.random.default_rng(0)

    def save(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (10, 10, 3), dtype=np.uint8)).save(path)

    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for k in range(3):
                save(tmp_path / split / name / f"{k}.png")
    for k in range(6):
        save(tmp_path / "web" / f"{k % 2}" / f"{k}.png")
    return tmp_path


def data_of_project(project_folder, **kwargs):
    source = ImageFolderDataModule(str(project_folder), image_size=8, val_fraction=0.0)
    data = OpenSetDataModule(source, pool=str(project_folder / "web"), budget=2, **kwargs)
    data.setup()
    return data


def test_folder_pool_has_unlabelled_samples_and_no_oracle(project_folder):
    data = data_of_project(project_folder)
    assert data.class_names == ["cat", "dog"]
    assert (len(data.known_indices), len(data.unlabelled_indices)) == (6, 6)
    assert [data.path_of(i) for i in data.unlabelled_indices[:2]] == ["0/0.png", "0/2.png"]
    batches = list(data.loader("train", data.unlabelled_indices))
    assert sum(len(batch.image) for batch in batches) == 6
    with pytest.raises(ValueError, match="no true labels for an oracle"):
        data.oracle(np.array([0]))


def test_answers_stay_with_their_files_when_files_are_added_or_removed(project_folder):
    data = data_of_project(project_folder)
    record = PoolRecord(project_folder / "pool.json")
    data.set_record(record)
    asked = data.unlabelled_indices[[1, 4]]
    record.add_query(asked, [0.0, 0.0], ["cat", "cat"], [data.path_of(i) for i in asked])
    record.add_answers({int(asked[0]): "dog", int(asked[1]): "unknown"}, "person")
    record.save()
    (project_folder / "web/0/0.png").rename(project_folder / "web/a.png")
    Image.new("RGB", (9, 9)).save(project_folder / "web/0/1.png")
    again = data_of_project(project_folder)
    again.set_record(PoolRecord.load(project_folder / "pool.json"))
    labelled = {again.path_of(i): int(again.train_target[i]) for i in [*again.known_indices, *again.unknown_indices]}
    assert {path: t for path, t in labelled.items() if path[1] == "/"} == {"0/2.png": 1, "1/3.png": 2}
    assert len(again.unlabelled_indices) == 5
    (project_folder / "web/0/2.png").unlink()
    assert not np.array_equal(again._digest(), data_of_project(project_folder)._digest())
    with pytest.warns(UserWarning, match="1 queried images are no longer"):
        data_of_project(project_folder).set_record(PoolRecord.load(project_folder / "pool.json"))


def test_array_pool_has_unlabelled_samples_shaped_as_the_source(tmp_path):
    generator = np.random.default_rng(0)
    feature = generator.normal(size=(40, 5)).astype(np.float32)
    np.savez(tmp_path / "known.npz", feature=feature, target=np.arange(40) % 4)
    np.save(tmp_path / "pool.npy", feature[:30] + 1)
    source = ArrayDataModule(str(tmp_path / "known.npz"), val_fraction=0.0)
    data = OpenSetDataModule(source, known_classes=3, pool=str(tmp_path / "pool.npy"), budget=5)
    data.setup()
    assert len(data.unlabelled_indices) == 30
    assert len(data.unknown_indices) == 8  # the labelled samples of the class that is not known
    check_set = np.concatenate([data.known_indices, data.unknown_indices, data.unlabelled_indices])
    assert len(np.unique(check_set)) == 32 + 30
    np.save(tmp_path / "pool.npy", feature[:, :3])
    with pytest.raises(ValueError, match="must be like those of the source"):
        OpenSetDataModule(ArrayDataModule(str(tmp_path / "known.npz")), pool=str(tmp_path / "pool.npy")).setup()


def test_record_of_another_array_pool_raises(tmp_path):
    feature = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    np.savez(tmp_path / "known.npz", feature=feature, target=np.arange(40) % 4)

    def made(pool):
        np.save(tmp_path / "pool.npy", pool)
        source = ArrayDataModule(str(tmp_path / "known.npz"), val_fraction=0.0)
        data = OpenSetDataModule(source, pool=str(tmp_path / "pool.npy"), budget=5)
        data.setup()
        return data

    data = made(feature[:30] + 1)
    record = PoolRecord(tmp_path / "pool.json")
    data.set_record(record)
    record.add_query(data.unlabelled_indices[:1], [0.0], ["0"])
    record.save()
    with pytest.raises(ValueError, match="begun with pool_sha256"):
        made(feature[:30][::-1] + 1).set_record(PoolRecord.load(tmp_path / "pool.json"))


def test_new_pool_files_do_not_change_the_state_of_checkpoints(project_folder):
    data = data_of_project(project_folder)
    before = data.state_dict()
    Image.new("RGB", (9, 9)).save(project_folder / "web/0/0a.png")
    again = data_of_project(project_folder)
    assert len(again.unlabelled_indices) == 7
    assert again.state_dict() == before


def test_pool_inside_the_class_folders_raises(project_folder):
    source = ImageFolderDataModule(str(project_folder / "train"), image_size=8, val_fraction=0.0)
    with pytest.raises(ValueError, match="keep the pool outside"):
        OpenSetDataModule(source, pool=str(project_folder / "train/cat"), budget=1).setup()


def test_pools_can_share_a_source_and_setup_works_after_an_error():
    source = digits()
    source.setup()
    one, other = ready(source), ready(source, known_classes=[7, 8, 9])
    again = ready(source)
    assert np.array_equal(one.known_indices, again.known_indices)
    assert np.array_equal(one.train_target, again.train_target)
    assert one.known_total == again.known_total != other.known_total
    assert int(source.train_target.max()) == 9
    data = pool_of(budget=5000)
    for _ in range(2):
        with pytest.raises(ValueError, match="budget=5000 is more than the 1398 samples"):
            data.setup()
    data.budget = 30
    data.setup()
    assert np.array_equal(data.known_indices, one.known_indices)


def test_fake_pools_hold_their_budget(project_folder):
    for data in (
        ready(digits(), fake=True, budget=1500),
        ready(CIFAR100DataModule(), fake=True, initial_count=None, initial_fraction=0.08),
    ):
        assert data.budget <= len(data.unlabelled_indices)
        assert np.bincount(data.train_target.numpy()[data.known_indices]).tolist() == [2] * 4
    data = OpenSetDataModule(ImageFolderDataModule(str(project_folder)), pool="none", fake=True)
    data.setup()
    assert len(data.unlabelled_indices) > data.budget
