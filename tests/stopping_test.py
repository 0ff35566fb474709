"""Signals set a flag that loops read; a second Ctrl-C does not wait."""

import os
import signal
import threading

import pytest

from rlm import stopping


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_handlers_come_back(signum, capfd):
  before = signal.getsignal(signum)
  with stopping.catch_signals() as stop:
    assert not stop.requested
    os.kill(os.getpid(), signum)
    assert stop.requested
  assert signal.getsignal(signum) is before
  assert "stopping after this step" in capfd.readouterr().err


def test_nested_blocks_share_the_flag():
  with stopping.catch_signals() as outer:
    with stopping.catch_signals() as inner:
      os.kill(os.getpid(), signal.SIGTERM)
      assert inner.requested
    # The inner block gave nothing back: the outer one still catches.
    os.kill(os.getpid(), signal.SIGTERM)
    assert outer.requested
  with stopping.catch_signals() as again:
    assert not again.requested


def test_ctrl_c_twice_stops_at_once():
  with stopping.catch_signals() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested


def test_other_threads_run_without_handlers():
  seen = []

  def body():
    with stopping.catch_signals() as stop:
      seen.append(stop.requested)

  thread = threading.Thread(target=body)
  thread.start()
  thread.join()
  assert seen == [False]


def test_the_message_says_how_to_continue():
  message = str(stopping.Stopped("pretrain", 7))
  assert "pretrain stopped after step 7 and is saved" in message
  assert "same command continues" in message
