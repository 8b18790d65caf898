"""A checkpoint goes to the Hub with a card that loads it, in one commit, or not at all."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contextualstory_jax import StoryPipeline
from contextualstory_jax.__main__ import main
from contextualstory_jax.checkpoints.layout import write_weights
from contextualstory_jax.config.train_config import DataConfig, TrainConfig
from contextualstory_jax.data.shapes import TOKENIZER_DIR
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.sampling.export_formats import strip
from contextualstory_jax.sampling.pretrained import SHIPPED
from contextualstory_jax.sampling.prompts import Story
from contextualstory_jax.sampling.saved_story import SavedStory
from contextualstory_jax.testing.released_folders import stable_diffusion_folder, tiny_folder
from contextualstory_jax.utils.errors import UserError
from tests.helpers.hub import Hub, Repository, serve

REPO = "alice/stories"
SENTENCES = ("A cat sits.", 'It\'s "here".', "It jumps.", "It eats.", "It sleeps.")


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    with serve(monkeypatch, tmp_path / "hub") as hub:
        yield hub


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """A story folder as `generate` writes it with the tiny checkpoint."""
    return write_sample(tmp_path_factory.mktemp("samples") / "story")


def write_sample(folder: Path, step: int = 0, first_frame: np.ndarray | None = None) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    checkpoint = {"path": "x", "step": step, "weights": "ema"}
    story = Story(SENTENCES, first_frame=first_frame)
    SavedStory(story, images, None, (0,) * 5, checkpoint, {}).write(folder)
    return folder


def push(checkpoint: Path | str, *options: str | Path, repo: str = REPO) -> None:
    main(["push", str(checkpoint), repo, *map(str, options)])


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def run_python(card: str) -> np.ndarray:
    """The frames that the card's Python code generates."""
    names: dict = {}
    [code] = blocks(card, "python")
    exec(code, names)
    return names["frames"]


def run_bash(card: str) -> np.ndarray:
    """The frames that the card's command generates, in the current folder."""
    [command] = blocks(card, "bash")
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "contextualstory-jax"
    main(words[1:])
    return np.stack([np.asarray(Image.open(f"out/story/frame_{i}.png")) for i in range(5)])


