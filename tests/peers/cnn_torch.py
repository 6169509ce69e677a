"""Times training steps of a small convolutional network in plain PyTorch, as Keras's for MNIST: convolutions, max-pools, dense layers, Adam.

    python tests/peers/cnn_torch.py --image 28 28 1 --channels 32 64 64 --pool 2 2 1 --hidden 64 --outputs 10 --batch 64 < /dev/null

Random images, the same in every step: reading data is not timed.
"""

import argparse

import torch
import torch.nn.functional as F
from blocks import averager, count, serve
from torch import nn


def network(image: list[int], channels: list[int], kernel: int, pool: list[int], hidden: list[int], outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    y, x, width = image
    for size, window in zip(channels, pool, strict=True):
        layers += [nn.Conv2d(width, size, kernel), nn.ReLU(), *([nn.MaxPool2d(window)] if window > 1 else [])]
        y, x, width = (y - kernel + 1) // window, (x - kernel + 1) // window, size
    layers.append(nn.Flatten())
    width *= y * x
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def main():
    parser = argparse.ArgumentParser()
    for name in ("image", "channels", "pool", "hidden"):
        parser.add_argument(f"--{name}", type=int, nargs="+", required=True)
    for name in ("outputs", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--ema", type=float)
    parser.add_argument("--kernel", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    y, x, c = args.image
    images, labels = torch.randn(args.batch, c, y, x), torch.randint(args.outputs, (args.batch,))

    def stepper(memory_format: torch.memory_format, compiled: bool):
        model = network(args.image, args.channels, args.kernel, args.pool, args.hidden, args.outputs).to(memory_format=memory_format)
        inputs = images.to(memory_format=memory_format)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
        average = averager(model, args.ema)
        call = torch.compile(model) if compiled else model

        def step() -> float:
            loss = F.cross_entropy(call(inputs), labels)
            loss.backward()
            optimizer.step()
            average()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    formats = {"": torch.contiguous_format, " channels_last": torch.channels_last}
    variants = {f"{how}{name}": stepper(layout, how == "compiled") for name, layout in formats.items() for how in ("eager", "compiled")}
    model = network(args.image, args.channels, args.kernel, args.pool, args.hidden, args.outputs)
    serve(variants, args.steps, count(model))


if __name__ == "__main__":
    main()
