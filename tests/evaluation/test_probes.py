"""Probes against scikit-learn on the digits, and against plain loops where it has no counterpart."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import PROBE_ACCURACY, PROBE_WEIGHTS
from scipy.stats import t as student
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import StandardScaler

from fastcl import FastclError
from fastcl.evaluation import (
    ProbeSettings,
    evaluate,
    few_shot_probe,
    knn_probe,
    linear_probe,
    logistic,
    ncc_probe,
    nearest,
)
from fastcl.evaluation.draws import held_out_rows, shot_rows
from fastcl.evaluation.few_shot import spread
from fastcl.evaluation.frozen import frozen_features
from fastcl.evaluation.logistic import fit_logistic


@pytest.fixture(scope="module")
def digits():
    """Features and labels of a training and a test split, tensors."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = torch.from_numpy(x[order]), torch.from_numpy(y[order])
    return x[:700], y[:700], x[700:1300], y[700:1300]


def logistic_of_sklearn(x, y, c):
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(C=c, max_iter=5000, tol=1e-7).fit(scaler.transform(x), y)
    return model, lambda rows: model.predict(scaler.transform(rows))


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_the_linear_probe_is_that_of_scikit_learn(digits, penalty):
    x, y, x_test, y_test = digits
    found = linear_probe(*digits, penalties=[penalty])
    model, predict = logistic_of_sklearn(x, y, 1 / (penalty * len(x)))
    assert found.train == pytest.approx((predict(x) == y.numpy()).mean(), abs=PROBE_ACCURACY)
    assert found.test == pytest.approx((predict(x_test) == y_test.numpy()).mean(), abs=PROBE_ACCURACY)
    assert (found.penalty, found.sweep, found.converged) == (penalty, (), True)
    fit = fit_logistic(x, y, 10, penalty)
    assert np.abs(fit.weights[:, :-1].numpy() - model.coef_).max() < PROBE_WEIGHTS
    assert fit.steps == found.steps > 0 and fit.gradient == found.gradient <= 1e-6


def test_two_classes_have_two_weight_vectors(digits):
    x, y, x_test, y_test = (rows[digits[1 + 2 * (k > 1)] < 2] for k, rows in enumerate(digits))
    fit = fit_logistic(x, y, 2, 0.01)
    model, predict = logistic_of_sklearn(x, y, 2 / (0.01 * len(x)))
    assert torch.equal(fit.predict(x_test), torch.from_numpy(predict(x_test)))
    assert np.abs((fit.weights[1] - fit.weights[0])[:-1].numpy() - model.coef_[0]).max() < PROBE_WEIGHTS


def test_the_penalty_is_chosen_on_held_out_training_rows(digits):
    x, y, *_ = digits
    penalties = [1e-3, 1e-1, 1.0, 1e-1]
    found = linear_probe(*digits, penalties=penalties, held_out=0.3, seed=5)
    out = held_out_rows(frozen_features(*digits), 0.3, 5)
    want = {}
    for penalty in (1.0, 1e-1, 1e-3):
        _, predict = logistic_of_sklearn(x[~out], y[~out], 1 / (penalty * int((~out).sum())))
        want[penalty] = (predict(x[out]) == y[out].numpy()).mean()
    assert [p for p, _ in found.sweep] == list(want)
    assert [a for _, a in found.sweep] == pytest.approx(list(want.values()), abs=PROBE_ACCURACY)
    assert found.penalty == max(want, key=want.get) and found.converged
    alone = linear_probe(*digits, penalties=[found.penalty])
    assert (found.train, found.test) == pytest.approx((alone.train, alone.test), abs=PROBE_ACCURACY)


def test_of_equally_good_penalties_the_strongest_is_taken():
    x = torch.tensor([[0.0], [0.1], [0.2], [9.8], [9.9], [10.0]])
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    assert linear_probe(x, y, x, y, penalties=[1e-3, 1e-2, 0.1]).penalty == 0.1


def test_a_fit_that_stops_early_is_said(digits, monkeypatch, caplog):
    monkeypatch.setattr(logistic, "MAX_STEPS", 3)
    with caplog.at_level(logging.WARNING):
        found = linear_probe(*digits, penalties=[1e-3])
        few = few_shot_probe(*digits, shots=[2], repeats=2)
    assert not found.converged and found.steps == 3
    assert "with penalty 0.001 the gradient is still" in caplog.text and "after 3 steps" in caplog.text
    assert [one.converged for one in few] == [True, False]
    assert "2 of 2 fits with 2 shots did not converge" in caplog.text


