"""Images: classifiers, segmentation, a VAE, a GAN, focal loss, a contrastive loss of two views."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.users.job import Job, classes, normal, supervised, whole
from tpuspec import CrossShardOptimizer, ModeKeys, TPUEstimatorSpec


def conv_net(params):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 5))


class ViT(nn.Module):
    """Patches, a class token, positions, an encoder."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 5, 16) * 0.02)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True,
                                           activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.position
        return self.head(self.encoder(h)[:, 0])


class UNet(nn.Module):
    """One level down and up, with a skip."""

    def __init__(self):
        super().__init__()
        self.down, self.low = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        skip = F.relu(self.down(x))
        low = F.relu(self.low(F.max_pool2d(skip, 2)))
        up = self.up(low) + F.interpolate(low[:, :4], scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(torch.cat([skip, up], 1))


def dice(out, labels):
    probability = out.softmax(1)[:, 1]
    both = (probability * labels).sum((1, 2))
    return 1 - (2 * both + 1) / (probability.sum((1, 2)) + labels.sum((1, 2)) + 1) + F.cross_entropy(
        out, labels, reduction="none").mean((1, 2))


class VAE(nn.Module):
    """Noise comes with the batch, so that runs can be compared."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 8))
        self.decode = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 64), nn.Unflatten(1, (1, 8, 8)))

    def forward(self, features):
        mean, log_variance = self.encode(features["image"]).chunk(2, 1)
        return self.decode(mean + (log_variance / 2).exp() * features["noise"]), mean, log_variance


def vae_fn(features, labels, mode, params, model, optimizer):
    image, mean, log_variance = model(features)
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"image": image.sigmoid(), "mean": mean})
    target = features["image"].sigmoid()
    losses = F.binary_cross_entropy_with_logits(image, target, reduction="none").sum((1, 2, 3))
    losses = losses - 0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses, eval_metrics=(
            lambda losses: {"largest": losses.square()}, [losses]))
    loss = losses.mean()
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))


def gan(params):
    return nn.ModuleDict({"g": nn.Sequential(nn.Linear(4, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(),
                                             nn.Linear(16, 6)),
                          "d": nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))})


def gan_fn(features, labels, mode, params, model, optimizer):
    fake = model["g"](features["noise"])
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"fake": fake})
    real = model["d"](features["real"])
    loss_d = F.softplus(-real) + F.softplus(model["d"](fake.detach()))
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=loss_d.squeeze(1))

    def train_op():
        optimizer["d"].zero_grad()
        loss_d.mean().backward()
        CrossShardOptimizer(optimizer["d"]).step()
        optimizer["g"].zero_grad()
        F.softplus(-model["d"](fake)).mean().backward()
        CrossShardOptimizer(optimizer["g"]).step(clip_grad_norm=1.0)

    return TPUEstimatorSpec(mode, loss=loss_d.mean(), train_op=train_op)


def gan_optimizers(model, params):
    return {name: torch.optim.Adam(model[name].parameters(), lr=2e-3, betas=(0.5, 0.999)) for name in ("g", "d")}


def focal(out, labels):
    cross_entropy = F.binary_cross_entropy_with_logits(out, labels, reduction="none")
    right = torch.exp(-cross_entropy)
    return ((1 - right) ** 2 * cross_entropy).mean(1)


class TwoViews(nn.Module):
    """SimCLR's encoder and head."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, features):
        return [F.normalize(self.encoder(features[name]), dim=1) for name in ("one", "two")]


def info_nce(out, labels):
    """Compares each row with all of its batch, so that a padded one would count: 24 rows fill their batches."""
    one, two = out
    similar = one @ two.t() / 0.2
    target = torch.arange(len(one), device=one.device)
    return (F.cross_entropy(similar, target, reduction="none")
            + F.cross_entropy(similar.t(), target, reduction="none")) / 2


class Frozen(nn.Module):
    """A backbone whose statistics stay (eval mode), under a trained stem, computed again in the backward."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.back = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()).eval()
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        h = checkpoint(self.back, self.stem(x), use_reentrant=False)
        return self.head(h.mean((2, 3)))


def images(generator, size=8, channels=3):
    return normal(generator, channels, size, size)


JOBS = [
    Job(name="conv net", model_fn=supervised(classes), model=conv_net,
        rows=lambda g: (images(g), whole(g, 5)), optimizer=lambda model, params: torch.optim.SGD(
            model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)),
    Job(name="vision transformer", model_fn=supervised(classes, clip_grad_norm=1.0), model=lambda params: ViT(),
        rows=lambda g: (images(g), whole(g, 5)),
        optimizer=lambda model, params: torch.optim.AdamW(model.parameters(), lr=1e-3)),
    Job(name="u-net", model_fn=supervised(dice, output=lambda out: out.argmax(1)), model=lambda params: UNet(),
        kind="traced", rows=lambda g: (images(g), whole(g, 2, 8, 8))),
    Job(name="vae", model_fn=vae_fn, model=lambda params: VAE(),
        rows=lambda g: ({"image": images(g, channels=1), "noise": normal(g, 4)}, None)),
    Job(name="gan", model_fn=gan_fn, model=gan, optimizer=gan_optimizers,
        rows=lambda g: ({"noise": normal(g, 4), "real": normal(g, 6)}, None)),
    Job(name="focal loss, pixel shuffle", model_fn=supervised(focal),
        model=lambda params: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.PixelShuffle(2), nn.ELU(),
                                           nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 4)),
        rows=lambda g: (images(g), whole(g, 2, 4).float())),
    Job(name="contrastive", model_fn=supervised(info_nce, output=lambda out: out[0]), model=lambda params: TwoViews(),
        rows=lambda g: ({"one": images(g, 4)[:24], "two": images(g, 4)[:24]}, torch.zeros(24))),
    Job(name="frozen backbone, checkpointed", model_fn=supervised(classes), model=lambda params: Frozen(),
        rows=lambda g: (images(g), whole(g, 5))),
]
