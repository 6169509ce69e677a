import numpy as np
import pytest

from research.core.errors import ConfigError, DataError
from research.data.split import cut, draw, sizes


def test_shares_are_rounded_up_and_rows_are_taken_as_they_are():
    assert sizes(1797, validation=0.1, test=0.2) == {"train": 1257, "validation": 180, "test": 360}
    assert sizes(30, validation=0.1, test=7) == {"train": 20, "validation": 3, "test": 7}
    assert sizes(5, validation=0, test=0.0) == {"train": 5}


def test_drawn_parts_cover_all_rows_without_overlap_and_follow_the_seed():
    parts = draw(100, 0, validation=0.1, test=0.2)
    assert list(parts) == ["train", "validation", "test"]
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(100))
    assert (parts["test"] == draw(100, 0, validation=30, test=0.2)["test"]).all()  # the test set stays when validation grows
    assert (parts["test"] != draw(100, 1, validation=0.1, test=0.2)["test"]).any()


def test_a_text_is_cut_as_nanogpt_cuts_it():
    assert cut(1115394, validation=0.1, test=0.0) == {"train": slice(0, int(0.9 * 1115394)), "validation": slice(1003854, 1115394)}


@pytest.mark.parametrize(("parts", "words"), [({"validation": 2000}, ["2000", "1797"]), ({"validation": 0.5, "test": 0.5}, ["899", "1797"])])
def test_parts_that_leave_nothing_to_train_on_are_refused_with_the_numbers(parts, words):
    with pytest.raises(ConfigError) as error:
        sizes(1797, **parts)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("part", [-1, -0.1, 1.5])
def test_a_part_that_is_no_share_is_refused(part):
    with pytest.raises(ConfigError, match=rf"data.validation={part}"):
        sizes(10, validation=part)


def test_no_rows_at_all_are_refused():
    with pytest.raises(DataError, match=r"no rows"):
        sizes(0, validation=0.1)


def test_folds_share_the_rows_that_the_test_set_leaves():
    folds = [draw(103, 0, validation=f"{i}/4", test=0.2) for i in range(4)]
    plain = draw(103, 0, validation=0, test=0.2)
    assert sorted(np.concatenate([fold["validation"] for fold in folds]).tolist()) == plain["train"].tolist()
    for fold in folds:
        assert list(fold) == ["train", "validation", "test"]
        assert fold["test"].tolist() == plain["test"].tolist()
        assert sorted(np.concatenate(list(fold.values())).tolist()) == list(range(103))
        assert len(fold["validation"]) in (20, 21)


@pytest.mark.parametrize("part", ["4/4", "-1/4", "1/1", "a/b", "0.5"])
def test_a_fold_that_is_none_is_refused(part):
    with pytest.raises(ConfigError, match=rf"data.validation='{part}': must be a number of rows, a share in \[0, 1\), or I/N"):
        draw(100, 0, validation=part, test=0.2)


def test_folds_of_a_text_or_of_too_few_rows_are_refused():
    with pytest.raises(ConfigError, match="would tear these rows apart"):
        cut(100, validation="0/4")
    with pytest.raises(ConfigError, match="3 rows cannot be cut into 5 folds"):
        draw(3, 0, validation="4/5")
