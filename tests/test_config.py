"""The configuration tree: strings, dotted keys, files, overrides, and what wrong settings say."""

import json

import pytest

from fastpt import config
from fastpt.config import build
from fastpt.errors import ConfigError
from fastpt.settings import merge, parse_override, read_file

MINIMAL = {"model": "m", "data": "rows.jsonl"}


def test_strings_and_dotted_keys_set_nodes():
    made = build({**MINIMAL, "method": "dora", "optim.lr": 1e-3, "eval_data": "held.jsonl"})
    assert made.method.name == "dora"
    assert made.optim.lr == 1e-3
    assert made.data.path == "rows.jsonl"
    assert made.eval_data.path == "held.jsonl"


def test_data_objects_are_taken_as_they_are():
    rows = [{"text": "a"}]
    assert build({"model": "m", "data": rows}).data.path is rows
    mixture = [{"path": "a.jsonl", "weight": 2.0}, {"path": "b.jsonl", "weight": 0.5}]
    assert build({"model": "m", "data": mixture}).data.path == mixture


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methd": "lora"}, "unknown setting 'methd'; did you mean 'method'"),
        ({"optim.lrr": 1}, "unknown setting 'optim.lrr'; did you mean 'lr'"),
        ({"method.rnk": 8}, "unknown setting 'method.rnk'; did you mean 'rank'"),
        ({"precision": "fp8"}, "'precision' = 'fp8'"),
        ({"optim.name": "adan"}, "optimizer 'adan' is not known"),
        ({"data": {"path": "x", "streaming": True}}, "data.streaming needs max_steps"),
        ({"method": "freeze"}, "needs method.train"),
        ({"epochs": 0}, "'epochs' = 0"),
    ],
)
def test_wrong_settings_are_named_with_the_remedy(wrong, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        build({**MINIMAL, **wrong})


def test_missing_model_is_named():
    with pytest.raises(ConfigError, match="'model' is missing"):
        build({"data": "x"})


def test_own_optimizer_is_a_plain_function():
    def made(groups):
        return None

    assert build({**MINIMAL, "optim": made}).optim.name is made
    assert build({**MINIMAL, "optim": {"name": made, "lr": 0.1}}).optim.lr == 0.1


def test_files_and_overrides(tmp_path):
    (tmp_path / "run.toml").write_text(
        'model = "m"\nobjective = "sft"\n[optim]\nlr = 1e-4\n[method.rank_pattern]\n"a.b" = 4\n'
    )
    (tmp_path / "run.yaml").write_text(
        'model: m\nobjective: sft\noptim: {lr: 1.0e-4}\nmethod: {rank_pattern: {"a.b": 4}}\n'
    )
    trees = [read_file(tmp_path / name) for name in ("run.toml", "run.yaml")]
    assert trees[0] == trees[1]
    over = merge(
        trees[0],
        dict([parse_override("optim.lr=2e-4"), parse_override("data=rows.jsonl"), parse_override("data.split=x")]),
    )
    made = build(merge(over, {"objective.label_smoothing": 0.1}))
    assert (made.optim.lr, made.data.path, made.data.split) == (2e-4, "rows.jsonl", "x")
    assert made.method.rank_pattern == {"a.b": 4}
    assert made.objective == {"name": "sft", "label_smoothing": 0.1}


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("a.b=1e-4", ("a.b", 1e-4)),
        ("model=org/name", ("model", "org/name")),
        ("x=true", ("x", True)),
        ("x=None", ("x", None)),
        ("x=['a','b']", ("x", ["a", "b"])),
    ],
)
def test_override_values(text, pair):
    assert parse_override(text) == pair


def test_bad_files_and_overrides(tmp_path):
    (tmp_path / "bad.toml").write_text("model = \n")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    for name, message in [
        ("bad.toml", "line 1"),
        ("bad.yaml", "cannot be read"),
        ("list.yaml", "not a table"),
        ("none.toml", "does not exist"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_file(tmp_path / name)
    (tmp_path / "run.ini").write_text("")
    with pytest.raises(ConfigError, match=r"\.ini"):
        read_file(tmp_path / "run.ini")
    with pytest.raises(ConfigError, match="key=value"):
        parse_override("nonsense")


def test_resolved_tree_is_json_and_lists_every_setting():
    made = build({**MINIMAL, "optim": lambda groups: None})
    assert json.loads(config.to_json(made))["optim"]["name"].startswith("<")
    assert config.settings_table().row_count > 40


def test_rows_given_as_objects_are_not_copied_into_the_records_of_a_run():
    def path_of(data):
        return json.loads(config.to_json(config.build({"model": "m", "data": data})))["data"]["path"]

    rows = [{"prompt": "secret", "completion": "secret"}] * 3
    assert path_of(rows) == "<3 rows>"
    assert path_of([{"path": "a.jsonl", "weight": 2}, {"rows": rows}]) == [
        {"path": "a.jsonl", "weight": 2},
        {"rows": "<3 rows>"},
    ]
    assert path_of(["a.jsonl", "b.jsonl"]) == ["a.jsonl", "b.jsonl"]
    assert path_of("a.jsonl") == "a.jsonl"
