"""Constants as people edit them, presets, flags that do not exist, absurd values, and what a start
prints."""

import copy
import json
import pickle
import re
import shutil
import subprocess
import sys

import pytest
from conftest import PROJECT

import config
from fastsae.runtime import artifacts
from fastsae.settings import declarations, resolving, rules, startup
from fastsae.settings.help_page import command_of
from fastsae.settings.suggestions import nearest
from fastsae.settings.values import SHOWN

STAGES = [PROJECT / name for name in config.STAGES]
FILES = [PROJECT / name for name in declarations.shipped() if (PROJECT / name).exists()]
STUDIES = [
    PROJECT / "experiments" / "studies" / name
    for name in declarations.shipped()
    if name not in declarations.CORE
]


@pytest.fixture
def project(tmp_path):
    """A copy of config.py and the scripts: `edit(file, old, new)` one line, `read(*flags)` the
    settings, as the pipeline does."""
    for path in FILES:
        shutil.copy(path, tmp_path / path.name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cognitive_actions.jsonl").touch()

    class Project:
        folder = tmp_path
        presets = config.PRESETS

        def edit(self, file, name, line):
            """Put `line` in the place of the line that declares a setting, comment included."""
            path = tmp_path / file
            text, found = re.subn(
                rf"^{name}: .*$", lambda _: line, path.read_text(), flags=re.MULTILINE
            )
            assert found == 1
            path.write_text(text)

        def add(self, file, text):
            (tmp_path / file).write_text((tmp_path / file).read_text() + text)

        def read(self, *flags, scripts=config.STAGES):
            return resolving.resolve(
                tmp_path, self.presets, [tmp_path / script for script in scripts], list(flags)
            )

    return Project()


@pytest.fixture
def refused(project, capsys):
    """What the project's settings are refused with: the lines on stderr."""

    def read(*flags, **more):
        with pytest.raises(SystemExit) as stop:
            project.read(*flags, **more)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == ""
        lines = err.splitlines()
        assert lines and all(re.match(r"error: \S.*: .*\. \S.*\.$", line) for line in lines), err
        return lines

    return read


def test_the_list_of_what_is_shipped_is_right():
    """Types and defaults, from which a constant without its annotation is read: as the files
    declare them."""
    paths = [*(PROJECT / name for name in declarations.CORE), *STUDIES]
    assert declarations.SHIPPED.read_text() == declarations.snapshot(
        paths, config.PRESETS["demo"]
    ), "run python -m experiments.pages.numbers"
    resolving_scripts = {
        path.name
        for path in (PROJECT / "experiments" / "studies").glob("*.py")
        if re.search(r"config\.resolve\(.*__file__", path.read_text())
    }
    assert {path.name for path in STUDIES} == resolving_scripts


@pytest.mark.parametrize(
    "file, name, line, expected",
    [
        ("config.py", "LAYER_IDX", "LAYER_IDX = 18", 18),
        ("config.py", "LAYER_IDX", "LAYER_IDX = 18  # deeper", 18),
        ("config.py", "MODEL_NAME", 'MODEL_NAME = "x"', "x"),
        ("config.py", "LABEL_FIELD", "LABEL_FIELD = None", None),
        ("config.py", "LABEL_FIELD", "LABEL_FIELD: None = None", None),
        ("config.py", "MAX_EXAMPLES", "MAX_EXAMPLES = 100; RUN_NAME = 'r'", 100),
        ("config.py", "QUIET", "QUIET = True", True),
        ("train_sae.py", "MATRYOSHKA_PREFIXES", "MATRYOSHKA_PREFIXES = [64, 256]", (64, 256)),
        ("extract_activations.py", "BATCH_TOKENS", "BATCH_TOKENS = 2 ** 12", 4096),
        ("train_sae.py", "M", "M = 512", 512),
        ("train_sae.py", "M", "M: 'int' = 512", 512),
        ("train_sae.py", "M", "M: Annotated[int, 'features'] = 4 * 128", 512),
        ("train_sae.py", "M", "M, N_EPOCHS = 512, 3", 512),
        ("train_sae.py", "M", "M = BATCH_SIZE = 1_024", 1024),
        ("train_sae.py", "LEARNING_RATE", "LEARNING_RATE = 1e-3", 1e-3),
        ("train_sae.py", "LEARNING_RATE", "LEARNING_RATE = 1", 1.0),
        ("interpret_sae.py", "LLM_TIMEOUT", "LLM_TIMEOUT = -(-3) / 2", 1.5),
        ("train_sae.py", "MAX_NORM_RATIO", "MAX_NORM_RATIO = None", None),
        ("extract_activations.py", "USE_CHAT_TEMPLATE", "USE_CHAT_TEMPLATE = False", False),
        ("train_sae.py", "MATRYOSHKA_PREFIXES", "MATRYOSHKA_PREFIXES = (8, 256)", (8, 256)),
        ("train_sae.py", "MATRYOSHKA_PREFIXES", "MATRYOSHKA_PREFIXES = [8, 256]", (8, 256)),
        ("train_sae.py", "MATRYOSHKA_PREFIXES", "MATRYOSHKA_PREFIXES = 8, 256", (8, 256)),
        ("train_sae.py", "EXPORT", "EXPORT = ('saelens',)", ("saelens",)),
        ("interpret_sae.py", "LLM_TIMEOUT", "LLM_TIMEOUT = 5", 5.0),
        ("interpret_sae.py", "TARGET_FIELD", "TARGET_FIELD = 'stars'", "stars"),
    ],
)
def test_a_constant_without_its_annotation_works(project, file, name, line, expected):
    project.edit(file, name, line)
    settings = project.read()
    assert settings.values[name] == expected and type(settings.values[name]) is type(expected)
    assert settings.source[name] == settings.owner[name] == file


def test_its_flag_still_has_the_type_that_was_declared(project):
    """None, and an int for a float, say nothing of what a flag may be given."""
    project.edit("train_sae.py", "MAX_NORM_RATIO", "MAX_NORM_RATIO = None")
    project.edit("train_sae.py", "LEARNING_RATE", "LEARNING_RATE = 1")
    project.edit("config.py", "LAYER_IDX", "LAYER_IDX = 3")
    project.edit("config.py", "MAX_EXAMPLES", "MAX_EXAMPLES = 100")
    settings = project.read(
        *("--max-norm-ratio", "5", "--learning-rate", "1e-3"),
        *("--layer-idx", "4,8", "--max-examples", "none"),
    )
    found = (settings.MAX_NORM_RATIO, settings.LEARNING_RATE, settings.LAYERS)
    assert found == (5.0, 1e-3, (4, 8)) and settings.MAX_EXAMPLES is None


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_a_setting_of_a_study_says_what_it_is(path):
    """A comment inside parentheses, where a formatter puts long ones, would not reach --help."""
    settings = config.read_settings(path)
    assert settings and not [name for name, each in settings.items() if len(each["comment"]) < 5]


def test_help_says_how_a_script_is_run():
    assert command_of(PROJECT / "train_sae.py", PROJECT) == "python train_sae.py"
    study = PROJECT / "experiments" / "studies" / "planted.py"
    assert command_of(study, PROJECT) == "python -m experiments.studies.planted"


def test_every_constant_of_every_file_may_lose_its_annotation(tmp_path):
    """All at once: the same values and types as with annotations."""
    paths = [*(PROJECT / name for name in ("config.py", *config.STAGES)), *STUDIES]
    for path in (PROJECT / "experiments" / "studies").glob(
        "*.py"
    ):  # which read each other's constants
        shutil.copy(path, tmp_path)
    for path in paths:
        known = declarations.shipped()[path.name]
        bare = re.sub(
            r"^([A-Z][A-Z0-9_]*): [^=#\n]+? = ", r"\1 = ", path.read_text(), flags=re.MULTILINE
        )
        (tmp_path / path.name).write_text(bare)
        with_types, without = config.read_settings(path), config.read_settings(tmp_path / path.name)
        assert {name: (each["value"], each["type"]) for name, each in without.items()} == {
            name: (each["value"], each["type"]) for name, each in with_types.items()
        }
        assert sum(each["annotation"] is None for each in without.values()) >= len(known) - 5


def test_the_last_assignment_counts_as_in_python(project):
    project.add("train_sae.py", "\nM = 1024\n")
    project.add("config.py", "\nLAYER_IDX = 18\n")
    settings = project.read()
    assert (settings.M, settings.LAYER_IDX) == (1024, 18)


@pytest.mark.parametrize(
    "file, text, name",
    [
        ("train_sae.py", "\nif True:\n    M = 512\n", "M"),
        ("config.py", "\nfor LAYER_IDX in (12, 18):\n    pass\n", "LAYER_IDX"),
        ("train_sae.py", "\nM *= 2\n", "M"),
        ("train_sae.py", "\ndel M\n", "M"),
        ("train_sae.py", "\n(M := 512)\n", "M"),
        ("train_sae.py", "\nimport math as M\n", "M"),
        ("train_sae.py", "\ndef M():\n    pass\n", "M"),
        ("train_sae.py", "\ndef f():\n    global M\n    M = 3\n", "M"),
        ("train_sae.py", "\n(M, *K) = 512, 8\n", "M"),
        ("train_sae.py", "\ntry:\n    M = 512\nexcept Exception as K:\n    pass\n", "K"),
        ("config.py", "\nwith open('x') as LABEL_FIELD:\n    pass\n", "LABEL_FIELD"),
    ],
)
def test_a_constant_that_is_set_where_nobody_reads_it(project, refused, file, text, name):
    project.add(file, text)
    assert any(
        line.startswith(f"error: {file}:") and f" {name} is set" in line for line in refused()
    )


def test_names_inside_functions_are_their_own(project):
    project.add(
        "train_sae.py",
        "\ndef f(rows):\n    M = 3\n    return [K for K in rows], M\n\n\n"
        "PAIRS = [K for K in (1, 2)]\nf(PAIRS)\n",
    )
    assert project.read().M == 256


@pytest.mark.parametrize(
    "file, name, line, expected",
    [
        (
            "train_sae.py",
            "M",
            "M = 'many'",
            "M: expected int, got 'many'. edit it in train_sae.py.",
        ),
        ("train_sae.py", "M", "M = None", "M: expected int, got None. edit it in train_sae.py."),
        (
            "train_sae.py",
            "M",
            "M = 512.0",
            "M: expected int, got 512.0. edit it in train_sae.py, for example 512.",
        ),
        (
            "train_sae.py",
            "MATRYOSHKA_PREFIXES",
            "MATRYOSHKA_PREFIXES = 256",
            "MATRYOSHKA_PREFIXES: expected auto or a tuple of int or none, got 256. "
            "edit it in train_sae.py, for example `(256,)`.",
        ),
        (
            "train_sae.py",
            "MATRYOSHKA_PREFIXES",
            "MATRYOSHKA_PREFIXES = 'on'",
            "MATRYOSHKA_PREFIXES: expected auto or a tuple of int or none, got 'on'. "
            "edit it in train_sae.py.",
        ),
        (
            "train_sae.py",
            "LEARNING_RATE",
            "LEARNING_RATE = 1e999",
            "LEARNING_RATE: expected a finite float or none, got inf. edit it in train_sae.py.",
        ),
        (
            "config.py",
            "MODEL_NAME",
            "MODEL_NAME = 5",
            "MODEL_NAME: expected str, got 5. edit it in config.py.",
        ),
        ("config.py", "QUIET", "QUIET = 1", "QUIET: expected bool, got 1. edit it in config.py."),
    ],
)
def test_a_value_of_another_type(project, refused, file, name, line, expected):
    project.edit(file, name, line)
    assert refused() == [f"error: {expected}"]


@pytest.mark.parametrize(
    "value",
    [
        "{[]: 1}",
        "len('ab')",
        "K * 2",
        "[8 for _ in 'ab']",
        "f'{8}'",
        "1 / 0",
        "2 ** 10 ** 9",
        "'a' * 3",
        "open('x')",
        "{8}",
        "...,",
        "lambda: 8",
    ],
)
def test_a_value_that_is_not_plain(project, refused, value):
    project.edit("train_sae.py", "M", f"M: int = {value}  # features")
    (line,) = refused()
    assert line.startswith(("error: train_sae.py:", "error: M: expected int, got"))


@pytest.mark.parametrize(
    "line, shown",
    [("", "M: int = 256"), ("# M: int = 512", "M: int = 256"), ("m = 512", "M: int = 256")],
)
def test_a_constant_that_is_gone(project, refused, line, shown):
    project.edit("train_sae.py", "M", line)
    assert f"error: train_sae.py: M is missing. write `{shown}` at its top." in refused()


def test_a_declaration_that_lost_its_value(project, refused):
    project.edit("train_sae.py", "M", "M: int")
    assert all("does not set M" in line for line in refused())


@pytest.mark.parametrize(
    "file, text, meant",
    [
        ("config.py", "LAYR_IDX = 18", "LAYER_IDX"),
        ("config.py", "LAYER_IDX_ = 18", "LAYER_IDX"),
        ("config.py", "LAYER: int = 18", "LAYER_IDX"),
        ("config.py", "MODEL = 'x'", "MODEL_NAME"),
        ("train_sae.py", "LEARNINGRATE = 1e-3", "LEARNING_RATE"),
        ("train_sae.py", "LR = 1e-3", "LEARNING_RATE"),
        ("train_sae.py", "EPOCHS: int = 3", "N_EPOCHS"),
        ("interpret_sae.py", "TIMEOUT = 3", "LLM_TIMEOUT"),
    ],
)
def test_a_constant_of_another_name(project, refused, file, text, meant):
    project.add(file, f"\n{text}\n")
    (line,) = refused()
    assert line.startswith(f"error: {file}:") and line.endswith(f"perhaps {meant} is meant.")


@pytest.mark.parametrize(
    "file, text, home",
    [
        ("config.py", "M = 512", "train_sae.py"),
        ("config.py", "M: int = 512", "train_sae.py"),
        ("train_sae.py", "LAYER_IDX = 18", "config.py"),
        ("run_pipeline.py", "LAYER_IDX = 18", "config.py"),
        ("config.py", "layer_idx = 18", "config.py"),
        ("train_sae.py", "TARGET_FIELD = 'stars'", "interpret_sae.py"),
    ],
)
def test_a_constant_in_another_file(project, refused, file, text, home):
    project.add(file, f"\n{text}\n")
    (line,) = refused()
    name = re.match(r"\w+", text)[0]
    assert line.startswith(f"error: {file}:") and line.endswith(
        f"{name} is not read as a setting. write {name.upper()} in {home}."
    )


def test_a_constant_of_the_code_is_left_alone(project):
    project.add("train_sae.py", "\nMOST_ROWS = 3\nprint(MOST_ROWS)\n")
    project.add("config.py", "\nFOR_OTHERS = 3\n")
    project.add("interpret_sae.py", "\nconfig.FOR_OTHERS\n")
    assert project.read().M == 256


def test_a_new_setting_that_the_code_reads(project):
    project.edit(
        "train_sae.py", "M", "NEW_THING: float = 2  # of a developer\nM: int = 256  # features"
    )
    project.add("train_sae.py", "\n\ndef use(settings):\n    return settings.NEW_THING\n")
    assert project.read("--new-thing", "3").NEW_THING == 3.0


@pytest.mark.parametrize(
    "text",
    [
        "M: int = 512 K",
        "M: int = (512",
        "  M: int = 512",
        "M: int = 5\0",
        "M: int = " + "(" * 400 + ")" * 400,
    ],
)
def test_a_slip_in_a_file_that_is_read(project, refused, text):
    project.edit("train_sae.py", "M", text)
    (line,) = refused()
    assert re.match(r"error: train_sae.py:\d+: ", line)


def test_a_file_that_is_not_utf_8(project, refused):
    path = project.folder / "train_sae.py"
    path.write_bytes(path.read_bytes() + b'\nNAME = "caf\xe9"\n')
    assert refused()[0].startswith("error: train_sae.py:")


PRESET = {
    "MODEL_NAME": "x",
    "LAYER_IDX": 3,
    "MAX_LENGTH": 9,
    "DATASET_PATH": "data/cognitive_actions.jsonl",
    "LABEL_FIELD": None,
}


@pytest.mark.parametrize(
    "preset, expected",
    [
        ({**PRESET, "PRESET": "demo"}, "PRESETS: 'demo' sets PRESET, which is what names it."),
        ({**PRESET, "M": "many"}, "M: expected int, got 'many'. edit it in PRESETS of config.py."),
        ({**PRESET, "K": 10_000}, "K: 10000 active features of only M=256."),
        (
            {**PRESET, "LAYR_IDX": 3},
            "PRESETS: 'demo' sets 'LAYR_IDX', which is not a setting. perhaps LAYER_IDX is meant.",
        ),
        ({**PRESET, 3: 4}, "PRESETS: 'demo' sets 3, which is not a setting. leave it out."),
        (
            {name: value for name, value in PRESET.items() if name != "LABEL_FIELD"},
            "PRESETS: 'demo' does not set LABEL_FIELD.",
        ),
        (
            {**PRESET, "LAYER_IDX": "twelve"},
            "LAYER_IDX: expected int or a tuple of int, got 'twelve'. "
            "edit it in PRESETS of config.py.",
        ),
        (
            {**PRESET, "LAYER_IDX": None},
            "LAYER_IDX: expected int or a tuple of int, got None. edit it in PRESETS of config.py.",
        ),
        (["M"], "PRESETS: expected a dict of dicts, {name: {SETTING: value}}."),
    ],
)
@pytest.mark.parametrize("scripts", [config.STAGES, config.STAGES[:1]])
def test_a_preset_that_cannot_be_obeyed(project, refused, preset, expected, scripts):
    project.presets = {"demo": preset}
    if scripts == config.STAGES[:1] and expected[0] in "MK":
        project.read(scripts=scripts)  # which has neither
        return
    (line,) = refused(scripts=scripts)
    assert line.startswith(f"error: {expected}")


def test_a_preset_may_set_what_every_preset_sets(project):
    """A constant that loses its value belongs to the presets from then on."""
    project.presets = {"demo": {**PRESET, "M": 1024}, "other": {**PRESET, "M": 2048}}
    project.edit("train_sae.py", "M", "M: int  # features")
    assert project.read().M == 1024 and project.read("--preset", "other").M == 2048
    # a stage that has no M is not in its way
    assert project.read(scripts=config.STAGES[:1]).LAYER_IDX == 3


def test_a_preset_wins_over_what_is_shipped_and_an_edit_over_the_preset(project):
    project.presets = {"demo": PRESET, "other": {**PRESET, "M": 2048, "STORAGE_DTYPE": "int8"}}
    other = ("--preset", "other")
    assert project.read().M == 256
    found = project.read(*other)
    assert (found.M, found.source["M"]) == (2048, "preset other")
    assert (found.STORAGE_DTYPE, found.K, found.source["K"]) == ("int8", 8, "train_sae.py")
    assert found.MATRYOSHKA_PREFIXES == (512, 2048)
    assert project.read(*other, "--m", "64").M == 64
    project.edit("train_sae.py", "M", "M: int = 1024")
    found = project.read(*other)
    assert (found.M, found.source["M"]) == (1024, "train_sae.py")


def test_a_value_in_the_file_wins_over_a_preset_that_may_set_it(project):
    project.edit("config.py", "LAYER_IDX", "LAYER_IDX = 18")
    assert project.read("--preset", "llama-3.1-8b", "--dataset-path", __file__).LAYER_IDX == 18


@pytest.mark.parametrize(
    "line",
    [
        "LAYER_IDX = l8",
        "LAYER_IDX: int = {[]: 1}",
        "LAYER_IDX: int = 1/0",
        "LAYER_IDX = 18 20",
        "  LAYER_IDX = 18",
        "LAYER_IDX: integer = 18",
    ],
)
def test_a_slip_in_config_is_a_line_whatever_is_started(project, line):
    """The file is a module that the scripts import, and Python meets the slip first."""
    (project.folder / "fastsae").symlink_to(PROJECT / "fastsae")
    project.edit("config.py", "LAYER_IDX", line)
    start = (
        f"import sys; sys.path.insert(0, {str(project.folder)!r}); "
        "from fastsae.settings import startup; "
        f"startup.FOLDERS = ({str(project.folder)!r},); startup.explain_slips(); import config"
    )
    done = subprocess.run(
        [sys.executable, "-c", start],
        capture_output=True,
        text=True,
        cwd=project.folder,
        timeout=60,
    )
    number = (project.folder / "config.py").read_text().split(line)[0].count("\n") + 1
    assert done.returncode == 2 and re.fullmatch(
        rf"error: config\.py:{number}: .*\. fix the line\.\n", done.stderr
    ), done.stderr


def test_other_errors_keep_their_traceback(tmp_path):
    """Of a library that is missing, or of code, more than a line is needed."""
    path = tmp_path / "config.py"
    path.write_text("import math\nmath.no_such_function()\n")
    try:
        exec(compile(path.read_text(), path, "exec"), {"__name__": "config"})
    except AttributeError as error:
        assert startup.place_of(error) is None


def test_settings_can_be_copied():
    settings = config.resolve(*STAGES, argv=["--m", "512"])
    for other in (
        copy.copy(settings),
        copy.deepcopy(settings),
        pickle.loads(pickle.dumps(settings)),
        settings.replace(),
    ):
        assert (
            other.values == settings.values
            and other.source == settings.source
            and other.owner == settings.owner
        )
        assert other.run_dir == settings.run_dir and other.describe() == settings.describe()
        with pytest.raises(AttributeError, match="--m"):
            other.M = 3
    assert settings.replace(M=8).M == 8 and settings.M == 512


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], (True, (64, 256), False)),
        (["--m", "512"], (True, (128, 512), False)),
        (["--m", "3", "--k", "1"], (True, (3,), False)),
        (["--m", "4", "--k", "1"], (True, (1, 4), False)),
        (["--m", "512", "--matryoshka-prefixes", "8,512"], (True, (8, 512), False)),
        (["--matryoshka-prefixes=none", "--m", "300"], (False, None, False)),
        (["--architecture", "jumprelu"], (False, None, False)),
        (["--architecture", "standard"], (False, None, False)),
        (["--architecture", "gated", "--m", "512"], (False, None, False)),
        (["--architecture", "batchtopk"], (True, (64, 256), True)),
        (["--architecture", "gated", "--matryoshka-prefixes=none"], (False, None, False)),
    ],
)
def test_what_follows_from_m_and_the_architecture(flags, expected):
    settings = config.resolve(*STAGES, argv=flags)
    assert (
        settings.USE_MATRYOSHKA,
        settings.MATRYOSHKA_PREFIXES,
        settings.USE_BATCH_TOPK,
    ) == expected


