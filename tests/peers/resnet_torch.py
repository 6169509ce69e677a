"""Times training steps of a residual network for small images in plain PyTorch: 3 x 3 stem, basic blocks, SGD with momentum.

    python tests/peers/resnet_torch.py --image 32 32 3 --blocks 2 2 2 2 --channels 64 128 256 512 --outputs 10 --batch 32 < /dev/null

Random images, the same in every step: reading data is not timed.
"""

import argparse

import torch
import torch.nn.functional as F
from blocks import averager, count, serve
from torch import nn


class Block(nn.Module):
    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


def network(colours: int, blocks: list[int], channels: list[int], outputs: int) -> nn.Sequential:
    width = channels[0]
    layers: list[nn.Module] = [nn.Conv2d(colours, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    for stage, (depth, size) in enumerate(zip(blocks, channels, strict=True)):
        for i in range(depth):
            layers.append(Block(width, size, 2 if stage and not i else 1))
            width = size
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs))


def main():
    parser = argparse.ArgumentParser()
    for name in ("image", "blocks", "channels"):
        parser.add_argument(f"--{name}", type=int, nargs="+", required=True)
    for name in ("outputs", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--ema", type=float)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    y, x, c = args.image
    images, labels = torch.randn(args.batch, c, y, x), torch.randint(args.outputs, (args.batch,))

    def stepper(memory_format: torch.memory_format, compiled: bool):
        model = network(c, args.blocks, args.channels, args.outputs).to(memory_format=memory_format)
        inputs = images.to(memory_format=memory_format)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9, fused=True)
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
    serve(variants, args.steps, count(network(c, args.blocks, args.channels, args.outputs)))


if __name__ == "__main__":
    main()
