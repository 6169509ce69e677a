from omegaconf import OmegaConf

from research.core.nodes import below_call, descend, leaves, near, paths, plain

TREE = {"train": {"steps": 1, "epochs": 2}, "model": {"_target_": "x", "width": [3, {"a": 4}], "empty": {}}}


def test_plain_keeps_interpolations_and_leaves_out_hydra():
    assert plain(OmegaConf.create({"a": "${b}", "b": [1], "hydra": {"c": 1}})) == {"a": "${b}", "b": [1]}


def test_paths_and_leaves():
    assert list(paths(TREE)) == ["train", "train.steps", "train.epochs", "model", "model._target_", "model.width", "model.empty"]
    assert list(leaves(TREE["model"])) == [("_target_", "x"), ("width.0", 3), ("width.1.a", 4), ("empty", {})]


def test_descend_stops_where_the_path_leaves_the_tree():
    assert descend(TREE, "train.steps") == (1, [])
    assert descend(TREE, "model.width[1].a") == (4, [])
    assert descend(TREE, "model.width.1.a") == (4, [])
    assert descend(TREE, "model.width.2.a") == ([3, {"a": 4}], ["2", "a"])
    assert descend(TREE, "train.steps.more") == (1, ["more"])
    assert descend(TREE, "") == (TREE, [])


def test_near_knows_the_whole_tree_but_never_names_the_way_there():
    assert near("train.stesp", TREE) == "; did you mean 'train.steps'?"
    assert near("steps", TREE) == "; choose from: model, train"
    assert near("trian.steps", TREE) == "; did you mean 'train.steps'?"
    assert near("train.xyz", TREE) == "; choose from: epochs, steps"
    assert near("train.spochs", {"train": {"steps": 1}}) == "; choose from: steps"  # much of the path alone makes no likeness
    assert near("a.b", {"a": 1}) == ""


def test_below_call():
    assert below_call(TREE, "model.depth")
    assert below_call(TREE, "model.empty.x")
    assert not below_call(TREE, "train.depth")
    assert not below_call(TREE, "model")
