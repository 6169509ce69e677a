"""Attributions by Captum, lime and shap, for test_perturbation.py, test_lime.py and test_shapley.py: writes perturbation.npz beside it.

`PYTHONPATH=FOLDER_OF_THE_PACKAGES python tests/explanation/references/perturbation.py`, with captum 0.9, lime 0.2.0.1, shap 0.51 and torch;
none of them runs in the tests.

The networks are those of tests/explanation/conftest.py: "cnn", with the weights of gradient.npz beside this, and "regression", 6 columns and 16
ReLU units, with weights drawn here.
"""

from pathlib import Path

import numpy as np
import shap
import torch
from captum.attr import FeatureAblation, Occlusion
from gradient import CNN
from lime.lime_tabular import LimeTabularExplainer
from torch import nn

HERE = Path(__file__).parent
SEEDS, SAMPLES = 20, 2000  # of lime


def captum() -> dict[str, np.ndarray]:
    """Occlusion by two windows, and ablation of the cells of a grid."""
    network = CNN().eval()
    with np.load(HERE / "gradient.npz") as file:
        kept = {name.removeprefix("cnn/"): file[name] for name in file if name.startswith("cnn/")}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            kernel = kept[f"params/{name.replace('.', '_')}/kernel"]
            module.weight.data = torch.tensor(np.ascontiguousarray(kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)))
            module.bias.data = torch.tensor(kept[f"params/{name.replace('.', '_')}/bias"])
    x = torch.tensor(np.ascontiguousarray(kept["image"].transpose(0, 3, 1, 2)))
    target = torch.tensor(kept["target"], dtype=torch.int64)
    cells = torch.arange(64).reshape(8, 8) // 4 % 2 + torch.arange(8)[:, None] // 4 * 2  # four quarters
    with torch.no_grad():
        found = {
            "square": Occlusion(network).attribute(x, (1, 3, 3), target=target, baselines=0.0),
            "wide": Occlusion(network).attribute(x, (1, 3, 5), strides=(1, 2, 4), target=target, baselines=0.4),
            "ablation": FeatureAblation(network).attribute(x, target=target, baselines=0.4, feature_mask=cells[None, None]),
        }
    return {f"captum/{name}": value.numpy()[:, 0] for name, value in found.items()}


def table() -> dict[str, np.ndarray]:
    """Slopes by lime, one row a seed, and Shapley values over a background of five rows by shap."""
    random = np.random.RandomState(3)
    hidden, bias = (random.standard_normal((6, 16)) / 6**0.5).astype(np.float32), (0.2 * random.standard_normal(16)).astype(np.float32)
    head = (random.standard_normal((16, 2)) / 4).astype(np.float32)
    row, background = random.standard_normal(6).astype(np.float32), random.standard_normal((5, 6)).astype(np.float32)
    training = random.standard_normal((400, 6))
    training = (training - training.mean(0)) / training.std(0)

    def predict(x: np.ndarray) -> np.ndarray:
        return (np.maximum(x @ hidden + bias, 0.0) @ head)[:, 1]

    slopes, fits = [], []
    for seed in range(SEEDS):
        explainer = LimeTabularExplainer(
            training, mode="regression", discretize_continuous=False, sample_around_instance=True, feature_selection="none", random_state=seed
        )
        found = explainer.explain_instance(row.astype(np.float64), predict, num_features=6, num_samples=SAMPLES)
        label = next(iter(found.local_exp))
        slopes.append([value for _, value in sorted(found.local_exp[label])])
        fits.append(found.score)
    values = shap.KernelExplainer(predict, background).shap_values(row[None], nsamples=62, l1_reg=False, silent=True)[0]
    sign = 1 if label == 1 else -1  # lime keeps the slopes of a regression under 1, and their opposites under 0
    return {
        "table/hidden": hidden,
        "table/bias": bias,
        "table/head": head,
        "table/row": row,
        "table/background": background,
        "table/lime": sign * np.array(slopes),
        "table/lime_r_squared": np.array(fits),
        "table/shap": values,
    }


if __name__ == "__main__":
    np.savez_compressed(HERE / "perturbation.npz", allow_pickle=False, **captum(), **table())
