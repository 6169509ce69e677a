import jax
import numpy as np
import pytest
from omegaconf import OmegaConf

from research.core.errors import DataError
from research.core.spec import abstract_batch, check_spec, fields


def test_an_abstract_batch_has_the_shapes_of_the_spec():
    spec = {"fields": fields(mask=(7,), tokens=((7,), "int32"), image=((2, 3, 1), "float32"))}
    assert abstract_batch(spec, 4) == {
        "tokens": jax.ShapeDtypeStruct((4, 7), np.int32),
        "image": jax.ShapeDtypeStruct((4, 2, 3, 1), np.float32),
        "mask": jax.ShapeDtypeStruct((4, 7), np.bool_),
        "index": jax.ShapeDtypeStruct((4,), np.int32),
    }


def test_a_declared_spec_may_leave_keys_open_and_be_a_config_node():
    check_spec(OmegaConf.create({"image": [8, 8, 1], "classes": 10}), {"image": [8, 8, 1], "classes": 10, "outputs": 10})


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"classes": 11}, ["data.spec.classes=11", "classes=10"]),
        ({"image": [8, 8, 3]}, ["data.spec.image=[8, 8, 3]", "image=[8, 8, 1]"]),
        ({"examples": {"train": 5}}, ["data.spec.examples.train=5", "train=7"]),
        ({"vocabulary": 65}, ["data.spec.vocabulary=65", "no such entry"]),
    ],
)
def test_a_spec_that_differs_is_refused_with_the_key_and_both_values(declared, words):
    with pytest.raises(DataError) as error:
        check_spec(declared, {"classes": 10, "image": [8, 8, 1], "examples": {"train": 7}})
    assert all(word in str(error.value) for word in words)
