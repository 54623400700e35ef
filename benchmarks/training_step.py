"""What the Trainer and our callbacks add to a training step: python benchmarks/training_step.py

The same arithmetic on the same preloaded batches (model, loss, AdamW, learning-rate cycle, averaged
weights), once as ``train.py`` runs it and once as a bare PyTorch loop. Both take turns, and the
medians over all steps are compared, so that what else this machine does counts for both.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from callbacks.run_timer import RunTimer
from callbacks.stop_and_resume import StopAndResume
from callbacks.training_curves import TrainingCurves
from callbacks.weight_averaging import WarmupWeightAveraging
from ecos_pl.classifier import Classifier
from ecos_pl.losses import soft_cross_entropy
from ecos_pl.modules.optimization import one_cycle
from ecos_pl.modules.self_labeling import SelfLabelingModule

CLASSES = [str(number) for number in range(10)]
WARM_UP = 3
DECAY = 0.99


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="in each turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    batches = [
        (
            torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            torch.rand(options.batch_size, len(CLASSES), generator=generator).softmax(1),
            torch.rand(options.batch_size, generator=generator),
        )
        for _ in range(options.steps + WARM_UP)
    ]
    print(f"{options.backbone}, {shape}, {options.device}, {torch.get_num_threads()} threads")
    print(f"{'averaged weights':18}{'bare loop':>12}{'train.py':>12}{'ratio':>8}   seconds a step")
    for averaged in (False, True):
        bare: list[float] = []
        ours: list[float] = []
        for _ in range(options.turns):
            bare += bare_loop(options, batches, averaged)
            ours += trainer_loop(options, batches, averaged)
        ratio = median(ours) / median(bare)
        name = "yes" if averaged else "no"
        print(f"{name:18}{median(bare):12.4f}{median(ours):12.4f}{ratio:8.3f}", flush=True)


def new_module(options: argparse.Namespace) -> SelfLabelingModule:
    model = Classifier.create(
        CLASSES, backbone=options.backbone, weights="random", image_size=options.image_size
    )
    return SelfLabelingModule(model)


def bare_loop(options: argparse.Namespace, batches: list[Any], averaged: bool) -> list[float]:
    module = new_module(options).to(options.device).train()
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: one_cycle(len(batches), step)
    )
    average = None
    if averaged:
        average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    seconds = []
    for batch in batches:
        start = perf_counter()
        images, targets, weights = (part.to(options.device) for part in batch)
        optimizer.zero_grad()
        loss = soft_cross_entropy(module(images), targets, weights, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        schedule.step()
        if average is not None:
            average.update_parameters(module)
        wait(options)
        seconds.append(perf_counter() - start)
    return seconds[WARM_UP:]


class Clock(L.Callback):
    """Seconds from the end of one step to the end of the next; the last of the callbacks."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.ends = options, list[float]()

    @override
    def on_train_batch_start(self, *args: Any) -> None:
        if not self.ends:
            self.ends.append(perf_counter())

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        wait(self.options)
        self.ends.append(perf_counter())


class Batches(torch.utils.data.IterableDataset[Any]):
    """The preloaded batches; ``train.py``'s own loader would measure the reading of images."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def trainer_loop(options: argparse.Namespace, batches: list[Any], averaged: bool) -> list[float]:
    clock = Clock(options)
    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[L.Callback] = [RunTimer(), TrainingCurves()]
        if averaged:
            callbacks.append(WarmupWeightAveraging(DECAY))
        callbacks += [StopAndResume(Path(folder) / "stopped.ckpt"), clock]
        trainer = L.Trainer(
            default_root_dir=folder,
            accelerator=torch.device(options.device).type,
            devices=1,
            max_epochs=1,
            logger=CSVLogger(folder),
            log_every_n_steps=10,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        loader = torch.utils.data.DataLoader(Batches(batches), batch_size=None)
        trainer.fit(new_module(options), loader)
    seconds = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    return seconds[WARM_UP:]


def wait(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main()