def test_what_is_pushed_is_loaded_by_the_card_s_code(
    hub, tiny_checkpoint, sample, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    push(tiny_checkpoint, "--sample", sample, "--license", "apache-2.0")

    card = hub.repositories[REPO].files["README.md"].decode()
    expected = StoryPipeline.load(tiny_checkpoint)(list(SENTENCES), seed=0)
    np.testing.assert_array_equal(run_python(card), expected)
    np.testing.assert_array_equal(run_bash(card), expected)


def test_a_continuation_s_card_gives_its_first_frame(
    tiny_continuation_checkpoint, tmp_path, monkeypatch
):
    frame = np.full((16, 16, 3), 90, np.uint8)
    story = write_sample(tmp_path / "story", first_frame=frame)
    out = tmp_path / "out"

    push(tiny_continuation_checkpoint, "--sample", story, "--license", "mit", "--dry-run", out)

    card = (out / "README.md").read_text().replace(REPO, str(out))
    monkeypatch.chdir(out)
    expected = StoryPipeline.load(tiny_continuation_checkpoint)(
        list(SENTENCES), seed=0, image="first_frame.png"
    )
    np.testing.assert_array_equal(run_python(card), expected)
    assert "--first-frame first_frame.png" in blocks(card, "bash")[0]


@pytest.mark.slow
def test_the_shipped_model_s_card_generates_the_frames_that_it_shows(tmp_path):
    out = tmp_path / "out"

    push("shipped", "--dry-run", out)

    card = (out / "README.md").read_text()
    frames = run_python(card.replace(REPO, str(out)))
    sentences = re.findall(r'^    "(.*)",$', blocks(card, "python")[0], re.MULTILINE)
    assert (out / "sample.png").read_bytes() == strip(frames, sentences)


def test_the_shipped_model_s_card_says_what_is_recorded(tmp_path):
    out, sample = tmp_path / "out", write_sample(tmp_path / "story", step=4000)

    push("shipped", "--dry-run", out, "--sample", sample)

    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "| steps | 4,000 |" in card
    assert "| character f1 | 1.000 | 0.928 [0.91, 0.95] | 0.000 |" in card
    assert "mia, otto, zoe" in card
    assert StoryPipeline.load(out).step == 4000


def test_only_what_generates_is_uploaded_and_no_place_of_this_machine(
    hub, tiny_model_config, sample, tmp_path
):
    workdir = tmp_path / "workdir"
    params = StoryModel(tiny_model_config).init(0)
    state = {"unet": {"moment": np.zeros((30, 40), np.float32)}}
    write_weights(
        workdir,
        tiny_model_config,
        TOKENIZER_DIR,
        {"params": params, "ema_params": params, "progress": state, "dead": state},
        {"step": 0, "storyflow": [5.0] * 4},
    )
    config = TrainConfig(
        tiny_model_config,
        DataConfig("pororo", root="/home/alice/data/pororo"),
        init_from="/home/alice/sd21",
        steps=7,
    )
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (workdir / "metrics.jsonl").write_text("{}\n")

    push(workdir, "--sample", sample, "--license", "openrail++")

    files = hub.repositories[REPO].files
    assert {re.sub(r"(?<=ema_params/).*", "", name) for name in files} == {
        "README.md",
        "sample.png",
        "config.json",
        "model.json",
        *(f"tokenizer/{path.name}" for path in TOKENIZER_DIR.iterdir()),
        "checkpoints/0/_CHECKPOINT_METADATA",
        "checkpoints/0/meta/metadata",
        "checkpoints/0/ema_params/",
    }
    assert json.loads(files["checkpoints/0/meta/metadata"])["items"].keys() == {"ema_params"}
    assert json.loads(files["config.json"])["data"]["root"] == "pororo"
    card = files["README.md"].decode()
    assert "| data | PororoSV |" in card
    assert "| started from | sd21 |" in card
    for name, data in files.items():
        assert b"/home/alice" not in data and str(tmp_path).encode() not in data, name


def test_an_exported_folder_keeps_the_original_s_layout(sample, tmp_path):
    exported, out = tiny_folder(tmp_path / "exported"), tmp_path / "out"
    (exported / "notes.txt").write_text("private")

    push(exported, "--sample", sample, "--license", "openrail++", "--dry-run", out)

    theirs, ours = ({str(p.relative_to(d)) for d in [folder] for p in d.rglob("*.*")}
                    for folder in (exported, out))  # fmt: skip
    assert ours == theirs - {"notes.txt"} | {"README.md", "sample.png"}
    pipeline = StoryPipeline.from_pretrained(out, cache_dir=tmp_path / "cache")
    assert pipeline.step == 0


def test_an_interrupted_upload_is_completed_by_the_same_command(
    hub, tiny_checkpoint, sample, monkeypatch
):
    options = ("--sample", sample, "--license", "mit")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the library's attempts
    hub.uploads_left = 2

    with pytest.raises(
        UserError, match=f"^{REPO} is not uploaded .*the same command completes it$"
    ):
        push(tiny_checkpoint, *options)
    assert not hub.repositories[REPO].files
    sent = list(hub.uploads)
    hub.uploads_left = None
    push(tiny_checkpoint, *options)

    assert len(sent) == 2 < len(hub.uploads) == len(set(hub.uploads))
    assert len(hub.repositories[REPO].commits) == 1
    assert "model.json" in hub.repositories[REPO].files


def test_a_repository_that_is_there_is_updated_in_one_commit(hub, tiny_checkpoint, sample):
    stale = {"checkpoints/9/meta/metadata": b"{}", "unet/config.json": b"{}", "README.md": b"old"}
    own = {"LICENSE": b"mine", "images/cover.png": b"mine"}
    hub.repositories[REPO] = Repository({**stale, **own}, private=True, commits=["first"])

    push(tiny_checkpoint, "--sample", sample, "--license", "mit")

    repository = hub.repositories[REPO]
    assert repository.private
    assert repository.commits == ["first", "Upload weights of step 0 with contextualstory-jax"]
    assert own.items() <= repository.files.items()
    assert repository.files["README.md"] != b"old"
    assert not {"checkpoints/9/meta/metadata", "unet/config.json"} & repository.files.keys()


@pytest.mark.parametrize(("options", "private"), [((), False), (("--private",), True)])
def test_a_new_repository_is_private_where_asked_for(
    hub, tiny_checkpoint, sample, options, private
):
    push(tiny_checkpoint, "--sample", sample, "--license", "mit", *options)

    assert hub.repositories[REPO].private is private


def test_a_public_repository_is_not_taken_for_private(hub, tiny_checkpoint, sample):
    hub.repositories[REPO] = Repository({})

    with pytest.raises(UserError, match=f"{REPO} is there and public"):
        push(tiny_checkpoint, "--sample", sample, "--license", "mit", "--private")
    assert not hub.repositories[REPO].commits


def test_a_wrong_token_is_refused_before_anything_is_sent(hub, tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")

    with pytest.raises(UserError, match="^the Hub refuses the token; .*HF_TOKEN$"):
        push(tiny_checkpoint)
    assert not hub.repositories


def test_without_a_token_it_says_how_to_get_one(hub, tiny_checkpoint, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")

    with pytest.raises(UserError, match="^no token for the Hub: `hf auth login`"):
        push(tiny_checkpoint)


def test_somebody_else_s_name_is_refused(hub, tiny_checkpoint, sample):
    with pytest.raises(UserError, match="^the token may not write to bob/stories"):
        push(tiny_checkpoint, "--sample", sample, "--license", "mit", repo="bob/stories")


@pytest.mark.parametrize("repo", ["stories", "a/b/c", "alice/my stories", "alice/a--b", "/x", "a/"])
def test_what_is_no_hub_id_is_refused(repo, tiny_checkpoint):
    with pytest.raises(UserError, match="is no Hub id USER/NAME"):
        push(tiny_checkpoint, repo=repo)


def test_folders_without_a_model_that_generates_are_refused(tmp_path, tiny_model_config):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    model = {"format": 1, "model": dataclasses.asdict(tiny_model_config)}
    (tmp_path / "unfinished" / "model.json").write_text(json.dumps(model))
    stable_diffusion_folder(tmp_path / "sd")
    for name, message in {
        "nowhere": "no folder",
        "empty": "holds no model: neither model.json nor unet/",
        "unfinished": "no complete checkpoint",
        "sd": "holds Stable Diffusion, which generates no stories",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            push(tmp_path / name, "--license", "mit", "--dry-run", tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_reports_become_tables_with_protocol_and_intervals(tiny_checkpoint, sample, tmp_path):
    report = {
        "fid": {"value": 14.0712, "low": 13.61, "high": 14.53},
        "clip_t": {"value": 0.25, "low": None, "high": None},
        "protocol": "storyviz",
        "weights_sha256": {"pt_inception.pth": "67"},
        "unverified": ["pt_inception.pth"],
        "count": 11040,
        "reference_count": 11040,
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    options = ("--sample", sample, "--license", "mit", "--dry-run", tmp_path / "out")

    push(tiny_checkpoint, *options, "--reports", tmp_path / "report.json")

    card = (tmp_path / "out" / "README.md").read_text()
    assert "protocol `storyviz`, of 11040 generated frames beside 11040 reference frames" in card
    assert "| fid | 14.0712 | 13.61 to 14.53 |\n| clip_t | 0.25 | - |\n" in card
    assert "Not their published weights" in card


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no JSON object"),
        ('{"fid": 3}', "is no report; name metrics.json of evaluate"),
        ("of another step", "is of step 3, and the model of step 0; evaluate again"),
    ],
)
def test_reports_that_are_none_or_of_other_weights_are_refused(
    report, message, tiny_checkpoint, sample, tmp_path
):
    if report == "of another step":
        values = json.loads((SHIPPED / "metrics.json").read_text())
        values["settings"]["step"] = 3
        report = json.dumps(values)
    (tmp_path / "report.json").write_text(report)
    options = ("--sample", sample, "--license", "mit", "--dry-run", tmp_path / "out")

    with pytest.raises(UserError, match=message):
        push(tiny_checkpoint, *options, "--reports", tmp_path / "report.json")


def test_what_the_card_needs_is_asked_for(tiny_checkpoint, sample, tmp_path):
    out = ("--dry-run", tmp_path / "out")
    with pytest.raises(UserError, match="name the licence: --license ID"):
        push(tiny_checkpoint, *out, "--sample", sample)
    with pytest.raises(UserError, match="--license 'My own' is no identifier"):
        push(tiny_checkpoint, *out, "--license", "My own")
    with pytest.raises(UserError, match="the card shows a story: --sample DIR"):
        push(tiny_checkpoint, *out, "--license", "mit")
    with pytest.raises(UserError, match="is of step 5, and the model of step 0"):
        push(tiny_checkpoint, *out, "--license", "mit", "--sample", write_sample(tmp_path / "s", 5))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(UserError, match="out is there and not empty"):
        push(tiny_checkpoint, *out, "--license", "mit", "--sample", sample)
