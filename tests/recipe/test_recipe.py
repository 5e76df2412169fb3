from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from deepclust import Recipe, load_backbone, open_index, pretrain
from deepclust.errors import DataError, RecipeError
from deepclust.methods import METHODS
from deepclust.recipe import differences, shipped
from deepclust.recipe.sections import Cadence, parse_cadence
from tests.methods.cases import TOY
from tests.methods.cases import recipe as small_case
from tests.tiny import tiny_recipe
from tools.bench import fuzz_recipes


def test_every_shipped_recipe_loads_and_its_header_says_how_to_run_it() -> None:
    assert len(shipped()) >= 5
    for name in shipped():
        Recipe.load(name)
        text = (Path(__file__).parents[2] / f"deepclust/recipe/shipped/{name}.yaml").read_text()
        assert "command    deepclust" in text
        assert " et al.," in text
        assert "imagenet" not in name or "--resize-short 256" in text


def test_a_dumped_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "train.lr=1e-3", "cluster.every=7 steps")
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Recipe.load(3), "recipe=3 is not a path"),  # type: ignore[arg-type]
        (lambda: Recipe.load({"seed": 1}), "recipe={'seed': 1} is not a path"),  # type: ignore[arg-type]
        (lambda: Recipe.load(""), "recipe='' is not a path"),
        (lambda: Recipe.load("a\0b"), "is not a path"),
        (lambda: Recipe.load("small-photos", {"seed": 1}), "not a text such as"),  # type: ignore[arg-type]
        (lambda: Recipe.parse("seed: 1"), "is a str, not a dict"),  # type: ignore[arg-type]
        (lambda: pretrain("smal-photos", run="r"), "did you mean 'small-photos'"),
        (lambda: pretrain(None, run="r"), "recipe=None is not a path"),  # type: ignore[arg-type]
        (lambda: pretrain("small-photos", run=""), "run='' is not a path"),
        (lambda: pretrain("small-photos", run=3), "run=3 is not a path"),  # type: ignore[arg-type]
        (lambda: open_index(None), "shards=None is not a path"),  # type: ignore[arg-type]
        (lambda: open_index(["a", 3]), "shards=3 is not a path"),  # type: ignore[list-item]
        (lambda: load_backbone(3), "path=3 is not a path"),  # type: ignore[arg-type]
    ],
)
def test_the_python_door_names_an_argument_of_the_wrong_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[], object], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=says):
        call()
    assert not list(tmp_path.glob("*/recipe.yaml"))


def test_pretrain_takes_a_shipped_name_and_a_path_as_the_command_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(Recipe.load("small-photos", "seed=7").dump())
    for source in ("small-photos", "mine.yaml", Path("mine.yaml")):
        with pytest.raises(DataError, match="no shard"):  # it has begun, and there are none
            pretrain(source, run=f"runs/{source}")
    assert Recipe.load("runs/mine.yaml/recipe.yaml").seed == 7


