"""SIGKILL and SIGTERM at random moments of the probe: as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ecos_pl.client_cli import main as client_main
from ecos_pl.client_setup import open_ledger
from tests.rank_processes import ROOT, run_ranks
from tests.test_probe_ranks import PROBE, files, prepared

NUM_KILLS = 20

KILLS = f"""
import os, random, signal, time, traceback
from ecos_pl.remote_mailbox import RemoteMailbox

def attempt(run, delay_s, with_signal):
    # Run the probe in a child and end it after a while; whether it was done before.
    child = os.fork()
    if child == 0:
        status = 1
        try:
            mailbox = RemoteMailbox(
                str(folder / "box"), sender="cloud", poll_s=0.05, max_poll_s=0.05
            )
            probe = make_probe(run)
            probe._conversation._mailbox_for = lambda fingerprint: mailbox
            probe.run()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    until = time.perf_counter() + delay_s
    while time.perf_counter() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, status
            return True
        time.sleep(0.002)
    os.kill(child, with_signal)
    os.waitpid(child, 0)
    return False

draw = random.Random(1)
signals = [signal.SIGKILL, signal.SIGTERM]
num_kills = num_runs = 0
longest_s = 2.0
while num_kills < {NUM_KILLS}:
    num_runs += 1
    run = folder / f"killed{{num_runs}}"
    # Each attempt goes on where the one before was ended; the time grows, so that it comes to an
    # end on a slow machine, too.
    while not attempt(run, longest_s * draw.random(), draw.choice(signals)):
        num_kills += 1
        longest_s *= 1.05
assert attempt(folder / "undisturbed", 1e9, None)
"""


@pytest.mark.slow
def test_killed_twenty_times_it_chooses_the_same_and_spends_nothing_twice(
    tmp_path: Path, image_tree: Path
) -> None:
    folder = prepared(tmp_path / "cloud", image_tree)
    client, box, private = tmp_path / "client", folder / "box", tmp_path / "private"
    shutil.copytree(image_tree / "client" / "train", private)  # `init` leaves its mark there
    command = ["init", str(client), "--data", str(private)]
    command += ["--encoder", "mobilenetv3_small_050", "--weights", "random", "--image-size", "32"]
    command += ["--max-epsilon", "60", "--min-noise-std", "0.5", "--min-noise-multiplier", "0.05"]
    assert client_main(command) == 0
    serve = [sys.executable, "-m", "ecos_pl.client_cli", "serve", str(client)]
    serve += ["--mailbox", str(box), "--poll-seconds", "0.05"]
    log = (tmp_path / "serve.log").open("wb")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(serve, cwd=ROOT, env=environment, stdout=log, stderr=log) as server:
        try:
            run_ranks(PROBE + KILLS, 1, folder, timeout_s=400)
        finally:
            server.send_signal(signal.SIGINT)
    ledger, _ = open_ledger(client)
    assert [release.kind for release in ledger.releases()] == ["coverage_counts", "prototypes"]
    undisturbed = files(folder / "undisturbed" / "cache")
    assert any(name.startswith("probes/") for name in undisturbed)
    for run in folder.glob("killed*"):
        assert files(run / "cache") == undisturbed
