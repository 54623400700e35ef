"""Read settings from the command line and YAML files, and check them against a dataclass schema.

Every value stays the text its author wrote until the type of its option is known. That is how
`run_id=no` remains "no" and `run_id=1e5` remains "1e5", where YAML 1.1 makes False and 100000.0.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

REQUIRED = "???"  # the default of an option the user has to give; OmegaConf's own mark
_FLAGS = ("--config", "--print-config", "--help")
NONE_WORDS = ("null", "none", "~")  # no value, where an option may have none
_BOOLS = {"true": True, "yes": True, "on": True, "1": True}
_BOOLS |= {"false": False, "no": False, "off": False, "0": False}
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class ConfigError(ValueError):
    """A mistake in the user's settings, told in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@dataclass
class Part:
    """The options of one choice among several, such as `data=folder`; `name` is the choice."""

    name: str = REQUIRED


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    rule: tuple[Callable[[Any], bool], str] | None = None,
) -> Any:
    """Declare an option of a schema: its default, its help line and what its values must satisfy.

    Args:
        default: value when nothing is given; `REQUIRED` for an option without a default.
        help: one line, with the unit.
        choices: the only values allowed.
        minimum: smallest value allowed.
        maximum: largest value allowed.
        above: exclusive lower bound.
        below: exclusive upper bound.
        rule: a predicate on the value, and the words after "must be" for values it refuses.
    """
    bounds = {"at least": minimum, "above": above, "at most": maximum, "below": below}
    metadata = {"help": help, "choices": tuple(choices), "bounds": bounds, "rule": rule}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def part(*parts: type[Part]) -> Any:
    """Declare a group filled by one of several parts, the first by default."""
    by_name = {cls.name: cls for cls in parts}
    return dataclasses.field(default_factory=parts[0], metadata={"parts": by_name})


def nested(cls: type) -> Any:
    """Declare options that belong together within a part, as in `task.target.macs`."""
    return dataclasses.field(default_factory=cls, metadata={"nested": cls})


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One `key=value` as its author wrote it."""

    key: str
    value: str | list[str]
    where: str = ""  # "FILE line N: ", or nothing for the command line
    quoted: bool = False


@dataclass(frozen=True)
class CommandLine:
    """What the user typed after `python train.py`."""

    settings: tuple[Setting, ...] = ()
    config_file: str | None = None
    help: bool = False
    print_config: bool = False


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Sort the arguments into flags and `key=value` settings.

    Raises:
        ConfigError: on an unknown flag, a flag without its value, or a token without `=`.
    """
    if "--help" in argv or "-h" in argv:
        return CommandLine(help=True)
    settings: list[Setting] = []
    config_file: str | None = None
    print_config = False
    tokens = iter(argv)
    for token in tokens:
        key, equals, value = token.partition("=")
        if key == "--config":
            file = value if equals else next(tokens, "")
            if not file or (not equals and file.startswith("--")):
                raise ConfigError("--config needs a file: --config FILE")
            if config_file is not None:
                raise ConfigError(f"--config is given twice: {config_file} and {file}")
            config_file = file
        elif token == "--print-config":
            print_config = True
        elif token.startswith("-"):
            raise ConfigError(_unknown_flag(key, value, bool(equals)))
        elif not equals:
            raise ConfigError(f"{token!r} has no '=': write key=value, as in seed=1")
        elif not key.strip() or key != key.strip():
            raise ConfigError(f"{token!r} has no key before '=': write key=value, without spaces")
        elif not value.strip():
            raise ConfigError(f"{key} is empty: write {key}=VALUE")
        else:
            settings.append(Setting(key, value))
    return CommandLine(tuple(settings), config_file, print_config=print_config)


def _unknown_flag(flag: str, value: str, equals: bool) -> str:
    near = nearest(flag, _FLAGS)
    if not near and (equals or "." in flag):
        return f"{flag} is not a flag: write {flag.lstrip('-')}={value or 'VALUE'}, without dashes"
    flags = "the flags are --config FILE, --print-config, --help; options are written key=value"
    return f"unknown flag {flag}{near or '; ' + flags}"


def read_yaml(path: Path) -> list[Setting]:
    """Read the settings of a YAML file, flattened to dotted keys.

    Raises:
        ConfigError: if the file is missing, unreadable, or not a YAML mapping.
    """
    root = read_nodes(path)
    return [] if root is None else settings_in(root, path)


