"""Named recipes: the registry, YAML files on top of it, and the options on top of both."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.recipe import Recipe
from vllm_flatquant.calibration.recipes import DEFAULT, RECIPES, choose_recipe, preset_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path):
    def call(text):
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        return str(file)

    return call


@pytest.mark.parametrize("name", RECIPES)
def test_each_entry_is_a_recipe_that_its_yaml_gives_back(name, write):
    recipe = RECIPES[name].recipe()
    assert recipe.scheme in name
    assert ("kv" in name) == (recipe.kv < 16)
    assert recipe.system.lower().split("+")[0] in name
    assert choose_recipe(write(recipe.to_yaml("text"))).recipe == recipe
    assert RECIPES[name].summary and not RECIPES[name].summary.endswith(".")


def script(file):
    """The module of a script of this repository."""
    found = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_page_lists_the_registry():
    module = script(ROOT / ".ci" / "recipes_table.py")
    page = module.PAGE.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in RECIPES)
    assert page == module.with_table(page), "docs/recipes.md is older than the registry: run make readme"
    for entry in RECIPES.values():
        assert f"**{entry.recipe().system}**" in page


def test_configurations_of_the_comparison(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    accuracy = script(ROOT / "benchmarks" / "accuracy.py")
    common = {"samples": 8, "seq_len": 32}
    with accuracy.RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = accuracy.expand(["comparison"])
    assert {RECIPES[name].recipe().system for name in names} == {
        entry.recipe().system for entry in RECIPES.values()
    }
    assert {"flatquant-wide-w4a8", "flatquant-e2e-w4a8"} < set(
        names
    )  # README.md says to try these first
    for name in {row["config"] for row in rows} - {"unquantized"} | {*accuracy.OLDER, *names}:
        settings, recipe = accuracy.recipe_of(name, common)
        assert (recipe.samples, recipe.seq_len) == (8, 32)
        assert settings["epochs"] == recipe.epochs and settings["recipe"] in RECIPES
    settings, recipe = accuracy.recipe_of("w4a4-rtn-s4:kv=8,lr=0.5", common)
    assert (recipe.shards, recipe.kv, recipe.lr, settings["lr"]) == (4, 8, 0.5, 0.5)
    assert accuracy.recipe_of("quarot-w4a4:scheme=W4A8", common)[1].scheme == "w4a8"
    pytest.importorskip("matplotlib")
    accuracy.plot([row for row in rows if row["model"] == "tiny-llama"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10000


def test_the_default_recipe_is_the_defaults():
    assert choose_recipe().recipe == RECIPES[DEFAULT].recipe() == Recipe()


def test_file_over_base_and_options_over_file(write):
    file = write("base: flatquant-w4a4-gptq\nepochs: 3\nseed: 7\ncalib: wiki.txt\n")
    chosen = choose_recipe(file, epochs=5)
    assert (chosen.recipe.rounding, chosen.recipe.epochs, chosen.recipe.seed) == ("gptq", 5, 7)
    assert (chosen.base, chosen.calib) == ("flatquant-w4a4-gptq", "wiki.txt")
    assert choose_recipe("flatquant-w4a16", kv=8).recipe == Recipe(scheme="w4a16", kv=8)


def test_only_a_base_that_was_named_is_called_the_base(run, write):
    """What `recipes NAME` prints, edited, names no base: it is not based on the default."""
    status, shown, _ = run("recipes", "quarot-w4a4")
    assert (status, shown.splitlines()[0].split(":")[0]) == (0, "# based on quarot-w4a4")
    status, again, _ = run("recipes", write(shown))
    assert status == 0
    assert again.splitlines()[0] == "# what the file leaves out is from flatquant-w4a4"
    assert again.splitlines()[1:] == shown.splitlines()[1:]
    shown = run("recipes", write("base: quarot-w4a4\nseed: 3\n"))[1]
    assert shown.startswith("# based on quarot-w4a4: ")


def test_the_text_of_a_recipe_is_elsewhere(run, write, model, tmp_path, monkeypatch):
    """A checkpoint's recipe.yaml keeps the name of the text, not where it was."""
    monkeypatch.chdir(tmp_path)
    file = write("calib: wäre da.npy\n")
    status, _, err = run("quantize", model, "--out", tmp_path / "out", "--recipe", file)
    assert status == 1
    assert "wäre da.npy, which is not in the working directory; say where it is with --calib" in err
    assert "calib: wäre da.npy" in run("recipes", file)[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: flatquant-w4a5\n", "no recipe 'flatquant-w4a5'; did you mean flatquant-w4a"),
        ("base: [1]\n", "no recipe"),
        ("epoch: 3\n", "epoch=3: .* did you mean epochs"),
        ("epochs: many\n", "epochs='many'"),
        ("colour: red\n", "colour='red': .* `flatquant recipes flatquant-w4a4` shows all"),
        ("transforms: qkv\n", "transforms='qkv': Input should be a list"),
        ("activation_clip: most\n", "activation_clip='most': Input should be 'learned' or a number"),
        ("kv_clip: 2\n", "kv_clip=2: Input should be 'learned' or a number above 0, at most 1"),
        ("epochs: yes\n", "mine.yaml: epochs=True: yes, no, true and false mean nothing here"),
        ("activation_clip: on\n", "mine.yaml: activation_clip=True: yes, no"),
        ("scheme: W4A4KV8\n", "scheme='W4A4KV8': the KV cache .* use w4a4, and kv 8"),
        ("group_size: 64\n", "^[^:]*mine.yaml: group_size=64 is served only with 16-bit activations"),
        (
            "v_each_head: yes\n",
            "^[^:]*mine.yaml: v_each_head=True needs o_proj without",
        ),
        ("calib: 3\n", "calib must be"),
        ("- epochs\n", "holds no settings"),
        ("", "holds no settings"),
        ("3: 4\n", "holds no settings"),
        ("epochs: [1\n", "is not YAML"),
        ("epochs: 2020-13-41\n", "is not YAML"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nepochs: [*b, *b]\n", "is not YAML .*write them out"),
        ("a: &a {x: 1, y: *a}\n", "is not YAML .*write them out"),
        ("!!python/object/apply:os.system ['true']\n", "is not YAML"),
    ],
)
def test_bad_file(write, text, message):
    with pytest.raises(UserError, match=message):
        choose_recipe(write(text))


