"""What a client is willing to release: its own file, which no query can loosen."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ecos_pl.encoder import EncoderSpec
from ecos_pl.privacy import MAX_NOISE_STD, MIN_NOISE_STD, check_delta, check_sample_rate

ASK = "ask"


class PolicyError(ValueError):
    """The policy file cannot be used; the text is one line that names the file."""


@dataclass(frozen=True)
class ClientPolicy:
    """Limits on every answer; a query may ask for less, never for more.

    Attributes:
        max_epsilon: Limit on ε over everything ever released; None for none.
        delta: Of the (ε, δ) guarantee.
        min_noise_std: Least noise on a count, in images.
        min_noise_multiplier: Least noise ÷ sensitivity of any other release.
        max_sample_rate: Largest chance with which an image (or person) takes part in an answer.
        max_queries: Most answers ever; None for no limit beside ε.
        max_clusters: Most centroids (or points) that one query may hold.
        max_per_person: Most images of one person that are used; ε then holds per person. None
            protects each image on its own.
        confirm: Ask the person at the terminal before every answer.
        adapted_encoders: Answer queries for a trusted encoder whose backbone the cloud has trained
            further.
        encoder: The public encoder that the client trusts; None asks about each new one.
        fingerprint: What that encoder's fingerprint must be; None takes it as it is installed.
    """

    max_epsilon: float | None = None
    delta: float = 1e-5
    min_noise_std: float = 5.0
    min_noise_multiplier: float = 1.0
    max_sample_rate: float = 1.0
    max_queries: int | None = None
    max_clusters: int = 10_000
    max_per_person: int | None = None
    confirm: bool = False
    adapted_encoders: bool = True
    encoder: EncoderSpec | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        check_delta(self.delta)
        check_sample_rate(self.max_sample_rate)
        if self.max_epsilon is not None and not 0 < self.max_epsilon < math.inf:
            raise ValueError(f"max_epsilon must be finite and above zero, not {self.max_epsilon}")
        if not MIN_NOISE_STD <= self.min_noise_std <= MAX_NOISE_STD:
            raise ValueError(
                f"min_noise_std must be {MIN_NOISE_STD:g} or more, not {self.min_noise_std}"
            )
        if not 0 < self.min_noise_multiplier <= MAX_NOISE_STD:
            raise ValueError(
                f"min_noise_multiplier must be above zero, not {self.min_noise_multiplier}"
            )
        for name, least in (("max_queries", 1), ("max_clusters", 2), ("max_per_person", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, not {value}")


def write_policy(path: Path, policy: ClientPolicy) -> None:
    """Write a policy file with a comment on every line; an existing one is kept (PolicyError)."""
    encoder = policy.encoder
    text = _TEMPLATE.format(
        max_epsilon=_text(policy.max_epsilon),
        delta=_text(policy.delta),
        min_noise_std=_text(policy.min_noise_std),
        min_noise_multiplier=_text(policy.min_noise_multiplier),
        max_sample_rate=_text(policy.max_sample_rate),
        max_queries=_text(policy.max_queries),
        max_clusters=_text(policy.max_clusters),
        max_per_person=_text(policy.max_per_person),
        confirm=_text(policy.confirm),
        adapted_encoders=_text(policy.adapted_encoders),
        encoder=_text(encoder.name) if encoder else ASK,
        weights=_text(encoder.weights if encoder else "auto"),
        image_size=_text(encoder.image_size if encoder else None),
        fingerprint=_text(policy.fingerprint),
    )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write("\n".join(map(_aligned, text.splitlines())) + "\n")
    except FileExistsError:
        raise PolicyError(f"{path} exists; a policy is never overwritten") from None


def read_policy(path: Path) -> ClientPolicy:
    """Read a policy file, every name and type checked.

    Raises:
        PolicyError: It is missing, no YAML, or holds an unknown name, a wrong type or a value out
            of range; the text says which.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PolicyError(f"there is no policy at {path}: ecos-client init makes one") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PolicyError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    try:
        return _from_values(values)
    except ValueError as error:
        raise PolicyError(f"{path}: {error}") from error


