"""Whole models."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catalogue.row import B, Row, normal, uses
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

HUB = "Models of `transformers`"
PEFT = "Models of `peft`"
OWN = "Convolutional networks"
POSITIONS = "Positions, types and masks of models"


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


def biased(m: Any, x: Tensor) -> Tensor:
    """Attention with a learned bias for each pair of positions."""
    steps = torch.arange(x.shape[1])
    bias = m.bias((steps[:, None] - steps).abs()).permute(2, 0, 1)
    x = heads(m.layer(x))
    return F.scaled_dot_product_attention(x, x, x, attn_mask=bias)


def asked(m: Any, x: Tensor) -> Tensor:
    """Attention of learned queries."""
    x = heads(m.layer(x))
    return F.scaled_dot_product_attention(m.queries, x, x)


def looked_up(ids: Any, length: int = T) -> Any:
    """Words, and what is the same for all examples."""

    def function(m: Any, x: Tensor) -> Tensor:
        return m.words(x) + m.others(ids(x))

    table = partial(nn.Embedding, V, 6)
    return {"build": uses(function, words=table, others=table), "inputs": words(length)}


def hub(
    name: str,
    build: Any,
    inputs: Any,
    loss: Any = language,
    attentions: tuple[str, ...] = ("eager", "sdpa"),
) -> list[Row]:
    return [
        Row(HUB, f"{name}, {a} attention", partial(build, attention=a), inputs, loss=loss)
        for a in attentions
    ]


def lora(kind: str, task: str, *targets: str, **options: Any):
    def build() -> nn.Module:
        given = {"target_modules": list(targets), "r": 2, **options}
        return adapted(transformer(kind, task), "Lora", **given)

    return build


gpt2 = partial(transformer, "GPT2", "LMHeadModel")
bert = partial(transformer, "Bert", "ForMaskedLM")
llama = partial(transformer, "Llama", "ForCausalLM")
vit = partial(transformer, "ViT", "ForImageClassification")
t5 = partial(transformer, "T5", "ForConditionalGeneration")

ROWS = [
    *hub("GPT-2, its embedding tied to the head", gpt2, words()),
    *hub("GPT-2, `T = B`", gpt2, words(B), attentions=("sdpa",)),
    *hub("GPT-2, with padding", gpt2, padded, masked),
    *hub("BERT, its embedding tied to the head", bert, words()),
    *hub("BERT, `T = B`", bert, words(B), attentions=("eager",)),
    *hub("BERT, with padding", bert, padded, masked, ("sdpa",)),
    *hub("Llama", llama, words()),
    *hub("Llama, tied, with padding", partial(llama, tie_word_embeddings=True), padded, masked),
    *hub("ViT", vit, pictures, classes),
    *hub("T5", t5, pairs, translation),
    *hub(
        "T5, `T = B`",
        t5,
        lambda: (words(B)(), words(B)()),
        translation,
    ),
    *(
        Row(
            HUB,
            f"{name} with activation checkpointing",
            lambda build=build: checkpointed(build()),
            inputs,
            loss=loss,
        )
        for name, build, inputs, loss in (
            ("GPT-2", gpt2, words(), language),
            ("BERT", bert, words(), language),
            ("Llama", llama, words(), language),
            ("ViT", vit, pictures, classes),
            ("T5", t5, pairs, translation),
        )
    ),
    Row(PEFT, "LoRA of GPT-2", lora("GPT2", "LMHeadModel", "c_attn"), words(), loss=language),
    Row(
        PEFT,
        "LoRA of Llama, embedding and head too",
        lora("Llama", "ForCausalLM", "q_proj", "v_proj", "embed_tokens", "lm_head"),
        words(),
        loss=language,
    ),
    Row(
        PEFT,
        "LoRA with weights in parts (DoRA)",
        lambda: lora("Llama", "ForCausalLM", "q_proj", "down_proj", use_dora=True)().train(),
        words(),
        loss=language,
    ),
    Row(
        PEFT,
        "IA3",
        lambda: adapted(
            llama(),
            "IA3",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
        words(),
        loss=language,
    ),
    Row(PEFT, "adapters behind layers of BERT", lambda: with_adapters(bert()), padded, loss=masked),
    Row(OWN, "ResNet-18 with GroupNorm", partial(resnet18, "group"), normal(B, 3, 16, 16)),
    Row(
        OWN,
        "ResNet-18 with BatchNorm in eval mode",
        partial(resnet18, "batch"),
        normal(B, 3, 16, 16),
    ),
    Row(OWN, "U-Net", lambda: randomised(UNet()), normal(B, 3, 8, 8)),
    *(
        Row(POSITIONS, name, **looked_up(ids))
        for name, ids in {
            "positions repeated for each example": lambda x: torch.arange(T).repeat(B, 1)[: len(x)],
            "positions expanded": lambda x: torch.arange(T).expand(x.shape),
            "types, `torch.zeros_like(ids)`": torch.zeros_like,
            "types, `torch.zeros(B, T)`": lambda x: torch.zeros(x.shape, dtype=torch.long),
        }.items()
    ),
    *(
        Row(
            POSITIONS,
            f"a bias of pairs of positions, `T {sign} B`",
            uses(biased, bias=lambda: nn.Embedding(V, 2), layer=lambda: nn.Linear(6, 6)),
            normal(B, length, 6),
        )
        for sign, length in (("≠", T), ("=", B))
    ),
    Row(
        POSITIONS,
        "learned queries",
        uses(asked, queries=normal(1, 2, 7, 3), layer=lambda: nn.Linear(6, 6)),
        normal(B, T, 6),
    ),
]
