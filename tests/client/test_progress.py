"""Progress bars are for people: on a terminal, and nowhere else."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

SAVE_AND_READ = """
import sys, numpy as np, aq_data
with aq_data.connect(sys.argv[1]) as client:
    file = client.save({"large": np.zeros(40 << 20, "u1")})
    file["large"][...]
"""


def run_on_a_terminal(data, **environment):
    """What the terminal shows: standard error is one, standard output is not."""
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-c", SAVE_AND_READ, str(data)]
    child = subprocess.Popen(command, stderr=far, stdout=subprocess.DEVNULL, env={**os.environ, **environment})
    os.close(far)
    shown = b""
    try:
        while piece := os.read(near, 65536):
            shown += piece
    except OSError:  # the far side is closed
        pass
    finally:
        os.close(near)
    assert child.wait() == 0, shown
    return shown.decode()


def test_a_long_transfer_shows_a_bar_on_a_terminal(data):
    shown = run_on_a_terminal(data)
    assert "saving" in shown
    assert "reading large" in shown


def test_the_environment_turns_bars_off(data):
    assert run_on_a_terminal(data, AQ_DATA_PROGRESS="0") == ""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_nothing_is_shown_where_nobody_watches(data, stream):
    done = subprocess.run([sys.executable, "-c", SAVE_AND_READ, str(data)], capture_output=True, check=True)
    assert getattr(done, stream) == b""