def test_an_override_wins_over_the_file() -> None:
    assert Recipe.load("small-photos", "cluster.k=12").cluster.k == 12


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        tiny_recipe(tmp_path).seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.kk=3", r"cluster.kk: unknown key; did you mean 'k'\?"),
        ("trian.epochs=3", r"trian: unknown key; did you mean 'train'\?"),
        ("cluster.k=many", r"cluster.k: .*integer.*'many'"),
        ("cluster.k=0", "cluster.k: .*greater than or equal to 1"),
        ("cluster.k=1", "deepcluster needs cluster.k of 2 or more"),
        ("cluster.supers=3", "supers=3 must divide k=8"),
        ("cluster.supers=2", "cluster.supers=1 .or deepercluster"),
        ("cluster=null", "cluster: is required by method deepcluster"),
        ("seeds={labels: shards, momentun: 1}", "seeds.momentun: unknown key; did you mean"),
        ("method.name=simclrr", r"method.name: unknown 'simclrr'; did you mean 'simclr'\?"),
        ("method.name=simclr", r"simclr does not cluster: leave cluster out"),
        (
            "method={name: simclr, temprature: 1}",
            "method.temprature: .* did you mean 'temperature'",
        ),
        ("method={name: deepercluster, rotations: 2}", "method.rotations: .*1 or 4"),
        ("method={name: simclr, sampling: paper}", "method.sampling: unknown key"),
        ("train={epochs: 1, optimizer: lars, nesterov: true}", "lars has no nesterov momentum"),
        ("data.jitter=[0, 0, 0, 0.7]", "the last .hue. at most 0.5"),
        ("method.head=forget", "method.head: .*'reset', 'match' or 'centroids'"),
        ("cluster.every=often", "cluster.every: 'often' is not a cadence"),
        ("train.checkpoint=5 rounds", "'5 rounds' is for cluster.every"),
        ("method.name=deepcluster-v2", "cluster.dim=8 means nothing for deepcluster-v2"),
        ("method.name=sela", "cluster.dim=8 means nothing for sela, which balances its heads'"),
        ("train.ranks=5", "cannot be shared by 5 ranks"),
        ("cluster={k: 8, overlap: true, where: inline}", "overlap needs the cluster worker"),
        ("cluster={k: 8, overlap: true, where: gang}", "overlap needs the cluster worker"),
        (
            "method.name=tests.no_such",
            "'tests.no_such' cannot be imported.*PYTHONPATH",
        ),
        ("method.name=ensurepip.__main__", "not the name of a module that may be imported"),
        ("method.name=tests._tiny", "not the name of a module that may be imported"),
        ("method.name=.tests", "not the name of a module that may be imported"),
        ("method.name=tests.tiny", "method.name: tests.tiny has no class Config derived from"),
        ("data.blur=[0.5, 0.1]", "data.blur: 2 values for 1 full-size crops"),
        ("data.blur=[1.5]", "data.blur"),
        ("data.local={count: 2, size: 8}", "data.local: deepcluster has no local crops"),
        ("seeds={labels: shards, share: 1}", "labelled samples alone leave nothing to cluster"),
        ("cluster.k.x=3", "k is a value, not a section"),
        ("cluster.k", "not of the form"),
    ],
)
def test_a_wrong_override_is_named_with_the_fix(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(tmp_path, override)


def test_a_method_that_requires_labels_asks_for_seeds() -> None:
    with pytest.raises(RecipeError, match="seeds: are required by method"):
        small_case(TOY, "seeds=null")


@pytest.mark.parametrize(
    "name", ["simclr", "moco-v2", "moco-v3", "byol", "swav", "dino", "dac", "sela"]
)
def test_a_method_that_trains_on_no_labels_takes_them_for_evaluation_alone(name: str) -> None:
    assert small_case(name, "seeds={labels: shards, per_class: 5, refine: 4}").seeds_judge
    for key, value in (("share", 0.25), ("pin_from", 1), ("force", "true")):
        with pytest.raises(RecipeError, match=rf"seeds\.{key}.*{name}.*leave it out"):
            small_case(name, f"seeds={{labels: shards, {key}: {value}}}")
    assert not small_case(name, "seeds={labels: shards}", "terms.cm.weight=1").seeds_judge
    assert not small_case("deepcluster", "seeds={labels: shards}").seeds_judge


TERM = "terms={tests.toys.term: {weight: 1}}"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ([TERM], r"required by terms\.tests\.toys\.term: set seeds\.labels"),
        ([TERM, "seeds={labels: shards, force: true}"], r"seeds\.force means nothing for simclr"),
        ([TERM, "seeds={labels: shards, prototypes: 2}"], r"seeds\.prototypes means nothing for"),
    ],
)
def test_labels_that_nothing_can_use_or_that_are_missing_are_named(
    overrides: list[str], problem: str
) -> None:
    with pytest.raises(RecipeError, match=problem):
        small_case("simclr", *overrides)
    assert small_case("simclr", TERM, "seeds={labels: shards, refine: 4}").uses_labels


def test_gang_is_read_as_ranks(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "cluster.where=gang")
    assert recipe.cluster is not None
    assert recipe.cluster.where == "ranks"
    assert recipe.clusters_inline


