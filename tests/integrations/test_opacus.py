"""The privacy engine beside Opacus' own, step by step, and the norms that it is given."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.ranks import needs_gloo, run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pycoherence as pc

opacus = pytest.importorskip("opacus")

from opacus.distributed import (  # noqa: E402
    DifferentiallyPrivateDistributedDataParallel as PrivateParallel,
)
from opacus.grad_sample import GradSampleModuleFastGradientClipping  # noqa: E402
from opacus.utils.batch_memory_manager import BatchMemoryManager  # noqa: E402

from pycoherence.integrations.opacus import PrivacyEngine, register  # noqa: E402

pytestmark = [
    # Opacus warns about its secure mode, and about its hooks on layers whose input has no gradient.
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    # peft calls what newer versions of transformers deprecate.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    # The accountants of Opacus warn about orders at which epsilon is smallest.
    pytest.mark.filterwarnings("ignore:Optimal order is the"),
]

N, C, SIGMA = 40, 0.4, 0.7


class Conv(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(1)),
            nn.Linear(4 * 6 * 6, 3),
        )


class Text(nn.Module):
    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=padding_idx)
        self.mixed, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        return self.head(self.norm(h + torch.tanh(self.mixed(h))).mean(1))


class Twice(nn.Module):
    """A layer that is used twice, as tied weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.again(torch.tanh(self.again(h)))))


def padded() -> nn.Module:
    return Text(padding_idx=0)


def images() -> Tensor:
    return torch.randn(N, 2, 6, 6)


def words() -> Tensor:
    return torch.randint(11, (N, 5))


def vectors() -> Tensor:
    return torch.randn(N, 5) * torch.linspace(0.1, 3, N)[:, None]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


Task = tuple[Callable[[], nn.Module], Callable[[], Tensor]]
TASKS: dict[str, Task] = {
    "mlp": (mlp, vectors),
    "conv": (Conv, images),
    "text": (Text, words),
    "twice": (Twice, vectors),
}


def private(
    engine: Any, task: str | Task = "mlp", batch: int = 8, lr: float = 0.5, **options: Any
) -> tuple[Any, Any, Any]:
    """A model, optimizer and loader, the same for all engines."""
    torch.manual_seed(0)
    make, inputs = TASKS[task] if isinstance(task, str) else task
    model = make()
    data = TensorDataset(inputs(), torch.randint(3, (N,)))
    chosen: Any = {"max_grad_norm": C, "noise_multiplier": SIGMA, **options}
    loader = DataLoader(
        data, batch_size=batch, generator=torch.Generator().manual_seed(3), shuffle=True
    )
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        data_loader=loader,
        noise_generator=torch.Generator().manual_seed(5),
        **chosen,
    )
    wrapped = options.get("wrap_model", True)
    return (made[0] if wrapped else model), made[1], made[2]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(
    model: nn.Module, optimizer: Any, loader: Any, reduction: str = "mean", epochs: int = 2
) -> tuple[list[Tensor], list[int]]:
    """The weights after each call of `step`, and the sizes of the batches."""
    steps, sizes = [], []
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y, reduction=reduction).backward()
            optimizer.step()
            steps.append(weights(model))
            sizes.append(len(x))
    return steps, sizes


