"""What bench_tpu_program.py compiles: a model, its batch, and the chips."""

from __future__ import annotations

from dataclasses import dataclass, field

LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, LARGEST_NORM = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
"""Of AdamW, and of the gradients together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    """Sizes of a GPT-2 or a Llama.

    Attributes:
      width, num_layers, num_heads: of the blocks.
      hidden: width within a block's MLP.
      vocabulary, length: of the tokens.
    """

    width: int
    num_layers: int
    num_heads: int
    hidden: int
    vocabulary: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResNet:
    """Sizes of a ResNet of bottleneck blocks.

    Attributes:
      width: channels of the first stage.
      num_blocks: of each stage.
      size: of the images.
      num_classes: of the labels.
    """

    width: int
    num_blocks: tuple[int, ...]
    size: int
    num_classes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One comparison.

    Attributes:
      model: gpt2, resnet or llama.
      sizes: of the model.
      rows: of the global batch.
      topology: of the chips.
      fsdp: number of chips that share the state and the rows; 1 without.
    """

    model: str
    sizes: Transformer | ResNet = field(repr=False)
    rows: int
    topology: str
    fsdp: int = 1


_GPT2 = Transformer(width=768, num_layers=12, num_heads=12, hidden=3072, vocabulary=50304, length=1024)
_LLAMA = Transformer(width=4096, num_layers=32, num_heads=32, hidden=11008, vocabulary=32000, length=2048)
_RESNET = ResNet(width=64, num_blocks=(3, 4, 6, 3), size=224, num_classes=1000)

CASES = {
    "gpt2": Case(model="gpt2", sizes=_GPT2, rows=8, topology="v5e:2x2"),
    "gpt2-fsdp": Case(model="gpt2", sizes=_GPT2, rows=128, topology="v5e:4x4", fsdp=16),
    "resnet50": Case(model="resnet", sizes=_RESNET, rows=64, topology="v5e:2x2"),
    "llama-7b-fsdp": Case(model="llama", sizes=_LLAMA, rows=16, topology="v5p:4x4x1", fsdp=16),
}
