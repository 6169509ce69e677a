"""Writes sparsegpt.npz and wanda.npz beside this file: what the authors' own programs make of small layers.

    python tests/compression/references/make.py PATH_OF_SPARSEGPT PATH_OF_WANDA

The paths are clones of github.com/IST-DASLab/sparsegpt at 5e3e2d1 and github.com/locuslab/wanda at 069ac97; torch and transformers are needed,
a GPU is not. The tests read the stored arrays alone. Weights are (out, in), as torch keeps them.
"""

import importlib
import pathlib
import sys
import types

import numpy as np
import torch

HERE = pathlib.Path(__file__).parent


def stub(name, **members):
    """A module in place of one that the algorithm does not need."""
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(members)


def data(inputs, outputs, rows, seed):
    """(weights, correlated inputs, two of which are always zero), float32."""
    random = np.random.RandomState(seed)
    x = random.randn(rows, inputs) @ (np.eye(inputs) + 0.2 * random.randn(inputs, inputs))
    x[:, [3, inputs // 2]] = 0
    return random.randn(outputs, inputs).astype(np.float32), x.astype(np.float32)


def sparsegpt(root):
    """The weights after SparseGPT: unstructured at two shares, 2:4 and 4:8, in blocks of 40 inputs, the last of them shorter."""
    torch.cuda.synchronize = lambda: None
    stub("quant")
    sys.path.insert(0, str(root))
    program = importlib.import_module("sparsegpt")
    weights, x = data(inputs=96, outputs=48, rows=200, seed=0)
    results = {}
    for name, arguments in {
        "unstructured_50": {"sparsity": 0.5},
        "unstructured_80": {"sparsity": 0.8},
        "2:4": {"sparsity": 0, "prunen": 2, "prunem": 4},
        "4:8": {"sparsity": 0, "prunen": 4, "prunem": 8},
    }.items():
        layer = torch.nn.Linear(*weights.T.shape, bias=False)
        layer.weight.data = torch.tensor(weights)
        run = program.SparseGPT(layer)
        for part in x.reshape(4, 50, 1, -1):  # 50 sequences of one token each
            run.add_batch(torch.tensor(part), None)
        run.fasterprune(**arguments, blocksize=40, percdamp=0.01)
        results[name] = layer.weight.data.numpy()
    return {"weights": weights, "inputs": x, **results}


class Layer(torch.nn.Module):
    """Two linear layers with a rectifier between them."""

    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = (torch.nn.Linear(*w.T.shape, bias=False) for w in (up, down))
        self.up.weight.data, self.down.weight.data = torch.tensor(up), torch.tensor(down)

    def forward(self, x, **_):
        return (self.down(torch.relu(self.up(x))),)


class Model(torch.nn.Module):
    """As much of a language model as Wanda's program looks at; its tokens are vectors already."""

    def __init__(self, layers, width):
        super().__init__()
        self.model = types.SimpleNamespace(layers=torch.nn.ModuleList(layers))
        self.layers, self.seqlen, self.hf_device_map = self.model.layers, 1, {}
        self.config = types.SimpleNamespace(use_cache=False, hidden_size=width)

    def forward(self, x):
        for layer in self.model.layers:
            (x,) = layer(x, attention_mask=torch.zeros(1), position_ids=torch.zeros(1))
        return x


def wanda(root):
    """The weights of a model of two layers after Wanda, the second of which sees what the pruned first one makes."""
    torch.cuda.empty_cache = lambda: None
    sys.path.insert(0, str(root))
    stub("lib.data", get_loaders=None)
    stub("lib.ablate", AblateGPT=None)
    stub("lib.sparsegpt", SparseGPT=None)
    program = importlib.import_module("lib.prune")
    _, x = data(inputs=32, outputs=48, rows=128, seed=1)
    matrices = {f"{name}_{i}": data(*sizes, rows=1, seed=2 + i)[0] for i in range(2) for name, sizes in (("up", (32, 48)), ("down", (48, 32)))}
    results = {}
    for name, (n, m) in {"unstructured": (0, 0), "2:4": (2, 4)}.items():
        model = Model([Layer(matrices[f"up_{i}"].copy(), matrices[f"down_{i}"].copy()) for i in range(2)], 32)
        program.get_loaders = lambda *_, **__: ([(torch.tensor(row).reshape(1, 1, -1),) for row in x], None)
        arguments = types.SimpleNamespace(nsamples=128, seed=0, use_variant=False, sparsity_ratio=0.6)
        program.prune_wanda(arguments, model, None, torch.device("cpu"), prune_n=n, prune_m=m)
        results |= {f"{name}/{part}_{i}": getattr(model.layers[i], part).weight.data.numpy() for i in range(2) for part in ("up", "down")}
    return {"inputs": x, **matrices, **results}


if __name__ == "__main__":
    np.savez_compressed(HERE / "sparsegpt.npz", **sparsegpt(pathlib.Path(sys.argv[1])))
    np.savez_compressed(HERE / "wanda.npz", **wanda(pathlib.Path(sys.argv[2])))
