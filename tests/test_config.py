import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecos_pl.config import (
    Config,
    CsvOptions,
    FolderOptions,
    MixedDigitsOptions,
    WandbOptions,
)
from ecos_pl.config_files import (
    load_config,
    to_dict,
    to_yaml,
)
from ecos_pl.config_help import help_text
from ecos_pl.overrides import (
    ConfigError,
    fields_of,
    groups_of,
    parse_command_line,
    parts_of,
)

FOLDER = ["data=folder", "data.pool=P", "data.client=C"]
SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PARTS = [
    ["data=mixed_digits"],
    ["data=mnist_fashion", "data.root=R"],
    ["data=digits5", "data.domains=[usps,mnist]", "data.allow_pickle=true"],
    ["data=domainnet10", "data.root=R", "data.allow_pickle=true"],
    ["data=domainnet", "data.root=R"],
    ["data=cifar10_imagenet32", "data.num_files=2", "data.rest=unused"],
    ["data=celeba_utkface", "data.target=Smiling", "data.tiny_imagenet=false"],
    [*FOLDER, "data.client_domain=mnist"],
    ["labels=client_prototypes", "labels.noise_multiplier=1e-5"],
    ["labels=client_table", "labels.noise_std=4.5", "labels.features=final"],
    ["labels=client_knn", "labels.max_answers=7"],
    ["labels=public", "labels.num_images=50"],
    ["labels=human", "labels.image_size=null", "labels.returned=x.csv"],
    ["labels=none"],
    ["client=simulated", "client.domain=usps", "client.classes=[0,1]", "client.imbalance=0.5"],
    ["client=mailbox", "client.url=s3://b/x", "client.deadline_hours=0.5"],
    ["task=self_labeling", "task.ema_decay=null", "task.augment=none"],
    ["task=distillation", "labels=none", "task.num_views=8", "task.compile=true"],
    ["task=compression", "task.teacher=T", "task.target.macs=2e7", "task.weights=W"],
    ["logger=csv"],
    ["logger=wandb", "logger.tags=[a,no]", "logger.entity=me"],
    ["logger=tensorboard", "callbacks.artifacts=false", "callbacks.map_method=umap"],
    ["logger=none"],
]


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    (tmp_path / "experiment").mkdir()
    return tmp_path


@pytest.fixture
def load(config_dir: Path) -> Callable[..., Config]:
    return lambda *argv: load_config(argv, config_dir=config_dir)


@pytest.fixture
def refusal(load: Callable[..., Config]) -> Callable[..., str]:
    def refusal(*argv: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(*argv)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refusal


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def every_option() -> Iterator[str]:
    yield from fields_of(Config)
    for group, field in groups_of(Config).items():
        classes = list(parts_of(field).values()) or [field.default_factory]
        for cls in classes:
            yield from fields_of(cls, f"{group}.")


def test_defaults_are_those_of_the_dataclasses(load):
    assert load() == Config()


def test_settings_are_typed(load):
    config = load("seed=7", "privacy.noise_std=3", "privacy.delta=1e-6", "trainer.deterministic=on")
    assert (config.seed, config.privacy.noise_std, config.privacy.delta) == (7, 3.0, 1e-6)
    assert type(config.privacy.noise_std) is float
    assert config.trainer.deterministic is True


@pytest.mark.parametrize(
    ("text", "value"), [("2", 2), ("-1", -1), ("auto", "auto"), ("0,1", "0,1"), ("0,", "0,")]
)
def test_devices_is_a_number_or_text(load, text, value):
    devices = load(f"trainer.devices={text}").trainer.devices
    assert (devices, type(devices)) == (value, type(value))


@pytest.mark.parametrize(("text", "value"), [("10", 10), ("1", 1), ("1.0", 1.0), ("1e-1", 0.1)])
def test_batch_limit_is_a_number_or_a_share(load, text, value):
    limit = load(f"trainer.limit_train_batches={text}").trainer.limit_train_batches
    assert (limit, type(limit)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "tags"),
    [("a", ["a"]), ("[a,b]", ["a", "b"]), ("['a b', no]", ["a b", "no"]), ("[]", [])],
)
def test_lists(load, text, tags):
    assert load("logger=wandb", f"logger.tags={text}").logger.tags == tags


@pytest.mark.parametrize("text", ["no", "yes", "on", "off", "1e5", "007", "1_0", "a: b", "[a", "'"])
def test_text_stays_as_written(load, config_dir, text):
    assert load(f"run_id={text}").run_id == text


