"""Studies at work: real runs of train.py, stopped, failing, shared, and as a SLURM job array."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ecos_pl.study import running
from ecos_pl.study.__main__ import main
from ecos_pl.study.cells import CONFIG_DIR, REPOSITORY, cells_of
from ecos_pl.study.folder import StudyFolder
from ecos_pl.study.running import Interrupted, Watcher, run_cells
from ecos_pl.study.study_file import read_study

SETTINGS = """\
settings:
  data: {{name: folder, pool: {tree}/pool, client: {tree}/client, client_domain: bars}}
  encoder: {{name: test_efficientnet, weights: random, image_size: 32, num_workers: 0}}
  probe: {{num_clusters: 8, num_dims: 8}}
  privacy: {{noise_std: 2, max_epsilon: 6}}
  selection: {{size: 40, duplicate_distance: 0}}
  labels: {{num_dims: 6, num_views: 1}}
  task: {{backbone: test_efficientnet, weights: random, image_size: 32, num_workers: 0}}
  trainer: {{max_epochs: 1, accelerator: cpu}}
  logger: none
"""
AXES = """\
axes:
  strategy: {ECOS: {selection.strategy: ecos}, random set: {selection.strategy: random}}
"""


@pytest.fixture
def tiny(image_tree, tmp_path, monkeypatch):
    """A study of small runs: its file, and its folder."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def write(axes=AXES):
        path = tmp_path / "tiny.yaml"
        path.write_text(SETTINGS.format(tree=image_tree) + axes)
        return path

    return write


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A program in place of train.py, which leaves a summary after some seconds, or fails."""
    program = tmp_path / "stand_in.py"
    program.write_text(
        """