def test_unknown_names_are_listed_with_all_other_problems(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny_recipe(tmp_path, "method.name=simclrr", "terms.entropy.weight=1", "cluster.k=0")
    assert all(key in str(caught.value) for key in ("method.name", "terms.entropy", "cluster.k"))
    assert "does not cluster" not in str(caught.value)


def test_reading_a_recipe_imports_no_torch() -> None:
    code = (
        "import sys; from deepclust import Recipe; Recipe.load('demo-fashion'); "
        "Recipe.load('demo-fashion', 'method.name=deepercluster'); "
        "Recipe.load('swav-small-photos', 'terms.mean_entropy.weight=1'); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_code_outside_the_methods_names_a_method() -> None:
    """Comments and docstrings may cite the papers; code may not."""
    root = Path(__file__).parents[2]
    named = [
        f"{file.relative_to(root)}:{node.lineno}"
        for package in ("deepclust", "cluster_jobs")
        for file in (root / package).rglob("*.py")
        if "methods" not in file.parts
        for node in ast.walk(ast.parse(file.read_text()))
        if names_a_method(node)
    ]
    assert named == []


def names_a_method(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").startswith(tuple(METHODS.values()))
    return isinstance(node, ast.Constant) and node.value in METHODS


@pytest.mark.parametrize(("text", "value"), [("on", "on"), ("off", "off"), ("auto", "auto")])
def test_on_and_off_are_read_as_words_and_not_as_booleans(
    tmp_path: Path, text: str, value: str
) -> None:
    assert tiny_recipe(tmp_path, f"train.sync_bn={text}").train.sync_bn == value


def test_a_methods_own_keys_may_stand_before_its_name(tmp_path: Path) -> None:
    later = tiny_recipe(tmp_path, "method.temperature=0.2", "cluster=null", "method.name=simclr")
    assert later.method.temperature == 0.2


def test_simclr_does_not_contrast_parts_of_a_batch(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="contrasts whole batches"):
        tiny_recipe(tmp_path, "method.name=simclr", "cluster=null", "train.accumulate=2")


def test_another_method_begins_with_its_own_defaults() -> None:
    recipe = Recipe.load("small-photos", "method.name=deepercluster", "cluster.supers=4")
    assert recipe.method.model_dump() == {
        "name": "deepercluster", "rotations": 4, "sampling": "exact"
    }  # fmt: skip


def test_recipes_of_two_methods_differ_in_what_only_one_has(tmp_path: Path) -> None:
    one = tiny_recipe(tmp_path)
    other = tiny_recipe(tmp_path, "method.name=simclr", "cluster=null")
    assert differences(one, other)["cluster.k"] == (8, None)
    assert differences(one, other)["method.temperature"] == (None, 0.5)


def test_with_overlap_one_rank_has_a_cluster_worker_too(tmp_path: Path) -> None:
    assert tiny_recipe(tmp_path).clusters_inline
    assert not tiny_recipe(tmp_path, "cluster.overlap=true").clusters_inline


def test_an_unknown_recipe_suggests_a_shipped_one() -> None:
    with pytest.raises(RecipeError, match="did you mean 'small-photos'"):
        Recipe.load("small-photo")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "seed: 1\ntrain: {epochs: 1}\nseed: 2\n",
            "r.yaml has the key 'seed' twice.*lines 1 and 3",
        ),
        ("train:\n  lr: 1\n  'lr': 2\n", "the key 'lr' twice.*lines 2 and 3"),
        ("a: [{b: 1, b: 1}]", "the key 'b' twice"),
        ("? &a x\n: 1\n*a : 2\n", "the key 'x' twice"),
    ],
)
def test_a_key_that_stands_twice_is_named_with_its_lines(
    tmp_path: Path, text: str, says: str
) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=says):
        Recipe.load(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match=r"override.*'k' twice"):
        Recipe.load("small-photos", "cluster={k: 3, dim: 8, k: 4}")


def test_a_file_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match=r"r.yaml is not YAML"):
        Recipe.load(tmp_path / "r.yaml")


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse({"data": {}, "backbone": {"name": "conv4"}, "cluster": {}, "train": {}})
    assert all(key in str(caught.value) for key in ("data.shards", "cluster.k", "train.epochs"))