def read_nodes(path: Path) -> yaml.MappingNode | None:
    """Read a YAML file as nodes, which know their lines; None if it is empty.

    Raises:
        ConfigError: if the file is missing, unreadable, or not a YAML mapping.
    """
    try:
        # Nodes rather than values: they keep the text, the quotes and the line number.
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        siblings = sorted(f.name for f in path.parent.glob("*") if f.suffix in (".yaml", ".yml"))
        raise ConfigError(f"no config file {path}{nearest(path.name, siblings)}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file in UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path} line {line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{where_in(path, root)}expected lines like 'key: value'")
    return root


def settings_in(mapping: yaml.MappingNode, path: Path) -> list[Setting]:
    """Flatten a mapping of a YAML file to settings with dotted keys.

    Raises:
        ConfigError: if a key is given twice, or a value is neither text nor a flat list of texts.
    """
    settings = list(_flatten(mapping, "", path))
    seen: set[str] = set()
    for setting in settings:
        if setting.key in seen:
            raise ConfigError(f"{setting.where}{setting.key} is given twice")
        seen.add(setting.key)
    return settings


def where_in(path: Path, node: yaml.Node) -> str:
    """Return the place of a node as messages begin: "FILE line N: "."""
    return f"{path} line {node.start_mark.line + 1}: "


def _flatten(mapping: yaml.MappingNode, prefix: str, path: Path) -> Iterator[Setting]:
    for key_node, node in mapping.value:
        key, where = f"{prefix}{key_node.value}", where_in(path, key_node)
        if prefix.count(".") > 2:  # also ends a mapping that contains itself through an alias
            raise ConfigError(f"{where}{key} is nested too deep")
        if isinstance(node, yaml.MappingNode) and node.value:
            yield from _flatten(node, f"{key}.", path)
        elif isinstance(node, yaml.SequenceNode):
            yield Setting(key, _texts(node, where + key), where)
        elif isinstance(node, yaml.ScalarNode):
            yield Setting(key, node.value, where, quoted=node.style is not None)
        else:
            yield Setting(key, "", where)


def _texts(node: yaml.SequenceNode, label: str) -> list[str]:
    if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
        raise ConfigError(f"{label} must be a flat list, as in [a, b]")
    return [item.value for item in node.value]


