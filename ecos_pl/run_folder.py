"""A run's folder: its name, its config, and the checkpoint that it goes on from."""

from __future__ import annotations

from pathlib import Path

from ecos_pl.config import (
    Config,
)
from ecos_pl.config_files import (
    to_dict,
    to_yaml,
)
from ecos_pl.overrides import (
    ConfigError,
)
from ecos_pl.stopping import is_first_process
from ecos_pl.storage import fingerprint_of, write_bytes


def run_folder(config: Config) -> Path:
    """Make the run's folder and write its config, or check that the one there is the same.

    Raises:
        ConfigError: It holds a run with another config.
    """
    same_run = {k: v for k, v in to_dict(config).items() if k not in _NOT_THE_RUN}
    for key in _ABOUT_THE_JOB:
        same_run["labels"].pop(key, None)
    what = config.selection.strategy if config.train_on == "proxy_set" else "local"
    name = f"{config.data.name}-{what}-seed{config.seed}-{fingerprint_of(same_run)[:8]}"
    folder = Path(config.run_root) / (config.run_id or name)
    text = to_yaml(config)
    path = folder / "config.yaml"
    if path.is_file() and _differs(path.read_text(), text):
        raise ConfigError(
            f"{folder} holds a run with another config ({_differs(path.read_text(), text)}); "
            "choose another run_id, or remove that folder"
        )
    if not config.trainer.fast_dev_run and is_first_process():
        write_bytes(path, text.encode())
    return folder


_NOT_THE_RUN = ("run_id", "run_root", "experiment", "callbacks")  # where, whence, what is told
_ABOUT_THE_JOB = ("annotators", "price_per_label", "returned")  # of labels: same job, same run
_MAY_CHANGE = (
    *_NOT_THE_RUN,
    *_ABOUT_THE_JOB,
    "max_epochs",
    "enable_progress_bar",
    "num_workers",
    "devices",
    "num_nodes",
    "timeout_minutes",
    "deliver",
)


def _differs(old: str, new: str) -> str:
    """First line in which two config files differ; empty if a run may go on with the new one."""
    for old_line, new_line in zip(_what_runs(old), _what_runs(new), strict=False):
        key = new_line.strip().partition(":")[0]
        if old_line != new_line and key not in _MAY_CHANGE:
            return f"{old_line.strip()} there, {new_line.strip()} here"
    return ""


def _what_runs(text: str) -> list[str]:
    """Lines of a config file but for those about what is told of the run."""
    kept, section = [], ""
    for line in text.splitlines():
        if not line.startswith((" ", "-")):
            section = line.partition(":")[0]
        if section != "callbacks":
            kept.append(line)
    return kept


def newest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint to resume from: of the last epoch, or of the last stop."""
    found = [
        path
        for pattern in ("hpc_ckpt_*.ckpt", "checkpoints/last*.ckpt", "checkpoints/stopped.ckpt")
        for path in folder.glob(pattern)
    ]
    return str(max(found, key=lambda path: path.stat().st_mtime)) if found else None
