"""A decoder-only Transformer that predicts the next token.

Paper:      Radford et al. 2019 (GPT-2); rotary positions, RMSNorm, SwiGLU and shared key heads as in Llama (Touvron et al. 2023).
Parameters: 809,856 at the default size with 65 tokens and a context of 64.
Experiment: shakespeare_char_cpu, quickstart.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.core import mup
from research.core.axis import constrain
from research.core.errors import ConfigError
from research.core.tree import STACKED, UNSTACKED, unstack
from research.core.types import Hyper, Tree
from research.layers.activation import ACTIVATIONS
from research.layers.arguments import one_of, per_block
from research.layers.causal import FORMS
from research.layers.dropout import Dropout
from research.layers.embedding import POSITIONS, Embedding, sinusoidal
from research.layers.norm import normalize
from research.layers.projection import Projection
from research.layers.tap import tap
from research.layers.transformer import TAPS, Block

SCALE = 0.02  # standard deviation of the initial kernels; divided by sqrt(2 depth) where a projection's output is added to the residual stream

REMAT = ("none", "full", "dots")


class GPT(nn.Module):
    """Embedding, `depth` blocks, a norm, and the logits of the next token at each position.

    A later token never changes earlier logits, so rows padded at the end need no mask. Dropout falls on the embedding and on what the
    blocks add, not on attention weights as in GPT-2: fused attention has no place for it.

    Where the collection `cache` holds an `empty_cache`, the tokens go on from its `length`; then mask says which of them count.

    Args:    vocabulary: tokens.  time: the longest context, in tokens.  width: of the residual stream.  depth: blocks.
             heads: query heads, a number or one per block.  kv_heads: key and value heads, likewise; None: as many as query heads.
             head_width: of each head; None: width / heads.  hidden: units of each block's MLP, likewise; None: 4 width; 0: no MLP.
             positions: "learned", "sinusoidal" or "rotary".  activation: a name that `activation` knows, or "swiglu".
             norm: "layer" or "rms".  bias: whether projections and layer norms have one.  tied: whether the head is the token embedding.
             dropout: rate; None: read from hyper.  scan: compile one block and scan over all; their parameters are then stacked.
             remat: what the backward pass finds of a block. "none": all that it needs was kept.  "full": the block's input; the rest is computed
             again.  "dots": the results of projections.  Names of taps inside a block, as ("middle", "mlp/hidden"): these.
             attention: "auto", "reference", "blockwise", "cudnn" or "splash": the form of the computation, as `causal_attention` takes it.
             dtype: compute type.
             base: the width at which a maximal-update model equals the standard one; None: standard at any width. Where head_width is None the
             number of heads is held and heads widen, else heads of that width become more.
    Raises:  ValueError: sizes that do not fit each other, or an unknown name.
    """

    vocabulary: int
    time: int
    width: int = 128
    depth: int = 4
    heads: int | tuple[int, ...] = 4
    kv_heads: int | tuple[int, ...] | None = None
    head_width: int | None = None
    hidden: int | tuple[int, ...] | None = None
    positions: str = "learned"
    activation: str = "gelu_tanh"
    norm: str = "layer"
    bias: bool = True
    tied: bool = True
    dropout: float | None = 0.0
    scan: bool = False
    remat: str | tuple[str, ...] = "none"
    attention: str = "auto"
    dtype: str = "float32"
    base: int | None = None

    def __post_init__(self):
        _check(self)
        super().__post_init__()

    @nn.nowrap
    def init(self, *args: Any, **kwargs: Any) -> Any:
        """As linen's, as large as `base` asks; blocks of one size are drawn in a scan: one block to compile, and the same numbers without `scan`."""
        if self.scan or not _uniform(self):
            return mup.started(self, super().init(*args, **kwargs), mup.constant, *args, **kwargs)
        return unstack(self.clone(scan=True).init(*args, **kwargs))

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        mask: Bool[Array, "b t"] | None = None,
        index: Int[Array, "b"] | None = None,
        hyper: Hyper | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b t v"], dict[str, Any]]:
        """(logits in float32, taps: input, those of each block, normalized, logits).

        Raises:  ConfigError: an input that is no tokens, or more of them than learned positions.
        """
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ConfigError(f"model: a GPT needs tokens, b t; found an input of shape {tokens.shape} and type {tokens.dtype}")
        taps: dict[str, Any] = {}
        hyper = hyper or {}
        positions = self._advance(tokens, mask)
        embedding = Embedding(self.vocabulary, self.width, SCALE, self.dtype, name="token")
        x = tap(self, taps, "input", constrain(self._place(embedding(tokens), positions), "batch", "time", None))  # b t d
        x = Dropout(self.dropout, name="dropout")(x, index=index, hyper=hyper, train=train)
        x, inner = self._run(x, positions, index=index, hyper=hyper, train=train)
        taps |= inner
        x = tap(self, taps, "normalized", normalize(self.norm, "norm", x, bias=self.bias, taps=taps))
        if (m := mup.multiplier(self)) != 1:
            x = x / m
        if self.tied:
            logits = embedding.attend(x)
        else:
            logits = Projection((self.width,), (self.vocabulary,), SCALE, bias=False, dtype=self.dtype, names=("width", "vocabulary"), name="head")(x)
        return tap(self, taps, "logits", logits.astype(jnp.float32)), taps

    @property
    def grows(self) -> mup.Sizes:
        """The arguments that widen together: heads where their width is held."""
        names = ("width", "hidden") if self.head_width is None else ("width", "hidden", "heads", "kv_heads")
        return {name: size for name in names if (size := getattr(self, name)) is not None}

    @property
    def sizes(self) -> dict[str, int | tuple[int, ...]]:
        """The arguments that say how many units each block has, one number a block, and `head_width`, which they no longer imply.

        Query heads that share key heads are not among them: they cannot go one by one.
        """
        mup.check_held(self)
        sizes = _sizes(self)
        hidden: dict[str, int | tuple[int, ...]] = (
            {"hidden": tuple(size["hidden"] for size in sizes)} if any(size["hidden"] for size in sizes) else {}
        )
        if any(size["heads"] != size["kv_heads"] for size in sizes):
            return hidden
        return {"heads": tuple(size["heads"] for size in sizes), **hidden, "head_width": sizes[0]["head_width"]}

    @nn.nowrap
    def head(self, params: Tree) -> Float[Array, "d v"]:
        """The matrix that turns the tap `normalized` into logits, picked from the parameters."""
        matrix = params["token"]["embedding"].T if self.tied else params["head"]["kernel"]
        return matrix if (m := mup.multiplier(self)) == 1 else matrix / m

    @nn.nowrap
    def empty_cache(self, rows: int, length: int) -> dict[str, Any]:
        """The collection `cache` before any token: keys and values of each block, and how many positions each row holds.

        Args:    rows: sequences.  length: positions to make room for; writing more is not noticed.
        Raises:  ConfigError: more than the learned positions.
        """
        if self.positions == "learned" and length > self.time:
            raise ConfigError(f"a cache of {length} positions is longer than the model's context; at most time={self.time}")

        def zeros(kv_heads: int, *leading: int) -> dict[str, Any]:
            return {"attention": {name: jnp.zeros((rows, *leading, kv_heads, length, width), self.dtype) for name in ("key", "value")}}

        sizes = _sizes(self)
        width = sizes[0]["head_width"]
        blocks = {f"{UNSTACKED}{i}": zeros(size["kv_heads"]) for i, size in enumerate(sizes)}
        if self.scan:
            blocks = {STACKED: zeros(sizes[0]["kv_heads"], self.depth)}
        return {"length": jnp.zeros(rows, jnp.int32), **blocks}

    def _advance(self, tokens, mask):
        """The tokens' positions, from 0 or from where the cache ends; the cache then ends after them."""
        steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]  # 1 t
        if not self.has_variable("cache", "length"):
            if self.positions == "learned" and tokens.shape[1] > self.time:
                raise ConfigError(f"model: {tokens.shape[1]} tokens are more than the model's context; at most time={self.time}")
            return steps
        start = self.get_variable("cache", "length")
        self.put_variable("cache", "length", start + (tokens.shape[1] if mask is None else mask.sum(-1, dtype=jnp.int32)))
        return start[:, None] + steps  # b t

    def _place(self, x, positions):
        """Token embeddings with what is added for their positions."""
        if self.positions == "learned":
            return x + Embedding(self.time, self.width, SCALE, self.dtype, axis=None, name="position")(positions)
        if self.positions == "sinusoidal":
            return x * (self.base or self.width) ** 0.5 + sinusoidal(positions, self.width).astype(x.dtype)
        return x

    def _run(self, x, positions, **how):
        """(x after all blocks, their taps)."""

        def run(block, x):
            return block(x, positions, **how)

        if self.remat != "none":
            run = nn.remat(run, prevent_cse=not self.scan, policy=_policy(self.remat))
        if self.scan:
            axes: dict[Any, int] = {"params": 0, "edits": 0, "cache": 1}
            scanned = nn.scan(lambda block, x, _: run(block, x), variable_axes=axes, split_rngs={"params": True, "dropout": True}, length=self.depth)
            return scanned(self._block(0, STACKED), x, None)
        taps: dict[str, Any] = {}
        for i in range(self.depth):
            x, inner = run(self._block(i, f"{UNSTACKED}{i}"), x)
            taps |= inner
        return x, taps

    def _block(self, i, name):
        return Block(
            **_sizes(self)[i],
            rotary=self.positions == "rotary",
            activation=self.activation,
            norm=self.norm,
            bias=self.bias,
            dropout=self.dropout,
            scale=SCALE,
            out_scale=SCALE / (2 * self.depth) ** 0.5,
            dtype=self.dtype,
            attention=self.attention,
            factor=1.0 if self.head_width is not None else mup.multiplier(self) ** -0.5,  # divided by the head width, not by its root
            name=name,
        )