def _from_values(values: Any) -> ClientPolicy:
    if not isinstance(values, dict):
        raise ValueError("it must be lines of the form name: value")
    known = {*_TYPES, *_ENCODER_TYPES}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"there is no setting {name!r}{hint}")
    if missing := sorted(known - set(values)):
        raise ValueError(f"the line for {missing[0]} is missing")
    read = {k: _typed(k, values[k], kind) for k, kind in {**_TYPES, **_ENCODER_TYPES}.items()}
    encoder = None
    if read["encoder"] != ASK:
        if read["image_size"] is None:
            raise ValueError("image_size must be given with an encoder")
        encoder = EncoderSpec(read["encoder"], read["weights"], read["image_size"])
    elif read["image_size"] is not None or read["fingerprint"] is not None:
        raise ValueError("encoder: ask goes with image_size: null and fingerprint: null")
    options = {field.name: read[field.name] for field in fields(ClientPolicy) if field.name in read}
    return ClientPolicy(**{**options, "encoder": encoder})


_TYPES = {
    "max_epsilon": "a number or null",
    "delta": "a number",
    "min_noise_std": "a number",
    "min_noise_multiplier": "a number",
    "max_sample_rate": "a number",
    "max_queries": "a whole number or null",
    "max_clusters": "a whole number",
    "max_per_person": "a whole number or null",
    "confirm": "true or false",
    "adapted_encoders": "true or false",
}
_ENCODER_TYPES = {
    "encoder": "a text",
    "weights": "a text",
    "image_size": "a whole number or null",
    "fingerprint": "a text or null",
}


def _typed(name: str, value: Any, kind: str) -> Any:
    if value is None and kind.endswith("or null"):
        return None
    wanted = kind.removesuffix(" or null")
    if wanted == "a number":
        if isinstance(value, str):  # YAML 1.1 reads 1e-5, without a point, as text
            try:
                value = float(value)
            except ValueError:
                value = None
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
        value = float(value) if right else value
    elif wanted == "a whole number":
        right = type(value) is int
    elif wanted == "a text":
        right = isinstance(value, str) and value != ""
    else:
        right = isinstance(value, bool)
    if not right:
        raise ValueError(f"{name} must be {kind}, not {value!r}")
    return value


def _aligned(line: str) -> str:
    setting, hash_sign, comment = line.partition("  #")
    return f"{setting:28}#{comment}" if hash_sign and setting else line


def _text(value: Any) -> str:
    if isinstance(value, float):
        return repr(int(value)) if value == int(value) else repr(value)
    return str(yaml.safe_dump(value)).removesuffix("\n...\n").strip()


_TEMPLATE = """\
# What this client is willing to release. No query can loosen it; change it here, by hand.
# The releases so far are in ledger.sqlite beside this file: they count for ever.

# --- the budget ---
max_epsilon: {max_epsilon}  # limit on epsilon over everything ever released (null: none)
delta: {delta}  # of the (epsilon, delta) guarantee; well below 1 / number of images
max_queries: {max_queries}  # answers at most, ever (null: as many as epsilon allows)

# --- every single answer ---
min_noise_std: {min_noise_std}  # least noise on a count, standard deviation in images
min_noise_multiplier: {min_noise_multiplier}  # least noise / sensitivity of any other release
max_sample_rate: {max_sample_rate}  # largest chance that an image takes part in an answer
max_clusters: {max_clusters}  # centroids, or points, that one query may ask about
confirm: {confirm}  # true: ask me at the terminal before every answer

# --- who is protected ---
# null: each image by itself. A number m: each person, of whom at most m images are used (the data
# must be a CSV with a person column); noise is m times as large, and epsilon holds per person.
max_per_person: {max_per_person}

# --- the public encoder that turns images into features ---
# Its fingerprint covers architecture, weights and image size; a query for another is refused.
# encoder: ask (with image_size and fingerprint null) asks me at the terminal about each new one.
encoder: {encoder}
weights: {weights}  # auto, pretrained, random, or a file
image_size: {image_size}  # in pixels
fingerprint: {fingerprint}
# A cloud that trains in rounds asks again with the same architecture, its weights trained further.
# Each such query is charged like any other, and no weights can make it reveal more than that.
adapted_encoders: {adapted_encoders}  # false: refuse them
"""
