"""From config groups and overrides to one configuration, and what a mistake is told."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from seqlong.cli import main, split  # noqa: E402
from seqlong.compose import callback_name, compose, from_dict, from_files, house_path, to_house, to_lightning  # noqa: E402
from seqlong.config_files import CONFIGS  # noqa: E402
from seqlong.errors import ConfigError  # noqa: E402

TOY = f"experiment={HERE / 'toy.yaml'}"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # so that files of the repository are told with their whole path


def line_of(path: Path, text: str) -> int:
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip().startswith(text))


# --- composition -----------------------------------------------------------------------------------------------------


def test_groups_experiment_and_overrides_compose_in_this_order() -> None:
    composed = compose([TOY, "data.path=a.fa", "trainer.max_steps=9", "model.backbone.mixers.m.init_args.d_state=64"])
    config = composed.lightning
    assert config["trainer"]["max_steps"] == 9, "the command line beats the experiment"
    assert config["trainer"]["val_check_interval"] == 3, "the experiment beats the group"
    assert config["trainer"]["gradient_clip_val"] == 1.0
    assert config["model"]["class_path"] == "toys.ToyTask"
    assert config["model"]["init_args"]["backbone"]["mixers"]["m"]["init_args"]["d_state"] == 64
    assert config["data"] == {"class_path": "toys.ToyData", "init_args": {"path": "a.fa", "length": 16}}
    assert config["run"]["name"] == "toy"
    assert config["seed_everything"] == 0
    assert "seqlong.callbacks.Checkpoints" in [node["class_path"] for node in config["trainer"]["callbacks"]]


def test_settings_that_no_yaml_names_can_be_set_without_a_plus() -> None:
    config = compose([TOY, "data.path=a", "trainer.limit_val_batches=7", "task.pause=0.5"]).lightning
    assert config["trainer"]["limit_val_batches"] == 7
    assert config["model"]["init_args"]["pause"] == 0.5


def test_hardware_is_chosen_by_what_there_is_and_can_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert compose([TOY, "data.path=a"]).house["trainer"]["precision"] == "bf16-mixed"
    assert compose([TOY, "data.path=a", "hardware=cpu"]).house["trainer"]["precision"] == "32-true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compose([TOY, "data.path=a"]).house["trainer"]["accelerator"] == "cpu"


def test_a_callback_can_be_left_out() -> None:
    config = compose([TOY, "data.path=a", "~trainer.callbacks.progress"]).lightning
    assert "seqlong.callbacks.Progress" not in [node["class_path"] for node in config["trainer"]["callbacks"]]


def test_the_two_forms_are_inverse() -> None:
    house = compose([TOY, "data.path=a"]).house
    lightning = to_lightning(house)
    assert to_lightning(to_house(lightning)) == lightning
    assert to_house(lightning) == {key: house[key] for key in to_house(lightning)}
    assert callback_name({"class_path": "a.FiniteGuard"}) == "finite_guard"


def test_two_callbacks_of_one_class_stay_two() -> None:
    twins = [{"class_path": "a.Foo", "init_args": {"i": number}} for number in (1, 2)]
    lightning = {"trainer": {"callbacks": twins}}
    assert list(to_house(lightning)["trainer"]["callbacks"]) == ["foo", "foo_2"]
    assert to_lightning(to_house(lightning))["trainer"]["callbacks"] == twins
    assert house_path(["trainer", "callbacks", 1, "init_args", "i"], lightning)[2] == "foo_2"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (["model", "init_args", "backbone", "d_model"], "model.backbone.d_model"),
        (["model", "init_args", "lr"], "task.lr"),
        (["data", "init_args", "path"], "data.path"),
        (["trainer", "callbacks", 1, "init_args", "x"], "trainer.callbacks.my_guard.init_args.x"),
        (["trainer", "max_steps"], "trainer.max_steps"),
    ],
)
def test_paths_are_told_as_people_write_them(path: list[Any], expected: str) -> None:
    config = {"trainer": {"callbacks": [{"class_path": "a.B"}, {"class_path": "a.MyGuard"}]}}
    assert ".".join(map(str, house_path(path, config))) == expected


def test_overrides_on_a_finished_configuration(tmp_path: Path) -> None:
    stored = compose([TOY, "data.path=a"]).lightning
    config = from_dict(stored, ["data.path=b", "task.lr=1e-4", "~trainer.callbacks.progress"]).lightning
    assert config["data"]["init_args"]["path"] == "b" and config["model"]["init_args"]["lr"] == 1e-4
    assert len(config["trainer"]["callbacks"]) == len(stored["trainer"]["callbacks"]) - 1
    with pytest.raises(ConfigError, match="'trainer=default' chooses a config group"):
        from_dict(stored, ["trainer=default"])
    path = tmp_path / "c.yaml"
    path.write_text("model: {class_path: toys.ToyTask, init_args: {lr: 1e-4}}\n")
    assert from_files([path]).lightning["model"]["init_args"]["lr"] == 1e-4, "1e-4 is a number"


def test_words_and_flags_are_told_apart() -> None:
    words = ["a.b=1", "--ckpt_path", "runs/x=1.ckpt", "--trainer.devices", "2", "~c", "--print_config", "+d=2", "--e=3"]
    assert split(words) == (
        ["a.b=1", "~c", "+d=2"],
        ["--ckpt_path=runs/x=1.ckpt", "--trainer.devices=2", "--print_config", "--e=3"],
    )
    with pytest.raises(ConfigError, match="--ckpt_path needs a value"):
        split(["--ckpt_path"])


def test_every_yaml_of_the_groups_can_be_located_and_has_a_description() -> None:
    from seqlong.config_files import groups, options, summary

    assert {"trainer", "hardware", "model", "experiment"} <= set(groups())
    for group in groups():
        for option in options(group):
            assert summary(group, option), f"configs/{group}/{option}.yaml begins with no describing comment"


# --- mistakes --------------------------------------------------------------------------------------------------------

TOY_FILE, DEFAULT = HERE / "toy.yaml", CONFIGS / "trainer" / "default.yaml"


def fails(*words: str) -> str:
    """Run `seqlong fit` and return what it says on stderr; it must be short and exit with 2."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["fit", *words]) == 2
    text = err.getvalue().strip()
    assert "Traceback" not in text and "Union" not in text and len(text) < 600, text
    return text


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("foo", "'foo' has no '='. Settings are given as key=value, such as trainer.max_steps=100"),
        ("trainer=defalt", "there is no trainer=defalt; did you mean 'default'?"),
        ("trainer.max_stepz=1", f"trainer.max_stepz is not a setting of Trainer; did you mean 'max_steps'? "
         f"That one is set in {TOY_FILE}:{line_of(TOY_FILE, 'max_steps:')} (given on the command line"),
        ("trainer.gradient_clip_vall=1", f"'gradient_clip_val'? That one is set in "
         f"{DEFAULT}:{line_of(DEFAULT, 'gradient_clip_val:')}"),
        ("trainer.max_steps=abc", f"trainer.max_steps: found 'abc' (str), expected int (set in "
         f"{TOY_FILE}:{line_of(TOY_FILE, 'max_steps:')})"),
        ("data.lenght=3", f"data.lenght is not a setting of ToyData; did you mean 'length'? That one is set in "
         f"{TOY_FILE}:{line_of(TOY_FILE, 'length:')}"),
        ("data.length=[1]", "data.length: found [1] (list), expected int"),
        ("task.lrr=1", "task.lrr is not a setting of ToyTask; did you mean 'lr'?"),
        ("model.backbone.d_modle=3", "model.backbone.d_modle is not a setting of ToyConfig; did you mean 'd_model'?"),
        ("model.backbone.d_model=z", "model.backbone.d_model: found 'z' (str), expected int"),
        ("model.backbone.mixers.m.init_args.d_stat=3", "model.backbone.mixers.m.init_args.d_stat is not a setting of "
         f"LinearMixer; did you mean 'd_state'? That one is set in {TOY_FILE}:{line_of(TOY_FILE, 'd_state:')}"),
        ("model.backbone.mixers.m.init_args.d_state=q", "mixers.m.init_args.d_state: found 'q' (str), expected int"),
        ("model.backbone.mixers.x.init_args.d_state=1", "model.backbone.mixers.x is not defined; there are: m"),
        ("model.backbone.mixers.m.class_path=toys.LinerMixer", "toys has no class 'LinerMixer'; did you mean "
         "'LinearMixer'?"),
        ("data.class_path=nowhere.Data", "data.class_path: there is no module 'nowhere'"),
        ("trainr.max_steps=1", "trainr is not a part of a configuration; did you mean 'trainer'?"),
        ("trainer.callbacks.progres.init_args.every=1", "trainer.callbacks.progres has no class_path; did you mean "
         "'progress'?"),
        ("trainer.callbacks.progress.init_args.evry=1", "trainer.callbacks.progress.init_args.evry is not a setting "
         "of Progress; did you mean 'every'?"),
        ("~trainer.callbacks.progres", "'~trainer.callbacks.progres' removes nothing"),
        ("trainer.precision=bf17-mixed", "trainer.precision: found 'bf17-mixed' (str), expected one of"),
        ("trainer.strategy=dpp", "trainer: You selected an invalid strategy name: `strategy='dpp'`"),
        ("task.lr=[1", "cannot read 'task.lr=[1'"),
        ("--trainer.devicez=2", "--trainer.devicez is no flag; did you mean 'trainer.devices'?"),
        ("--trainer.max_steps=abc", "trainer.max_steps: Expected a int. Got value: abc"),
        ("--ckpt_path=nope.ckpt", "there is no checkpoint nope.ckpt; expected a file, a run folder, 'last' or 'best'"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line(word: str, expected: str) -> None:
    assert expected in fails(TOY, "data.path=x", word)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  lr: 0.01", "  lrr: 0.01", "mine.yaml:{line}: task.lrr is not a setting of ToyTask; did you mean 'lr'?"),
        ("  max_steps: 6", "  max_stepz: 6", "mine.yaml:{line}: trainer.max_stepz is not a setting of Trainer"),
        ("  length: 16", "  length: long", "mine.yaml:{line}: data.length: found 'long' (str), expected int"),
        ("    d_model: 8", "    d_model: ${{nope.x}}", "mine.yaml:{line}: model.backbone.d_model: "),
        ("    d_model: 8", "    d_model: [8", "mine.yaml:"),
        ("  - override /task: null", "  - override /task: null\n  - override /trainer: defalt",
         "mine.yaml:{line}: there is no trainer=defalt; "
         "did you mean 'default'?"),
    ],
)  # fmt: skip
def test_a_mistake_in_ones_own_yaml_is_told_with_its_line(old: str, new: str, expected: str, tmp_path: Path) -> None:
    new = new.replace("{{", "{").replace("}}", "}")
    text = TOY_FILE.read_text()
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new))
    assert expected.replace("{line}", str(line_of(path, new.strip().splitlines()[-1].strip()))) in fails(
        "experiment=mine.yaml", "data.path=x"
    )


