"""Whether the parts of a config go together: what is refused, and what surprises."""

from __future__ import annotations

import logging

from ecos_pl.config import (
    ClientPrototypesOptions,
    Config,
    DistillationOptions,
    MailboxOptions,
    NoLabelsOptions,
    SelfLabelingOptions,
)
from ecos_pl.overrides import ConfigError
from ecos_pl.selection import NOT_PRIVATE
from ecos_pl.stopping import is_first_process

log = logging.getLogger(__name__)


def check_labels(config: Config) -> None:
    """Say what the labels are good for where that may surprise.

    Raises:
        ConfigError: The task has nothing to learn from these labels.
    """
    if config.train_on == "client":
        return
    none, task = isinstance(config.labels, NoLabelsOptions), config.task
    if not isinstance(task, DistillationOptions):
        if none:
            raise ConfigError(
                f"labels=none leaves task={task.name} nothing to learn: choose other labels, or "
                "task=distillation"
            )
    elif none and task.label_weight and is_first_process():
        log.warning("task.label_weight=%g adds nothing with labels=none", task.label_weight)
    elif not task.label_weight and config.labels.name.startswith("client") and is_first_process():
        log.warning(
            "labels=%s spends privacy on labels that task.label_weight=0 does not use; labels=none "
            "asks for none",
            config.labels.name,
        )


def check_rounds(config: Config) -> None:
    """Refuse rounds of labels that the rest of the config leaves no place for.

    Raises:
        ConfigError: There is no training on a proxy set, its backbone is not the encoder's, or it
            ends before the last round.
    """
    options, task = config.labels, config.task
    if not isinstance(options, ClientPrototypesOptions) or not options.rounds:
        return
    if config.train_on == "client" or not isinstance(task, SelfLabelingOptions):
        raise ConfigError("labels.rounds goes with task=self_labeling on the proxy set")
    if task.backbone != config.encoder.name:
        raise ConfigError(
            f"labels.rounds: the client trusts the architecture of encoder.name="
            f"{config.encoder.name} alone, so task.backbone must be it, not {task.backbone}"
        )
    if 0 <= config.trainer.max_epochs <= options.rounds[-1]:
        raise ConfigError(
            f"labels.rounds={options.rounds} is not over before the training is "
            f"(trainer.max_epochs={config.trainer.max_epochs})"
        )


def check_selection(config: Config) -> None:
    """Refuse to read a real client's images, and say so where a simulated one's are read.

    Raises:
        ConfigError: The strategy reads images of a client that never shows them.
    """
    strategy = config.selection.strategy
    if config.train_on == "client" or strategy not in NOT_PRIVATE:
        return
    if isinstance(config.client, MailboxOptions):
        raise ConfigError(
            f"selection.strategy={strategy} is not private: it reads the client's images, which a "
            "client behind a mailbox never shows; it is for client=simulated"
        )
    if is_first_process():
        log.warning("not private: selection.strategy=%s reads the client's images", strategy)
