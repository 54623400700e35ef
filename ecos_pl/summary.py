"""What a run came to: ``summary.json`` and the table at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ecos_pl.accounting import PrivacyStatement, epsilon_of
from ecos_pl.composition import composition
from ecos_pl.images import ImageSource
from ecos_pl.probe_result import ProbeResult
from ecos_pl.proxy_set import licence_summary

_NOTHING_RELEASED = {
    "epsilon": 0.0,
    "delta": None,
    "relation": "add/remove",
    "unit": "sample",
    "accountant": "PLD",
}
_STEPS = ("embed", "cluster", "ask", "select", "label")


def summarise(
    *,
    run_id: str,
    seed: int,
    probe: ProbeResult | None,
    rounds: Sequence[dict[str, Any]] = (),
    simulation: dict[str, float | None],
    seconds: dict[str, float | None],
    pool: ImageSource,
    client: Mapping[str, Any],
    environment: Mapping[str, Any],
    quality: Mapping[str, Any],
    class_accuracy: Mapping[str, float],
    model: dict[str, Any] | None = None,
    teacher: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Gather plain data for ``summary.json``.

    Args:
        run_id: Name of the run.
        seed: Of the run.
        probe: What the probe found; None where the client trained alone.
        rounds: Further rounds of labels: ``epoch, changed, label_accuracy, bytes_down``.
        simulation: ``purity``, ``random_purity``, ``label_accuracy``, ``test_accuracy``.
        seconds: ``probe, fit, test, per_step, total``. The steps of the probe are added: those
            of this run, so 0 where their results were on disk.
        pool: Its domains and classes, where it knows them, are counted among the chosen images.
        client: Who the simulated client is; empty for one elsewhere.
        environment: ``environment.environment_facts``.
        quality: ``{NAME: {"proxy_set": value, "random": value}}`` of public measures under
            ``quality`` and of those that only a benchmark knows under ``simulation``;
            empty where nobody measured.
        class_accuracy: On the test images, by class; empty where nobody looked.
        model: What is delivered: ``model_size.size_facts``.
        teacher: The same of a student's teacher, with its ``test_accuracy`` in a simulation.
    """
    steps = probe.seconds if probe is not None and not probe.from_disk else {}
    shown = ("purity", "random_purity", "label_accuracy", "test_accuracy")
    summary: dict[str, Any] = {
        "run_id": run_id,
        "seed": seed,
        "proxy": {"size": 0, "num_clusters": 0, "kept_clusters": 0},
        "privacy": {**_NOTHING_RELEASED, "spent_by_this_run": 0.0},
        "communication": {"bytes_down": 0, "bytes_up": 0, "round_trips": 0},
        "rounds": [dict(one) for one in rounds],
        "simulation": {name: _rounded(simulation.get(name), 6) for name in shown},
        "seconds": {
            **{step: steps.get(step, 0.0) for step in _STEPS},
            **{name: _rounded(value, 3) for name, value in seconds.items()},
        },
    }
    summary["environment"] = dict(environment)
    summary["quality"] = dict(quality.get("quality", {}))
    known = summary["simulation"]
    known["quality"] = dict(quality.get("simulation", {}))
    known |= {"class_accuracy": dict(class_accuracy)} if class_accuracy else {}
    known |= {"client": dict(client)} if client else {}
    for name, facts in (("model", model), ("teacher", teacher)):
        if facts is not None:
            summary[name] = dict(facts)
    if probe is not None:
        summary["proxy"] = {
            "size": len(probe.proxy_set),
            "num_labelled": int((probe.proxy_set.weights > 0).sum()),
            "num_clusters": len(probe.cluster_sizes),
            "kept_clusters": int(probe.selection.kept.sum()),
            "filled_up": probe.selection.num_filled_up,
            "duplicates": probe.selection.num_duplicates,
            "unreadable": probe.num_unreadable,
            "pools": probe.proxy_set.provenance["pools"],
            "fingerprint": probe.fingerprint,
            "from_disk": probe.from_disk,
        }
        summary["privacy"] = {**probe.privacy, "spent_by_this_run": probe.spent_now}
        summary["releases"] = [
            {**asdict(one), "epsilon": epsilon_of([one], probe.privacy["delta"])}
            for one in probe.releases
        ]
        summary["communication"] = dict(probe.communication)
        chosen = probe.indices.tolist()
        for key, names in (("chosen_domains", pool.domains), ("chosen_classes", pool.labels)):
            if (found := composition(names, chosen)) is not None:
                known[key] = found
    return summary


def add_delivery(summary: dict[str, Any], file: str, num_bytes: int) -> None:
    """Note a model that was left in the client's mailbox; its bytes count as sent."""
    summary.setdefault("delivered", {})[file] = num_bytes
    summary["communication"]["bytes_down"] += num_bytes


def _rounded(number: float | None, digits: int) -> float | None:
    return None if number is None else round(number, digits)