@pytest.mark.parametrize("text", ["no", "yes", "on", "off", "1e5", "007", "2024-01-01"])
def test_text_in_yaml_stays_as_written(load, config_dir, text):
    file = write(config_dir / "f.yaml", f"run_id: {text}\n")
    assert load("--config", str(file)).run_id == text


@pytest.mark.parametrize("word", ["null", "none", "None"])
def test_none_only_where_optional(load, refusal, word):
    assert load("run_id=x", f"run_id={word}").run_id is None
    assert load(f"run_root={word}").run_root == word
    assert "seed must be a whole number" in refusal(f"seed={word}")


def test_quoted_null_is_text(load, config_dir):
    file = write(config_dir / "f.yaml", "run_id: 'null'\n")
    assert load("--config", str(file)).run_id == "null"


def test_last_of_two_wins(load):
    assert load("seed=2", "seed=3").seed == 3


def test_references_to_other_options_and_their_checks(load, refusal):
    assert load("run_id=seed${seed}", "seed=4").run_id == "seed4"
    assert refusal("run_id=${sede}") == "run_id: Interpolation key 'sede' not found"
    assert "selection.size must be at least 1" in refusal("selection.size=${seed}", "seed=0")
    assert refusal("run_id=${").startswith("run_id: ")
    assert refusal("run_id=${run_id}").startswith("run_id: ")


# --- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2], [2, 0, 1]])
def test_order_of_overrides_does_not_matter(load, order):
    assert load(*(FOLDER[i] for i in order)).data == FolderOptions(pool="P", client="C")


@pytest.mark.parametrize(
    "text",
    [
        "data: folder\ndata.pool: P\ndata.client: C\n",
        "data: {pool: P, name: folder, client: C}\n",
        "data:\n  client: C\n  pool: P\n  name: folder\n",
    ],
)
def test_a_part_in_yaml_is_a_name_or_a_mapping(load, config_dir, text):
    file = write(config_dir / "f.yaml", text)
    assert load("--config", str(file)).data == FolderOptions(pool="P", client="C")


def test_option_of_another_part(refusal):
    expected = "data.pool is an option of data=folder, not of data=mixed_digits"
    assert refusal("data.pool=x") == expected
    assert refusal("data.pool=x", "data=mixed_digits") == expected


def test_replacing_a_part_drops_the_options_it_had_below(load, refusal, config_dir):
    text = "data: {name: folder, pool: P, client: C}\nlogger: {name: wandb, tags: [a]}\n"
    write(config_dir / "experiment" / "mine.yaml", text)
    config = load("experiment=mine", "data=mixed_digits")
    assert config.data == MixedDigitsOptions()
    assert config.logger == WandbOptions(tags=["a"])
    # but not what is given beside the new choice
    assert "data.pool is an option of" in refusal(
        "experiment=mine", "data=mixed_digits", "data.pool=x"
    )
    # and options for a part that only the command line chooses are kept
    write(config_dir / "experiment" / "open.yaml", "data: {pool: P}\n")
    config = load("experiment=open", "data=folder", "data.client=C")
    assert config.data == FolderOptions(pool="P", client="C")


def test_required_options_are_named(refusal):
    line = refusal("data=folder", "client=mailbox")
    assert "data.pool" in line
    assert "client.url" in line
    line = refusal("data=folder", "client=mailbox", "data.pool=x")
    assert "client.url" in line
    assert "data.pool" not in line


# --- precedence ----------------------------------------------------------------------------------


def test_precedence(load, config_dir):
    write(
        config_dir / "experiment" / "mine.yaml",
        "# A comment\nseed: 2\nselection:\n  size: 20\nprivacy.noise_std: 20\n",
    )
    file = str(write(config_dir / "f.yaml", "selection: {size: 30}\nprivacy: {noise_std: 30}\n"))
    config = load("privacy.noise_std=40", "--config", file, "experiment=mine")
    assert (config.seed, config.selection.size, config.privacy.noise_std) == (2, 20 + 10, 40.0)
    assert config.selection.strategy == "ecos"
    assert config.experiment == "mine"
    assert load("experiment=mine", f"--config={file}", "privacy.noise_std=40") == config


def test_a_config_file_can_name_an_experiment(load, refusal, config_dir):
    write(config_dir / "experiment" / "mine.yaml", "seed: 2\n")
    file = str(write(config_dir / "f.yaml", "experiment: mine\n"))
    assert load("--config", file).seed == 2
    assert load("--config", file, "experiment=null").seed == 1
    write(config_dir / "experiment" / "mine.yaml", "experiment: other\n")
    assert "cannot start from another experiment" in refusal("--config", file)


