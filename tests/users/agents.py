"""Reinforcement learning, meta-learning and physics: gradients of gradients, target nets, hooks."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from tests.users.job import LOOP, Job, normal, supervised, whole
from tpuspec import CrossShardOptimizer, ModeKeys, SessionRunHook, TPUEstimatorSpec


def policy(params):
    return nn.ModuleDict({"actor": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
                          "critic": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))})


def policy_gradient_fn(features, labels, mode, params, model, optimizer):
    actions = torch.distributions.Categorical(logits=model["actor"](features["state"]), validate_args=False)
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"action": actions.probs.argmax(1)})
    value = model["critic"](features["state"]).squeeze(1)
    advantage = (features["return"] - value).detach()
    ratio = torch.exp(actions.log_prob(features["action"]) - features["old"])
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    losses = -clipped + 0.5 * (value - features["return"]).square() - 0.01 * actions.entropy()
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses)
    loss = losses.mean()
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss, clip_grad_norm=0.5))


def rollouts(generator):
    return {"state": normal(generator, 4), "action": whole(generator, 3), "return": normal(generator),
            "old": -1 - normal(generator).abs() / 10}, None


class Q(nn.Module):
    """A net and its target, which a hook or the step itself copies."""

    def __init__(self):
        super().__init__()
        self.online = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.target = copy.deepcopy(self.online).requires_grad_(False)


class CopyTarget(SessionRunHook):
    """Copies the weights after each loop; without XLA a hook is called after each step."""

    def after_run(self, context, *_):
        if context.step % LOOP == 0:
            context.model.target.load_state_dict(context.model.online.state_dict())


def q_fn(features, labels, mode, params, model, optimizer):
    values = model.online(features["state"])
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"values": values})
    chosen = values.gather(1, features["action"][:, None]).squeeze(1)
    with torch.no_grad():
        best = model.online(features["next"]).argmax(1, keepdim=True)
        goal = features["reward"] + 0.9 * model.target(features["next"]).gather(1, best).squeeze(1)
    losses = F.smooth_l1_loss(chosen, goal, reduction="none")
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses)
    loss = losses.mean()
    minimize = CrossShardOptimizer(optimizer).minimize(loss)
    if not params["soft"]:
        return TPUEstimatorSpec(mode, loss=loss, train_op=minimize)

    def train_op():
        optimizer.zero_grad()
        loss.backward()
        CrossShardOptimizer(optimizer).step()
        with torch.no_grad():
            for target, online in zip(model.target.parameters(), model.online.parameters(), strict=True):
                target.lerp_(online, 0.05)

    return TPUEstimatorSpec(mode, loss=loss, train_op=train_op)


def transitions(generator):
    return {"state": normal(generator, 4), "next": normal(generator, 4), "action": whole(generator, 3),
            "reward": normal(generator)}, None


def net(params):
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


def maml_by_func(model, features):
    weights = dict(model.named_parameters())

    def inner(weights, x, y):
        return F.mse_loss(functional_call(model, weights, (x,)), y)

    def outer(x, y, query):
        slopes = grad(inner)(weights, x, y)
        return functional_call(model, {name: weights[name] - 0.1 * slopes[name] for name in weights}, (query,))

    return vmap(outer)(features["x"], features["y"], features["query"])


def maml_by_autograd(model, features):
    outs = []
    with torch.enable_grad():
        for i in range(len(features["x"])):
            weights = dict(model.named_parameters())
            loss = F.mse_loss(functional_call(model, weights, (features["x"][i],)), features["y"][i])
            slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            adapted = {name: w - 0.1 * s for (name, w), s in zip(weights.items(), slopes, strict=True)}
            outs.append(functional_call(model, adapted, (features["query"][i],)))
    return torch.stack(outs)


def maml_fn(features, labels, mode, params, model, optimizer):
    out = (maml_by_func if params["func"] else maml_by_autograd)(model, features)
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"y": out})
    losses = F.mse_loss(out, labels, reduction="none").mean((1, 2))
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses)
    loss = losses.mean()
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))


def episodes(generator):
    return {name: normal(generator, 5, 1) for name in ("x", "y", "query")}, normal(generator, 5, 1)


def physics_fn(features, labels, mode, params, model, optimizer):
    """u' = -u: the derivative by the input is in the loss."""
    with torch.enable_grad():
        x = features.detach().requires_grad_(True)
        u = model(x)
        slope, = torch.autograd.grad(u.sum(), x, create_graph=mode == ModeKeys.TRAIN)
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"u": u, "slope": slope})
    losses = (slope + u).square().squeeze(1) + (model(torch.zeros_like(x)) - 1).square().squeeze(1)
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses)
    loss = losses.mean()
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))


def penalty_fn(features, labels, mode, params, model, optimizer):
    """A critic with a gradient penalty, as WGAN-GP has it."""
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"score": model(features["real"])})
    wasserstein = (model(features["fake"]) - model(features["real"])).squeeze(1)
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=wasserstein)
    mixed = torch.lerp(features["real"], features["fake"], features["share"]).requires_grad_(True)
    slope, = torch.autograd.grad(model(mixed).sum(), mixed, create_graph=True)
    loss = (wasserstein + 10 * (slope.norm(dim=1) - 1).square()).mean()
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))


def gaussian(out, labels):
    mean, log_scale = out.chunk(2, 1)
    return -torch.distributions.Normal(mean, log_scale.exp(), validate_args=False).log_prob(labels).sum(1)


JOBS = [
    Job(name="clipped policy gradient", model_fn=policy_gradient_fn, model=policy, rows=rollouts),
    Job(name="double dqn, target by a hook", model_fn=q_fn, model=lambda params: Q(), rows=transitions,
        params={"soft": False}, hooks=lambda: [CopyTarget()],
        optimizer=lambda model, params: torch.optim.Adam(model.online.parameters(), lr=1e-3)),
    Job(name="dqn, target by lerp", model_fn=q_fn, model=lambda params: Q(), rows=transitions, params={"soft": True},
        optimizer=lambda model, params: torch.optim.Adam(model.online.parameters(), lr=1e-3)),
    Job(name="maml by torch.func", model_fn=maml_fn, model=net, rows=episodes, params={"func": True}),
    Job(name="maml by create_graph", model_fn=maml_fn, model=net, rows=episodes, params={"func": False}),
    Job(name="physics", model_fn=physics_fn, model=net, rows=lambda g: (normal(g, 1), None)),
    Job(name="gradient penalty", model_fn=penalty_fn, rows=lambda g: (
        {"real": normal(g, 3), "fake": normal(g, 3), "share": normal(g, 1).sigmoid()}, None),
        model=lambda params: nn.Sequential(nn.Linear(3, 8), nn.Softplus(), nn.Linear(8, 1))),
    Job(name="gaussian regression", model_fn=supervised(gaussian), rows=lambda g: (normal(g, 3), normal(g, 2)),
        model=lambda params: nn.Sequential(nn.Linear(3, 8), nn.Mish(), nn.Linear(8, 4))),
]
