import pytest
import torch

from lightning_kd.core import Batch, as_batch

IMAGE, TARGET, INDEX = torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([5, 6])


def test_as_batch_takes_batches_and_tuples_of_two_to_four():
    batch = Batch(IMAGE, TARGET, INDEX, {"a": IMAGE})
    assert as_batch(batch) is batch
    assert as_batch([IMAGE, TARGET])[2:] == (None, {})
    triple = as_batch((IMAGE, TARGET, INDEX))
    assert triple.index is INDEX
    assert as_batch((IMAGE, TARGET, INDEX, {"a": IMAGE})).extras["a"] is IMAGE
    triple.extras["b"] = IMAGE
    assert as_batch((IMAGE, TARGET)).extras == {}  # batches do not share the dictionary


@pytest.mark.parametrize(("wrong", "got"), [(IMAGE, "Tensor of length 2"), ((IMAGE,), "tuple of length 1"), (3, "int")])
def test_other_batch_types_raise_with_their_type(wrong, got):
    with pytest.raises(TypeError, match=f"got {got}: let the loader yield pairs"):
        as_batch(wrong)