@pytest.mark.parametrize("tile", [nearest.TILE, (7, 64)])
def test_neighbours_are_those_of_scikit_learn(digits, tile, monkeypatch):
    monkeypatch.setattr(nearest, "TILE", tile)
    x, y, x_test, y_test = digits
    found = {(one.k, one.vote): one for one in knn_probe(*digits, k=[20, 1, 5], temperature=0.1)}
    assert list(found) == [(k, vote) for k in (1, 5, 20) for vote in ("majority", "weighted")]
    unit = x / x.norm(dim=1, keepdim=True)
    nearest_first = (unit @ unit.mT).fill_diagonal_(-2).sort(dim=1, descending=True)
    for (k, vote), one in found.items():
        weights = "uniform" if vote == "majority" else lambda distance: np.exp((1 - distance) / 0.1)
        model = KNeighborsClassifier(k, metric="cosine", weights=weights).fit(x, y)
        assert one.test == pytest.approx(model.score(x_test, y_test), abs=PROBE_ACCURACY)
        right = 0
        for i in range(len(x)):  # without the row itself
            votes = torch.zeros(10, dtype=torch.float64)
            for similarity, j in zip(*(part[i, :k] for part in nearest_first), strict=True):
                votes[y[j]] += 1 if vote == "majority" else (similarity / 0.1).exp()
            right += int(votes.argmax() == y[i])
        assert one.train == pytest.approx(right / len(x), abs=PROBE_ACCURACY)


def test_a_row_is_not_its_own_neighbour_even_if_all_others_are():
    x, y = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), torch.tensor([9, 9, 4, 9, 4])
    majority, _ = knn_probe(x, y, x, y, k=[4])
    assert majority.train == 0  # two votes each, and the lowest label wins; or one vote against three
    assert majority.test == 1  # a row and its three nearest


def test_votes_of_far_neighbours_do_not_vanish():
    """All similarities are below -0.8, whose exponentials at this temperature are 0 in float64."""
    x, y = torch.tensor([[1.0, 0.0], [1.0, 0.5], [1.0, -0.5]]), torch.tensor([0, 1, 0])
    found = knn_probe(x, y, torch.tensor([[-1.0, 0.1]]), torch.tensor([1]), k=[2], temperature=1e-3)
    assert [one.test for one in found if one.vote == "weighted"] == [1.0]


def test_class_centres_are_those_of_scikit_learn(digits):
    x, y, x_test, y_test = digits
    model = NearestCentroid().fit(x[:, 2:6], y)
    found = ncc_probe(x[:, 2:6], y, x_test[:, 2:6], y_test)
    assert found.train == pytest.approx(model.score(x[:, 2:6], y), abs=PROBE_ACCURACY)
    assert found.test == pytest.approx(model.score(x_test[:, 2:6], y_test), abs=PROBE_ACCURACY)


def test_few_shots_are_mean_and_interval_over_draws(digits):
    x, y, x_test, y_test = digits
    found = few_shot_probe(*digits, shots=[10, 3], repeats=4, seed=2)
    assert [(one.classifier, one.shots) for one in found] == [("ncc", 3), ("ncc", 10), ("linear", 3), ("linear", 10)]
    data = frozen_features(*digits)
    for one in found:
        train, test = [], []
        for repeat in range(4):
            drawn = shot_rows(data, one.shots, 2, repeat)
            assert torch.bincount(y[drawn]).tolist() == [one.shots] * 10
            if one.classifier == "linear":
                _, predict = logistic_of_sklearn(x[drawn], y[drawn], 1.0)
            else:
                centres = torch.stack([x[drawn & (y == c)].mean(0) for c in range(10)])
                predict = lambda rows, centres=centres: torch.cdist(rows, centres).argmin(dim=1).numpy()  # noqa: E731
            train.append((predict(x[~drawn]) == y[~drawn].numpy()).mean())
            test.append((predict(x_test) == y_test.numpy()).mean())
        assert one.test.values == pytest.approx(test, abs=PROBE_ACCURACY) and one.converged
        assert one.train.values == pytest.approx(train, abs=PROBE_ACCURACY)
        low, high = student.interval(0.95, 3, np.mean(test), np.std(test, ddof=1) / 2)
        assert one.test.mean == pytest.approx(np.mean(test), abs=PROBE_ACCURACY)
        assert one.test.interval == pytest.approx((high - low) / 2, abs=PROBE_ACCURACY)
    assert spread([0.5]).interval is None and spread([0.25, 0.75]).mean == 0.5


