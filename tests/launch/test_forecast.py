"""The forecast: seeded, below the ceiling, and equal to closed forms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estiba_launch.errors import LaunchError
from estiba_launch.request.forecast import Assumptions, forecast, loss_without_saving, young_interval_s


def run(spot: bool = True, max_runtime_s: int = 86_400, **assumptions: float):
    return forecast(usd_per_h=2.0, max_runtime_s=max_runtime_s, spot=spot, assumptions=Assumptions(**assumptions))


def test_youngs_interval_in_the_documented_example_is_28_minutes():
    assert round(young_interval_s(60, 3600 / 0.15) / 60) == 28


def test_a_notice_that_saves_three_in_four_doubles_the_interval():
    assert young_interval_s(60, 24_000, 0.75) == pytest.approx(2 * young_interval_s(60, 24_000))
    assert young_interval_s(60, 24_000, 1.0) is None
    assert young_interval_s(60, math.inf) is None


def test_the_ceiling_is_the_limit_times_the_price():
    assert run().ceiling_usd == pytest.approx(48.0)


def test_without_interruptions_every_quantile_is_work_plus_startup():
    result = run(spot=False, work_s=3600, restart_s=300)
    assert set(result.billed_s.values()) == {3900}
    assert result.usd["p50"] == pytest.approx(2.0 * 3900 / 3600)
    assert result.interval_s is None
    assert result.finishes == 1


def test_equal_inputs_give_equal_numbers_and_another_seed_does_not():
    assert run() == run()
    assert run().billed_s != run(seed=7).billed_s


def test_the_mean_number_of_interruptions_is_rate_times_time():
    result = run(work_s=10 * 3600, restart_s=0, save_s=0.001, interval_s=1, interruptions_per_hour=0.2)
    # Free saving every second loses nothing: 10 h at 0.2/h.
    assert result.interruptions == pytest.approx(2.0, rel=0.1)
    assert result.lost_s < 10


def test_without_saving_the_mean_time_matches_the_closed_form():
    # E = M (e^(w/M) - 1) for w of work restarted from zero: 4 h at 0.25/h -> 4 h x (e - 1) = 6.87 h, 2.87 h lost.
    result = run(
        max_runtime_s=30 * 86_400,
        work_s=4 * 3600,
        interruptions_per_hour=0.25,
        restart_s=0,
        interval_s=1e12,
        runs=20_000,
    )
    assert result.lost_s / 3600 == pytest.approx(4 * (math.e - 1) - 4, rel=0.05)
    assert "2.9 h of work lost" in loss_without_saving(4 * 3600, 0.25)


def test_youngs_interval_costs_less_than_a_quarter_or_four_times_of_it():
    best = run(max_runtime_s=30 * 86_400, work_s=86_400, restart_s=0, runs=4000)
    for factor in (4, 0.25):
        other = run(
            max_runtime_s=30 * 86_400, work_s=86_400, restart_s=0, interval_s=best.interval_s * factor, runs=4000
        )
        assert sum(other.billed_s.values()) > sum(best.billed_s.values())


def test_free_saves_lose_almost_nothing():
    result = run(save_s=0, interruptions_per_hour=0.5)
    assert result.interruptions > 1
    assert result.lost_s < 60


def test_a_notice_that_always_saves_loses_nothing():
    assert run(notice_saves=1.0, interruptions_per_hour=2).lost_s == 0


@settings(max_examples=25, deadline=None)
@given(
    rate=st.floats(0, 20),
    save_s=st.floats(0, 600),
    notice=st.floats(0, 1),
    share=st.floats(0.01, 1),
    limit_s=st.integers(60, 28 * 86_400),
)
def test_no_quantile_exceeds_the_ceiling(rate, save_s, notice, share, limit_s):
    result = run(
        max_runtime_s=limit_s,
        interruptions_per_hour=rate,
        save_s=save_s,
        notice_saves=notice,
        work_share=share,
        runs=20,
    )
    assert 0 < result.usd["p10"] <= result.usd["p50"] <= result.usd["p90"] <= result.ceiling_usd * (1 + 1e-9)


@pytest.mark.parametrize(
    "wrong",
    [{"interruptions_per_hour": -1}, {"notice_saves": 1.1}, {"work_share": 0}, {"work_s": 0}, {"save_s": math.nan}],
)
def test_an_assumption_out_of_range_is_refused(wrong):
    with pytest.raises(LaunchError, match=next(iter(wrong))):
        Assumptions(**wrong)
