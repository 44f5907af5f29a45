"""JAX as its users write it: the whole step in one jit, parameters and optimizer state donated, no loss read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from step_contenders.workloads import CONTEXT, CONVNET_CHANNELS, VOCABULARY, WORKLOADS

NEEDS = ("jax", "optax")
NUM_WARM_UP = 5
_WIDTH, _NUM_HEADS, _NUM_LAYERS = 64, 4, 4


def prepare(workload_name: str) -> Callable[[int], float]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import optax

    init, apply = {"mlp": _mlp, "cnn": _cnn, "gpt": _gpt, "convnet": _convnet}[workload_name]()
    optimizer = optax.sgd(0.1, 0.9) if workload_name == "mlp" else optax.adamw(1e-3, weight_decay=1e-2)
    batches = [(_as_jax_user_has_it(x), y.int().numpy()) for x, y in WORKLOADS[workload_name].batches()]

    def loss_of(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y):
        loss, gradients = jax.value_and_grad(loss_of)(params, x, y)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = init(jax.random.key(0))
    held = [params, optimizer.init(params)]

    def run(num_steps: int) -> None:
        params, state = held
        loss = None
        for k in range(num_steps):
            params, state, loss = step(params, state, *batches[k % len(batches)])
        held[:] = [params, state]
        jax.block_until_ready(loss)

    def measure(num_steps: int) -> float:
        run(NUM_WARM_UP)
        begun = time.perf_counter()
        run(num_steps)
        return (time.perf_counter() - begun) / num_steps * 1e3

    return measure


def _as_jax_user_has_it(x: Tensor) -> np.ndarray[Any, Any]:
    """Returns bytes as int32, which JAX computes with, and images with channels last, which XLA:CPU is faster with."""
    if not x.is_floating_point():
        return x.int().numpy()
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).contiguous().numpy()


Model = tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]


def _linear(key: Any, inputs: int, outputs: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    return {"w": jax.random.normal(key, (inputs, outputs)) * inputs ** -0.5, "b": jnp.zeros(outputs)}


def _convolution(key: Any, inputs: int, outputs: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    return {"w": jax.random.normal(key, (3, 3, inputs, outputs)) * (9 * inputs) ** -0.5, "b": jnp.zeros(outputs)}


def _convolve(params: dict[str, Any], x: Any) -> Any:
    import jax

    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=layout)
    return jax.nn.relu(x + params["b"])


def _halve(x: Any) -> Any:
    import jax

    return jax.lax.reduce_window(x, -float("inf"), jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _mlp() -> Model:
    import jax

    def init(key):
        keys = jax.random.split(key)
        return [_linear(keys[0], 64, 128), _linear(keys[1], 128, 10)]

    def apply(params, x):
        first, second = params
        return jax.nn.relu(x @ first["w"] + first["b"]) @ second["w"] + second["b"]

    return init, apply


def _cnn() -> Model:
    import jax

    def init(key):
        keys = jax.random.split(key, 3)
        return [_convolution(keys[0], 1, 16), _convolution(keys[1], 16, 32), _linear(keys[2], 512, 10)]

    def apply(params, x):
        first, second, head = params
        x = _convolve(second, _halve(_convolve(first, x)))
        return x.reshape(x.shape[0], -1) @ head["w"] + head["b"]

    return init, apply


def _convnet() -> Model:
    import jax

    channels = CONVNET_CHANNELS

    def init(key):
        keys = jax.random.split(key, 5)
        return [*(_convolution(keys[i], channels[i], channels[i + 1]) for i in range(4)),
                _linear(keys[4], channels[4] * 8 * 8, 10)]

    def apply(params, x):
        x = _halve(_convolve(params[1], _convolve(params[0], x)))
        x = _halve(_convolve(params[3], _convolve(params[2], x)))
        return x.reshape(x.shape[0], -1) @ params[4]["w"] + params[4]["b"]

    return init, apply


def _gpt() -> Model:
    import jax
    import jax.numpy as jnp

    def norm():
        return {"scale": jnp.ones(_WIDTH), "bias": jnp.zeros(_WIDTH)}

    def block(key):
        keys = jax.random.split(key, 4)
        return {"norm1": norm(), "norm2": norm(), "qkv": _linear(keys[0], _WIDTH, 3 * _WIDTH),
                "out": _linear(keys[1], _WIDTH, _WIDTH), "up": _linear(keys[2], _WIDTH, 4 * _WIDTH),
                "down": _linear(keys[3], 4 * _WIDTH, _WIDTH)}

    def init(key):
        keys = jax.random.split(key, _NUM_LAYERS + 2)
        return {"embedding": jax.random.normal(keys[0], (VOCABULARY, _WIDTH)), "position": jnp.zeros((CONTEXT, _WIDTH)),
                "blocks": [block(k) for k in keys[2:]], "head": _linear(keys[1], _WIDTH, VOCABULARY)}

    def linear(params, x):
        return x @ params["w"] + params["b"]

    def normalize(params, x):
        return jax.nn.standardize(x, epsilon=1e-5) * params["scale"] + params["bias"]

    def attend(params, x):
        batch, length, width = x.shape
        split = (batch, length, 3, _NUM_HEADS, width // _NUM_HEADS)
        q, k, v = linear(params["qkv"], x).reshape(split).transpose(2, 0, 3, 1, 4)
        scores = (q @ k.swapaxes(-1, -2)) * (width // _NUM_HEADS) ** -0.5
        future = jnp.triu(jnp.ones((length, length), bool), 1)
        mixed = jax.nn.softmax(jnp.where(future, -1e9, scores), axis=-1) @ v
        return linear(params["out"], mixed.transpose(0, 2, 1, 3).reshape(batch, length, width))

    def apply(params, x):
        x = params["embedding"][x] + params["position"]
        for part in params["blocks"]:
            x = x + attend(part, normalize(part["norm1"], x))
            hidden = jax.nn.gelu(linear(part["up"], normalize(part["norm2"], x)), approximate=False)
            x = x + linear(part["down"], hidden)
        return linear(params["head"], x)

    return init, apply
