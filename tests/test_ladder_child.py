"""A cell in a process of its own: whoever stops the command stops it too, once it has saved."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from experiments.ladder import child
from experiments.ladder.child import ended, run_apart
from experiments.ladder.climb import job_of
from experiments.ladder.scales import TINY

SAVES = """
import signal, sys, time
def save(number, frame):
    signal.signal(number, signal.SIG_IGN)
    time.sleep(0.5)
    open(sys.argv[1], "w").write("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


def stop_this_process_once_ready(process):
    def wait_and_stop():
        process.stdout.readline()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_and_stop).start()


def test_a_request_to_stop_is_passed_on_and_what_is_being_saved_is_waited_for(tmp_path):
    command = [sys.executable, "-c", SAVES, str(tmp_path / "saved")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        stop_this_process_once_ready(process)
        assert ended(process) == (143, True)
    assert (tmp_path / "saved").read_text() == "saved"


def test_a_process_that_ends_by_itself_was_not_stopped():
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process:
        assert ended(process) == (3, False)


def test_nothing_goes_on_after_a_request_even_where_the_run_has_ended(tmp_path, monkeypatch):
    job = job_of(TINY, "muon", TINY.tokens, 0)
    monkeypatch.setattr(child.subprocess, "Popen", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(child, "ended", lambda process: (0, True))
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        run_apart(job, tmp_path)