def test_empty_files_and_groups_change_nothing(load, config_dir):
    file = write(config_dir / "f.yaml", "# nothing yet\n")
    assert load("--config", str(file)) == Config()
    write(file, "trainer:\n  # max_epochs: 2\ndata:\nprobe: {}\n")
    assert load("--config", str(file)) == Config()


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("selection.sise=3", "no option selection.sise; did you mean selection.size?"),
        ("selecton.size=3", "no option selecton.size; did you mean selection.size?"),
        ("noise_std=3", "no option noise_std; did you mean privacy.noise_std?"),
        ("selection.size.x=3", "no option selection.size.x; did you mean selection.size?"),
        ("encodr.batch_size=3", "did you mean encoder.batch_size?"),
        ("batch_size=3", "did you mean encoder.batch_size or task.batch_size?"),
        ("lables=public", "no option lables; did you mean labels?"),
        ("task.xq=1", "no option task.xq; task has task.backbone, "),
        ("zzz=1", "no option zzz; --help lists all"),
        ("selection=3", "selection is a group of options: set one of selection.strategy, "),
        ("labels=client_prototype", "did you mean client_prototypes?"),
        ("data=Folder", "no data=Folder; did you mean folder? (one of: mixed_digits, "),
        ("data.name=foldr", "no data=foldr; did you mean folder?"),
        ("selection.strategy=ecso", "'ecso'; did you mean ecos? (one of: ecos, random, "),
        ("trainer.precision=8", "(one of: 32-true, 16-mixed, "),
        ("seed=abc", "seed must be a whole number, not 'abc'"),
        ("seed=true", "seed must be a whole number, not 'true'"),
        ("seed=[1,2]", "seed must be a whole number, not '[1,2]'"),
        ("trainer.max_epochs=1.5", "trainer.max_epochs must be a whole number, not '1.5'"),
        ("privacy.delta=small", "privacy.delta must be a number, not 'small'"),
        ("privacy.delta=true", "privacy.delta must be a number, not 'true'"),
        ("probe.num_clusters=x", "probe.num_clusters must be a whole number or none, not 'x'"),
        ("trainer.deterministic=5", "trainer.deterministic must be true or false, not '5'"),
        ("trainer.limit_val_batches=x", "trainer.limit_val_batches must be a number, not 'x'"),
        ("seed=-1", "seed must be at least 0 and at most 4294967295, not -1"),
        ("privacy.noise_std=-1", "privacy.noise_std must be at least 0.5 and "),
        ("privacy.noise_std=nan", "privacy.noise_std must be a finite number, not nan"),
        ("privacy.noise_std=inf", "privacy.noise_std must be a finite number, not inf"),
        ("privacy.max_epsilon=inf", "privacy.max_epsilon must be a finite number, not inf"),
        ("privacy.sample_rate=0", "privacy.sample_rate must be above 0 and at most 1, not 0"),
        ("privacy.sample_rate=1.1", "privacy.sample_rate must be above 0 and at most 1, not 1.1"),
        ("privacy.delta=1", "privacy.delta must be above 0 and below 1, not 1"),
        ("selection.size=0", "selection.size must be at least 1, not 0"),
        ("task.val_fraction=0.5", "task.val_fraction must be at least 0 and below 0.5, not 0.5"),
        ("trainer.limit_val_batches=1.5", "must be a number of batches (10) or a share"),
        ("trainer.devices=0", "trainer.devices must be auto, a number of devices"),
        ("trainer.max_time=5h", "trainer.max_time must be a duration DD:HH:MM:SS, not '5h'"),
        ("seed", "'seed' has no '=': write key=value"),
        ("seed=", "seed is empty"),
        ("=3", "'=3' has no key before '='"),
        ("--a.b=c", "--a.b is not a flag: write a.b=c"),
        ("--seed=3", "--seed is not a flag: write seed=3"),
        ("--fast", "unknown flag --fast; the flags are --config FILE, --print-config, --help"),
        ("--print-confg", "unknown flag --print-confg; did you mean --print-config?"),
        ("--config", "--config needs a file"),
        ("--config=", "--config needs a file"),
    ],
)
def test_refusals_on_the_command_line(refusal, token, expected):
    assert expected in refusal(token)


def test_lists_refused(refusal):
    assert "logger.tags: cannot read '[a'" in refusal("logger=wandb", "logger.tags=[a")
    assert "logger.tags must be a flat list" in refusal("logger=wandb", "logger.tags=[a,[b]]")
    assert "logger.tags has an empty item" in refusal("logger=wandb", "logger.tags=['']")