def test_words_in_any_case(write):
    """As on the command line: papers, and this project's own tables, write W4A8."""
    chosen = choose_recipe(write("base: QuaRot-W4A4\nscheme: W4A8\nrounding: RTN\nmatrix: Hadamard\n"))
    assert chosen.recipe == choose_recipe("Quarot-W4a4", scheme="w4a8", rounding="rtn").recipe
    assert (chosen.base, chosen.recipe.system) == ("quarot-w4a4", "QuaRot")


def test_aliases_of_plain_values_and_flat_lists(write):
    chosen = choose_recipe(
        write("diag: &sites [qkv, down]\ntransforms: *sites\nseed: &n 3\nepochs: *n\n")
    )
    assert list(chosen.recipe.transforms) == list(chosen.recipe.diag) == ["qkv", "down"]
    assert (chosen.recipe.seed, chosen.recipe.epochs) == (3, 3)


def test_aliases_that_double_with_every_line_are_refused_at_once(write):
    lines = ["a0: &a0 [x, x]\n"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)]
    with pytest.raises(UserError, match="an alias stands for nested values") as said:
        choose_recipe(write("".join(lines)))
    assert len(str(said.value)) < 300


def test_bad_names():
    with pytest.raises(UserError, match="did you mean flatquant-w4a4"):
        choose_recipe("flatquant-w4a4x")
    with pytest.raises(UserError, match="no recipe 'zzz'; `flatquant recipes` lists them"):
        choose_recipe("zzz")
    # a system or a scheme alone
    with pytest.raises(UserError, match="did you mean quarot-w4a4 or quarot-w4a4-rtn or quarot-w4a4kv4"):
        choose_recipe("QuaRot")
    with pytest.raises(UserError, match="did you mean gptq-w4a16"):
        choose_recipe("gptq")
    with pytest.raises(UserError, match="did you mean flatquant-w4a8"):
        choose_recipe("W4A8")
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        choose_recipe("nowhere.yaml")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(UserError, match=r"is a folder; give its recipe\.yaml"):
        choose_recipe(str(tmp_path))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--recipe", "there is no recipe ''; `flatquant recipes` lists them"),
        ("--scheme", "scheme='': unknown scheme"),
        ("--rounding", "rounding='': Input should be"),
        ("--calib", "calibration source '' is not understood"),
    ],
)
def test_an_empty_option_is_no_default(run, tmp_path, option, said):
    """A script's variable that is not set."""
    words = ("--samples", 4, "--seq-len", 24, "--epochs", 0, option, "")
    status, _, err = run("quantize", ROOT / "examples" / "tiny-llama", "--out", tmp_path / "out", *words)
    assert (status, said in err, (tmp_path / "out").exists()) == (1, True, False), err


def test_commands(run, model, calib, tmp_path):
    status, out, _ = run("recipes")
    assert status == 0
    assert all(any(line.startswith(f"{name} ") for line in out.splitlines()) for name in RECIPES)
    status, out, _ = run("recipes", "flatquant-w4a4kv4")
    assert status == 0 and Recipe(**yaml.safe_load(out)) == RECIPES["flatquant-w4a4kv4"].recipe()
    status, _, err = run("recipes", "flatquant-w4a4kv5")
    assert status == 1 and "did you mean" in err

    options = ("--samples", 4, "--seq-len", 24, "--epochs", 0)
    args = ("quantize", model, "--calib", calib)
    status, _, err = run(*args, "--out", tmp_path / "a", "--recipe", "flatquant-w4a8", *options)
    assert status == 0, err
    again = tmp_path / "a" / "recipe.yaml"
    status, _, err = run(*args, "--out", tmp_path / "b", "--recipe", again)
    assert status == 0, err
    assert (tmp_path / "b" / "recipe.yaml").read_text() == again.read_text()
    spec = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert spec["activations"]["bits"] == 8
    for name in ("model.safetensors", "golden.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    status, _, err = run(*args, "--out", tmp_path / "c", "--recipe", "flatquant-w4a5")
    assert status == 1 and "did you mean" in err and not (tmp_path / "c").exists()


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("setting", ["lr", "distill_lr", "damping", "magr_alpha", "clip_lr_factor"])
def test_settings_are_finite(tmp_path, setting, value):
    """An infinite rate would train every block to garbage and call it done."""
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{setting}: {value}\n")
    with pytest.raises(UserError, match=rf"recipe.yaml: {setting}="):
        choose_recipe(str(file))


def test_a_preset_trains_no_recipe_that_trains_nothing():
    assert preset_settings("quick", "flatquant-w4a4")["epochs"] == 3
    assert "epochs" not in preset_settings("quick", "quarot-w4a4-rtn")
    assert preset_settings("quick", "quarot-w4a4-rtn")["samples"] == 16
    assert "distill_epochs" not in preset_settings("quick", "flatquant-w4a4")
    assert preset_settings("quick", "flatquant-e2e-w4a4")["distill_epochs"] == 3


def test_names_are_one_line():
    with pytest.raises(UserError, match="system"):
        choose_recipe("flatquant-w4a4", system="x\n---\n# another title")
