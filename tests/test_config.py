"""Typed configuration: what is given arrives letter by letter, what does not fit is named."""

import ast
import json
from dataclasses import asdict, dataclass, field, fields

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT
from vdot.config import GenerateConfig, load_config, merge_config
from vdot.errors import ConfigError

NAMES = [f.name for f in fields(GenerateConfig)]


def test_every_field_is_read():
    """As ``config.<field>`` (or ``c.``) somewhere in vdot/ outside config.py; a field that nothing reads is a lie."""
    read = set()
    for path in (ROOT / "vdot").rglob("*.py"):
        if path.name == "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("config", "c", "self.config"):
                read.add(node.attr)
    assert set(NAMES) - read == set()


def test_flag_beats_key_value_beats_file_beats_default(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("frame_num: 5\nsample_steps: 5\nfeather: 5\n")
    config = load_config(GenerateConfig, file, ["frame_num=6", "sample_steps=6"], {"frame_num": "7"})
    assert (config.frame_num, config.sample_steps, config.feather, config.context_scale) == (7, 6, 5.0, 1.0)


@given(st.text())
def test_text_is_taken_letter_by_letter(text):
    assert load_config(GenerateConfig, None, [], {"prompt": text}).prompt == text
    got = load_config(GenerateConfig, None, [f"prompt={text}"]).prompt
    assert got == (None if text == "null" else text)


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "???", "a: b", "[x]", "{", "#1", "yes", "1e3", "a=b", "- x", "'"])
def test_text_that_yaml_tools_would_interpret(text, tmp_path):
    assert load_config(GenerateConfig, None, [f"prompt={text}"]).prompt == text
    (tmp_path / "run.json").write_text(json.dumps({"config": {"prompt": text}}))
    assert load_config(GenerateConfig, tmp_path / "run.json").prompt == text


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.lists(st.integers())
)


@given(st.sampled_from(NAMES), scalars)
def test_any_value_fits_its_type_or_is_named(name, value):
    try:
        config = merge_config(GenerateConfig(), {name: value}, "test")
    except ConfigError as error:
        assert name in str(error) and "\n" not in str(error).replace(repr(value), "")
        return
    allowed = str(GenerateConfig.__annotations__[name])
    assert type(getattr(config, name)).__name__.removesuffix("Type") in allowed


@given(
    st.builds(
        GenerateConfig,
        prompt=st.none() | st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\x85")),
        frame_num=st.none() | st.integers(),
        fps=st.none() | st.floats(allow_nan=False),
        keep_source=st.booleans(),
        offload_model=st.sampled_from(["false", "true", "block"]),
    )
)
def test_a_config_survives_yaml_and_json(tmp_path_factory, config):
    """But for U+0085, which is a line break to YAML: PyYAML writes it bare and reads a space."""
    folder = tmp_path_factory.getbasetemp()
    (folder / "c.yaml").write_text(yaml.safe_dump(asdict(config), allow_unicode=True), encoding="utf-8")
    (folder / "c.json").write_text(json.dumps({"config": asdict(config)}), encoding="utf-8")
    assert load_config(GenerateConfig, folder / "c.yaml") == load_config(GenerateConfig, folder / "c.json") == config


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["promt=x"], "unknown key 'promt'; did you mean prompt?"),
        (["zzzzzz=x"], "valid keys: prompt"),
        (["frame_num=five"], "frame_num is 'five', which is not a whole number"),
        (["frame_num=5.5"], "not a whole number"),
        (["fps=fast"], "not a number"),
        (["compile=perhaps"], "not true or false"),
        (["context_scale=null"], "context_scale is None"),
        (["frame_num"], "not key=value"),
        (["=5"], "not key=value"),
        (["prompt.x=5"], "prompt is {'x': '5'}, which is not text"),
    ],
)
def test_what_does_not_fit_is_named(overrides, words):
    with pytest.raises(ConfigError, match="(?s).*" + words.translate({ord(c): f"\\{c}" for c in "?{}"})):
        load_config(GenerateConfig, None, overrides)


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [", "not valid YAML"),
        ("- 1", "must be a table"),
        ("5", "must be a table"),
        ("frame_num: many", "frame_num is 'many'"),
        ("config: 5", "must be a table"),
    ],
)
def test_files_that_do_not_fit(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(GenerateConfig, tmp_path / "a.yaml")


def test_files_that_are_not_there_or_not_text(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.yaml", "binary.yaml", "broken.json", ""):
        with pytest.raises(ConfigError):
            load_config(GenerateConfig, tmp_path / name)
    (tmp_path / "comments.yaml").write_text("# nothing\n")
    assert load_config(GenerateConfig, tmp_path / "comments.yaml") == GenerateConfig()


@dataclass
class Inner:
    rate: float = 0.1
    steps: list[int] = field(default_factory=lambda: [1, 2])


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    pair: tuple[float, ...] = (0.9, 0.99)
    name: str = "x"


def test_nested_schemas(tmp_path):
    (tmp_path / "a.yaml").write_text("inner:\n  rate: 1e-4\npair: [0, 1]\n")
    config = load_config(Outer, tmp_path / "a.yaml", ["inner.steps=3,4"])
    assert config == Outer(Inner(1e-4, [3, 4]), (0.0, 1.0))
    assert Outer() == Outer(Inner(0.1, [1, 2]))  # defaults are not written into
    with pytest.raises(ConfigError, match=r"inner: unknown key 'rat'; did you mean rate\?"):
        load_config(Outer, None, ["inner.rat=1"])
    with pytest.raises(ConfigError, match="must be a table"):
        load_config(Outer, None, ["inner=1"])
    with pytest.raises(ConfigError, match="contradicts"):
        load_config(Outer, None, ["inner=1", "inner.rate=1"])


def test_tables_within_a_config_hold_any_text_and_name_what_is_wrong():
    from vdot.training.config import TrainConfig

    config = load_config(TrainConfig, None, ["data.negative_prompt=${a}", "data.task_weights.depth=2"])
    config = load_config(TrainConfig, None, ["steps=3"], {"data": asdict(config.data)})
    assert config.data.negative_prompt == "${a}" and config.data.task_weights == {"depth": 2.0} and config.steps == 3
    assert load_config(TrainConfig, None, ["export_layouts=[]"]).export_layouts == []
    weights = load_config(TrainConfig, None, ["data.task_weights={t2v: 2, r2v:1e-1}"]).data.task_weights
    assert weights == {"t2v": 2.0, "r2v": 0.1}
    assert load_config(TrainConfig, None, ["data.task_weights={}"]).data.task_weights == {}
    for wrong, message in (
        ("data.task_weights.a=x", "task_weights"),
        ("data.task_weights={a: x}", "task_weights"),
        ("data.task_weights={a}", "not {key: value, ...}"),
        ("data.task_weights=3", "not {key: value, ...}"),
        ("generator.betas=[0,x]", "betas"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(TrainConfig, None, [wrong])