def same_steps(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 3
    assert not torch.equal(ours[0], ours[-1])
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def engines() -> tuple[Any, Any]:
    return PrivacyEngine(accountant="rdp"), opacus.PrivacyEngine(accountant="rdp")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("task", TASKS)
def test_each_step_is_that_of_opacus(task: str, reduction: str) -> None:
    found = []
    for engine in engines():
        made = private(
            engine, task, loss_reduction=reduction, lr=0.5 if reduction == "mean" else 0.05
        )
        steps, _ = train(*made, reduction)
        found.append((steps, engine.get_epsilon(1e-3), engine.accountant.history))
    same_steps(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] > 0
    assert found[0][2] == found[1][2]


def test_empty_batches_of_poisson_sampling() -> None:
    found = []
    for engine in engines():
        made = private(engine, batch=1)
        steps, sizes = train(*made, epochs=1)
        assert 0 in sizes
        assert max(sizes) > 1
        found.append(steps)
    same_steps(*found)
    first = sizes.index(0)
    assert not torch.equal(found[0][first], found[0][first - 1] if first else torch.zeros(()))


def test_large_batches_in_parts() -> None:
    found = []
    for engine in engines():
        model, optimizer, loader = private(engine, batch=20)
        manager = BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=3, optimizer=optimizer
        )
        with manager as parts:
            steps, sizes = train(model, optimizer, parts, epochs=3)
        assert max(sizes) == 3
        found.append((steps, engine.get_epsilon(1e-3), len(engine.accountant)))
    same_steps(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


def test_the_noise_of_a_step_in_parts_is_that_of_one() -> None:
    """2.0 over the expected batch size, and not 3.85."""
    model = nn.Linear(100, 50, bias=False)
    data = TensorDataset(torch.zeros(N, 100), torch.zeros(N))
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(data, batch_size=N // 2),
        noise_multiplier=2.0,
        max_grad_norm=1.0,
    )
    manager = BatchMemoryManager(data_loader=loader, max_physical_batch_size=4, optimizer=optimizer)
    with manager as parts:
        for x, _ in parts:
            optimizer.zero_grad()
            model(x).sum(1).mean().backward()
            optimizer.step()
    noise = next(iter(model.parameters())).grad
    assert abs(noise.std() / (2.0 / (N // 2)) - 1) < 5 / 10000**0.5


def test_several_backward_passes_of_a_step() -> None:
    """Opacus divides by their number, and counts a larger sampling rate."""
    found = []
    for engine in engines():
        model, optimizer, loader = private(engine, poisson_sampling=False)
        steps = []
        for i, (x, y) in enumerate(loader):
            F.cross_entropy(model(x), y).backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
                steps.append(weights(model))
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            steps.append(weights(model))
        found.append((steps, engine.accountant.history))
    same_steps(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert {rate for _, rate, _ in found[0][1]} == {0.2, 0.4}


def test_several_backward_passes_under_poisson_sampling_are_refused() -> None:
    model, optimizer, _ = private(PrivacyEngine())
    x, y = torch.randn(3, 5), torch.randint(3, (3,))
    before = weights(model)
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=r"got 2: batches of Poisson.*BatchMemoryManager"):
        optimizer.step()
    assert torch.equal(before, weights(model))


@pytest.mark.parametrize("task", ["mlp", "text"])
def test_a_limit_for_each_parameter(task: str) -> None:
    found = []
    for engine in engines():
        count = len(list(TASKS[task][0]().parameters()))
        limits = [0.1 * (i + 1) for i in range(count)]
        options: Any = {"clipping": "per_layer"}
        torch.manual_seed(0)
        model = TASKS[task][0]()
        made = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
            data_loader=DataLoader(
                TensorDataset(TASKS[task][1](), torch.randint(3, (N,))),
                batch_size=8,
                generator=torch.Generator().manual_seed(3),
            ),
            noise_multiplier=SIGMA,
            max_grad_norm=limits,
            noise_generator=torch.Generator().manual_seed(5),
            **options,
        )
        found.append(train(*made)[0])
    same_steps(*found)


def test_schedules_of_noise_and_limits() -> None:
    found = []
    for engine in engines():
        model, optimizer, loader = private(engine)
        schedules = (
            opacus.schedulers.ExponentialNoise(optimizer, gamma=0.8),
            opacus.schedulers.ExponentialGradClip(optimizer, gamma=0.7),
        )
        steps = []
        for _ in range(3):
            steps += train(model, optimizer, loader, epochs=1)[0]
            for schedule in schedules:
                schedule.step()
        found.append((steps, engine.accountant.history))
    same_steps(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_limits_for_each_parameter_have_no_schedule() -> None:
    model, optimizer, loader = private(
        PrivacyEngine(), clipping="per_layer", max_grad_norm=[0.1, 0.2, 0.3, 0.4]
    )
    optimizer.max_grad_norm *= 0.5
    with pytest.raises(ValueError, match=r"that of all limits"):
        train(model, optimizer, loader)


def test_a_private_model_can_be_made_private_again() -> None:
    model, optimizer, loader = private(PrivacyEngine())
    data = DataLoader(loader.dataset, batch_size=4)
    again, other, loader = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=data, noise_multiplier=0.0, max_grad_norm=C
    )
    assert again is model
    assert other.original_optimizer is optimizer.original_optimizer
    train(again, other, loader, epochs=1)
    with pytest.raises(ValueError, match="got GradSampleModule; call"):
        private(PrivacyEngine(), (lambda: opacus.GradSampleModule(mlp()), vectors))


def test_an_optimizer_of_some_parameters() -> None:
    """Norms are those of its own parameters."""
    found = []
    for engine in engines():
        torch.manual_seed(0)
        model = mlp()
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model[2].parameters(), lr=0.5),
            data_loader=DataLoader(
                TensorDataset(vectors(), torch.randint(3, (N,))),
                batch_size=8,
                generator=torch.Generator().manual_seed(3),
            ),
            noise_multiplier=SIGMA,
            max_grad_norm=C,
            noise_generator=torch.Generator().manual_seed(5),
            poisson_sampling=False,
        )
        steps = []
        for x, y in loader:
            optimizer.zero_grad()
            model.zero_grad()  # the optimizer leaves what it does not hold
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            steps.append(weights(model))
        found.append(steps)
    same_steps(*found)


def test_the_model_itself_without_a_wrapper() -> None:
    engine = PrivacyEngine()
    torch.manual_seed(0)
    model = mlp()
    options: Any = {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
        "data_loader": DataLoader(
            TensorDataset(vectors(), torch.randint(3, (N,))),
            batch_size=8,
            shuffle=True,
            generator=torch.Generator().manual_seed(3),
        ),
        "noise_multiplier": SIGMA,
        "max_grad_norm": C,
        "wrap_model": False,
    }
    hooks, optimizer, loader = engine.make_private(
        **options, noise_generator=torch.Generator().manual_seed(5)
    )
    steps, _ = train(model, optimizer, loader)
    expected, _ = train(*private(opacus.PrivacyEngine()))
    same_steps(steps, expected)
    with pytest.raises(ValueError, match="made private before"):
        engine.make_private(**options)
    hooks.cleanup()
    assert not model._forward_pre_hooks
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    engine.make_private(**options)


def test_adapters_and_frozen_parameters() -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

    def make() -> nn.Module:
        config = transformers.GPT2Config(
            vocab_size=13,
            bos_token_id=0,
            eos_token_id=0,
            n_positions=8,
            n_embd=8,
            n_layer=1,
            n_head=2,
            attn_pdrop=0,
            embd_pdrop=0,
            resid_pdrop=0,
        )
        model = transformers.GPT2LMHeadModel(config)
        lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        adapted = peft.get_peft_model(model, lora)
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p)
        return adapted.train()

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make()

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids).logits[:, -1, :3]

    model, optimizer, loader = private(PrivacyEngine(), (Last, words))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert 0 < len(trained) < len(list(model.parameters()))
    x, y = next(iter(loader))
    expected = [torch.zeros_like(p) for p in trained]
    alone = copy.deepcopy(model._module)
    for p in alone.parameters():
        p.grad = None
    for b in range(len(x)):
        alone.zero_grad()
        with torch.enable_grad():
            F.cross_entropy(alone(x[b : b + 1]), y[b : b + 1]).backward()
        g = [p.grad for p in alone.parameters() if p.grad is not None]
        factor = min(1.0, C / (math.sqrt(sum(one.square().sum() for one in g)) + 1e-6))
        expected = [total + factor * one for total, one in zip(expected, g, strict=True)]
    optimizer.noise_multiplier = 0.0
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    for p, total in zip(trained, expected, strict=True):
        torch.testing.assert_close(p.grad, total / 8, rtol=1e-4, atol=1e-6)