@pytest.mark.parametrize(
    "flags, name",
    [
        (["--architecture", "jumprelu", "--matryoshka-prefixes", "256"], "MATRYOSHKA_PREFIXES"),
        (["--architecture", "gated", "--matryoshka-prefixes", "64,256"], "MATRYOSHKA_PREFIXES"),
    ],
)
def test_what_contradicts_the_architecture(refused, flags, name):
    (line,) = refused(*flags)
    assert line.startswith(f"error: {name}: ")


@pytest.mark.parametrize(
    "flag, meant",
    [
        ("--layer", "--layer-idx"),
        ("--dataset", "--dataset-path"),
        ("--data", "--dataset-path"),
        ("--model", "--model-name"),
        ("--lr", "--learning-rate"),
        ("--epochs", "--n-epochs"),
        ("--prefixes", "--matryoshka-prefixes"),
        ("--batch", "--batch-size"),
        ("--Seed", "--seed"),
        ("--layer_idx", "--layer-idx"),
        ("-m", "--m"),
        ("--learningrate", "--learning-rate"),
        ("--lerning-rate", "--learning-rate"),
        ("--datset-path", "--dataset-path"),
        ("--matryoshka", "--matryoshka-prefixes"),
        ("--output", "--output-dir"),
        ("--label", "--label-field"),
        ("--top-neurons", "--n-top-neurons"),
        ("--archi", "--architecture"),
        ("--no-matryoshka", "--matryoshka-prefixes"),
        ("--context-length", "--max-length"),
        ("--num-epochs", "--n-epochs"),
        ("--timeout", "--llm-timeout"),
        ("--l1", "--sparsity-coefficient"),
        ("--n-features", "--m"),
        ("--prefixes", "--matryoshka-prefixes"),
    ],
)
def test_a_flag_that_does_not_exist(refused, flag, meant):
    (line,) = refused(flag, "3")
    first = re.search(r"perhaps (\S+?),? ", line)
    assert line.startswith(f"error: {flag}: no such setting. ") and first and first[1] == meant, (
        line
    )


