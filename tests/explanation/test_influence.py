"""Which training examples made an output: gradient products by hand, planted labels, neighbours by brute force, and a run's own history."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import Run
from research.core.errors import ConfigError
from research.core.tree import map_paths, paths
from research.data.loader import Loader
from research.explanation import methods
from research.explanation.influence import Influence, answered
from research.explanation.model import Past, examples
from research.explanation.neighbours import Neighbours
from research.figures.explanation import Pictures, Rows


class Source:
    """Examples held in memory."""

    def __init__(self, **fields):
        self.fields = fields

    def __len__(self):
        return len(next(iter(self.fields.values())))

    def take(self, indices):
        return {name: array[indices] for name, array in self.fields.items()}


def images(count, seed=0, classes=5):
    random = np.random.RandomState(seed)
    return {"image": random.standard_normal((count, 8, 8, 1)).astype(np.float32), "label": random.randint(0, classes, count).astype(np.int32)}


def taught(model, source, history):
    """The model with this training split and these checkpoints."""
    return dataclasses.replace(model, data=lambda: types.SimpleNamespace(splits={"train": source}), history=lambda: history)


def moved(params, seed):
    random = np.random.RandomState(seed)
    return map_paths(lambda path, x: x + 0.1 * random.standard_normal(x.shape).astype(np.float32), params)


def asked(model, count=3, seed=9):
    fields = images(count, seed)
    return examples(model, {**fields, "mask": np.ones(count, bool)})


def loss(model, params, batch):
    """The cross-entropy of each example, written anew."""
    outputs, _ = model.objective.predict(params, model.extra, None, batch, None, model.hyper)
    return -jax.nn.log_softmax(outputs["logits"])[jnp.arange(len(batch["label"])), batch["label"]]


def test_the_last_layer_by_hand(model):
    """The gradient of a softmax layer is (p - y) x hidden, and p - y for the bias; 23 examples in chunks of 8, two checkpoints."""
    own, source = model("mlp"), Source(**images(23))
    history = [Past(10, own.params, own.extra, 0.5), Past(20, moved(own.params, 1), own.extra, 0.25)]
    found = asked(own)
    result = Influence(rows=8)(taught(own, source, history), found, jax.random.key(0))
    expected = np.zeros((3, 23))
    last = [name for name in own.taps if name.startswith("hidden")][-1]
    for past in history:
        then = dataclasses.replace(own, params=past.params)

        def error(fields, then=then):
            logits, taps = then.read({**fields, "mask": np.ones(len(fields["label"]), bool)}, [last])
            return np.asarray(jax.nn.softmax(logits)) - np.eye(5)[fields["label"]], np.asarray(taps[last])

        (train, hidden), (test, hidden_test) = error(source.fields), error({name: found.batch[name] for name in ("image", "label")})
        expected += past.rate * (test @ train.T) * (hidden_test @ hidden.T + 1)
    np.testing.assert_allclose(result.kept["influence"], expected, rtol=1e-4, atol=1e-6)
    numbers = result.summary()
    assert numbers["checkpoints"] == [10, 20]
    assert numbers["parameters"] == sum(x.size for path, x in paths(own.params).items() if path.startswith("head/"))
    order = np.argsort(-expected, axis=1)
    assert [row[0] for row in numbers["helpful"]] == order[:, 0].tolist()
    assert [row[0] for row in numbers["harmful"]] == order[:, -1].tolist()
    assert all(isinstance(panel, Pictures) for panel in result.panels(0))
    assert result.panels(0)[1].captions[0].startswith(f"train {order[0, 0]}: {own.name(source.fields['label'][order[0, 0]])}")
    assert result.lines[0].startswith(f"example 0: helped most by train {order[0, 0]}")


@pytest.mark.parametrize("only", [("**",), ("dense_0/*", "head/bias")])
def test_any_parameters_by_explicit_gradients(model, only):
    own, source = model("mlp"), Source(**images(7))
    found = asked(own, 2)
    result = Influence(only=only, rows=4)(taught(own, source, [Past(0, own.params, own.extra, 2.0)]), found, jax.random.key(0))

    def slopes(fields):
        every = jax.jit(jax.jacobian(lambda params: loss(own, params, fields)))(own.params)
        kept = [x.reshape(len(x), -1) for path, x in paths(every).items() if only == ("**",) or path.startswith("dense_0/") or path == "head/bias"]
        return np.concatenate(kept, 1)

    batches = ({name: jnp.asarray(x) for name, x in fields.items()} for fields in (found.batch, source.fields))
    test, train = map(slopes, batches)
    np.testing.assert_allclose(result.kept["influence"], 2.0 * test @ train.T, rtol=1e-4, atol=1e-5)
    assert result.summary()["parameters"] == train.shape[1]


def descent(own, source, steps, rate, batch):
    """(checkpoints before each update, the last parameters) of plain gradient descent."""
    gradient = jax.jit(jax.grad(lambda params, fields: loss(own, params, fields).mean()))
    params, history = own.params, []
    for step in range(steps):
        seen = (np.arange(batch) + step * batch) % len(source)
        history.append(Past(step, params, own.extra, rate, seen))
        params = jax.tree.map(lambda x, g: x - jnp.float32(rate) * g, params, gradient(params, source.take(seen)))
    return history, params


def test_replayed_step_by_step_the_sum_is_the_loss_that_training_took_away(model):
    own, source = model("mlp"), Source(**images(20))
    history, last = descent(own, source, 10, 1e-3, 6)
    history.append(Past(10, last, own.extra, 1e-3))  # no update followed
    found = asked(own)
    result = Influence(form="replay", only=("**",), rows=4)(taught(own, source, history), found, jax.random.key(0))
    fields = {name: jnp.asarray(found.batch[name]) for name in ("image", "label")}
    fell = np.asarray(loss(own, own.params, fields) - loss(own, last, fields))
    np.testing.assert_allclose(result.kept["influence"].sum(1), fell, rtol=0.03, atol=2e-6)
    assert np.abs(fell).min() > 1e-4
    assert result.summary()["checkpoints"] == list(range(10))
    np.testing.assert_array_equal(result.kept["index"], np.arange(20))


def test_planted_duplicates_with_a_wrong_label_are_found(model):
    own, fields = model("mlp"), images(40)
    fields["image"] *= 0.5  # fainter than the copies, so that likeness counts for more than size
    found = asked(own, 2)
    scores = np.array(own.read(found.batch)[0])
    scores[np.arange(2), found.batch["label"]] = -np.inf
    likeliest = scores.argmax(1)  # of the wrong ones: what the model is still inclined to say
    for i, (right, wrong) in enumerate([(4, 11), (23, 30)]):
        fields["image"][[right, wrong]] = found.batch["image"][i]
        fields["label"][right] = found.batch["label"][i]
        fields["label"][wrong] = likeliest[i]
    source = Source(**fields)
    history, _ = descent(own, source, 12, 0.05, 40)
    numbers = Influence(shown=1, only=("**",))(taught(own, source, history[::4]), found, jax.random.key(0)).summary()
    assert numbers["helpful"] == [[4], [23]]
    assert numbers["harmful"] == [[11], [30]]


def test_a_text_has_one_gradient_a_window_and_a_prompt_is_its_own_answer(model, examples_of):
    own = model("gpt")
    random = np.random.RandomState(3)
    tokens = random.randint(0, 11, (9, 9)).astype(np.int32)
    source = Source(tokens=tokens[:, :-1], target=tokens[:, 1:], mask=np.ones((9, 8), bool))
    found = examples_of(own, 2)
    batch = answered(own, found)
    np.testing.assert_array_equal(batch["target"][0, :7], found.batch["tokens"][0, 1:])
    assert batch["target"][0, 7] == found.target[0, 1]  # what is explained follows the last token
    assert batch["target"][1, 5] == found.target[1, 1]
    np.testing.assert_array_equal(batch["mask"], found.mask)
    result = Influence(only=("norm/*",), rows=4)(taught(own, source, [Past(0, own.params, own.extra, 1.0)]), found, jax.random.key(0))

    def mean_loss(params, fields):
        outputs, _ = own.objective.predict(params, own.extra, None, fields, None, own.hyper)
        each = -jnp.take_along_axis(jax.nn.log_softmax(outputs["logits"]), fields["target"][..., None], -1)[..., 0]
        counts = fields["mask"].astype(jnp.float32)
        return (each * counts).sum(1) / counts.sum(1)

    def slopes(fields):
        every = jax.jit(jax.jacobian(lambda norm: mean_loss({**own.params, "norm": norm}, fields)))(own.params["norm"])
        return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(every)], 1)

    test, train = (slopes({name: jnp.asarray(x) for name, x in fields.items()}) for fields in (batch, source.fields | {"index": np.arange(9)}))
    np.testing.assert_allclose(result.kept["influence"], test @ train.T, rtol=1e-4, atol=1e-6)
    assert isinstance(result.panels(0)[0], Rows)
    earlier = dataclasses.replace(found, target=np.array([[2, 1], [2, 1]], np.int32))
    np.testing.assert_array_equal(answered(own, earlier)["mask"].sum(1), [7, 5])  # nothing is known to follow the last token


def test_an_image_without_a_label_takes_what_is_explained(model, examples_of):
    own = model("mlp")
    np.testing.assert_array_equal(answered(own, examples_of(own, 3, target=2))["label"], [2, 2, 2])
    with pytest.raises(ConfigError, match="have no targets: give index=NUMBERS"):
        answered(model("regression"), examples_of(model("regression"), 1))


def test_what_cannot_be_traced_is_refused_in_one_line(model, examples_of):
    own = taught(model("mlp"), Source(**images(5)), [])
    found = examples_of(own, 1)
    with pytest.raises(ConfigError, match=r"method.only='haed/\*' fits no parameter of this model.*head"):
        Influence(only=("haed/*",))(own, found, jax.random.key(0))
    with pytest.raises(ConfigError, match="kept no checkpoint;"):
        Influence()(own, found, jax.random.key(0))
    late = taught(own, Source(**images(5)), [Past(3, own.params, own.extra, 0.1)])
    with pytest.raises(ConfigError, match="kept no checkpoint that an update followed"):
        Influence(form="replay")(late, found, jax.random.key(0))
    assert "train.keep=all" in Influence().fits(dataclasses.replace(own, history=None))
    assert Influence().fits(own) is None
    assert "no training data" in Influence().fits(dataclasses.replace(own, data=None))
    with pytest.raises(ConfigError, match="sample=0 must be at least 1"):
        methods.explain(own, "influence", methods.node("influence", {"sample": 0}), found)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_neighbours_are_those_of_brute_force(distance, model):
    own, fields = model("mlp"), images(21)
    found = asked(own)
    fields["image"][13] = found.batch["image"][1]
    source = Source(**fields)
    result = Neighbours(distance=distance, nearest=5, rows=8)(taught(own, source, None), found, jax.random.key(0))
    last = [name for name in own.taps if name.startswith("hidden")][-1]
    train, test = (np.asarray(own.read({**x, "mask": np.ones(len(x["label"]), bool)}, [last])[1][last], np.float64) for x in (fields, found.batch))
    if distance == "cosine":
        expected = 1 - (test @ train.T) / np.linalg.norm(test, axis=1)[:, None] / np.linalg.norm(train, axis=1)
    else:
        expected = np.linalg.norm(test[:, None] - train, axis=2)
    order = np.argsort(expected, axis=1)[:, :5]
    np.testing.assert_array_equal(result.kept["index"], order)
    np.testing.assert_allclose(result.kept["distance"], np.take_along_axis(expected, order, 1), rtol=1e-3, atol=1e-5)
    assert result.kept["index"][1, 0] == 13
    assert result.summary()["tap"] == last
    assert result.summary()["answers"][1][0] == own.name(fields["label"][13])
    assert len(result.panels(1)[1].images) == 5


def test_neighbours_of_a_text_are_places_in_it(model, examples_of):
    own = model("gpt")
    tokens = np.random.RandomState(3).randint(0, 11, (7, 8)).astype(np.int32)
    mask = np.ones((7, 8), bool)
    mask[6, 3:] = False
    found = examples_of(own, 2, position=3)
    tokens[4, :4] = found.batch["tokens"][0, :4]  # the same context, so the same point
    source = Source(tokens=tokens, target=np.roll(tokens, -1, 1), mask=mask)
    result = Neighbours(distance="euclidean", nearest=50, rows=4)(taught(own, source, None), found, jax.random.key(0))
    assert result.summary()["tap"] == "normalized"
    assert (result.kept["index"][0, 0], result.kept["position"][0, 0]) == (4, 3)
    assert result.kept["distance"][0, 0] < 1e-4
    pairs = list(zip(result.kept["index"][1].tolist(), result.kept["position"][1].tolist(), strict=True))
    assert len(pairs) == len(set(pairs)) == 50
    everywhere = Neighbours(nearest=99, rows=4)(taught(own, source, None), found, jax.random.key(0))
    assert everywhere.kept["index"].shape == (2, 51)  # 6 windows of 8 and one of 3: padding is nobody's neighbour
    letters = "abcdefghijk"
    assert result.panels(0)[0].rows[1][2] == "".join(letters[token] for token in tokens[4, :4])
    with pytest.raises(ConfigError, match="of a text only taps"):
        Neighbours(at="block_0/attention/weights")(taught(own, source, None), found, jax.random.key(0))


def test_a_sample_of_the_training_split_is_drawn_by_the_seed(model):
    own = taught(model("mlp"), Source(**images(30)), None)
    found = asked(own, 1)
    first, again, other = (Neighbours(sample=10, nearest=10)(own, found, jax.random.key(seed)).kept["index"] for seed in (0, 0, 1))
    assert sorted(first[0]) == sorted(again[0]) != sorted(other[0])
    assert len(set(first[0].tolist())) == 10


@pytest.fixture(scope="module")
def kept(command, tmp_path_factory):
    """A run that kept all its checkpoints: 4 updates, of which one is an evaluation each."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    words = (
        "experiment=digits_mlp",
        "train.chunk=1",
        "model.width=16",
        "model.depth=1",
        "schedule=cosine",
        "schedule.warmup=1",
        "train.keep=all",
        "train.steps=4",
    )
    quiet = ("train.eval_every=1", "logger.figures=false", "logger.tensorboard=false", "logger.progress=none", "logger.sample=false")
    told = command("train", *words, *quiet, "train.epochs=null", "train.log_every=1", f"run_dir={folder}")
    assert told.code == 0, told.err
    return folder