def test_layers_that_opacus_would_replace() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.memory, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h, _ = self.attention(x, x, x)
            return self.head(self.memory(h)[0][:, -1])

    engine = PrivacyEngine()
    model, optimizer, loader = private(engine, (Attention, lambda: torch.randn(N, 3, 4)))
    assert engine.is_compatible(module=Attention(), optimizer=None, data_loader=None)
    train(model, optimizer, loader, epochs=1)
    assert all(p.grad is not None for p in model.parameters())


def test_the_time_may_come_first() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixed, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.mixed(x)).mean(0))

    torch.manual_seed(0)
    model = First()
    alone = copy.deepcopy(model)
    model, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=DataLoader(TensorDataset(torch.randn(N, 5, 4), torch.zeros(N)), batch_size=8),
        noise_multiplier=0.0,
        max_grad_norm=C,
        batch_first=False,
    )
    x, y = torch.randn(5, 7, 4), torch.randint(3, (7,))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    clipped: Any = 0
    for b in range(7):
        alone.zero_grad()
        F.cross_entropy(alone(x[:, b : b + 1]), y[b : b + 1]).backward()
        g = torch.cat([p.grad.flatten() for p in alone.parameters()])
        clipped += g * min(1.0, C / (g.norm().item() + 1e-6))
    torch.testing.assert_close(weights(model), weights(alone) - 0.5 * clipped / 8)


