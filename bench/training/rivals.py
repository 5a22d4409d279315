"""How other libraries measure per-example gradients; each step does what their documents show.

All return statistics of the examples' own gradients. Opacus and BackPACK fill `.grad` in the same
pass, as we do; vmap(grad) and TorchJD do not, and are not made to.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.shared.tasks import Task
from bench.shared.tasks import loss as mean_loss
from bench.training.cases import Case, Step, forget_gradients
from bench.training.truth import Outputs


def opacus_hooks(task: Task) -> Step:
    """Per-example gradients in `grad_sample`, from which the norms are taken."""
    from opacus import GradSampleModule

    model = GradSampleModule(task.model)
    wrapped = replace(task, model=model)

    def step() -> Outputs:
        model.zero_grad(set_to_none=True)
        wrapped.loss().backward()
        rows = [p.grad_sample.flatten(1) for p in model.parameters()]
        norms = torch.stack([torch.linalg.vector_norm(row, dim=1) for row in rows])
        return {"sq_norms": norms.square().sum(0)}

    return step


def opacus_ghost(task: Task) -> Step:
    """The norms of ghost clipping, from its first backward pass."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    for module in task.model.modules():
        if isinstance(module, nn.Embedding):  # its norms raise on ids that are expanded
            module.register_forward_pre_hook(lambda _, ids: (ids[0].contiguous(),))
    model = GradSampleModuleFastGradientClipping(task.model, use_ghost_clipping=True)
    wrapped = replace(task, model=model)

    def step() -> Outputs:
        model.zero_grad(set_to_none=True)
        wrapped.loss().backward()
        return {"sq_norms": model.get_norm_sample().square()}

    return step


def backpack_l2(task: Task) -> Step:
    """The extension `BatchL2Grad`."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    extended = replace(task, model=extend(task.model))
    parameters = list(task.model.parameters())

    def step() -> Outputs:
        forget_gradients(task.model)
        with backpack(BatchL2Grad()):
            extended.loss().backward()
        lacking = {
            type(module).__name__
            for module in task.model.modules()
            if any(not hasattr(p, "batch_l2") for p in module.parameters(recurse=False))
        }
        if lacking:
            raise NotImplementedError(f"no norms for {', '.join(sorted(lacking))}")
        share = torch.stack([p.batch_l2 for p in parameters]).sum(0)
        return {"sq_norms": share * len(task.y) ** 2}

    return step


def vmap_grad(task: Task) -> Step:
    """`torch.func`: the gradient of one example, vectorised over the batch."""
    parameters = {name: p.detach() for name, p in task.model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(task.model, parameters, (x.unsqueeze(0),))
        return mean_loss(logits, y.unsqueeze(0))

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def step() -> Outputs:
        rows = gradients(parameters, task.x, task.y).values()
        norms = torch.stack([torch.linalg.vector_norm(row.flatten(1), dim=1) for row in rows])
        return {"sq_norms": norms.square().sum(0)}

    return step


def torchjd_gramian(task: Task) -> Step:
    """The engine of `torchjd.autogram`."""
    from torchjd.autogram import Engine

    engine = Engine(task.model, batch_dim=0)

    def step() -> Outputs:
        return {"gram": engine.compute_gramian(task.losses())}

    return step


RIVALS = [
    Case("Opacus hooks", "rival", opacus_hooks),
    Case("Opacus ghost", "rival", opacus_ghost),
    Case("BackPACK L2", "rival", backpack_l2),
    Case("vmap(grad) norms", "rival", vmap_grad),
    Case("TorchJD Gramian", "rival", torchjd_gramian),
]
