"""Every command of the README and of docs/ is one that exists, with options that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import train
from ecos_pl.client_cli import _parser as client_parser

REPOSITORY = Path(train.__file__).parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [path.read_text(encoding="utf-8") for path in sorted(REPOSITORY.glob("docs/*.md"))]
ALL = "\n".join([README, *PAGES])
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", ALL, re.DOTALL)
    for line in block.splitlines()
    if line.partition("#")[0].strip()
]


def test_the_first_screen_shows_the_two_commands():
    assert COMMANDS[:2] == ["make demo", "make test"]
    assert README.index("make test") < README.index("## ")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python train.py")])
def test_train_takes_the_options_shown(command, capsys):
    arguments = command.split()[2:]
    shown = [a for a in arguments if a not in ("--print-config", "--help")]
    assert train.main([*shown, "--print-config"]) == 0
    assert "selection:" in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("ecos-client")])
def test_the_client_takes_the_options_shown(command):
    options = client_parser().parse_args(command.split()[1:])
    assert callable(options.run)


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match(r"python \w+/", c)])
def test_scripts_shown_exist_and_take_the_options(command, capsys):
    script, *arguments = command.split()[1:]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / script), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for argument in arguments:
        if argument.startswith("--"):
            assert argument.partition("=")[0] in done.stdout


@pytest.mark.parametrize(
    "module", sorted({c.split()[2] for c in COMMANDS if c.startswith("python -m ecos_pl.")})
)
def test_programs_shown_exist(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "usage" in done.stdout


@pytest.mark.parametrize(
    "script", sorted({n for c in COMMANDS for n in c.split() if n.startswith("scripts/")})
)
def test_scripts_for_clusters_exist(script):
    assert (REPOSITORY / script).is_file()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((docs/[\w.]+)\)", README))))
def test_pages_linked_to_exist(target):
    assert (REPOSITORY / target).is_file()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_has_the_target(command):
    makefile = (REPOSITORY / "Makefile").read_text()
    assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/]+\.py)`", ALL))))
def test_files_named_in_the_readme_exist(name):
    assert list(REPOSITORY.glob(f"**/{name}")), name


@pytest.mark.parametrize("key", sorted(set(re.findall(r"`((?:[a-z_]+\.)+[a-z_]+)=?`", ALL))))
def test_options_named_in_the_readme_exist(key):
    from ecos_pl.config_help import help_text

    files = (
        "csv",
        "html",
        "json",
        "md",
        "onnx",
        "png",
        "pt2",
        "py",
        "safetensors",
        "sbatch",
        "sh",
        "sqlite",
        "xml",
        "yaml",
    )
    if key.split(".")[-1] in files:
        return
    assert f"  {key}" in help_text(REPOSITORY / "configs"), key