# --- checking against the schema -----------------------------------------------------------------


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return "; did you mean X?" for the closest valid name, or nothing if none is close.

    >>> nearest("ecso", ["ecos", "random", "all"])
    '; did you mean ecos?'
    """
    close = difflib.get_close_matches(word.lower(), list(valid), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def nearest_key(key: str, valid: Iterable[str]) -> str:
    """Like `nearest`, for dotted keys whose group may be wrong or left out.

    >>> nearest_key("noise_std", ["privacy.noise_std", "privacy.delta"])
    '; did you mean privacy.noise_std?'
    """
    keys = list(valid)
    same = [full for full in keys if _name(full) == _name(key)]
    if same:  # the option is right, its group is wrong or left out
        close = difflib.get_close_matches(key, same, n=1) if "." in key else []
        return f"; did you mean {' or '.join(close or same)}?"
    if hint := nearest(key, keys):
        return hint
    close = difflib.get_close_matches(_name(key).lower(), {_name(full) for full in keys}, n=1)
    owners = [full for full in keys if _name(full) in close]
    return f"; did you mean {' or '.join(owners)}?" if owners else ""


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def fields_of(cls: type, prefix: str = "") -> dict[str, "dataclasses.Field[Any]"]:
    """Return the options of a dataclass by dotted key, without groups and without `name`."""
    found: dict[str, dataclasses.Field[Any]] = {}
    for f in dataclasses.fields(cls):
        if "help" in f.metadata:
            found[f"{prefix}{f.name}"] = f
        elif "nested" in f.metadata:
            found |= fields_of(f.metadata["nested"], f"{prefix}{f.name}.")
    return found


def types_of(cls: type, prefix: str = "") -> dict[str, Any]:
    """Return the types of the options that `fields_of` returns, by the same keys."""
    hints, found = typing.get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        if "help" in f.metadata:
            found[f"{prefix}{f.name}"] = hints[f.name]
        elif "nested" in f.metadata:
            found |= types_of(f.metadata["nested"], f"{prefix}{f.name}.")
    return found


def parts_of(field: "dataclasses.Field[Any]") -> dict[str, type[Part]]:
    """Return the parts a group can be filled with, by name; empty for a fixed group."""
    parts: dict[str, type[Part]] = field.metadata.get("parts", {})
    return parts


def groups_of(schema: type) -> dict[str, "dataclasses.Field[Any]"]:
    """Return the fields of the schema that hold options of their own, by name."""
    return {f.name: f for f in dataclasses.fields(schema) if "help" not in f.metadata}


class Resolver:
    """Decides which part fills each group, and which settings therefore hold.

    Args:
        schema: the root dataclass.
        layers: settings from the weakest source to the strongest; within one, the last wins.
    """

    def __init__(self, schema: type, layers: Sequence[Sequence[Setting]]):
        self._schema = schema
        self._layers = layers
        self._hints = typing.get_type_hints(schema)
        self._groups = groups_of(schema)
        self._chosen: dict[str, list[str]] = {  # group → the part in force after each layer
            group: self._choices(group, parts)
            for group, field in self._groups.items()
            if (parts := parts_of(field))
        }

    def instance(self) -> Any:
        """Return the schema with its defaults, each group filled by the part chosen."""
        chosen = {g: parts_of(self._groups[g])[names[-1]]() for g, names in self._chosen.items()}
        return self._schema(**chosen)

    def values(self) -> dict[str, tuple[Any, str]]:
        """Return key → (value of the right type, where it was written), in order of precedence.

        Raises:
            ConfigError: for a key that does not exist or a value of the wrong type.
        """
        options = self.options()
        values: dict[str, tuple[Any, str]] = {}
        for layer, settings in enumerate(self._layers):
            for setting in settings:
                key = setting.key
                if self._names_a_part(key) or self._belongs_to_replaced_part(key, layer):
                    continue
                if key in self._groups and setting.value == "" and setting.where:
                    continue  # `trainer:` whose lines are all commented out
                if key not in options:
                    raise ConfigError(f"{setting.where}{self._unknown(key, list(options))}")
                values[key] = convert(setting, options[key][1]), setting.where
        return values

    def options(self) -> dict[str, tuple["dataclasses.Field[Any]", Any]]:
        """Return key → (field, type) for every option of the schema and of the chosen parts."""
        options = {key: (field, self._hints[key]) for key, field in fields_of(self._schema).items()}
        for group in self._groups:
            cls = self._class_of(group)
            types = types_of(cls)
            for name, field in fields_of(cls).items():
                options[f"{group}.{name}"] = field, types[name]
        return options

    def _class_of(self, group: str, layer: int = -1) -> type:
        if group in self._chosen:
            return parts_of(self._groups[group])[self._chosen[group][layer]]
        cls: type = self._hints[group]
        return cls

    def _choices(self, group: str, parts: dict[str, type[Part]]) -> list[str]:
        name, names = next(iter(parts)), []
        for settings in self._layers:
            for setting in settings:
                if setting.key in (group, f"{group}.name") and setting.value != "":
                    if isinstance(setting.value, list):
                        raise ConfigError(f"{setting.where}{group} takes one value, not a list")
                    name = setting.value
                    if name not in parts:
                        hint = nearest(name, parts)
                        choices = ", ".join(parts)
                        raise ConfigError(
                            f"{setting.where}no {group}={name}{hint} (one of: {choices})"
                        )
            names.append(name)
        return names

    def _names_a_part(self, key: str) -> bool:
        return key.removesuffix(".name") in self._chosen

    def _belongs_to_replaced_part(self, key: str, layer: int) -> bool:
        # `data=mixed_digits` over an experiment with `data: {name: folder, pool: …}` drops pool.
        group, _, name = key.partition(".")
        names = self._chosen.get(group, [])
        replaced = bool(names) and names[layer] != names[-1]
        return replaced and name in fields_of(self._class_of(group, layer))

    def _unknown(self, key: str, valid: list[str]) -> str:
        group, _, name = key.partition(".")
        inside = ", ".join(k for k in valid if k.startswith(f"{group}."))
        if key in self._groups:
            return f"{key} is a group of options: set one of {inside}"
        parts = parts_of(self._groups[group]) if group in self._groups else {}
        owners = [f"{group}={part}" for part, cls in parts.items() if name in fields_of(cls)]
        if owners:
            chosen = self._chosen[group][-1]
            return f"{key} is an option of {' and '.join(owners)}, not of {group}={chosen}"
        candidates = valid if "." in key else [*valid, *self._chosen]
        listed = f"; {group} has {inside}" if inside else "; --help lists all"
        return f"no option {key}{nearest_key(key, candidates) or listed}"


def convert(setting: Setting, hint: Any) -> Any:
    """Turn the text of a setting into a value of the option's type.

    Raises:
        ConfigError: if the text does not read as that type.
    """
    text, kinds = setting.value, typing.get_args(hint) or (hint,)
    label = f"{setting.where}{setting.key}"
    if typing.get_origin(hint) is list:
        items = _read_list(text, label, setting.quoted)
        if int not in kinds:
            return items
        try:
            return [int(item) for item in items]
        except ValueError:
            raise ConfigError(
                f"{label} must be {type_in_words(hint)}, not {_short(text)}"
            ) from None
    if isinstance(text, list):
        raise ConfigError(f"{label} takes one value, not a list")
    if text == "":
        raise ConfigError(f"{label} is empty: give a value or leave the line out")
    if "${" in text:
        return text  # OmegaConf resolves it, then checks the type
    if types.NoneType in kinds and not setting.quoted and text.lower() in NONE_WORDS:
        return None
    if setting.quoted and str in kinds:
        return text
    for kind in (bool, int, float, str):
        if kind in kinds:
            try:
                return _BOOLS[text.lower()] if kind is bool else kind(text)
            except (KeyError, ValueError):
                continue
    raise ConfigError(f"{label} must be {type_in_words(hint)}, not {_short(text)}")


def _read_list(value: str | list[str], label: str, quoted: bool) -> list[str]:
    if isinstance(value, str) and value.startswith("[") and not quoted:
        try:
            node = yaml.compose(value, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            raise ConfigError(f"{label}: cannot read {_short(value)}; write [a,b]") from None
        value = _texts(node, label)
    items = [value] if isinstance(value, str) else value
    if "" in items:
        raise ConfigError(f"{label} has an empty item: write [a,b], or [] for none")
    return items


def type_in_words(hint: Any) -> str:
    """Return the type of an option as the user reads it, such as "a whole number or none"."""
    if typing.get_origin(hint) is list:
        return "a list of whole numbers" if typing.get_args(hint) == (int,) else "a list"
    kinds = typing.get_args(hint) or (hint,)
    if float in kinds:
        kinds = tuple(kind for kind in kinds if kind is not int)
    words = [_TYPE_NAMES[kind] for kind in kinds if kind in _TYPE_NAMES]
    return " or ".join(words + ["none"] * (types.NoneType in kinds))


def check(key: str, value: Any, field: "dataclasses.Field[Any]", where: str = "") -> None:
    """Refuse a value outside the choices or the range that its option declares.

    Raises:
        ConfigError: with what the option accepts.
    """
    metadata = field.metadata
    choices: tuple[str, ...] = metadata["choices"]
    if value is None:
        return
    if choices and value not in choices:
        hint, listed = nearest(str(value), choices), ", ".join(choices)
        raise ConfigError(f"{where}{key} cannot be {_short(value)}{hint} (one of: {listed})")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}{key} must be a finite number, not {value}")
    if isinstance(value, (int, float)) and not within(value, metadata["bounds"]):
        raise ConfigError(f"{where}{key} must be {bounds_in_words(field)}, not {value:g}")
    if metadata["rule"] and not metadata["rule"][0](value):
        raise ConfigError(f"{where}{key} must be {metadata['rule'][1]}, not {_short(value)}")


def within(value: float, bounds: dict[str, float | None]) -> bool:
    """Return whether a number lies in the range of an option."""
    low, high, above, below = (bounds[k] for k in ("at least", "at most", "above", "below"))
    return (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def bounds_in_words(field: "dataclasses.Field[Any]") -> str:
    """Return the range of an option as the user reads it, such as "above 0 and at most 1"."""
    bounds: dict[str, float | None] = field.metadata["bounds"]
    return " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
