"""The audit's bounds against closed forms and other libraries, and its command line."""

import json
import math
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy import stats

from ecos_pl.audit import __main__ as program
from ecos_pl.audit.bounds import (
    clopper_pearson,
    discrete_tail,
    epsilon_any_shape,
    gaussian_epsilon,
    noise_at_most,
)
from ecos_pl.audit.checks import AuditFailure
from ecos_pl.audit.lines import totals_line
from ecos_pl.audit.mechanisms import coverage, prototypes

DELTA = 1e-5


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (3, 10), (10, 10), (517, 1000), (1, 100_000)])
def test_clopper_pearson_is_scipys(hits, total):
    exact = stats.binomtest(hits, total).proportion_ci(0.98, method="exact")
    assert clopper_pearson(hits, total, 0.01, upper=False) == pytest.approx(exact.low, rel=1e-6)
    assert clopper_pearson(hits, total, 0.01, upper=True) == pytest.approx(exact.high, rel=1e-6)


def test_clopper_pearson_refuses_nonsense():
    for hits, total, alpha in ((3, 2, 0.1), (-1, 2, 0.1), (1, 2, 0.0)):
        with pytest.raises(ValueError, match="clopper_pearson"):
            clopper_pearson(hits, total, alpha, upper=True)


@pytest.mark.parametrize("sample_rate", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("noise", [1.0, 2.0, 5.0, 25.0])
@pytest.mark.parametrize("one_coordinate", [True, False])
def test_closed_form_agrees_with_privacy_loss_distributions(noise, sample_rate, one_coordinate):
    """Two independent ways to the same ε, to 0.3%: the audit does not lean on the accountant."""
    closed = gaussian_epsilon(
        noise, sample_rate=sample_rate, one_coordinate=one_coordinate, delta=DELTA
    )
    options = {
        "sampling_prob": sample_rate,
        "use_connect_dots": True,
        "value_discretization_interval": 1e-3 / noise * min(1, 10 * sample_rate),
    }
    if one_coordinate:
        loss = pld.from_discrete_gaussian_mechanism(noise, 1, **options)
    else:
        loss = pld.from_gaussian_mechanism(noise, **options)
    assert closed == pytest.approx(loss.get_epsilon_for_delta(DELTA), rel=3e-3)


def test_gaussian_epsilon_at_its_ends():
    options = {"one_coordinate": False, "delta": DELTA}
    assert gaussian_epsilon(0.0, sample_rate=1.0, **options) == math.inf
    assert gaussian_epsilon(math.inf, sample_rate=1.0, **options) == 0
    assert gaussian_epsilon(5.0, sample_rate=1e-6, **options) == 0
    large = dp_accounting.get_epsilon_gaussian(0.1, DELTA / 0.5) + math.log(0.5)
    assert gaussian_epsilon(0.1, sample_rate=0.5, **options) == pytest.approx(large)


def test_discrete_tail_is_that_of_a_gaussian_in_the_end():
    for start in (-40, 0, 3, 70):
        assert discrete_tail(start, 30.0) == pytest.approx(
            stats.norm.sf(start - 0.5, scale=30), rel=2e-3
        )
    assert discrete_tail(1, 0.5) == pytest.approx(
        sum(math.exp(-2 * k * k) for k in range(1, 9))
        / sum(math.exp(-2 * k * k) for k in range(-8, 9))
    )


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("one_coordinate", [True, False])
def test_noise_bound_holds_and_is_near(sample_rate, one_coordinate):
    """2,000 audits of noise 5 at 95%: at most 5% wrong, plus five standard errors (2.4%)."""
    guessed_right = discrete_tail(0, 5.0) if one_coordinate else stats.norm.cdf(1 / 10)
    advantage = guessed_right - 0.5
    right = np.random.default_rng().binomial(10_000, 0.5 + sample_rate * advantage, 2_000)
    options = {"sample_rate": sample_rate, "one_coordinate": one_coordinate}
    bounds = [noise_at_most(int(hits), 10_000, alpha=0.05, **options) for hits in right]
    assert np.mean(np.array(bounds) < 5.0) < 0.05 + 0.025
    expected = round(1e9 * (0.5 + sample_rate * advantage))
    assert noise_at_most(expected, 10**9, alpha=0.05, **options) == pytest.approx(5.0, rel=5e-3)


def test_noise_bound_at_its_ends():
    options = {"sample_rate": 0.5, "one_coordinate": False, "alpha": 0.05}
    assert noise_at_most(500, 1000, **options) == math.inf
    assert noise_at_most(1000, 1000, **options) == 0.0


def test_bound_of_any_shape_is_that_of_randomised_response():
    """Right with probability 3/4: ε is ln 3, which 10^6 canaries bound to within 4%."""
    rng = np.random.default_rng()
    coins = rng.random(1_000_000) < 0.5
    scores = np.where(rng.random(len(coins)) < 0.75, coins, ~coins).astype(np.float64)
    bound = epsilon_any_shape(coins, scores, [0.5], delta=0.0, alpha=1e-6)
    assert 0.96 * math.log(3) < bound <= math.log(3)
    # δ = 3/4 - e/4 would take ε to 1.
    bound = epsilon_any_shape(coins, scores, [0.5], delta=0.75 - math.e / 4, alpha=1e-6)
    assert 0.95 < bound <= 1
    assert epsilon_any_shape(coins, 1 - scores, [0.5, 2.0], delta=0.0, alpha=1e-6) == 0


def test_a_thousand_repeated_audits_stay_below_the_claim():
    """Perfect canaries of Gaussian noise 3, simulated: the bound of any shape is valid at 95%."""
    rng, wrong = np.random.default_rng(), 0
    claim = gaussian_epsilon(3.0, sample_rate=1.0, one_coordinate=False, delta=DELTA)
    for _ in range(1_000):
        coins = rng.random(2_000) < 0.5
        scores = coins + rng.normal(0, 3, 2_000)
        wrong += epsilon_any_shape(coins, scores, [3.5, 5.0], delta=DELTA, alpha=0.05) > claim
    assert wrong <= stats.binom.isf(1e-6, 1_000, 0.05)


@pytest.mark.parametrize("make", [coverage, prototypes])
def test_canaries_come_near_the_claim(make):
    """At noise 2 and 20,000 canaries, the bound on 1/noise is 8% ± 4% low."""
    line = totals_line(make(2.0), 2.0, 1.0, 20_000)
    result = program.audit(replace(line, checks=[]), DELTA, 0.01)
    assert not result.failed
    assert 0.6 * result.claimed < result.bound_declared


@pytest.mark.slow
def test_all_mechanisms_as_built_pass(capsys, tmp_path):
    path = tmp_path / "audit.json"
    assert program.main(["--canaries", "1000", "--json", str(path)]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert max(map(len, lines)) <= 80
    for name in ("coverage counts", "class table", "class prototypes", "kNN vote", "kNN screening"):
        assert any(line.startswith(name) for line in lines)
    assert "FAILED" not in output.out
    assert lines[-1].startswith("passed: 48 checks in ")
    assert lines[-1].endswith("exit status 0")
    assert output.err.splitlines()[-1] == "13/13 other processes"
    report = json.loads(path.read_text())
    assert report["failures"] == []
    assert len(report["results"]) == 12
    assert {len(result["failed"]) for result in report["results"]} == {0}


def no_noise(rows, num_rows, sample_rate):
    mechanism = coverage(5.0)
    return mechanism.totals(rows, num_rows), mechanism.release(rows, num_rows, 1.0)[1]


def test_a_failure_is_told_and_sets_the_exit_status(capsys, monkeypatch, tmp_path):
    line = totals_line(replace(coverage(5.0), release=no_noise), 5.0, 1.0, 1_000)
    monkeypatch.setattr(program, "all_lines", lambda *_: [line])
    monkeypatch.setattr(program, "check_processes", lambda: None)
    path = tmp_path / "audit.json"
    assert program.main(["--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert "FAILED: coverage counts, rate 1, unit sample, canaries: ε is at least" in out
    assert "FAILED: coverage counts, rate 1, unit sample, residuals: noise of occupied rows" in out
    assert out.splitlines()[-1].startswith("FAILED: 2 of 6 checks in ")
    assert len(json.loads(path.read_text())["failures"]) == 2


def test_repeating_noise_sets_the_exit_status(capsys, monkeypatch):
    def repeats():
        raise AuditFailure("the noise repeats in another process")

    monkeypatch.setattr(program, "all_lines", lambda *_: [])
    monkeypatch.setattr(program, "check_processes", repeats)
    assert program.main([]) == 1
    assert "FAILED: other processes: the noise repeats" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise-std", "0.5"], r"must lie in [1, 1000], not 0.5"),
        (["--noise-std", "nan"], r"must lie in [1, 1000], not nan"),
        (["--noise-std", "much"], "'much' is not a number"),
        (["--sample-rate", "0"], r"must lie in [0.01, 1], not 0"),
        (["--delta", "2"], "delta must lie in"),
        (["--canaries", "1e5"], "'1e5' is not a whole number"),
        (["--per-person", "0"], r"must lie in [1, 100], not 0"),
        (["--json", "/no/such/folder/audit.json"], "there is no folder /no/such/folder"),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]
