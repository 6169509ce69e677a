"""Times training steps of a language model on torch.nn.LSTM: embedding, layers, head, Adam in one kernel, clipped gradients.

    python tests/peers/lstm_torch.py --width 256 --depth 2 --time 64 --vocabulary 65 --batch 64 --clip 1 < /dev/null

Random tokens, the same in every step: reading data is not timed.
"""

import argparse

import torch
import torch.nn.functional as F
from blocks import averager, serve
from torch import nn


class LSTM(nn.Module):
    def __init__(self, vocabulary: int, width: int, depth: int):
        super().__init__()
        self.token, self.layers, self.head = (
            nn.Embedding(vocabulary, width),
            nn.LSTM(width, width, depth, batch_first=True),
            nn.Linear(width, vocabulary),
        )
        for name, parameter in self.layers.named_parameters():
            if name.startswith("bias_hh"):  # the second of two biases that only ever add
                parameter.requires_grad_(False).zero_()

    def forward(self, tokens, target):
        return F.cross_entropy(self.head(self.layers(self.token(tokens))[0]).flatten(0, 1), target.flatten())


def main():
    parser = argparse.ArgumentParser()
    for name in ("vocabulary", "time", "width", "depth", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("clip", "ema"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = LSTM(args.vocabulary, args.width, args.depth)
    text = torch.randint(args.vocabulary, (args.batch, args.time + 1))
    tokens, target = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    average = averager(model, args.ema)

    def stepper(loss_of):
        def step() -> float:
            loss = loss_of(tokens, target)
            loss.backward()
            if args.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            average()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    serve({"eager": stepper(model), "compiled": stepper(torch.compile(model))}, args.steps, learned)


if __name__ == "__main__":
    main()
