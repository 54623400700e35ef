"""Every command of the README and of docs/ is one that exists, with options that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import train
from ecos_pl.client_cli import _parser as client_parser
from ecos_pl.study.__main__ import _parser as study_parser

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
    "command", [c for c in COMMANDS if c.startswith("python -m ecos_pl.study")]
)
def test_studies_shown_exist_and_the_flags_do(command):
    options, rest = study_parser().parse_known_intermixed_args(command.split()[3:])
    assert all("=" in word and not word.startswith("-") for word in [*options.settings, *rest])
    assert options.study is None or (REPOSITORY / f"configs/study/{options.study}.yaml").is_file()


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


def _links():
    for page in [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md"))]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                yield page.relative_to(REPOSITORY).as_posix(), target


@pytest.mark.parametrize(("page", "target"), sorted(set(_links())))
def test_pages_and_sections_linked_to_exist(page, target):
    path, _, section = target.partition("#")
    file = (REPOSITORY / page).parent / path if path else REPOSITORY / page
    assert file.exists()
    if section:
        titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert section in {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in titles}


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
        "parquet",
        "png",
        "pt2",
        "py",
        "safetensors",
        "sbatch",
        "sh",
        "sqlite",
        "toml",
        "xml",
        "yaml",
    )
    if key.split(".")[-1] in files:
        return
    assert f"  {key}" in help_text(REPOSITORY / "configs"), key