def test_draws_are_by_sample_not_by_row_or_feature(digits):
    x, y, *test = digits
    ids = torch.arange(len(x)) * 3 + 100
    data = frozen_features(x, y, *test, ids)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    moved = frozen_features(-x[order], y[order], *test, ids[order])
    for draw in (lambda d: held_out_rows(d, 0.2, 7), lambda d: shot_rows(d, 4, 7, 1)):
        assert set(data.ids[draw(data)].tolist()) == set(moved.ids[draw(moved)].tolist())
    assert (shot_rows(data, 4, 7, 1) <= shot_rows(data, 9, 7, 1)).all()  # fewer are among more
    assert not torch.equal(shot_rows(data, 4, 7, 1), shot_rows(data, 4, 7, 2))
    assert not torch.equal(shot_rows(data, 4, 7, 1), shot_rows(data, 4, 8, 1))
    sizes, held = torch.bincount(y), torch.bincount(y[held_out_rows(data, 0.2, 7)])
    assert (held - 0.2 * sizes).abs().max() <= 0.5
    few = frozen_features(x[:5], torch.tensor([0, 1, 1, 2, 2]), *test)
    assert torch.bincount(few.index[held_out_rows(few, 0.99, 0)], minlength=3).tolist() == [0, 1, 1]


def test_test_labels_fit_nothing(digits):
    x, y, x_test, y_test = digits
    one, other = (evaluate(x, y, x_test, labels) for labels in (y_test, (y_test + 1) % 10))
    blank = replace(one.linear, test=0.0)
    assert replace(other.linear, test=0.0) == blank and other.linear.test < 0.1 < one.linear.test
    assert [few.train for few in other.few_shot] == [few.train for few in one.few_shot]
    assert [k.train for k in other.knn] == [k.train for k in one.knn] and one.ncc.train == other.ncc.train


def test_scale_constant_columns_dtypes_and_label_values_change_nothing(digits):
    x, y, x_test, y_test = (rows[:300] for rows in digits)
    x, x_test = x - 8, x_test - 8  # the largest factor below makes differences of entries overflow
    want = evaluate(x, y, x_test, y_test, probes=("linear", "knn", "ncc"))
    names = torch.tensor([7, -3, 2**40, 11, 0, 5, 90, 91, 92, 93]).sort().values
    for factor in (2.0**500, 2.0**1020, 2.0**-900):
        moved = evaluate(x * factor, names[y], x_test * factor, names[y_test], probes=("linear", "knn", "ncc"))
        assert moved == want
    padded = [torch.cat([rows, torch.full((300, 1), 0.1)], dim=1).double() for rows in (x, x_test)]
    padded[1][:, -1] = 1e6  # constant where it was fitted: no information
    alone = linear_probe(padded[0], y, padded[1], y_test, penalties=[0.01])
    plain = linear_probe(x, y, x_test, y_test, penalties=[0.01])
    assert (alone.train, alone.test, alone.steps) == (plain.train, plain.test, plain.steps)
    half = evaluate(x.half(), y.short(), x_test.bfloat16(), y_test.int(), probes=("linear", "knn", "ncc"))
    assert half == want  # the pixels are small integers
    zero = torch.zeros_like(x_test)
    assert all(0 <= one.test <= 1 for one in knn_probe(x, y, zero, y_test))


def test_classes_missing_from_training_count_as_wrong(digits):
    x, y, x_test, y_test = digits
    seen = y < 8
    found = evaluate(x[seen], y[seen], x_test, y_test, settings=ProbeSettings(shots=(2,), k=(1,)))
    assert found.unseen == (8, 9) and found.unseen_rows == int((y_test > 7).sum()) and found.classes == 8
    most = 1 - found.unseen_rows / len(y_test)
    scores = [found.linear.test, found.ncc.test, found.knn[0].test, *(few.test.mean for few in found.few_shot)]
    assert max(scores) <= most and found.linear.test > 0.8 * most
    known = evaluate(x[seen], y[seen], x_test[y_test < 8], y_test[y_test < 8], probes=("knn",))
    assert found.knn[0].test == pytest.approx(known.knn[0].test * most)


