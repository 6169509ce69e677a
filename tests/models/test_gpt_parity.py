"""gpt against transformers' GPT-2 with copied weights."""

import jax
import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from research.models.gpt import GPT

WIDTH, DEPTH, HEADS = 32, 2, 4


def copied(state):
    """GPT-2's weights under this project's paths; its kernels are input axis first, too."""

    def norm(name):
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def dense(name):
        return {"kernel": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def block(i):
        name = f"transformer.h.{i}"
        kernels = np.split(state[f"{name}.attn.c_attn.weight"], 3, axis=1)
        biases = np.split(state[f"{name}.attn.c_attn.bias"], 3)
        heads = {
            part: {"kernel": kernel.reshape(WIDTH, HEADS, -1), "bias": bias.reshape(HEADS, -1)}
            for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
        }
        out = dense(f"{name}.attn.c_proj")
        return {
            "attention_norm": norm(f"{name}.ln_1"),
            "attention": {**heads, "out": {"kernel": out["kernel"].reshape(HEADS, -1, WIDTH), "bias": out["bias"]}},
            "mlp_norm": norm(f"{name}.ln_2"),
            "mlp": {"up": dense(f"{name}.mlp.c_fc"), "down": dense(f"{name}.mlp.c_proj")},
        }

    return {
        "token": {"embedding": state["transformer.wte.weight"]},
        "position": {"embedding": state["transformer.wpe.weight"]},
        "norm": norm("transformer.ln_f"),
        **{f"block_{i}": block(i) for i in range(DEPTH)},
    }


def test_logits():
    torch.manual_seed(0)
    peer = GPT2LMHeadModel(GPT2Config(vocab_size=65, n_positions=80, n_embd=WIDTH, n_layer=DEPTH, n_head=HEADS)).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms too
    tokens = np.random.RandomState(0).randint(0, 65, (3, 70))
    want = peer(torch.tensor(tokens)).logits.detach().numpy()
    params = copied({name: tensor.detach().numpy() for name, tensor in peer.state_dict().items()})
    module = GPT(65, 80, width=WIDTH, depth=DEPTH, heads=HEADS)
    logits, _ = jax.jit(lambda params, tokens: module.apply({"params": params}, tokens))(params, tokens.astype(np.int32))
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)
    assert want.std() > 0.5
