"""bfloat16 and float16 models, as far as torch runs them on this device."""

import copy

import pytest
import torch
from support.checks import assert_grads_equal, captured_pass, plain_pass, relative_error
from support.models import MODELS, classification, make, regression
from support.oracle import per_example_gradients, sq_norms
from torch import nn

HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_plain_ones(name: str, dtype: torch.dtype) -> None:
    model, batch = make(name, dtype)
    plain, _ = plain_pass(model, classification("mean"), batch)
    ours, _, record = captured_pass(model, classification("mean"), batch)
    assert_grads_equal(ours, plain, 4 * torch.finfo(dtype).eps)
    assert record.sq_norms.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("name", MODELS)
def test_norms_are_those_of_the_oracle_but_for_rounding(name: str, dtype: torch.dtype) -> None:
    """Errors are compared with the whole network's norm: some gradients nearly cancel."""
    model, batch = make(name, dtype)
    truth = sq_norms(per_example_gradients(model, classification("mean"), batch))
    _, _, record = captured_pass(model, classification("mean"), batch)
    total, tolerance = torch.stack([*truth.values()]).sum(0), 20 * torch.finfo(dtype).eps
    for name, one in record.by_parameter.items():
        assert ((one.sq_norms - truth[name]).abs() <= tolerance * total).all(), name
    assert ((record.sq_norms - total).abs() <= tolerance * total).all()


@pytest.mark.parametrize("dtype", [*HALVES.values(), torch.float32], ids=[*HALVES, "f32"])
@pytest.mark.parametrize("size", [1.0, 0.03])
def test_rms_norm_default_eps(size: float, dtype: torch.dtype) -> None:
    """What torch takes for eps where none is given matters once the input is small."""
    model, x = nn.RMSNorm(8).to(dtype), (torch.randn(6, 3, 8) * size).to(dtype)
    plain, plain_batch = plain_pass(model, regression("sum"), (x,))
    ours, our_batch, record = captured_pass(model, regression("sum"), (x,), "sum")
    tolerance = 8 * torch.finfo(dtype).eps
    assert relative_error(ours.weight.grad, plain.weight.grad) < tolerance
    assert relative_error(our_batch[0].grad, plain_batch[0].grad) < tolerance
    for b in range(6):
        alone = copy.deepcopy(model)
        regression("sum")(alone, (x[b : b + 1],)).backward()
        expected = alone.weight.grad.float().square().sum()
        torch.testing.assert_close(record.sq_norms[b], expected, rtol=4 * tolerance, atol=0)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.BatchNorm1d(6).eval()],
    ids=["layer-norm", "group-norm", "batch-norm"],
)
def test_norms_with_float32_parameters_on_half_inputs(layer: nn.Module, dtype: torch.dtype) -> None:
    """Mixed precision as models keep it; where torch runs it plainly, the block must too."""
    x = torch.randn(5, 6, dtype=dtype)
    try:
        plain, plain_batch = plain_pass(layer, regression("mean"), (x,))
    except RuntimeError:
        pytest.skip("torch does not run this layer on mixed dtypes here")
    ours, our_batch, _ = captured_pass(layer, regression("mean"), (x,))
    assert_grads_equal(ours, plain, 4 * torch.finfo(dtype).eps)
    assert our_batch[0].grad.dtype == dtype
    error = relative_error(our_batch[0].grad, plain_batch[0].grad)
    assert error < 8 * torch.finfo(dtype).eps