def test_unknown_experiment(refusal, config_dir):
    assert "there are: none in" in refusal("experiment=mine")
    for name in ("mixed_digits", "photos"):
        write(config_dir / "experiment" / f"{name}.yaml", "seed: 2\n")
    line = refusal("experiment=mixed_digit")
    assert "'mixed_digit'; did you mean mixed_digits? (there are: mixed_digits, photos)" in line
    assert "no experiment '../f'" in refusal("experiment=../f")


def test_missing_config_file(refusal, config_dir):
    write(config_dir / "mine.yaml", "seed: 2\n")
    line = refusal("--config", str(config_dir / "mien.yaml"))
    assert line.startswith("no config file ")
    assert line.endswith("mien.yaml; did you mean mine.yaml?")
    assert "did you mean" not in refusal("--config", str(config_dir / "zzz.yml"))
    assert "cannot read" in refusal("--config", str(config_dir))
    assert "given twice" in refusal("--config", "a.yaml", "--config", "b.yaml")
    assert "needs a file" in refusal("--config", "--print-config")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nselection: {size: 3\nrun_id: x\n", "line 3: not valid YAML: "),
        ("seed: 1\n\tprobe: 2\n", "line 2: not valid YAML: "),
        ("seed=3\n", "line 1: expected lines like 'key: value'"),
        ("- seed\n", "line 1: expected lines like 'key: value'"),
        ("seed: 2\nselection:\n  sise: 3\n", "line 3: no option selection.sise; did you mean"),
        ("seed: 2\nlabels: publik\n", "line 2: no labels=publik; did you mean public?"),
        ("labels: [public]\n", "line 1: labels takes one value, not a list"),
        ("seed: abc\n", "line 1: seed must be a whole number, not 'abc'"),
        ("seed: 2.0\n", "line 1: seed must be a whole number, not '2.0'"),
        ("seed: [2]\n", "line 1: seed takes one value, not a list"),
        ("seed:\n", "line 1: seed is empty"),
        ("run_id: ''\n", "line 1: run_id is empty"),
        ("seed: {a: 1}\n", "line 1: no option seed.a; did you mean seed?"),
        ("seed: 2\nseed: 3\n", "line 2: seed is given twice"),
        ("\nprivacy: {noise_std: .nan}\n", "line 2: privacy.noise_std must be a number"),
        ("\nprivacy: {noise_std: 0.1}\n", "line 2: privacy.noise_std must be at least 0.5"),
        ("privacy: &a {b: *a}\n", "line 1: privacy.b.b"),
        ("data: {pool: x}\n", "line 1: data.pool is an option of data=folder"),
    ],
)
def test_refusals_in_yaml(refusal, config_dir, text, expected):
    file = write(config_dir / "f.yaml", text)
    line = refusal("--config", str(file))
    assert line.startswith(f"{file} ")
    assert expected in line
    write(config_dir / "experiment" / "mine.yaml", text)
    assert f"mine.yaml {expected}" in refusal("experiment=mine")