def test_gradients_that_were_not_clipped_do_not_count() -> None:
    found = []
    for engine in engines():
        model, optimizer, loader = private(engine)
        steps = []
        for x, y in loader:
            optimizer.zero_grad()
            if isinstance(engine, PrivacyEngine):  # Opacus' hooks raise, or keep what they saw
                model.eval()
                F.cross_entropy(model(x), y).backward()
                model.train()
                model(x)  # a forward pass alone
            F.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                model(x[:1])
            optimizer.step()
            steps.append(weights(model))
        found.append(steps)
    same_steps(*found)


def test_a_step_without_a_backward_pass_is_refused() -> None:
    model, optimizer, _ = private(PrivacyEngine())
    with pytest.raises(ValueError, match=r"expected a backward pass before optimizer\.step"):
        optimizer.step()
    model.eval()
    F.cross_entropy(model(torch.randn(3, 5)), torch.randint(3, (3,))).backward()
    with pytest.raises(ValueError, match=r"in training mode"):
        optimizer.step()


def test_a_backward_pass_that_failed_leaves_nothing() -> None:
    model, optimizer, _ = private(PrivacyEngine())
    x, y = torch.randn(3, 5), torch.randint(3, (3,))

    def fail(_: Tensor) -> None:
        raise KeyError("for the test")

    out = model(x)
    out.register_hook(fail)
    with pytest.raises(KeyError):
        F.cross_entropy(out, y).backward()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    with pc.collect(model._module, pc.SqNorms()) as record:  # and no block is open
        F.cross_entropy(model._module.forward(x), y).backward()
    assert record.batch_size == 3


def test_a_parameter_that_took_no_part_gets_noise() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(5, 3), nn.Linear(50, 40)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, optimizer, loader = private(PrivacyEngine(), (Unused, vectors))
    train(model, optimizer, loader, epochs=1)
    assert abs(model.unused.weight.grad.std() / (SIGMA * C / 8) - 1) < 0.1