def _size_text(facts: dict[str, Any]) -> str:
    text = (
        f"{facts['backbone']} at {facts['image_size']} px: {facts['parameters'] / 1e6:.2f} M "
        f"parameters, {facts['size_mb']:.1f} MB, {facts['macs'] / 1e6:.1f} M multiply-adds, "
        f"{facts['latency_ms']:.2g} ms an image"
    )
    if facts.get("test_accuracy") is not None:
        text += f"; test accuracy* {facts['test_accuracy']:.4f}"
    return text


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """Print the run's table, at most 80 columns wide."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    proxy, privacy = summary["proxy"], dict(summary["privacy"])
    known, seconds = summary["simulation"], summary["seconds"]
    table = Table(box=SIMPLE_HEAD, show_header=False, title=summary["run_id"], title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    if proxy["size"]:
        table.add_row(
            "proxy set",
            f"{proxy['size']:,} images from {proxy['kept_clusters']} of "
            f"{proxy['num_clusters']} clusters"
            + (f" ({proxy['filled_up']} to fill up)" if proxy["filled_up"] else ""),
        )
        if known["purity"] is not None:
            table.add_row(
                "purity*", f"{known['purity']:.3f} (random: {known['random_purity']:.3f})"
            )
        distance = known["quality"].get("client_distance", {})
        if distance.get("proxy_set") is not None:
            table.add_row(
                "distance to client*",
                f"{distance['proxy_set']:.3f} (random: {distance['random']:.3f})",
            )
        if proxy["num_labelled"] < proxy["size"]:
            table.add_row("labels", f"{proxy['num_labelled']:,} of {proxy['size']:,} images")
        if known["label_accuracy"] is not None:
            table.add_row("label accuracy*", f"{known['label_accuracy']:.3f}")
        for number, one in enumerate(summary["rounds"], 1):
            known_now = one["label_accuracy"]
            right = "" if known_now is None else f", accuracy* {known_now:.3f}"
            table.add_row(
                f"label round {number}",
                f"before epoch {one['epoch']}: {one['changed']:.1%} of the labels changed{right}",
            )
        if proxy["duplicates"]:
            table.add_row("", f"{proxy['duplicates']:,} near-duplicates left out")
        table.add_row("licences", licence_summary(proxy["pools"]))
        spent = privacy.pop("spent_by_this_run")
        table.add_row("privacy", str(PrivacyStatement(**privacy)))
        if proxy["from_disk"]:
            table.add_row("", "the proxy set was on disk: this run asked and spent nothing")
        elif spent == 0:
            table.add_row("", "the client was not asked")
        sent = summary["communication"]
        table.add_row(
            "communication",
            f"{sent['bytes_down'] / 1000:,.1f} kB down, {sent['bytes_up'] / 1000:,.1f} kB up, "
            f"{sent['round_trips']} round trips",
        )
        for file, num_bytes in summary.get("delivered", {}).items():
            table.add_row(
                "delivered", f"{file} into the mailbox, {num_bytes / 1000:,.1f} kB of that"
            )
    else:
        table.add_row("trained on", "the client's own images, on the client's side")
    if known["test_accuracy"] is not None:
        table.add_row("test accuracy*", f"{known['test_accuracy']:.4f}")
    for name in ("model", "teacher"):
        if name in summary:
            table.add_row(name, _size_text(summary[name]))
    if "compression" in summary:
        for row in _compression_rows(summary["compression"]):
            table.add_row(*row)
    steps = ", ".join(f"{step} {seconds[step]:.1f}" for step in _STEPS if seconds[step])
    times = f"{steps}, " if steps else ""
    times += f"fit {seconds['fit'] or 0:.1f}, test {seconds['test'] or 0:.1f}"
    if seconds["per_step"]:
        times += f" ({seconds['per_step']:.3f} a step)"
    table.add_row("seconds", f"{times}; {seconds['total']:.1f} in all")
    table.add_row("files", str(folder))
    if (folder / "report.html").is_file():
        table.add_row("report", str(folder / "report.html"))
    console = Console(width=min(80, Console().width))
    console.print(table)
    console.print("  * simulation: measured with ground truth that only a benchmark has")


def _compression_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    before, after, target = found["teacher"], found["student"], found["target"]
    missed = target["value"] < target["reached"]
    if target["name"] == "sparsity":
        missed = target["value"] > target["reached"]
    rows = [
        (
            "size",
            f"{before['size_mb']:.2f} → {after['size_mb']:.2f} MB, "
            f"{found['size_ratio']:.1f}x smaller (int8 ONNX ÷ teacher's float32)",
        ),
        (
            "latency",
            f"{before['latency_ms']:.2f} → {after['latency_ms']:.2f} ms, "
            f"{found['latency_ratio']:.1f}x faster (one CPU thread)",
        ),
        (
            "target",
            f"{target['name']} {target['value']:g}: reached {target['reached']:.4g}"
            + (" (missed)" if missed else ""),
        ),
    ]
    if found["accuracy_drop"] is not None:
        rows.insert(
            0,
            (
                "int8 accuracy*",
                f"{after['accuracy']:.4f}, the teacher's {before['accuracy']:.4f} "
                f"(drop: {100 * found['accuracy_drop']:.2f} points)",
            ),
        )
    return rows