def test_file_that_is_not_text(refusal, config_dir):
    (config_dir / "f.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert "is not a text file" in refusal("--config", str(config_dir / "f.yaml"))
    (config_dir / "f.yaml").write_bytes(b"seed: \x00\n")
    assert "not valid YAML" in refusal("--config", str(config_dir / "f.yaml"))


@SETTINGS
@given(key=st.sampled_from([*every_option(), "x", "data", "logger.name"]), text=st.text())
def test_any_value_is_taken_or_refused_in_one_line(config_dir, key, text):
    line = ""
    try:
        load_config([f"{key}={text}"], config_dir=config_dir)
    except ConfigError as error:
        line = str(error)
    assert len(line.splitlines()) <= 1


# --- command line --------------------------------------------------------------------------------


def test_flags():
    command_line = parse_command_line(["seed=1", "--print-config", "run_id=a=b"])
    assert command_line.print_config
    assert not command_line.help
    assert [(s.key, s.value) for s in command_line.settings] == [("seed", "1"), ("run_id", "a=b")]
    assert parse_command_line(["--config", "f.yaml"]).config_file == "f.yaml"
    assert parse_command_line(["--config=f.yaml"]).config_file == "f.yaml"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_given_whatever_else_is_wrong(flag):
    assert parse_command_line(["seed", "--fast", flag]).help


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", PARTS, ids=" ".join)
def test_yaml_round_trip(load, config_dir, argv):
    config = load(*argv, "seed=3", "trainer.devices=2", "privacy.delta=3e-7")
    assert config != Config()
    file = write(config_dir / "f.yaml", to_yaml(config))
    assert load("--config", str(file)) == config


def test_every_part_is_in_the_round_trip():
    groups = {group: set(parts_of(field)) for group, field in groups_of(Config).items()}
    covered = {argv[0] for argv in PARTS}
    assert covered == {f"{group}={name}" for group, names in groups.items() for name in names}


def test_round_trip_keeps_the_experiment(load, config_dir):
    write(config_dir / "experiment" / "mine.yaml", "seed: 2\nlogger: wandb\n")
    config = load("experiment=mine", "logger=none", "seed=5")
    file = write(config_dir / "f.yaml", to_yaml(config))
    assert load("--config", str(file)) == config


WORDS = st.sampled_from(["none", "NULL", "nUll", "~", "no", "1", "1.0", r"\${seed}", "${x}", "?"])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | WORDS


@SETTINGS
@given(
    text=TEXT,
    tags=st.lists(TEXT),
    number=st.floats(0, 1, exclude_min=True, exclude_max=True),
    share=st.integers(0, 9) | st.floats(0, 1),
    devices=st.integers(1, 9) | st.just("2"),
)
def test_any_config_round_trips(config_dir, text, tags, number, share, devices):
    config = Config(run_id=text, run_root=text, logger=WandbOptions(project=text, tags=tags))
    config.privacy.delta = number
    config.trainer.limit_train_batches = share
    config.trainer.devices = devices
    file = write(config_dir / "f.yaml", to_yaml(config))
    again = load_config(["--config", str(file)], config_dir=config_dir)
    assert again == config
    assert type(again.trainer.limit_train_batches) is type(share)
    assert type(again.trainer.devices) is type(devices)


@pytest.mark.parametrize("argv", PARTS, ids=" ".join)
def test_to_dict_is_plain(load, argv):
    plain = to_dict(load(*argv))

    def walk(value: Any) -> None:
        assert type(value) in (dict, list, str, int, float, bool, type(None))
        for inner in value.values() if isinstance(value, dict) else ():
            walk(inner)
        for inner in value if isinstance(value, list) else ():
            walk(inner)

    walk(plain)
    assert json.loads(json.dumps(plain)) == plain
    group, _, name = argv[0].partition("=")
    assert plain[group]["name"] == name


def test_configs_do_not_share_lists(load):
    load("logger=wandb").logger.tags.append("x")
    assert load("logger=wandb").logger.tags == []
    assert load().logger == CsvOptions()


# --- help ----------------------------------------------------------------------------------------


def test_help_mentions_every_option(config_dir):
    text = help_text(config_dir)
    described = {line.split()[0].partition("=")[0] for line in text.splitlines() if line.strip()}
    options = list(every_option())
    assert len(options) > 60
    assert [key for key in options if key not in described] == []
    for group, field in groups_of(Config).items():
        for name in parts_of(field):
            assert f"\n{group}={name}" in text


def test_help_shows_default_type_range_and_meaning(config_dir):
    text = help_text(config_dir)
    assert "  selection.size=1500  (a whole number, at least 1)\n" in text
    assert "      images in the proxy set; ignored by all\n" in text
    assert "  selection.strategy=ecos  (ecos | random | all | oracle | " in text
    assert "  data.pool required  (text)\n" in text
    assert "  trainer.deterministic=false  (true or false)\n" in text


def test_help_fits_80_columns_and_lists_experiments(config_dir):
    folder = config_dir / "experiment"
    write(folder / "mine.yaml", "\n# Digits on one GPU\n# more\nseed: 1\n")
    write(folder / "long.yaml", f"# {'many words ' * 20}\n")
    write(folder / "bare.yaml", "seed: 1\n")
    lines = help_text(config_dir).splitlines()
    assert "  mine: Digits on one GPU" in lines
    assert "  bare" in lines
    assert max(map(len, lines)) <= 80


def test_every_option_has_a_help_line_and_a_default_it_accepts():
    for cls in (Config, *(type(getattr(Config(), group)) for group in groups_of(Config))):
        for field in fields_of(cls).values():
            assert field.metadata["help"]
            default = field.default
            assert not isinstance(default, float) or math.isfinite(default)
            choices = field.metadata["choices"]
            assert not choices or default is None or default in choices
        declared = [f.name for f in dataclasses.fields(cls) if f.name != "name"]
        described = [*fields_of(cls), *groups_of(cls)]
        assert [name for name in declared if name not in described] == []


def test_import_is_light():
    code = "import sys, ecos_pl.config_files; print([m for m in sys.modules if '.' not in m])"
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert "'omegaconf'" in result.stdout
    for heavy in ("torch", "lightning", "numpy", "wandb", "timm"):
        assert f"'{heavy}'" not in result.stdout