def test_three_names_at_most_and_none_far_away(refused):
    assert len(nearest("n", ["n-epochs", "n-top-neurons", "m"])) <= 3
    (line,) = refused("--warmup", "3")
    assert line.count("--") <= 2 + 3
    assert refused("--zzzz") == ["error: --zzzz: no such setting. see --help-all for all of them."]


def test_a_flag_of_another_stage_says_whose_it_is(refused):
    (line,) = refused("--max-length", "9", "--m", "512", scripts=["extract_activations.py"])
    assert line.startswith(
        "error: --m: no such setting of extract_activations.py, but of train_sae.py. "
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--m", str(2**62), "--matryoshka-prefixes=none"],
        ["--dead-after-tokens", "9" * 22],
        ["--dedup-ngram", "100000000000"],
        ["--n-epochs", "9" * 30],
        ["--max-examples", "9" * 5000],
        ["--batch-tokens", "-" + "9" * 40],
        ["--seed", str(2**63 - 1)],
        ["--seed", f"1,{2**60}"],
        ["--k", f"1,{2**60}"],
        ["--sparsity-coefficient", "1e39"],
        ["--sparsity-coefficient", "1,1e39"],
        ["--learning-rate", "1e39"],
        ["--learning-rate", "1e-300"],
        ["--max-norm-ratio", "1e300"],
        ["--llm-timeout", "1e9"],
        ["--n-llm-workers", "100000"],
        ["--layer-idx", "9" * 40],
        ["--layer-idx", "12," + "9" * 40],
    ],
)
def test_absurd_values_are_refused_by_name(refused, flags):
    lines = refused(*flags)
    name = flags[0].strip("-").replace("-", "_").upper()
    assert any(line.startswith(f"error: {name}: ") for line in lines), lines
    assert max(map(len, lines)) < 250


