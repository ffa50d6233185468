"""The rules of the settings: precedence, the forms of flags, refusals, help; and the shape of the
source tree."""

import importlib.util
import re
import sys

import pytest
from conftest import PROJECT
from source_tree import circles, floors, imports, module_graph, packages_of, python_files

import config
from fastsae.settings import kinds
from fastsae.settings.limits import Limits, limits_of, problems_with
from fastsae.settings.resolving import PATH_SETTINGS

STAGES = [PROJECT / name for name in config.STAGES]
SCRIPTS = ["run_pipeline.py", *config.STAGES]
DECLARED = {
    name: setting
    for path in (PROJECT / "config.py", *STAGES)
    for name, setting in config.read_settings(path).items()
}
SOURCES = python_files(".", "fastsae", "experiments")
TYPED = """A: int = 1  # one
B: float = 0.5  # two
C: bool = False  # three
D: str = "x"  # four
E: tuple[int, ...] = (1, 2)  # five
F: int | None = 3  # six
G: float | None = None  # seven
H: str | None = "s"  # eight
"""


@pytest.fixture
def edited(tmp_path):
    """Import a copy of config.py, in tmp_path, in which the declarations of the given names have
    the given values."""

    def load(**values):
        text = (PROJECT / "config.py").read_text()
        for name, value in values.items():
            text, found = re.subn(
                rf"^({name}: [^=#\n]+?) *(=[^#\n]*)?#",
                rf"\1 = {value!r}  #",
                text,
                flags=re.MULTILINE,
            )
            assert found == 1
        (tmp_path / "config.py").write_text(text)
        spec = importlib.util.spec_from_file_location("edited_config", tmp_path / "config.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def stage(tmp_path):
    """A script with settings of its own, by default one of each type; returns its path."""

    def write(text=TYPED):
        (tmp_path / "stage.py").write_text(text)
        return tmp_path / "stage.py"

    return write


@pytest.fixture
def refused(capsys):
    """Resolve the flags, expect exit code 2; returns the lines on stderr, less their "error: "."""

    def resolve(*argv, scripts=STAGES):
        with pytest.raises(SystemExit) as stop:
            config.resolve(*scripts, argv=list(argv))
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == ""
        assert all(line.startswith("error: ") for line in err.splitlines())
        return [line.removeprefix("error: ") for line in err.splitlines()]

    return resolve


def names(lines):
    return sorted(line.partition(": ")[0] for line in lines)


def test_preset_then_file_then_flag(edited):
    plain = edited()
    assert (plain.resolve(argv=[]).MAX_LENGTH, plain.resolve(argv=[]).source["MAX_LENGTH"]) == (
        512,
        "preset demo",
    )
    other = plain.resolve(argv=["--preset", "llama-3.1-8b"])
    assert (other.MAX_LENGTH, other.source["MAX_LENGTH"]) == (8192, "preset llama-3.1-8b")
    written = edited(MAX_LENGTH=99)
    for flags in ([], ["--preset", "llama-3.1-8b"]):
        settings = written.resolve(argv=flags)
        assert (settings.MAX_LENGTH, settings.source["MAX_LENGTH"]) == (99, "config.py")
    settings = written.resolve(argv=["--max-length", "7"])
    assert (settings.MAX_LENGTH, settings.source["MAX_LENGTH"]) == (7, "flag")
    settings = edited(PRESET="llama-3.1-8b").resolve(argv=[])
    assert (settings.MODEL_NAME, settings.LABEL_FIELD) == ("meta-llama/Llama-3.1-8B-Instruct", None)


def test_flag_beats_the_script_and_the_last_flag_counts(stage):
    script = stage()
    assert config.resolve(script, argv=[]).A == 1
    assert config.resolve(script, argv=[]).source["A"] == "stage.py"
    assert config.resolve(script, argv=["--a", "5", "--a", "6"]).A == 6


def test_a_stage_file_is_read_and_not_run(stage):
    assert config.resolve(stage(TYPED + "raise RuntimeError\n"), argv=[]).A == 1


@pytest.mark.parametrize(
    "flags, name, value",
    [
        (["--a", "8"], "A", 8),
        (["--a=8"], "A", 8),
        (["--a", "-8"], "A", -8),
        (["--b", "1e-3"], "B", 0.001),
        (["--b", "2"], "B", 2.0),
        (["--b=-0.5"], "B", -0.5),
        (["--c"], "C", True),
        (["--no-c"], "C", False),
        (["--c", "--no-c"], "C", False),
        (["--d", "two words"], "D", "two words"),
        (["--d=-x=y"], "D", "-x=y"),
        (["--d", "none"], "D", "none"),
        (["--d="], "D", ""),
        (["--e", "64,256"], "E", (64, 256)),
        (["--e=7"], "E", (7,)),
        (["--e", "1, 2,3"], "E", (1, 2, 3)),
        (["--f", "none"], "F", None),
        (["--f", "None"], "F", None),
        (["--f", "4"], "F", 4),
        (["--g", "0.25"], "G", 0.25),
        (["--g=none"], "G", None),
        (["--h", "none"], "H", None),
        (["--h", "t"], "H", "t"),
    ],
)
def test_flag_forms(stage, flags, name, value):
    settings = config.resolve(stage(), argv=flags)
    assert settings.values[name] == value and type(settings.values[name]) is type(value)
    assert settings.source[name] == "flag"


@pytest.mark.parametrize(
    "flags",
    [
        ["--a=-3", "--b=1e-300", "--c", "--d=a b,c=d", "--e=5", "--f=none", "--g=-2.5", "--h=none"],
        [
            "--a=0",
            "--b=0.1",
            "--no-c",
            "--d=-x",
            "--e=1,2,3",
            "--f=9",
            "--g=none",
            '--h=it\'s "quoted"\n\u2028',
        ],
        ["--d=", "--h=\u00e9\u4e2d"],
    ],
)
def test_flags_for_gives_back_the_flags(stage, flags):
    script = stage()
    settings = config.resolve(script, argv=flags)
    assert settings.flags_for("stage.py") == flags
    assert config.parse_flags(
        config.read_settings(script), settings.flags_for("stage.py"), "stage.py"
    )[0] == {
        name: settings.typed[name] for name in settings.typed if settings.source[name] == "flag"
    }
    assert settings.flags_for("other.py") == []


def test_flags_reach_the_stages_that_know_them(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = config.resolve(
        *STAGES,
        argv=[
            "--k",
            "4",
            "--layer-idx",
            "3",
            "--batch-tokens",
            "64",
            "--llm-protocol",
            "fast",
            "--output-dir",
            "o",
        ],
    )
    shared = [f"--output-dir={tmp_path / 'o'}", "--layer-idx=3"]
    assert settings.flags_for("extract_activations.py") == [*shared, "--batch-tokens=64"]
    assert settings.flags_for("train_sae.py") == [*shared, "--k=4"]
    assert settings.flags_for("interpret_sae.py") == [*shared, "--llm-protocol=fast"]


@pytest.mark.parametrize(
    "flags, name",
    [
        (["--m", "8.5"], "M"),
        (["--m="], "M"),
        (["--learning-rate", "fast"], "LEARNING_RATE"),
        (["--max-examples", "some"], "MAX_EXAMPLES"),
        (["--matryoshka-prefixes", "64,,256"], "MATRYOSHKA_PREFIXES"),
        (["--matryoshka-prefixes", "64;256"], "MATRYOSHKA_PREFIXES"),
        (["--patience", "none"], "PATIENCE"),
        (["--learning-rate", "nan"], "LEARNING_RATE"),
        (["--learning-rate", "inf"], "LEARNING_RATE"),
        (["--llm-timeout=-inf"], "LLM_TIMEOUT"),
        (["--max-norm-ratio", "inf"], "MAX_NORM_RATIO"),
        (["--k", "257"], "K"),
        (["--k", "0"], "K"),
        (["--aux-k", "257"], "AUX_K"),
        (["--matryoshka-prefixes", "64,128"], "MATRYOSHKA_PREFIXES"),
        (["--matryoshka-prefixes", "64,64,256"], "MATRYOSHKA_PREFIXES"),
        (["--matryoshka-prefixes", "256,64"], "MATRYOSHKA_PREFIXES"),
        (["--matryoshka-prefixes", "0,256"], "MATRYOSHKA_PREFIXES"),
        (["--matryoshka-prefixes=-4,256"], "MATRYOSHKA_PREFIXES"),
        (["--output-dir="], "OUTPUT_DIR"),
        (["--select-dtype", "bfloat16", "--architecture", "batchtopk"], "SELECT_DTYPE"),
        (["--device", "tpu"], "DEVICE"),
        (["--device", "cuda:"], "DEVICE"),
        (["--dtype", "float64"], "DTYPE"),
        (["--storage-dtype", "bfloat16"], "STORAGE_DTYPE"),
        (["--llm-protocol", "sum"], "LLM_PROTOCOL"),
        (["--layer-idx", "0"], "LAYER_IDX"),
        (["--max-length", "1"], "MAX_LENGTH"),
        (["--max-examples", "1"], "MAX_EXAMPLES"),
        (["--seed", "-1"], "SEED"),
        (["--batch-size", "1"], "BATCH_SIZE"),
        (["--patience", "0"], "PATIENCE"),
        (["--learning-rate", "0"], "LEARNING_RATE"),
        (["--sparsity-coefficient", "-1"], "SPARSITY_COEFFICIENT"),
        (["--max-norm-ratio", "1"], "MAX_NORM_RATIO"),
        (["--validation-fraction", "0"], "VALIDATION_FRACTION"),
        (["--validation-fraction", "1"], "VALIDATION_FRACTION"),
        (["--dataset-path", "nowhere.jsonl"], "DATASET_PATH"),
        (["--dataset-path", "/"], "DATASET_PATH"),
        (["--dataset-path", "~nobody-of-this-name/x.jsonl"], "DATASET_PATH"),
        (["--dataset-path", 300 * "a"], "DATASET_PATH"),
        (["--run-name", ".."], "RUN_NAME"),
        (["--run-name", "a/b"], "RUN_NAME"),
        (["--run-name="], "RUN_NAME"),
        (["--preset", "large"], "PRESET"),
        (["--layer-ids", "12"], "--layer-ids"),
        (["--layer-idx", "0,3"], "LAYER_IDX"),
        (["--layer-idx", "3,3"], "LAYER_IDX"),
        (["--block-length", "1"], "BLOCK_LENGTH"),
        (["--dedup-ngram", "-1"], "DEDUP_NGRAM"),
        (["--layer", "12"], "--layer"),
        (["stray"], "stray"),
        (["--quiet=true"], "command line"),
        (["--m"], "M"),
        (["--learning-rate", "-1e-3"], "LEARNING_RATE"),
    ],
)
def test_one_bad_flag_is_one_line(refused, flags, name):
    (line,) = refused(*flags)
    assert line.startswith(f"{name}: ")
    assert re.search(r"\. \S.*\.$", line), "what is wrong, then what to do"


@pytest.mark.parametrize("seed", [2**64, 10**30])
def test_a_seed_that_torch_refuses(refused, seed):
    assert names(refused("--seed", str(seed))) == ["SEED"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--k", "256"],
        ["--matryoshka-prefixes=none", "--m", "300"],
        ["--m", "512", "--matryoshka-prefixes", "128,512"],
        ["--matryoshka-prefixes", "256"],
        ["--matryoshka-prefixes", "1,256"],
        ["--device", "cuda:1"],
        ["--device", "mps"],
        ["--max-norm-ratio", "none"],
        ["--sparsity-coefficient", "none"],
        ["--aux-k", "0"],
        ["--aux-k", "256"],
        ["--max-examples", "2"],
        ["--batch-size", "2"],
        ["--layer-idx", "1"],
        ["--run-name", "a-1.b=2_c+"],
    ],
)
def test_possible_settings_pass(flags):
    assert "flag" in config.resolve(*STAGES, argv=flags).source.values()


def test_the_remedy_for_prefixes_works(refused):
    prefixes = ["--matryoshka-prefixes", "64,256"]
    assert refused("--m", "512", *prefixes) == [
        "MATRYOSHKA_PREFIXES: the last of (64, 256) is not M=512. give for example "
        "128,512, or auto for these two."
    ]
    assert config.resolve(
        *STAGES, argv=["--m", "512", "--matryoshka-prefixes", "auto"]
    ).MATRYOSHKA_PREFIXES == (128, 512)


@pytest.mark.parametrize(
    "flags, expected",
    [
        (
            [
                "--k",
                "999",
                "--device",
                "tpu",
                "--dtype",
                "f8",
                "--learning-rate",
                "x",
                "--bogus",
                "1",
                "--dataset-path",
                "nowhere",
                "--preset",
                "p",
            ],
            ["--bogus", "DATASET_PATH", "DEVICE", "DTYPE", "K", "LEARNING_RATE", "PRESET"],
        ),
        (
            ["--learning-rate", "nan", "--k", "999", "--device", "tpu"],
            ["DEVICE", "K", "LEARNING_RATE"],
        ),
    ],
    ids=["types and values", "nan"],
)
def test_all_problems_at_once(refused, flags, expected):
    assert names(refused(*flags)) == expected


def test_a_value_from_a_flag_is_not_to_be_mended_in_a_file(refused):
    (line,) = refused("--learning-rate", "nan")
    assert "train_sae.py" not in line


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A: int = 8.5  # c\n", ["A: expected int, got 8.5. edit it in stage.py."]),
        ("A: int = True  # c\n", ["A: expected int, got True. edit it in stage.py."]),
        ("A: int = None  # c\n", ["A: expected int, got None. edit it in stage.py."]),
        (
            "A: int = 1e4  # c\n",
            ["A: expected int, got 10000.0. edit it in stage.py, for example 10000."],
        ),
        (
            "A: tuple[int, ...] = (64)  # c\n",
            ["A: expected a tuple of int, got 64. edit it in stage.py, for example `(64,)`."],
        ),
        (
            "A: tuple[int, ...] = (64, 1.5)  # c\nB: str = 3  # c\n",
            [
                "A: expected a tuple of int, got (64, 1.5). edit it in stage.py.",
                "B: expected str, got 3. edit it in stage.py.",
            ],
        ),
    ],
)
def test_wrong_types_in_a_file(refused, stage, text, expected):
    assert refused(scripts=[stage(text)]) == expected


