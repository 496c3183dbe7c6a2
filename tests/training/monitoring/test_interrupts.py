"""Signals: the current step is finished and saved, and the exit code names the signal."""

import hashlib
import os
import re
import signal
import threading
import time

import jax
import numpy as np
import pytest
from conftest import tiny_config
from training_processes import lines_of, params_of, reached, start

from gptjax.config.errors import Interrupted
from gptjax.runs.checkpoints import Checkpoints
from gptjax.training import loop
from gptjax.training.monitoring import interrupts
from gptjax.training.population import population as populations

RUN = dict(train_steps=600, checkpoint_every_steps=200, log_every_steps=1, model_dropout=0.1, eval_every_steps=200)


def interrupted(workdir, text, lines, *signals):
    """Starts a run and sends it signals after some lines of metrics; returns exit code, stderr and seconds to end."""
    running = start(workdir, text, **RUN)
    while not reached(workdir, lines) and running.poll() is None:
        time.sleep(0.001)
    sent = time.monotonic()
    for number in signals:
        running.send_signal(number)
        time.sleep(0.01)  # the kernel makes one of two that wait
    _, err = running.communicate()
    assert "Traceback" not in err, err
    return running.returncode, err, time.monotonic() - sent


def saved_in(workdir):
    return max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.slow
def test_a_run_interrupted_many_times_ends_bit_identical(tmp_path, text_file, capsys):
    loop.train(tiny_config(data_path=text_file, **RUN), tmp_path / "whole")
    workdir, told = tmp_path / "run", "saved at step {:,}; the same command resumes training\n"
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        before = saved_in(workdir) if workdir.exists() else 0
        found, err, _ = interrupted(workdir, text_file, before + 20, number)
        assert found == code and f"{number.name}    stopping after this step" in err, err
        saved = saved_in(workdir)
        assert before + 20 <= saved < 600 and saved % 200, "the step in hand"
        assert err.endswith(f"gptjax: interrupted; {told.format(saved)}"), err
        assert [line["step"] for line in lines_of(workdir)] == list(range(1, saved + 1))
    code, err, seconds = interrupted(workdir, text_file, saved + 20, signal.SIGTERM, signal.SIGINT)
    assert f"resuming   at step {saved:,} of 600" in err
    assert code == 130 and seconds < 2 and err.endswith("quit immediately; saved checkpoints are complete, and "
                                                        "the same command resumes training\n"), err  # fmt: skip
    loop.train(tiny_config(data_path=text_file, **RUN), workdir)
    assert int(re.search(r"resuming   at step (\d+)", capsys.readouterr().err)[1]) >= saved
    jax.tree.map(np.testing.assert_array_equal, params_of(workdir), params_of(tmp_path / "whole"))
    losses = [[line["train/loss"] for line in lines_of(path)] for path in (workdir, tmp_path / "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 600


@pytest.mark.slow
def test_a_signal_while_a_checkpoint_is_written_waits_for_it(tmp_path, text_file, monkeypatch):
    save, waited = Checkpoints.save, []

    def save_and_signal(self, step, *arguments):
        save(self, step, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)  # for the thread to note it

    monkeypatch.setattr(Checkpoints, "save", save_and_signal)
    monkeypatch.setattr(Checkpoints, "wait", lambda self: (waited.append(1), self.manager.wait_until_finished()))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted, match="saved at step 4;") as leaving:
        loop.train(tiny_config(data_path=text_file), tmp_path / "run")
    assert leaving.value.number == signal.SIGTERM and waited
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["4"]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_while_compiling_ends_before_the_first_step(tmp_path, text_file, monkeypatch):
    compile_steps = populations.compile_steps

    def signal_and_compile(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return compile_steps(*arguments)

    monkeypatch.setattr(populations, "compile_steps", signal_and_compile)
    with pytest.raises(Interrupted, match="interrupted; nothing is saved yet"):
        loop.train(tiny_config(data_path=text_file), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_signal_before_and_after_the_steps_is_one_line(tmp_path, text_file, call_train, monkeypatch):
    for place, told in (("train_setup", "interrupted"), ("finish", "interrupted; saved at step 8; the same command")):
        with monkeypatch.context() as patched:
            patched.setattr(loop, place, lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))
            result = call_train(tmp_path / "run", data_path=text_file)
        assert result.code == 143 and result.err.splitlines()[-1].startswith(f"gptjax: {told}"), result.err
        assert "Traceback" not in result.err
    assert call_train(tmp_path / "run", data_path=text_file).code == 0


def test_a_signal_is_received_while_the_main_thread_is_in_c():
    heard = []
    with interrupts.listen_for_signals((signal.SIGTERM,), lambda number: heard.append((number, time.monotonic()))):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)  # half a second and more, without Python's lock
        ended = time.monotonic()
    ((number, at),) = heard
    assert number == signal.SIGTERM and ended - at > 0.1


def test_a_signal_after_the_last_check_is_not_lost():
    with pytest.raises(Interrupted) as leaving, interrupts.handle_signals() as asked:
        assert asked(1) is None
        os.kill(os.getpid(), signal.SIGTERM)
    assert leaving.value.number == signal.SIGTERM


def test_several_processes_agree_on_the_step(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(interrupts.multihost_utils, "reached_preemption_sync_point", lambda step: step == 5)
    terminated = []
    before = signal.signal(signal.SIGTERM, lambda *_: terminated.append(1))  # stands for JAX's own
    try:
        with interrupts.handle_signals() as asked:
            assert [asked(step) for step in (4, 5)] == [None, signal.SIGTERM], "another process got the signal"
            os.kill(os.getpid(), signal.SIGINT)
            while not terminated:
                time.sleep(0.001)
            assert [asked(step) for step in (4, 5)] == [None, signal.SIGINT], "this one did, and told the others"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_training_works_outside_the_main_thread(tmp_path, text_file):
    done = []
    thread = threading.Thread(
        target=lambda: done.append(loop.train(tiny_config(data_path=text_file), tmp_path / "run"))
    )
    thread.start()
    thread.join()
    assert done and done[0]["steps"] == 8