def test_a_missing_value_names_the_key_the_line_and_how_to_give_it() -> None:
    place = f"{TOY_FILE}:{line_of(TOY_FILE, 'path:')}"
    assert (
        fails(TOY) == f"{place}: data.path is not set (a FASTA file). Give it on the command line: data.path=my.fa.gz"
    )


def test_no_experiment_and_files_of_the_wrong_kind() -> None:
    assert "no experiment is chosen. Give one, such as experiment=" in fails()
    assert fails("experiment=nope.yaml") == "there is no file nope.yaml"
    assert f"Give it as experiment={TOY_FILE}" in fails("--config", str(TOY_FILE))
    assert "there is no experiment=dna/dmo" in fails("experiment=dna/dmo")


def test_a_class_given_inline_takes_the_place_of_another_with_all_its_settings() -> None:
    words = ["experiment=dna/demo", "model.backbone.mixers.m={class_path: seqlong.mixers.GLA, init_args: {heads: 2}}"]
    mixer = compose(words).house["model"]["backbone"]["mixers"]["m"]
    assert mixer == {"class_path": "seqlong.mixers.GLA", "init_args": {"heads": 2}}


def test_a_model_of_ones_own_is_a_file_like_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (CONFIGS / "model" / "hybrid_small.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("d_model: 128", "d_model: 96"))
    made = compose(["experiment=dna/demo", "model=mine.yaml"])
    assert made.house["model"]["backbone"]["d_model"] == 96
    assert made.house["run"]["name"] == "dna-demo-mine"
    path, line = made.where(["model", "init_args", "backbone", "d_model"]) or (None, 0)
    assert path == Path("mine.yaml") and "d_model: 96" in (tmp_path / "mine.yaml").read_text().splitlines()[line - 1]
    with pytest.raises(ConfigError, match=r"there is no file other.yaml"):
        compose([TOY, "model=other.yaml"])