def test_a_value_that_is_no_constant(refused, stage):
    (line,) = refused(scripts=[stage("A: int = 1  # c\nB: int = len('12')  # c\n")])
    assert line.startswith("stage.py:2: ")


@pytest.mark.parametrize(
    "text", ["A: int = 1  # c\nB: int =  # c\n", "A: int = 1  # c\nB: str = 'half  # c\n"]
)
def test_a_typing_slip_in_a_file(refused, stage, text):
    (line,) = refused(scripts=[stage(text)])
    assert line.startswith("stage.py:2: ")


def test_paths_from_flags_and_from_files(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    settings = config.resolve(argv=["--output-dir", "out", "--cache-dir", "~/models"])
    assert settings.DATASET_PATH == str(PROJECT / "data" / "cognitive_actions.jsonl")
    assert (settings.OUTPUT_DIR, settings.CACHE_DIR) == (
        str(tmp_path / "out"),
        "/home/someone/models",
    )
    assert settings.activations_path == tmp_path / "out" / "activations" / "activations_layer12.npz"
    assert settings.run_dir == tmp_path / "out" / "checkpoints" / "cognitive_actions"
    assert config.resolve(argv=["--dataset-path", "mine.jsonl"]).DATASET_PATH == str(
        tmp_path / "mine.jsonl"
    )
    assert (
        config.resolve(argv=["--dataset-path", "/a/b.jsonl", "--run-name", "r"]).run_dir
        == PROJECT / "checkpoints" / "r"
    )
    assert config.resolve(argv=[]).output_dir == PROJECT


def test_paths_in_files_are_relative_to_the_project(edited, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings = edited(OUTPUT_DIR="out").resolve(argv=[])
    assert (settings.OUTPUT_DIR, settings.DATASET_PATH) == (
        str(tmp_path / "out"),
        str(tmp_path / "data" / "cognitive_actions.jsonl"),
    )


def test_presets_set_what_has_no_value():
    """The demo no more: its other values are the constants."""
    undecided = {name for name, setting in DECLARED.items() if not setting["has_value"]}
    assert undecided == {"MODEL_NAME", "LAYER_IDX", "MAX_LENGTH", "DATASET_PATH", "LABEL_FIELD"}
    assert set(config.PRESETS["demo"]) == undecided < set(config.PRESETS["llama-3.1-8b"])


@pytest.mark.parametrize("preset", config.PRESETS)
def test_each_preset_passes_all_checks(preset, tmp_path):
    (tmp_path / "mine.jsonl").touch()
    assert (
        config.resolve(
            *STAGES, argv=["--preset", preset, "--dataset-path", str(tmp_path / "mine.jsonl")]
        ).PRESET
        == preset
    )


@pytest.mark.parametrize("name", DECLARED)
def test_a_setting_has_a_comment_and_a_known_type(name):
    assert len(DECLARED[name]["comment"]) >= 5
    assert kinds.is_known(DECLARED[name]["annotation"])


def test_a_setting_has_one_home():
    assert len(DECLARED) == sum(
        len(config.read_settings(path)) for path in (PROJECT / "config.py", *STAGES)
    )


def test_every_limit_can_be_read_and_holds_for_the_default():
    assert set(PATH_SETTINGS) <= set(DECLARED)
    limited = {name for name, setting in DECLARED.items() if setting["limits"] != Limits()}
    assert len(limited) >= 30
    for name, setting in DECLARED.items():
        assert not re.match(r"[\[({]", setting["comment"]), name  # one that was not read
        if setting["has_value"]:
            assert not problems_with(name, setting["value"], setting["limits"])
    numbers = {n for n, s in DECLARED.items() if re.search("int|float", s["type"])}
    assert numbers - limited <= {"MATRYOSHKA_PREFIXES"}  # whose order a rule looks at


@pytest.mark.parametrize(
    "comment, inside, outside",
    [
        ("[1..] tokens", (1, 2**53 - 1), (0, -1, 2**53)),
        ("[1..2**26] features", (1, 2**26), (0, 2**26 + 1)),
        ("(0..0.99] part", (1e-12, 0.99), (0.0, -1.0, 1e-13, 0.991)),
        ("[1e-6..1e6] width", (1e-6, 1e6), (9e-7, 0.0, 1.1e6)),
        ("[0..1e38] weight", (0.0, 1e38), (-0.1, 1.1e38)),
        ("{max, mean} of a feature", ("max", "mean"), ("sum", "")),
        ("any number", (-(2**53) + 1, 1e12), (2**53, 1e13)),
    ],
)
def test_limits_as_comments_write_them(comment, inside, outside):
    limits, rest = limits_of(comment)
    assert rest and rest[0].isalpha()
    assert not any(problems_with("N", value, limits) for value in inside)
    for value in outside:
        (line,) = problems_with("N", value, limits)
        assert re.fullmatch(r"N: \S.* (is|are) .*\. (give|choose) .*\.", line)
    assert len(problems_with("N", (*inside, *outside, None)[:-1], limits)) == len(outside)


def test_settings_are_frozen():
    settings = config.resolve(*STAGES, argv=[])
    with pytest.raises(AttributeError, match="--n-epochs"):
        settings.N_EPOCHS = 3
    with pytest.raises(AttributeError):
        _ = settings.NO_SUCH_SETTING
    assert settings.N_EPOCHS == config.read_settings(STAGES[1])["N_EPOCHS"]["value"]


def test_select_gives_json_values():
    assert config.resolve(*STAGES, argv=[]).select(["M", "MATRYOSHKA_PREFIXES", "AUX_K"]) == {
        "M": 256,
        "MATRYOSHKA_PREFIXES": [64, 256],
        "AUX_K": None,
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_enough_to_read_from_top_to_bottom(script):
    """What makes one longer than its story has a module; the settings count."""
    assert len((PROJECT / script).read_text().splitlines()) <= 250


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_setting(run_script, script):
    done = run_script(script, "--help-all")
    assert (done.returncode, done.stderr) == (0, "")
    without_spaces = "".join(done.stdout.split())  # argparse breaks lines where it likes
    for name, setting in DECLARED.items():
        mine = script == "run_pipeline.py" or setting["file"] in ("config.py", script)
        assert (
            bool(re.search(rf"^ +--{config.flag_name(name)}\b(?!-)", done.stdout, re.MULTILINE))
            is mine
        ), name
        assert not mine or "".join(setting["comment"].split()) in without_spaces, name


def imported(path, root=PROJECT):
    """Top-level names of all modules that a file imports, anywhere in it."""
    return {name.split(".")[0] for name in imports(path, root)}


def test_import_directions():
    ground = [path for path in SOURCES if path.startswith("fastsae/settings/")]
    assert len(ground) >= 8
    for path in ("config.py", *ground):  # the settings are read before any library
        foreign = {
            name for name in imports(path) if name.split(".")[0] not in sys.stdlib_module_names
        }
        assert all(name.startswith("fastsae.settings") for name in foreign), path
    assert imported("run_pipeline.py") - sys.stdlib_module_names == {"config", "fastsae"}
    # so that it starts at once
    assert standard_library_only(module_graph("fastsae"), imports("run_pipeline.py"))
    assert len(SOURCES) >= 75
    assert not upward(SOURCES)
    for script in config.STAGES:
        assert {"config", "fastsae"} <= imported(script), script


FLOORS = (
    "settings",
    "runtime",
    "data",
    "lm",
    "activations",
    "sae",
    "formats",
    "intervention",
    ("training", "interpretation"),
    "trained_sae",
    "notebook",
    "fastsae",
)


def standard_library_only(graph, start):
    """Whether the package's modules among `start`, and all that these import at their top, need no
    other library."""
    waiting, seen = [name for name in start if name in graph], set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            path = next(
                p
                for p in (f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py")
                if (PROJECT / p).exists()
            )
            found = imports(path, top_level=True)
            if {each.split(".")[0] for each in found} - sys.stdlib_module_names - {"fastsae"}:
                return False
            waiting += found & set(graph)
    return len(seen) > 3


EXPERIMENTS = ("shared", ("benchmarks", "studies", "pages"))


def floors_climbed(graph, floors=FLOORS):
    """(importer, imported) of the imports that go up, or sideways between packages of one floor, by
    `floors`."""
    floor = {
        name: number
        for number, names in enumerate(floors)
        for name in (names if isinstance(names, tuple) else (names,))
    }

    def package(module):
        return (module.split(".") + ["fastsae"])[1] if "." in module else "fastsae"

    return {
        (one, other)
        for one, others in graph.items()
        for other in others
        if package(one) != package(other) and floor[package(one)] <= floor[package(other)]
    }


def test_imports_inside_the_package_run_one_way():
    graph = module_graph("fastsae")
    assert len(graph) >= 70 and sum(map(len, graph.values())) >= 150
    assert not circles(graph)
    assert not floors_climbed(graph)


def test_a_climb_between_packages_is_seen():
    graph = {
        "fastsae.lm.a": {"fastsae.sae.b", "fastsae.runtime.c"},
        "fastsae.training.d": {"fastsae.interpretation.e", "fastsae.lm.a"},
    }
    assert floors_climbed(graph) == {
        ("fastsae.lm.a", "fastsae.sae.b"),
        ("fastsae.training.d", "fastsae.interpretation.e"),
    }


def test_floors_and_packages_by_hand():
    """p.a -> p.b <-> p.c -> q.d: the circle is one floor."""
    graph = {"x.p.a": {"x.p.b"}, "x.p.b": {"x.p.c"}, "x.p.c": {"x.p.b", "x.q.d"}, "x.q.d": set()}
    assert floors(graph) == 3 and circles(graph) == [["x.p.b", "x.p.c"]]
    assert packages_of(graph) == {"p": {"q"}, "q": set()}


def test_experiments_share_by_one_package_only():
    """benchmarks, studies and pages need nothing of each other, and shared needs none of them."""
    graph = module_graph("experiments")
    assert len(graph) >= 35 and sum(map(len, graph.values())) >= 50
    assert not circles(graph)
    assert not floors_climbed(graph, EXPERIMENTS)


def test_a_climb_between_experiments_is_seen(tmp_path):
    for path, text in {
        "shared/a.py": "def f():\n    from experiments.studies import b\n",
        "studies/b.py": "from experiments.shared import c\nfrom experiments.studies import d\n",
        "studies/d.py": "",
        "shared/c.py": "",
        "pages/e.py": "import experiments.benchmarks.f\n",
        "benchmarks/f.py": "",
    }.items():
        (tmp_path / "experiments" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "experiments" / path).write_text(text)
    assert floors_climbed(module_graph("experiments", tmp_path), EXPERIMENTS) == {
        ("experiments.shared.a", "experiments.studies.b"),
        ("experiments.pages.e", "experiments.benchmarks.f"),
    }


def upward(paths, root=PROJECT):
    """The files that import what stands above them: the package a script or config, a script
    another script, anything a test."""
    scripts = {script.removesuffix(".py") for script in SCRIPTS}
    tests = {path.stem for path in (PROJECT / "tests").rglob("*.py")} | {"tests"}
    above = {
        path: (
            scripts | {"config"}
            if path.startswith("fastsae/")
            else scripts
            if path in SCRIPTS
            else set()
        )
        | tests
        for path in paths
    }
    return {path for path in paths if imported(path, root) & above[path]}


def test_an_upward_import_in_a_sub_folder_is_seen(tmp_path):
    deep = tmp_path / "fastsae" / "deep"
    deep.mkdir(parents=True)
    (deep / "__init__.py").write_text("")
    (deep / "up.py").write_text("def f():\n    import train_sae\n")
    (deep / "test.py").write_text("from conftest import PROJECT\n")
    (deep / "fine.py").write_text("from fastsae.deep import up\n")
    assert upward(python_files("fastsae", root=tmp_path), tmp_path) == {
        "fastsae/deep/up.py",
        "fastsae/deep/test.py",
    }


def test_circles_are_seen_through_functions_packages_and_relative_imports(tmp_path):
    deep = tmp_path / "fastsae" / "deep"
    deep.mkdir(parents=True)
    (tmp_path / "fastsae" / "__init__.py").write_text("")
    (deep / "__init__.py").write_text("")
    (deep / "a.py").write_text("def f():\n    from fastsae.deep.b import g\n")
    (deep / "b.py").write_text("from ..c import h\n")
    (tmp_path / "fastsae" / "c.py").write_text("from .deep import a\n")
    (tmp_path / "fastsae" / "d.py").write_text("import fastsae.c\n")
    assert circles(module_graph("fastsae", tmp_path)) == [
        ["fastsae.c", "fastsae.deep.a", "fastsae.deep.b"]
    ]


def test_a_flag_without_a_value_hides_no_other_problem(refused):
    # K is not measured against a default M
    assert names(refused("--m", "--k", "999", "--device", "tpu")) == ["DEVICE", "M"]


@pytest.mark.parametrize(
    "path, name",
    [
        ("/a/my.texts.jsonl", "my.texts"),
        ("x.json", "x"),
        ("hf:org/data-v1.5", "data-v1.5"),
        ("hf:org/data@v1.2", "data@v1.2"),
        ("hf:org/data-v1.6", "data-v1.6"),
    ],
)
def test_runs_are_named_by_their_dataset(path, name):
    assert config.run_name_of(path) == name
