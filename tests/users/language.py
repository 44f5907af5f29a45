"""Text and audio: taggers, transformers with masks, embedding bags, spectrograms, CTC, sampling in PREDICT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.users.job import ROWS, Job, classes, normal, supervised, whole
from tpuspec import CrossShardOptimizer, ModeKeys, TPUEstimatorSpec

WORDS, TAGS = 20, 4


class Tagger(nn.Module):
    """A recurrent layer over words; tags per word."""

    def __init__(self, layer, width=12):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8, padding_idx=0)
        self.layer, self.head = layer, nn.Linear(width, TAGS)

    def forward(self, ids):
        return self.head(self.layer(self.embed(ids))[0]).transpose(1, 2)


def tags(out, labels):
    return F.cross_entropy(out, labels, reduction="none", ignore_index=-100).mean(1)


def tagged(generator):
    ids = whole(generator, WORDS, 5)
    return ids, torch.where(ids == 0, -100, ids % TAGS)


class Packed(nn.Module):
    """Lengths that the user knows beforehand, the longest first."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        lengths = torch.tensor([5, 5, 4, 4, 3, 3, 2, 1])[:len(x)]
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        return self.head(pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0].sum(1))


class Encoder(nn.Module):
    """A transformer with a padding mask."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, features):
        mask = features["mask"]
        h = self.encoder(self.embed(features["ids"]), src_key_padding_mask=~mask)
        weights = mask[:, :, None].float()
        return self.head((h * weights).sum(1) / weights.sum(1))


def masked(generator):
    lengths = 1 + whole(generator, 6, 1)
    return {"ids": whole(generator, WORDS, 6), "mask": torch.arange(6)[None] < lengths}, whole(generator, 3)


class Causal(nn.Module):
    """A tiny GPT with tied weights."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(WORDS, 16), nn.Embedding(8, 16)
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.head = nn.Linear(16, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        h = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(h + self.out(a.transpose(1, 2).flatten(2)))


def causal_fn(features, labels, mode, params, model, optimizer):
    if mode == ModeKeys.PREDICT:
        ids = features[:, :2]
        for _ in range(4):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
        return TPUEstimatorSpec(mode, predictions={"ids": ids})
    logits = model(features[:, :-1])
    losses = F.cross_entropy(logits.transpose(1, 2), features[:, 1:], reduction="none", label_smoothing=0.1).mean(1)
    if mode == ModeKeys.EVAL:
        right = logits.argmax(-1) == features[:, 1:]
        return TPUEstimatorSpec(mode, loss=losses, eval_metrics=(
            lambda right: {"accuracy": right.float().mean(1)}, [right]))
    loss = losses.mean()
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))


class Bags(nn.Module):
    """Means of word vectors and of hashed pairs."""

    def __init__(self):
        super().__init__()
        self.words, self.pairs = nn.EmbeddingBag(WORDS, 6, mode="mean"), nn.EmbeddingBag(16, 6, mode="sum")
        self.head = nn.Linear(12, 3)

    def forward(self, ids):
        pairs = (ids[:, :-1] * 31 + ids[:, 1:]) % 16
        return self.head(torch.cat([self.words(ids), self.pairs(pairs)], 1))


class Spectrogram(nn.Module):
    """stft, log of its power, a convolution."""

    def __init__(self):
        super().__init__()
        self.register_buffer("window", torch.hann_window(16))
        self.conv, self.head = nn.Conv1d(9, 8, 3), nn.Linear(8, 3)

    def forward(self, wave):
        spectrum = torch.stft(wave, 16, 8, window=self.window, return_complex=True)
        return self.head(F.relu(self.conv(torch.log1p(spectrum.abs() ** 2))).amax(2))


class Fourier(nn.Module):
    """A layer of the kind of FNO: weights in the frequency domain."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(17, 2) * 0.3)
        self.head = nn.Linear(32, 3)

    def forward(self, wave):
        spectrum = torch.fft.rfft(wave) * torch.view_as_complex(self.weight)
        return self.head(torch.tanh(torch.fft.irfft(spectrum, n=32)))


def ctc(out, labels):
    lengths = torch.full((out.shape[0],), out.shape[1])
    return F.ctc_loss(out.log_softmax(-1).transpose(0, 1), labels, lengths, torch.full((out.shape[0],), 3),
                      reduction="none", zero_infinity=True)


class Speech(nn.Module):
    """Frames to letters."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv1d(5, 8, 3, padding=1), nn.Linear(8, 6)

    def forward(self, x):
        return self.head(F.glu(torch.cat([self.layer(x.transpose(1, 2))] * 2, 1), 1).transpose(1, 2))


JOBS = [
    Job(name="lstm tagger", model_fn=supervised(tags, output=lambda out: out.argmax(1)),
        model=lambda params: Tagger(nn.LSTM(8, 12, batch_first=True)), rows=tagged),
    Job(name="gru tagger", model_fn=supervised(tags), rows=tagged,
        model=lambda params: Tagger(nn.GRU(8, 12, batch_first=True))),
    Job(name="packed lstm", model_fn=supervised(classes), model=lambda params: Packed(),
        rows=lambda g: (normal(g, 5, 4), whole(g, 3))),
    Job(name="encoder with a mask", model_fn=supervised(classes), model=lambda params: Encoder(), rows=masked),
    Job(name="gpt", model_fn=causal_fn, model=lambda params: Causal(), rows=lambda g: (whole(g, WORDS, 8), None)),
    Job(name="embedding bags", model_fn=supervised(classes), model=lambda params: Bags(),
        rows=lambda g: (whole(g, WORDS, 6), whole(g, 3)),
        optimizer=lambda model, params: torch.optim.Adagrad(model.parameters(), lr=0.05)),
    Job(name="spectrogram", kind="traced", model_fn=supervised(classes), model=lambda params: Spectrogram(),
        rows=lambda g: (normal(g, 64), whole(g, 3))),
    Job(name="fourier layer", kind="traced", model_fn=supervised(classes), model=lambda params: Fourier(),
        rows=lambda g: (normal(g, 32), whole(g, 3))),
    Job(name="ctc", kind="traced", model_fn=supervised(ctc), model=lambda params: Speech(),
        rows=lambda g: (normal(g, 9, 5), 1 + torch.randint(0, 5, (ROWS, 3), generator=g))),
]
