"""The VAE against torch.distributions and PPCA, the order of rows, a training that is stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from deepclust.clustering import vae_fit
from deepclust.clustering.vae import Vae, VaeOptions, divergence, scaling
from deepclust.clustering.vae_fit import Fit, fit_vae
from deepclust.errors import DataError, NumericalError, RecipeError
from tools.bench import vae_halves

QUICK = VaeOptions(latent=2, hidden=8, epochs=3, batch=16, lr=0.01)


def draw(n: int = 200, width: int = 6, rank: int = 2, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed)
    inside = draws.normal(size=(n, rank)) @ draws.normal(size=(rank, width))
    return (inside + 0.3 * draws.normal(size=(n, width)) + 5).astype(np.float32)


def test_the_divergence_is_that_of_torch() -> None:
    mu, log_variance = torch.randn(2, 50, 7).unbind()
    ours = Independent(Normal(mu, (0.5 * log_variance).exp()), 1)
    prior = Independent(Normal(torch.zeros(7), torch.ones(7)), 1)
    torch.testing.assert_close(
        divergence(mu, log_variance), kl_divergence(ours, prior), atol=1e-5, rtol=1e-5
    )


def test_the_reconstruction_is_the_log_likelihood_of_a_normal() -> None:
    vae, x = Vae(6, 2, 8), torch.randn(30, 6)
    vae.log_noise.data.fill_(-1.0)
    epsilon = torch.randn(30, 2)
    reconstruction, kl = vae.bound(x, epsilon)
    mu, log_variance = vae.encode(x)
    z = mu + (0.5 * log_variance).exp() * epsilon
    likelihood = Independent(Normal(vae.decode(z), torch.tensor(-0.5).exp()), 1).log_prob(x)
    torch.testing.assert_close(reconstruction, -likelihood, atol=1e-4, rtol=1e-5)
    assert bool((kl >= 0).all())


def test_a_linear_vae_is_probabilistic_pca() -> None:
    rows = draw(n=1000, width=8, rank=3)
    options = VaeOptions(latent=3, hidden=0, epochs=500, batch=1000, lr=0.03)
    vae, history = fit_vae(rows, options)
    values, vectors = np.linalg.eigh(np.cov(rows.T.astype(np.float64)) * float(vae.scale) ** 2)
    decoder = np.linalg.qr(vae.back.weight.detach().double().numpy())[0]
    cosines = np.linalg.svd(decoder.T @ vectors[:, -3:])[1]
    assert cosines.min() > 0.999
    assert history[-1]["noise"] == pytest.approx(values[:-3].mean(), rel=0.05)


def test_features_are_standardised_latent_means_of_the_fitted_rows() -> None:
    rows = draw()
    vae, history = fit_vae(rows, VaeOptions(latent=2, hidden=8, epochs=40, batch=50, lr=0.01))
    features = vae.features(rows)
    assert (features.dtype, features.shape) == (np.float32, (200, 2))
    assert features.mean(0) == pytest.approx(np.zeros(2), abs=1e-5)
    assert features.std(0) == pytest.approx(np.ones(2), abs=1e-5)
    assert history[-1]["bound"] < history[0]["bound"]


def test_latents_that_say_nothing_are_zeros() -> None:
    options = VaeOptions(latent=6, hidden=0, epochs=300, batch=200, lr=0.02, beta=4)
    vae, _ = fit_vae(draw(rank=1), options)
    features = vae.features(draw(rank=1))
    assert 1 <= vae.active < 6
    assert int((features != 0).any(0).sum()) == vae.active


@pytest.mark.slow
def test_vaes_of_both_halves_of_digits_have_better_clusters_than_one_of_either() -> None:
    halves, _, classes = vae_halves.digits()
    latents = vae_halves.latents_of(halves, epochs=100)
    alone = [vae_halves.score(rows, classes) for rows in latents]
    assert vae_halves.score(np.concatenate(latents, 1), classes) >= max(alone) + 0.10


def test_every_epoch_has_the_rows_once_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_fit, "GROUP", 96)  # of 2 columns: groups of 48 rows
    rows = np.arange(400, dtype=np.float32).reshape(200, 2)
    fit = Fit(Vae(2, 1, 0), torch.optim.Adam([torch.zeros(1, requires_grad=True)]))
    orders: list[list[float]] = [[], []]
    for group in vae_fit._groups(rows, fit, VaeOptions(epochs=2, batch=16), 0):
        orders[fit.epoch] += group[:, 0].tolist()
        fit.group += 1
        if fit.group == vae_fit._group_count(rows, VaeOptions(batch=16)):
            fit.epoch, fit.group = fit.epoch + 1, 0
    assert sorted(orders[0]) == sorted(orders[1]) == rows[:, 0].tolist()
    assert orders[0] != orders[1]
    assert orders[0] != rows[:, 0].tolist()


@pytest.mark.parametrize("n", [16, 17, 31, 33, 1000])
@pytest.mark.parametrize("width", [1, 3, 5000])
def test_every_epoch_has_a_step(n: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_fit, "GROUP", 64)
    rows, options = np.zeros((n, width), np.float32), VaeOptions(batch=16)
    size = vae_fit._block_rows(rows, options)
    count = -(-n // size)
    least = min(count, vae_fit.BLOCKS) * size - (count * size - n)  # with the short last block
    assert least >= options.batch


class Stopped(Exception):
    """A kill, where a test wants it."""


def stop_after(groups: int) -> Callable[[Fit], bool]:
    def alive(fit: Fit) -> bool:
        done.append(fit.group)
        if len(done) > groups:
            raise Stopped
        return True

    done: list[int] = []
    return alive


@pytest.mark.parametrize("groups", [1, 5, 9])
def test_a_training_stopped_and_continued_ends_with_the_same_bits(
    groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae_fit, "GROUP", 6 * 64)
    state, rows = tmp_path / "state", draw()
    straight, history = fit_vae(rows, QUICK, 1)
    with pytest.raises(Stopped):
        fit_vae(rows, QUICK, 1, state=state, alive=stop_after(groups))
    resumed, again = fit_vae(rows, QUICK, 1, state=state)
    assert history == again
    ours, theirs = resumed.state_dict(), straight.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_number_and_seed_decide_the_weights() -> None:
    rows = draw()
    fits = [fit_vae(rows, QUICK, number)[0].features(rows) for number in (0, 0, 1)]
    assert np.array_equal(fits[0], fits[1])
    assert not np.array_equal(fits[0], fits[2])


def test_a_saved_vae_gives_the_same_features(tmp_path: Path) -> None:
    rows = draw()
    for hidden in (0, 8):
        vae, _ = fit_vae(rows, VaeOptions(latent=2, hidden=hidden, epochs=2, batch=50, lr=0.01))
        vae.save(tmp_path / "vae.safetensors")
        loaded = Vae.load(tmp_path / "vae.safetensors")
        assert np.array_equal(loaded.features(rows), vae.features(rows))
    (tmp_path / "vae.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DataError, match="damaged"):
        Vae.load(tmp_path / "vae.safetensors")
    with pytest.raises(DataError, match="fitted on 6 columns"):
        vae.features(rows[:, :5])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_scale_is_that_of_the_rows_in_any_type_and_place(dtype: str) -> None:
    rows = draw().astype(dtype)
    mean, scale = scaling(rows)
    wide = rows.astype(np.float64)
    assert mean == pytest.approx(wide.mean(0))
    assert scale == pytest.approx(wide.var(0).mean() ** -0.5)
    far, same = scaling(rows.astype(np.float64) * 1e30 + 1e32)
    assert same == pytest.approx(scale * 1e-30)
    assert far == pytest.approx(mean * 1e30 + 1e32)


def test_constant_columns_do_no_harm() -> None:
    rows = np.concatenate([draw(), np.full((200, 2), 7, np.float32)], 1)
    vae, _ = fit_vae(rows, QUICK)
    assert np.isfinite(vae.features(rows)).all()


def broken(change: Callable[[np.ndarray], object]) -> np.ndarray:
    rows = draw().astype(np.float64)
    change(rows)
    return rows


@pytest.mark.parametrize(("rows", "error", "words"), [
    (broken(lambda x: x.__setitem__((123, 4), np.nan)), NumericalError, "1 of 200 .* row 123"),
    (broken(lambda x: x.__setitem__((7, 0), -np.inf)), NumericalError, "row 7"),
    (broken(lambda x: x.__setitem__((7, 0), 1e300)), NumericalError, "too large"),
    (np.full((50, 3), 0.1, np.float32), NumericalError, "all 50 rows are equal"),
    (draw(n=15), DataError, "--batch to at most 15"),
])  # fmt: skip
def test_what_cannot_be_learned_is_named(
    rows: np.ndarray, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        fit_vae(rows, QUICK)


def test_a_training_that_learns_nothing_or_diverges_says_so() -> None:
    with pytest.raises(NumericalError, match="lower --beta"):
        fit_vae(draw(), VaeOptions(latent=2, hidden=0, epochs=60, batch=50, lr=0.02, beta=1e4))
    with pytest.raises(NumericalError, match="lower --lr"):
        fit_vae(draw(), VaeOptions(latent=2, epochs=9, batch=50, lr=1e20))


@pytest.mark.parametrize("option", [
    {"latent": 0}, {"hidden": -1}, {"epochs": -1}, {"batch": 1}, {"beta": -1.0}, {"lr": 0.0},
    {"lr": float("nan")}, {"beta": float("inf")},
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=f"--{next(iter(option))}"):
        VaeOptions(**option)  # type: ignore[arg-type]
