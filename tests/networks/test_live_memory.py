"""Counting the memory of tensors that have no contents."""

import torch as th

from guided_diffusion.networks.live_memory import LiveTensors, fake_tensors

KILO = 1000


def test_the_peak_is_of_what_lives_at_a_time():
    with fake_tensors(), LiveTensors() as live:
        a = th.zeros(KILO)
        b = a + 1
        del a
        c = b * 2
        view = c.view(10, 100)
        del b, c
        d = view.square()
    assert live.peak == 2 * 4 * KILO
    assert d.shape == (10, 100)


def test_views_and_in_place_operations_take_nothing():
    with fake_tensors(), LiveTensors() as live:
        a = th.zeros(KILO)
        a.view(-1, 2).add_(1).t()
    assert live.peak == 4 * KILO


def test_a_backward_pass_counts():
    with fake_tensors(), LiveTensors() as live:
        layer = th.nn.Linear(KILO, KILO, bias=False)
        layer(th.zeros(1, KILO)).sum().backward()
        weights = 4 * KILO**2
        assert 2 * weights <= live.peak < 2.1 * weights
        layer.zero_grad()
        live.restart_peak()
        with th.no_grad():
            layer(th.zeros(1, KILO))
        assert weights <= live.peak < 1.1 * weights


def test_small_tensors_leave_their_memory_to_small_ones():
    with fake_tensors(), LiveTensors(kept_below=100) as live:
        th.zeros(20)
        th.zeros(10)
        th.zeros(100)
    assert live.kept == 80
    assert live.peak == 80 + 400
    assert live.large == 0