def _sizes(model: GPT) -> list[dict[str, int]]:
    """The sizes of each block, all checked.

    Raises:  ValueError: sizes that do not fit each other.
    """
    for name in ("vocabulary", "time", "width", "depth"):
        per_block(getattr(model, name), 1, name)
    heads = per_block(model.heads, model.depth, "heads")
    kv_heads = heads if model.kv_heads is None else per_block(model.kv_heads, model.depth, "kv_heads")
    hidden = per_block(4 * model.width if model.hidden is None else model.hidden, model.depth, "hidden", least=0)
    if model.head_width is None and (len(set(heads)) > 1 or model.width % heads[0]):
        raise ValueError(f"head_width must be given where heads={model.heads} does not divide width={model.width} evenly")
    head_width = model.width // heads[0] if model.head_width is None else model.head_width
    for h, g in zip(heads, kv_heads, strict=True):
        if h % g:
            raise ValueError(f"kv_heads={g} does not divide heads={h}")
    names = ("heads", "kv_heads", "hidden", "head_width")
    return [dict(zip(names, (*sizes, head_width), strict=True)) for sizes in zip(heads, kv_heads, hidden, strict=True)]


def _policy(remat):
    """Which intermediates of a block are kept, as `jax.checkpoint` asks; None: none."""
    if isinstance(remat, str):
        return {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}[remat]
    return jax.checkpoint_policies.save_only_these_names(*remat)


def _uniform(model: GPT) -> bool:
    sizes = _sizes(model)
    return all(size == sizes[0] for size in sizes)


def _check(model: GPT) -> None:
    sizes = _sizes(model)
    mup.check(model.base, model.grows, {} if model.head_width is not None else {"head_width": sizes[0]["head_width"]})
    one_of(model.positions, POSITIONS, "positions")
    one_of(model.norm, ("layer", "rms"), "norm")
    one_of(model.attention, FORMS, "attention")
    if isinstance(model.remat, str):
        one_of(model.remat, REMAT, "remat")
    else:
        for name in model.remat:
            one_of(name, TAPS, "remat")
    one_of(model.activation, (*ACTIVATIONS, "swiglu"), "activation")
    if model.positions == "rotary" and sizes[0]["head_width"] % 2:
        raise ValueError(f"rotary positions need an even head_width, found {sizes[0]['head_width']}")
    if model.positions == "sinusoidal" and model.width % 2:
        raise ValueError(f"sinusoidal positions need an even width, found {model.width}")
    if model.scan and not _uniform(model):
        raise ValueError("scan=true needs blocks of equal size; set scan=false")
