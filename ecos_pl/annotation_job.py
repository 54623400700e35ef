"""An annotation job: a folder with everything that people need to label images of a proxy set."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from ecos_pl.annotation_order import annotation_order
from ecos_pl.annotator_votes import other_word
from ecos_pl.images import ImageSource, UnreadableImage
from ecos_pl.label_studio import IMAGE_ID, label_config
from ecos_pl.probe_result import ProbeResult
from ecos_pl.progress import progress_bar
from ecos_pl.storage import committed_folder, fingerprint_of, read_json, write_bytes, write_json

log = logging.getLogger(__name__)

COLUMNS = ("job", "batch", "cluster", IMAGE_ID, "image", "label")


@dataclass(frozen=True)
class JobTerms:
    """What the user decides about an annotation job.

    Attributes:
        num_images: Images that people label; None for the whole proxy set.
        batch_size: Images that are labelled in one go.
        annotators: People who label each image, for the price.
        price_per_label: Of one answer about one image, in the user's currency.
        image_size: Longest side of the images that annotators see, in pixels; larger ones are
            shrunk to it. None leaves all as they are.
    """

    num_images: int | None = None
    batch_size: int = 50
    annotators: int = 1
    price_per_label: float = 0.05
    image_size: int | None = 1024


@dataclass(frozen=True)
class AnnotationJob:
    """Images to label, in batches.

    Attributes:
        name: Tells it from every other job: by probe, images, and their order.
        result: The probe's.
        rows: [N], places of the images in the proxy set, in the order in which to label them.
        terms: See `JobTerms`.
    """

    name: str
    result: ProbeResult
    rows: Sequence[int]
    terms: JobTerms

    @classmethod
    def plan(cls, result: ProbeResult, terms: JobTerms, *, seed: int) -> AnnotationJob:
        """The job for a proxy set; the same every time."""
        rows = annotation_order(
            result.proxy_set.clusters,
            num_images=terms.num_images,
            batch_size=terms.batch_size,
            seed=seed,
        ).tolist()
        facts = {"probe": result.fingerprint, "rows": rows, "batch_size": terms.batch_size}
        return cls(f"job-{fingerprint_of(facts)[:12]}", result, rows, terms)

    @property
    def other(self) -> str:
        """What annotators choose where no class fits."""
        return other_word(self.result.proxy_set.classes)

    @property
    def num_batches(self) -> int:
        """The last batch may be smaller than the others."""
        return -(-len(self.rows) // self.terms.batch_size)

    @property
    def price(self) -> float:
        """Estimate, in the user's currency."""
        return len(self.rows) * self.terms.annotators * self.terms.price_per_label

    def price_in_words(self) -> str:
        """How the estimate comes about.

        >>> AnnotationJob("", None, range(1500), JobTerms(annotators=3)).price_in_words()
        '1,500 images × 3 annotators × 0.05 = 225.00 (in your currency)'
        """
        people = f"{self.terms.annotators} annotator{'s' if self.terms.annotators > 1 else ''}"
        return (
            f"{len(self.rows):,} images × {people} × {self.terms.price_per_label:g} = "
            f"{self.price:,.2f} (in your currency)"
        )

    def write(self, folder: Path, pool: ImageSource) -> None:
        """Write the folder, whole or not at all; one that is there is left as it is.

        Args:
            folder: The job's; annotators' answers are put into it.
            pool: Where the images are.

        Raises:
            ValueError: There is a folder already, of another job or none.
        """
        if folder.exists():
            self._check(folder)
            return
        with committed_folder(folder) as aside:
            entries = self._write_images(aside, pool)
            write_bytes(aside / "labels.csv", _table(entries))
            prefix = f"/data/local-files/?d={quote(folder.name)}/"
            tasks = [{"data": {**entry, "image": prefix + entry["image"]}} for entry in entries]
            write_json(aside / "tasks.json", tasks)
            classes = self.result.proxy_set.classes
            write_bytes(aside / "label_config.xml", label_config(classes, self.other).encode())
            write_bytes(aside / "README.md", self._readme(folder.name).encode())
            write_json(aside / "job.json", self._facts(len(entries)))

    def _check(self, folder: Path) -> None:
        about = folder / "job.json"
        found = read_json(about).get("job") if about.is_file() else None
        if found != self.name:
            what = f"another annotation job ({found})" if found else "no annotation job"
            raise ValueError(f"{folder} holds {what}; choose another run_id, or move it away")

    def _write_images(self, folder: Path, pool: ImageSource) -> list[dict[str, Any]]:
        """Write the images and return what the tables say of each; they tell no label or class."""
        proxy_set, entries = self.result.proxy_set, []
        with progress_bar("writing images to label", len(self.rows), "images") as advance:
            for order, row in enumerate(self.rows):
                batch = order // self.terms.batch_size + 1
                name = f"images/batch_{batch:04d}/{order + 1:06d}.png"
                try:
                    image = pool.read(int(self.result.indices[row]))
                except UnreadableImage as error:
                    log.warning("left out of the annotation job: %s", error)
                    continue
                write_bytes(folder / name, _png(image, self.terms.image_size))
                entries.append(
                    {
                        "image": name,
                        IMAGE_ID: proxy_set.ids[row],
                        "cluster": int(proxy_set.clusters[row]),
                        "batch": batch,
                        "order": order + 1,
                        "job": self.name,
                    }
                )
                advance(1)
        return entries

    def _facts(self, num_images: int) -> dict[str, Any]:
        proxy_set = self.result.proxy_set
        return {
            "job": self.name,
            "probe_fingerprint": self.result.fingerprint,
            "num_images": num_images,
            "num_batches": self.num_batches,
            "batch_size": self.terms.batch_size,
            "classes": list(proxy_set.classes),
            "other": self.other,
            "annotators": self.terms.annotators,
            "price_per_label": self.terms.price_per_label,
            "price_estimate": round(self.price, 2),
        }

    def _readme(self, folder_name: str) -> str:
        return _README.format(
            name=self.name,
            num_images=len(self.rows),
            num_batches=self.num_batches,
            classes=", ".join(self.result.proxy_set.classes),
            other=self.other,
            price=self.price_in_words(),
            folder=folder_name,
        )


