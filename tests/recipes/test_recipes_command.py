"""`prefopt recipes` lists and copies what the package ships; `prefopt env` hides what is secret."""

import shutil
from pathlib import Path

import pytest
import yaml

from prefopt import cli
from prefopt.recipes import env as environment
from prefopt.recipes import pipeline, sweep
from prefopt.recipes import recipes as gallery

SHIPPED = {path.parent.name for path in Path(gallery.__file__).parent.glob("*/*.yaml")}


@pytest.mark.parametrize("command", [[], ["list"]])
def test_every_folder_is_listed_with_a_line(capsys, command):
    assert cli.main(["recipes", *command]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line and line.split()[0] in SHIPPED}
    assert set(listed) == SHIPPED >= {"tiny", "accelerate"}
    assert all(len(text) > 10 for text in listed.values())


def test_a_copy_is_byte_for_byte_and_overwrites_nothing_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["recipes", "copy", "tiny"])
    home = Path(gallery.__file__).parent / "tiny"
    names = {path.name for path in home.iterdir() if path.is_file()}
    assert {path.name for path in Path("tiny").iterdir()} == names >= {"pipeline.yaml", "README.md"}
    assert all(Path("tiny", name).read_bytes() == (home / name).read_bytes() for name in names)
    assert str(Path("tiny/README.md")) in capsys.readouterr().out
    Path("tiny/dpo.yaml").write_text("beta: 9\n")
    for folder in ("tiny", "."):
        Path("dpo.yaml").write_text("beta: 9\n")
        with pytest.raises(SystemExit, match=r"is there already .* --force"):
            cli.main(["recipes", "copy", "tiny", folder])
    assert Path("tiny/dpo.yaml").read_text() == Path("dpo.yaml").read_text() == "beta: 9\n"
    assert not Path("pipeline.yaml").exists()  # nothing is copied where a part would be overwritten
    cli.main(["recipes", "copy", "tiny", "--force"])
    assert Path("tiny/dpo.yaml").read_bytes() == (home / "dpo.yaml").read_bytes()


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(SystemExit, match=r"no recipe 'tinny'; there are .*tiny"):
        cli.main(["recipes", "copy", "tinny"])


def test_a_copied_pipeline_reads_the_files_beside_it(tmp_path, monkeypatch):
    """The step files are those of the folder the YAML is in, wherever that is."""
    monkeypatch.chdir(tmp_path)
    cli.main(["recipes", "copy", "tiny", "mine"])
    seen = []
    monkeypatch.setattr(pipeline.Pipeline, "run", lambda self: seen.append(self))
    cli.main(["pipeline", "--config", "mine/pipeline.yaml"])
    assert seen[0].configs == Path("mine")
    assert seen[0].args.corpus_documents == yaml.safe_load(Path("mine/pipeline.yaml").read_text())["corpus_documents"]
    cli.main(["pipeline", "--seed", "3"])
    assert seen[1].configs == pipeline.TINY
    cli.main(["pipeline", "--config=mine/pipeline.yaml", "--config_dir", str(pipeline.TINY)])
    assert seen[2].configs == pipeline.TINY
    Path("mine/dpo.yaml").unlink()
    with pytest.raises(SystemExit, match=r"'mine' has no dpo\.yaml; `prefopt recipes copy tiny`"):
        cli.main(["pipeline", "--config", "mine/pipeline.yaml"])


def test_a_copied_sweep_reads_the_ppo_settings_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pipeline.TINY, "mine")
    seen = []

    class Recorder:
        def __init__(self, args):
            seen.append(args.ppo_config)

        def run(self):
            pass

    monkeypatch.setattr(sweep, "Sweep", Recorder)
    cli.main(["sweep", "--config", "mine/sweep.yaml"])
    cli.main(["sweep"])
    cli.main(["sweep", "--ppo_config", "other.yaml"])
    assert seen == [str(Path("mine/ppo_ptx.yaml")), str(pipeline.TINY / "ppo_ptx.yaml"), "other.yaml"]


def test_the_report_names_versions_and_hides_secrets(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["env"]) == 0
    shown = dict(line[2:].split(": ", 1) for line in capsys.readouterr().out.splitlines() if line.startswith("- "))
    for trainer in ("RankedRewardTrainer", "RankedDPOTrainer", "PPOPtxTrainer"):
        assert shown[trainer] == "works with them"
    import torch

    import prefopt

    assert shown["PyTorch version"] == torch.__version__
    assert shown["prefopt version"] == prefopt.__version__
    names = {"Transformers", "TRL", "PEFT", "bitsandbytes", "Datasets", "Accelerate", "vLLM", "lm-eval"}
    assert {f"{name} version" for name in names} <= set(shown)
    assert shown["HF_TOKEN"] == "set, not shown"
    assert shown["HF_HUB_OFFLINE"] == "1"
    assert shown["4-bit weights (bitsandbytes)"].startswith("work on ")


def test_what_does_not_work_is_told_with_its_reason():
    def broken() -> str:
        raise RuntimeError("no kernel image\nis available")

    assert environment._outcome(broken) == "do not work: RuntimeError: no kernel image is available"
