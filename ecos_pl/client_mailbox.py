"""The mailbox of a run's client: opened, and the trained model left in it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ecos_pl.config import CompressionOptions, Config, MailboxOptions
from ecos_pl.envelope import MessageError, read_key_file
from ecos_pl.message_store import MailboxError
from ecos_pl.remote_mailbox import RemoteMailbox
from ecos_pl.summary import add_delivery

log = logging.getLogger(__name__)


def open_mailbox(options: MailboxOptions) -> RemoteMailbox:
    """The mailbox that the options name.

    Raises:
        ValueError: One line: a key or an address that cannot be read.
    """
    return RemoteMailbox(
        options.url,
        sender=options.sender,
        key=read_key_file(Path(options.key_file)) if options.key_file else None,
        deadline_s=3600 * options.deadline_hours if options.deadline_hours else None,
        poll_s=min(2.0, options.poll_seconds),
        max_poll_s=options.poll_seconds,
    )


def deliver(config: Config, folder: Path, summary: dict[str, Any]) -> bool:
    """Leave files of the run in the client's mailbox, each once; whether there was any to leave.

    Args:
        config: Of the run.
        folder: Of the run.
        summary: Gains what was delivered.

    Raises:
        MailboxError: The mailbox cannot be reached; the run is whole.
    """
    options = config.client
    if not isinstance(options, MailboxOptions) or not options.deliver:
        return False
    mailbox, files = open_mailbox(options), ["model.safetensors"]
    if isinstance(config.task, CompressionOptions):
        files.append("model.int8.onnx")
    for file in files:
        try:
            content = (folder / file).read_bytes()
            num_bytes = mailbox.deliver(content, file=file, run_id=folder.name)
        except MessageError as error:  # another try would not help; the run itself is whole
            log.warning("%s stays in %s: %s", file, folder, error)
            continue
        except MailboxError as error:
            raise MailboxError(
                f"{error}; the run is whole in {folder}, and the same command delivers it"
            ) from error
        add_delivery(summary, file, num_bytes)
    return True