def test_every_number_has_an_upper_bound():
    settings = config.resolve(*STAGES, argv=[])
    values = settings.values
    for name in settings.typed:
        kind = declarations.shipped()[settings.owner[name]][name]["type"]
        if "int" in kind or "float" in kind:
            huge = 10**19 if "int" in kind else 1e200
            problems = rules.check_values({**values, name: (huge,) if "tuple" in kind else huge})
            assert any(problem.startswith(f"{name}: ") for problem in problems), name


def described(*flags):
    lines = config.resolve(*STAGES, argv=list(flags)).describe().split("\n")
    assert 1 <= len(lines) <= 3 and all(
        len(line) <= 150 and line.isprintable() for line in lines
    ), lines
    return lines


def test_a_start_prints_what_differs_from_the_defaults():
    (line,) = described()
    assert line.startswith("settings: all at their defaults (")
    assert described("--k", "4")[0] == "settings: (flag) K=4"
    first = described("--m", "512", "--architecture", "batchtopk")[0]
    assert first == (
        "settings: (flag) ARCHITECTURE=batchtopk, M=512, (follows) MATRYOSHKA_PREFIXES=128,512"
    )
    first = "".join(
        described("--preset", "llama-3.1-8b", "--dataset-path", "tests/conftest.py")[:-1]
    )
    assert (
        "(flag) PRESET=llama-3.1-8b" in first
        and "(preset llama-3.1-8b) MODEL_NAME=meta-llama/Llama-3.1-8B-Instruct" in first
    )
    assert "LAYER_IDX" not in first  # both presets have 12


