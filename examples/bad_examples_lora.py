"""
Wrong examples in a LoRA fine-tuning
====================================

Some of the texts that a language model is fine-tuned on are wrong, and nobody knows which. Their
gradients are larger than those of the others, once the model has learned what most texts have in
common. Here a small Llama with LoRA adapters is trained by the ``Trainer`` of transformers, and one
callback lists the examples with the largest gradients by their index in the dataset.
"""

# %%
# A model that knows something
# ----------------------------
# The texts count: each token is the one before plus a step, which is the first token of the text.
# The model is trained on steps of 1 to 4 before, in place of a pretrained one.

import logging
import tempfile
import warnings

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import pycoherence as pc
from pycoherence.integrations.transformers import KeepIndex, PerExampleCallback

logging.getLogger("transformers").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's

torch.manual_seed(0)
TOKENS, LENGTH = 24, 10


def texts(steps, n):
    """Texts that count by some of ``steps``, of which the model sees the first token too."""
    step = steps[torch.randint(len(steps), (n, 1))]
    start = torch.randint(TOKENS, (n, 1))
    return torch.cat([step, (start + step * torch.arange(LENGTH)) % TOKENS], 1)


model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
    )
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(300):
    optimizer.zero_grad()
    ids = texts(torch.tensor([1, 2, 3, 4]), 32)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
print(f"loss before the fine-tuning: {loss.item():.2f}")

# %%
# Texts to learn, some of them wrong
# ----------------------------------
# The new texts count by 5 and by 7. One in twelve was spoilt: four of its tokens are others. Each
# example has its index, which the batch has to bring along.

new = texts(torch.tensor([5, 7]), 384)
wrong = torch.zeros(len(new), dtype=torch.bool)
wrong[torch.randperm(len(new))[: len(new) // 12]] = True
for i in wrong.nonzero().flatten():
    places = 3 + torch.randperm(LENGTH - 2)[:4]
    new[i, places] = torch.randint(TOKENS, (4,))

data = [{"input_ids": ids, "labels": ids, "index": i} for i, ids in enumerate(new)]

# %%
# The fine-tuning
# ---------------
# The Trainer accumulates two micro-batches for a step, and divides the sum over their tokens by the
# number of tokens in both. The callback undoes that: ``g_b`` is the gradient of example b's own
# sum. It is that of the adapters alone, since nothing else is trained. With this ``top`` all
# examples are listed.

adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
callback = PerExampleCallback(pc.SqNorms(), top=len(data))
arguments = TrainingArguments(
    tempfile.mkdtemp(),
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    num_train_epochs=4,
    learning_rate=5e-3,
    remove_unused_columns=False,  # keeps the index
    use_cpu=True,
    report_to="none",
    save_strategy="no",
    logging_steps=24,
    disable_tqdm=True,
)
trainer = Trainer(
    adapted,
    arguments,
    train_dataset=data,
    data_collator=KeepIndex(default_data_collator),
    callbacks=[callback],
)
trainer.train()

# %%
# Who surprised it
# ----------------
# In the last epoch the wrong examples are those with the largest gradients.

suspects = callback.surprising[: int(wrong.sum())]
found = sum(bool(wrong[one.index]) for one in suspects)
print(f"{found} of the {len(suspects)} examples with the largest gradients are wrong")
for index, norm, step in suspects[:5]:
    print(f"example {index:3d}  norm {norm:5.1f}  at step {step}  {new[index].tolist()}")
assert found > 0.8 * len(suspects)

# %%
# The callback also kept the scalars of each step. While the model learns what the texts have in
# common their gradients agree. As it is learned m-coherence falls to 1, the value of gradients that
# have nothing to do with each other: what is left is what each text wants for itself.

norms = torch.tensor([one.norm for one in sorted(callback.surprising)])
steps = [at["step"] for at in callback.history]

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
bins = torch.linspace(0, norms.max().item(), 40).tolist()
left.hist([norms[~wrong], norms[wrong]], bins, label=["right", "wrong"], stacked=True)
left.set(xlabel="norm of the gradient, last epoch", ylabel="examples", yscale="log")
left.legend()
right.plot(steps, [at["coherence/m"] for at in callback.history])
right.set(xlabel="optimizer step", ylabel="m-coherence")
figure.tight_layout()
plt.show()