def test_copies_are_plain_models() -> None:
    """Such as those of averages of weights, and saved ones."""
    model, optimizer, loader = private(PrivacyEngine())
    x, y = next(iter(loader))
    other = torch.optim.swa_utils.AveragedModel(model)
    F.cross_entropy(model(x), y).backward()
    with pc.collect(other, pc.SqNorms()) as record:
        F.cross_entropy(other(x), y).backward()
    assert record.batch_size == len(x)
    optimizer.step()
    other.update_parameters(model)
    copied = copy.deepcopy(model)
    assert torch.equal(weights(copied), weights(model))
    assert not pickle.loads(pickle.dumps(model._module))(x).isnan().any()
    F.cross_entropy(copied(x), y).backward()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="expected a backward pass"):
        optimizer.step()


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.1)
        return self.layer(x)


def test_buffers_that_examples_change_are_refused() -> None:
    model, optimizer, _ = private(PrivacyEngine(), (Counting, vectors))
    F.cross_entropy(model(torch.randn(3, 5)), torch.randint(3, (3,))).backward()
    with pytest.raises(pc.UnsupportedError, match=r"_module\.mean|mean: the forward pass changes"):
        optimizer.step()


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


REFUSED: dict[str, tuple[Any, str]] = {
    "ghost": ({"grad_sample_mode": "ghost"}, r"grad_sample_mode='hooks'.*got 'ghost'"),
    "adaptive": ({"clipping": "adaptive"}, r"'flat' or 'per_layer', got 'adaptive'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_are_refused(name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        private(PrivacyEngine(), **options)


def test_layers_that_mix_examples_are_refused() -> None:
    with pytest.raises(opacus.validators.errors.UnsupportedModuleError, match="BatchNorm"):
        private(PrivacyEngine(), (normalised, vectors))
    assert not PrivacyEngine().is_compatible(module=normalised(), optimizer=None, data_loader=None)


def test_a_privacy_budget_and_a_checkpoint(tmp_path: Any) -> None:
    found = []
    for engine in engines():
        torch.manual_seed(0)
        model = mlp()
        model, optimizer, loader = engine.make_private_with_epsilon(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(
                TensorDataset(vectors(), torch.randint(3, (N,))),
                batch_size=8,
                generator=torch.Generator().manual_seed(3),
            ),
            target_epsilon=4.0,
            target_delta=1e-3,
            epochs=2,
            max_grad_norm=C,
            noise_generator=torch.Generator().manual_seed(5),
        )
        steps, _ = train(model, optimizer, loader)
        found.append((steps, optimizer.noise_multiplier, engine.get_epsilon(1e-3)))
        path = tmp_path / "checkpoint.pt"
        engine.save_checkpoint(path=path, module=model, optimizer=optimizer)
        engine.load_checkpoint(path=path, module=model, optimizer=optimizer)
        assert torch.equal(weights(model), steps[-1])
    same_steps(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    assert found[0][2] <= 4.0


def check_ranks(rank: int) -> Any:
    import warnings

    warnings.simplefilter("ignore")
    found = []
    for engine in engines():
        torch.manual_seed(0)
        model = PrivateParallel(mlp())
        data = TensorDataset(vectors(), torch.randint(3, (N,)))
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
            data_loader=DataLoader(data, batch_size=10, generator=torch.Generator().manual_seed(3)),
            noise_multiplier=SIGMA,
            max_grad_norm=C,
            noise_generator=torch.Generator().manual_seed(5),
        )
        found.append(train(model, optimizer, loader)[0])
    same_steps(*found)
    return found[0][-1]


@needs_gloo
def test_each_step_over_several_processes() -> None:
    a, b = run_ranks(2, check_ranks)
    assert torch.equal(a, b)


# Norms for ghost clipping.


@pytest.fixture
def registered() -> Iterator[None]:
    registration = register()
    yield
    registration.remove()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "linear-3d": (lambda: nn.Linear(5, 4), (7, 5)),
    "linear-4d": (lambda: nn.Linear(5, 4, bias=False), (2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, groups=2), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), padding=(1, 0), dilation=2), (2, 7, 6)),
    "conv2d-same": (lambda: nn.Conv2d(2, 3, (3, 5), padding="same"), (2, 5, 6)),
    "conv2d-reflect": (lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"), (2, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, bias=False), (1, 3, 4, 3)),
    "layer-norm": (lambda: nn.LayerNorm(5), (3, 5)),
    "layer-norm-2": (lambda: nn.LayerNorm((3, 5)), (2, 3, 5)),
    "group-norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 5)),
    "rms-norm": (lambda: nn.RMSNorm(5), (3, 5)),
    "instance-norm": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 6)),
}