def test_a_start_names_what_was_edited(project):
    project.edit("train_sae.py", "M", "M = 512")
    project.edit("config.py", "LAYER_IDX", "LAYER_IDX = 18")
    text = project.read("--k", "4").describe()
    assert text.startswith(
        "settings: (flag) K=4, (config.py) LAYER_IDX=18, (train_sae.py) M=512, "
        "(follows) MATRYOSHKA_PREFIXES=128,512\n"
    )


def test_a_start_takes_three_lines_whatever_is_given(tmp_path):
    folder = tmp_path / ("x" * 200) / "y\x1b[31m\nsettings: forged"
    many = [
        "--k",
        "4",
        "--n-epochs",
        "3",
        "--batch-size",
        "64",
        "--learning-rate",
        "0.123456",
        "--lr-schedule",
        "cosine",
        "--seed",
        "7",
        "--max-examples",
        "40",
        "--use-tokens",
        "content",
        "--llm-protocol",
        "fast",
        "--n-hypotheses",
        "3",
        "--llm-timeout",
        "9",
        "--text-field",
        "a" * 90,
        "--label-field",
        "none",
        "--n-scored-features",
        "9",
        "--output-dir",
        str(folder),
        "--run-name",
        "r",
    ]
    lines = described(*many)
    assert len(lines) == 3
    n = int(re.search(r" and (\d+) more$", lines[1])[1])
    assert n + sum(line.count("=") for line in lines[:2]) == len(many) // 2


