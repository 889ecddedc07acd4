"""The near end of a driver: start it, ask it, end it. The far end is `driver.py`."""

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

from benchmarks.peer import Options
from benchmarks.server_process import quiet_environment

__all__ = ["DriverError", "DriverProcess"]

ANSWER_LIMIT = 900.0
"""Seconds for one command; the longest on two cores is Tiled's 200 reads from its own chunks, half a minute."""
_PROJECT = Path(__file__).parent.parent


class DriverError(RuntimeError):
    """A command failed in the driver; the message is its traceback."""


class DriverProcess:
    """One driver with its client connected."""

    def __init__(self, python: str, peer: str, options: Options, log: Path) -> None:
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.driver", peer],
                cwd=_PROJECT,
                env=quiet_environment(log.parent),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._log = log
        try:
            self.ask("connect", options=options)
        except BaseException:
            self.stop()
            raise

    def ask(self, command: str, **arguments: Any) -> Any:
        """Send one command and wait for its answer."""
        self.tell(command, **arguments)
        return self.answer()

    def tell(self, command: str, **arguments: Any) -> None:
        """Send one command; `answer` must be called once for it."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps({"do": command, "with": arguments}) + "\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error

    def answer(self) -> Any:
        stdout = self._process.stdout
        assert stdout is not None
        watchdog = threading.Timer(ANSWER_LIMIT, self._process.kill)
        watchdog.start()
        try:
            line = stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        if "error" in answer:
            raise DriverError(answer["error"])
        return answer["ok"]

    def stop(self) -> None:
        """Terminate it, whatever it is doing, and kill it if that takes more than ten seconds."""
        self._process.terminate()
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def _ended(self) -> DriverError:
        return DriverError("the driver ended:\n" + self._log.read_text(errors="replace")[-2000:])
