"""``CARD.md``: what a compressed model is, where it comes from, how good it is, how to run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ecos_pl.accounting import PrivacyStatement
from ecos_pl.proxy_set import licence_summary

_RUN = """\
`model.int8.onnx` and `model.onnx` (any ONNX runtime; images uint8 [B, 3, {size}, {size}], RGB):

```python
import onnxruntime
session = onnxruntime.InferenceSession("model.int8.onnx")
scores = session.run(["scores"], {{"images": images}})[0]  # [B, {num_classes}] float32
```

`model.pt2` (PyTorch alone):

```python
import torch
model = torch.export.load("model.pt2").module()
scores = model(images)
```

`model.safetensors` (this project):

```python
from pathlib import Path
from ecos_pl.model_file import load_model
model = load_model(Path("model.safetensors"))
scores = model(images)
```

Pixels are normalised inside. Column k of the scores belongs to class k of: {classes}. Each file
also says so itself, as JSON under the key `ecos_pl` of its metadata.
"""


def card_text(
    summary: dict[str, Any], *, teacher: str, target: str, strategy: str, classes: Sequence[str]
) -> str:
    """The card of a run's compressed model, as Markdown.

    Args:
        summary: The run's, with ``compression``.
        teacher: Where the teacher came from.
        target: What was asked for.
        strategy: How the proxy set was chosen.
        classes: Names of the K classes.
    """
    found, proxy, privacy = summary["compression"], summary["proxy"], dict(summary["privacy"])
    before, after = found["teacher"], found["student"]
    privacy.pop("spent_by_this_run")
    lines = [f"# {summary['run_id']}", ""]
    lines += [
        f"A {after['backbone']} from the weights of `{teacher}`, pruned and quantised to 8 bits "
        f"for `{target}`.",
        "",
    ]
    if proxy["size"]:
        lines += [
            f"- Fine-tuned and calibrated on a proxy set of {proxy['size']:,} public images "
            f"(`selection.strategy={strategy}`, seed {summary['seed']}, fingerprint "
            f"`{proxy['fingerprint'][:16]}`; licences: {licence_summary(proxy['pools'])}).",
            f"- Privacy of the client: {PrivacyStatement(**privacy)}."
            if privacy["epsilon"] != 0
            else "- The client released nothing for it.",
        ]
    else:
        lines += ["- Fine-tuned and calibrated on the client's own images."]
    lines += [
        f"- Calibration: {found['quantisation'][0]['recipe']}.",
        "",
        "| | teacher (float32) | this model (int8) | |",
        "|---|---|---|---|",
        f"| parameters | {before['parameters']:,} | {after['parameters']:,} | "
        f"{before['parameters'] / after['parameters']:.1f}x fewer |",
        f"| multiply-adds | {before['macs']:,} | {after['macs']:,} | "
        f"{before['macs'] / max(1, after['macs']):.1f}x fewer |",
        f"| ONNX file | {before['size_mb']:.2f} MB | {after['size_mb']:.2f} MB | "
        f"{found['size_ratio']:.1f}x smaller |",
        f"| one image, one CPU thread | {before['latency_ms']:.2f} ms | "
        f"{after['latency_ms']:.2f} ms | {found['latency_ratio']:.1f}x faster |",
    ]
    if after["accuracy"] is not None and before["accuracy"] is not None:
        lines += [
            f"| accuracy on the simulated client's test images | {before['accuracy']:.4f} | "
            f"{after['accuracy']:.4f} | drop: {100 * found['accuracy_drop']:.2f} points |"
        ]
    lines += [
        "",
        "## Files",
        "",
        "Differences are from the trained model's scores, on proxy images held out of training.",
        "",
        "| file | MB | ms an image | largest difference | same class |",
        "|---|---|---|---|---|",
    ]
    for name, file in found["files"].items():
        time = "–" if file["latency_ms"] is None else f"{file['latency_ms']:.2f}"
        lines += [
            f"| `{name}` | {file['size_mb']:.2f} | {time} | {file['max_deviation']:.2g} | "
            f"{file['agreement']:.4f} |"
        ]
    lines += [
        "",
        _RUN.format(size=after["image_size"], num_classes=len(classes), classes=", ".join(classes)),
    ]
    return "\n".join(lines)