def test_show_is_silent_where_it_should_be(capsys, monkeypatch):
    config.resolve(*STAGES, argv=["--quiet"]).show()
    with monkeypatch.context() as started_by_the_pipeline:
        started_by_the_pipeline.setenv(SHOWN, "1")
        config.resolve(*STAGES, argv=[]).show()
    assert capsys.readouterr().out == ""
    config.resolve(*STAGES, argv=[]).show()
    assert capsys.readouterr().out.count("\n") == 1


def test_the_record_of_a_run_says_where_each_value_is_from(project, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-key")
    project.edit("train_sae.py", "M", "M = 512")
    flags = ["--k", "4,8", "--learning-rate", "0.0005", "--run-name", "sk-very-secret-key"]
    settings = project.read(*flags)
    artifacts.write_settings(tmp_path / "out" / "metrics.json", settings)
    text = (tmp_path / "out" / "metrics.settings.json").read_text()
    found = json.loads(text)
    assert set(found) == set(settings.typed)
    assert found["K"] == {"value": [4, 8], "from": "flag"}
    assert found["LEARNING_RATE"] == {"value": 0.0005, "from": "flag"}
    assert found["M"] == {"value": 512, "from": "train_sae.py"}
    assert found["MATRYOSHKA_PREFIXES"] == {"value": [128, 512], "from": "follows"}
    assert found["BATCH_SIZE"] == {"value": 512, "from": "default"}
    assert found["LAYER_IDX"] == {"value": 12, "from": "preset demo"}
    assert "very-secret" not in text and found["RUN_NAME"]["from"] == "flag"


@pytest.mark.parametrize("script", ["run_pipeline.py", *config.STAGES])
def test_every_script_explains_a_slip_before_it_imports_config(script):
    lines = (PROJECT / script).read_text().splitlines()
    guard = next(
        i for i, line in enumerate(lines) if line.startswith("    startup.explain_slips()")
    )
    assert lines.index('if __name__ == "__main__":') < guard < lines.index("import config")


@pytest.mark.parametrize(
    "flags, several",
    [
        (["--k", "8"], {}),
        (["--k", "4,8"], {"K_LIST": (4, 8)}),
        (["--k=8,"], {"K_LIST": (8,)}),
        (
            ["--sparsity-coefficient", "1,0.5", "--architecture", "gated"],
            {"SPARSITY_COEFFICIENT_LIST": (1, 0.5)},
        ),
        (["--seed", "3,4", "--layer-idx=7,"], {"SEEDS": (3, 4), "LAYERS": (7,)}),
    ],
)
def test_one_value_or_several(flags, several):
    """Results record the first under the setting's name; the stages are given all of them."""
    settings = config.resolve(*STAGES, argv=flags)
    for all_of_them, name in declarations.SEVERAL.items():
        assert settings.values[all_of_them] == several.get(all_of_them)
        one = settings.values[name]
        assert not isinstance(one, tuple) and one == several.get(all_of_them, (one,))[0]
    again = config.resolve(STAGES[1], argv=settings.flags_for("train_sae.py"))
    assert {n: again.values[n] for n in declarations.SEVERAL} == {
        n: settings.values[n] for n in declarations.SEVERAL
    }


def test_several_values_in_a_file(project):
    project.edit("train_sae.py", "K", "K = (4, 8)")
    settings = project.read()
    assert (settings.K, settings.K_LIST) == (4, (4, 8))
    assert settings.describe().startswith("settings: (train_sae.py) K=4,8\n")


@pytest.mark.parametrize("name", declarations.RENAMED)
def test_a_former_setting_is_refused_with_the_one_in_its_place(project, refused, name):
    now, example = declarations.RENAMED[name]
    flag = f"--{config.flag_name(name)}"
    (line,) = refused(f"{flag}=1")
    assert line.startswith(f"error: {flag}: not a setting any more. give --{config.flag_name(now)}")
    remedy = re.search(r"give (\S+)\.$", line)[1]
    more = ["--architecture", "standard"] if now == "SPARSITY_COEFFICIENT" else []
    assert project.read(remedy, *more).typed[now] == example
    if name.startswith("NO_"):  # the flag that switched it off
        return
    project.add("train_sae.py", f"\n{name} = {example!r}\n")
    (line,) = refused()
    assert line.endswith(f"write for example {now} = {example!r} in {declarations.home_of(now)}.")


@pytest.mark.parametrize("name", declarations.CONSTANTS)
def test_a_setting_that_became_a_constant_is_refused_with_its_file(project, refused, name):
    file = declarations.CONSTANTS[name]
    assert re.search(rf"\b{name}\b.* = ", (PROJECT / file).read_text())
    flag = f"--{config.flag_name(name)}"
    assert refused(flag, "1") == [
        f"error: {flag}: not a setting any more. edit the constant in {file}."
    ]
    project.add("train_sae.py", f"\n{name} = 1\n")
    (line,) = refused()
    assert re.fullmatch(
        rf"error: train_sae.py:\d+: {name} is not a setting any more. "
        rf"edit the constant in {file}.",
        line,
    )


def test_whatever_train_sae_declares_is_recorded_or_decides_nothing():
    """What decides an autoencoder is listed in the order in which results record it."""
    import train_sae
    from fastsae.training import objective

    free = {"LOGGER", "EXPORT", "INIT_FROM"}
    shared = {"BUFFER_TOKENS", "MAX_TRAIN_TOKENS"}  # of config.py
    # recorded under these names
    follows = {
        "MATRYOSHKA_PREFIXES": {"USE_MATRYOSHKA"},
        "ARCHITECTURE": {"USE_BATCH_TOPK"},
        "SPARSITY_COEFFICIENT": {"L1_COEFFICIENT", "L0_COEFFICIENT"},
        "WARMUP_STEPS": {"LR_WARMUP_STEPS", "SPARSITY_WARMUP_STEPS"},
        "USE_TOKENS": {"EXCLUDE_SHARED_PREFIX"},
    }
    only_so = {"SPARSITY_COEFFICIENT", "WARMUP_STEPS"}
    recorded = set(train_sae.DECISIVE) - set(objective.RECORDED) - set().union(*follows.values())
    assert set(follows) - only_so <= recorded
    assert recorded - shared | only_so == set(config.read_settings(STAGES[1])) - free
