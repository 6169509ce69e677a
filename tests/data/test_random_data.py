import numpy as np
import pytest

from research.core.config import compose
from research.core.errors import ConfigError
from research.core.spec import check_spec
from research.data.random_data import random_data


@pytest.mark.parametrize(
    ("data", "field", "shape"), [("mnist", "image", (28, 28, 1)), ("cifar10", "image", (32, 32, 3)), ("shakespeare", "tokens", (64,))]
)
def test_shapes_are_those_that_the_config_declares(data, field, shape):
    node = compose([f"data={data}"]).data
    dataset = random_data(node)
    check_spec(node.spec, dataset.spec)
    batch = dataset.split("train").take(np.arange(3))
    assert batch[field].shape == (3, *shape)
    dataset.split("train").check(dataset.spec, "train")


def test_text_has_as_many_characters_as_tiny_shakespeare():
    dataset = random_data({"spec": {"time": 16}})
    assert dataset.spec["vocabulary"] == 65
    assert len(np.unique(dataset.split("train").take(np.arange(1000))["tokens"])) == 65


def test_a_spec_that_says_too_little_is_refused():
    with pytest.raises(ConfigError, match="cannot stand in"):
        random_data({"spec": {"features": 3}})
