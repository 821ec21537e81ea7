"""`push` and `pull` against a stand-in for huggingface.co: what arrives, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

import lora_jax as lj
from lora_jax.cli.main import main
from lora_jax.hub.files import is_ours, leads_outside
from lora_jax.io.run_adapter import load_trainable
from lora_jax.io.safetensors import read_tensors
from lora_jax.report.statistics import mean_interval
from lora_jax.train.record import Card
from tests.hub.conftest import CELLS, REPO, set_endpoint, set_offline
from tests.hub.server import START, TOKEN, Repo, running
from tests.train.test_completion_training import make_config as completion_config

# huggingface_hub's own call of its HTTP library, for which it has another word now.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
FIRST, SECOND = CELLS
ARGS = [f"--repo={REPO}", "--license=apache-2.0"]
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}


def push(cell, *more):
    return main(["push", str(cell), *ARGS, *more])


def said(capsys):
    """The one line on standard error, and nothing on standard output."""
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("lora-jax: "), captured.err
    assert not captured.out
    return captured.err


# --- the way there and back


def test_a_pulled_folder_has_the_bits_that_were_pushed_and_all_commands_read_it(
    pushed, tmp_path, capsys
):
    out = tmp_path / "pulled"
    capsys.readouterr()
    assert main(["pull", REPO, f"--out={out}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == [FIRST]
    written = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert written == set(found["files"])  # no cache of the downloader's
    cell = out / "cells" / FIRST
    for part in ("card.json", "test_predictions.npz", "config.json", "metrics.jsonl"):
        assert (cell / part).read_bytes() == (pushed / part).read_bytes()
    (was, described), (now, again) = (load_trainable(c / "adapter") for c in (pushed, cell))
    assert described == again and was.keys() == now.keys()
    for path, entry in was.items():
        for part, array in entry.items():
            np.testing.assert_array_equal(np.asarray(array), np.asarray(now[path][part]))
    # PEFT's half has the same factors, transposed.
    tensors = read_tensors(out / "adapter_model.safetensors")
    factors = [np.asarray(x["a"]).T.tobytes() for x in was.values() if "a" in x]
    assert sorted(factors) == sorted(x.tobytes() for n, x in tensors.items() if "lora_A" in n)

    # The folder stands for its one run with weights: its pack's other cells bring none.
    assert main(["inspect", str(out), "--json"]) == 0
    card = Card.read(pushed / "card.json")
    assert json.loads(capsys.readouterr().out)["trainable"] == card.counts.total
    texts = ["a lovely film", "dull"]
    ours, theirs = lj.predict(pushed, texts), lj.predict(out, texts)
    np.testing.assert_array_equal(ours.probabilities, theirs.probabilities)
    assert main(["verify", str(out), "--no-progress"]) == 0
    assert capsys.readouterr().out.count("the same, bit for bit") == 2
    adapted = lj.load_adapter(out, lj.load_adapter(pushed).model)
    assert adapted.trainable.keys() == was.keys()


@pytest.mark.slow
def test_what_was_changed_on_the_way_does_not_verify(hub, pushed, tmp_path, capsys):
    repo = hub.repos[REPO]
    name = f"cells/{FIRST}/card.json"
    card = json.loads(repo.files()[name])
    card["metrics"]["test"]["loss"] += 1e-7
    repo.commit("main", {**repo.files(), name: json.dumps(card).encode()})
    assert main(["pull", REPO, f"--out={tmp_path / 'out'}"]) == 0
    assert main(["verify", str(tmp_path / "out"), "--no-progress"]) == 1
    assert "DIFFERS: metrics.test" in capsys.readouterr().out


def test_a_dry_run_shows_all_of_it_and_sends_nothing(hub, trained, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")  # not even a token is needed
    assert push(trained / "cells" / FIRST, "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert push(trained / "cells" / FIRST, "--dry-run") == 0
    text = capsys.readouterr().out
    assert hub.requests == [] and hub.repos == {} and told["url"] is None
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push(trained / "cells" / FIRST) == 0
    sent = {name: len(x) for name, x in hub.repos[REPO].files().items() if name[0] != "."}
    assert sent == told["files"]
    assert hub.repos[REPO].files()["README.md"].decode() == told["card"]
    assert told["card"] in text and all(f"{n:,}  {name}" in text for name, n in sent.items())


def test_only_the_pack_travels_with_it_and_without_weights(hub, pushed):
    names = set(hub.repos[REPO].files())
    theirs = {name for name in names if name.startswith(f"cells/{SECOND}/")}
    assert theirs == {f"cells/{SECOND}/{n}" for n in ("card.json", "test_predictions.npz")}
    assert not [n for n in names if "checkpoint" in n or "events" in n or "tensorboard" in n]


def test_one_commit_holds_all_and_the_next_removes_what_is_gone(hub, pushed, trained):
    repo = hub.repos[REPO]
    assert len(repo.commits) == 2
    repo.commit("main", {**repo.files(), "notes.txt": b"mine", "cells/old/card.json": b"{}"})
    assert push(trained / "cells" / SECOND) == 0
    names = set(repo.files())
    assert "cells/old/card.json" not in names and "notes.txt" in names
    runs = {n.split("/")[1] for n in names if n.endswith("trainable.safetensors")}
    assert runs == {SECOND}


def test_a_revision_is_a_branch_of_its_own(hub, pushed, trained, tmp_path):
    repo = hub.repos[REPO]
    before = repo.branches["main"]
    assert push(trained / "cells" / SECOND, "--revision=other") == 0
    assert repo.branches["main"] == before != repo.branches["other"]
    assert lj.hub.pull(REPO, tmp_path / "a").runs == (FIRST,)
    assert lj.hub.pull(REPO, tmp_path / "b", revision="other").runs == (SECOND,)
    assert lj.hub.pull(REPO, tmp_path / "c", revision=before).commit == before


@pytest.mark.slow
def test_a_process_of_its_own_finds_the_hub_by_hf_endpoint(trained, tmp_path):
    with running() as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
        for argv in (["push", str(trained / "cells" / FIRST), *ARGS], ["pull", REPO, "--out=new"]):
            done = subprocess.run(
                [sys.executable, "-m", "lora_jax", *argv], env=env, cwd=tmp_path, text=True,
                capture_output=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} - {"hf"} == {"new"}
    assert (tmp_path / "new" / "cells" / FIRST / "card.json").is_file()


# --- the card


def test_the_card_says_what_the_record_says(hub, pushed):
    text = hub.repos[REPO].files()["README.md"].decode()
    card, parsed = Card.read(pushed / "card.json"), ModelCard(text)
    for value in (card.config_hash, card.base_hash, card.data_hash, card.commit, "hu2022lora"):
        assert value in parsed.text
    assert "lora-jax verify adapter" in text and f"seed {card.seeds['seed']}" in text
    data = parsed.data
    assert (data.license, data.library_name) == ("apache-2.0", "peft")
    assert data.pipeline_tag == "text-classification"
    (found,) = yaml.safe_load(text.split("---")[1])["model-index"]
    values = {one["type"]: one for one in found["results"][0]["metrics"]}
    assert values["loss"]["value"] == pytest.approx(card.metrics.test.loss, rel=1e-6)
    assert values["accuracy"]["value"] == pytest.approx(card.metrics.test.accuracy, rel=1e-6)
    with np.load(pushed / "test_predictions.npz") as saved:
        loss = saved["loss"].astype(np.float64)
    # A bootstrap interval of a mean is near the normal one.
    low, high = values["loss"]["args"]["interval_95"]
    half = 1.96 * loss.std() / np.sqrt(len(loss))
    assert low == pytest.approx(loss.mean() - half, abs=0.3 * half)
    assert high == pytest.approx(loss.mean() + half, abs=0.3 * half)


def test_several_seeds_have_a_column_with_an_interval_over_them(hub, pushed):
    text = hub.repos[REPO].files()["README.md"].decode()
    runs = [np.load(pushed.parent / name / "test_predictions.npz") for name in CELLS]
    order = [run["loss"][np.argsort(run["index"])].astype(np.float64) for run in runs]
    wanted = mean_interval(np.stack(order), seed=0)
    (row,) = re.findall(r"\| cross-entropy \(nats\) \|(.*)\|(.*)\|", text)
    assert "mean of 2 seeds" in text and "seeds ((0, 0), (1, 0))" not in text
    shown = [float(x) for x in re.findall(r"[\d.]+", row[1])]
    assert shown == pytest.approx([wanted.estimate, wanted.low, wanted.high], abs=6e-5)


def test_a_base_has_the_name_that_others_find_it_by(hub, trained, workdir, capsys):
    assert push(trained / "cells" / FIRST, "--base-model=owner/base") == 0
    files = hub.repos[REPO].files()
    assert ModelCard(files["README.md"].decode()).data.base_model == "owner/base"
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "owner/base"
    # The record is as it was, or its hash would not hold.
    card = f"cells/{FIRST}/card.json"
    assert files[card] == (trained / card).read_bytes()


def test_the_files_of_this_machine_in_the_settings_are_named(hub, trained, capsys):
    assert push(trained / "cells" / FIRST) == 0
    path = Card.read(trained / "cells" / FIRST / "card.json").config["data"]["path"]
    assert f"note: the record names files of this machine: data.path={path}" in (
        capsys.readouterr().err
    )
    text = hub.repos[REPO].files()["README.md"].decode()
    assert path not in text.partition("The command that trains it again")[0]


@pytest.mark.slow
def test_a_language_model_is_shown_with_its_own_class(tmp_path, capsys):
    config = completion_config({"train.num_steps": 2, "method.rank": 2})
    lj.train(config, tmp_path / "w", "run", progress=False)
    assert push(tmp_path / "w", "--dry-run", "--json", "--base-model=owner/base") == 0
    told = json.loads(capsys.readouterr().out)
    assert "head.safetensors" not in told["files"] and not told["notes"]
    assert ModelCard(told["card"]).data.pipeline_tag == "text-generation"
    assert 'AutoModelForCausalLM.from_pretrained("owner/base")' in told["card"]
    assert push(tmp_path / "w", "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert "which lora_jax alone knows" in told["notes"][0] and "peft import" not in told["card"]


# --- what is refused before anything is sent


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([f"--repo={REPO}"], "the licence is missing; say"),
        ([f"--repo={REPO}", "--license=Apache 2"], "no short name of a licence"),
        (["--repo=x", "--license=mit"], "'x' is no repository of the hub; give it as owner/name"),
        (["--repo=me/../x", "--license=mit"], "give it as owner/name"),
        ([*ARGS, "--token=hf_secret"], "`hf auth login`, or set HF_TOKEN"),
        ([*ARGS, "--tokn"], "unknown argument '--tokn'"),
        (["--license=mit"], "--repo"),
    ],
)
def test_a_bad_request_is_one_line_and_asks_the_hub_nothing(hub, trained, more, words, capsys):
    assert main(["push", str(trained / "cells" / FIRST), *more]) == 2
    line = said(capsys)
    assert words in line and "hf_secret" not in line
    assert hub.requests == []


def test_without_a_token_nothing_is_begun(hub, trained, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert push(trained / "cells" / FIRST) == 2
    assert "needs a token" in said(capsys) and hub.requests == []


def test_an_unfinished_a_failed_and_a_kept_run_are_not_pushed(hub, workdir, capsys):
    cell = workdir / "cells" / FIRST
    shutil.move(cell / "adapter", workdir / "elsewhere")
    assert push(cell) == 2
    assert "a copy without weights; push the run itself" in said(capsys)
    (cell / "card.json").unlink()
    assert push(cell) == 2
    assert "is not finished: it has no card.json; run its `lora-jax train`" in said(capsys)
    (cell / "failure.json").write_text("{}")
    assert push(cell) == 2
    assert "failed, as its failure.json says" in said(capsys)
    assert hub.requests == []


def test_damaged_weights_and_links_are_not_pushed(hub, workdir, tmp_path, capsys):
    cell = workdir / "cells" / FIRST
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (cell / "metrics.jsonl").unlink()
    (cell / "metrics.jsonl").symlink_to(secret)
    assert push(cell) == 2
    assert "is a link to" in said(capsys)
    shutil.copytree(workdir / "cells" / SECOND / "adapter", cell / "adapter", dirs_exist_ok=True)
    assert push(cell) == 2
    assert "one of the files was changed" in said(capsys)
    assert hub.requests == []


def test_a_pack_that_lost_a_cell_is_pushed_with_a_note(hub, workdir, capsys):
    shutil.rmtree(workdir / "cells" / SECOND)
    assert push(workdir / "cells" / FIRST) == 0
    assert f"({SECOND}); it can be verified with --alone" in capsys.readouterr().err


METHODS = ["full", *(pytest.param(m, marks=pytest.mark.slow) for m in ("bitfit", "head"))]


@pytest.mark.parametrize("method", METHODS)
def test_what_peft_cannot_hold_names_the_way_out(hub, make_config, tmp_path, method, capsys):
    config = make_config({"train.num_steps": 2, "method.name": method})
    lj.train(config, tmp_path / "w", "run", progress=False)
    assert push(tmp_path / "w") == 2
    line = said(capsys)
    assert "cannot be pushed as an adapter" in line and "`lora-jax merge` writes a model" in line
    assert hub.requests == []


@pytest.mark.slow
def test_a_base_that_only_this_machine_has_needs_a_name(hub, make_config, tmp_path, capsys):
    base = tmp_path / "base"
    tiny = lj.load_model("tiny-bert")
    lj.save_model(base, tiny, tiny.params)
    config = make_config({"train.num_steps": 2, "method.rank": 2, "model.name": str(base)})
    lj.train(config, tmp_path / "w", "run", progress=False)
    assert push(tmp_path / "w") == 2
    assert "name it as the hub does: --base-model=owner/name" in said(capsys)
    assert push(tmp_path / "w", "--base-model=owner/base") == 0
    note = capsys.readouterr().err
    assert f"model.name={base}" in note
    files = hub.repos[REPO].files()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "owner/base"


# --- what the hub refuses


FAULTS = {
    "token refused": ("GET /api/models", 401, "does not accept your token"),
    "no right to create": ("POST /api/repos/create", 403, "has no right to do that"),
    "taken meanwhile": ("POST /api/repos/create", 409, "it conflicts with what is there"),
    "creating fails": ("POST /api/repos/create", 500, "the hub failed; try again later"),
    "no right to write": ("POST .*/preupload", 403, "has no right"),
    "gone meanwhile": ("POST .*/preupload", 404, "there is nothing of that name"),
    "uploading fails": ("PUT /lfs", 500, "the hub failed; try again later"),
    "upload cut off": ("PUT /lfs", "close", "the connection broke"),
    "batch fails": ("POST .*objects/batch", 500, "the hub failed"),
    "commit refused": ("POST .*/commit/", 409, "it conflicts"),
    "commit too late": ("POST .*/commit/", 412, "somebody else pushed at the same time"),
    "commit fails": ("POST .*/commit/", 500, "the hub failed; try again later"),
    "commit cut off": ("POST .*/commit/", "close", "the connection broke"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_push_that_fails_is_one_line_and_commits_nothing(hub, trained, name, capsys, tmp_path):
    request, fault, words = FAULTS[name]
    hub.faults[request] = fault
    assert push(trained / "cells" / FIRST) == 2
    line = said(capsys)
    assert words in line and f"push to {REPO}" in line
    made = REPO in hub.repos
    assert f"{REPO} was created, and holds nothing yet" in line if made else True
    assert not made or list(hub.repos[REPO].commits) == [START]


def test_after_an_upload_that_broke_off_the_same_command_goes_through(hub, trained, capsys):
    hub.faults["PUT /lfs"] = "close"
    assert push(trained / "cells" / FIRST) == 2
    hub.faults.clear()
    assert push(trained / "cells" / FIRST) == 0
    assert len(hub.repos[REPO].commits) == 2


def test_a_wrong_token_is_said_to_be_one(hub, trained, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert push(trained / "cells" / FIRST) == 2
    line = said(capsys)
    assert "does not accept your token; log in" in line and "hf_another" not in line


def test_no_hub_there_is_one_line(hub, trained, tmp_path, capsys, monkeypatch):
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert push(trained / "cells" / FIRST) == 2
    assert "the hub does not answer" in said(capsys)
    assert main(["pull", REPO, f"--out={tmp_path / 'out'}"]) == 2
    assert "the hub does not answer" in said(capsys)
    set_offline(monkeypatch, True)
    assert main(["pull", REPO, f"--out={tmp_path / 'out'}"]) == 2
    assert "HF_HUB_OFFLINE is set" in said(capsys)
    assert not list(tmp_path.iterdir())


def test_a_licence_that_the_hub_does_not_know_is_its_own_words(hub, trained, capsys):
    assert push(trained / "cells" / FIRST, "--license=apache2") == 2
    assert '"license" must be one of' in said(capsys)


def test_private_is_never_public(hub, trained, capsys):
    hub.repos[REPO] = Repo(private=False)
    assert push(trained / "cells" / FIRST, "--private") == 2
    assert f"{REPO} exists and is public" in said(capsys)
    assert list(hub.repos[REPO].commits) == [START]
    del hub.repos[REPO]
    assert push(trained / "cells" / FIRST, "--private") == 0
    assert hub.repos[REPO].private


def test_a_repository_of_something_else_is_left_alone(hub, trained, capsys):
    repo = hub.repos[REPO] = Repo(private=False)
    repo.commit("main", {"config.json": b"{}", "README.md": b"mine"})
    assert push(trained / "cells" / FIRST) == 2
    assert "holds something else already (config.json)" in said(capsys)
    assert repo.files()["README.md"] == b"mine"
    assert push(trained / "cells" / FIRST, "--force") == 0
    assert repo.files()["config.json"] == b"{}" and "adapter_config.json" in repo.files()


# --- pulling


PULL_FAULTS = {
    "not allowed": ("GET /api/models", 403, "has no right"),
    "listing fails": ("GET /api/models", 500, "the hub failed"),
    "listing cut off": ("GET /api/models", "close", "the connection broke"),
    "a file is gone": ("HEAD .*card.json", 404, "there is nothing of that name"),
    "a file fails": ("HEAD .*card.json", 500, "the hub failed"),
    "a file is cut off": ("GET .*card.json", "close", "the connection broke"),
}


@pytest.mark.parametrize("name", PULL_FAULTS)
def test_a_pull_that_fails_is_one_line_and_writes_nothing(hub, pushed, name, capsys, tmp_path):
    request, fault, words = PULL_FAULTS[name]
    hub.faults[request] = fault
    assert main(["pull", REPO, f"--out={tmp_path / 'new' / 'out'}"]) == 2
    assert words in said(capsys)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not (tmp_path / "new" / "out").exists()


@pytest.mark.parametrize(
    "name", ["../escaped", "cells/../../escaped", "/tmp/escaped", "cells/a/../../../escaped"]
)
def test_a_name_that_leads_outside_writes_nothing(hub, pushed, name, tmp_path, capsys):
    repo = hub.repos[REPO]
    repo.commit("main", {**repo.files(), name: b"gotcha"})
    before = set(tmp_path.rglob("*"))
    assert main(["pull", REPO, f"--out={tmp_path / 'out'}"]) == 2
    assert f"lists a file {name!r}, which leads out of the folder" in said(capsys)
    assert set(tmp_path.rglob("*")) == before
    assert not [r for r in hub.requests if "/resolve/" in r]


def test_a_repository_without_an_adapter_is_named(hub, tmp_path, capsys):
    hub.repos[REPO] = Repo(private=False)
    assert main(["pull", REPO, f"--out={tmp_path / 'out'}"]) == 2
    assert "holds no adapter in PEFT's format: it has no adapter_config.json" in said(capsys)
    hub.repos[REPO].commit("main", {**ADAPTER, "adapter_config.json": b'{"peft_type": "IA3"}'})
    assert main(["pull", REPO, f"--out={tmp_path / 'out'}"]) == 2
    line = said(capsys)
    assert f"{REPO} holds no adapter that can be read here: adapter_config.json" in line
    assert "IA3" in line
    assert not list(tmp_path.iterdir())


def test_a_repository_that_is_not_there_is_one_line(hub, tmp_path, capsys, monkeypatch):
    for _ in ("with a token", "without"):
        assert main(["pull", REPO, f"--out={tmp_path / 'out'}"]) == 2
        assert "there is no such repository, or it is private" in said(capsys)
        monkeypatch.delenv("HF_TOKEN", raising=False)


def test_a_target_that_exists_is_told_before_the_hub_is_asked(hub, tmp_path, capsys):
    assert main(["pull", REPO, f"--out={tmp_path}"]) == 2
    assert f"{tmp_path} exists already" in said(capsys) and hub.requests == []


def test_a_revision_that_is_not_there_is_named(hub, pushed, tmp_path, capsys):
    assert main(["pull", REPO, f"--out={tmp_path / 'out'}", "--revision=nope"]) == 2
    assert "has no such revision" in said(capsys)


def test_other_bytes_than_those_listed_are_not_kept(hub, pushed, tmp_path, capsys):
    name = "adapter_model.safetensors"
    data = hub.repos[REPO].files()[name]
    hub.lies[name] = data[:-1] + bytes([data[-1] ^ 1])
    capsys.readouterr()
    assert main(["pull", REPO, f"--out={tmp_path / 'out'}"]) == 2
    assert f"{name} of {REPO} came damaged" in said(capsys)
    assert not (tmp_path / "out").exists()


def test_only_files_that_are_known_are_fetched(hub, pushed, tmp_path):
    repo = hub.repos[REPO]
    odd = {"training_args.bin": b"pickle", "cells/r2-s0/.hidden": b"", "cells/.x/card.json": b""}
    repo.commit("main", {**repo.files(), **odd})
    found = lj.hub.pull(REPO, tmp_path / "out")
    assert not odd.keys() & found.files.keys()
    assert all(is_ours(name) and not leads_outside(name) for name in found.files)


def test_an_adapter_of_peft_alone_is_pulled_too(hub, pushed, trained, tmp_path):
    repo = hub.repos[REPO]
    mine = {n: x for n, x in repo.files().items() if "/" not in n}
    hub.repos["me/plain"] = Repo(private=True)
    hub.repos["me/plain"].commit("main", mine)
    found = lj.hub.pull("me/plain", tmp_path / "out")
    assert found.runs == () and set(found.files) == {n for n in mine if n[0] != "."}
    model = lj.load_adapter(trained / "cells" / FIRST).model
    assert lj.load_adapter(tmp_path / "out", model).trainable
