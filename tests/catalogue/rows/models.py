"""Whole models."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catalogue.row import B, Topic, embedding, linear, normal, several, uses
from catalogue.whole import (
    T,
    UNet,
    V,
    adapted,
    checkpointed,
    randomised,
    resnet18,
    transformer,
    with_adapters,
)

HUB = Topic("Models of `transformers`")
PEFT = Topic("Models of `peft`")
OWN = Topic("Convolutional networks")
POSITIONS = Topic("Positions, types and masks of models")


def words(length: int = T):
    return lambda: torch.randint(1, V, (B, length))


def padded():
    """Sentences of several lengths."""
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, 3:], mask[2, 4:] = 0, 0
    return torch.randint(1, V, (B, T)), mask


def pairs():
    return torch.randint(1, V, (B, T)), torch.randint(1, V, (B, 3))


def pictures():
    return torch.randn(B, 2, 6, 6), torch.tensor([0, 1, 2, 1])


def language(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """The model's own loss, a mean over all words of sentences of one length."""
    return model(input_ids=batch[0], labels=batch[0]).loss


def masked(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """A mean over sentences of the mean over their words: the model's is one over all words."""
    ids, mask = batch
    logits = model(input_ids=ids, attention_mask=mask).logits
    losses = F.cross_entropy(logits.mT, ids, reduction="none")
    return ((losses * mask).sum(1) / mask.sum(1)).mean()


def translation(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return model(input_ids=batch[0], labels=batch[1]).loss


def classes(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return model(batch[0], labels=batch[1]).loss


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 3)).transpose(1, 2)


@POSITIONS(
    "a bias of pairs of positions",
    {", `T ≠ B`": normal(B, T, 6), ", `T = B`": normal(B, B, 6)},
    bias=embedding(V, 2),
    layer=linear(6, 6),
)
def biased(m: Any, x: Tensor) -> Tensor:
    """Attention with a learned bias for each pair of positions."""
    steps = torch.arange(x.shape[1])
    bias = m.bias((steps[:, None] - steps).abs()).permute(2, 0, 1)
    x = heads(m.layer(x))
    return F.scaled_dot_product_attention(x, x, x, attn_mask=bias)


@POSITIONS(
    "learned queries",
    normal(B, T, 6),
    queries=normal(1, 2, 7, 3),
    layer=linear(6, 6),
)
def asked(m: Any, x: Tensor) -> Tensor:
    """Attention of learned queries."""
    x = heads(m.layer(x))
    return F.scaled_dot_product_attention(m.queries, x, x)


def hub(
    name: str,
    build: Any,
    inputs: Any,
    loss: Any = language,
    attentions: tuple[str, ...] = ("eager", "sdpa"),
) -> None:
    for attention in attentions:
        with_it = partial(build, attention=attention)
        HUB.add(f"{name}, {attention} attention", with_it, inputs, loss=loss)


gpt2 = partial(transformer, "GPT2", "LMHeadModel")
bert = partial(transformer, "Bert", "ForMaskedLM")
llama = partial(transformer, "Llama", "ForCausalLM")
vit = partial(transformer, "ViT", "ForImageClassification")
t5 = partial(transformer, "T5", "ForConditionalGeneration")

hub("GPT-2, its embedding tied to the head", gpt2, words())
hub("GPT-2, `T = B`", gpt2, words(B), attentions=("sdpa",))
hub("GPT-2, with padding", gpt2, padded, masked)
hub("BERT, its embedding tied to the head", bert, words())
hub("BERT, `T = B`", bert, words(B), attentions=("eager",))
hub("BERT, with padding", bert, padded, masked, ("sdpa",))
hub("Llama", llama, words())
hub("Llama, tied, with padding", partial(llama, tie_word_embeddings=True), padded, masked)
hub("ViT", vit, pictures, classes)
hub("T5", t5, pairs, translation)
hub("T5, `T = B`", t5, several(words(B), words(B)), translation)
for name, build, inputs, loss in (
    ("GPT-2", gpt2, words(), language),
    ("BERT", bert, words(), language),
    ("Llama", llama, words(), language),
    ("ViT", vit, pictures, classes),
    ("T5", t5, pairs, translation),
):
    again = partial(lambda build: checkpointed(build()), build)
    HUB.add(f"{name} with activation checkpointing", again, inputs, loss=loss)


def lora(kind: str, task: str, *targets: str, **options: Any):
    def build() -> nn.Module:
        given = {"target_modules": list(targets), "r": 2, **options}
        return adapted(transformer(kind, task), "Lora", **given)

    return build


def dora() -> nn.Module:
    return lora("Llama", "ForCausalLM", "q_proj", "down_proj", use_dora=True)().train()


def ia3() -> nn.Module:
    targets = ["k_proj", "v_proj", "down_proj"]
    return adapted(llama(), "IA3", target_modules=targets, feedforward_modules=["down_proj"])


EVERYTHING = ("q_proj", "v_proj", "embed_tokens", "lm_head")

for name, build, inputs, loss in (
    ("LoRA of GPT-2", lora("GPT2", "LMHeadModel", "c_attn"), words(), language),
    (
        "LoRA of Llama, embedding and head too",
        lora("Llama", "ForCausalLM", *EVERYTHING),
        words(),
        language,
    ),
    ("LoRA with weights in parts (DoRA)", dora, words(), language),
    ("IA3", ia3, words(), language),
    ("adapters behind layers of BERT", lambda: with_adapters(bert()), padded, masked),
):
    PEFT.add(name, build, inputs, loss=loss)
OWN.add("ResNet-18 with GroupNorm", partial(resnet18, "group"), normal(B, 3, 16, 16))
OWN.add("ResNet-18 with BatchNorm in eval mode", partial(resnet18, "batch"), normal(B, 3, 16, 16))
OWN.add("U-Net", lambda: randomised(UNet()), normal(B, 3, 8, 8))


def looked_up(others: Any) -> Any:
    """Words, and what is the same for all examples."""
    return lambda m, x: m.words(x) + m.others(others(x))


TABLES = {"words": embedding(V, 6), "others": embedding(V, 6)}

for name, others in {
    "positions repeated for each example": lambda x: torch.arange(T).repeat(B, 1)[: len(x)],
    "positions expanded": lambda x: torch.arange(T).expand(x.shape),
    "types, `torch.zeros_like(ids)`": torch.zeros_like,
    "types, `torch.zeros(B, T)`": lambda x: torch.zeros(x.shape, dtype=torch.long),
}.items():
    POSITIONS.add(name, uses(looked_up(others), **TABLES), words())
