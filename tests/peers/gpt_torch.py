"""Times training steps of nanoGPT's network in plain PyTorch: no biases, tied head, AdamW in one kernel, clipped gradients.

    python tests/peers/gpt_torch.py --width 128 --depth 4 --heads 4 --time 64 --vocabulary 65 --batch 12 --clip 1 < /dev/null

On an NVIDIA GPU: --device cuda --dtype bfloat16; parameters stay float32, matrix products are cast.
Random tokens, the same in every step: reading data is not timed.
"""

import argparse

import torch
import torch.nn.functional as F
from blocks import averager, count, serve
from torch import nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.into = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.into(x).chunk(3, dim=-1))  # b h t k
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, time: int, width: int, depth: int, heads: int):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(time, width)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                (
                    nn.Sequential(nn.LayerNorm(width, bias=False), Attention(width, heads)),
                    nn.Sequential(
                        nn.LayerNorm(width, bias=False),
                        nn.Linear(width, 4 * width, bias=False),
                        nn.GELU("tanh"),
                        nn.Linear(4 * width, width, bias=False),
                    ),
                )
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, target):
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for attend, think in self.blocks:
            x = x + attend(x)
            x = x + think(x)
        return F.cross_entropy((self.norm(x) @ self.token.weight.T).flatten(0, 1), target.flatten())


def main():
    parser = argparse.ArgumentParser()
    for name in ("vocabulary", "time", "width", "depth", "heads", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("clip", "ema"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as XLA does; nothing on CPU
    model = GPT(args.vocabulary, args.time, args.width, args.depth, args.heads).to(args.device)
    text = torch.randint(args.vocabulary, (args.batch, args.time + 1), device=args.device)
    tokens, target = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    kernels, scales = ([p for p in model.parameters() if (p.ndim > 1) is wanted] for wanted in (True, False))
    groups = [{"params": kernels, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 1e-3, (0.9, 0.99), fused=True)

    average = averager(model, args.ema)

    def stepper(loss_of):
        def step() -> float:
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss = loss_of(tokens, target)
            loss.backward()
            if args.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            average()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    serve({"eager": stepper(model), "compiled": stepper(torch.compile(model))}, args.steps, count(model))


if __name__ == "__main__":
    main()
