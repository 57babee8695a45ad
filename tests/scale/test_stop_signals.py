"""A signal takes effect when the loop has saved, and what it would have done."""

import signal

import pytest

import optax_vasso as ov

BOTH = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def as_it_was():
    before = {number: signal.getsignal(number) for number in BOTH}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def loop(*sent, saved):
    """Ten steps, with signals within the third; what is saved is the step."""
    with ov.train.stop_signals() as stop:
        for step in range(1, 11):
            if step == 3:
                for number in sent:
                    signal.raise_signal(number)
            if stop(step) or step == 10:
                saved.append(step)
                break


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)],
)
def test_the_loop_saves_before_the_signal_takes_effect(number, error):
    saved = []
    with pytest.raises(error) as caught:
        loop(number, saved=saved)
    assert saved == [3]
    if error is SystemExit:
        assert caught.value.code == 143  # as a shell has it: 128 + 15


def test_without_a_signal_nothing_happens():
    saved, before = [], [signal.getsignal(number) for number in BOTH]
    loop(saved=saved)
    assert saved == [10]
    assert [signal.getsignal(number) for number in BOTH] == before


@pytest.mark.parametrize("number", BOTH)
def test_the_handler_of_before_is_called_in_the_end(number):
    saved, called = [], []
    signal.signal(number, lambda *arguments: called.append((arguments[0], *saved)))
    loop(number, saved=saved)
    assert called == [(number, 3)]
    loop(saved=saved)  # and is in its place again
    signal.raise_signal(number)
    assert called == [(number, 3), (number, 3, 10)]


def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not():
    saved = []
    with pytest.raises(KeyboardInterrupt):
        loop(signal.SIGINT, signal.SIGINT, saved=saved)
    assert saved == []
    with pytest.raises(SystemExit):
        loop(signal.SIGTERM, signal.SIGTERM, saved=saved)
    assert saved == [3]


@pytest.mark.parametrize("number", BOTH)
def test_what_is_ignored_stays_ignored(number):
    # As Ctrl-C is by a shell's background jobs.
    signal.signal(number, signal.SIG_IGN)
    saved = []
    loop(number, saved=saved)
    assert saved == [10]


def test_an_error_in_the_loop_is_not_hidden_by_the_signal():
    def failing():
        with ov.train.stop_signals():
            signal.raise_signal(signal.SIGTERM)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