def _png(image: Image.Image, longest: int | None) -> bytes:
    if longest is not None and max(image.size) > longest:
        image = image.copy()
        image.thumbnail((longest, longest), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def _table(entries: Sequence[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore", restval="")
    writer.writeheader()
    writer.writerows(entries)
    return text.getvalue().encode()


_README = """\
# Label these images

{num_images:,} images in {num_batches:,} batches ({name}); the classes: {classes}.
An image that shows none of them is `{other}`.

Price estimate: {price}.

The batches are in the order of their use: after any of them, the images labelled so far are in
proportion to the whole. Within a batch, similar images stand together. Stop whenever you like.

## With a table

Look at `images/`, and write a class into the column `label` of `labels.csv`; empty means not
labelled yet. Several annotators: give each a copy of `labels.csv` (`labels_ann.csv`,
`labels_ben.csv`, …) and put the copies here, or add a column `annotator` and a row an answer.

## With Label Studio

```
pip install label-studio
export LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true
export LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT="$(dirname "$PWD")"    # called in this folder
label-studio start
```

1. Create a project; under Settings › Labeling Interface › Code put in `label_config.xml`.
2. Settings › Cloud Storage › Add Source Storage › Local files: the absolute path of this folder's
   `images`. Save it without synchronising; it lets Label Studio show the images.
3. Import `tasks.json`, and label, in the order of the tasks.
4. Export as JSON, JSON-MIN or CSV, and put the file into this folder. Keep the folder's name,
   `{folder}`, which is part of the images' addresses.

## Then

The same `python train.py …` as before goes on with the labels that are here.
"""
