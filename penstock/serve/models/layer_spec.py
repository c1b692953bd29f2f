"""What a decoder layer is made of, as data."""

from dataclasses import dataclass


class ModelError(ValueError):
    """A checkpoint or its config cannot be read or is not supported; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """A mixture of experts in place of the MLP.

    Of `count` experts of width `size` a token uses `top_k`; moe_route says what the options of the choice mean. All tokens use
    one more MLP of width `shared_size`, if that is not 0, weighted by a sigmoid of its own with `shared_gate`.
    """

    count: int
    top_k: int
    size: int
    scoring: str = "softmax"
    renormalize: bool = True
    num_groups: int | None = None
    top_groups: int | None = None
    scale: float = 1.0
    bias: bool = False
    float32_router: bool = False
    shared_size: int = 0
    shared_gate: bool = False


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Multi-head latent attention: keys and values of all heads are kept as one row of `rank` + `rope_dim` numbers.

    A head's query and key have `nope_dim` dimensions without positions and `rope_dim` rotated ones, its value has `value_dim`.
    Queries go through `query_rank` numbers first, where that is not None.
    """

    rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    query_rank: int | None = None
    interleaved: bool = True


@dataclass(frozen=True, slots=True)
class MambaSpec:
    """A Mamba-2 mixer, which stands in a layer in the place of attention."""

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    conv_width: int
    conv_bias: bool = True
    proj_bias: bool = False
    dt_limit: tuple[float, float] = (0.0, float("inf"))

    @property
    def inner_size(self) -> int:
        """Columns of x and of its gate."""
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """x, B and C, which pass through the convolution together."""
        return self.inner_size + 2 * self.num_groups * self.state_size

    @property
    def projected(self) -> int:
        """The gate, what is convolved, and a step for each head."""
        return self.inner_size + self.conv_channels + self.num_heads


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer. `window` counts the keys a query sees, itself included; `rope` indexes ModelSpec.ropes.

    Without rope nothing is rotated. With `mamba` the layer has no attention and its fields mean nothing. mlp_size 0: no MLP.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_scale: float
    mlp_size: int
    activation: str = "silu"
    window: int | None = None
    attention_softcap: float | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    post_norms: bool = False
    rope: int | None = 0
    experts: ExpertsSpec | None = None
    latent: LatentSpec | None = None
    mamba: MambaSpec | None = None


def layer_parameters(hidden: int, layer: LayerSpec) -> int:
    """Weights of one layer, norms and biases included."""
    total = hidden * (4 if layer.post_norms else 2) + hidden * layer.o_bias
    if layer.mamba is not None:
        mamba = layer.mamba
        total += hidden * (mamba.projected + mamba.inner_size) + mamba.projected * mamba.proj_bias
        total += mamba.conv_channels * (mamba.conv_width + mamba.conv_bias) + mamba.inner_size + 3 * mamba.num_heads
    elif layer.latent is None:
        q, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        total += hidden * (2 * q + 2 * kv) + 2 * layer.head_dim * layer.qk_norm + (q + 2 * kv) * layer.qkv_bias
    else:
        latent = layer.latent
        q = layer.num_heads * (latent.nope_dim + latent.rope_dim)
        rank, value = latent.query_rank, layer.num_heads * latent.value_dim
        total += hidden * q if rank is None else rank * (hidden + q + 1 + layer.qkv_bias)
        total += (hidden + layer.qkv_bias) * (latent.rank + latent.rope_dim) + latent.rank
        total += latent.rank * (layer.num_heads * latent.nope_dim + value) + value * hidden
    if layer.mlp_size == 0:
        return total - hidden
    if layer.experts is None:
        return total + 3 * hidden * layer.mlp_size + (2 * layer.mlp_size + hidden) * layer.mlp_bias
    experts = layer.experts
    total += experts.count * (hidden + 3 * hidden * experts.size + experts.bias)
    return total + 3 * hidden * experts.shared_size + hidden * experts.shared_gate