def test_defaults_fit_few_samples():
    x = torch.arange(8.0).reshape(4, 2)
    found = evaluate(x, torch.tensor([0, 0, 1, 1]), x, torch.tensor([0, 0, 1, 1]))
    assert [one.k for one in found.knn] == [1, 1] and [few.shots for few in found.few_shot] == [1, 1]
    every = few_shot_probe(x, torch.tensor([0, 0, 1, 1]), x, torch.tensor([0, 0, 1, 1]), shots=[2], repeats=1)
    assert all(few.train is None and few.test.interval is None for few in every)  # no training row is left


def test_bad_input_is_named(digits):
    x, y, x_test, y_test = (rows[:60] for rows in digits)
    nan = x.clone()
    nan[4, 1] = torch.nan
    cases = [
        (lambda: evaluate(x, y * 0 + 7, x_test, y_test), "at least 2 classes, but train_labels are all 7"),
        (lambda: evaluate(x, y[:50], x_test, y_test), r"train_labels must be integers of shape \(60,\)"),
        (lambda: evaluate(x, y, x_test, y_test.float()), r"labels must be integers of shape \(60,\)"),
        (lambda: evaluate(x, y, x_test[:, 1:], y_test), "the same width, got 63 and 64"),
        (lambda: evaluate(nan, y, x_test, y_test), "train_features are not finite: first in row 4"),
        (lambda: evaluate(x, y, x_test, y_test, probes=["nnc"]), "unknown probe 'nnc'; did you mean 'ncc'"),
        (lambda: evaluate(x, y, x_test, y_test, probes=[["ncc"]]), r"unknown probe \['ncc'\]; did you mean"),
        (lambda: evaluate(x, y, x_test, y_test, probes="ncc"), "probes must be a list of names, got 'ncc'"),
        (lambda: evaluate(x, y, x_test, y_test, probes=[]), "no probe is named"),
        (lambda: evaluate(x, y, x_test, y_test, ids=torch.zeros(60).long()), "ids must be distinct, but 0 is there"),
        (lambda: evaluate(x, y, x_test, y_test, ids=torch.arange(59)), r"ids must be integers of shape \(60,\)"),
        (lambda: evaluate(x, y, x_test, y_test, ids=[1]), "ids must be a tensor, got list"),
        (lambda: knn_probe(x, y, x_test, y_test, k=[60]), "k must be at most 59, .* of 60 training rows has, got 60"),
        (lambda: knn_probe(x, y, x_test, y_test, k=[0]), "k must be positive integers, got 0"),
        (lambda: knn_probe(x, y, x_test, y_test, k=5), "k must be a list of positive integers, got 5"),
        (lambda: knn_probe(x, y, x_test, y_test, k=[]), r"k must be positive integers, got \(\)"),
        (lambda: knn_probe(x, y, x_test, y_test, temperature=0.0), "temperature must be a positive number"),
        (lambda: few_shot_probe(x, y, x_test, y_test, shots=[30]), "shots must be at most .* of class .*, got 30"),
        (lambda: few_shot_probe(x, y, x_test, y_test, repeats=0), "repeats must be a positive integer, got 0"),
        (lambda: few_shot_probe(x, y, x_test, y_test, seed=-1), r"seed must be an integer in \[0, 2\*\*32\), got -1"),
        (lambda: linear_probe(x, y, x_test, y_test, penalties=[0.0]), "penalties must be positive numbers, got 0.0"),
        (lambda: linear_probe(x, y, x_test, y_test, penalties=[]), "penalties is empty"),
        (lambda: linear_probe(x, y, x_test, y_test, held_out=1.0), "held_out must be .* between 0 and 1, got 1.0"),
        (lambda: linear_probe(x, y, x_test, y_test, held_out=None), "held_out must be a number .* got None"),
        (lambda: linear_probe(x, y, x_test, y_test, penalties=0.1), "penalties must be a list .* got 0.1"),
        (lambda: linear_probe(x[:2], torch.tensor([0, 1]), x_test, y_test), "none of the 2 classes has 2 training"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(FastclError, match=message):
            call()
