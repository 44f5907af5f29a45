"""Tiny BERT and GPT-2 of transformers, made as a fine-tuning has them: padding masks, dropout, warm-up, clipping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

NUM_BATCHES, BATCH_SIZE, LENGTH, VOCABULARY, NUM_CLASSES = 8, 8, 32, 256, 3
SEED = 0
CLIP_NORM = 1.0
NUM_WARM_UP_STEPS = 100


def build(name: str, dropout: float = 0.1) -> nn.Module:
    """Returns 'bert', a classifier, or 'gpt2', a language model; two layers of width 64, random weights."""
    import transformers

    torch.manual_seed(SEED)
    if name == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=LENGTH, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
            num_labels=NUM_CLASSES))
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=dropout, use_cache=False, bos_token_id=0, eos_token_id=0))


def batches(name: str) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Returns NUM_BATCHES batches of ids and masks [rows, length], with labels [rows], or [rows, length] for gpt2."""
    generator = torch.Generator().manual_seed(SEED)
    made = []
    for _ in range(NUM_BATCHES):
        ids = torch.randint(0, VOCABULARY, (BATCH_SIZE, LENGTH), generator=generator)
        lengths = torch.randint(LENGTH // 4, LENGTH + 1, (BATCH_SIZE, 1), generator=generator)
        mask = (torch.arange(LENGTH) < lengths).long()
        labels = (torch.randint(0, NUM_CLASSES, (BATCH_SIZE,), generator=generator) if name == "bert"
                  else ids.masked_fill(mask == 0, -100))
        made.append(({"input_ids": ids, "attention_mask": mask}, labels))
    return made


def loss_of(module: nn.Module, features: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    return module(**features, labels=labels).loss


def make_optimizer(module: nn.Module, params: Any = None) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


def make_schedule(optimizer: torch.optim.Optimizer, params: Any = None) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up from 0."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / NUM_WARM_UP_STEPS))