def test_differences_name_the_keys_and_both_values(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    assert differences(recipe, recipe.replace("cluster.k=9")) == {"cluster.k": (8, 9)}


def test_cadences_are_read_in_both_units() -> None:
    assert parse_cadence("3 epochs") == Cadence(3, "epoch")
    assert parse_cadence("1 step") == Cadence(1, "step")
    assert parse_cadence("100 rounds") == Cadence(100, "round")


BOMBS = {
    "a date that is none": "data: 2001-99-99",
    "digits": "seed: " + "9" * 5000,
    "a large number": "seed: " + "9" * 4000,
    "levels": "[" * 3000,
    "a tag": "!!bool x",
    "bytes": "ray: {a: !!binary aGVsbG8=}",
    "itself": "ray: &a [*a]",
    "an object": "!!python/object/apply:os.getpid []",
    "a set": "slurm: {a: !!set {x, y}}",
    "a number as a key": "ray: {1: 2}",
    "laughs": "ray:\n  a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"  {b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghijkl")),
    "letters": "a: " + "x" * 300_000,
    "a NUL": 'a: "\0"',
    "a name that is not UTF-8": "method: {name: \udce9}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_no_recipe_is_a_short_recipe_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "r.yaml").write_bytes(BOMBS[name].encode("utf-8", "surrogateescape"))
    with pytest.raises(RecipeError, match=r"r\.yaml") as caught:
        Recipe.load(tmp_path / "r.yaml")
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", ["cluster.k", "ray.a", "terms", "x"])
def test_an_override_of_any_value_is_right_or_a_recipe_error(tmp_path: Path, name: str) -> None:
    values = ["2001-99-99", "9" * 5000, "[" * 2000, "!!binary x", "&a [*a]", "\udce9", "{1: 2}"]
    for value in values:
        with pytest.raises(RecipeError) as caught:
            tiny_recipe(tmp_path, f"{name}={value}")
        assert len(str(caught.value)) < 2000


def test_a_circle_in_a_tree_of_python_is_a_recipe_error() -> None:
    circle: list[object] = []
    circle.append(circle)
    for tree in ({"ray": circle}, {"data": {"shards": circle}}, {"slurm": {"a": b"x"}}):
        with pytest.raises(RecipeError):
            Recipe.parse(tree)


def test_random_recipes_are_right_or_clear_errors() -> None:
    table, worst = fuzz_recipes.fuzz(60, seed=1)
    assert not worst
    assert sum(table["trees"].values()) == 30


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{a: 2, b: 1}", {"a": 2, "b": 1}),
        ("{'x/{0..3}.tar': 2.5, s3://b/y: 1e-1}", {"x/{0..3}.tar": 2.5, "s3://b/y": 0.1}),
        ("[a, b]", ("a", "b")),
        ("{a,b}", "{a,b}"),
        ("{000..009}.tar", "{000..009}.tar"),
    ],
)
def test_sources_their_weights_and_patterns_are_told_apart(text: str, value: object) -> None:
    recipe = Recipe.load("small-photos", f"data.shards={text}")
    assert recipe.data.shards == value
    assert Recipe.parse(yaml.safe_load(recipe.dump())) == recipe


@pytest.mark.parametrize("weight", ["0", "1e999"])
def test_a_weight_that_is_not_a_positive_number_is_named(weight: str) -> None:
    with pytest.raises(RecipeError, match=r"the weight of 'b' is .*positive number"):
        Recipe.load("small-photos", f"data.shards={{a: 1, b: {weight}}}")


@pytest.mark.parametrize(
    "key", ["iterations=5", "init=k-means++", "empty=relocate", "min_size=2", "backend=torch"]
)
def test_keys_of_k_means_mean_nothing_where_there_is_none(key: str) -> None:
    with pytest.raises(RecipeError, match=f"cluster.{key.replace('+', '.')} means nothing"):
        small_case("sela", f"cluster.{key}")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.blur=x", r"  data\.blur: .*number.*, or a valid tuple \(got 'x'\)"),
        ("train.clip=x", r"  train\.clip: .*number.* \(got 'x'\)"),
        ("cluster.until=x", r"  cluster\.until: .*integer.* \(got 'x'\)"),
    ],
)
def test_a_value_of_several_types_has_one_line_and_no_name_of_a_type_in_its_key(
    override: str, line: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load("small-photos", "data.shards=s", override)
    (said,) = str(caught.value).splitlines()[-1:]
    assert re.fullmatch(line, said), said
    assert "[" not in said.partition(": ")[0]


def test_crops_on_the_device_and_colours_in_the_workers_contradict_each_other(
    tmp_path: Path,
) -> None:
    with pytest.raises(RecipeError, match="leave colour_on=auto"):
        tiny_recipe(tmp_path, "data.crop_on=device", "data.colour_on=workers")
