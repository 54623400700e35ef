"""Probe a public pool for a client, train on the proxy set, report: python train.py key=value …

This is the only file that knows all parts: argv → config → objects → fit → test → summary.
Whatever is heavy is imported late, so that --help and mistakes are quick.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecos_pl.config import CompressionOptions, Config
from ecos_pl.config_files import load_config, to_yaml
from ecos_pl.config_help import help_text
from ecos_pl.failures import is_users_mistake, lost_process
from ecos_pl.labels_awaited import LabelsAwaited
from ecos_pl.overrides import ConfigError, parse_command_line
from ecos_pl.run_folder import newest_checkpoint, run_folder
from ecos_pl.stopping import (
    REQUESTS,
    STATUS,
    Stopped,
    is_first_process,
    is_lightnings_child,
    requeue,
    slurm_job,
)

if TYPE_CHECKING:
    import lightning as L

    from datamodules.scenario import Scenario
    from ecos_pl.teacher import FrozenTeacher

HERE = Path(__file__).resolve().parent
CONFIG_DIR = HERE / "configs"
OURS = [HERE / name for name in ("ecos_pl", "datamodules", "callbacks", "train.py")]


def main(argv: Sequence[str]) -> int:
    """Run from the command line.

    The exit status: 0 done, or people are to label the proxy set now; 1 another process of the run
    was lost, 2 a mistake of the user, 130 Ctrl-C, 143 stopped by SIGTERM or SIGUSR1.
    """
    with REQUESTS.heard():
        return _main(argv)


def _main(argv: Sequence[str]) -> int:
    try:
        command_line = parse_command_line(argv)
        if command_line.help:
            print(help_text(CONFIG_DIR), end="")
            return 0
        config = load_config(argv, config_dir=CONFIG_DIR)
        if command_line.print_config:
            print(to_yaml(config), end="")
            return 0
        train(config)
    except LabelsAwaited as awaited:
        if is_first_process():
            print(awaited)
    except Stopped as stop:
        return _stopped(stop)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if lost := lost_process(error):
            if REQUESTS.by is not None:
                return _stopped(Stopped(REQUESTS.by))
            print(
                f"train.py{_which()}: {lost}; the same command goes on from here", file=sys.stderr
            )
            return 1
        if not is_users_mistake(error, OURS):
            raise
        if is_first_process() or not isinstance(error, ConfigError):  # all processes find those
            print(f"train.py{_which()}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _stopped(stop: Stopped) -> int:
    """Say so once, and let SLURM run the job again if its signal asked for that."""
    REQUESTS.end()
    if is_first_process():
        note = ""
        if stop.by.name == "SIGUSR1" and (job := slurm_job()):
            note = f" ({requeue(job)})"
        print(
            f"stopped by {stop.by.name}; the same command goes on from here{note}", file=sys.stderr
        )
    return 0 if is_lightnings_child() else STATUS


def _which() -> str:
    """Which process speaks; nothing for the first, which usually is the only one."""
    rank = next((os.environ[name] for name in ("RANK", "LOCAL_RANK") if name in os.environ), "0")
    return "" if is_first_process() else f" [rank {rank}]"


def train(config: Config) -> dict[str, Any]:
    """Do one run and return its summary, which is also in ``summary.json``.

    Called again with the same config it reads the probe from disk and resumes the training.

    Raises:
        LabelsAwaited: With ``labels=human``, until there are labels.
    """
    start = time.perf_counter()
    import lightning as L

    from callbacks.from_config import logger_of
    from callbacks.loggers import closing
    from ecos_pl.quiet import keep_quiet

    keep_quiet()
    L.seed_everything(config.seed, workers=True, verbose=False)
    folder = run_folder(config)
    with closing(logger_of(config, folder)) as logger:
        return _train(config, folder, logger, start)


def _train(config: Config, folder: Path, logger: Any, start: float) -> dict[str, Any]:
    from callbacks.findings import findings, log_model
    from callbacks.from_config import label_rounds_of, teacher_trainer, trainer_of
    from callbacks.launched_processes import children_end_too, probe_here_if_workers_cannot_tell
    from datamodules.from_config import datamodule_of, scenario_of, teacher_of
    from ecos_pl.client_mailbox import deliver
    from ecos_pl.config_checks import check_labels, check_rounds, check_selection
    from ecos_pl.environment import environment_facts
    from ecos_pl.model_file import save_model
    from ecos_pl.report import write_report
    from ecos_pl.storage import write_json
    from ecos_pl.summary import print_summary, summarise

    check_labels(config)
    check_rounds(config)
    check_selection(config)
    scenario = scenario_of(config)
    teacher = teacher_of(config, scenario, partial(teacher_trainer, config))
    datamodule = datamodule_of(config, scenario, folder, teacher)
    module = _module(config, scenario, folder, datamodule, teacher)
    rounds = label_rounds_of(config, folder)
    trainer, timer = trainer_of(config, folder, logger, [rounds] if rounds else [])
    if isinstance(config.task, CompressionOptions) and trainer.world_size > 1:
        raise ConfigError("task=compression trains on one device: add trainer.devices=1")
    metrics = []
    with children_end_too(trainer):
        probe_here_if_workers_cannot_tell(trainer, datamodule)
        trainer.fit(module, datamodule, ckpt_path=newest_checkpoint(folder), weights_only=True)
        if not config.trainer.fast_dev_run:
            module = _delivered(config, scenario, folder, datamodule, teacher, timer, trainer)
            if rounds:
                rounds.catch_up(datamodule)
        if scenario.client_test is not None:
            metrics = trainer.test(module, datamodule, verbose=False)
    summary = summarise(
        run_id=folder.name,
        seed=config.seed,
        probe=datamodule.probe_result,
        rounds=datamodule.rounds,
        simulation={
            **datamodule.simulation,
            "test_accuracy": metrics[0].get("simulation/test_accuracy") if metrics else None,
        },
        seconds={
            "probe": getattr(datamodule, "probe_seconds", 0.0),
            "fit": timer.fit_seconds,
            "test": timer.test_seconds,
            "per_step": timer.seconds_per_step,
            "total": time.perf_counter() - start,
        },
        pool=scenario.pool,
        client=datamodule.client_facts,
        environment=environment_facts(trainer.strategy.root_device, trainer.world_size),
        **findings(trainer, datamodule),
        **_sizes(module, teacher, scenario, trainer),
    )
    if isinstance(config.task, CompressionOptions):
        _write_compressed(config, config.task, scenario, folder, module, datamodule, summary)
    if trainer.is_global_zero and not config.trainer.fast_dev_run:
        save_model(folder / "model.safetensors", module.model)  # for `ecos-client evaluate`
        write_json(folder / "summary.json", summary)
        if datamodule.probe_result is not None:
            datamodule.probe_result.proxy_set.save(folder)
        if deliver(config, folder, summary):
            write_json(folder / "summary.json", summary)
        log_model(trainer, folder / "model.safetensors", summary, scenario.classes)
        if config.callbacks.report:
            write_report(folder)
    if trainer.is_global_zero:
        print_summary(summary, folder)
    return summary


def _module(
    config: Config,
    scenario: Scenario,
    folder: Path,
    datamodule: Any,
    teacher: FrozenTeacher | None,
) -> L.LightningModule:
    from datamodules.plain_images import plain_batches
    from ecos_pl.modules.from_config import module_of

    return module_of(
        config,
        scenario.classes,
        folder,
        teacher=teacher,
        measured_on=partial(plain_batches, datamodule, seed=config.seed),
    )


def _write_compressed(
    config: Config,
    task: CompressionOptions,
    scenario: Scenario,
    folder: Path,
    module: Any,
    datamodule: Any,
    summary: dict[str, Any],
) -> None:
    """The files of a compression and their card; the summary gains what they came to."""
    from datamodules.plain_images import calibration_images
    from ecos_pl.compression_from_config import compression_results, write_card

    summary["compression"] = compression_results(
        config,
        task,
        folder,
        module,
        images=partial(calibration_images, datamodule, seed=config.seed),
        test_batches=datamodule.test_dataloader,
    )
    if not config.trainer.fast_dev_run:
        write_card(config, task, scenario.classes, folder, summary)


def _sizes(
    module: Any, teacher: FrozenTeacher | None, scenario: Scenario, trainer: L.Trainer
) -> dict[str, Any]:
    """For the summary: what is delivered, and the teacher beside it."""
    if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
        return {}
    from datamodules.loaders import image_loader
    from datamodules.proxy import client_images
    from ecos_pl.evaluation import accuracy
    from ecos_pl.model_size import size_facts

    device = trainer.strategy.root_device
    sizes: dict[str, Any] = {"model": size_facts(module.model, device)}
    if teacher is not None:
        sizes["teacher"] = size_facts(teacher.model, device)
        if scenario.client_test is not None:
            images = client_images(scenario, "test", teacher.image_size)
            loader = image_loader(images, 64, num_workers=0, train=False, seed=0)
            sizes["teacher"]["test_accuracy"] = accuracy(teacher.model, loader)
    return sizes


def _delivered(
    config: Config,
    scenario: Scenario,
    folder: Path,
    datamodule: Any,
    teacher: FrozenTeacher | None,
    timer: Any,
    trainer: L.Trainer,
) -> L.LightningModule:
    """A new module with the weights of the last checkpoint, averaged ones where there are any.

    Tested is what is delivered. Not the trained module itself, whose weights may be spread over
    devices or in other processes; nor ``trainer.test(ckpt_path=…)``: after a fit, Lightning's
    weight averaging would give back the weights of the last step instead.
    """
    import torch

    module = _module(config, scenario, folder, datamodule, teacher)
    if (last := newest_checkpoint(folder)) is not None:
        checkpoint = torch.load(last, map_location="cpu", weights_only=True)
        module.on_load_checkpoint(checkpoint)  # what was pruned has other shapes
        module.load_state_dict(checkpoint["state_dict"])
        if not timer.fit_seconds:  # the fit was in processes that have ended, or in an earlier call
            from callbacks.choose import remember

            remember(trainer, checkpoint["callbacks"])
    return module


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