import json, os, pathlib, signal, sys, time
settings = dict(word.split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(settings["run_root"], settings["run_id"])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as file:
    print(os.getpid(), os.environ.get("OMP_NUM_THREADS"), file=file)
def stop(number, frame):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
end = time.monotonic() + float(settings.get("task.learning_rate", 0))
while time.monotonic() < end:
    time.sleep(0.02)
if settings["seed"] == "13" and not os.path.exists(folder.parent / "mended"):
    print("first words")
    sys.exit("train.py: the thirteenth fails")
summary = {"seed": int(settings["seed"]), "simulation": {"test_accuracy": 0.5}}
(folder / "summary.json").write_text(json.dumps(summary))
"""
    )

    def command(cell, root):
        words = [*cell.argv, f"run_id={cell.run_id}", f"run_root={root}"]
        return [sys.executable, str(program), *words]

    monkeypatch.setattr(running, "command_of", command)


def make(tmp_path, text):
    path = tmp_path / "seeds.yaml"
    path.write_text(text)
    return path


def starts(folder):
    return {p.parent.name: p.read_text().splitlines() for p in sorted(folder.glob("*/starts"))}


# --- with a stand-in -----------------------------------------------------------------------------


def test_a_cell_that_fails_is_told_and_only_it_is_tried_again(stand_in, tmp_path, capsys):
    path, out = make(tmp_path, "axes: {seed: [1, 13, 2]}"), tmp_path / "out"
    argv = [str(path), "--out", str(out)]
    assert main(argv) == 1
    stdout, err = capsys.readouterr()
    assert "| all (2 of 3 runs) |" in stdout
    assert re.search(
        r"^FAILED seed13-\w+ \(exit status 1\): train.py: the thirteenth fails", err, re.M
    )
    assert main([*argv, "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[1].split()[:2] == ["2", "begun"]
    assert listed[1].endswith("train.py: the thirteenth fails")
    assert listed[-1] == "2 done, 1 begun"
    (out / "mended").touch()
    assert main(argv) == 0
    tries = {name.rpartition("-")[0]: len(lines) for name, lines in starts(out).items()}
    assert tries == {"seed1": 1, "seed13": 2, "seed2": 1}
    assert main(argv) == 0  # there is nothing left to do
    assert sum(map(len, starts(out).values())) == 4


def test_workers_share_the_cores(stand_in, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(running.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    path = make(tmp_path, "settings: {task.learning_rate: 0.5}\naxes: {seed: [1, 2, 3, 4]}")
    cells, folder = cells_of(read_study(path)), StudyFolder(tmp_path / "out")
    at_once, most = set(), []

    def started(cell):
        at_once.add(cell.run_id)
        most.append(len(at_once))

    watcher = Watcher(started, lambda ended: at_once.remove(ended.cell.run_id))
    ended = run_cells(cells, folder, workers=2, watcher=watcher)
    assert [one.status for one in ended] == [0] * 4
    assert max(most) == 2
    assert {lines[0].split()[1] for lines in starts(tmp_path / "out").values()} == {"4"}


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ecos_pl.study", "mixed_digits", "--list", "--out"]
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE
    assert not done.stderr


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_runs_first(stand_in, tmp_path, by):
    path = make(tmp_path, "settings: {task.learning_rate: 300}\naxes: {seed: [1, 2, 3]}")
    cells, folder = cells_of(read_study(path)), StudyFolder(tmp_path / "out")

    def started(cell):
        if cell is cells[1]:
            wait_for(lambda: len(starts(tmp_path / "out")) == 2)
            time.sleep(0.3)  # until its handler is set
            os.kill(os.getpid(), by)

    with pytest.raises(Interrupted) as caught:
        run_cells(cells, folder, workers=2, watcher=Watcher(started))
    assert caught.value.by is by
    assert [folder.state(cell) for cell in cells] == ["begun", "begun", "missing"]
    assert [folder.last_line(cell) for cell in cells] == ["saved", "saved", ""]
    for lines in starts(tmp_path / "out").values():
        with pytest.raises(ProcessLookupError):
            os.kill(int(lines[0].split()[0]), 0)


def test_a_second_signal_does_not_wait(stand_in, tmp_path, monkeypatch):
    """A run that does not end when asked is killed, with what it has started."""
    deaf = "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.fork(); time.sleep(300)"
    monkeypatch.setattr(running, "command_of", lambda cell, root: [sys.executable, "-c", deaf])
    [cell] = cells_of(read_study(make(tmp_path, "axes: {seed: [1]}")))
    folder = StudyFolder(tmp_path / "out")
    begin = time.monotonic()
    watcher = Watcher(
        started=lambda cell: (time.sleep(1), os.kill(os.getpid(), signal.SIGTERM)),
        stopping=lambda num: threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start(),
    )
    with pytest.raises(Interrupted):
        run_cells([cell], folder, watcher=watcher)
    assert time.monotonic() - begin < running.GRACE_S
    wait_for(lambda: folder.state(cell) == "begun")  # its child is gone, too: the lock is free


def test_a_cell_that_another_process_is_at_is_left_to_it(stand_in, tmp_path):
    path = make(tmp_path, "axes: {seed: [1, 2]}")
    cells, folder = cells_of(read_study(path)), StudyFolder(tmp_path / "out")
    descriptor = folder.take(cells[0])
    other = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(1.5)"], pass_fds=[descriptor]
    )
    os.close(descriptor)  # it is the other's alone now, as that of a killed study's run
    assert folder.state(cells[0]) == "running"
    waited = []
    ended = run_cells(cells, folder, watcher=Watcher(waiting=waited.append))
    # It ended without a result, so that the cell was run after all.
    assert [one.cell for one in ended] == [cells[1], cells[0]]
    assert waited == [(cells[0],)]
    assert other.wait() == 0


def test_a_folder_belongs_to_one_study_and_its_settings(stand_in, tmp_path, capsys):
    path, out = make(tmp_path, "axes: {seed: [1]}"), f"--out={tmp_path / 'out'}"
    assert main([str(path), out, "selection.size=20"]) == 0
    capsys.readouterr()
    assert main([str(path), out]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "(selection.size=20 there, none here): give the same, or --out FOLDER" in err
    assert main([str(path), out, "--render"]) == 0  # looks at what is there
    assert "1 of 1 cells are done" in capsys.readouterr().out
    other = tmp_path / "other.yaml"
    other.write_text(path.read_text())
    assert main([str(other), out, "selection.size=20"]) == 2
    assert "holds the study seeds" in capsys.readouterr().err


def test_runs_of_other_settings_are_never_read(stand_in, tmp_path, capsys):
    path, out = make(tmp_path, "axes: {seed: [1]}"), tmp_path / "out"
    assert main([str(path), "--out", str(out)]) == 0
    [cell] = cells_of(read_study(path))
    (out / cell.run_id / "config.yaml").write_text("selection: {size: 77}\n")
    capsys.readouterr()
    assert main([str(path), "--out", str(out), "--render"]) == 2
    assert "(selection.size=77 there, selection.size=1500 here)" in capsys.readouterr().err


def test_a_part_can_be_run_alone(stand_in, tmp_path, capsys):
    path, out = make(tmp_path, "axes: {seed: [1, 2], selection.size: [5, 6]}"), tmp_path / "out"
    assert main([str(path), f"--out={out}", "--only=seed=2", "--only", "selection.size=5"]) == 0
    assert [name.rpartition("-")[0] for name in starts(out)] == ["seed2-size5"]
    capsys.readouterr()
    assert main([str(path), f"--out={out}", "--only=seed=3"]) == 2
    assert "(there are: 1, 2)" in capsys.readouterr().err


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["mixed_digit"], "did you mean mixed_digits?"),
        (["no/such.yaml"], "no config file no/such.yaml"),
        (["budget", "--worker=2"], "unknown flag --worker=2; did you mean --workers?"),
        (["budget", "size"], "'size' has no '='"),
        (["budget", "selection.siz=5"], "no option selection.siz; did you mean selection.size?"),
        (["budget", "--cell=99"], "no such cell"),
        (["budget", "--submit"], "go with --slurm"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(argv, words, capsys, tmp_path):
    assert main([*argv, f"--out={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.glob("*/summary.json")) == []


def test_the_help_is_80_columns_wide(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for flag in ("--workers", "--only", "--out", "--list", "--render", "--slurm", "--submit"):
        assert flag in out
    assert main([]) == 0
    out = capsys.readouterr().out
    assert {path.stem for path in (CONFIG_DIR / "study").glob("*.yaml")} == set(
        re.findall(r"^  (\w+): \w", out, re.M)
    )


# --- real runs -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_killed_in_the_middle_goes_on(tiny, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ecos_pl.study", str(tiny()), f"--out={out}", "--workers=2"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(out.glob("*/config.yaml"))) == 2)  # both are at it
    first.terminate()
    _, err = first.communicate(timeout=90)
    assert first.returncode == 143, err
    assert err.splitlines()[-1] == "stopped by SIGTERM; the same command goes on"
    done_before = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    again = subprocess.run(command, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    summaries = {path: json.loads(path.read_text()) for path in out.glob("*/summary.json")}
    assert len(summaries) == 2
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in done_before.items())
    # They share one cache: the pool was embedded and clustered once.
    assert len(list((out / "cache/clusters").glob("*/centroids.st"))) == 1
    assert "2 of 2 cells are done." in again.stdout
    assert "| ECOS | 40 | 6.00 |" in again.stdout
    # The runs are those that train.py does by itself.
    [line] = re.findall(r"^\$ (.*)", next((out / "logs").glob("ecos*.log")).read_text(), re.M)[:1]
    assert "train.py data=folder" in line


@pytest.mark.slow
def test_slurm_runs_what_is_missing(tiny, tmp_path, monkeypatch, capsys):
    """The script, the study and train.py are real; sbatch and srun are not."""
    out, programs = tmp_path / "out", tmp_path / "bin"
    study = read_study(tiny())
    ecos, random = cells_of(study)
    (out / random.run_id).mkdir(parents=True)
    (out / random.run_id / "summary.json").write_text('{"seed": 1}')
    programs.mkdir()
    for name, text in {
        "sbatch": f'echo "$@" >> {tmp_path}/calls; echo Submitted batch job 77',
        "srun": f'echo srun "$1" >> {tmp_path}/calls; shift; exec "$@"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    argv = [str(study.path), f"--out={out}", "--slurm", "--workers=3", "--sbatch=--partition=gpu"]
    assert main([*argv, "--submit"]) == 0
    assert capsys.readouterr().out.endswith("Submitted batch job 77\n")
    script = out / "slurm.sbatch"
    assert (tmp_path / "calls").read_text() == f"{script}\n"
    lines = script.read_text().splitlines()
    assert "#SBATCH --array=1-1%3" in lines
    assert lines.index("#SBATCH --partition=gpu") > lines.index("#SBATCH --time=08:00:00")
    assert random.run_id not in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)
    env = {**os.environ, "SLURM_ARRAY_TASK_ID": "1", "SLURM_PROCID": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().splitlines()[1] == "srun --kill-on-bad-exit=1"
    summary = json.loads((out / ecos.run_id / "summary.json").read_text())
    assert summary["run_id"] == ecos.run_id
    assert main(argv) == 0
    assert capsys.readouterr().out == "no cell is missing\n"
    # A task that comes a second time has nothing to do.
    assert subprocess.run(["bash", str(script)], env=env, capture_output=True).returncode == 0


def test_without_sbatch_the_script_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    path, out = make(tmp_path, "axes: {seed: [1, 2]}"), tmp_path / "out"
    assert main([str(path), f"--out={out}", "--slurm", "--submit"]) == 2
    assert "sbatch cannot be run" in capsys.readouterr().err
    assert "#SBATCH --array=1-2\n" in (out / "slurm.sbatch").read_text()


def wait_for(is_so, timeout_s=120):
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_paths_are_those_of_this_repository():
    assert (REPOSITORY / "train.py").is_file()
    assert Path(__file__).parents[1] == REPOSITORY
