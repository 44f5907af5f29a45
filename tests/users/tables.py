"""Tables, graphs, ranking, mixtures: wide and deep, quantiles, several tasks, message passing, triplets, experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn

from tests.users.job import Job, classes, normal, supervised, whole
from tpuspec import CrossShardOptimizer, ModeKeys, TPUEstimatorSpec

NODES, EDGES = 6, 10
QUANTILES = (0.1, 0.5, 0.9)


class WideAndDeep(nn.Module):
    """Categories as embeddings, numbers normalised."""

    def __init__(self):
        super().__init__()
        self.embed = nn.ModuleDict({"city": nn.Embedding(9, 3), "day": nn.Embedding(7, 2)})
        self.norm = nn.BatchNorm1d(4)
        self.deep = nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 1))
        self.wide = nn.Embedding(63, 1)

    def forward(self, x):
        parts = [self.embed[name](x[name]) for name in self.embed] + [self.norm(x["numbers"])]
        return (self.deep(torch.cat(parts, 1)) + self.wide(x["city"] * 7 + x["day"])).squeeze(1)


def binary_fn(features, labels, mode, params, model, optimizer):
    logits = model(features)
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"probability": logits.sigmoid()})
    losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none",
                                                pos_weight=torch.tensor(2.0, device=logits.device))
    if mode == ModeKeys.EVAL:
        def metric_fn(labels, logits):
            return {"auc": (torchmetrics.AUROC(task="binary"), (logits, labels)),
                    "f1": (torchmetrics.F1Score(task="binary"), (logits.sigmoid(), labels))}
        return TPUEstimatorSpec(mode, loss=losses, eval_metrics=(metric_fn, [labels, logits]))
    loss = losses.mean()
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))


def quantile(out, labels):
    error = labels[:, None] - out
    levels = torch.tensor(QUANTILES, device=out.device)
    return torch.maximum(levels * error, (levels - 1) * error).sum(1)


def tasks(params):
    return nn.ModuleDict({"trunk": nn.Sequential(nn.Linear(5, 16), nn.GELU()), "kind": nn.Linear(16, 3),
                          "size": nn.Linear(16, 1)})


def tasks_fn(features, labels, mode, params, model, optimizer, global_step):
    h = model["trunk"](features)
    kind, size = model["kind"](h), model["size"](h).squeeze(1)
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"kind": kind.softmax(1), "size": size})
    losses = {"kind": F.cross_entropy(kind, labels["kind"], reduction="none"),
              "size": F.huber_loss(size, labels["size"], reduction="none")}
    weight = torch.clamp(global_step.float() / 6, max=1.0)
    total = losses["kind"] + weight * losses["size"]
    if mode == ModeKeys.EVAL:
        def metric_fn(kind, kind_label, size, size_label):
            return {"accuracy": (kind.argmax(1) == kind_label).float(), "error": (size - size_label).abs(),
                    "mse": (torchmetrics.MeanSquaredError(), (size, size_label))}
        return TPUEstimatorSpec(mode, loss=total, eval_metrics=(metric_fn, {
            "kind": kind, "kind_label": labels["kind"], "size": size, "size_label": labels["size"]}))
    loss = total.mean()
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))


class Messages(nn.Module):
    """A graph network: nodes of all graphs of a batch in one tensor, sums by index_add, maxima by scatter_reduce."""

    def __init__(self):
        super().__init__()
        self.message, self.update, self.head = nn.Linear(6, 8), nn.Linear(3 + 16, 8), nn.Linear(16, 3)

    def forward(self, x):
        rows = torch.arange(len(x["nodes"]), device=x["nodes"].device)
        nodes = x["nodes"].flatten(0, 1)
        edges = (x["edges"] + rows[:, None, None] * NODES).transpose(1, 2).flatten(0, 1)
        source, target = edges[:, 0], edges[:, 1]
        message = F.relu(self.message(torch.cat([nodes[source], nodes[target]], 1)))
        total = message.new_zeros(len(nodes), 8).index_add(0, target, message)
        largest = torch.zeros_like(total).scatter_reduce(0, target[:, None].expand_as(message), message, "amax")
        h = F.relu(self.update(torch.cat([nodes, total, largest], 1))).unflatten(0, (-1, NODES))
        return self.head(torch.cat([h.mean(1), h.amax(1)], 1))


class Attention(nn.Module):
    """Graph attention by a dense adjacency."""

    def __init__(self):
        super().__init__()
        self.project, self.one, self.two = nn.Linear(3, 8, bias=False), nn.Linear(8, 1), nn.Linear(8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        adjacency = torch.zeros(len(x["nodes"]), NODES * NODES, device=x["nodes"].device)
        flat = x["edges"][:, 0] * NODES + x["edges"][:, 1]
        adjacency = adjacency.scatter(1, flat, 1.0).unflatten(1, (NODES, NODES))
        adjacency = adjacency + torch.eye(NODES, device=adjacency.device)
        h = self.project(x["nodes"])
        scores = F.leaky_relu(self.one(h) + self.two(h).transpose(1, 2), 0.2)
        weights = scores.masked_fill(adjacency == 0, float("-inf")).softmax(-1)
        return self.head(torch.einsum("bij,bjk->bik", weights, h).relu().sum(1))


def graphs(generator):
    return {"nodes": normal(generator, NODES, 3), "edges": whole(generator, NODES, 2, EDGES)}, whole(generator, 3)


def triplet(out, labels):
    return F.triplet_margin_loss(*out, margin=0.5, reduction="none")


class Three(nn.Module):
    """One net for anchor, positive and negative."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        return [F.normalize(self.net(x[:, i]), dim=-1) for i in range(3)]


