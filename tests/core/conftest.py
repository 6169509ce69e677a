import pytest

from research.core import folder

FILES = {
    "base.yaml": (folder.conf() / "base.yaml").read_text(),
    "train.yaml": """
defaults: [base, {model: small}, {optimizer: sgd}, {debug: default}, _self_, {experiment: null}]
seed: 0
name: ${hydra:runtime.choices.model}_${hydra:runtime.choices.optimizer}
train: {_target_: research.training.loop.Settings, steps: 10, values: [optimizer.learning_rate]}
objective: {_target_: research.objectives.classify.Classify, module: "${model}", label_smoothing: 0.1}
filled: {}
note: null
prompt: null
""",
    "evaluate.yaml": "defaults: [base, {debug: default}, _self_]\nrun: ???\n",
    "debug/default.yaml": "traceback: false\nnans: false\ndisable_jit: false\ncpu_devices: null\n",
    "model/small.yaml": "_target_: research.models.mlp.MLP\nwidth: [8, 8]\ndropout: 0.2\n",
    "model/large.yaml": "_target_: research.models.mlp.MLP\nwidth: [64, 64]\ndropout: 0.5\n",
    "optimizer/sgd.yaml": "_target_: optax.sgd\nlearning_rate: 0.1\n",
    "experiment/good.yaml": "# @package _global_\ndefaults: [{override /model: large}]\ntrain: {steps: 20}\nfilled: {anything: 1}\n",
    "experiment/stray.yaml": "# @package _global_\nsede: 3\n",
    "experiment/lost.yaml": "# @package _global_\ndefaults: [{override /model: larg}]\n",
    "experiment/wrong.yaml": "# @package _global_\ndefaults: {override /model: large}\n",
    "experiment/broken.yaml": "# @package _global_\nseed: [1\n",
}


@pytest.fixture(scope="session")
def conf(tmp_path_factory):
    """A folder of small configs with the shape of the real ones."""
    folder = tmp_path_factory.mktemp("some folder ü") / "conf"
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)
