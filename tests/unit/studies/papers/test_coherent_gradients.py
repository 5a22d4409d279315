"""Chatterjee 2020: shares of the gradient, and what the command finds at a rough look."""

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from pycoherence.studies.data import load
from pycoherence.studies.papers import coherent_gradients


@pytest.mark.slow
def test_what_is_true_is_learned_first_and_what_is_not_is_clipped(quick):
    assert quick.results["settings"]["quick"]
    noisy = next(run for run in quick.results["runs"] if run["name"] == "noise-50-seed0")
    early = next(at for at in noisy["measured"] if at["pristine"] > 0.9)
    assert early["corrupt"] < 0.2 < 0.8 < early["test"]
    assert max(at["f_pristine"] for at in noisy["measured"]) > 0.9
    fitted = {row[1]: float(row[3].rstrip("%")) for row in quick.rows("noise | gradient")}
    assert fitted["k = 0"] > fitted["k = 8"]


def test_shares_are_those_of_the_gradient():
    """Against the gradient of the pristine alone, by autograd."""
    data = load().first(40)
    data = data.labelled((data.truth + (torch.arange(40) % 3 == 0)) % 10)
    torch.manual_seed(1)
    model = coherent_gradients.MLP((9,)).build(data)
    found = coherent_gradients.measure(model, data)
    assert all(p.grad is None for p in model.parameters())
    parts = []
    for chosen in (data.pristine, ~data.pristine):
        out = torch.nn.functional.cross_entropy(
            model(data.images[chosen]), data.labels[chosen], reduction="sum"
        )
        grads = torch.autograd.grad(out, [*model.parameters()])
        parts.append(torch.cat([g.flatten() for g in grads]))
    whole = parts[0] + parts[1]
    assert found["f_pristine"] == pytest.approx((whole @ parts[0] / (whole @ whole)).item())
    assert found["true"] == data.pristine.double().mean().item()