def test_a_run_s_history_is_what_its_training_was(kept):
    run = Run(kept)
    history = run.history()
    assert [past.step for past in history] == [1, 2, 3, 4]
    rates = {record["step"]: record["learning_rate"] for record in run.metrics() if "learning_rate" in record}
    loader = Loader(run.dataset().split("train"), run.config.data.batch, seed=run.config.seed)
    for past in history[:-1]:
        assert past.rate == pytest.approx(rates[past.step + 1], rel=1e-6)  # the record of the next step tells its rate
        np.testing.assert_array_equal(past.seen, loader.indices(past.step))
        jax.tree.map(np.testing.assert_array_equal, past.params, run.state(past.step).params)
    assert history[-1].seen is None
    assert len(history[1:3]) == 2


def test_the_command_tells_who_helped_and_who_harmed(kept, command, tmp_path):
    told = command("explain", f"run={kept}", "method=[influence,neighbours]", "index=0,3", f"out={tmp_path}")
    assert told.code == 0, told.err
    assert "helped most by train" in told.out
    found = json.loads((tmp_path / "explanation.json").read_text())
    influence, near = found["methods"]
    assert influence["checkpoints"] == [1, 2, 3, 4]
    assert all(influence["helpful"])
    assert len(near["neighbours"][1]) == 8
    assert {"influence_0.png", "influence_1.png", "neighbours_0.png", "influence.npz"} <= {path.name for path in tmp_path.iterdir()}


def test_a_run_that_kept_nothing_is_told_what_to_do(parent, command):
    told = command("explain", f"run={parent('mlp')}", "method=influence", "index=0")
    assert told.code == 2
    assert len(told.err) == 1
    assert "train it with train.keep=all or train.keep=every:N" in told.err[0]


def test_a_form_and_a_distance_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="form='reply'; did you mean 'replay'"):
        Influence(form="reply")
    with pytest.raises(ValueError, match="distance='manhattan': choose from: cosine, euclidean"):
        Neighbours(distance="manhattan")
