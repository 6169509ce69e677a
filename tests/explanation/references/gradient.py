"""Attributions by Captum, for `test_gradient_parity.py`: run with captum 0.9 and torch on the path, writes gradient.npz beside it.

`PYTHONPATH=FOLDER_OF_CAPTUM python tests/explanation/references/gradient.py`; torch never runs in the tests.

The two networks are those of tests/explanation/conftest.py, "mlp" (8 x 8 images, 16 and 12 units, 5 classes) and "cnn" (3 x 3 convolutions of 4 and 6
channels with padding, pooled by 2 after the first, 16 units), with ReLU as modules, whose gradients Captum can guide.
"""

from pathlib import Path

import numpy as np
import torch
from captum.attr import (
    GuidedBackprop,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    LayerAttribution,
    LayerGradCam,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    NeuronGradient,
    NoiseTunnel,
    Saliency,
)
from torch import nn

POINTS, UNITS, SAMPLES = 64, {"mlp": 3, "cnn": (2, 1, 3)}, 8
HIDDEN = {"mlp": "hidden_0", "cnn": "maps_1"}


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.ModuleList([nn.Linear(64, 16), nn.Linear(16, 12)])
        self.hidden_0, self.hidden_1, self.head = nn.ReLU(), nn.ReLU(), nn.Linear(12, 5)

    def forward(self, x):
        x = self.hidden_0(self.dense[0](x.permute(0, 2, 3, 1).flatten(1)))
        return self.head(self.hidden_1(self.dense[1](x)))


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.ModuleList([nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)])
        self.maps_0, self.maps_1, self.pool, self.hidden_0 = nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU()
        self.dense, self.head = nn.ModuleList([nn.Linear(96, 16)]), nn.Linear(16, 5)

    def forward(self, x):
        x = self.pool(self.maps_0(self.conv[0](x)))
        x = self.maps_1(self.conv[1](x))
        x = self.hidden_0(self.dense[0](x.permute(0, 2, 3, 1).flatten(1)))
        return self.head(x)


def fill(network: nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Draws its parameters and returns them as this project lays them out: (in, out) and (y, x, in, out)."""
    random, kept = np.random.RandomState(seed), {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            kernel = (random.standard_normal(module.weight.shape) / module.weight[0].numel() ** 0.5).astype(np.float32)
            bias = (0.2 * random.standard_normal(module.bias.shape)).astype(np.float32)
            module.weight.data, module.bias.data = torch.tensor(kernel), torch.tensor(bias)
            kept[f"{name.replace('.', '_')}/kernel"] = np.ascontiguousarray(kernel.T if kernel.ndim == 2 else kernel.transpose(2, 3, 1, 0))
            kept[f"{name.replace('.', '_')}/bias"] = bias
    return kept


def plain(x: torch.Tensor) -> np.ndarray:
    """b c y x -> b y x c."""
    array = x.detach().numpy()
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array)


def attributions(name: str, network: nn.Module, x: torch.Tensor, target: torch.Tensor) -> dict[str, np.ndarray]:
    layer, unit = getattr(network, HIDDEN[name]), UNITS[name]
    torch_unit = unit if isinstance(unit, int) else (unit[2], unit[0], unit[1])  # ours: y x c
    integrate = {"target": target, "n_steps": POINTS, "method": "gausslegendre"}
    found = {
        "saliency": Saliency(network).attribute(x, target=target),
        "input_x_gradient": InputXGradient(network).attribute(x, target=target),
        "integrated_gradients": IntegratedGradients(network).attribute(x, baselines=0.3, **integrate),
        "guided_backpropagation": GuidedBackprop(network).attribute(x, target=target),
        "layer_gradient": LayerGradientXActivation(network, layer).attribute(x, target=target),
        "neuron": NeuronGradient(network, layer).attribute(x, torch_unit),
    }
    found["layer_integrated_gradients"] = LayerIntegratedGradients(network, layer).attribute(x, baselines=torch.zeros_like(x), **integrate)
    if name == "cnn":
        coarse = LayerGradCam(network, layer).attribute(x, target=target, relu_attributions=True)
        found |= {"map": coarse, "grad_cam": LayerAttribution.interpolate(coarse, x.shape[2:], "bilinear")}
        found["guided_grad_cam"] = GuidedGradCam(network, layer).attribute(x, target=target, interpolate_mode="bilinear")
    seen: list[torch.Tensor] = []
    hook = network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    for kind, variant in (("smoothgrad", "mean"), ("smoothgrad_sq", "squared"), ("vargrad", "variance")):
        torch.manual_seed(7)  # the same noise for each
        seen.clear()
        found[f"smooth_{variant}"] = NoiseTunnel(Saliency(network)).attribute(x, nt_type=kind, nt_samples=SAMPLES, stdevs=0.5, target=target)
    hook.remove()
    noisy = max(seen, key=len)  # b n, examples slowest
    arrays = {key: plain(value) for key, value in found.items()}
    arrays["noise"] = plain(noisy).reshape(len(x), SAMPLES, *plain(x).shape[1:]) - plain(x)[:, None]
    # at a layer, Captum's baseline is what the layer holds at the input's baseline: the layer's value there
    taken: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: taken.append(output.detach()))
    network(torch.zeros_like(x))
    hook.remove()
    return {**arrays, "layer_baseline": plain(taken[0])}


def main() -> None:
    torch.set_num_threads(1)
    kept = {}
    for seed, (name, network) in enumerate({"mlp": MLP(), "cnn": CNN()}.items()):
        kept |= {f"{name}/params/{path}": value for path, value in fill(network, seed).items()}
        image = np.random.RandomState(5).standard_normal((3, 1, 8, 8)).astype(np.float32)
        x, target = torch.tensor(image), torch.tensor([0, 3, 1])
        found = attributions(name, network.eval(), x, target)
        kept |= {
            f"{name}/{key}": value
            for key, value in {"image": plain(x), "output": plain(network(x)), "target": target.numpy().astype(np.int32), **found}.items()
        }
    np.savez_compressed(Path(__file__).with_suffix(".npz"), allow_pickle=False, **kept)


if __name__ == "__main__":
    main()
