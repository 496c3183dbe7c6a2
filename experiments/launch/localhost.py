"""Starts several processes of one run on this machine, as a cluster would start them on its hosts.

python experiments/launch/localhost.py --processes=2 --devices=4 -- \\
    python -m gptjax.train --config=configs/base.py --config.mesh.fsdp=8 --workdir=runs/two

Each process gets the command with its place as flags, and so many virtual CPU devices. A signal goes to all of them.
When one ends with an error the others are given a minute to see it, then they are killed; the exit code is that of the
first that ended so.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence


def free_port() -> int:
    """A port of the loopback interface that nobody listens to."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(command: Sequence[str], processes: int, devices: int, **options: object) -> list[subprocess.Popen[str]]:
    """The processes, running.

    Args:
      command: of a run; gets --coordinator, --processes and --process.
      processes: how many.
      devices: virtual CPU devices of each.
      options: of subprocess.Popen.
    """
    place = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    return [
        subprocess.Popen([*command, *place, f"--process={i}"], env=environment, encoding="utf-8", **options)  # type: ignore[call-overload]
        for i in range(processes)
    ]


def wait(running: Sequence[subprocess.Popen[str]], patience: float = 60.0) -> int:
    """The exit code of the first that fails, when all have ended; 0 where none does.

    Args:
      running: as `start` gives them.
      patience: seconds that the others have from then on.
    """
    code, deadline = 0, None
    while any(process.poll() is None for process in running):
        failed = [process.returncode for process in running if process.returncode]
        if failed and deadline is None:
            code, deadline = failed[0], time.monotonic() + patience
        if deadline is not None and time.monotonic() > deadline:
            for process in running:
                process.kill()
        time.sleep(0.1)
    return code or next((process.returncode for process in running if process.returncode), 0)


def main() -> None:
    """Starts what the command line asks for, and waits for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices of each process")
    parser.add_argument("command", nargs="+", help="after --")
    flags = parser.parse_args()
    running = start(flags.command, flags.processes, flags.devices)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: [process.send_signal(number) for process in running])
    code = wait(running)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
