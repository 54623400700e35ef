"""From the command line and YAML files to a `Config`, and back to YAML."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ecos_pl.config import Config
from ecos_pl.overrides import (
    NONE_WORDS,
    ConfigError,
    Resolver,
    Setting,
    check,
    nearest,
    parse_command_line,
    read_yaml,
)

# --- reading -------------------------------------------------------------------------------------


def load_config(argv: Sequence[str], *, config_dir: Path) -> Config:
    """Build the config: defaults < experiment < --config file < `key=value`.

    Args:
        argv: the arguments after the program's name.
        config_dir: the folder that holds `experiment/*.yaml`.

    Raises:
        ConfigError: one line that says what is wrong, where, and the nearest valid name.
    """
    command_line = parse_command_line(argv)
    file = Path(command_line.config_file).expanduser() if command_line.config_file else None
    layers = [read_yaml(file) if file else [], command_line.settings]
    return config_of([experiment_in(layers, config_dir), *layers])


def config_of(layers: Sequence[Sequence[Setting]]) -> Config:
    """Build the config from settings, of the weakest source first.

    Raises:
        ConfigError: as `load_config` does.
    """
    resolver = Resolver(Config, layers)
    values = resolver.values()
    options = {key: option_field for key, (option_field, _) in resolver.options().items()}
    places = {key: where for key, (_, where) in values.items()}
    with _in_one_line(places):
        node = OmegaConf.structured(resolver.instance())
        for key, (value, _) in values.items():
            OmegaConf.update(node, key, value)
        missing = OmegaConf.missing_keys(node)
        if asked := [key for key in options if key in missing]:
            advice = " ".join(f"{key}={key.rpartition('.')[2].upper()}" for key in asked)
            raise ConfigError(f"no value for {' and '.join(asked)}: write {advice}")
        for key, option_field in options.items():
            value = OmegaConf.select(node, key)  # resolves ${…}
            check(key, value, option_field, places.get(key, ""))
        config = OmegaConf.to_object(node)
    assert isinstance(config, Config)
    return config


@contextlib.contextmanager
def _in_one_line(places: dict[str, str]) -> Iterator[None]:
    # What is left for OmegaConf to refuse is interpolation: a ${…} that leads nowhere.
    try:
        yield
    except OmegaConfBaseException as error:
        key, first_line = error.full_key or "config", str(error).partition("\n")[0]
        raise ConfigError(f"{places.get(key, '')}{key}: {first_line}") from None


def experiments_in(config_dir: Path) -> dict[str, Path]:
    """Experiment files by name."""
    return {path.stem: path for path in sorted((config_dir / "experiment").glob("*.yaml"))}


def experiment_in(layers: Sequence[Sequence[Setting]], config_dir: Path) -> list[Setting]:
    """Settings of the experiment that some layers name; none if they name none.

    Raises:
        ConfigError: there is no such experiment, or its file cannot be read.
    """
    experiment = _experiment_named(layers)
    return _read_experiment(experiment, config_dir) if experiment else []


def _experiment_named(layers: Sequence[Sequence[Setting]]) -> Setting | None:
    named = [s for settings in layers for s in settings if s.key == "experiment"]
    if not named or (not named[-1].quoted and str(named[-1].value).lower() in (*NONE_WORDS, "")):
        return None
    return named[-1]


def _read_experiment(setting: Setting, config_dir: Path) -> list[Setting]:
    name, experiments = str(setting.value), experiments_in(config_dir)
    if name not in experiments:
        listed = ", ".join(experiments) or f"none in {config_dir / 'experiment'}"
        raise ConfigError(
            f"{setting.where}no experiment {name!r}{nearest(name, experiments)} "
            f"(there are: {listed})"
        )
    settings = read_yaml(experiments[name])
    for inner in settings:
        if inner.key == "experiment":
            raise ConfigError(f"{inner.where}an experiment cannot start from another experiment")
    return settings


# --- writing -------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes strings so that they read back as strings."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        # Unquoted, `none` would read back as no value; unescaped, `${` would be resolved.
        style = '"' if text.lower() in NONE_WORDS or not text.isprintable() else None
        text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def to_dict(config: Config) -> dict[str, Any]:
    """Return the config as plain dicts, lists, strings and numbers."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """Return the config as YAML that `--config FILE` reads back to an equal config."""
    text: str = yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text