def ghost_norms(model: nn.Module, x: Tensor, reduction: str = "mean") -> Tensor:
    wrapped: Any = GradSampleModuleFastGradientClipping(model, loss_reduction=reduction)
    each = wrapped(x).flatten(1).square().sum(1)
    (each.mean() if reduction == "mean" else each.sum()).backward()
    return wrapped.get_norm_sample()


def true_norms(model: nn.Module, x: Tensor) -> Tensor:
    found = []
    for row in x.split(1):
        total = model(row).flatten(1).square().sum()
        g = torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad])
        found.append(torch.cat([one.flatten() for one in g]).norm())
    return torch.stack(found)


@pytest.mark.parametrize("n", [6, 1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("layer", LAYERS)
def test_norms(layer: str, reduction: str, n: int, registered: None) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    model = nn.Sequential(make().double())
    for p in model.parameters():
        nn.init.normal_(p)
    x = torch.randn(n, *shape).double()
    expected = true_norms(model, x)
    torch.testing.assert_close(ghost_norms(model, x, reduction), expected)


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 2, 3)])
def test_norms_of_embeddings_leave_padding_out(shape: tuple[int, ...], registered: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 3, padding_idx=1).double())
    ids = torch.randint(4, shape)
    torch.testing.assert_close(ghost_norms(model, ids), true_norms(model, ids))


def test_a_frozen_weight_has_no_norm(registered: None) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Conv1d(7, 2, 2), nn.LayerNorm(3)).double()
    for layer in model:
        layer.weight.requires_grad_(False)
    x = torch.randn(6, 7, 5).double()
    torch.testing.assert_close(ghost_norms(model, x), true_norms(model, x))


def test_an_embedding_that_mixes_examples_is_refused(registered: None) -> None:
    model = nn.Sequential(nn.Embedding(4, 3, scale_grad_by_freq=True))
    with pytest.raises(NotImplementedError, match="scale_grad_by_freq"):
        ghost_norms(model, torch.randint(4, (6, 5)))


def test_ghost_clipping_with_these_norms(registered: None) -> None:
    """Padding has no gradient then, as in torch; Opacus' hooks give it one."""
    torch.manual_seed(0)
    model = padded()
    criterion = nn.CrossEntropyLoss()
    made: Any = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
        criterion=criterion,
        data_loader=DataLoader(
            TensorDataset(words(), torch.randint(3, (N,))),
            batch_size=8,
            shuffle=True,
            generator=torch.Generator().manual_seed(3),
        ),
        noise_multiplier=SIGMA,
        max_grad_norm=C,
        noise_generator=torch.Generator().manual_seed(5),
        grad_sample_mode="ghost",
    )
    model, optimizer, private_criterion, loader = made
    steps = []
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            private_criterion(model(x), y).backward()
            optimizer.step()
            steps.append(weights(model))
    expected, _ = train(*private(PrivacyEngine(), (padded, words)))
    same_steps(steps, expected)


def test_opacus_gets_its_own_norms_back() -> None:
    from opacus.grad_sample import GradSampleHooksFastGradientClipping as Hooks

    before = dict(Hooks.NORM_SAMPLERS)
    registration = register()
    assert nn.Conv2d in Hooks.NORM_SAMPLERS
    registration.remove()
    assert before == Hooks.NORM_SAMPLERS