class Experts(nn.Module):
    """The best two of four experts, by topk, with a loss of balance that is kept on the module."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(5, 4), nn.ModuleList(nn.Linear(5, 3) for _ in range(4))

    def forward(self, x):
        probability = self.gate(x).softmax(-1)
        best, index = probability.topk(2, dim=-1)
        weights = torch.zeros_like(probability).scatter(1, index, best / best.sum(-1, keepdim=True))
        self.balance = 4 * (probability.mean(0) * (weights > 0).float().mean(0)).sum()
        return torch.einsum("be,ebk->bk", weights, torch.stack([expert(x) for expert in self.experts]))


def experts_fn(features, labels, mode, params, model, optimizer):
    out = model(features)
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"output": out})
    losses = classes(out, labels)
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses)
    loss = losses.mean() + 0.01 * model.balance
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))


JOBS = [
    Job(name="wide and deep", model_fn=binary_fn, model=lambda params: WideAndDeep(),
        rows=lambda g: ({"city": whole(g, 9), "day": whole(g, 7), "numbers": normal(g, 4)}, whole(g, 2)),
        optimizer=lambda model, params: torch.optim.RMSprop(model.parameters(), lr=1e-3)),
    Job(name="quantiles", model_fn=supervised(quantile),
        model=lambda params: nn.Sequential(nn.Linear(5, 8), nn.Softplus(), nn.Linear(8, 3)),
        rows=lambda g: (normal(g, 5), normal(g))),
    Job(name="several tasks", kind="traced", model_fn=tasks_fn, model=tasks,
        rows=lambda g: (normal(g, 5), {"kind": whole(g, 3), "size": normal(g)})),
    Job(name="graph messages", model_fn=supervised(classes), model=lambda params: Messages(), rows=graphs),
    Job(name="graph attention", model_fn=supervised(classes), model=lambda params: Attention(), rows=graphs),
    Job(name="triplets", model_fn=supervised(triplet, output=lambda out: out[0]), model=lambda params: Three(),
        rows=lambda g: (normal(g, 3, 5), normal(g))),
    Job(name="experts", model_fn=experts_fn, model=lambda params: Experts(),
        rows=lambda g: (normal(g, 5), whole(g, 3))),
]
