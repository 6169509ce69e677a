"""Writes gptq.npz beside this file: what the authors' own program makes of a small layer.

    python tests/compression/references_quantize/make.py PATH_OF_GPTQ

The path is a clone of github.com/IST-DASLab/gptq (gptq.py as of 9f2abd3, quant.py as of 2e22596); torch is needed, a GPU is not. The tests read the
stored arrays alone. Weights are (out, in), as torch keeps them.
"""

import importlib
import pathlib
import sys
import types

import numpy as np
import torch

HERE = pathlib.Path(__file__).parent
CASES = {
    "int4": {"bits": 4},
    "int3": {"bits": 3},
    "int4_group_32": {"bits": 4, "groupsize": 32, "static_groups": True},
    "int3_group_32_order": {"bits": 3, "groupsize": 32, "static_groups": True, "actorder": True},
    "int8_order": {"bits": 8, "actorder": True},
}


def data(inputs=96, outputs=64, rows=200):
    """(weights, correlated inputs of unequal size, two of which are always zero), float32.

    The weights of those two are small: the authors' program lets them decide a scale before it sets them to zero.
    """
    random = np.random.RandomState(0)
    x = random.randn(rows, inputs) @ (np.eye(inputs) + 0.2 * random.randn(inputs, inputs)) * np.exp(random.randn(inputs))
    weights = random.randn(outputs, inputs)
    x[:, [3, inputs // 2]] = 0
    weights[:, [3, inputs // 2]] *= 0.1
    return weights.astype(np.float32), x.astype(np.float32)


def gptq(root):
    """The weights after GPTQ with symmetric scales, in blocks of 40 inputs, the last of them shorter."""
    torch.cuda.synchronize = lambda: None
    sys.modules["transformers"] = types.SimpleNamespace(Conv1D=())
    sys.path.insert(0, str(root))
    program, quant = importlib.import_module("gptq"), importlib.import_module("quant")
    weights, x = data()
    results = {}
    for name, arguments in CASES.items():
        bits, arguments = arguments["bits"], {key: value for key, value in arguments.items() if key != "bits"}
        layer = torch.nn.Linear(*weights.T.shape, bias=False)
        layer.weight.data = torch.tensor(weights)
        run = program.GPTQ(layer)
        run.quantizer = quant.Quantizer()
        run.quantizer.configure(bits, perchannel=True, sym=True)
        for part in x.reshape(4, 50, 1, -1):  # 50 sequences of one token each
            run.add_batch(torch.tensor(part), None)
        run.fasterquant(blocksize=40, percdamp=0.01, **arguments)
        results[name] = layer.weight.data.numpy()
    return {"weights": weights, "inputs": x, **results}


if __name__ == "__main__":
    np.savez_compressed(HERE / "gptq.npz", **gptq(pathlib.Path(sys.argv[1])))
