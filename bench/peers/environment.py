"""Creates the peers' Python environments under .bench/, once, with pinned versions and apart from ours.

    python -m bench.peers.environment            make it, 1.5 GB
    PIP_ARGS="--extra-index-url ..." python -m bench.peers.environment

Two versions of TRL share one environment, because all their other packages agree: 1.16.0 is installed; 1.12.0, the last
one with PPO, is in a folder next to it, which is put first on the path.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.measure import BenchError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".bench"
TORCH, TRANSFORMERS, TRL, TRL_PPO = "2.13.0", "5.24.0", "1.16.0", "1.12.0"
PINS = (f"torch=={TORCH}", f"transformers=={TRANSFORMERS}", f"trl=={TRL}")


@dataclass(frozen=True)
class Peers:
    """The peers' Python interpreter, and the folder of the older TRL."""

    python: Path
    trl_ppo: Path

    def path(self, *, ppo: bool) -> str:
        """PYTHONPATH: the benchmarks; for PPO the older TRL comes first."""
        return os.pathsep.join([*([str(self.trl_ppo)] if ppo else []), str(ROOT)])


def peers(folder: Path | None = None) -> Peers:
    """The environment, created if it does not exist. BENCH_PEERS names one that exists already."""
    named = os.environ.get("BENCH_PEERS")
    folder = folder or (Path(named) if named else FOLDER)
    found = Peers(folder / "peers" / "bin" / "python", folder / f"trl-{TRL_PPO}")
    stamp = folder / "stamp"
    wanted = "\n".join([*PINS, TRL_PPO])
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        make(folder, found)
        stamp.write_text(wanted, encoding="utf-8")
    return found


def make(folder: Path, target: Peers) -> None:
    """Create the environment. Raises BenchError with pip's own message."""
    print(f"making the peers' environment in {folder} (1.5 GB, torch is the large part) ...", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "venv", str(folder / "peers")])
    pip = [str(target.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += shlex.split(os.environ.get("PIP_ARGS", ""))
    run([*pip, *PINS])
    run([*pip, "--no-deps", "--upgrade", "--target", str(target.trl_ppo), f"trl=={TRL_PPO}"])


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"{shlex.join(command)} failed:\n{done.stderr.strip()[-2000:]}")


if __name__ == "__main__":
    print(peers().python)
