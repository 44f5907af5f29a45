"""The same training steps by hand in JAX: bfloat16 where torch.autocast takes it, optax's AdamW, one jit.

Weights are float32 and lie as JAX's users have them, [inputs, outputs] and channels last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tpu_programs.cases import BETAS, EPSILON, LARGEST_NORM, LEARNING_RATE, WEIGHT_DECAY, Case, ResNet, Transformer

HALF = jnp.bfloat16


def _linear(params: dict[str, Any], x: Any) -> Any:
    out = x.astype(HALF) @ params["w"].astype(HALF)
    return out + params["b"].astype(HALF) if "b" in params else out


def _layer_norm(params: dict[str, Any], x: Any) -> Any:
    mean = x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-5)
    return (x - mean) * scale * params["scale"] + params["bias"]


def _rms_norm(params: dict[str, Any], x: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * params["scale"]


def _attention(params: dict[str, Any], x: Any, num_heads: int, angles: Any = None) -> Any:
    batch, length, width = x.shape
    q, k, v = jnp.moveaxis(_linear(params["qkv"], x).reshape(batch, length, 3, num_heads, width // num_heads), 2, 0)
    if angles is not None:
        q, k = _rotate(q, angles), _rotate(k, angles)
    # jax.nn.dot_product_attention keeps the scores in float32, which costs a third more memory traffic.
    scores = jnp.einsum("bqnh,bknh->bnqk", q * HALF((width // num_heads) ** -0.5), k)
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf).astype(jnp.float32)
    mixed = jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores, axis=-1).astype(HALF), v)
    return _linear(params["out"], mixed.reshape(batch, length, width))


def _rotate(x: Any, angles: Any) -> Any:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _gpt2(params: dict[str, Any], sizes: Transformer, x: Any) -> Any:
    x = params["embedding"][x] + params["position"]
    for block in params["blocks"]:
        x = x + _attention(block["attention"], _layer_norm(block["norm1"], x), sizes.num_heads)
        hidden = jax.nn.gelu(_linear(block["up"], _layer_norm(block["norm2"], x)), approximate=False)
        x = x + _linear(block["down"], hidden)
    return _linear({"w": params["embedding"].T}, _layer_norm(params["norm"], x))


def _llama(params: dict[str, Any], sizes: Transformer, x: Any) -> Any:
    width, length = sizes.width // sizes.num_heads, x.shape[1]
    angles = jnp.outer(jnp.arange(length, dtype=jnp.float32), 10000.0 ** (-jnp.arange(0, width, 2) / width))
    x = params["embedding"][x]

    @jax.checkpoint
    def run(block: Any, x: Any) -> Any:
        x = x + _attention(block["attention"], _rms_norm(block["norm1"], x), sizes.num_heads, angles)
        hidden = _rms_norm(block["norm2"], x)
        return x + _linear(block["down"], jax.nn.silu(_linear(block["gate"], hidden)) * _linear(block["up"], hidden))

    for block in params["blocks"]:
        x = run(block, x)
    return _linear(params["head"], _rms_norm(params["norm"], x))


def _convolve(w: Any, x: Any, stride: int = 1) -> Any:
    pad = (w.shape[0] - 1) // 2
    return jax.lax.conv_general_dilated(x.astype(HALF), w.astype(HALF), (stride, stride), [(pad, pad)] * 2,
                                        dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _batch_norm(params: dict[str, Any], kept: dict[str, Any], x: Any) -> tuple[Any, dict[str, Any]]:
    wide = x.astype(jnp.float32)
    mean = wide.mean((0, 1, 2))
    variance = jnp.square(wide - mean).mean((0, 1, 2))
    size = x.size // x.shape[-1]
    moved = {"mean": 0.9 * kept["mean"] + 0.1 * mean,
             "variance": 0.9 * kept["variance"] + 0.1 * variance * size / (size - 1)}
    out = (wide - mean) * (jax.lax.rsqrt(variance + 1e-5) * params["scale"]) + params["bias"]
    return out.astype(x.dtype), moved


def _resnet(params: dict[str, Any], kept: dict[str, Any], sizes: ResNet, x: Any) -> tuple[Any, dict[str, Any]]:
    def convolve(params: dict[str, Any], kept: dict[str, Any], x: Any, stride: int = 1) -> tuple[Any, dict[str, Any]]:
        return _batch_norm(params, kept, _convolve(params["w"], x, stride))

    x, of_first = convolve(params["conv"], kept["conv"], x, 2)
    x = jax.lax.reduce_window(jax.nn.relu(x), -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1),
                              ((0, 0), (1, 1), (1, 1), (0, 0)))
    moved: dict[str, Any] = {"conv": of_first, "blocks": []}
    strides = [2 if stage and not i else 1 for stage, num in enumerate(sizes.num_blocks) for i in range(num)]
    for block, of_block, stride in zip(params["blocks"], kept["blocks"], strides, strict=True):
        found: dict[str, Any] = {}
        out, found["1"] = convolve(block["1"], of_block["1"], x)
        out, found["2"] = convolve(block["2"], of_block["2"], jax.nn.relu(out), stride)
        out, found["3"] = convolve(block["3"], of_block["3"], jax.nn.relu(out))
        if "shortcut" in block:
            x, found["shortcut"] = convolve(block["shortcut"], of_block["shortcut"], x, stride)
        x = jax.nn.relu(out + x)
        moved["blocks"].append(found)
    return _linear(params["head"], x.mean((1, 2))), moved


def _transformer_shapes(case: Case, sizes: Transformer) -> dict[str, Any]:
    width, hidden, is_gpt = sizes.width, sizes.hidden, case.model == "gpt2"

    def linear(inputs: int, outputs: int) -> dict[str, Any]:
        return {"w": (inputs, outputs), **({"b": (outputs,)} if is_gpt else {})}

    norm = {"scale": (width,), **({"bias": (width,)} if is_gpt else {})}
    block = {"norm1": norm, "norm2": norm, "attention": {"qkv": linear(width, 3 * width), "out": linear(width, width)},
             "up": linear(width, hidden), "down": linear(hidden, width),
             **({} if is_gpt else {"gate": linear(width, hidden)})}
    return {"embedding": (sizes.vocabulary, width), "norm": norm, "blocks": [block] * sizes.num_layers,
            **({"position": (sizes.length, width)} if is_gpt else {"head": linear(width, sizes.vocabulary)})}


def _resnet_shapes(sizes: ResNet) -> tuple[dict[str, Any], dict[str, Any]]:
    def convolution(inputs: int, outputs: int, size: int) -> dict[str, Any]:
        return {"w": (size, size, inputs, outputs), "scale": (outputs,), "bias": (outputs,)}

    params: dict[str, Any] = {"conv": convolution(3, sizes.width, 7), "blocks": []}
    inputs = sizes.width
    for stage, num_blocks in enumerate(sizes.num_blocks):
        width = sizes.width << stage
        for i in range(num_blocks):
            params["blocks"].append({
                "1": convolution(inputs, width, 1), "2": convolution(width, width, 3),
                "3": convolution(width, 4 * width, 1),
                **({} if i else {"shortcut": convolution(inputs, 4 * width, 1)})})
            inputs = 4 * width

    def kept(of: dict[str, Any]) -> dict[str, Any]:
        return {"mean": of["scale"], "variance": of["scale"]}

    buffers = {"conv": kept(params["conv"]),
               "blocks": [{name: kept(each) for name, each in block.items()} for block in params["blocks"]]}
    return {**params, "head": {"w": (inputs, sizes.num_classes), "b": (sizes.num_classes,)}}, buffers


def shapes_of(case: Case) -> tuple[Any, Any]:
    """Returns the shapes of weights and of buffers, as trees of tuples."""
    if isinstance(case.sizes, ResNet):
        return _resnet_shapes(case.sizes)
    return _transformer_shapes(case, case.sizes), {}


def make_optimizer() -> optax.GradientTransformation:
    """Returns AdamW behind clipping."""
    return optax.chain(optax.clip_by_global_norm(LARGEST_NORM), optax.adamw(
        LEARNING_RATE, *BETAS, EPSILON, weight_decay=WEIGHT_DECAY))


def make_step(case: Case) -> Callable[..., Any]:
    """Returns (weights, buffers, optimizer state, features, labels) -> (the first three anew, loss)."""
    optimizer = make_optimizer()

    def loss_of(params: Any, kept: Any, x: Any, y: Any) -> tuple[Any, Any]:
        if isinstance(case.sizes, ResNet):
            logits, kept = _resnet(params, kept, case.sizes, x)
        else:
            logits = (_gpt2 if case.model == "gpt2" else _llama)(params, case.sizes, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y).mean(), kept

    def step(params: Any, kept: Any, state: Any, x: Any, y: Any) -> Any:
        (loss, kept), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, kept, x, y)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), kept, state, loss

    return step


def lower(case: Case) -> Any:
    """Returns the step, ready to be compiled for the chips of the case."""
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices[:case.fsdp]
    mesh = Mesh(devices, ("data",))
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

    def place(shape: tuple[int, ...]) -> NamedSharding:
        """Splits the largest dim that can be, as the Trainer's fsdp."""
        fitting = [dim for dim, size in enumerate(shape) if size % case.fsdp == 0]
        if case.fsdp == 1 or not fitting:
            return whole
        largest = max(fitting, key=lambda dim: shape[dim])
        return NamedSharding(mesh, PartitionSpec(*("data" if dim == largest else None for dim in range(len(shape)))))

    def array(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(shape))

    def is_shape(each: Any) -> bool:
        return isinstance(each, tuple) and all(isinstance(size, int) for size in each)

    params, kept = (jax.tree.map(array, shapes, is_leaf=is_shape) for shapes in shapes_of(case))
    state = jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=place(each.shape)),
                         jax.eval_shape(make_optimizer().init, params))
    if isinstance(case.sizes, ResNet):
        size = case.sizes.size
        x = jax.ShapeDtypeStruct((case.rows, size, size, 3), jnp.float32, sharding=rows)
        y = jax.ShapeDtypeStruct((case.rows,), jnp.int32, sharding=rows)
    else:
        x = y = jax.ShapeDtypeStruct((case.rows, case.sizes.length), jnp.int32, sharding=rows)
    places = jax.tree.map(lambda each: each.sharding, (params, kept, state))
    return jax.jit(make_step(case), donate_argnums=(0, 1, 2), out_shardings=(*places, whole)).lower(
        params, kept, state, x, y)
