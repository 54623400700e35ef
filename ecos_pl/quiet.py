"""What the terminal does not need to show."""

from __future__ import annotations

import logging
import warnings


def keep_quiet() -> None:
    """Keep the terminal for what concerns the user."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).propagate = False  # it has a handler of its own
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*callbacks used to create the checkpoint need to be provided.*",  # some may be off now
        ".*using the WeightAveraging callback, but loading.*outside the 'fit' stage.*",
        ".*You defined a `validation_step` but have no `val_dataloader`.*",  # of a teacher
        ".*srun.*command is available.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*module\\(s\\) in eval mode at the start of training.*",  # frozen ones are
        ".*ended before the epoch ended and your dataloader is not resumable.*",  # ours is
    ):
        warnings.filterwarnings("ignore", message)
